"""CPU kernels that replace PyTorch's own, from outside the model: RMSNorm, short attention, and products on AMD.

They are installed for training, under the same operators, so that F.rms_norm, F.scaled_dot_product_attention and every
product of float32 matrices find them, whatever model.py does. Figures are in results/cpu_kernels.md
(`python -m experiments.speed.products`).

PyTorch gives float32 products to MKL, which uses at most AVX2 on an AMD processor. oneDNN, which PyTorch brings along,
uses AVX-512 there. On AVX2 it is faster for large products alone, and on Intel it is not.
"""

import functools
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("aten", "IMPL")  # what is installed lives as long as this
LONGEST = 512  # tokens up to which attention in bfloat16 is faster without the fused kernel


def install(dtype: str) -> str:
    """Install the kernels that make training in this precision faster. Return a line that says which.

    Not the others: even to look at each product costs a bfloat16 step of lpa_cpu 2 to 7 %.
    """
    override("rms_norm", rms_norm, "AutogradCPU")
    about = "CPU kernels: RMSNorm in few passes"
    if dtype == "bfloat16":
        override("scaled_dot_product_attention", attention, "AutogradCPU")
        about += f", attention up to T {LONGEST} unfused"
    elif dtype == "float32" and (smallest := smallest_onednn_product()) is not None:
        override("mm", mm, "CPU")
        about += f", products by oneDNN from {smallest:.2g} multiply-adds"
    return about


@functools.cache  # once in a process
def override(operator: str, kernel: Callable[..., Tensor], key: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        LIBRARY.impl(operator, kernel, key)


@functools.cache
def smallest_onednn_product() -> int | None:
    """Return from how many multiply-adds oneDNN is faster on this processor; None = never, or not there."""
    about = Path("/proc/cpuinfo")
    vendor = about.read_text() if about.exists() else platform.processor()
    if "AuthenticAMD" not in vendor or not torch.backends.mkldnn.is_available():
        return None
    return 2**26 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 2**29


def mm(a: Tensor, b: Tensor) -> Tensor:
    """Multiply a (N, K) by b (K, M)."""
    large = a.numel() * b.size(1) >= (smallest_onednn_product() or 0)
    if a.dtype == torch.float32 and large and torch.backends.mkldnn.enabled:
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    out = a.new_empty(a.size(0), b.size(1))
    return torch.ops.aten.mm.out(a, b, out=out)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend q (B, H, T, D) to k and v (B, G, T, D); without a fused kernel if causal, short and in bfloat16.

    PyTorch's fused kernel takes longer in bfloat16 than in float32, and on short sequences longer than plain products.
    """
    T, D = q.shape[2:]
    if q.dtype != torch.bfloat16 or not is_causal or mask is not None or dropout or T > LONGEST or k.size(2) != T:
        fused = torch.ops.aten.scaled_dot_product_attention.default
        return fused.decompose(q, k, v, mask, dropout, is_causal, scale=scale, enable_gqa=enable_gqa)
    return unfused_attention(q, k, v, D**-0.5 if scale is None else scale)


def unfused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Form the T x T scores of causal attention."""
    B, H, T, D = q.shape
    q = q.reshape(B * k.size(1), -1, D)  # (B G, H / G T, D): the heads that share a key are more queries
    later = q.new_full((T, T), -torch.inf).triu(1).repeat(H // k.size(1), 1)
    scores = torch.baddbmm(later, q, k.flatten(0, 1).mT, alpha=scale)
    return (scores.softmax(-1) @ v.flatten(0, 1)).view(B, H, T, -1)


def rms_norm(x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Compute F.rms_norm over the last dimension; over others, and without gradients, by its formula."""
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    if len(shape) == 1 and torch.is_grad_enabled():
        return RMSNorm.apply(x, weight, eps)
    mean = x.float().square().mean(dim=tuple(range(-len(shape), 0)), keepdim=True)
    y = (x * (mean + eps).rsqrt()).to(x.dtype)
    return y if weight is None else y * weight


class RMSNorm(torch.autograd.Function):
    """y = w x r with r = (mean x^2 + eps)^-1/2. Sums and r are float32 at least; each pass over x counts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)  # (..., 1)
        r = (length.square() / x.size(-1) + eps).rsqrt()
        ctx.save_for_backward(x, weight, r)
        y = torch.mul(x, r, out=torch.empty_like(x))  # rounded once
        return y if weight is None else y.mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of x: r (w g - x r^2 mean(w g x)). Of w: the sum over rows of g x r."""
        x, weight, r = ctx.saved_tensors
        product = grad * x  # (..., C)
        for_weight = None
        if weight is not None:
            normed = torch.mul(product, r, out=torch.empty_like(x))
            for_weight = normed.sum(tuple(range(x.ndim - 1)), dtype=r.dtype).to(weight.dtype)
            product, grad = product * weight, grad * weight
        mean = product.sum(-1, keepdim=True, dtype=r.dtype) / x.size(-1)
        for_x = torch.mul(grad, r, out=torch.empty_like(x))
        return for_x.sub_(torch.mul(x, r**3 * mean, out=product)), for_weight, None
