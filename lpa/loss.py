"""What training keeps in memory between forward and backward: less of a block, and never all logits.

Shapes: B batch, T time, C n_embd, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

from lpa.cpu import linear, sums

# The attention kernels that never form T x T scores, by device and by what they can take
FUSED_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}
# Products by a weight, and where x (..., width) stands among their arguments
PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1, torch.ops.lpa.linear.default: 0}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    PRODUCTS[torch.ops.mkldnn._linear_pointwise.default] = 0


def keep_wide(widths: set[int], _context: Any, op: Any, *args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """What backward finds saved: attention, with its log-sum-exp, and the products that contract over one of `widths`.

    All else is cheap to run again: an up-projection contracts over a rank only, the rest is a pass over its elements.
    """
    at = PRODUCTS.get(op)
    wide = at is not None and args[at].size(-1) in widths
    return CheckpointPolicy.MUST_SAVE if wide or op in FUSED_ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


class GatedProduct(torch.autograd.Function):
    """(silu(gate) * up) W^T, which keeps gate and up alone: silu and the product of both are a pass each to rebuild."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        """gate and up (..., F), weight (C, F) -> (..., C)"""
        ctx.save_for_backward(gate, up, weight)
        return linear(F.silu(gate) * up, weight.to(gate.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, weight = ctx.saved_tensors
        silu = F.silu(gate)
        rows, h = grad.flatten(0, -2), (silu * up).flatten(0, -2)  # (N, C) and (N, F)
        for_weight = linear(rows.T, h.T).to(weight.dtype)
        for_h = linear(grad, weight.to(gate.dtype).T)  # (..., F)
        for_gate = torch.ops.aten.silu_backward(for_h * up, gate)
        return for_gate, for_h.mul_(silu), for_weight


LOSS_CHUNK = 1024  # tokens whose logits are there together


class HeadLoss(torch.autograd.Function):
    """The head and its cross entropy by LOSS_CHUNK tokens, so that the logits (B T, V) are never there together.

    The gradients are made along with the loss, while a chunk's logits are at hand: a checkpoint would make them twice.
    Every target must be a token: there is no ignored index.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, with_gradients: bool
    ) -> Tensor:
        """x (B T, C), weight (V, C), bias (V) or None, targets (B T) -> the sum of the losses in nats, float32."""
        w, b = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        exact = sums(x)
        loss = torch.zeros((), device=x.device, dtype=exact)
        grad_x, grad_w, grad_b = torch.empty_like(x), None, None
        for start in range(0, len(x), LOSS_CHUNK):
            chunk, y = x[start : start + LOSS_CHUNK], targets[start : start + LOSS_CHUNK, None]
            log_p = F.log_softmax(linear(chunk, w, b), -1, dtype=exact)  # (LOSS_CHUNK, V)
            loss = loss - log_p.gather(1, y).sum()  # in place, torch 2.11 would compile it to gradients of zero
            if not with_gradients:
                continue
            # Of the sum, not the mean: a small p / (B T) would vanish in float16, whose loss scale is yet to come.
            grad = log_p.exp_().scatter_add_(1, y, torch.full_like(y, -1, dtype=log_p.dtype))
            if b is not None:
                grad_b = grad.sum(0) if grad_b is None else grad_b + grad.sum(0)
            grad = grad.to(x.dtype)
            grad_x[start : start + LOSS_CHUNK] = linear(grad, w.T)
            part = linear(grad.T, chunk.T)
            grad_w = part.to(exact) if grad_w is None else grad_w.add_(part)  # FSDP's weight itself is in bfloat16
        if with_gradients:
            ctx.save_for_backward(grad_x, grad_w, grad_b)
            ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_w, grad_b = ctx.saved_tensors
        # float32, as a mean's 1 / (B T) is not a power of two and bfloat16 would round it for all tokens alike
        grad_x = (grad_x.to(sums(grad_x)) * grad).to(grad_x.dtype)
        # In place, as a second (V, C) would be as large as the head; autograd refuses to run such a backward twice.
        grad_b = None if grad_b is None else (grad_b * grad).to(ctx.dtype)
        return grad_x, grad_w.mul_(grad).to(ctx.dtype), grad_b, None, None
