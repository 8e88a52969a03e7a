"""The tables of the LPA paper (arXiv 2411.02063), trained here at a size that fits the machine.

    python -m data.own_text.prepare --path=ENWIKI_EXTRACT --name=enwiki_1k --tokenizer=bpe:1024
    python -m experiments.lpa.tables --table=6 --jobs=2                             2 cores
    python -m experiments.lpa.tables --table=3 --scale=gpu --seeds=2                one H200
    python -m experiments.lpa.tables --table=3 --scale=paper --nproc_per_node=8     as the paper had it
    python -m experiments.lpa.tables --table=8 --scale=paper --dry_run              what it would run, and how long
    python -m experiments.lpa.tables --table=size                                   from which size on is LPA better?

Each model first gets its learning rate: one run of seed 1 and a share of the length for each rate of a grid. Then all
seeds run at the best. Runs are those of experiments/sweep.py: finished ones are not run again, stopped ones resume.
experiments/lpa/models.py lists what each table compares. Table 2 is bench.py's: --mode=eval and --mode=train.
Writes results/lpa_table_N_SCALE.md.
"""

import dataclasses
import datetime
import itertools
import math
import shlex
import signal
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from config import UserError, as_arguments, load_config, parse, user_errors
from experiments import sweep
from experiments.lpa.models import SCALES, Arm, arms
from lpa import checkpoint
from model import GPT, GPTConfig, LowDim

TUNING_TOKENS = 200_000  # of the val split, that give the loss of a run that tries a rate


@dataclass(frozen=True)
class Options:
    table: Literal["1", "3", "4", "6", "7", "8", "size"]
    scale: Literal["paper", "gpu", "cpu"] = "cpu"
    seeds: int = 3
    rates: tuple[float, ...] = ()
    """Learning rates to try; none = the scale's, or the presets' own."""
    tune_share: float | None = None
    """Length of a run that tries a rate, as a share of the full one; None = the scale's."""
    dataset: str | None = None
    max_steps: int | None = None
    jobs: int = 1
    nproc_per_node: int = 1
    minutes: float | None = None
    """Stop cleanly after so long; the same command continues."""
    dry_run: bool = False
    """Print the runs with parameters, FLOPs and hours, and train nothing."""
    out_dir: Path = Path("out/lpa_tables")
    results: Path = Path("results")


def main(o: Options) -> None:
    rows = arms(o.table, o.scale)
    if not rows:
        raise UserError(f"table {o.table} has no runs at scale {o.scale}: its models have 3B parameters: --scale=paper")
    if o.dry_run:
        print(plan(o, rows))
        return
    c = sweep.SweepConfig(jobs=o.jobs, nproc_per_node=o.nproc_per_node, minutes=o.minutes)
    stop_on_failure(sweep.train_all([run for row in rows for run in tuning_runs(o, row)], c))
    runs = [seed_runs(o, row) for row in rows]
    stop_on_failure(sweep.train_all([run for seeds in zip(*runs) for run in seeds], c))
    path = o.results / f"lpa_table_{o.table}_{o.scale}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(o, rows, runs)
    checkpoint.write_whole(path, text)
    print(f"{text}\nwritten to {path}")


def stop_on_failure(failed: list[str]) -> None:
    if failed:
        raise UserError("; ".join(failed))


# --- Runs --------------------------------------------------------------------------------------------------------


def settings_of(o: Options, row: Arm) -> dict[str, Any]:
    """Return what changes in the preset of a row, its length included."""
    scale = SCALES[o.scale]
    settings = scale.changes | row.changes | ({} if o.dataset is None else dict(dataset=o.dataset))
    c = load_config([row.preset, *as_arguments(settings)])
    tokens_per_step = c.tokens_per_step or c.batch_size * c.gpt.block_size
    if o.table == "size":  # 20 tokens for each parameter of the dense model
        settings["max_steps"] = 20 * counts(dataclasses.replace(c.gpt, lowdim=LowDim()))[1] // tokens_per_step
    if scale.tokens is not None and (o.table != "size" or o.scale == "gpu"):
        settings["max_steps"] = scale.tokens // tokens_per_step
    if o.max_steps is not None:
        settings["max_steps"] = o.max_steps
    if any(dataclasses.asdict(c.gpt.lowdim).values()):
        settings["factor_init"] = scale.init
    return settings


def make_run(o: Options, row: Arm, rate: float, seed: int, share: float = 1.0) -> sweep.Run:
    settings, scale = settings_of(o, row), SCALES[o.scale]
    full = settings.get("max_steps") or load_config([row.preset]).max_steps
    steps = max(1, round(share * full))
    settings |= dict(learning_rate=rate, seed=seed, max_steps=steps, log_interval=max(1, steps // 400))
    if scale.warmup_share is not None:
        settings["warmup_steps"] = round(scale.warmup_share * steps)
    if share < 1:
        settings["eval_tokens"] = TUNING_TOKENS
    name = f"{row.setting} {row.model}"
    try:
        return sweep.make_run(name, [row.preset, *as_arguments(settings)], o.out_dir, o.nproc_per_node)
    except UserError as error:
        raise UserError(f"{error}. The {o.scale} scale is made for: {scale.prepare}") from None


def rates_of(o: Options, row: Arm) -> tuple[float, ...]:
    own = load_config([row.preset, *as_arguments(SCALES[o.scale].changes | row.changes)]).learning_rate
    return o.rates or SCALES[o.scale].rates or (own,)


def share_of(o: Options) -> float:
    return o.tune_share or SCALES[o.scale].tune_share


def tuning_runs(o: Options, row: Arm) -> list[sweep.Run]:
    """Return a run for each rate; none where there is nothing to choose."""
    rates = rates_of(o, row)
    return [make_run(o, row, rate, 1, share_of(o)) for rate in rates] if len(rates) > 1 else []


def seed_runs(o: Options, row: Arm) -> list[sweep.Run]:
    tried = tuning_runs(o, row)
    best = min(tried, key=lambda run: sweep.result(run)["val_loss"]).config.learning_rate if tried else None
    return [make_run(o, row, best or rates_of(o, row)[0], seed) for seed in range(1, o.seeds + 1)]


def counts(gpt: GPTConfig) -> tuple[int, int, int]:
    """Return parameters, those outside the embeddings, and training FLOPs per token."""
    with torch.device("meta"):
        model = GPT(dataclasses.replace(gpt, vocab_size=gpt.vocab_size or 32_000))
    return model.n_params(), model.n_params(embeddings=False), 3 * model.flops_per_token()


# --- Tables ------------------------------------------------------------------------------------------------------


def plan(o: Options, rows: list[Arm]) -> str:
    """Return the runs of a table with what they would cost."""
    scale, total = SCALES[o.scale], 0.0
    lines = [f"{'setting':10}{'model':14}{'parameters':>15}{'paper':>8}{'tokens':>16}{'rates':>7}{'hours':>10}"]
    for row in rows:
        arguments = [row.preset, *as_arguments(settings_of(o, row))]
        c, tries = load_config(arguments), len(rates_of(o, row))
        params, _, flops = counts(c.gpt)
        tokens = c.max_steps * (c.tokens_per_step or c.batch_size * c.gpt.block_size)
        runs = o.seeds + (tries * share_of(o) if tries > 1 else 0)
        hours = runs * flops * tokens / scale.flops_per_second[c.dtype] / 3600
        total += hours
        name = f"{row.setting:10}{row.model:14}{params:15,}{row.printed or '-':>8}"
        lines += [f"{name}{tokens:16,}{tries:7}{hours:10.2f}", f"{'':10}python train.py {shlex.join(arguments)}"]
        lines += [f"{'':10}note: {row.note}"] if row.note else []
    rates = ", ".join(f"{rate:.2g} in {dtype}" for dtype, rate in scale.flops_per_second.items())
    return "\n".join([*lines, f"{total:.2f} hours of one device or thread that sustains {rates} FLOP/s"])


def markdown(o: Options, rows: list[Arm], runs: list[list[sweep.Run]]) -> str:
    head = ["setting", "model", "ranks", "rate", "parameters, M", "in blocks, M", "train loss", "val loss"]
    head += ["val perplexity", "bits per byte", "minutes", "paper: test perplexity"]
    rates = rates_of(o, rows[0])
    tried = ", ".join(f"{rate:g}" for rate in rates)
    tuned = f"tried on seed 1 at {share_of(o):g} of the length: {tried}; * marks one at the edge of them"
    device = sweep.read_run(runs[0][0].folder).start["device"]
    lines = [
        f"# LPA, {'the crossing size' if o.table == 'size' else f'table {o.table}'} at scale {o.scale}\n",
        f"{o.seeds} seeds, mean ± standard deviation; torch {torch.__version__}, {device}, {datetime.date.today()}.",
        f"Command: `python -m experiments.lpa.tables {shlex.join(sys.argv[1:])}`",
        f"Learning rates {tuned if len(rates) > 1 else 'as given, none tuned'}.",
        "Losses are in nats per token of this corpus's tokenizer, so perplexities compare with each other alone.\n",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *[cells(o, row, seeds) for row, seeds in zip(rows, runs)],
    ]
    notes = sorted({f"{row.setting} {row.model}: {row.note}." for row in rows if row.note})
    lines += ["", *notes] if notes else []
    lines += ["", crossing(runs)] if o.table == "size" else []
    return "\n".join(lines) + "\n"


def cells(o: Options, row: Arm, runs: list[sweep.Run]) -> str:
    (mean,) = sweep.summarise({row.model: runs}, sweep.SweepConfig())
    gpt, tried, rate = runs[0].config.gpt, sorted(rates_of(o, row)), runs[0].config.learning_rate
    params, inside, _ = counts(gpt)
    ranks = {name: rank for name, rank in dataclasses.asdict(gpt.lowdim).items() if rank}
    by_rank = [f"{' '.join(n for n in ranks if ranks[n] == rank)}: {rank}" for rank in dict.fromkeys(ranks.values())]
    edge = "*" if len(tried) > 1 and rate in (tried[0], tried[-1]) else ""
    perplexities = [math.exp(min(sweep.result(run)["val_loss"], 700)) for run in runs]
    mean |= dict(perplexity=statistics.fmean(perplexities), perplexity_std=sweep.std(perplexities))
    mean |= dict(minutes=mean["seconds"] / 60, minutes_std=mean["seconds_std"] / 60)
    shown = [row.setting, row.model, "; ".join(by_rank) or "-", f"{rate:g}{edge}"]
    shown += [f"{params / 1e6:.4g}", f"{inside / 1e6:.4g}"]
    for key, digits in dict(train_loss=4, val_loss=4, perplexity=2, bits_per_byte=4, minutes=1).items():
        shown.append(sweep.mean_and_std(mean, key, digits))
    return f"| {' | '.join([*shown, row.paper])} |"


def crossing(runs: list[list[sweep.Run]]) -> str:
    """Say where LPA's loss falls below its dense twin's, on a line through neighbours in log parameters."""
    points = []
    for dense, low in zip(runs[::2], runs[1::2]):
        gaps = [sweep.result(b)["val_loss"] - sweep.result(a)["val_loss"] for a, b in zip(dense, low)]
        points.append((counts(dense[0].config.gpt)[0], statistics.fmean(gaps)))
    found = ", ".join(f"{n / 1e6:.3g}M {gap:+.4f}" for n, gap in points)
    for (n, gap), (m, following) in itertools.pairwise(points):
        if gap > 0 >= following:
            size = n * (m / n) ** (gap / (gap - following))
            return f"LPA's val loss minus dense: {found}. LPA overtakes at about {size / 1e6:.3g}M parameters of dense."
    return f"LPA's val loss minus dense: {found}. It does not turn from behind to ahead."


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: stop the jobs, and report it
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
