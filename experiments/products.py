"""What F.linear and products.linear make of this machine: GFLOP/s of the three float32 products of a layer.

    python -m experiments.products

y = x W^T forward, then the gradients of x and of W. Writes results/products_DEVICE.md.
"""

import datetime
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import hardware
import products
from config import UserError, parse, user_errors


@dataclass(frozen=True)
class Options:
    rows: int = 1024
    """Tokens of a micro-step."""
    shapes: tuple[str, ...] = ("1024x1024", "1024x2736", "2736x1024", "1024x256", "256x1024", "1024x8192", "192x768")
    """Width in and width out of each layer."""
    seconds: float = 0.3
    """For each figure; the fastest run counts."""


def main(o: Options) -> None:
    if not products.suits_onednn(torch.empty(1), torch.empty(1)):
        raise UserError("this PyTorch has no oneDNN: products.linear is F.linear")
    on = hardware.describe(torch.device("cpu"))
    lines = [
        "# Float32 products on a CPU: F.linear (MKL) and products.linear (oneDNN)\n",
        f"GFLOP/s at {o.rows} rows, torch {torch.__version__}, {on}, {datetime.date.today()}.",
        f"Command: `python -m experiments.products {' '.join(sys.argv[1:])}`\n",
        "| width in x out | y, MKL | y, oneDNN | grad of x, MKL | oneDNN | grad of W, MKL | oneDNN |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape in o.shapes:
        d_in, d_out = (int(width) for width in shape.split("x"))
        x, weight, grad = torch.randn(o.rows, d_in), torch.randn(d_out, d_in), torch.randn(o.rows, d_out)
        of = [(x, weight), (grad, weight.T), (grad.T, x.T)]
        cells = [f"{rate(f, a, b, o.seconds):.0f}" for a, b in of for f in (F.linear, products.linear)]
        lines.append(f"| {shape} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    Path("results").mkdir(exist_ok=True)
    Path(f"results/products_cpu{torch.get_num_threads()}.md").write_text("\n".join(lines) + "\n")


@torch.no_grad()
def rate(f: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, seconds: float) -> float:
    flops = 2 * x.size(0) * weight.numel()
    return flops / hardware.fastest(lambda: f(x, weight), torch.device("cpu"), seconds) / 1e9


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
