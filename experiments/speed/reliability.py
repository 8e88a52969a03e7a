"""What the guards of a run cost: the judgement of each step, the question whether to stop, and a save.

    python -m experiments.reliability                          writes results/reliability_cost.md
    python -m experiments.reliability --gigabytes=4 --folder=/fast/disk

A save in the background keeps a step waiting while the tensors are copied to the host's memory; the same save without
a background keeps it waiting until all is on the disk, checked and renamed. Both are timed for one process, and for
RANKS that save their shards together; of these the slowest counts. tests/faults has what survives.
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
import torch.distributed as dist
from lpa.guard import Guard
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor, Shard

from config import parse, user_errors
from data.tokenizers import ByteTokenizer
from lpa import checkpoint, distributed, hardware
from lpa.distributed import Watch, World

RANKS = 2  # of the sharded save


@dataclass(frozen=True)
class Options:
    gigabytes: float = 1.2
    """Of a checkpoint: weights and two moments, of all ranks together."""
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
    with tempfile.TemporaryDirectory(dir=o.folder) as folder:
        times = seconds_of_saves(o, World(0, 1, device), Path(folder))
    with tempfile.TemporaryDirectory(dir=o.folder) as folder:
        sharded_times = seconds_of_sharded_saves(o, Path(folder))
    lines = [
        "# What the guards cost\n",
        f"torch {torch.__version__}, {hardware.describe(device)}, {datetime.date.today()}.",
        f"Command: `python -m experiments.reliability {' '.join(sys.argv[1:])}`\n".replace(" `\n", "`\n"),
        "| guard | cost |",
        "|---|---|",
        *[f"| {name} | {1e3 * seconds:.4f} ms a step |" for name, seconds in guards(o, device).items()],
        *save_lines(f"a save of {o.gigabytes:g} GB", *times),
        *save_lines(f"a save of {o.gigabytes:g} GB, sharded over {RANKS} ranks", *sharded_times),
    ]
    checkpoint.write_whole(o.out, "\n".join(lines) + "\n")
    print("\n".join(lines))


def save_lines(name: str, waits: list[float], saves: list[float]) -> list[str]:
    wait, save = statistics.median(waits), statistics.median(saves)
    return [
        f"| {name}, in the background: a step waits | {wait:.2f} s ({spread(waits)}) |",
        f"| the same save without a background | {save:.2f} s ({spread(saves)}) |",
        f"| the share of it that a step waits | {wait / save:.1%} |",
    ]


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


def seconds_of_sharded_saves(o: Options, run: Path) -> tuple[list[float], list[float]]:
    """As seconds_of_saves, of RANKS processes that torchrun's own launcher starts; of each save the slowest rank's."""
    place = dict(min_nodes=1, max_nodes=1, nproc_per_node=RANKS, max_restarts=0)
    config = LaunchConfig(run_id="reliability", rdzv_backend="c10d", rdzv_endpoint="localhost:0", **place)
    waits, saves = zip(*elastic_launch(config, seconds_on_a_rank)(o, run).values())
    return [max(ranks) for ranks in zip(*waits)], [max(ranks) for ranks in zip(*saves)]


def seconds_on_a_rank(o: Options, run: Path) -> tuple[list[float], list[float]]:
    torch.set_num_threads(1)  # as torchrun does where several ranks share a machine
    world = distributed.join_world("cuda" if torch.cuda.device_count() >= RANKS else "cpu")
    hardware.prepare(world.device)
    times = seconds_of_saves(o, world, run)
    world.leave()
    return times


def seconds_of_saves(o: Options, world: World, run: Path) -> tuple[list[float], list[float]]:
    """How long a step waits for a save in the background, and how long the save takes without one, on this rank."""
    weights = {str(i): matrix for i, matrix in enumerate(matrices(round(o.gigabytes * 1e9 / 3 / 4 / 2**20), world))}
    parts = dict(model=weights, optimizer={f"{i}.{m}": t * 0.1 for i, t in weights.items() for m in ("m", "v")})
    waits, saves, step = [], [], 0
    saver = checkpoint.Saver(run, ByteTokenizer(), world, shard=world.size > 1)
    for _ in range(o.saves):
        for times in (waits, saves):
            step += 1
            hardware.synchronize(world.device)
            if world.size > 1:
                dist.barrier()  # or one rank would count its wait for another that is still saving
            start = time.perf_counter()
            saver.save(parts, dict(step=step))
            if times is saves:
                saver.wait()
            times.append(time.perf_counter() - start)
            saver.wait()
    saver.close()
    return waits, saves


def matrices(count: int, world: World) -> list[Tensor]:
    """So many of 4 MiB, (1024, 1024) in float32, of which each rank has a share of the rows."""
    parts = [torch.randn(1024 // world.size, 1024, device=world.device) for _ in range(count)]
    if world.size == 1:
        return parts
    mesh = init_device_mesh(world.device.type, (world.size,))
    return [DTensor.from_local(part, mesh, [Shard(0)]) for part in parts]


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
