"""Train a grid of options and seeds, and print the mean and the spread over the seeds, the best arm first.

    python -m experiments.sweep config/lpa_cpu.py --grid learning_rate=1e-3,2e-3 lowdim.q=16,48 --seeds=3 --jobs=2
    python -m experiments.sweep config/lpa_cpu.py --grid optimizer=adamw,muon --max_steps=300 --out=results/optimizers
    python -m experiments.sweep config/speedrun_shakespeare.py --seeds=3 --target=1.90      time to a validation loss

Any option of train.py may stand in the grid, or beside it with one value. Each run has a folder named by a hash of its
options and its data: a finished run is not run again, and a stopped one resumes. If the best value of a numeric option
lies at the edge of its grid, the sweep says so and tries the next value, too.
"""

import csv
import dataclasses
import datetime
import itertools
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch

import data
import train
from config import TrainConfig, UserError, as_command, load_config, parse, user_errors
from experiments.logs import read_run
from lpa import checkpoint
from lpa.distributed import DistInfo

MOST_EXTENSIONS = 3  # of a grid whose best value stays at its edge
SILENT = {"out_dir", "resume", "wandb"}  # options that change no result


@dataclass(frozen=True)
class SweepConfig:
    seeds: int = 1
    """Train each arm with seeds 1, 2, ..."""
    jobs: int = 1
    """Train so many runs side by side. They share the cores."""
    metric: Literal["val_loss", "bits_per_byte", "train_loss", "seconds", "seconds_to_target"] = "val_loss"
    """The best arm has the lowest mean of this."""
    target: float | None = None
    """Add the column seconds_to_target: seconds of training until the first evaluation at or below this loss."""
    out: Path | None = None
    """Write the table to OUT.md and OUT.csv, too."""
    out_dir: Path = Path("out/sweep")
    minutes: float | None = None
    """Stop cleanly after so long. The same command continues."""
    nproc_per_node: int = 1
    """Above 1: start each run with torchrun."""
    extend: bool = True
    """Try the next value where the best one lies at the edge of its grid."""

    def __post_init__(self) -> None:
        for name in ("seeds", "jobs", "nproc_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted 1 or more")
        if self.metric == "seconds_to_target" and self.target is None:
            raise ValueError("metric is seconds_to_target, wanted a --target with it")


@dataclass(frozen=True)
class Run:
    """One training: the arguments of train.py, and the folder that they determine."""

    name: str
    arguments: list[str]
    config: TrainConfig
    folder: Path


def make_run(name: str, arguments: list[str], out_dir: Path, processes: int = 1) -> Run:
    """Return the run of these arguments of train.py. Raise UserError where they or the corpus do not fit."""
    c = load_config(arguments)
    corpora = [data.open_corpus(c.dataset, split) for split in ("train", "val")]
    c, _ = train.share_step(train.with_vocabulary(c, *corpora), DistInfo(0, processes, torch.device("cpu")))
    # Only options that differ from their defaults: an option that is added later gives no run another folder.
    options = sorted(o for o in shlex.split(as_command(c)) if o[2:].partition("=")[0] not in SILENT)
    digest = sha256(json.dumps([options, *(corpus.fingerprint for corpus in corpora)]).encode()).hexdigest()
    letters = "".join(letter if letter.isalnum() or letter in "=.-" else "_" for letter in name)
    return Run(name, arguments, c, out_dir / f"{letters[:80]}_{digest[:12]}")


# --- Training what is missing ------------------------------------------------------------------------------------


def result(run: Run, target: float | None = None) -> dict[str, float] | None:
    """Return the losses and the seconds of a finished run. Return None for a run that has to be trained.

    A run that reached its end, but with a loss that is not finite, has infinite losses and is not trained again.
    """
    if not (run.folder / "log.jsonl").exists():
        return None
    log = read_run(run.folder)
    if not log.finished:
        end = min(run.config.max_steps, run.config.stop_step or math.inf)
        if not log.steps or log.steps[-1]["step"] < end or not (run.folder / "ckpt").exists():
            return None
        losses = ["val_loss", "bits_per_byte", "train_loss"] + (["seconds_to_target"] if target is not None else [])
        return dict.fromkeys(losses, math.inf) | dict(seconds=log.steps[-1]["seconds"])
    last = log.evaluations[-1]
    late = [step["loss"] for step in log.steps if step["step"] > 0.95 * last["step"]]
    found = dict(val_loss=last["val_loss"], bits_per_byte=last["val_bits_per_byte"])
    found |= dict(train_loss=statistics.fmean(late or [math.inf]), seconds=last["seconds"])
    if target is not None:
        reached = (e["seconds"] for e in log.evaluations if e["val_loss"] <= target)
        found["seconds_to_target"] = next(reached, math.inf)
    return found


def train_all(runs: list[Run], c: SweepConfig) -> list[str]:
    """Train what is not finished, c.jobs at a time. Return a line for each run that failed; the others continue.

    Raise UserError when stopped. Each job has a session of its own, so a Ctrl-C reaches it once, through this process.
    """
    todo = [run for run in {run.folder: run for run in runs}.values() if result(run) is None]
    deadline = time.monotonic() + 60 * c.minutes if c.minutes else math.inf
    failed, jobs, total = [], {}, len(todo)
    try:
        while todo or jobs:
            while todo and len(jobs) < c.jobs:
                run = todo.pop(0)
                jobs[start(run, c)] = run
            time.sleep(0.2)
            if time.monotonic() > deadline:
                raise KeyboardInterrupt
            for job in [job for job in jobs if job.poll() is not None]:
                run = jobs.pop(job)
                if job.returncode != 0 or result(run) is None:
                    output = run.folder.with_suffix(".out")
                    last = (output.read_text().splitlines() or ["no output"])[-1]
                    failed.append(f"{run.name} ended with code {job.returncode}: {last} (see {output})")
                    print(f"warning: {failed[-1]}", file=sys.stderr, flush=True)
                print(f"{total - len(todo) - len(jobs)} of {total} runs done", flush=True)
    except KeyboardInterrupt:
        raise UserError("stopped; finished runs stay, the same command continues") from None
    finally:
        stop(list(jobs))
    return failed


def start(run: Run, c: SweepConfig) -> subprocess.Popen:
    """Start train.py in a process of its own. Its output goes to a file beside its folder."""
    python = [sys.executable, "-u"]
    if c.nproc_per_node > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={c.nproc_per_node}"]
    command = [*python, "train.py", *run.arguments, f"--out_dir={run.folder}", "--resume=auto"]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // c.jobs))} if c.jobs > 1 else {}
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(run.folder.with_suffix(".out"), "a") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | threads, start_new_session=True)


def stop(jobs: list[subprocess.Popen]) -> None:
    """Let the jobs save and end. A second Ctrl-C kills them, so that none continues alone."""
    for job in jobs:
        job.send_signal(signal.SIGTERM)
    try:
        for job in jobs:
            job.wait()
    except KeyboardInterrupt:
        for job in jobs:
            job.kill()


# --- The grid ----------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> None:
    base, grid, c = split_arguments(arguments)
    runs = make_runs(base, arms(grid), c)
    failed = train_all(by_seed(runs), c)
    for extension in range(MOST_EXTENSIONS + 1):
        wider = extended(grid, summarise(runs, c))
        if wider == grid or not c.extend or extension == MOST_EXTENSIONS:
            break
        try:
            runs = make_runs(base, arms(wider), c)
        except UserError as error:  # such as a share above 1
            print(f"the grid is not extended: {error}")
            break
        grid, failed = wider, train_all(by_seed(runs), c)
    write(summarise(runs, c), [run.folder for run in by_seed(runs) if result(run)], failed, shlex.join(arguments), c)
    if failed:
        raise UserError(f"{len(failed)} runs failed; the same command tries them again")


def split_arguments(arguments: list[str]) -> tuple[list[str], dict[str, list[str]], SweepConfig]:
    """Return the arguments for train.py, the grid as option -> values, and the options of the sweep."""
    own = {field.name for field in dataclasses.fields(SweepConfig)}
    theirs, ours, grid, in_grid = [], [], {}, False
    for argument in arguments:
        if argument == "--grid":
            in_grid = True
            continue
        if argument.startswith("--grid="):
            in_grid, argument = True, argument.removeprefix("--grid=")
        elif argument.startswith("--") or argument.endswith(".py"):
            in_grid = False
        name, equals, values = argument.removeprefix("--").partition("=")
        if not in_grid:
            (ours if argument.startswith("--") and name in own else theirs).append(argument)
        elif equals and all(values.split(",")):
            grid[name] = values.split(",")
        else:
            raise UserError(f"--grid has {argument!r}, wanted OPTION=VALUE,VALUE,...")
    return theirs, grid, parse(ours, SweepConfig, __doc__)


def arms(grid: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the arguments of each point of the grid, named by its values."""
    points = [list(zip(grid, values)) for values in itertools.product(*grid.values())]
    return {" ".join(f"{o}={v}" for o, v in point) or "preset": [f"--{o}={v}" for o, v in point] for point in points}


def make_runs(base: list[str], arms: dict[str, list[str]], c: SweepConfig) -> dict[str, list[Run]]:
    """Return a run for each seed of each arm. Arms are given as name -> arguments, added to those that all share."""
    return {
        name: [
            make_run(f"{name} seed={seed}", [*base, *more, f"--seed={seed}"], c.out_dir, c.nproc_per_node)
            for seed in range(1, c.seeds + 1)
        ]
        for name, more in arms.items()
    }


def by_seed(runs: dict[str, list[Run]]) -> list[Run]:
    """Return the first seed of all arms, then the second, and so on: a sweep that is stopped can be compared."""
    return [run for seed in zip(*runs.values()) for run in seed]


def extended(grid: dict[str, list[str]], rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the grid with one more value for each option whose best value lies at its edge, and print each."""
    wider = dict(grid)
    for argument in arms(grid)[rows[0]["arm"]] if rows else []:
        option, _, best = argument[2:].partition("=")
        if (value := next_value(grid[option], best)) is not None:
            print(f"{option} = {best} is the best and lies at the edge of its grid; the next value is {value}")
            wider[option] = [*grid[option], value]
    return wider


def next_value(values: list[str], best: str) -> str | None:
    """Return the value one step of the grid beyond its edge, or None where the best one does not lie there."""
    try:
        numbers = sorted(map(float, values))
    except ValueError:
        return None
    if len(numbers) < 2 or float(best) not in (numbers[0], numbers[-1]) or numbers[0] <= 0:
        return None
    ratio = numbers[0] / numbers[1] if float(best) == numbers[0] else numbers[-1] / numbers[-2]
    integers = all(value.isdecimal() for value in values)
    value = str(round(float(best) * ratio)) if integers else f"{float(best) * ratio:.3g}"
    return None if float(value) in (0, *numbers) else value


# --- The table ---------------------------------------------------------------------------------------------------


def summarise(runs: dict[str, list[Run]], c: SweepConfig) -> list[dict[str, Any]]:
    """Return a row for each arm that has a result, the best first: mean and standard deviation over its seeds."""
    rows = []
    for name, seeds in runs.items():
        found = [values for run in seeds if (values := result(run, c.target)) is not None]
        columns = {key: [values[key] for values in found] for key in (found[0] if found else ())}
        row = {"arm": name, "seeds": len(found)} | {key: statistics.fmean(column) for key, column in columns.items()}
        rows += [row | {f"{key}_std": std(column) for key, column in columns.items()}] if found else []
    return sorted(rows, key=lambda row: row[c.metric])


def std(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


def mean_and_std(row: dict[str, Any], key: str, digits: int = 4) -> str:
    spread = "" if math.isnan(row[f"{key}_std"]) else f" ± {row[f'{key}_std']:.{digits}f}"
    return f"{row[key]:.{digits}f}{spread}" if math.isfinite(row[key]) else "not reached"


def as_text(rows: list[dict[str, Any]], markdown: bool) -> str:
    keys = [key for key in rows[0] if f"{key}_std" in rows[0]]
    lines = [["arm", "seeds", *keys]]
    for row in rows:
        means = [mean_and_std(row, key, 1 if "seconds" in key else 4) for key in keys]
        lines.append([row["arm"], str(row["seeds"]), *means])
    return markdown_table(lines) if markdown else aligned(lines)


def aligned(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def markdown_table(lines: list[list[str]]) -> str:
    head, *rest = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rest])


def write_page(path: Path, text: str) -> None:
    """Write a result, and make its folder. Raise UserError where that is impossible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_whole(path, text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def write(rows: list[dict[str, Any]], folders: list[Path], failed: list[str], command: str, c: SweepConfig) -> None:
    """Print the table and the command that plots the runs. Write the table to files where --out asks for it."""
    if not rows:
        raise UserError(f"no run has a result: {'; '.join(failed)}")
    print(as_text(rows, markdown=False))
    places = shlex.join(map(str, folders))
    print(f"plot: python -m experiments.plot {places} --y=val_loss --out={c.out or 'results/sweep'}")
    if c.out is None:
        return
    device = read_run(folders[0]).start["device"]
    about = f"torch {torch.__version__}, {device}, {datetime.date.today()}; mean ± standard deviation over the seeds."
    parts = [f"`python -m experiments.sweep {command}`", about, as_text(rows, markdown=True), *failed]
    write_page(Path(f"{c.out}.md"), "\n\n".join(parts) + "\n")
    with open(f"{c.out}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print(f"written to {c.out}.md and {c.out}.csv")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: stop the jobs, and report it
    with user_errors():
        main(sys.argv[1:])
