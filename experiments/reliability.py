"""What the guards of a run cost: the judgement of each step, the question whether to stop, and a save.

    python -m experiments.reliability                          writes results/reliability_cost.md
    python -m experiments.reliability --gigabytes=4 --folder=/fast/disk

A save in the background keeps a step waiting while the tensors are copied to the host's memory; the same save without
a background keeps it waiting until all is on the disk, checked and renamed. tests/faults has what survives.
"""

import datetime
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
import hardware
from config import parse, user_errors
from data.tokenizers import ByteTokenizer
from parallel import Watch, World
from train import Guard


@dataclass(frozen=True)
class Options:
    gigabytes: float = 1.2
    """Of a checkpoint: weights and two moments."""
    saves: int = 5
    """Of each kind, in turns; the median counts."""
    steps: int = 2000
    """Of the isolated loop."""
    folder: Path | None = None
    """Where to save, and remove again; None = the system's folder for temporary files."""
    out: Path = Path("results/reliability_cost.md")

    def __post_init__(self) -> None:
        for name in ("gigabytes", "saves", "steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted above 0")


def main(o: Options) -> None:
    device = hardware.choose_device()
    hardware.prepare(device)  # as train.py does: a copy into memory that was used before is several times faster
    waits, saves = seconds_of_saves(o, device)
    wait, save = statistics.median(waits), statistics.median(saves)
    lines = [
        "# What the guards cost\n",
        f"torch {torch.__version__}, {hardware.describe(device)}, {datetime.date.today()}.",
        f"Command: `python -m experiments.reliability {' '.join(sys.argv[1:])}`\n".replace(" `\n", "`\n"),
        "| guard | cost |",
        "|---|---|",
        *[f"| {name} | {1e3 * seconds:.4f} ms a step |" for name, seconds in guards(o, device).items()],
        f"| a save of {o.gigabytes:g} GB in the background: a step waits | {wait:.2f} s ({spread(waits)}) |",
        f"| the same save without a background | {save:.2f} s ({spread(saves)}) |",
        f"| the share of it that a step waits | {wait / save:.1%} |",
    ]
    checkpoint.write_whole(o.out, "\n".join(lines) + "\n")
    print("\n".join(lines))


def spread(seconds: list[float]) -> str:
    return f"{min(seconds):.2f} to {max(seconds):.2f}"


def guards(o: Options, device: torch.device) -> dict[str, float]:
    """Seconds a step of each, in a loop that does nothing else."""
    loss, norm = torch.tensor(3.0, device=device), torch.tensor(1.0, device=device)
    plain, spikes = Guard(device), Guard(device, spikes=6.0)
    watch = Watch(World(0, 1, device), max_hours=1000.0)
    return {
        "finite loss and gradient": loop(lambda: plain.judge(loss, norm), o.steps, device),
        "the same, and spikes": loop(lambda: spikes.judge(loss, norm), o.steps, device),
        "signals and deadline, one process": loop(watch.stop, o.steps, device),
    }


def loop(ask: Callable[[], object], steps: int, device: torch.device) -> float:
    hardware.synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        ask()
    hardware.synchronize(device)
    return (time.perf_counter() - start) / steps


def seconds_of_saves(o: Options, device: torch.device) -> tuple[list[float], list[float]]:
    """How long a step waits for a save in the background, and how long the save takes without one."""
    count = round(o.gigabytes * 1e9 / 3 / 4 / 2**20)  # matrices of 4 MiB
    tensors = {str(i): torch.randn(1024, 1024, device=device) for i in range(count)}
    parts = dict(model=tensors, optimizer={f"{i}.{m}": t * 0.1 for i, t in tensors.items() for m in ("m", "v")})
    waits, saves = [], []
    with tempfile.TemporaryDirectory(dir=o.folder) as folder:
        run, step = Path(folder), 0
        saver = checkpoint.Saver(run, ByteTokenizer(), World(0, 1, device), shard=False)
        for _ in range(o.saves):
            for times in (waits, saves):
                step += 1
                hardware.synchronize(device)
                start = time.perf_counter()
                saver.save(parts, dict(step=step))
                if times is saves:
                    saver.wait()
                times.append(time.perf_counter() - start)
                saver.wait()
        saver.close()
    return waits, saves


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
