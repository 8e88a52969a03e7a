"""Fit a scaling law to finished runs: how should the size of a model grow with its data?

    python -m experiments.scaling.law --plan --hours=6                             makes the runs of two families, then:
    python -m experiments.scaling.law out/scaling/setting2_cpu --against out/scaling/setting2_cpu_dense
    python -m experiments.scaling.law runs.csv --budget=1e18 --tokens=1e9          a table with columns N, D and loss

Fits L(N, D) = E + A / N^alpha + B / D^beta and prints the compute-optimal N and D of a budget, the N of a given D, the
interval of gamma in N ~ D^gamma that beta implies (Kausik, arXiv 2402.14746), and the gamma of the runs themselves.
With --against it also prints how much data, size or compute one family saves over the other. What the runs do not
determine is refused. A run must have reached the end of its own schedule; others are left out, and named. Writes
OUT.md, OUT.png and OUT.svg. The mathematics is in experiments/scaling/fit.py.
"""

import csv
import dataclasses
import datetime
import itertools
import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

import data
from config import UserError, parse, user_errors
from experiments import plot
from experiments.logs import Run, read_run
from experiments.scaling import plan as runs_plan
from experiments.scaling.fit import Fit, Law, Points, compare, fit, gamma_of_runs
from experiments.sweep import markdown_table, write_page


@dataclass(frozen=True)
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders of one family, folders of run folders, or CSV files with columns N, D, loss."""
    against: tuple[Path, ...] = ()
    """The runs of another family, which the first is compared with."""
    count: Literal["total", "blocks"] = "total"
    """What N counts in run folders: all parameters, or those without embeddings and head."""
    budget: float | None = None
    """FLOPs, C = 6 N D, at the optimum; None = those of the most expensive run."""
    tokens: float | None = None
    """The D to find an N for; None = that of the longest run."""
    anchor: tuple[float, float] | None = None
    """N and D of an efficient run, from which D^gamma starts; None = the smallest good enough one at the largest D."""
    tolerance: float = 0.02
    """Nats above the best run of the same D that are still good enough."""
    resamples: int = 200
    """Fits to runs drawn with replacement, for the errors."""
    out: Path = Path("results/scaling")
    plan: bool = False
    """Plan a grid of runs for this machine, train it, and report."""
    grid: Annotated[runs_plan.Grid, tyro.conf.arg(name="")] = field(default_factory=runs_plan.Grid)

    def __post_init__(self) -> None:
        if bool(self.runs) == self.plan:
            raise ValueError("wanted either runs to read, or --plan to make some")
        for name in ("budget", "tokens", "tolerance", "resamples"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted above 0")
        if self.anchor is not None and not all(0 < value < math.inf for value in self.anchor):
            raise ValueError(f"anchor is {self.anchor}, wanted N and D above 0")


def main(o: Options) -> None:
    if o.plan:
        folders = runs_plan.train(o.grid)
        if o.grid.dry_run:
            return
        first, *others = folders[::-1]  # the first preset is what the second is compared with
        o = dataclasses.replace(o, runs=(first,), against=tuple(others), plan=False)
    families = [read(paths, o.count) for paths in (o.runs, o.against) if paths]
    require_same_measure([(points.name, points.measure) for points in families if points.measure])
    fits = [fit(points, o.resamples) for points in families]
    what = "all parameters" if o.count == "total" else "parameters without embeddings and head"
    lines = ["# Scaling law\n", f"{datetime.date.today()}. N: {what}. D: training tokens. C = 6 N D FLOPs."]
    lines.append(f"Command: `python -m experiments.scaling.law {shlex.join(sys.argv[1:])}`\n")
    for fitted in fits:
        lines += [*report(o, fitted), ""]
    if o.against:
        lines += comparison(o, *fits)
    text = "\n".join(lines) + "\n"
    print(text)
    write_page(o.out.with_suffix(".md"), text)
    draw(o, fits)


# --- Reading -------------------------------------------------------------------------------------------------------


def read(paths: tuple[Path, ...], count: str) -> Points:
    """Read the finished runs at these places as one family. Raise UserError where there is nothing to read."""
    name = " ".join(path.stem for path in paths[:3]) + (" ..." if len(paths) > 3 else "")
    rows, notes, measures = [], [], []
    for path in paths:
        if path.suffix == ".csv":
            rows += read_csv(path)
            continue
        logs = [path / "log.jsonl"] if (path / "log.jsonl").exists() else sorted(path.glob("*/log.jsonl"))
        if not logs:
            raise UserError(f"{path} is no run folder and holds none, wanted some that train.py wrote, or a .csv")
        for log in logs:
            try:
                run = read_run(log.parent)
            except UserError as error:
                notes.append(f"left out: {error}")
                continue
            last, steps = run.evaluations[-1] if run.evaluations else dict(step=0), run.options["max_steps"]
            if last["step"] < steps:
                at = f"{log.parent} was evaluated last at step {last['step']} of {steps}"
                notes.append(f"left out: {at}, not at its schedule's end")
                continue
            size = run.parameters if count == "total" else run.parameters_in_blocks
            rows.append((size, last["tokens"], last["val_loss"]))
            measures.append((str(log.parent), measure(run)))
            notes += repetition(run)
    require_same_measure(measures)
    N, D, loss = np.array(rows, dtype=float).reshape(-1, 3).T  # (runs,) each
    return Points(name, N, D, loss, tuple(notes), measures[0][1] if measures else {})


def measure(run: Run) -> dict[str, Any]:
    """Return what a nat per token depends on beside the model."""
    known = {name: run.options[name] for name in ("eval_tokens", "gpt.vocab_size")}
    return known | {"dataset": Path(run.options["dataset"]).name, "bits per byte of a nat": run.bits_per_nat()}


def require_same_measure(measures: list[tuple[str, dict[str, Any]]]) -> None:
    """Raise UserError where two of these runs or families, each with its name, cannot be compared."""
    for (first, a), (other, b) in itertools.pairwise(measures):
        for name, value in a.items():
            if value != b[name] and not (isinstance(value, float) and math.isclose(value, b[name], rel_tol=1e-6)):
                raise UserError(f"{name} is {value} in {first} and {b[name]} in {other}: losses cannot be compared")


def repetition(run: Run) -> list[str]:
    """Return a note if a run saw its corpus more than once; none if the corpus is not here."""
    try:
        epochs = run.evaluations[-1]["tokens"] / data.open_corpus(run.options["dataset"], "train").tokens
    except UserError:
        return []
    return [f"{run.path.parent} saw its tokens {epochs:.1f} times: repeated ones teach less"] if epochs > 1 else []


def read_csv(path: Path) -> list[tuple[float, ...]]:
    """Return N, D and loss of each line. Raise UserError naming the line that is not three positive numbers."""
    rows: list[tuple[float, ...]] = []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for number, record in enumerate(csv.DictReader(file), start=2):
                row = tuple(float(record.get(name) or "nan") for name in ("N", "D", "loss"))
                if not all(0 < value < math.inf for value in row):
                    raise ValueError(f"line {number}: wanted positive numbers in the columns N, D and loss")
                rows.append(row)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    return rows


# --- The report ----------------------------------------------------------------------------------------------------


def report(o: Options, f: Fit) -> list[str]:
    p, law = f.points, f.law
    rms = np.sqrt(np.mean((np.log(p.loss) - np.log(law.loss(p.N, p.D))) ** 2))
    span = ", ".join(f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in p.ranges().items())
    table = [["", "best fit", "standard error", "5 %", "95 %"]]
    for name in ("E", "A", "alpha", "B", "beta"):
        value, low, high = f.interval(lambda law, name=name: getattr(law, name))
        error = f"{f.error(lambda law, name=name: getattr(law, name)):.2g}"
        undetermined = name == "E" and f.at_zero_entropy()
        table.append([name, f"{value:.5g}", "undetermined" if undetermined else error, f"{low:.4g}", f"{high:.4g}"])
    C, D = budget_of(o, [f]), o.tokens or float(p.D.max())
    N_best, D_best = (spread(f, lambda law, i=i: law.optimum(C)[i]) for i in (0, 1))
    far = [*p.beyond(C=C, **dict(zip("ND", law.optimum(C)))), *p.beyond(N=law.size(D), D=D)]
    return [
        f"## {p.name}\n",
        f"{len(p.loss)} runs: {span}. The residual of ln L is {rms:.2g} (root mean square).\n",
        markdown_table(table),
        "",
        f"- Compute-optimal at C = {C:.3g}: N = {N_best}, D = {D_best},"
        f" loss {spread(f, lambda law: law.loss(*law.optimum(C)))}.",
        f"- Compute-optimal at D = {D:.3g}: N = {spread(f, lambda law: law.size(D))}.",
        *gamma_lines(o, f),
        *(f"- Note: {what}: the law is not tested there." for what in dict.fromkeys(far)),
        *(f"- Note: {note}." for note in f.notes),
    ]


def budget_of(o: Options, fits: list[Fit]) -> float:
    """Return the FLOPs to look at: --budget, or the most that every family has spent."""
    return o.budget or min(f.points.ranges()["C"][1] for f in fits)


def gamma_lines(o: Options, f: Fit) -> list[str]:
    low, high = (spread(f, lambda law, i=i: law.gamma()[i], ".2f") for i in (0, 1))
    N0, D0 = anchor(o, f.points)
    D = o.tokens or 10 * float(f.points.D.max())
    # With beta of 0.5 or more the lower end is 0.
    ends = " to ".join(f"{N0 * (D / D0) ** max(0.0, gamma):.3g}" for gamma in f.law.gamma())
    gamma, error, found = gamma_of_runs(f.points, o.tolerance)
    pairs = ", ".join(f"{N:.3g} at {D:.3g}" for D, N in found) or "at no D"
    seen = f"gamma = {gamma:.2f} ± {error:.2f}" if math.isfinite(gamma) else "too few lengths for a gamma"
    return [
        f"- N ~ D^gamma with gamma between {low} and {high}: 1 - 2 beta and 1 - beta of this fit's own beta.",
        f"- So, from N = {N0:.3g} at D = {D0:.3g}, an efficient model of D = {D:.3g} tokens has N = {ends}.",
        f"- The smallest N within {o.tolerance:g} nats of the best of its D: {seen} (N = {pairs}).",
    ]


def anchor(o: Options, p: Points) -> tuple[float, float]:
    """Return N and D of --anchor, or of the smallest run at the largest D that is good enough."""
    D = p.D.max()
    longest = p.take(p.D == D)
    good = longest.loss <= longest.loss.min() + o.tolerance
    return o.anchor or (float(longest.N[good].min()), float(D))


def spread(f: Fit, value: Callable[[Law], float], form: str = ".3g") -> str:
    """Return '1.2e+06 (1.1e+06 to 1.3e+06)': of the best fit, and from 5 to 95 % of the resamples."""
    best, low, high = (format(v, form) for v in f.interval(value))
    return f"{best} ({low} to {high})"


def comparison(o: Options, f: Fit, reference: Fit) -> list[str]:
    """Say what f needs for the loss of the reference at its optimum; refuse where a family has no runs near it."""
    C = budget_of(o, [f, reference])
    N, D = reference.law.optimum(C)
    loss = reference.law.loss(N, D)
    lines = [f"## {f.points.name} against {reference.points.name}\n"]
    if far := [what for p in (f.points, reference.points) for what in p.beyond(C=C, N=N, D=D)]:
        return [*lines, f"Not compared at the optimum of {reference.points.name}: {'; '.join(far)}.\n"]
    lines.append(f"To reach the loss {loss:.4f} that {reference.points.name} has at its optimum")
    lines.append(f"for C = {C:.3g}, N = {N:.3g} and D = {D:.3g}, {f.points.name} needs, as a share of that:\n")
    names = dict(compute="C, at its own optimum", data="D, at that N", size="N, at that D")
    table = [["what it needs", "share", "5 %", "95 %"]]
    for name, shares in compare(f, reference, C).items():
        table.append([names[name], *("never" if share > 1e6 else f"{share:.3g}" for share in shares)])
    far = [what for p in (f.points, reference.points) for what in p.beyond(loss=loss)]
    return [*lines, markdown_table(table), "", *(f"- Note: {what}: the law is not tested there." for what in far), ""]


# --- Pictures ------------------------------------------------------------------------------------------------------


def draw(o: Options, fits: list[Fit]) -> None:
    """Draw for each family the losses at equal compute, and the sizes that fit each length of training."""
    figure, axes = plot.new_figure(11, 4.4 * len(fits), rows=len(fits), columns=2)
    for f, (left, right) in zip(fits, axes):
        draw_isoflops(f, left)
        draw_frontier(o, f, right)
        left.set_title(f.points.name, loc="left")
        for ax in (left, right):
            ax.legend(frameon=False, fontsize=8)
    plot.save(figure, o.out)


def draw_isoflops(f: Fit, axes: "plot.Axes") -> None:
    """Draw the law's loss against N at five budgets, each with its optimum, and the runs nearest to each."""
    p, spent = f.points, 6 * f.points.N * f.points.D
    budgets = np.geomspace(spent.min(), spent.max(), 5)
    nearest = np.abs(np.log(spent[:, None] / budgets)).argmin(1)  # (runs,)
    sizes = np.geomspace(p.N.min() / 2, p.N.max() * 2, 100)
    for i, C in enumerate(budgets):
        look = plot.style(i)
        axes.plot(sizes, f.law.loss(sizes, C / 6 / sizes), label=f"C = {C:.1e}", **look | dict(marker=""))
        N, D = f.law.optimum(C)
        axes.plot([N], [f.law.loss(N, D)], color=look["color"], marker="*", markersize=12)
        at = nearest == i
        axes.plot(p.N[at], p.loss[at], color=look["color"], marker=look["marker"], linestyle="")
    margin = 0.1 * (p.loss.max() - p.loss.min())
    axes.set(xscale="log", xlabel="N, parameters", ylabel="validation loss (nats per token)\nlines: the law")
    axes.set(xlim=(sizes[0], sizes[-1]), ylim=(p.loss.min() - margin, p.loss.max() + margin))


def draw_frontier(o: Options, f: Fit, axes: "plot.Axes") -> None:
    """Draw N against D: compute-optimal with its 5 to 95 % band, Kausik's interval, and the runs' own frontier."""
    p = f.points
    lengths = np.geomspace(p.D.min(), 10 * p.D.max(), 50)
    best, low, high = np.array([f.interval(lambda law, D=D: law.size(D)) for D in lengths]).clip(max=1e300).T
    axes.plot(lengths, best, label="compute-optimal", **plot.style(0) | dict(marker=""))
    axes.fill_between(lengths, low, high, color="#000000", alpha=0.12, linewidth=0)
    N0, D0 = anchor(o, p)
    ends = [N0 * (lengths / D0) ** max(0.0, gamma) for gamma in f.law.gamma()]
    axes.fill_between(lengths, *ends, color="#0072b2", alpha=0.3, linewidth=0, label="D^gamma from the anchor")
    if found := gamma_of_runs(p, o.tolerance)[2]:
        axes.plot(*zip(*found), label="smallest good enough", **plot.style(1) | dict(linestyle=""))
    axes.plot(p.D, p.N, color="0.6", marker=".", linestyle="", label="runs")
    axes.set(xscale="log", yscale="log", xlabel="D, training tokens", ylabel="N, parameters")
    axes.set_ylim(p.N.min() / 30, p.N.max() * 30)


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
