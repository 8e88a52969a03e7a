"""Measure how many directions the projections use: spectra of a model's matrices, and of their outputs on real text.

    python -m experiments.lpa.spectrum out/dense_cpu out/lpa_cpu --out=results/spectrum

The paper explains why low rank suits attention and not the FFN: attention "tends to concentrate the output in several
subspaces", which brings an attention layer's tokens "closer together" (section 3.3). That is about outputs, so they are
measured too: their effective rank and the cosine between tokens. Writes OUT.md, OUT.png and OUT.svg.

Shapes: B sequences, T time, R rank.
"""

import datetime
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import data
from config import UserError, parse, user_errors
from experiments.logs import SILENT, flatten, name_runs
from experiments.plot import add_legend, new_figure, save, style
from experiments.sweep import markdown_table, write_page
from lpa import checkpoint, hardware, init
from lpa.counts import dense_weight
from model import LowRank

NUMBERS = {
    "stable": "stable rank of the matrix",
    "effective": "effective rank of the matrix",
    "output": "effective rank of the outputs",
    "cosine": "cosine between tokens' outputs",
}


@dataclass(frozen=True)
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders or checkpoints."""
    tokens: int = 4096
    """Tokens of the validation split, for the outputs. An effective rank cannot be larger than this."""
    dataset: str | None = None
    """Text to run on; None = that of the run."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    out: Path = Path("results/spectrum")

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("no run is named, wanted one or more run folders")
        if self.tokens < 2:
            raise ValueError(f"tokens is {self.tokens}, wanted 2 or more")


@dataclass
class Row:
    """One projection of one layer."""

    layer: int
    projection: str
    shape: str
    values: Tensor
    """Singular values of its matrix, the largest first."""
    stable: float
    effective: float
    output: float
    """Effective rank of its outputs (B T, C_out), neither centred nor scaled."""
    cosine: float


@torch.no_grad()
def main(o: Options) -> None:
    device = hardware.choose_device(o.device)
    measured = [measure(run, o, device) for run in o.runs]
    names = name_runs([options for _, options in measured], SILENT | {"compile", "recompute", "eval_tokens"})
    named = {}
    for run, name, (rows, _) in zip(o.runs, names, measured):
        named[name if name and names.count(name) == 1 else f"{name} {run}".strip()] = rows
    write_table(o, named, device)
    draw(o, named)


def measure(run: Path, o: Options, device: torch.device) -> tuple[list[Row], dict[str, Any]]:
    """Return all rows of a model, and its flat options. The outputs of q and k are those before RoPE."""
    model, _, manifest = checkpoint.load_model(run, device)
    corpus = data.open_corpus(o.dataset or manifest["options"]["dataset"], "val")
    if corpus.meta["tokenizer"] != manifest["tokenizer"]:
        raise UserError(f"the text of {corpus.folder} has another tokenizer than {run}; name its corpus with --dataset")
    c = model.config
    rows: list[Row] = []

    def add_row(layer: int, name: str, module: nn.Module, _inputs: tuple, y: Tensor) -> None:
        values = spectrum(module)
        d_in, d_out = c.projections[name]
        rank = getattr(c.lowdim, name)
        shape = f"{d_in} x {d_out}" + (f", r {rank}" if rank else "")
        output = effective_rank(torch.linalg.svdvals(exact(y.flatten(0, 1))))
        numbers = (stable_rank(values), effective_rank(values), output, mean_cosine(y))
        rows.append(Row(layer, name, shape, values.cpu(), *numbers))

    for layer, block in enumerate(model.transformer.h):
        for name in c.projections:
            module = block.get_submodule(f"attn.{name}" if name in "qkvo" else f"mlp.{name}")
            module.register_forward_hook(partial(add_row, layer, name))
    idx, _ = data.eval_batch(corpus, c.block_size, data.eval_windows(corpus, c.block_size, o.tokens))  # (B, T)
    model.hidden(idx.to(device))
    order = list(c.projections)
    return sorted(rows, key=lambda row: (row.layer, order.index(row.projection))), flatten(manifest["options"])


def exact(x: Tensor) -> Tensor:
    """Return x in float64 where the device has it."""
    return x.float() if x.device.type == "mps" else x.double()


def spectrum(layer: nn.Module) -> Tensor:
    """Return the singular values of a layer's matrix; of a low-rank one R of them, through QR of its factors."""
    if isinstance(layer, LowRank):
        return init.product_svd(exact(layer.A), exact(layer.B))[1]
    return torch.linalg.svdvals(exact(dense_weight(layer)))


def stable_rank(values: Tensor) -> float:
    """Return |W|_F^2 / |W|_2^2: the sum of the squared singular values over the largest of them."""
    return (values.square().sum() / values[0].square()).item()


def effective_rank(values: Tensor) -> float:
    """Return exp(-sum p_i ln p_i), p_i = s_i / sum s, of the singular values s (Roy and Vetterli, EUSIPCO 2007)."""
    return torch.special.entr(values / values.sum()).sum().exp().item()


def mean_cosine(y: Tensor) -> float:
    """Return the mean cosine of two different tokens of a sequence, over all pairs and sequences of y (B, T, C).

    The sum over pairs i != j of u_i u_j is |sum u_i|^2 - sum |u_i|^2, so T x T products are not needed.
    """
    u = F.normalize(exact(y), dim=-1)
    pairs = y.size(1) * (y.size(1) - 1)
    return ((u.sum(1).square().sum(-1) - u.square().sum((1, 2))) / pairs).mean().item()


def write_table(o: Options, named: dict[str, list[Row]], device: torch.device) -> None:
    means = [["model", "projection", "shape", *NUMBERS.values()]]
    for projection in projections_of(named):
        for name, all_rows in named.items():
            if rows := [row for row in all_rows if row.projection == projection]:
                columns = [[getattr(row, number) for row in rows] for number in NUMBERS]
                cells = [f"{np.mean(column):.3g} ({min(column):.3g} to {max(column):.3g})" for column in columns]
                means.append([name, projection, rows[0].shape, *cells])
    by_layer = [["model", "layer", "projection", "largest singular value", *NUMBERS.values()]]
    for name, rows in named.items():
        for row in rows:
            numbers = [row.values[0].item(), *(getattr(row, number) for number in NUMBERS)]
            by_layer.append([name, str(row.layer), row.projection, *(f"{number:.3g}" for number in numbers)])
    about = [
        "# Spectra of the projections and of their outputs\n",
        f"{hardware.describe(device)}, torch {torch.__version__}, {datetime.date.today()}.",
        f"Command: `python -m experiments.lpa.spectrum {' '.join(sys.argv[1:])}`\n",
        "- Stable rank: the sum of the squared singular values over the largest of them.",
        "- Effective rank: exp(-sum p ln p), p the singular values over their sum (Roy and Vetterli, 2007).",
        f"- Outputs: of {o.tokens} tokens of the validation split, not centred, q and k before RoPE.",
        "- Cosine: the mean over pairs of tokens of the same sequence.\n",
        f"## Mean over layers (lowest to highest)\n\n{markdown_table(means)}",
    ]
    parts = [*about, f"\n## By layer\n\n{markdown_table(by_layer)}"]
    write_page(o.out.with_suffix(".md"), "\n".join(parts) + "\n")
    print("\n".join(about))


def projections_of(named: dict[str, list[Row]]) -> list[str]:
    """Return the projections that any of the models has, in the order of a block."""
    seen = {row.projection for rows in named.values() for row in rows}
    return [name for name in ("q", "k", "v", "o", "gate", "up", "down") if name in seen]


def draw(o: Options, named: dict[str, list[Row]]) -> None:
    """Draw a column per projection: its singular values over the largest, mean over layers; below, by layer."""
    projections, below = projections_of(named), ("effective", "output", "cosine")
    figure, axes = new_figure(1.8 * len(projections) + 1, 8.5, 1 + len(below), len(projections), sharey="row")
    for column, projection in zip(axes.T, projections):
        for number, (name, rows) in enumerate(named.items()):
            rows, look = [row for row in rows if row.projection == projection], style(number)
            if not rows:
                continue
            values = torch.stack([row.values / row.values[0] for row in rows])  # (layers, singular values)
            index = np.arange(1, values.size(1) + 1)
            octaves = [2**i - 1 for i in range(len(index).bit_length())]
            column[0].loglog(index, values.mean(0), markevery=octaves, **look)
            column[0].fill_between(index, values.amin(0), values.amax(0), color=look["color"], alpha=0.15, linewidth=0)
            for ax, what in zip(column[1:], below):
                ax.plot([row.layer for row in rows], [getattr(row, what) for row in rows], label=name, **look)
                ax.xaxis.get_major_locator().set_params(integer=True)
        column[0].set(title=projection, xlabel="number of the value")
        column[-1].set_xlabel("layer")
    for ax, label in zip(axes[:, 0], ("singular value\nover the largest", *(NUMBERS[what] for what in below))):
        ax.set_ylabel(label.replace(" of ", "\nof ").replace(" between", "\nbetween"))
    axes[0, 0].set_ylim(1e-3, 1.3)
    for ax in axes[1:-1, 0]:
        ax.set_ylim(bottom=0)
    add_legend(figure, axes[1, 0])
    save(figure, o.out.with_suffix(""))


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
