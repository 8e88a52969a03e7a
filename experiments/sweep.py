"""Train a grid of options and seeds, and compare: mean and spread over the seeds, and the best of the grid.

    python -m experiments.sweep config/lpa_cpu.py --grid learning_rate=1e-3,2e-3 lowdim.q=16,48 --seeds=3 --jobs=2
    python -m experiments.sweep config/lpa_cpu.py --grid optimizer=adamw,muon --max_steps=300 --out=results/optimizers
    python -m experiments.sweep config/speedrun_shakespeare.py --seeds=3 --target=1.90      time to a validation loss

Any option of train.py may stand in the grid, or, with one value, beside it. Each run is one of train.py in a folder of
its own, named by the hash of all its options and of its data: what is finished is not run again, and what was stopped
resumes. Where the best value of a numeric option lies at the edge of its grid, the grid goes one further.
"""

import csv
import dataclasses
import datetime
import io
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
from typing import Any

import torch

import data
import train
from config import TrainConfig, UserError, as_command, load_config, parse, user_errors
from experiments.logs import read_run
from lpa.distributed import DistInfo

MOST_EXTENSIONS = 3  # of a grid whose best value stays at its edge
SILENT = {"out_dir", "resume", "wandb"}  # options that change no result


@dataclass(frozen=True)
class SweepConfig:
    seeds: int = 1
    """Seeds 1, 2, ... of each arm."""
    jobs: int = 1
    """Runs side by side, the cores shared between them."""
    metric: str = "val_loss"
    """What decides which arm is best, the lowest: val_loss, bits_per_byte, train_loss or seconds_to_target."""
    target: float | None = None
    """Also report the training seconds until the first evaluation at or below this loss."""
    out: Path | None = None
    """Write the table to OUT.md and OUT.csv, too."""
    out_dir: Path = Path("out/sweep")
    minutes: float | None = None
    """Stop cleanly after so long; the same command continues."""
    nproc_per_node: int = 1
    """Above 1: each run under torchrun."""
    extend: bool = True
    """Extend the grid where the best value lies at its edge."""
    dry_run: bool = False
    """Print the commands, and train nothing."""

    def __post_init__(self) -> None:
        for name in ("seeds", "jobs", "nproc_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted 1 or more")


@dataclass(frozen=True)
class Run:
    """One training: the arguments of train.py, and the folder that they determine."""

    name: str
    arguments: tuple[str, ...]
    config: TrainConfig
    folder: Path


def make_run(name: str, arguments: list[str], out_dir: Path, ranks: int = 1) -> Run:
    """Return the run of these arguments of train.py. Raise UserError where they or the corpus do not fit."""
    c = load_config(arguments)
    corpora = [data.open_corpus(c.dataset, split) for split in ("train", "val")]
    c, _ = train.share_step(train.with_vocabulary(c, *corpora), DistInfo(0, ranks, torch.device("cpu")))
    digest = sha256(json.dumps([changed_options(c), *(corpus.fingerprint for corpus in corpora)]).encode())
    letters = "".join(letter if letter.isalnum() or letter in "=.-" else "_" for letter in name)
    return Run(name, tuple(arguments), c, out_dir / f"{letters[:80]}_{digest.hexdigest()[:12]}")


def changed_options(c: TrainConfig) -> list[str]:
    """Return the options that differ from their defaults and can change a result.

    So an option that is added later, with the old behaviour as its default, gives no run another name.
    """
    names = shlex.split(as_command(c))
    return sorted(argument for argument in names if argument[2:].partition("=")[0] not in SILENT)


# --- Training what is missing ------------------------------------------------------------------------------------


def result(run: Run, target: float | None = None) -> dict[str, float] | None:
    """Return losses and seconds of a finished run, else None. A loss that is not finite counts as infinite."""
    if not (run.folder / "log.jsonl").exists():
        return None
    log = read_run(run.folder)
    last = min(run.config.max_steps, run.config.stop_step or math.inf)
    if not log.evaluations or log.evaluations[-1]["step"] < last:
        if log.steps and log.steps[-1]["step"] >= last and (run.folder / "ckpt").exists():
            lost = dict.fromkeys(("val_loss", "bits_per_byte", "train_loss"), math.inf)
            return lost | dict(seconds=log.steps[-1]["seconds"], seconds_to_target=math.inf)
        return None
    final = log.evaluations[-1]
    late = [step["loss"] for step in log.steps if step["step"] > 0.95 * last]  # the mean of the last twentieth
    found = dict(val_loss=final["val_loss"], bits_per_byte=final["val_bits_per_byte"], seconds=final["seconds"])
    found["train_loss"] = statistics.mean(late) if late else math.inf
    if target is not None:
        reached = (e["seconds"] for e in log.evaluations if e["val_loss"] <= target)
        found["seconds_to_target"] = next(reached, math.inf)
    return found


def train_all(runs: list[Run], c: SweepConfig) -> list[str]:
    """Train what is not finished, c.jobs at a time. Return a line for each run that failed; the others continue.

    Raise UserError when stopped. The jobs have sessions of their own, so that a Ctrl-C reaches them once, through us.
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
        for job in jobs:
            job.send_signal(signal.SIGTERM)  # they save
        for job in jobs:
            job.wait()
    return failed


def start(run: Run, c: SweepConfig) -> subprocess.Popen:
    """Start train.py in a process of its own; what it prints goes to a file beside its folder."""
    python = [sys.executable, "-u"]
    if c.nproc_per_node > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={c.nproc_per_node}"]
    command = [*python, "train.py", *run.arguments, f"--out_dir={run.folder}", "--resume=auto"]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // c.jobs))} if c.jobs > 1 else {}
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(run.folder.with_suffix(".out"), "a") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | threads, start_new_session=True)


# --- The grid ----------------------------------------------------------------------------------------------------


def read_grid(entries: list[str]) -> dict[str, list[str]]:
    """['lowdim.q=16,48'] -> {'lowdim.q': ['16', '48']}"""
    grid = {}
    for entry in entries:
        name, equals, values = entry.partition("=")
        if not equals or not all(values.split(",")):
            raise UserError(f"--grid has {entry!r}, wanted OPTION=VALUE,VALUE,...")
        grid[name.removeprefix("--")] = values.split(",")
    return grid


def arms(grid: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the arguments of each point of the grid, by a name that tells it."""
    points = [list(zip(grid, values)) for values in itertools.product(*grid.values())]
    named = {" ".join(f"{name}={value}" for name, value in point): point for point in points}
    return {name or "preset": [f"--{option}={value}" for option, value in point] for name, point in named.items()}


def one_further(values: list[str], best: str) -> str | None:
    """Return the value that continues a numeric grid beyond its edge, where the best one lies there."""
    try:
        numbers = sorted(map(float, values))
    except ValueError:
        return None
    if len(numbers) < 2 or float(best) not in (numbers[0], numbers[-1]) or numbers[0] <= 0:
        return None
    ratio = numbers[1] / numbers[0] if float(best) == numbers[0] else numbers[-1] / numbers[-2]
    beyond = float(best) / ratio if float(best) == numbers[0] else float(best) * ratio
    whole = all(value.lstrip("-").isdecimal() for value in values)
    text = str(round(beyond)) if whole else f"{beyond:.3g}"
    return None if float(text) in numbers or float(text) <= 0 else text


def main(arguments: list[str]) -> None:
    base, grid, c = split_arguments(arguments)
    for _ in range(MOST_EXTENSIONS + 1):
        points = arms(grid)
        runs = {
            name: [make_run(f"{name} seed={s}", [*base, *more, f"--seed={s}"], c.out_dir, c.nproc_per_node)
                   for s in range(1, c.seeds + 1)]
            for name, more in points.items()
        }  # fmt: skip
        by_seed = [run for seeds in zip(*runs.values()) for run in seeds]  # the first seed of all, then the second
        if c.dry_run:
            print("\n".join(f"python train.py {shlex.join(run.arguments)} --out_dir={run.folder}" for run in by_seed))
            return
        failed = train_all(by_seed, c)
        rows = summarise(runs, c)
        best = rows[0]["arm"] if rows else None
        further = {}
        for option, more in [argument[2:].split("=", 1) for argument in points.get(str(best), [])]:
            if (value := one_further(grid[option], more)) is not None:
                print(f"{option} = {more} is the best and lies at the edge of its grid; {value} would come next")
                further[option] = value
        if not further or not c.extend:
            break
        grid = {option: values + ([further[option]] if option in further else []) for option, values in grid.items()}
    write(rows, runs, failed, arguments, c)
    if failed:
        raise UserError(f"{len(failed)} runs failed; the same command tries them again")


def split_arguments(arguments: list[str]) -> tuple[list[str], dict[str, list[str]], SweepConfig]:
    """Return the arguments for train.py, the grid, and our own options."""
    own = {field.name for field in dataclasses.fields(SweepConfig)}
    theirs, ours, entries, in_grid = [], [], [], False
    for argument in arguments:
        name = argument.removeprefix("--").partition("=")[0]
        if argument.startswith("--") or argument.endswith(".py"):
            in_grid = argument == "--grid" or argument.startswith("--grid=")
        if in_grid:
            entries += [argument.removeprefix("--grid").removeprefix("=")]
        else:
            (ours if argument.startswith("--") and name in own else theirs).append(argument)
    return theirs, read_grid([entry for entry in entries if entry]), parse(ours, SweepConfig, __doc__)


# --- The table ---------------------------------------------------------------------------------------------------


def summarise(runs: dict[str, list[Run]], c: SweepConfig) -> list[dict[str, Any]]:
    """Return a row per arm that has a result, the best first: mean and standard deviation over its seeds."""
    rows = []
    for name, seeds in runs.items():
        found = [r for run in seeds if (r := result(run, c.target)) is not None]
        if found:
            columns = {key: [r[key] for r in found] for key in found[0]}
            means = {key: statistics.fmean(values) for key, values in columns.items()}
            spreads = {f"{key}_std": deviation(values) for key, values in columns.items()}
            rows.append(dict(arm=name, seeds=len(found)) | means | spreads)
    if rows and c.metric not in rows[0]:
        raise UserError(f"metric is {c.metric}, wanted one of {', '.join(k for k in rows[0] if k + '_std' in rows[0])}")
    return sorted(rows, key=lambda row: row[c.metric])


def deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


def mean_and_spread(row: dict[str, Any], key: str, digits: int = 4) -> str:
    spread = row[f"{key}_std"]
    return f"{row[key]:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")


def as_text(rows: list[dict[str, Any]], markdown: bool) -> str:
    keys = [key for key in rows[0] if f"{key}_std" in rows[0]]
    cells = [["arm", "seeds", *keys]]
    for row in rows:
        digits = {key: 1 if "seconds" in key else 4 for key in keys}
        cells.append([row["arm"], str(row["seeds"]), *(mean_and_spread(row, key, digits[key]) for key in keys)])
    if markdown:
        lines = [f"| {' | '.join(line)} |" for line in cells]
        return "\n".join([lines[0], "|---" * len(cells[0]) + "|", *lines[1:]])
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)


def write(
    rows: list[dict[str, Any]], runs: dict[str, list[Run]], failed: list[str], arguments: list[str], c: SweepConfig
) -> None:
    """Print the table and the line that plots the runs; write it to files where asked."""
    if not rows:
        raise UserError(f"no run has a result: {'; '.join(failed)}")
    print(as_text(rows, markdown=False))
    folders = " ".join(str(run.folder) for seeds in runs.values() for run in seeds if result(run) is not None)
    print(f"plot: python -m experiments.plot {folders} --y=val_loss --out={c.out or 'results/sweep'}")
    if c.out is None:
        return
    c.out.parent.mkdir(parents=True, exist_ok=True)
    device = read_run(next(run.folder for seeds in runs.values() for run in seeds if result(run))).start["device"]
    head = f"`python -m experiments.sweep {shlex.join(arguments)}`\n\ntorch {torch.__version__}, {device},"
    head += f" {datetime.date.today()}; mean ± standard deviation over the seeds.\n\n"
    notes = "".join(f"\n{line}\n" for line in failed)
    c.out.with_suffix(".md").write_text(f"{head}{as_text(rows, markdown=True)}\n{notes}")
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    c.out.with_suffix(".csv").write_text(text.getvalue())
    print(f"written to {c.out}.md and {c.out}.csv")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: stop the jobs, and report it
    with user_errors():
        main(sys.argv[1:])
