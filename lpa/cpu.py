"""Matrix products and RMSNorm for a CPU in oneDNN and in few passes; elsewhere they are PyTorch's own.

On a CPU PyTorch gives float32 products to MKL, which leaves half of an AMD processor idle: a product of 1024 x 1024 by
1024 x 1024 ran at 168 GFLOP/s on two cores of an EPYC, and at 395 in oneDNN, which PyTorch brings along and uses where
the products are of bfloat16 (`python -m experiments.products`). torch.backends.mkldnn.flags(enabled=False) avoids it.

Shapes: N rows, all leading dimensions together; C the width that is normed.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., C_in) times weight (C_out, C_in)^T, plus bias (C_out): (..., C_out). As F.linear.

    Without gradients on a CPU, 2 to 4 rows, as decoding a batch has them, are fastest as W x^T; but only with x in
    rows, so the result is copied back into rows.
    """
    rows = x.numel() // x.size(-1)
    if x.device.type == "cpu" and 1 < rows <= 4 and not torch.is_grad_enabled():
        columns = x.reshape(rows, -1).T  # (C_in, N)
        y = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
        return y.T.contiguous().view(*x.shape[:-1], -1)
    if rows * weight.numel() >= 2**20 and suits_onednn(x, weight):
        return Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether the operator by which torch.compile calls oneDNN for float32 takes these here."""
    if x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32 or torch.is_autocast_enabled("cpu"):
        return False  # bfloat16 goes to oneDNN by itself
    return bool(torch.backends.mkldnn.enabled) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if torch.compiler.is_compiling():
        return onednn_compiled(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.custom_op("lpa::linear", mutates_args=())
def onednn_compiled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A box that torch.compile does not look into: it would take the operator in it for one of frozen weights."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@onednn_compiled.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


class Linear(torch.autograd.Function):
    """F.linear whose three products, one forward and two backward, are oneDNN's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, grads = x.reshape(-1, x.size(-1)), grad.reshape(-1, grad.size(-1))  # (N, C_in) and (N, C_out)
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            onednn(grad, weight.T) if for_x else None,
            onednn(grads.T, rows.T) if for_weight else None,
            grads.sum(0) if for_bias else None,
        )


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x (..., C) over the root of its mean square, times weight (C) of the same dtype. As F.rms_norm.

    Where nothing compiles it, a CPU runs that in many passes over x, and its backward in more, which takes longer than
    the function below (`python -m experiments.products`). Never under autocast, whose copies would be float32.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and torch.is_grad_enabled():
        return RMSNorm.apply(x, weight, eps)
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, x.shape[-1:], weight, eps)


class RMSNorm(torch.autograd.Function):
    """y = w x r with r = (mean x^2 + eps)^-1/2, which is float32, as are all sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=sums(x))  # (..., 1)
        r = (length.square() / x.size(-1) + eps).rsqrt()
        ctx.save_for_backward(x, weight, r)
        y = torch.mul(x, r, out=torch.empty_like(x))  # rounded once
        return y if weight is None else y.mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of x: r (w g - x r^2 mean(w g x)); of w: the sum over rows of g x r."""
        x, weight, r = ctx.saved_tensors
        product = grad * x  # (..., C)
        for_weight = None
        if weight is not None:
            normed = torch.mul(product, r, out=torch.empty_like(x))
            for_weight = normed.sum(tuple(range(x.ndim - 1)), dtype=sums(x)).to(weight.dtype)
            product, grad = product * weight, grad * weight
        mean = product.sum(-1, keepdim=True, dtype=sums(x)) / x.size(-1)
        for_x = torch.mul(grad, r, out=torch.empty_like(x))
        return for_x.sub_(torch.mul(x, r**3 * mean, out=product)), for_weight, None


def sums(x: Tensor) -> torch.dtype:
    """In which precision sums of x are made: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)
