"""Curves of any runs, as the paper's figures 2 and 3, and perplexity against rank, from their log.jsonl.

    python -m experiments.plot out/dense out/lpa --out=results/curves            training loss against tokens
    python -m experiments.plot out/*_cpu --x=flops --y=bits_per_byte --watch     drawn again while a run goes on
    python -m experiments.plot out/dense out/r16 out/r64 --x=rank --y=perplexity

A run is named by what sets it apart from the others, and runs that differ in nothing but their seed become one curve,
their mean, in a band from the lowest to the highest. Writes a PNG and an SVG.
"""

import contextlib
import os
import sys
import time
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tyro

from config import UserError, parse, user_errors
from experiments.logs import (
    SILENT,
    NothingYet,
    Run,
    describe,
    describe_ranks,
    log_of,
    name_runs,
    ranks,
    read_run,
    require_common_axis,
)

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
WATCH_SECONDS = 5


@dataclass(frozen=True)
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or log.jsonl files of any name."""
    x: Literal["tokens", "flops", "seconds", "rank"] = "tokens"
    """For rank, y is that of each run's last evaluation, and dense runs are level lines."""
    y: Literal["loss", "val_loss", "perplexity", "bits_per_byte"] = "loss"
    out: Path = Path("results/curves")
    """Where OUT.png and OUT.svg go."""
    smooth: float | None = None
    """The training loss is the mean over this share of the longest curve, 0 = as logged, one batch a point; None = 2 %,
    and of a short log 20 points, but at most a fifth."""
    y_max: float | None = None
    """Top of the axis; None = where the slowest curve is after a tenth of the longest, or at its own end."""
    each_seed: bool = False
    """A curve for each run, those that differ only in their seed too."""
    watch: bool = False
    """Draw again whenever a log has grown, until all runs are at their last step."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("no run is named, wanted one or more run folders")
        if self.smooth is not None and not 0 <= self.smooth < 1:
            raise ValueError(f"smooth is {self.smooth}, wanted at least 0 and below 1")
        if self.x == "rank" and self.y == "loss":
            raise ValueError("y is loss, wanted val_loss, perplexity or bits_per_byte where x is rank")


def main(o: Options) -> None:
    if not o.watch:
        draw(o, [read_run(path) for path in o.runs])
        return
    drawn, told = None, None
    while True:
        sizes = [log_of(path).stat().st_size if log_of(path).exists() else 0 for path in o.runs]
        if sizes != drawn:
            drawn = sizes
            try:
                runs = [read_run(path) for path in o.runs]
                draw(o, runs)
            except NothingYet as error:
                if str(error) != told:
                    told = str(error)
                    print(f"waiting: {error}", flush=True)
            else:
                if all(run.finished for run in runs):
                    return
        time.sleep(WATCH_SECONDS)


# --- Curves --------------------------------------------------------------------------------------------------------


@dataclass
class Curve:
    """One line of the picture: what it is called, and (N,) each of x, the mean of its runs, the lowest, the highest."""

    name: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray


def group(o: Options, runs: list[Run]) -> dict[str, list[Run]]:
    """Name -> the runs that it stands for: those that differ in their seed alone, or one."""
    silent = SILENT | (set() if o.x == "seconds" else {"device", "compile", "recompute"})
    names = name_runs([run.options for run in runs], silent | (set() if o.each_seed else {"seed"}))
    groups: dict[str, list[Run]] = {}
    for run, name in zip(runs, names):
        if not name or (o.each_seed and name in groups):
            name = f"{name} {run.path.parent}".strip()
        groups.setdefault(name, []).append(run)
    return groups


def make_curves(o: Options, runs: list[Run]) -> tuple[list[Curve], float]:
    """The curves, and the width of the running mean in units of x; 0 where y is not noisy."""
    xs = max((run.points(o.x, o.y)[0] for run in runs), key=lambda xs: xs[-1])  # of the longest
    share = max(0.02, min(0.2, 20 / len(xs))) if o.smooth is None else o.smooth
    width = share * xs[-1] if o.y == "loss" else 0.0
    several_models = len({run.parameters for run in runs}) > 1
    curves = []
    for name, members in group(o, runs).items():
        points = [run.points(o.x, o.y) for run in members]
        # The seeds' clocks differ, their steps do not: they meet where all have seen as many tokens.
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
    """The mean of the points at most width / 2 from each; near the first one, of no more after it than before.

    A mean that looked only ahead would show the steep beginning too low.
    """
    half = np.minimum(width / 2, x - x[0])
    first, last = np.searchsorted(x, x - half, "left"), np.searchsorted(x, x + half, "right")
    total = np.concatenate([[0.0], np.cumsum(y)])
    return (total[last] - total[first]) / (last - first)


def by_rank(o: Options, runs: list[Run]) -> tuple[dict[str, list[tuple[int, np.ndarray]]], dict[str, np.ndarray]]:
    """Series of low-rank runs, name -> [(rank, y of each seed), ...], and the dense ones, name -> y of each seed.

    Raises UserError where a run has several ranks, or no run has one.
    """
    low: dict[str, list[tuple[int, np.ndarray]]] = {}
    dense: dict[str, np.ndarray] = {}
    without_ranks = SILENT | {"device", "compile", "recompute", "seed"}
    without_ranks |= {name for run in runs for name in run.options if "lowdim" in name}
    others = name_runs([run.options for run in runs], without_ranks)
    series = {id(run): other for run, other in zip(runs, others)}
    for members in group(o, runs).values():
        first, other = members[0], series[id(members[0])]
        last = np.array([run.points("tokens", o.y)[1][-1] for run in members])
        found = ranks(first.options)
        if len(found) > 1:
            raise UserError(f"{first.path} has {describe_ranks(first.options)}: no single rank for --x=rank")
        for rank, sublayers in found.items():
            low.setdefault(", ".join(filter(None, [describe(sublayers), other])), []).append((rank, last))
        if not found:
            dense[", ".join(filter(None, ["dense", other]))] = last
    if not low:
        raise UserError("no run has a low-rank projection, wanted one or more for --x=rank")
    return {name: sorted(points, key=lambda point: point[0]) for name, points in low.items()}, dense


# --- Drawing -------------------------------------------------------------------------------------------------------

# Dark to light by turns, so that neighbours differ in grey too; a line style and a marker besides.
COLOURS = ("#000000", "#e69f00", "#0072b2", "#56b4e9", "#7b3294", "#d55e00", "#009e73")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "X", "P", "<", "*")


def style(number: int) -> dict[str, Any]:
    """Colour, line and marker of the curve of this number; the three cycles differ, so that 252 curves do."""
    return dict(
        color=COLOURS[number % len(COLOURS)],
        linestyle=LINES[number % len(LINES)],
        marker=MARKERS[number % len(MARKERS)],
        markersize=5,
        linewidth=1.6,
    )


def draw(o: Options, runs: list[Run]) -> None:
    require_common_axis(runs, o.y)
    figure, axes = new_figure(7.2, 4.2 + 0.1 * len(runs))
    axes = axes[0, 0]
    if o.x == "rank":
        draw_ranks(o, runs, axes)
    else:
        draw_curves(o, *make_curves(o, runs), axes)
    add_legend(figure, axes)
    save(figure, o.out)


def draw_curves(o: Options, curves: list[Curve], width: float, axes: "Axes") -> None:
    """What make_curves gives, with the labels of both axes."""
    from matplotlib.ticker import EngFormatter

    longest = max(curve.x[-1] for curve in curves)
    for number, curve in enumerate(curves):
        look = style(number)
        # About eight markers a curve, at other places on each.
        apart = max(1, len(curve.x) // 8)
        axes.plot(curve.x, curve.y, label=curve.name, markevery=(number * apart // 3 % apart, apart), **look)
        if (curve.high > curve.low).any():
            axes.fill_between(curve.x, curve.low, curve.high, color=look["color"], alpha=0.15, linewidth=0)
    if o.y_max is not None:
        axes.set_ylim(top=o.y_max)
    else:
        starts = [min(np.searchsorted(curve.x, longest / 10), len(curve.x) - 1) for curve in curves]
        seen = np.concatenate([curve.y[start:] for curve, start in zip(curves, starts)])
        room = 0.06 * (seen.max() - seen.min()) or 0.05 * abs(seen.max()) or 1.0
        axes.set_ylim(min(curve.low.min() for curve in curves) - room, seen.max() + room)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" " if o.x == "flops" else ""))
    shown = EngFormatter(sep="")(float(f"{width:.3g}"))
    unit = {"tokens": " tokens", "flops": " FLOP", "seconds": " s"}[o.x]
    axes.set_xlabel(X[o.x])
    axes.set_ylabel(Y[o.y] + (f"\nmean over {shown}{unit} around each point" if width else ""))


def draw_ranks(o: Options, runs: list[Run], axes: "Axes") -> None:
    """Mean and, over several seeds, standard deviation; a dense run is a level line."""
    from matplotlib.ticker import NullLocator

    low, dense = by_rank(o, runs)
    several = False
    for number, (name, points) in enumerate(low.items()):
        means = [y.mean() for _, y in points]
        spread = [y.std(ddof=1) if len(y) > 1 else 0.0 for _, y in points]
        several |= any(spread)
        axes.errorbar([rank for rank, _ in points], means, spread, label=name, capsize=4, **style(number))
    for number, (name, y) in enumerate(dense.items(), start=len(low)):
        look = style(number) | dict(marker="")
        axes.axhline(y.mean(), label=name, **look)
        if len(y) > 1:
            several, spread = True, y.std(ddof=1)
            axes.axhspan(y.mean() - spread, y.mean() + spread, color=look["color"], alpha=0.15, linewidth=0)
    axes.set_xlabel(X[o.x])
    axes.set_xscale("log", base=2)
    every_rank = sorted({rank for points in low.values() for rank, _ in points})
    axes.set_xticks(every_rank, [str(rank) for rank in every_rank])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylabel(Y[o.y] + ("\nmean and standard deviation over seeds" if several else ""))
    for run in runs:
        if not run.finished:
            print(f"note: {run.path} is not at its last step; what is shown is its last evaluation so far")


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, sharey: Literal["none", "row"] = "none"
) -> tuple["Figure", np.ndarray]:
    """A figure of that size in inches and its axes (rows, columns). Raises UserError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need a package: pip install 'matplotlib>=3.8,<4'") from None
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "lpa"  # the same picture is the same file
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="0.88")
    return figure, axes


def add_legend(figure: "Figure", axes: "Axes") -> None:
    """Above the axes, where it hides no curve; the keys are long enough to show the line's style."""
    handles, names = axes.get_legend_handles_labels()
    # An inch holds about 14 letters of this size, and a key with its room takes as much as 12.
    columns = max(1, int(14 * figure.get_figwidth() / (max(map(len, names)) + 12)))
    figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, handlelength=4)


def save(figure: "Figure", out: Path) -> None:
    """OUT.png and OUT.svg, each with its old contents or the new ones, for whoever looks while it is drawn again."""
    stem = str(out.with_suffix("") if out.suffix in (".png", ".svg") else out)
    try:
        Path(stem).parent.mkdir(parents=True, exist_ok=True)
        for kind, options in (("png", dict(dpi=150)), ("svg", dict(metadata={"Date": None}))):
            figure.savefig(f"{stem}.{kind}.tmp", format=kind, **options)
            os.replace(f"{stem}.{kind}.tmp", f"{stem}.{kind}")
    except OSError as error:
        raise UserError(f"cannot write {stem}.png: {error.strerror}") from None
    print(f"wrote {stem}.png and {stem}.svg", flush=True)


if __name__ == "__main__":
    with user_errors(), contextlib.suppress(KeyboardInterrupt):
        main(parse(sys.argv[1:], Options, __doc__))
