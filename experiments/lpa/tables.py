"""Train the tables of the LPA paper (arXiv 2411.02063) at a size that fits the machine.

    python -m data.own_text.prepare --path=ENWIKI_EXTRACT --name=enwiki_1k --tokenizer=bpe:1024
    python -m experiments.lpa.tables --table=6 --jobs=2                             2 cores
    python -m experiments.lpa.tables --table=3 --scale=gpu --seeds=2                one H200
    python -m experiments.lpa.tables --table=3 --scale=paper --nproc_per_node=8     as in the paper
    python -m experiments.lpa.tables --table=size                                   from which size on is LPA better?

For each model, short runs of seed 1 try the learning rates; then all seeds run with the best one. Runs are those of
experiments/sweep.py: the same command skips finished runs and continues stopped ones. experiments/lpa/models.py lists
what each table compares. Table 2 is bench.py's: --mode=eval and --mode=train. Writes results/lpa_table_N_SCALE.md.
"""

import datetime
import itertools
import math
import shlex
import signal
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from config import UserError, as_arguments, load_config, parse, user_errors
from experiments import sweep
from experiments.logs import read_run
from experiments.lpa.models import SCALES, Arm, arms
from model import GPT, GPTConfig, LowDim

TUNING_TOKENS = 200_000  # of the validation split, for the loss of a run that tries a learning rate


@dataclass(frozen=True)
class Options:
    table: Literal["1", "3", "4", "6", "7", "8", "size"]
    scale: Literal["paper", "gpu", "cpu"] = "cpu"
    seeds: int = 3
    rates: tuple[float, ...] = ()
    """Learning rates to try; none = those of the scale, or of the presets."""
    tune_share: float | None = None
    """Length of a run that tries a learning rate, as a share of the full length; None = that of the scale."""
    dataset: str | None = None
    max_steps: int | None = None
    jobs: int = 1
    nproc_per_node: int = 1
    minutes: float | None = None
    """Stop cleanly after this time; the same command continues."""
    out_dir: Path = Path("out/lpa_tables")
    results: Path = Path("results")


def main(o: Options) -> None:
    rows = arms(o.table, o.scale)
    if not rows:
        raise UserError(f"table {o.table} has no runs at scale {o.scale}: its models have 3B parameters: --scale=paper")
    train(o, [run for row in rows for run in tuning_runs(o, row)])
    runs = [seed_runs(o, row) for row in rows]
    train(o, [run for seeds in zip(*runs) for run in seeds])
    path, text = o.results / f"lpa_table_{o.table}_{o.scale}.md", markdown(o, rows, runs)
    sweep.write_page(path, text)
    print(f"{text}\nwritten to {path}")


# --- Runs --------------------------------------------------------------------------------------------------------


def train(o: Options, runs: list[sweep.Run]) -> None:
    c = sweep.SweepConfig(jobs=o.jobs, nproc_per_node=o.nproc_per_node, minutes=o.minutes)
    if failed := sweep.train_all(runs, c):
        raise UserError("; ".join(failed))


def arguments_of(o: Options, row: Arm) -> list[str]:
    """Return the arguments of train.py for a run of full length."""
    settings, tokens = SCALES[o.scale].changes | row.changes, SCALES[o.scale].tokens
    if o.dataset is not None:
        settings["dataset"] = o.dataset
    c = load_config([row.preset, *as_arguments(settings)])
    if o.table == "size" and o.scale != "gpu":  # 20 tokens per parameter of the dense model
        tokens = 20 * unallocated(replace(c.gpt, lowdim=LowDim())).n_params(embeddings=False)
    if tokens is not None:
        settings["max_steps"] = tokens // c.tokens_per_step
    if o.max_steps is not None:
        settings["max_steps"] = o.max_steps
    return [row.preset, *as_arguments(settings)]


def unallocated(gpt: GPTConfig) -> GPT:
    """Return a model without memory, to count its parameters and FLOPs."""
    with torch.device("meta"):
        return GPT(gpt)


def make_run(o: Options, row: Arm, rate: float, seed: int, share: float = 1.0) -> sweep.Run:
    arguments = arguments_of(o, row)
    steps = max(1, round(share * load_config(arguments).max_steps))
    settings = dict(learning_rate=rate, seed=seed, max_steps=steps, log_interval=max(1, steps // 400))
    if SCALES[o.scale].tokens is not None:
        settings["warmup_steps"] = round(0.05 * steps)
    if share < 1:
        settings["eval_tokens"] = TUNING_TOKENS
    arguments += as_arguments(settings)
    return sweep.make_run(f"{row.setting} {row.name}", arguments, o.out_dir, o.nproc_per_node)


def rates_of(o: Options, row: Arm) -> tuple[float, ...]:
    return o.rates or SCALES[o.scale].rates or (load_config([row.preset]).learning_rate,)


def share_of(o: Options) -> float:
    return o.tune_share or SCALES[o.scale].tune_share


def tuning_runs(o: Options, row: Arm) -> list[sweep.Run]:
    """Return a run for each learning rate; none where there is only one."""
    rates = rates_of(o, row)
    return [make_run(o, row, rate, 1, share_of(o)) for rate in rates] if len(rates) > 1 else []


def seed_runs(o: Options, row: Arm) -> list[sweep.Run]:
    best = rates_of(o, row)[0]
    if tried := tuning_runs(o, row):
        best = min(tried, key=lambda run: sweep.result(run)["val_loss"]).config.learning_rate
    return [make_run(o, row, best, seed) for seed in range(1, o.seeds + 1)]


# --- Tables ------------------------------------------------------------------------------------------------------


def markdown(o: Options, rows: list[Arm], runs: list[list[sweep.Run]]) -> str:
    head = ["setting", "model", "ranks", "rate", "parameters, M", "in blocks, M", "train loss", "val loss"]
    head += ["val perplexity", "bits per byte", "minutes", "paper: test perplexity"]
    rates, tuned = rates_of(o, rows[0]), "as given, none tuned"
    if len(rates) > 1:
        tried = ", ".join(f"{rate:g}" for rate in rates)
        tuned = f"tried on seed 1 at {share_of(o):g} of the length: {tried}; * marks the lowest and the highest"
    device = read_run(runs[0][0].folder).start["device"]
    lines = [
        f"# LPA, {'the crossing size' if o.table == 'size' else f'table {o.table}'} at scale {o.scale}\n",
        f"{o.seeds} seeds, mean ± standard deviation; torch {torch.__version__}, {device}, {datetime.date.today()}.",
        f"Command: `python -m experiments.lpa.tables {shlex.join(sys.argv[1:])}`",
        f"Learning rates {tuned}.",
        "Losses are in nats per token of this corpus's tokenizer: compare perplexities only within this table.\n",
        sweep.markdown_table([head, *(cells(o, row, seeds) for row, seeds in zip(rows, runs))]),
    ]
    notes = [f"{row.setting} {row.name}: {row.note}." for row in rows if row.note]
    lines += ["", *notes] if notes else []
    if o.table == "size":
        lines += ["", crossing(runs)]
    return "\n".join(lines) + "\n"


def cells(o: Options, row: Arm, runs: list[sweep.Run]) -> list[str]:
    (mean,) = sweep.summarise({row.name: runs}, sweep.SweepConfig())
    perplexities = [math.exp(min(sweep.result(run)["val_loss"], 700)) for run in runs]
    mean |= dict(perplexity=statistics.fmean(perplexities), perplexity_std=sweep.std(perplexities))
    mean |= dict(minutes=mean["seconds"] / 60, minutes_std=mean["seconds_std"] / 60)
    digits = dict(train_loss=4, val_loss=4, perplexity=2, bits_per_byte=4, minutes=1)
    log, rates, rate = read_run(runs[0].folder), rates_of(o, row), runs[0].config.learning_rate
    return [
        row.setting,
        row.name,
        "; ".join(f"{' '.join(names)}: {rank}" for rank, names in log.ranks().items()) or "-",
        f"{rate:g}*" if len(rates) > 1 and rate in (min(rates), max(rates)) else f"{rate:g}",
        f"{log.parameters / 1e6:.4g}",
        f"{log.parameters_in_blocks / 1e6:.4g}",
        *(sweep.mean_and_std(mean, key, number) for key, number in digits.items()),
        row.paper,
    ]


def crossing(runs: list[list[sweep.Run]]) -> str:
    """Say where LPA's loss falls below its dense twin's, on a line through neighbours in log parameters."""
    points = []
    for dense, low in zip(runs[::2], runs[1::2]):
        gaps = [sweep.result(b)["val_loss"] - sweep.result(a)["val_loss"] for a, b in zip(dense, low)]
        points.append((read_run(dense[0].folder).parameters, statistics.fmean(gaps)))
    found = ", ".join(f"{n / 1e6:.3g}M {gap:+.4f}" for n, gap in points)
    for (n, gap), (m, following) in itertools.pairwise(points):
        if gap > 0 >= following:
            size = n * (m / n) ** (gap / (gap - following))
            return f"LPA's val loss minus dense: {found}. LPA overtakes at about {size / 1e6:.3g}M parameters of dense."
    return f"LPA's val loss minus dense: {found}. LPA does not overtake."


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: stop the jobs, and report it
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
