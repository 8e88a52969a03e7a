"""How should the size of a model grow with its data? A law fitted to finished runs, and what follows from it.

    python -m experiments.scaling.law --plan --hours=6                             makes the runs of two families, then:
    python -m experiments.scaling.law out/scaling/setting2_cpu --against out/scaling/setting2_cpu_dense
    python -m experiments.scaling.law runs.csv --budget=1e18 --tokens=1e9          a table with columns N, D and loss

Fits L(N, D) = E + A / N^alpha + B / D^beta and prints the compute-optimal N and D of a budget, the N of a given D, the
interval of gamma in N ~ D^gamma that this fit's beta implies (Kausik, arXiv 2402.14746), and gamma as the runs show it
without a law. With --against it says how much data, size or compute one family saves over the other. What the runs do
not determine is refused. Every run is to have ended under a schedule of its own length, on data seen once: others are
left out, and named. Writes OUT.md, OUT.png and OUT.svg. experiments/scaling/fit.py has the mathematics.
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
from experiments.logs import NothingYet, Run, read_run
from experiments.scaling import plan as runs_plan
from experiments.scaling.fit import FEWEST_VALUES, Fit, Law, Points, compare, fit, gamma_of_runs, without_entropy


@dataclass(frozen=True)
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders of one family, folders of run folders, or CSV files with columns N, D, loss."""
    against: tuple[Path, ...] = ()
    """The runs of another family, which the first is compared with."""
    count: Literal["total", "blocks"] = "total"
    """What N counts in run folders: all parameters, or those without embeddings and head."""
    budget: float | None = None
    """FLOPs, C = 6 N D, to spend at the optimum; None = those of the most expensive run."""
    tokens: float | None = None
    """The D to find an N for; None = that of the longest run."""
    anchor: tuple[float, float] | None = None
    """N and D of a run from which D^gamma is drawn on; None = the smallest that is good enough at the largest D that
    three sizes or more were trained for."""
    tolerance: float = 0.02
    """Nats above the best run of the same D that are still good enough."""
    resamples: int = 200
    """Fits to runs drawn with replacement, for the errors."""
    out: Path = Path("results/scaling")
    plan: bool = False
    """Propose a grid of runs for this machine, train it, and report."""
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
        first, *others = folders[::-1]  # the first preset is what the others are compared with
        o = dataclasses.replace(o, runs=(first,), against=tuple(others[-1:]), plan=False)
    families = [read(paths, o.count) for paths in (o.runs, o.against) if paths]
    require_same_measure([(points.name, points.measure) for points in families if points.measure])
    fits = [fit(points, o.resamples) for points in families]
    lines = ["# Scaling law\n", f"{datetime.date.today()}. N: {COUNTS[o.count]}. D: training tokens. C = 6 N D FLOPs."]
    lines.append(f"Command: `python -m experiments.scaling.law {shlex.join(sys.argv[1:])}`\n")
    for paths, fitted in zip((o.runs, o.against), fits):
        lines += [*report(o, fitted), *other_count(o, paths), ""]
    if o.against:
        lines += comparison(o, *fits)
    text = "\n".join(lines) + "\n"
    print(text)
    o.out.parent.mkdir(parents=True, exist_ok=True)
    o.out.with_suffix(".md").write_text(text)
    draw(o, fits)


COUNTS = {"total": "all parameters", "blocks": "parameters without embeddings and head"}


# --- Reading -------------------------------------------------------------------------------------------------------


def read(paths: tuple[Path, ...], count: str) -> Points:
    """The finished runs at these places, as one family. Raises UserError where there is nothing to read."""
    name = " ".join(path.stem for path in paths[:3]) + (" ..." if len(paths) > 3 else "")
    tables = [read_csv(path) for path in paths if path.suffix == ".csv"]
    folders = [folder for path in paths if path.suffix != ".csv" for folder in run_folders(path)]
    rows, notes, measured = read_folders(folders, count)
    rows += [row for table in tables for row in table]
    N, D, loss = np.array(rows, dtype=float).reshape(-1, 3).T  # (runs,) each
    return Points(name, N, D, loss, tuple(notes), measured)


def run_folders(path: Path) -> list[Path]:
    """A run folder, or the run folders in it."""
    if (path / "log.jsonl").exists():
        return [path]
    found = sorted(log.parent for log in path.glob("*/log.jsonl"))
    if not found:
        raise UserError(f"{path} is no run folder and holds none, wanted some that train.py wrote, or a .csv")
    return found


def read_folders(
    folders: list[Path], count: str
) -> tuple[list[tuple[float, float, float]], list[str], dict[str, Any]]:
    """N, D and loss of each run that ended as its schedule did, notes, about the others too, and what measure gives."""
    runs, rows, notes = [], [], []
    for folder in folders:
        try:
            run = read_run(folder)
        except NothingYet as error:
            notes.append(f"left out: {error}")
            continue
        steps, at = run.options["max_steps"], run.evaluations[-1]["step"] if run.evaluations else 0
        if at < steps:
            notes.append(f"left out: {folder} was evaluated last at step {at} of {steps}, not at its schedule's end")
            continue
        N = run.parameters if count == "total" else run.parameters_in_blocks
        runs.append(run)
        rows.append((N, run.evaluations[-1]["tokens"], run.evaluations[-1]["val_loss"]))
        notes += repetition(run)
    measures = [(str(run.path.parent), measure(run)) for run in runs]
    require_same_measure(measures)
    made = {f"{run.start['device']}, torch {run.start['versions']['torch']}" for run in runs}
    notes += [f"runs were made on {place}" for place in sorted(made)]
    if runs:
        work = [run.flops_per_token / N for run, (N, _, _) in zip(runs, rows)]
        notes.append(f"by the logs a training token costs {min(work):.2g} to {max(work):.2g} N FLOPs, not 6 N")
    return rows, notes, measures[0][1] if runs else {}


def measure(run: Run) -> dict[str, Any]:
    """What a nat per token depends on beside the model; and the kind of model, since C = 6 N D is not of all kinds."""
    names = dict(eval_tokens="eval_tokens", vocab_size="gpt.vocab_size")
    known = {name: run.options[option] for name, option in names.items()}
    return known | {"dataset": Path(run.options["dataset"]).name, "bits per byte of a nat": run.bits_per_nat()}


def require_same_measure(measures: list[tuple[str, dict[str, Any]]]) -> None:
    """Of runs or families, each with its name. Raises UserError where two of them cannot be compared."""
    for (first, a), (other, b) in itertools.pairwise(measures):
        for name, value in a.items():
            same = math.isclose(value, b[name], rel_tol=1e-6) if isinstance(value, float) else value == b[name]
            if not same:
                seen = f"{name} is {value} in {first} and {b[name]} in {other}"
                raise UserError(f"{seen}, wanted the same: their losses or FLOPs cannot be compared")


def repetition(run: Run) -> list[str]:
    """A note where a run saw its corpus more than once; none where the corpus is not here to ask."""
    try:
        unique = data.open_corpus(run.options["dataset"], "train").tokens
    except UserError:
        return []
    epochs = run.evaluations[-1]["tokens"] / unique
    return [f"{run.path.parent} saw its tokens {epochs:.1f} times: repeated ones teach less"] if epochs > 1 else []


def read_csv(path: Path) -> list[tuple[float, float, float]]:
    """Raises UserError naming the line that is not three positive numbers."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    rows = []
    for number, record in enumerate(table, start=2):
        try:
            row = float(record["N"]), float(record["D"]), float(record["loss"])
        except (KeyError, TypeError, ValueError):
            row = None
        if row is None or not all(0 < value < math.inf for value in row):
            raise UserError(f"{path}, line {number}: wanted positive numbers in the columns N, D and loss")
        rows.append(row)
    return rows


# --- The report ----------------------------------------------------------------------------------------------------


def report(o: Options, f: Fit) -> list[str]:
    p, law = f.points, f.law
    rms = np.sqrt(np.mean((np.log(p.loss) - np.log(law.loss(p.N, p.D))) ** 2))
    span = ", ".join(f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in p.ranges().items())
    lines = [f"## {p.name}\n", f"{len(p.loss)} runs: {span}. The residual of ln L is {rms:.2g} (root mean square).\n"]
    lines += ["| | best fit | standard error | 5 % | 95 % |", "|---|---|---|---|---|"]
    for name in ("E", "A", "alpha", "B", "beta"):
        value, low, high = f.interval(lambda law, name=name: getattr(law, name))
        error = f.error(lambda law, name=name: getattr(law, name))
        if name == "E" and without_entropy(law, p):
            error = math.nan
        cells = shown(value, ".5g"), shown(error, ".2g"), shown(low, ".4g"), shown(high, ".4g")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *optimal(o, f), *gamma_lines(o, f)]
    return [*lines, *(f"- Note: {note}." for note in f.notes)]


def other_count(o: Options, paths: tuple[Path, ...]) -> list[str]:
    """The exponents where N counts the other parameters: small models have many of theirs in the embeddings."""
    if any(path.suffix == ".csv" for path in paths):
        return []
    count = "blocks" if o.count == "total" else "total"
    try:
        law = fit(read(paths, count), resamples=0).law
    except UserError as error:
        return [f"- With N counting {COUNTS[count]} there is no law: {error}."]
    return [f"- With N counting {COUNTS[count]}: E {law.E:.4g}, alpha {law.alpha:.3f}, beta {law.beta:.3f}."]


def budget_of(o: Options, fits: list[Fit]) -> float:
    """The FLOPs at which to look: asked for, or those that every family has reached."""
    return o.budget or min(f.points.ranges()["C"][1] for f in fits)


def optimal(o: Options, f: Fit) -> list[str]:
    C, D = budget_of(o, [f]), o.tokens or float(f.points.D.max())
    N_best, D_best = (spread(f, lambda law, i=i: possible(law.optimum(C)[i])) for i in (0, 1))
    loss = spread(f, lambda law: law.loss(*law.optimum(C)))
    lines = [f"- Compute-optimal at C = {C:.3g}: N = {N_best}, D = {D_best}, loss {loss}."]
    lines.append(f"- Compute-optimal at D = {D:.3g}: N = {spread(f, lambda law: possible(law.size(D)))}.")
    N_there, D_there = f.law.optimum(C)
    far = [*f.points.beyond(C=C, N=N_there, D=D_there), *f.points.beyond(N=f.law.size(D), D=D)]
    return [*lines, *(f"- Note: {what}: the law is not tested there." for what in dict.fromkeys(far))]


def gamma_lines(o: Options, f: Fit) -> list[str]:
    low, high = (spread(f, lambda law, i=i: law.gamma()[i], ".2f") for i in (0, 1))
    lines = [f"- N ~ D^gamma with gamma between {low} and {high}: 1 - 2 beta and 1 - beta of this fit's own beta."]
    bounds = [max(0.0, gamma) for gamma in f.law.gamma()]
    if f.law.gamma()[0] <= 0:
        lines.append(f"- Note: beta is {f.law.beta:.3f}, 0.5 or more, so the lower end is taken as 0.")
    N0, D0, why = anchor(o, f.points)
    D = o.tokens or 10 * float(f.points.D.max())
    ends = " to ".join(f"{N0 * (D / D0) ** gamma:.3g}" for gamma in bounds)
    lines.append(f"- So, from N = {N0:.3g} at D = {D0:.3g}, an efficient model of D = {D:.3g} tokens has N = {ends}.")
    lines += [f"- Note: {why}."] if why else []
    gamma, error, found, notes = gamma_of_runs(f.points, o.tolerance)
    what = f"- The smallest N within {o.tolerance:g} nats of the best of its D"
    if math.isfinite(gamma):
        pairs = ", ".join(f"{N:.3g} at {D:.3g}" for D, N in found)
        lines.append(f"{what}: gamma = {gamma:.2f} ± {error:.2f} (N = {pairs}).")
    else:
        lines.append(f"{what} gives no gamma here.")
    return [*lines, *(f"- Note: {note}." for note in notes)]


def anchor(o: Options, p: Points) -> tuple[float, float, str]:
    """N and D of --anchor, or of a run that stands for an efficient one; and what is to be known of it."""
    if o.anchor:
        return *o.anchor, ""
    lengths = [D for D in np.unique(p.D) if len(np.unique(p.N[p.D == D])) >= FEWEST_VALUES]
    if not lengths:
        best = p.loss.argmin()
        why = f"no D has {FEWEST_VALUES} sizes, so this run is only that of the lowest loss: give a better --anchor"
        return float(p.N[best]), float(p.D[best]), why
    D = float(lengths[-1])
    longest = p.take(p.D == D)
    return float(longest.N[longest.loss <= longest.loss.min() + o.tolerance].min()), D, ""


def spread(f: Fit, value: Callable[[Law], float], form: str = ".3g") -> str:
    """'1.2e+06 (1.1e+06 to 1.3e+06)': at the best fit, and from 5 to 95 % over the resamples."""
    best, low, high = (shown(v, form) for v in f.interval(value))
    return f"{best} ({low} to {high})"


def shown(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "undetermined"


def possible(count: float) -> float:
    """A number of parameters, tokens or FLOPs, infinite where there is no computer for so few or so many."""
    return count if 1 <= count <= 1e30 or math.isnan(count) else math.copysign(math.inf, count - 1)


def comparison(o: Options, f: Fit, reference: Fit) -> list[str]:
    """What f needs for the loss of the reference at its optimum; refused where either family saw nothing like it."""
    C = budget_of(o, [f, reference])
    N, D = reference.law.optimum(C)
    loss = reference.law.loss(N, D)
    lines = [f"## {f.points.name} against {reference.points.name}\n"]
    if far := [what for p in (f.points, reference.points) for what in p.beyond(C=C, N=N, D=D)]:
        return [*lines, f"Not compared at the optimum of {reference.points.name}: {'; '.join(far)}.\n"]
    lines.append(f"To reach the loss {loss:.4f} that {reference.points.name} has at its optimum")
    lines.append(f"for C = {C:.3g}, N = {N:.3g} and D = {D:.3g}, {f.points.name} needs, as a share of that:\n")
    lines += ["| what it needs | share | 5 % | 95 % |", "|---|---|---|---|"]
    shares = compare(f, reference, C)
    wholes = {"C, at its own optimum": C, "D, at that N": D, "N, at that D": N}
    for (_, *values), (name, whole) in zip(shares, wholes.items()):
        cells = ["never" if v == math.inf else shown(possible(v * whole) / whole, ".3g") for v in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    far = [what for p in (f.points, reference.points) for what in p.beyond(loss=loss)]
    for (_, *values), (name, whole) in zip(shares, wholes.items()):
        needed = [share * whole for share in values if share < math.inf]
        far += [f"of the shares, {what}" for value in needed for what in f.points.beyond(**{name[0]: value})][:1]
    return [*lines, "", *(f"- Note: {what}: the law is not tested there." for what in far), ""]


# --- Pictures ------------------------------------------------------------------------------------------------------


def draw(o: Options, fits: list[Fit]) -> None:
    """A row for each family: losses at equal compute, and the sizes that lengths of training want."""
    figure, axes = plot.new_figure(11, 4.4 * len(fits), rows=len(fits), columns=2)
    for f, (left, right) in zip(fits, axes):
        draw_isoflops(f, left)
        draw_frontier(o, f, right)
        left.set_title(f.points.name, loc="left")
        for ax in (left, right):
            ax.legend(frameon=False, fontsize=8)
    plot.save(figure, o.out)


def draw_isoflops(f: Fit, axes: "plot.Axes") -> None:
    """The law's loss against N at five budgets, each with its optimum; the runs in the colour of the nearest one."""
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
    room = 0.1 * (p.loss.max() - p.loss.min())
    axes.set(xscale="log", xlabel="N, parameters", ylabel="validation loss (nats per token)\nlines: the law")
    axes.set(xlim=(sizes[0], sizes[-1]), ylim=(p.loss.min() - room, p.loss.max() + room))


def draw_frontier(o: Options, f: Fit, axes: "plot.Axes") -> None:
    """N against D: compute-optimal with its 5 to 95 % band, Kausik's interval from the anchor, and the runs' own."""
    p = f.points
    lengths = np.geomspace(p.D.min(), 10 * p.D.max(), 50)
    optima = np.array([f.interval(lambda law, D=D: law.size(D)) for D in lengths])  # (50, 3)
    best, low, high = np.nan_to_num(optima, nan=np.nan, posinf=1e300).T  # undetermined ends are not drawn
    axes.plot(lengths, best, label="compute-optimal", **plot.style(0) | dict(marker=""))
    axes.fill_between(lengths, low, high, color="#000000", alpha=0.12, linewidth=0)
    N0, D0, _ = anchor(o, p)
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
