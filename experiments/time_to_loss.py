"""How long does a preset train until its validation loss reaches a target?

    P="config/speedrun_shakespeare.py config/speedrun_shakespeare_lpa.py config/nanogpt_shakespeare.py"
    python -m experiments.time_to_loss --target=1.90 --presets $P

Each seed is a run of train.py below out/time_to_loss/ that evaluates the whole val split in disjoint windows; the time
is that of the first evaluation at or under the target: training seconds, compilation included, evaluation excluded. The
seeds of the presets take turns, so that a machine that slows down slows all. Runs that are there are not repeated.
The table goes to results/time_to_loss_DATASET.md; its last column compares with the last preset.
"""

import dataclasses
import datetime
import hashlib
import json
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import data
from config import TrainConfig, UserError, load_config, parse, user_errors
from lpa import hardware


@dataclass(frozen=True)
class Options:
    target: float
    """Validation loss in nats a token."""
    presets: tuple[str, ...]
    """What is timed; the last one is what the others are compared with."""
    dataset: str | None = None
    """A corpus in place of the presets' own."""
    seeds: int = 3

    def __post_init__(self) -> None:
        if not self.presets or self.seeds < 1:
            raise ValueError(f"presets are {self.presets} and seeds {self.seeds}, wanted at least one of each")


@dataclass(frozen=True)
class Finish:
    """Where a run reached the target: training seconds and steps, None if it never did; its best loss until then."""

    seconds: float | None
    steps: int | None
    best: float
    trained: float
    """Seconds it has trained until then, or in all."""


def main(o: Options) -> None:
    finishes: dict[str, list[Finish]] = {preset: [] for preset in o.presets}
    for seed in range(1, o.seeds + 1):
        for preset in o.presets:
            finishes[preset].append(reached(train_once(o, preset, seed), o.target))
    write(o, finishes)


def load(o: Options, preset: str, seed: int) -> TrainConfig:
    return load_config([preset, *([f"--dataset={o.dataset}"] if o.dataset else []), f"--seed={seed}"])


def train_once(o: Options, preset: str, seed: int) -> Path:
    """The folder of the finished run of these very options on these very tokens, trained now unless it is there.

    A process of its own pays for what a user pays for, compilation among it. A time cannot be resumed: what was
    stopped begins anew.
    """
    c = load(o, preset, seed)
    corpus = [data.open_corpus(c.dataset, split).fingerprint for split in ("train", "val")]
    key = json.dumps([dataclasses.asdict(c), corpus], sort_keys=True)
    out = Path("out/time_to_loss") / f"{Path(preset).stem}_{hashlib.sha256(key.encode()).hexdigest()[:10]}"
    if not finished(out, c):
        flags = [f"--dataset={c.dataset}", f"--seed={seed}", f"--out_dir={out}"]
        script = str(Path(__file__).parent.parent / "train.py")
        if subprocess.run([sys.executable, script, preset, *flags]).returncode or not finished(out, c):
            raise UserError(f"{preset} with seed {seed} did not finish; see {out}")
    return out


def finished(out: Path, c: TrainConfig) -> bool:
    last = out / "ckpt" / "last"
    return last.exists() and last.read_text().strip() == f"step_{min(c.max_steps, c.stop_step or c.max_steps)}"


def reached(run: Path, target: float) -> Finish:
    """Reads log.jsonl, where the seconds of a step come before the evaluation after it."""
    seconds, best = 0.0, float("inf")
    for line in (run / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        seconds = record.get("seconds", seconds)
        if record.get("val_loss") is not None:
            best = min(best, record["val_loss"])
            if best <= target:
                return Finish(seconds, record["step"], best, seconds)
    return Finish(None, None, best, seconds)


def median(finishes: list[Finish]) -> float | None:
    """The median of the seconds; a run that never reached the target took longer than any that did."""
    seconds = statistics.median_low([float("inf") if f.seconds is None else f.seconds for f in finishes])
    return None if seconds == float("inf") else seconds


def write(o: Options, finishes: dict[str, list[Finish]]) -> None:
    dataset = load(o, o.presets[0], 1).dataset
    reference = finishes[o.presets[-1]]
    at_least = statistics.median_low([f.trained for f in reference])  # what the last preset takes, or more
    lines = [
        f"# Training seconds to a val loss of {o.target:g}: {Path(dataset).name}\n",
        f"The median of {o.seeds} seeds, on the whole val split in disjoint windows; evaluation excluded.",
        f"torch {torch.__version__}, {hardware.describe(hardware.choose_device())}, {datetime.date.today()}.",
        f"Command: `python -m experiments.time_to_loss {shlex.join(sys.argv[1:])}`\n",
        "| preset | seconds, median | of each seed | steps | best loss of each seed | of the last preset's time |",
        "|---|---|---|---|---|---|",
    ]
    for preset, runs in finishes.items():
        middle = median(runs)
        ratio = "–" if middle is None else f"{'' if median(reference) else 'under '}{middle / at_least:.3f}"
        each = ", ".join(f"not in {r.trained:.1f}" if r.seconds is None else f"{r.seconds:.1f}" for r in runs)
        steps = ", ".join("–" if r.steps is None else str(r.steps) for r in runs)
        best = ", ".join(f"{r.best:.4f}" for r in runs)
        shown = "not reached" if middle is None else f"{middle:.1f}"
        lines.append(f"| {preset} | {shown} | {each} | {steps} | {best} | {ratio} |")
    text = "\n".join(lines) + "\n"
    Path("results").mkdir(exist_ok=True)
    Path(f"results/time_to_loss_{Path(dataset).name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
