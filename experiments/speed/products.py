"""Measure the CPU kernels of PyTorch and of lpa/cpu.py: float32 products by MKL and oneDNN, and attention.

    python -m experiments.speed.products

GFLOP/s of a layer's three products: y = x W^T, the gradient of x, the gradient of W. Writes results/cpu_kernels.md.
"""

import datetime
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from config import parse, user_errors
from experiments.sweep import write_page
from lpa import cpu, hardware

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Options:
    rows: int = 1024
    """Tokens of a micro-step."""
    shapes: tuple[str, ...] = ("1024x1024", "1024x2736", "2736x1024", "1024x256", "256x1024", "1024x8192", "192x768")
    """Width in and width out of each layer."""
    seconds: float = 0.3
    """For each figure; the fastest run counts."""
    out: Path = Path("results/cpu_kernels.md")


def main(o: Options) -> None:
    lines = [
        "# CPU kernels\n",
        f"torch {torch.__version__}, {hardware.describe(CPU)}, {datetime.date.today()}, {o.rows} rows.",
        f"Command: `python -m experiments.speed.products {' '.join(sys.argv[1:])}`\n",
        "GFLOP/s in float32 | y, MKL | oneDNN | grad of x, MKL | oneDNN | grad of W, MKL | oneDNN",
        "|".join(["---"] * 7),
    ]
    for shape in o.shapes:
        d_in, d_out = (int(width) for width in shape.split("x"))
        x, weight, grad = torch.randn(o.rows, d_in), torch.randn(d_out, d_in), torch.randn(o.rows, d_out)
        products = ((x, weight.T), (grad, weight), (grad.T, x))
        cells = [rate(f, a, b, o.seconds) for a, b in products for f in (mkl, onednn)]
        lines.append(f"{shape} | {' | '.join(f'{cell:.0f}' for cell in cells)}")
        print(lines[-1], flush=True)
    lines += ["\nCausal attention in bfloat16, forward and backward, ms | fused | unfused", "---|---|---"]
    for B, H, T in ((8, 3, 256), (1, 16, 512), (2, 12, 1024)):
        q, k, v = (torch.randn(B, H, T, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        runs = (partial(F.scaled_dot_product_attention, is_causal=True), partial(cpu.unfused_attention, scale=0.125))
        times = [both_passes_ms(partial(run, q, k, v), (q, k, v), o.seconds) for run in runs]
        lines.append(f"{B} sequences, {H} heads of 64, T {T} | {times[0]:.2f} | {times[1]:.2f}")
        print(lines[-1], flush=True)
    fill = [1e3 * hardware.fastest(lambda: torch.empty(2**24).fill_(1), CPU, o.seconds)]
    hardware.keep_freed_memory(CPU)
    fill.append(1e3 * hardware.fastest(lambda: torch.empty(2**24).fill_(1), CPU, o.seconds))
    lines.append(f"\nA new tensor of 64 MiB, filled: {fill[0]:.1f} ms, {fill[1]:.1f} ms after keep_freed_memory().")
    write_page(o.out, "\n".join(lines) + "\n")
    print(f"{lines[-1]}\nwritten to {o.out}")


def mkl(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b)


def onednn(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


@torch.no_grad()
def rate(f: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, seconds: float) -> float:
    return 2 * a.numel() * b.size(1) / hardware.fastest(lambda: f(a, b), CPU, seconds) / 1e9


def both_passes_ms(f: Callable[[], Tensor], inputs: tuple[Tensor, ...], seconds: float) -> float:
    grad = torch.ones_like(f())
    return 1e3 * hardware.fastest(lambda: torch.autograd.grad(f(), inputs, grad), CPU, seconds)


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
