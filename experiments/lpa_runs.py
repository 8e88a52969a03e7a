"""The runs of a table: their options and folders, training what is missing, and reading the results.

A run's folder is out/lpa_tables/NAME_HASH, where the hash is that of all options and of the data. See lpa_tables.py.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from data.copying import TASKS

import data
import train
from config import TrainConfig, UserError, as_arguments, load_config
from experiments.lpa_models import SCALES, Arm, arms
from lpa import checkpoint
from lpa.distributed import World
from model import GPT, GPTConfig, LowDim

TUNING_TOKENS = 100_000  # of the val split, to choose a rate
TRAIN_SHARE = 0.05  # the train loss is the mean over the logged steps of so much of the end


@dataclass(frozen=True)
class Options:
    table: Literal["1", "2", "3", "4", "6", "7", "8", "size"]
    """The paper's number, or size: where between 130M and 370M the paper says that LPA overtakes its dense twin."""
    scale: Literal["cpu", "gpu", "paper"] = "cpu"
    seeds: int = 3
    rates: tuple[float, ...] = ()
    """Learning rates to try for each model; none = the scale's grid, for paper the paper's own rate."""
    tune_share: float | None = None
    """Length of a run that tries a rate, as a share of the whole; 1 = the whole, which is then the first seed's run.
    None = the scale's."""
    inits: tuple[Literal["spectral", "matched", "torch"], ...] = ()
    """A row for each law that the factors start from; none = torch for paper, as its authors, else spectral."""
    dropouts: tuple[float, ...] = ()
    """A row for each; none = what the preset says."""
    dataset: str | None = None
    """None = the scale's corpus."""
    max_steps: int | None = None
    """None = the scale's length."""
    jobs: int = 1
    """Runs side by side, on one thread each: a tiny model has no use for two."""
    nproc_per_node: int = 1
    """Above 1: each run under torchrun."""
    minutes: float | None = None
    """Stop cleanly after so long; the same command goes on."""
    dry_run: bool = False
    """Show the runs with parameters, FLOPs and hours, and run nothing."""
    folders: bool = False
    """Print the folders of the finished runs, for experiments.plot, and run nothing."""
    out_dir: Path = Path("out/lpa_tables")
    results: Path = Path("results")

    def __post_init__(self) -> None:
        for name in ("seeds", "jobs", "nproc_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted 1 or more")
        if self.tune_share is not None and not 0 < self.tune_share <= 1:
            raise ValueError(f"tune_share is {self.tune_share}, wanted above 0 and at most 1")


@dataclass(frozen=True)
class Row:
    """A model, the law that its factors start from, and its dropout."""

    arm: Arm
    config: TrainConfig
    """At the preset's rate and the whole length."""
    arguments: list[str]
    """Those of train.py that give this config."""


@dataclass(frozen=True)
class Run:
    row: Row
    config: TrainConfig
    arguments: list[str]
    fingerprints: tuple[str, str]
    """Of the train and val split."""
    out_dir: Path
    tuning: bool

    @cached_property
    def folder(self) -> Path:
        """Named by all that a result depends on. The model's name in front is for people alone."""
        options = comparable(dataclasses.asdict(self.config))
        digest = sha256(json.dumps([options, self.fingerprints], sort_keys=True).encode()).hexdigest()[:16]
        name = "".join(letter if letter.isalnum() else "_" for letter in f"{self.row.arm.setting} {self.row.arm.model}")
        return self.out_dir / f"{name}_{digest}"

    def __str__(self) -> str:
        c, arm = self.config, self.row.arm
        return f"{arm.setting} {arm.model}, rate {c.learning_rate:g}, {c.max_steps} steps, seed {c.seed}"


def table_rows(o: Options) -> Iterator[Row]:
    """A row per model, init and dropout. Raises UserError where the scale has none for this table."""
    scale, found = SCALES[o.scale], arms(o.table, o.scale)
    if not found:
        raise UserError(f"table {o.table} has no runs at scale {o.scale}, its models have 3B parameters: --scale=paper")
    for arm in found:
        settings = scale.changes | arm.changes
        if o.dataset is not None:
            settings["dataset"] = o.dataset
        c = configured(arm.preset, settings)
        tokens_per_step = c.tokens_per_step or c.batch_size * c.gpt.block_size
        if o.table == "size":  # as long as its dense model needs
            settings["max_steps"] = 20 * count(dataclasses.replace(c.gpt, lowdim=LowDim()))[1] // tokens_per_step
        if scale.tokens is not None and (o.table != "size" or o.scale == "gpu"):
            settings["max_steps"] = scale.tokens // tokens_per_step
        if o.max_steps is not None:
            settings["max_steps"] = o.max_steps
        low = any(dataclasses.asdict(c.gpt.lowdim).values())
        for init in (o.inits or (scale.init,)) if low else ("",):  # a dense model has no factors
            for dropout in o.dropouts or (c.gpt.dropout,):
                extra = dict(factor_init=init, dropout=dropout) if low else dict(dropout=dropout)
                yield Row(arm, configured(arm.preset, settings | extra), arguments_of(arm.preset, settings | extra))


def count(gpt: GPTConfig) -> tuple[int, int, int]:
    """Parameters, those outside the embeddings, FLOPs of training a token."""
    with torch.device("meta"):
        model = GPT(gpt)
    return model.n_params(), model.n_params(embeddings=False), 3 * model.flops_per_token()


def tokens_of(c: TrainConfig) -> int:
    return c.max_steps * (c.tokens_per_step or c.batch_size * c.gpt.block_size)


def configured(preset: str, settings: dict[str, Any]) -> TrainConfig:
    return load_config(arguments_of(preset, settings))


def arguments_of(preset: str, settings: dict[str, Any]) -> list[str]:
    return [preset, *as_arguments(settings)]


def make_run(o: Options, row: Row, rate: float, seed: int, tuning: bool = False) -> Run:
    """One training of a row. Raises UserError where its corpus is not prepared."""
    c, scale = row.config, SCALES[o.scale]
    steps = max(1, round(c.max_steps * share_of(o))) if tuning else c.max_steps
    settings: dict[str, Any] = dict(learning_rate=rate, seed=seed, max_steps=steps, log_interval=max(1, steps // 400))
    if scale.warmup_share is not None:
        settings["warmup_steps"] = round(scale.warmup_share * steps)
    if tuning:
        settings["eval_tokens"] = TUNING_TOKENS
    try:
        corpora = [data.open_corpus(c.dataset, split) for split in ("train", "val")]
    except UserError as error:
        raise UserError(f"{error}. The {o.scale} scale is made for: {scale.prepare}") from None
    world = World(0, o.nproc_per_node, torch.device("cpu"))
    config = train.with_vocabulary(dataclasses.replace(c, **settings), *corpora)
    config, _ = train.share_step(config, world)  # now as train.py will write it
    arguments = [*row.arguments, *as_arguments(settings)]
    return Run(row, config, arguments, tuple(corpus.fingerprint for corpus in corpora), o.out_dir, tuning)


def rates_of(o: Options, row: Row) -> tuple[float, ...]:
    return o.rates or SCALES[o.scale].rates or (row.config.learning_rate,)


def share_of(o: Options) -> float:
    return o.tune_share or SCALES[o.scale].tune_share


def tuning_runs(o: Options, row: Row) -> list[Run]:
    """One for each rate; none where there is nothing to choose."""
    rates = rates_of(o, row)
    return [make_run(o, row, rate, seed=1, tuning=share_of(o) < 1) for rate in rates] if len(rates) > 1 else []


def best_rate(o: Options, row: Row) -> float:
    runs = tuning_runs(o, row)
    return min(runs, key=lambda run: read_result(run)["val_loss"]).config.learning_rate if runs else rates_of(o, row)[0]


# Training what is missing


def comparable(options: dict[str, Any]) -> dict[str, Any]:
    """The options that are not as their defaults, but for those that change no result: some never do, some are of
    other models or data. An option that comes in later, its default being what was done before, changes nothing."""
    silent = {"out_dir", "resume", "wandb"}
    silent |= {"model", "recurrent"} if options.get("model", "gpt") == "gpt" else set()
    silent |= {"task"} if options["dataset"] not in TASKS else set()
    defaults = dataclasses.asdict(TrainConfig())
    changed = {name: value for name, value in options.items() if name not in silent and value != defaults.get(name)}
    return changed | dict(gpt={k: v for k, v in options["gpt"].items() if v != defaults["gpt"].get(k)})


def finished(run: Run) -> bool:
    """Whether the run's folder holds its result. Raises UserError where the folder is of another run."""
    try:
        saved = json.loads((run.folder / "config.json").read_text())
    except (OSError, ValueError):
        if (run.folder / "ckpt").exists():
            raise UserError(f"{run.folder} has checkpoints, but no readable config.json: move it away") from None
        return False  # never begun, or killed before its first step
    changed = checkpoint.differences(comparable(saved), comparable(dataclasses.asdict(run.config)))
    with contextlib.suppress(OSError, ValueError, KeyError):
        folder = run.folder / "ckpt" / (run.folder / "ckpt" / "last").read_text().strip()
        order = json.loads((folder / "manifest.json").read_text())["order"]
        changed += checkpoint.differences(dict(data=order["data"]), dict(data=run.fingerprints[0]))
    if changed:
        raise UserError(f"{run.folder} is of another run ({'; '.join(changed)}): move it away")
    return read_result(run) is not None


def read_result(run: Run) -> dict[str, float] | None:
    """train_loss, val_loss, bits_per_byte and seconds of a finished run, else None. A loss that is lost is infinite."""
    try:
        lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return None
    steps = run.config.max_steps
    last = [line for line in lines if line["step"] == steps and "val_loss" in line]
    logged = [line for line in lines if "loss" in line and line["step"] > (1 - TRAIN_SHARE) * steps]
    if not last or not logged:
        return None
    losses = [math.inf if line["loss"] is None else line["loss"] for line in logged]
    values = [math.inf if last[-1][name] is None else last[-1][name] for name in ("val_loss", "val_bits_per_byte")]
    train_loss, seconds = statistics.mean(losses), logged[-1]["seconds"]
    return dict(train_loss=train_loss, val_loss=values[0], bits_per_byte=values[1], seconds=seconds)


def train_all(o: Options, runs: list[Run], deadline: float) -> None:
    """Train what is not finished, o.jobs at a time. Raises UserError when stopped or when a run fails.

    The jobs have sessions of their own, so that a Ctrl-C reaches them once, through us, and they save and end.
    """
    unique = {run.folder: run for run in runs}
    todo = [run for run in unique.values() if not finished(run)]
    total, jobs = len(todo), {}
    if unique:
        print(f"{len(unique) - total} of {len(unique)} runs are finished, {total} to do", flush=True)
    try:
        while todo or jobs:
            while todo and len(jobs) < o.jobs:
                run = todo.pop(0)
                jobs[start(o, run)] = run
            time.sleep(0.2)
            if time.monotonic() > deadline:
                raise KeyboardInterrupt
            for job in [job for job in jobs if job.poll() is not None]:
                conclude(jobs.pop(job), job.returncode)
                print(f"{total - len(todo) - len(jobs)} of {total} done", flush=True)
    except KeyboardInterrupt:
        raise UserError("stopped; finished runs stay, the same command goes on") from None
    finally:
        stop(list(jobs))


def stop(jobs: list[subprocess.Popen]) -> None:
    """Have them save and end; a second Ctrl-C kills them, for none may go on writing when we are gone."""
    for job in jobs:
        job.send_signal(signal.SIGTERM)
    try:
        for job in jobs:
            job.wait()
    except KeyboardInterrupt:
        for job in jobs:
            job.kill()
            job.wait()


def start(o: Options, run: Run) -> subprocess.Popen:
    """train.py in a process of its own; what it prints goes to a file beside its folder."""
    python = [sys.executable, "-u"]
    if o.nproc_per_node > 1:
        python += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={o.nproc_per_node}"]
    command = [*python, "train.py", *run.arguments, f"--out_dir={run.folder}", "--resume=auto"]
    threads = {"OMP_NUM_THREADS": "1"} if o.jobs > 1 else {}
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(run.folder.with_suffix(".out"), "a") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | threads, start_new_session=True)


def conclude(run: Run, code: int) -> None:
    """Say how a run ended. Raises UserError where it failed, or was stopped by somebody else."""
    output = run.folder.with_suffix(".out")
    if code != 0:
        lines = output.read_text().splitlines() or ["no output"]
        raise UserError(f"{run} ended with code {code}: {lines[-1]} (all of it in {output})")
    if read_result(run) is None:
        raise UserError(f"{run} was stopped; the same command goes on")
    result = read_result(run)
    print(f"{run}: val loss {result['val_loss']:.4f}, {result['seconds']:.0f} s", flush=True)
    if run.tuning:  # its loss is all that is wanted of it
        shutil.rmtree(run.folder / "ckpt", ignore_errors=True)
