"""What cpu.py gains on this machine: GFLOP/s of the three float32 products of a layer, milliseconds of RMSNorm.

    python -m experiments.products

Of a product y = x W^T forward, then the gradients of x and of W; of RMSNorm forward and backward together. F.linear
and F.rms_norm are what PyTorch does by itself. Writes results/products_DEVICE.md.
"""

import datetime
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from config import UserError, parse, user_errors
from lpa import cpu, hardware


@dataclass(frozen=True)
class Options:
    rows: int = 1024
    """Tokens of a micro-step."""
    shapes: tuple[str, ...] = ("1024x1024", "1024x2736", "2736x1024", "1024x256", "256x1024", "1024x8192", "192x768")
    """Width in and width out of each layer."""
    seconds: float = 0.3
    """For each figure; the fastest run counts."""


def main(o: Options) -> None:
    if not cpu.suits_onednn(torch.empty(1), torch.empty(1)):
        raise UserError("this PyTorch has no oneDNN: cpu.linear is F.linear")
    on = hardware.describe(torch.device("cpu"))
    lines = [
        "# Float32 products on a CPU: F.linear (MKL) and cpu.linear (oneDNN)\n",
        f"GFLOP/s at {o.rows} rows, torch {torch.__version__}, {on}, {datetime.date.today()}.",
        f"Command: `python -m experiments.products {' '.join(sys.argv[1:])}`\n",
        "| width in x out | y, MKL | y, oneDNN | grad of x, MKL | oneDNN | grad of W, MKL | oneDNN |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape in o.shapes:
        d_in, d_out = (int(width) for width in shape.split("x"))
        x, weight, grad = torch.randn(o.rows, d_in), torch.randn(d_out, d_in), torch.randn(o.rows, d_out)
        of = [(x, weight), (grad, weight.T), (grad.T, x.T)]
        cells = [f"{rate(f, a, b, o.seconds):.0f}" for a, b in of for f in (F.linear, cpu.linear)]
        lines.append(f"| {shape} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    lines += ["\nRMSNorm, forward and backward, milliseconds at 2048 rows:\n"]
    lines += ["| width, dtype | F.rms_norm | cpu.rms_norm |", "|---|---|---|"]
    for width, dtype in itertools.product((192, 1024), (torch.float32, torch.bfloat16)):
        x, weight = torch.randn(2048, width).to(dtype).requires_grad_(), torch.ones(width, dtype=dtype).requires_grad_()
        cells = [f"{1e3 * norm_seconds(f, x, weight, o.seconds):.2f}" for f in (torch_rms_norm, cpu.rms_norm)]
        lines.append(f"| {width}, {dtype} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    cells = [f"{fill_ms(o.seconds):.1f}"]
    hardware.keep_freed_memory()
    cells.append(f"{fill_ms(o.seconds):.1f}")
    lines.append(f"\nA new tensor of 64 MiB, filled: {cells[0]} ms, and {cells[1]} after hardware.keep_freed_memory().")
    print(lines[-1])
    Path("results").mkdir(exist_ok=True)
    Path(f"results/products_cpu{torch.get_num_threads()}.md").write_text("\n".join(lines) + "\n")


def fill_ms(seconds: float) -> float:
    return 1e3 * hardware.fastest(lambda: torch.empty(2**24).fill_(1), torch.device("cpu"), seconds)


def torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def norm_seconds(f: Callable[[Tensor, Tensor, float], Tensor], x: Tensor, weight: Tensor, seconds: float) -> float:
    grad = torch.ones_like(x)
    run = lambda: torch.autograd.grad(f(x, weight, 1e-6), (x, weight), grad)  # noqa: E731
    return hardware.fastest(run, torch.device("cpu"), seconds)


@torch.no_grad()
def rate(f: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, seconds: float) -> float:
    flops = 2 * x.size(0) * weight.numel()
    return flops / hardware.fastest(lambda: f(x, weight), torch.device("cpu"), seconds) / 1e9


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
