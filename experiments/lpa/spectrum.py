"""How many directions do the projections use? Spectra of a model's matrices, and of what they put out on real text.

    python -m experiments.lpa.spectrum out/dense_cpu out/lpa_cpu --out=results/spectrum

The paper explains why attention bears low rank and the FFN does not: it "tends to concentrate the output in several
subspaces", which brings an attention layer's tokens "closer together" (section 3.3). That is about outputs, so they are
measured too: their effective rank and the cosine between tokens. Writes OUT.md, OUT.png and OUT.svg.

Shapes: B sequences, T time, N = B T tokens, R rank.
"""

import datetime
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import data
from config import UserError, parse, user_errors
from experiments.logs import SILENT, flatten, name_runs
from experiments.plot import add_legend, new_figure, save, style
from lpa import checkpoint, hardware, init
from lpa.counts import dense_weight
from model import Block, LowRank

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    """Of the validation split, for the outputs; they bound an effective rank from above."""
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
    sublayer: str
    shape: str
    values: Tensor
    """Singular values of its matrix, the largest first."""
    stable: float
    effective: float
    output: float
    """Effective rank of its outputs (N, C_out), neither centred nor scaled."""
    cosine: float


@torch.no_grad()
def main(o: Options) -> None:
    device = hardware.choose_device(o.device)
    measured, options = [], []
    for run in o.runs:
        rows, flat = measure(run, o, device)
        measured.append(rows)
        options.append(flat)
    names = name_runs(options, SILENT | {"compile", "recompute", "eval_tokens"})
    named = {}
    for run, name, rows in zip(o.runs, names, measured):
        named[name if name and names.count(name) == 1 else f"{name} {run}".strip()] = rows
    write_table(o, named, device)
    draw(o, named)


def measure(run: Path, o: Options, device: torch.device) -> tuple[list[Row], dict]:
    """Return all rows of a model, and its flat options. One layer at a time is on the device."""
    model, _, manifest = checkpoint.load_model(run, torch.device("cpu"))
    corpus = data.open_corpus(o.dataset or manifest["options"]["dataset"], "val")
    if corpus.meta["tokenizer"] != manifest["tokenizer"]:
        raise UserError(f"the text of {corpus.folder} has another tokenizer than {run}; name its corpus with --dataset")
    c = model.config
    idx, _ = data.eval_batch(corpus, c.block_size, data.eval_windows(corpus, c.block_size, o.tokens))  # (B, T)
    x = model.transformer.wte(idx)  # (B, T, C)
    if c.pos == "learned":
        x = x + model.transformer.wpe.weight
    x = x.to(device)
    rope = None if model.rope is None else model.rope.to(device)
    rows = []
    for layer, block in enumerate(model.transformer.h):
        print(f"{run}: layer {layer + 1} of {c.n_layer}", flush=True)
        block.to(device)
        x, outputs = run_block(block, x, rope)
        for sublayer, y in outputs.items():
            matrix = block.get_submodule(place(sublayer))
            values = spectrum(matrix)
            d_in, d_out = c.projections[sublayer]
            kind = getattr(c.lowdim, sublayer)
            shape = f"{d_in} x {d_out}" + (f", r {kind}" if kind else "")
            output = effective_rank(torch.linalg.svdvals(exact(y.flatten(0, 1))))
            numbers = (stable_rank(values), effective_rank(values), output, mean_cosine(y))
            rows.append(Row(layer, sublayer, shape, values.cpu(), *numbers))
        model.transformer.h[layer] = nn.Identity()  # lets its memory go
    return rows, flatten(manifest["options"])


def place(sublayer: str) -> str:
    return f"attn.{sublayer}" if sublayer in "qkvo" else f"mlp.{sublayer}"


def run_block(block: Block, x: Tensor, rope: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the block's output, and that of each projection (B, T, C_out), of q and k before RoPE."""
    caught: dict[str, Tensor] = {}

    def catch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        return module.register_forward_hook(lambda _, inputs, y: caught.update({name: y}))

    named = {name: block.attn.get_submodule(name) for name in "qkvo"} | dict(block.mlp.named_children())
    hooks = [catch(name, module) for name, module in named.items()]
    result = block(x, rope, None)
    for hook in hooks:
        hook.remove()
    return result, caught


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
    """exp(-sum p_i ln p_i) with p_i = s_i / sum s, of the singular values s (Roy and Vetterli, EUSIPCO 2007)."""
    return torch.special.entr(values / values.sum()).sum().exp().item()


def mean_cosine(y: Tensor) -> float:
    """y (B, T, C) -> the mean cosine of two different tokens of a sequence, over all pairs and sequences.

    The sum over pairs i != j of u_i u_j is |sum u_i|^2 - sum |u_i|^2, so T x T products are not needed.
    """
    u = F.normalize(exact(y), dim=-1)
    pairs = y.size(1) * (y.size(1) - 1)
    return ((u.sum(1).square().sum(-1) - u.square().sum((1, 2))) / pairs).mean().item()


def write_table(o: Options, named: dict[str, list[Row]], device: torch.device) -> None:
    lines = [
        "# Spectra of the projections and of their outputs\n",
        f"{hardware.describe(device)}, torch {torch.__version__}, {datetime.date.today()}.",
        f"Command: `python -m experiments.lpa.spectrum {' '.join(sys.argv[1:])}`\n",
        "- Stable rank: the sum of the squared singular values over the largest of them.",
        "- Effective rank: exp(-sum p ln p), p the singular values over their sum (Roy and Vetterli, 2007).",
        f"- Outputs: of {o.tokens} tokens of the validation split, not centred, q and k before they turn.",
        "- Cosine: the mean over pairs of tokens of the same sequence.\n",
        "## Mean over layers (lowest to highest)\n",
        "| model | projection | shape | " + " | ".join(NUMBERS.values()) + " |",
        "|---" * (3 + len(NUMBERS)) + "|",
    ]
    for sublayer in sublayers_of(named):
        for name, rows in named.items():
            rows = [row for row in rows if row.sublayer == sublayer]
            if rows:
                cells = [in_range([getattr(row, number) for row in rows]) for number in NUMBERS]
                lines.append(f"| {name} | {sublayer} | {rows[0].shape} | " + " | ".join(cells) + " |")
    lines += ["\n## By layer\n", "| model | layer | projection | largest singular value | "]
    lines[-1] += " | ".join(NUMBERS.values()) + " |"
    lines.append("|---" * (4 + len(NUMBERS)) + "|")
    for name, rows in named.items():
        for row in rows:
            numbers = [row.values[0].item(), *(getattr(row, number) for number in NUMBERS)]
            cells = " | ".join(f"{number:.3g}" for number in numbers)
            lines.append(f"| {name} | {row.layer} | {row.sublayer} | {cells} |")
    table = stem(o.out).with_suffix(".md")
    try:
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text("\n".join(lines) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {table}: {error.strerror}") from None
    print("\n".join(lines[: lines.index("\n## By layer\n")]))


def in_range(numbers: list[float]) -> str:
    return f"{np.mean(numbers):.3g} ({min(numbers):.3g} to {max(numbers):.3g})"


def sublayers_of(named: dict[str, list[Row]]) -> list[str]:
    """Those that any of the models has, in the order of a block."""
    seen = {row.sublayer for rows in named.values() for row in rows}
    return [name for name in ("q", "k", "v", "o", "gate", "up", "down") if name in seen]


def stem(out: Path) -> Path:
    return out.with_suffix("") if out.suffix in (".md", ".png", ".svg") else out


def draw(o: Options, named: dict[str, list[Row]]) -> None:
    """A column a projection. Above its singular values over the largest, the mean over layers; below, by layer."""
    sublayers, below = sublayers_of(named), ("effective", "output", "cosine")
    figure, axes = new_figure(1.8 * len(sublayers) + 1, 8.5, 1 + len(below), len(sublayers), sharey="row")
    for column, sublayer in zip(axes.T, sublayers):
        for number, (name, rows) in enumerate(named.items()):
            rows, look = [row for row in rows if row.sublayer == sublayer], style(number)
            if not rows:
                continue
            draw_values(column[0], [row.values for row in rows], look)
            for ax, what in zip(column[1:], below):
                ax.plot([row.layer for row in rows], [getattr(row, what) for row in rows], label=name, **look)
                ax.xaxis.get_major_locator().set_params(integer=True)
        column[0].set_title(sublayer)
        column[0].set_xlabel("number of the value")
        column[-1].set_xlabel("layer")
    for ax, label in zip(axes[:, 0], ("singular value\nover the largest", *(NUMBERS[what] for what in below))):
        ax.set_ylabel(label.replace(" of ", "\nof ").replace(" between", "\nbetween"))
    axes[0, 0].set_ylim(1e-3, 1.3)
    for ax in axes[1:-1, 0]:
        ax.set_ylim(bottom=0)
    add_legend(figure, axes[1, 0])
    save(figure, stem(o.out))


def draw_values(ax: "Axes", spectra: list[Tensor], look: dict[str, str]) -> None:
    """The mean of the layers' spectra, and a band from the lowest to the highest."""
    values = torch.stack([values / values[0] for values in spectra])  # (layers, singular values)
    index = np.arange(1, values.size(1) + 1)
    octaves = [2**i - 1 for i in range(len(index).bit_length())]
    ax.loglog(index, values.mean(0), markevery=octaves, **look)
    ax.fill_between(index, values.amin(0), values.amax(0), color=look["color"], alpha=0.15, linewidth=0)


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
