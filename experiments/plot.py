"""Draw curves of any runs from their log.jsonl, as the paper's figures 2 and 3, and perplexity against rank.

    python -m experiments.plot out/dense out/lpa --out=results/curves            training loss against tokens
    python -m experiments.plot out/*_cpu --x=flops --y=bits_per_byte --watch     drawn again while a run continues
    python -m experiments.plot out/dense out/r16 out/r64 --x=rank --y=perplexity

A run is named by the options in which it differs from the others. Runs that differ only in their seed become one curve,
their mean, with a band from the lowest to the highest. Writes a PNG and an SVG.
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
from experiments.logs import SILENT, NothingYet, Run, describe, log_of, name_runs, ranks, read_run, require_common_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

X = {
    "tokens": ("training tokens", " tokens"),
    "flops": ("training compute (FLOP, those of matrix products and causal attention)", " FLOP"),
    "seconds": ("training time (s, without evaluation and saving)", " s"),
    "rank": ("rank r of the low-rank projections", ""),
}
Y = {
    "loss": "training loss (nats per token)",
    "val_loss": "validation loss (nats per token)",
    "perplexity": "validation perplexity (per token)",
    "bits_per_byte": "validation loss (bits per byte)",
}
WATCH_SECONDS = 5
# Dark and light in turn, so that neighbours differ in grey too. A line style and a marker help besides.
COLOURS = ("#000000", "#e69f00", "#0072b2", "#56b4e9", "#7b3294", "#d55e00", "#009e73")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "X", "P", "<", "*")


@dataclass(frozen=True)
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or log.jsonl files of any name."""
    x: Literal["tokens", "flops", "seconds", "rank"] = "tokens"
    """With rank, y is that of each run's last evaluation, and dense runs are level lines."""
    y: Literal["loss", "val_loss", "perplexity", "bits_per_byte"] = "loss"
    out: Path = Path("results/curves")
    """Write OUT.png and OUT.svg."""
    smooth: float | None = None
    """Average the training loss over this share of the longest curve; 0 = no average, None = 2 %, or 20 points of a
    short log, but at most a fifth."""
    each_seed: bool = False
    """Draw a curve for each run, also where runs differ only in their seed."""
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
    drawn = None
    while True:
        sizes = [log_of(path).stat().st_size if log_of(path).exists() else 0 for path in o.runs]
        if sizes != drawn:
            drawn = sizes
            try:
                runs = [read_run(path) for path in o.runs]
                draw(o, runs)
                if not o.watch or all(run.finished for run in runs):
                    return
            except NothingYet as error:
                if not o.watch:
                    raise
                print(f"waiting: {error}", flush=True)
        time.sleep(WATCH_SECONDS)


# --- Curves --------------------------------------------------------------------------------------------------------


@dataclass
class Curve:
    """One line of the picture: its name, and (N,) each of x, the mean of its runs, the lowest, the highest."""

    name: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray


def make_curves(o: Options, runs: list[Run]) -> tuple[list[Curve], float]:
    """Return the curves, and the width of the running mean in units of x; 0 where y is not noisy."""
    silent = SILENT | (set() if o.x == "seconds" else {"device", "compile", "recompute"})
    names = name_runs([run.options for run in runs], silent | (set() if o.each_seed else {"seed"}))
    groups: dict[str, list[Run]] = {}  # a name for each curve
    for run, name in zip(runs, names):
        if not name or (o.each_seed and name in groups):
            name = f"{name} {run.path.parent}".strip()
        groups.setdefault(name, []).append(run)
    xs = max((run.points(o.x, o.y)[0] for run in runs), key=lambda xs: xs[-1])  # of the longest
    share = max(0.02, min(0.2, 20 / len(xs))) if o.smooth is None else o.smooth
    width = share * xs[-1] if o.y == "loss" else 0.0
    several_sizes = len({run.parameters for run in runs}) > 1
    curves = []
    for name, members in groups.items():
        points = [run.points(o.x, o.y) for run in members]
        # Seeds share their steps but not their seconds, so the mean is over points of equal tokens.
        tokens = [run.points("tokens", o.y)[0] for run in members]
        shared = [np.isin(t, reduce(np.intersect1d, tokens)) for t in tokens]
        if not shared[0].any():
            paths = " and ".join(str(run.path) for run in members)
            raise UserError(f"{paths} have no logged step in common, wanted some for their mean; use --each_seed")
        x = np.mean([xs[at] for (xs, _), at in zip(points, shared)], axis=0)  # (N,)
        ys = np.array([running_mean(xs, y, width)[at] for (xs, y), at in zip(points, shared)])  # (runs, N)
        name += f", {members[0].parameters / 1e6:.3g}M" if several_sizes else ""
        name += f" (mean of {len(members)})" if len(members) > 1 else ""
        curves.append(Curve(name, x, ys.mean(0), ys.min(0), ys.max(0)))
    return curves, width


def running_mean(x: np.ndarray, y: np.ndarray, width: float) -> np.ndarray:
    """Return the mean of the points at most width / 2 from each. Near the first point the window is symmetric, too.

    A mean that looked only ahead would show the steep beginning too low.
    """
    half = np.minimum(width / 2, x - x[0])
    first, last = np.searchsorted(x, x - half, "left"), np.searchsorted(x, x + half, "right")
    total = np.concatenate([[0.0], np.cumsum(y)])
    return (total[last] - total[first]) / (last - first)


def by_rank(o: Options, runs: list[Run]) -> dict[str, dict[int, list[float]]]:
    """Return the last y of each seed, by name and rank; the rank of dense runs is 0.

    Raise UserError where a run has several ranks, or no run has one.
    """
    with_ranks = {name for run in runs for name in run.options if "lowdim" in name}
    others = name_runs([run.options for run in runs], SILENT | {"device", "compile", "recompute", "seed"} | with_ranks)
    found: dict[str, dict[int, list[float]]] = {}
    for run, other in zip(runs, others):
        by_value = ranks(run.options) or {0: []}
        rank, projections = next(iter(by_value.items()))
        if len(by_value) > 1 or not isinstance(rank, int):
            raise UserError(f"{run.path} has ranks {', '.join(map(str, by_value))}: no single rank for --x=rank")
        name = ", ".join(filter(None, [describe(projections) if rank else "dense", other]))
        found.setdefault(name, {}).setdefault(rank, []).append(run.points("tokens", o.y)[1][-1])
    if all(set(series) == {0} for series in found.values()):
        raise UserError("no run has a low-rank projection, wanted one or more for --x=rank")
    return found


# --- Drawing -------------------------------------------------------------------------------------------------------


def style(number: int) -> dict[str, Any]:
    """Return colour, line and marker of a curve. The three cycles have no common factor, so 252 curves differ."""
    look = dict(color=COLOURS[number % 7], linestyle=LINES[number % 4], marker=MARKERS[number % 9])
    return look | dict(markersize=5, linewidth=1.6)


def draw(o: Options, runs: list[Run]) -> None:
    require_common_axis(runs, o.y)
    figure, axes = new_figure(7.2, 4.2 + 0.1 * len(runs))
    if o.x == "rank":
        draw_ranks(o, runs, axes[0, 0])
    else:
        draw_curves(o, *make_curves(o, runs), axes[0, 0])
    add_legend(figure, axes[0, 0])
    save(figure, o.out)


def draw_curves(o: Options, curves: list[Curve], width: float, axes: "Axes") -> None:
    """Draw what make_curves returns, and label both axes."""
    from matplotlib.ticker import EngFormatter

    tenth = max(curve.x[-1] for curve in curves) / 10
    late = []  # what the axis must show: all but the steep first tenth
    for number, curve in enumerate(curves):
        look = style(number)
        apart = max(1, len(curve.x) // 8)  # about eight markers, at other places on each curve
        axes.plot(curve.x, curve.y, label=curve.name, markevery=(number * apart // 3 % apart, apart), **look)
        if (curve.high > curve.low).any():
            axes.fill_between(curve.x, curve.low, curve.high, color=look["color"], alpha=0.15, linewidth=0)
        late += curve.y[min(np.searchsorted(curve.x, tenth), len(curve.x) - 1) :].tolist()
    room = 0.06 * (max(late) - min(late)) or 0.05 * abs(max(late)) or 1.0
    axes.set_ylim(min(curve.low.min() for curve in curves) - room, max(late) + room)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" " if o.x == "flops" else ""))
    label, unit = X[o.x]
    axes.set_xlabel(label)
    mean = f"\nmean over {EngFormatter(sep='')(float(f'{width:.3g}'))}{unit} around each point"
    axes.set_ylabel(Y[o.y] + (mean if width else ""))


def draw_ranks(o: Options, runs: list[Run], axes: "Axes") -> None:
    """Draw the mean over the seeds and their standard deviation. A dense run is a level line."""
    from matplotlib.ticker import NullLocator

    found = by_rank(o, runs)
    for number, (name, series) in enumerate(found.items()):
        points = sorted((rank, np.mean(ys), np.std(ys, ddof=1) if len(ys) > 1 else 0.0) for rank, ys in series.items())
        each_rank, mean, spread = zip(*points)
        look = style(number)
        if each_rank == (0,):
            axes.axhline(mean[0], label=name, **look | dict(marker=""))
            axes.axhspan(mean[0] - spread[0], mean[0] + spread[0], color=look["color"], alpha=0.15, linewidth=0)
        else:
            axes.errorbar(each_rank, mean, spread, label=name, capsize=4, **look)
    every_rank = sorted({rank for series in found.values() for rank in series} - {0})
    axes.set(xlabel=X["rank"][0], ylabel=f"{Y[o.y]}\nmean and standard deviation over seeds", xscale="log")
    axes.set_xticks(every_rank, [str(rank) for rank in every_rank])
    axes.xaxis.set_minor_locator(NullLocator())
    for run in runs:
        if not run.finished:
            print(f"note: {run.path} is not at its last step; its last evaluation so far is shown")


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, sharey: Literal["none", "row"] = "none"
) -> tuple["Figure", np.ndarray]:
    """Return a figure of that size in inches and its axes (rows, columns). Raise UserError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need a package: pip install 'matplotlib>=3.8,<4'") from None
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "lpa"  # equal pictures become equal files
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="0.88")
    return figure, axes


def add_legend(figure: "Figure", axes: "Axes") -> None:
    """Put the legend above the axes, where it hides no curve."""
    handles, names = axes.get_legend_handles_labels()
    # An inch holds about 14 letters of this size; a key and the room around it are as wide as 12.
    columns = max(1, int(14 * figure.get_figwidth() / (max(map(len, names)) + 12)))
    figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, handlelength=4)


def save(figure: "Figure", out: Path) -> None:
    """Write OUT.png and OUT.svg. A file holds its old contents or its new ones, never half of them."""
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
