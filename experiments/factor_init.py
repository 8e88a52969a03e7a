"""Which law should the factors start from? The same small LPA model from each factor_init, on real text, and its twin.

    python -m experiments.factor_init --steps=800 --seeds=3

Trains what is missing below out/factor_init/, so it may be stopped and run again, and writes a table to
results/factor_init.md.
"""

import dataclasses
import datetime
import hashlib
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import train
from config import UserError, load_config, parse, user_errors
from experiments import lpa_runs
from lpa import hardware

ARMS = {
    "dense twin": dict(lowdim=dict.fromkeys("qkvo", 0)),
    "spectral": dict(factor_init="spectral"),
    "matched": dict(factor_init="matched"),
    "torch": dict(factor_init="torch"),
}


@dataclass(frozen=True)
class Options:
    preset: str = "config/setting2_cpu.py"
    dataset: str = "pystdlib"
    steps: int = 800
    seeds: int = 3
    rates: tuple[float, ...] = (8e-4,)
    """Learning rates; the table shows the best of each arm, on 200,000 validation tokens."""


def main(o: Options) -> None:
    table = {}
    for arm, changes in ARMS.items():
        for rate in o.rates:
            table[arm, rate] = [trained(o, arm, changes, rate, seed) for seed in range(1, o.seeds + 1)]
    write(o, table)


def trained(o: Options, arm: str, changes: dict, rate: float, seed: int) -> float:
    """Final validation bits per byte of one run, trained unless one of these very options is there."""
    flags = [f"--dataset={o.dataset}", f"--max_steps={o.steps}", f"--learning_rate={rate}", f"--seed={seed}"]
    flags += ["--eval_interval=0", "--eval_tokens=200000", "--resume=auto"]
    for name, value in changes.items():
        flags += [f"--lowdim.{k}={v}" for k, v in value.items()] if name == "lowdim" else [f"--{name}={value}"]
    c = load_config([o.preset, *flags])
    options = json.dumps(lpa_runs.comparable(dataclasses.asdict(c)), sort_keys=True)
    key = hashlib.sha256(options.encode()).hexdigest()[:10]
    out = Path("out/factor_init") / f"{arm.replace(' ', '_')}_{key}"
    if not finished(out, o.steps):
        train.main(dataclasses.replace(c, out_dir=str(out)))
    if not finished(out, o.steps):
        raise UserError(f"{out} was stopped; the same command goes on")
    return json.loads((out / "log.jsonl").read_text().splitlines()[-1])["val_bits_per_byte"]


def finished(out: Path, steps: int) -> bool:
    last = out / "ckpt" / "last"
    return last.exists() and last.read_text().strip() == f"step_{steps}"


def write(o: Options, table: dict[tuple[str, float], list[float]]) -> None:
    best = {}
    for (arm, rate), values in table.items():
        if arm not in best or statistics.mean(values) < statistics.mean(best[arm][1]):
            best[arm] = (rate, values)
    on = hardware.describe(hardware.choose_device())
    lines = [
        "# Where the factors start\n",
        f"{o.preset}, corpus {o.dataset}, {o.steps} steps, {o.seeds} seeds, torch {torch.__version__},",
        f"{on}, {datetime.date.today()}.",
        f"Learning rates tried: {', '.join(f'{rate:g}' for rate in o.rates)}; each arm at its best.",
        f"Command: `python -m experiments.factor_init {' '.join(sys.argv[1:])}`\n",
        "| start | rate | val bits per byte, mean | standard deviation |",
        "|---|---|---|---|",
    ]
    for arm, (rate, values) in best.items():
        spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "–"
        lines.append(f"| {arm} | {rate:g} | {statistics.mean(values):.4f} | {spread} |")
    text = "\n".join(lines) + "\n"
    Path("results").mkdir(exist_ok=True)
    Path("results/factor_init.md").write_text(text)
    print(text)


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
