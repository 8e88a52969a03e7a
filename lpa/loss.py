"""The head and its cross entropy, computed in chunks of tokens, so that the logits (B T, V) never exist together.

Shapes: N tokens (B T), C n_embd, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 1024  # tokens whose logits exist together


@torch.compiler.disable  # compiled as a part of the model, torch 2.11 makes gradients of zero
def chunked_cross_entropy(head: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy in nats of head(x), float32 or more. x (..., C), targets (...), all of them tokens.

    Calls `head` as any module is called, so a change in it changes the loss.
    """
    y = targets.flatten()
    parameters = tuple(head.parameters())
    return ChunkedLoss.apply(head, torch.is_grad_enabled(), x.flatten(0, -2), y, *parameters) / len(y)


class ChunkedLoss(torch.autograd.Function):
    """The gradients are computed along with the loss: a checkpoint would compute each chunk's logits twice."""

    @staticmethod
    def forward(ctx: Any, head: nn.Module, training: bool, x: Tensor, y: Tensor, *parameters: Tensor) -> Tensor:
        """Return the sum of the losses of x (N, C) at y (N)."""
        loss = torch.zeros((), device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        grad_x, grads = torch.empty_like(x), [None] * len(parameters)
        for start in range(0, len(x), CHUNK):
            chunk, target = x[start : start + CHUNK].detach(), y[start : start + CHUNK, None]
            with torch.set_grad_enabled(training):
                logits = head(chunk.requires_grad_(training))  # (CHUNK, V)
            log_p = F.log_softmax(logits.detach(), -1, dtype=loss.dtype)
            loss -= log_p.gather(1, target).sum()
            if not training:
                continue
            # p - one-hot: the gradient of the sum, not of the mean. A small p / N would vanish in float16, whose loss
            # scale comes later.
            grad = log_p.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=log_p.dtype))
            inputs = (chunk, *parameters)
            grad_x[start : start + CHUNK], *parts = torch.autograd.grad(logits, inputs, grad.type_as(logits))
            # Summed in float32: FSDP gathers bfloat16 weights.
            parts = [part.to(loss.dtype) for part in parts]
            grads = [part if total is None else total.add_(part) for total, part in zip(grads, parts)]
        if training:
            ctx.save_for_backward(grad_x, *grads)
            ctx.dtypes = [p.dtype for p in parameters]
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, *grads = ctx.saved_tensors
        # In float32: the mean's 1 / N is no power of two, and bfloat16 would round it for all tokens alike.
        grad_x = (grad_x.to(grad.dtype) * grad).to(grad_x.dtype)
        # In place, as a second (V, C) would be as large as the head.
        return None, None, grad_x, None, *(g.mul_(grad).to(dtype) for g, dtype in zip(grads, ctx.dtypes))
