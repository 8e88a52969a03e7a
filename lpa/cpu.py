"""CPU kernels that replace PyTorch's own, from outside the model: short attention in bfloat16, and products on AMD.

They are installed for training, under the same operators, so that F.scaled_dot_product_attention and every product of
float32 matrices find them, whatever model.py does. Figures are in results/cpu_kernels.md
(`python -m experiments.speed.products`).

PyTorch gives float32 products to MKL, which is slow on AMD processors. oneDNN, which PyTorch brings along, is faster
there for large products; on Intel it is not. The choice follows from the processor and the model, and not from a
measurement at the start: a busy machine would measure something else, and the same command would give other bits.
"""

import functools
import platform
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from config import TrainConfig

LIBRARY = torch.library.Library("aten", "IMPL")  # what is installed lives as long as this
LONGEST = 512  # tokens up to which attention in bfloat16 is faster without the fused kernel
NARROWEST = 512  # n_embd from which on products by oneDNN outweigh the call from Python


def install(c: TrainConfig) -> str:
    """Install the kernels that make training with these options faster. Return a line that says which.

    Products only for wide models: to look at each product takes 14 % of a float32 step of lpa_cpu.
    """
    smallest = smallest_onednn_product()
    if c.dtype == "bfloat16" and c.gpt.block_size <= LONGEST:
        override("scaled_dot_product_attention", attention, "AutogradCPU")
        return f"CPU kernels: PyTorch's, with unfused attention up to T {LONGEST}"
    if c.dtype == "float32" and smallest is not None and c.gpt.n_embd >= NARROWEST:
        override("mm", mm, "CPU")
        return f"CPU kernels: PyTorch's, with products by oneDNN from {smallest:.2g} multiply-adds"
    return "CPU kernels: PyTorch's"


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
