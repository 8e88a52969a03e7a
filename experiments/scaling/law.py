"""Fit a scaling law to finished runs: how should the size of a model grow with its data?

    python -m experiments.scaling.law --plan --hours=6          train the runs of two families, compare them
    python -m experiments.scaling.law out/scaling/setting2_cpu --against out/scaling/setting2_cpu_dense
    python -m experiments.scaling.law runs.csv --budget=1e18 --tokens=1e9     a table with columns N, D, loss

Fits L(N, D) = E + A / N^alpha + B / D^beta and prints the compute-optimal N and D of a budget, the N of a
given D, the interval of gamma in N ~ D^gamma that beta implies (Kausik, arXiv 2402.14746), and the gamma of
the runs themselves. With --against it also prints how much data, size or compute one family saves over the
other. A run that did not reach the end of its schedule is left out with a note. Writes OUT.md, .png and .svg.
"""

import csv
import datetime
import math
import shlex
import sys
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
from experiments.scaling.fit import TOLERANCE, Fit, Points, fit, gamma_of_runs, interval, ratios
from experiments.sweep import markdown_table, write_page


@dataclass(frozen=True)
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders of one family, folders of run folders, or CSV files with columns N, D, loss."""
    against: tuple[Path, ...] = ()
    """The runs of another family, with which the first is compared."""
    count: Literal["total", "blocks"] = "total"
    """What N counts in run folders: all parameters, or those without embeddings and head."""
    budget: float | None = None
    """FLOPs, C = 6 N D, at the optimum; None = those of the most expensive run."""
    tokens: float | None = None
    """The D to find an N for; None = that of the longest run."""
    resamples: int = 200
    """Fits to runs drawn with replacement, for the errors."""
    out: Path = Path("results/scaling")
    plan: bool = False
    """Plan a grid of runs for this machine, train it, and report."""
    grid: Annotated[runs_plan.Grid, tyro.conf.arg(name="")] = field(default_factory=runs_plan.Grid)

    def __post_init__(self) -> None:
        if bool(self.runs) == self.plan:
            raise ValueError("wanted either runs to read, or --plan to make some")
        for name in ("budget", "tokens", "resamples"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted above 0")


def main(o: Options) -> None:
    groups = [paths for paths in (o.runs, o.against) if paths]
    if o.plan:
        # The last preset comes first: it is compared with the one before it.
        groups = [(folder,) for folder in reversed(runs_plan.train(o.grid))]
    families = [read(paths, o.count) for paths in groups]
    require_same_measure([run for points in families for run in points.runs])
    fits = [fit(points, o.resamples) for points in families]
    what = "all parameters" if o.count == "total" else "parameters without embeddings and head"
    lines = ["# Scaling law\n", f"{datetime.date.today()}. N: {what}. D: training tokens. C = 6 N D FLOPs."]
    lines.append(f"Command: `python -m experiments.scaling.law {shlex.join(sys.argv[1:])}`\n")
    for fitted in fits:
        lines += [*report(o, fitted), ""]
    if len(fits) == 2:
        lines += comparison(o, *fits)
    text = "\n".join(lines) + "\n"
    print(text)
    write_page(o.out.with_suffix(".md"), text)
    draw(o, fits)


def read(paths: tuple[Path, ...], count: str) -> Points:
    """Return the finished runs of these folders and files as one family. Raise UserError without any log."""
    rows, notes, runs, costs = [], [], [], []
    for path in paths:
        if path.suffix == ".csv":
            rows += read_csv(path)
            continue
        logs = [path / "log.jsonl"] if (path / "log.jsonl").exists() else sorted(path.glob("*/log.jsonl"))
        if not logs:
            raise UserError(f"{path} is no run folder and holds none, wanted one, a folder of them or a .csv")
        for run in map(read_run, logs):
            last, steps = run.evaluations[-1] if run.evaluations else dict(step=0), run.options["max_steps"]
            if last["step"] < steps:
                notes.append(f"left out: {run.path.parent} ends at step {last['step']} of {steps}")
                continue
            size = run.parameters if count == "total" else run.parameters_in_blocks
            rows.append((size, last["tokens"], last["val_loss"]))
            runs.append(run)
            costs.append(run.flops_per_token / size)
            notes += repetition(run)
    if costs:
        notes.append(f"by the logs a training token costs {min(costs):.2g} to {max(costs):.2g} N FLOPs, not 6 N")
    name = " ".join(path.stem for path in paths[:3]) + (" ..." if len(paths) > 3 else "")
    N, D, loss = np.array(rows, dtype=float).reshape(-1, 3).T  # (runs,) each
    return Points(name, N, D, loss, tuple(notes), tuple(runs))


def repetition(run: Run) -> list[str]:
    """Return a note if a run saw its corpus more than once; none if the corpus is not here."""
    try:
        epochs = run.evaluations[-1]["tokens"] / data.open_corpus(run.options["dataset"], "train").tokens
    except UserError:
        return []
    return [f"{run.path.parent} saw its tokens {epochs:.1f} times: repeated ones teach less"] if epochs > 1 else []


def require_same_measure(runs: list[Run]) -> None:
    """Raise UserError where a nat per token is not the same in all runs."""
    for run in runs[1:]:
        for (what, expected), value in zip(measure(runs[0]).items(), measure(run).values()):
            if value != expected:
                found = f"{what} is {expected} in {runs[0].path} and {value} in {run.path}"
                raise UserError(f"{found}: losses cannot be compared")


def measure(run: Run) -> dict[str, Any]:
    """Return what a loss depends on besides the model."""
    return {
        "dataset": Path(run.options["dataset"]).name,
        "eval_tokens": run.options["eval_tokens"],
        "gpt.vocab_size": run.options["gpt.vocab_size"],
        "bits per byte of a nat": round(run.bits_per_nat() or 0, 6),
    }


def read_csv(path: Path) -> list[tuple[float, ...]]:
    """Return N, D and loss of each line. Raise UserError with the line that is not three positive numbers."""
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


def report(o: Options, f: Fit) -> list[str]:
    """Return the lines about one family: its law, the optimum of a budget and of a length, and gamma."""
    p, law = f.points, f.law
    rms = np.sqrt(np.mean((np.log(p.loss) - np.log(law.loss(p.N, p.D))) ** 2))
    span = ", ".join(f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in p.ranges().items())
    table = [["", "best fit", "standard error", "5 %", "95 %"]]
    for name, values in vars(f.laws).items():
        value, low, high = interval(values)
        error = f"{np.nanstd(values[1:], ddof=1):.2g}"
        table.append([name, f"{value:.5g}", error, f"{low:.4g}", f"{high:.4g}"])
    notes = list(f.notes)
    if law.E / p.loss.min() < 0.01:
        table[1][2] = "undetermined"
        notes.append(f"E is {law.E:.2g}, at its bound of 0: these runs do not determine it")
    C, D = o.budget or p.ranges()["C"][1], o.tokens or p.D.max()
    N_best, D_best = f.laws.optimum(C)
    optimum = f"N = {spread(N_best)}, D = {spread(D_best)}, loss {spread(f.laws.loss(N_best, D_best))}"
    far = [*p.beyond(C=C, N=N_best[0], D=D_best[0]), *p.beyond(N=law.size(D), D=D)]
    return [
        f"## {p.name}\n",
        f"{len(p.loss)} runs: {span}. The residual of ln L is {rms:.2g} (root mean square).\n",
        markdown_table(table),
        "",
        f"- Compute-optimal at C = {C:.3g}: {optimum}.",
        f"- Compute-optimal at D = {D:.3g}: N = {spread(f.laws.size(D))}.",
        *gamma_lines(f, o.tokens or 10 * p.D.max()),
        *(f"- Note: {place}: the law is not tested there." for place in dict.fromkeys(far)),
        *(f"- Note: {note}." for note in notes),
    ]


def spread(values: np.ndarray, form: str = ".3g") -> str:
    """Return '1.2e+06 (1.1e+06 to 1.3e+06)': the best fit, and 5 to 95 % of the resamples."""
    best, low, high = (format(value, form) for value in interval(values))
    return f"{best} ({low} to {high})"


def gamma_lines(f: Fit, D: float) -> list[str]:
    """Return the lines about gamma in N ~ D^gamma, with the N of D tokens."""
    low, high = (spread(values, ".2f") for values in f.laws.gamma())
    longest = f.points.D.max()
    start = f"N = {sizes_from_anchor(f, longest)[0]:.3g} at D = {longest:.3g}"
    ends = " to ".join(f"{N:.3g}" for N in sizes_from_anchor(f, D))
    gamma, error, found = gamma_of_runs(f.points)
    pairs = ", ".join(f"{N:.3g} at {D:.3g}" for D, N in found) or "at no D"
    seen = f"gamma = {gamma:.2f} ± {error:.2f}" if math.isfinite(gamma) else "too few lengths for a gamma"
    return [
        f"- N ~ D^gamma with gamma between {low} and {high}: 1 - 2 beta and 1 - beta of this fit's own beta.",
        f"- So, from {start}, an efficient model of D = {D:.3g} tokens has N = {ends}.",
        f"- The smallest N within {TOLERANCE:g} nats of the best of its D: {seen} (N = {pairs}).",
    ]


def sizes_from_anchor(f: Fit, D: Any) -> list[Any]:
    """Return N ~ D^gamma from the smallest good enough run of the largest D, at both ends of gamma."""
    D0 = f.points.D.max()
    longest = f.points.take(f.points.D == D0)
    N0 = longest.N[longest.loss <= longest.loss.min() + TOLERANCE].min()
    # With a beta of 0.5 or more the lower end is 0.
    return [N0 * (D / D0) ** max(0.0, gamma) for gamma in f.law.gamma()]


def comparison(o: Options, f: Fit, reference: Fit) -> list[str]:
    """Return what f needs for the loss of the reference at its optimum, or why the runs do not show it."""
    families = f.points, reference.points
    C = o.budget or min(points.ranges()["C"][1] for points in families)
    N, D = reference.law.optimum(C)
    loss = reference.law.loss(N, D)
    name, other = (points.name for points in families)
    lines = [f"## {name} against {other}\n"]
    if far := [place for points in families for place in points.beyond(C=C, N=N, D=D)]:
        return [*lines, f"Not compared at the optimum of {other}: {'; '.join(far)}.\n"]
    lines.append(f"To reach the loss {loss:.4f} that {other} has at its optimum")
    lines.append(f"for C = {C:.3g}, N = {N:.3g} and D = {D:.3g}, {name} needs, as a share of that:\n")
    needs = dict(compute="C, at its own optimum", data="D, at that N", size="N, at that D")
    table = [["what it needs", "share", "5 %", "95 %"]]
    for what, values in ratios(f.laws, reference.laws, C).items():
        shares = ("never" if share > 1e6 else f"{share:.3g}" for share in interval(values))
        table.append([needs[what], *shares])
    lines += [markdown_table(table), ""]
    for place in (place for points in families for place in points.beyond(loss=loss)):
        lines.append(f"- Note: {place}: the law is not tested there.")
    return [*lines, ""]


def draw(o: Options, fits: list[Fit]) -> None:
    """Draw for each family the losses at equal compute, and the sizes that fit each length of training."""
    figure, axes = plot.new_figure(11, 4.4 * len(fits), rows=len(fits), columns=2)
    for f, (left, right) in zip(fits, axes):
        draw_isoflops(f, left)
        draw_frontier(f, right)
        left.set_title(f.points.name, loc="left")
        left.legend(frameon=False, fontsize=8)
        right.legend(frameon=False, fontsize=8)
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
        axes.plot(p.N[nearest == i], p.loss[nearest == i], **look | dict(linestyle=""))
    margin = 0.1 * (p.loss.max() - p.loss.min())
    axes.set(xscale="log", xlabel="N, parameters", ylabel="validation loss (nats per token)\nlines: the law")
    axes.set(xlim=(sizes[0], sizes[-1]), ylim=(p.loss.min() - margin, p.loss.max() + margin))


def draw_frontier(f: Fit, axes: "plot.Axes") -> None:
    """Draw N against D: the optimum with its 5 to 95 % band, Kausik's interval, and the runs' frontier."""
    p = f.points
    lengths = np.geomspace(p.D.min(), 10 * p.D.max(), 50)
    best, low, high = np.clip(interval(f.laws.size(lengths[:, None])), 0, 1e300)  # (50,) each
    axes.plot(lengths, best, label="compute-optimal", **plot.style(0) | dict(marker=""))
    axes.fill_between(lengths, low, high, color="#000000", alpha=0.12, linewidth=0)
    look = dict(color="#0072b2", alpha=0.3, linewidth=0, label="D^gamma from the anchor")
    axes.fill_between(lengths, *sizes_from_anchor(f, lengths), **look)
    if found := gamma_of_runs(p)[2]:
        axes.plot(*zip(*found), label="smallest good enough", **plot.style(1) | dict(linestyle=""))
    axes.plot(p.D, p.N, color="0.6", marker=".", linestyle="", label="runs")
    axes.set(xscale="log", yscale="log", xlabel="D, training tokens", ylabel="N, parameters")
    axes.set_ylim(p.N.min() / 30, p.N.max() * 30)


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
