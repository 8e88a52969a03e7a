"""Plot curves of any runs from their logs, as the paper's figures 2 and 3, and perplexity against rank.

    python -m experiments.plot out/dense out/lpa --out=results/curves            training loss against tokens
    python -m experiments.plot out/*_cpu --x=flops --y=bits_per_byte
    python -m experiments.plot out/dense out/r16 out/r64 --x=rank --y=perplexity

Each run is named by the options that distinguish it from the others. Runs that differ only in their seed become one
curve, their mean, with a band from the lowest to the highest. Prints the curves and writes a PNG and an SVG.
"""

import sys
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tyro

from config import UserError, parse, user_errors
from experiments.logs import SILENT, Run, describe_ranks, name_runs, read_run, require_common_axis
from experiments.sweep import aligned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

X = {
    "tokens": "training tokens",
    "flops": "training compute (FLOP, those of matrix products and causal attention)",
    "seconds": "training time (s, without evaluation and saving)",
    "rank": "rank r of the low-rank projections",
}
Y = {
    "loss": "training loss (nats per token)",
    "val_loss": "validation loss (nats per token)",
    "perplexity": "validation perplexity (per token)",
    "bits_per_byte": "validation loss (bits per byte)",
}


@dataclass(frozen=True)
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or log.jsonl files of any name."""
    x: Literal["tokens", "flops", "seconds", "rank"] = "tokens"
    """rank: y is from each run's last evaluation, and dense runs are horizontal lines."""
    y: Literal["loss", "val_loss", "perplexity", "bits_per_byte"] = "loss"
    out: Path = Path("results/curves")
    """Write OUT.png and OUT.svg."""
    smooth: float | None = None
    """Average the training loss over this share of the longest curve; 0 = as logged; None = 2 %, or 20 points of a
    short log."""
    y_max: float | None = None
    """Top of the axis; None = the highest curve after a tenth of the longest."""
    each_seed: bool = False
    """Draw a curve for each run, also for those that differ only in their seed."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("no run is named, wanted one or more run folders")
        if self.smooth is not None and not 0 <= self.smooth < 1:
            raise ValueError(f"smooth is {self.smooth}, wanted at least 0 and below 1")
        if self.x == "rank" and self.y == "loss":
            raise ValueError("y is loss, wanted val_loss, perplexity or bits_per_byte where x is rank")


def main(o: Options) -> None:
    runs = [read_run(path) for path in o.runs]
    require_common_axis(runs, o.y)
    figure, axes = new_figure(7.2, 4.2 + 0.1 * len(runs))
    if o.x == "rank":
        draw_ranks(o, runs, axes[0, 0])
    else:
        curves, width = make_curves(o, runs)
        draw_curves(o, curves, width, axes[0, 0])
        print(as_text(o, curves))
    add_legend(figure, axes[0, 0])
    save(figure, o.out)


# --- Curves --------------------------------------------------------------------------------------------------------


@dataclass
class Curve:
    """One line of the plot: its name, and (N,) each of x, the mean of its runs, the lowest, the highest."""

    name: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray


def group(o: Options, runs: list[Run]) -> dict[str, list[Run]]:
    """Return each name with its runs: those that differ only in their seed, or one."""
    silent = SILENT | (set() if o.x == "seconds" else {"device", "compile", "recompute"})
    names = name_runs([run.options for run in runs], silent | (set() if o.each_seed else {"seed"}))
    groups: dict[str, list[Run]] = {}
    for run, name in zip(runs, names):
        if not name or (o.each_seed and name in groups):
            name = f"{name} {run.path.parent}".strip()
        groups.setdefault(name, []).append(run)
    return groups


def make_curves(o: Options, runs: list[Run]) -> tuple[list[Curve], float]:
    """Return the curves, and the width of the running mean in units of x; 0 where y is not noisy."""
    xs = max((run.points(o.x, o.y)[0] for run in runs), key=lambda xs: xs[-1])  # of the longest
    share = max(0.02, min(0.2, 20 / len(xs))) if o.smooth is None else o.smooth
    width = share * xs[-1] if o.y == "loss" else 0.0
    several_models = len({run.parameters for run in runs}) > 1
    curves = []
    for name, members in group(o, runs).items():
        points = [run.points(o.x, o.y) for run in members]
        # The seconds of the seeds differ, their steps do not: average where all have seen as many tokens.
        tokens = [run.points("tokens", o.y)[0] for run in members]
        shared = [np.isin(t, reduce(np.intersect1d, tokens)) for t in tokens]
        if not shared[0].any():
            paths = " and ".join(str(run.path) for run in members)
            raise UserError(f"{paths} have no logged step in common, wanted some for their mean; use --each_seed")
        x = np.mean([xs[at] for (xs, _), at in zip(points, shared)], axis=0)  # (N,)
        ys = np.array([running_mean(xs, y, width)[at] for (xs, y), at in zip(points, shared)])  # (runs, N)
        name += f", {members[0].parameters / 1e6:.3g}M" if several_models else ""
        name += f" (mean of {len(members)})" if len(members) > 1 else ""
        curves.append(Curve(name, x, ys.mean(0), ys.min(0), ys.max(0)))
    return curves, width


def running_mean(x: np.ndarray, y: np.ndarray, width: float) -> np.ndarray:
    """Return the mean of the points at most width / 2 from each; near the first one, of as much after as before it.

    Otherwise the steep beginning would be drawn too low.
    """
    half = np.minimum(width / 2, x - x[0])
    first, last = np.searchsorted(x, x - half, "left"), np.searchsorted(x, x + half, "right")
    total = np.concatenate([[0.0], np.cumsum(y)])
    return (total[last] - total[first]) / (last - first)


def as_text(o: Options, curves: list[Curve]) -> str:
    """Return the curves as columns, at eight places along x."""
    lines = [[o.x, *(curve.name or Y[o.y] for curve in curves)]]
    for x in np.linspace(min(curve.x[0] for curve in curves), max(curve.x[-1] for curve in curves), 8):
        ys = [f"{np.interp(x, c.x, c.y):.4f}" if c.x[0] <= x <= c.x[-1] else "-" for c in curves]
        lines.append([f"{x:,.4g}" if o.x == "flops" else f"{x:,.0f}", *ys])
    return aligned(lines)


def by_rank(o: Options, runs: list[Run]) -> dict[str, list[tuple[int, np.ndarray]]]:
    """Return series by name: [(rank, y of each seed), ...], with rank 0 for dense runs.

    Raise UserError where a run has several ranks, or no run has one.
    """
    series: dict[str, list[tuple[int, np.ndarray]]] = {}
    silent = SILENT | {"device", "compile", "recompute", "seed"}
    silent |= {name for run in runs for name in run.options if "lowdim" in name}
    others = dict(zip([run.path for run in runs], name_runs([run.options for run in runs], silent)))
    for members in group(o, runs).values():
        first = members[0]
        if len(first.ranks()) > 1:
            raise UserError(f"{first.path} has {describe_ranks(first.options)}: no single rank for --x=rank")
        rank = next(iter(first.ranks()), 0)
        name = ", ".join(filter(None, [describe_ranks(first.options).partition(" r=")[0], others[first.path]]))
        last = np.array([run.points("tokens", o.y)[1][-1] for run in members])
        series.setdefault(name, []).append((rank, last))
    if not any(rank for points in series.values() for rank, _ in points):
        raise UserError("no run has a low-rank projection, wanted one or more for --x=rank")
    return {name: sorted(points, key=lambda point: point[0]) for name, points in series.items()}


# --- Drawing -------------------------------------------------------------------------------------------------------

# Dark and light in turns, so that neighbours also differ in grey.
COLOURS = ("#000000", "#e69f00", "#0072b2", "#56b4e9", "#7b3294", "#d55e00", "#009e73")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "X", "P", "<", "*")


def style(number: int) -> dict[str, Any]:
    """Return colour, line and marker of a curve; the three cycles have different lengths, so 252 curves differ."""
    return dict(
        color=COLOURS[number % len(COLOURS)],
        linestyle=LINES[number % len(LINES)],
        marker=MARKERS[number % len(MARKERS)],
        markersize=5,
        linewidth=1.6,
    )


def draw_curves(o: Options, curves: list[Curve], width: float, axes: "Axes") -> None:
    """Draw what make_curves returns, with the labels of both axes."""
    from matplotlib.ticker import EngFormatter

    longest = max(curve.x[-1] for curve in curves)
    for number, curve in enumerate(curves):
        look = style(number)
        # About eight markers per curve, at different places on each
        apart = max(1, len(curve.x) // 8)
        axes.plot(curve.x, curve.y, label=curve.name, markevery=(number * apart // 3 % apart, apart), **look)
        if (curve.high > curve.low).any():
            axes.fill_between(curve.x, curve.low, curve.high, color=look["color"], alpha=0.15, linewidth=0)
    if o.y_max is not None:
        axes.set_ylim(top=o.y_max)
    else:
        starts = [min(np.searchsorted(curve.x, longest / 10), len(curve.x) - 1) for curve in curves]
        seen = np.concatenate([curve.y[start:] for curve, start in zip(curves, starts)])
        margin = 0.06 * (seen.max() - seen.min()) or 0.05 * abs(seen.max()) or 1.0
        axes.set_ylim(min(curve.low.min() for curve in curves) - margin, seen.max() + margin)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" " if o.x == "flops" else ""))
    shown = EngFormatter(sep="")(float(f"{width:.3g}"))
    unit = {"tokens": " tokens", "flops": " FLOP", "seconds": " s"}[o.x]
    axes.set_xlabel(X[o.x])
    axes.set_ylabel(Y[o.y] + (f"\nmean over {shown}{unit} around each point" if width else ""))


def draw_ranks(o: Options, runs: list[Run], axes: "Axes") -> None:
    """Draw mean and standard deviation over seeds against rank; a dense run is a horizontal line."""
    from matplotlib.ticker import NullLocator

    series = by_rank(o, runs)
    for number, (name, points) in enumerate(series.items()):
        look = style(number)
        means = [y.mean() for _, y in points]
        stds = [y.std(ddof=1) if len(y) > 1 else 0.0 for _, y in points]
        if points[0][0] == 0:
            axes.axhline(means[0], label=name, **look | dict(marker=""))
            axes.axhspan(means[0] - stds[0], means[0] + stds[0], color=look["color"], alpha=0.15, linewidth=0)
        else:
            axes.errorbar([rank for rank, _ in points], means, stds, label=name, capsize=4, **look)
    axes.set_xlabel(X[o.x])
    axes.set_xscale("log", base=2)
    ranks = sorted({rank for points in series.values() for rank, _ in points if rank})
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.xaxis.set_minor_locator(NullLocator())
    several = any(len(y) > 1 for points in series.values() for _, y in points)
    axes.set_ylabel(Y[o.y] + ("\nmean and standard deviation over seeds" if several else ""))
    for run in runs:
        if not run.finished:
            print(f"note: {run.path} is not at its last step; its last evaluation so far is shown")


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, sharey: Literal["none", "row"] = "none"
) -> tuple["Figure", np.ndarray]:
    """Return a figure of this size in inches and its axes (rows, columns). Raise UserError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need a package: pip install 'matplotlib>=3.8,<4'") from None
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "lpa"  # the same plot gives the same file
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="0.88")
    return figure, axes


def add_legend(figure: "Figure", axes: "Axes") -> None:
    """Put the legend above the axes, where it hides no curve."""
    handles, names = axes.get_legend_handles_labels()
    # An inch holds about 14 letters of this size, and a key takes as much space as 12.
    columns = max(1, int(14 * figure.get_figwidth() / (max(map(len, names)) + 12)))
    figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, handlelength=4)


def save(figure: "Figure", out: Path) -> None:
    """Write OUT.png and OUT.svg."""
    stem = str(out.with_suffix("") if out.suffix in (".png", ".svg") else out)
    try:
        Path(stem).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(f"{stem}.png", dpi=150)
        figure.savefig(f"{stem}.svg", metadata={"Date": None})
    except OSError as error:
        raise UserError(f"cannot write {stem}.png: {error.strerror}") from None
    print(f"wrote {stem}.png and {stem}.svg", flush=True)


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
