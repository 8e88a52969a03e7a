"""The tables of the LPA paper (arXiv 2411.02063), trained here at a size that fits the machine.

    python -m data.own_text.prepare --path=ENWIKI_EXTRACT --name=enwiki_1k --tokenizer=bpe:1024
    python -m experiments.lpa_tables --table=6 --jobs=2                             2 cores
    python -m experiments.lpa_tables --table=3 --scale=gpu --seeds=2                one H200
    python -m experiments.lpa_tables --table=3 --scale=paper --nproc_per_node=8     as the paper had it
    python -m experiments.lpa_tables --table=8 --scale=paper --dry_run              what it would run, and how long
    python -m experiments.lpa_tables --table=size                                   from which size on is LPA better?
    python -m experiments.plot $(python -m experiments.lpa_tables --table=6 --folders) --out=results/lpa_curves

Trains what is missing below out/lpa_tables/ and writes results/lpa_table_N_SCALE.md. Each model first gets its learning
rate, by one run of seed 1 and a tenth of the length for each rate of a grid; then the seeds run at the best of them.
A run's folder bears the hash of all its options and of its data, by which a finished one is recognised. It may be
stopped at any time, and the same command goes on. experiments/lpa_models.py says what each table compares.
The corpus of the gpu scale is one folder with ../shared/data's gutenberg and enwiki_extract copied into it:
    python -m data.own_text.prepare --path=FOLDER_WITH_BOTH --name=books_wiki --tokenizer=gpt2
"""

import dataclasses
import datetime
import itertools
import json
import math
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import data
from config import UserError, parse, user_errors
from experiments.lpa_models import PAPER_STEPS, SCALES, STEPS
from experiments.lpa_runs import (
    Options,
    Row,
    Run,
    best_rate,
    count,
    finished,
    make_run,
    rates_of,
    read_result,
    share_of,
    table_rows,
    tokens_of,
    train_all,
    tuning_runs,
)
from lpa import checkpoint, hardware


def main(o: Options) -> None:
    if o.table == "2":
        show_steps(o)
        return
    rows = list(table_rows(o))
    if o.dry_run:
        print(plan(o, rows))
        return
    if o.folders:
        print("\n".join(str(run.folder) for run in chosen_runs(o, rows) if finished(run)))
        return
    deadline = time.monotonic() + 60 * o.minutes if o.minutes else math.inf
    train_all(o, [run for row in rows for run in tuning_runs(o, row)], deadline)
    chosen = [best_rate(o, row) for row in rows]
    runs = [[make_run(o, row, rate, seed) for seed in range(1, o.seeds + 1)] for row, rate in zip(rows, chosen)]
    train_all(o, [run for seeds in zip(*runs) for run in seeds], deadline)  # a first seed of all before the second
    write(o, markdown(o, rows, runs), runs)


def plan(o: Options, rows: list[Row]) -> str:
    """The runs of a table, with what they would cost."""
    scale, total = SCALES[o.scale], 0.0
    head = f"{'setting':10}{'model':14}{'parameters':>15}{'in blocks':>15}{'paper':>8}{'tokens':>16}{'FLOPs':>10}"
    lines = [head + f"{'rates':>7}{'seeds':>7}{'hours':>10}"]
    for row in rows:
        c, tries = row.config, len(rates_of(o, row))
        params, inside, flops = count(c.gpt)
        work = flops * tokens_of(c)
        share = o.seeds + (tries * share_of(o) if tries > 1 else 0)
        hours = share * work / scale.flops_per_second[c.dtype] / 3600
        total += hours
        text = f"{row.arm.setting:10}{row.arm.model:14}{params:15,}{inside:15,}{row.arm.printed or '-':>8}"
        lines.append(text + f"{tokens_of(c):16,}{work:10.2g}{tries:7}{o.seeds:7}{hours:10.2f}")
        lines += [f"{'':10}python train.py {' '.join(row.arguments)}"]
        lines += [f"{'':10}note: {row.arm.note}"] if row.arm.note else []
    rates = ", ".join(f"{rate:.2g} in {dtype}" for dtype, rate in scale.flops_per_second.items())
    lines.append(f"{total:.2f} hours of one device or thread, taken to sustain {rates} FLOP/s; {o.jobs} at a time")
    return "\n".join([*lines, state_of_runs(o, rows)])


def state_of_runs(o: Options, rows: list[Row]) -> str:
    """How many are finished. Without a corpus there is no hash, and so no run to recognise."""
    try:
        tuning = [run for row in rows for run in tuning_runs(o, row)]
        runs = {run.folder: run for run in [*tuning, *chosen_runs(o, rows)]}
    except UserError as error:
        return f"note: {error}"
    done = sum(finished(run) for run in runs.values())
    begun = sum((run.folder / "ckpt").exists() for run in runs.values() if not finished(run))
    return f"{done} runs are finished, {begun} are begun"


def chosen_runs(o: Options, rows: list[Row]) -> list[Run]:
    """The runs of all seeds for the rows whose rate is chosen already."""
    known = [row for row in rows if all(read_result(run) for run in tuning_runs(o, row))]
    return [make_run(o, row, best_rate(o, row), seed) for row in known for seed in range(1, o.seeds + 1)]


def markdown(o: Options, rows: list[Row], runs: list[list[Run]]) -> str:
    device = json.loads((runs[0][0].folder / "log.jsonl").read_text().splitlines()[0])["device"]
    title = "the crossing size" if o.table == "size" else f"table {o.table}"
    head = ["setting", "model", "ranks", "init", "dropout", "rate", "parameters, M", "in blocks, M", "train loss"]
    head += ["val loss", "val perplexity", "bits per byte", "minutes", "paper: test perplexity"]
    lines = [
        f"# LPA, {title} at scale {o.scale}\n",
        f"{o.seeds} seeds, mean ± standard deviation; torch {torch.__version__}, {device}, {datetime.date.today()}.",
        f"Command: `python -m experiments.lpa_tables {' '.join(sys.argv[1:])}`",
        *lengths(rows),
        rates_text(o, rows),
        "The train loss is the mean of logged steps over the last twentieth of a run. Losses are in nats per token of",
        "this corpus's tokenizer, so that perplexities compare with each other, not with the paper's.\n",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *[cells(o, row, seeds) for row, seeds in zip(rows, runs)],
    ]
    notes = {f"{row.arm.setting} {row.arm.model}: {row.arm.note}." for row in rows if row.arm.note}
    lines += ["", *sorted(notes)] if notes else []
    lines += ["", crossing(rows, runs)] if o.table == "size" else []
    return "\n".join(lines) + "\n"


def lengths(rows: list[Row]) -> Iterator[str]:
    """A sentence per length of training, with the epochs and the tokens for each parameter."""
    for setting in dict.fromkeys(row.arm.setting for row in rows):
        c = next(row.config for row in rows if row.arm.setting == setting)
        epochs = tokens_of(c) / data.open_corpus(c.dataset, "train").tokens
        each = tokens_of(c) / count(c.gpt)[1]
        limited = "; data-limited" if each < 19.9 else ""
        yield (
            f"{setting}: {tokens_of(c) / 1e6:.4g}M tokens of {Path(c.dataset).name} in {c.max_steps} steps,"
            f" {epochs:.2g} epochs, {each:.3g} for each parameter in the blocks of its first row{limited}."
        )


def rates_text(o: Options, rows: list[Row]) -> str:
    rates = rates_of(o, rows[0])
    if len(rates) == 1:
        return "Learning rates as given, none tuned."
    tried = ", ".join(f"{rate:g}" for rate in rates)
    return f"Rates tried on seed 1 at {share_of(o):g} of the length: {tried}; * marks one at the edge of them."


def cells(o: Options, row: Row, runs: list[Run]) -> str:
    results = [read_result(run) for run in runs]
    params, inside, _ = count(row.config.gpt)
    tried, rate = sorted(rates_of(o, row)), runs[0].config.learning_rate
    edge = "*" if len(tried) > 1 and rate in (tried[0], tried[-1]) else ""
    ranks = {name: rank for name, rank in dataclasses.asdict(row.config.gpt.lowdim).items() if rank}
    by_rank = [f"{' '.join(n for n in ranks if ranks[n] == rank)}: {rank}" for rank in dict.fromkeys(ranks.values())]
    init = row.config.gpt.factor_init if ranks else "-"
    shown = [row.arm.setting, row.arm.model, "; ".join(by_rank) or "-", init, f"{row.config.gpt.dropout:g}"]
    shown += [f"{rate:g}{edge}", f"{params / 1e6:.4g}", f"{inside / 1e6:.4g}"]
    shown += [spread([r[name] for r in results], 4) for name in ("train_loss", "val_loss")]
    shown += [spread([math.exp(min(r["val_loss"], 700)) for r in results], 2)]
    shown += [spread([r["bits_per_byte"] for r in results], 4), spread([r["seconds"] / 60 for r in results], 1)]
    return f"| {' | '.join([*shown, row.arm.paper])} |"


def spread(values: list[float], digits: int) -> str:
    """'3.1416 ± 0.0012'; one value has no deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 and math.isfinite(sum(values)) else mean


def crossing(rows: list[Row], runs: list[list[Run]]) -> str:
    """Where LPA's loss falls below that of its dense twin, on a line through neighbours in log parameters."""
    points = []
    for row, dense, low in zip(rows[::2], runs[::2], runs[1::2]):
        gaps = [read_result(b)["val_loss"] - read_result(a)["val_loss"] for a, b in zip(dense, low)]
        points.append((count(row.config.gpt)[0], statistics.mean(gaps), spread(gaps, 4)))
    found = [f"LPA's val loss less its dense twin's: {', '.join(f'{n / 1e6:.3g}M {s}' for n, _, s in points)}."]
    for (n, gap, _), (m, following, _) in itertools.pairwise(points):
        if gap > 0 >= following:
            size = n * (m / n) ** (gap / (gap - following))
            found.append(f"LPA overtakes at about {size / 1e6:.3g}M parameters of the dense model.")
    return " ".join(found if len(found) > 1 else [*found, "Nowhere does it turn from behind to ahead."])


def write(o: Options, text: str, runs: list[list[Run]] | None = None) -> None:
    """The table into a file of its own and, where results/lpa.md has a place for it, there; small logs beside it."""
    path = o.results / f"lpa_table_{o.table}_{o.scale}.md"
    o.results.mkdir(parents=True, exist_ok=True)
    checkpoint.write_whole(path, text)
    verdict, mark = o.results / "lpa.md", f"<!-- table {o.table} {o.scale} -->\n"
    if verdict.exists() and verdict.read_text().count(mark) == 2:
        before, _, after = verdict.read_text().split(mark)
        table = "\n".join(line for line in text.splitlines()[1:]).strip()
        checkpoint.write_whole(verdict, f"{before}{mark}{table}\n{mark}{after}")
    for run in itertools.chain.from_iterable(runs or []):
        small = o.results / "lpa_logs" / f"{run.folder.name}_seed_{run.config.seed}.jsonl"
        small.parent.mkdir(exist_ok=True)
        lines = (run.folder / "log.jsonl").read_text().splitlines(keepends=True)
        checkpoint.write_whole(small, "".join(thinned(lines)))
    print(f"\n{text}\nwritten to {path}")


def thinned(lines: list[str], most: int = 60) -> list[str]:
    """Of a log all but the steps, and of these so many, evenly: what a plot needs."""
    steps = [i for i, line in enumerate(lines) if '"loss"' in line]
    kept = {steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)} if len(steps) > most else set(steps)
    return [line for i, line in enumerate(lines) if i in kept or i not in set(steps)]


# Table 2


def show_steps(o: Options) -> None:
    """Time and memory of an evaluation and a training step, by bench.py in a process of its own for each."""
    commands = [(s, m, [*flags, f"--mode={m}"]) for s, flags in STEPS[o.scale].items() for m in ("eval", "train")]
    if o.dry_run:
        print("\n".join(f"python bench.py {' '.join(arguments)} --json" for _, _, arguments in commands))
        return
    head = ["setting", "step", "dense, ms", "LPA, ms", "LPA over dense", "counted FLOPs"]
    head += ["dense, MiB", "LPA, MiB", "paper, dense to LPA"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for setting, mode, arguments in commands:
        bench_run = subprocess.run([sys.executable, "bench.py", *arguments, "--json"], capture_output=True, text=True)
        if bench_run.returncode != 0:
            last = (bench_run.stderr.splitlines() or ["no output"])[-1]
            raise UserError(f"python bench.py {' '.join(arguments)} ended with code {bench_run.returncode}: {last}")
        lines.append(step_cells(setting, mode, json.loads(bench_run.stdout)))
    device = hardware.describe(hardware.choose_device())
    header = [f"# LPA, table 2 at scale {o.scale}\n", f"torch {torch.__version__}, {device}, {datetime.date.today()}."]
    header += [f"Command: `python -m experiments.lpa_tables {' '.join(sys.argv[1:])}`"]
    header += ["Medians of alternated steps; memory is the device allocator's peak, a CPU has none.\n"]
    write(o, "\n".join([*header, *lines]) + "\n")


def step_cells(setting: str, mode: str, results: dict[str, Any]) -> str:
    low, dense = results["model"], results["dense"]
    memory = [r["peak_memory_bytes"] for r in (dense, low)]
    ratios = low["ratio_to_dense"]
    shown = [setting, mode, f"{dense['ms_median']:.2f}", f"{low['ms_median']:.2f}"]
    shown += [
        f"{ratios['ms']:.3f}",
        f"{ratios['flops']:.3f}",
        *["-" if m is None else f"{m / 2**20:,.0f}" for m in memory],
    ]
    return f"| {' | '.join([*shown, PAPER_STEPS.get(setting, '-') if mode == 'eval' else '-'])} |"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: stop the jobs, and say so
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
