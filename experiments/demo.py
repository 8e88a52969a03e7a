"""Train a small LPA model for a few minutes, let it write, and compare it with its dense twin: make demo.

    python -m experiments.demo --minutes=3

Times a training step here, fixes the number of steps that fit, and runs commands that it prints: you can run each by
hand. Where the time is enough for 3,600 steps of both, the dense twin is trained, too. The number of steps is kept: the
same command continues a demo that was stopped.
"""

import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import bench
import data
import train
from config import load_config, parse, user_errors
from lpa import hardware
from model import GPT

ENOUGH = 3600  # steps in which lpa_cpu learns to write code that looks right


@dataclass(frozen=True)
class Options:
    minutes: float = 3.0
    """Of training."""
    out: Path = Path("out/demo")


def main(o: Options) -> None:
    for preset, steps in planned_steps(o).items():
        how = f"--max_steps={steps} --log_interval=10 --out_dir={o.out / preset} --resume=auto"
        run(f"train.py config/{preset}.py {how}")
    run(f"sample.py {o.out}/lpa_cpu --prompt='def ' --max_new_tokens=600")
    run("bench.py config/lpa_cpu.py --mode=train --pairs=7")
    runs = " ".join(str(o.out / preset) for preset in planned_steps(o))
    run(f"-m experiments.plot {runs} --out={o.out}/curves")


def planned_steps(o: Options) -> dict[str, int]:
    """Return the steps of each preset to train: those of an earlier call, or as many as fit."""
    path = o.out / "steps.json"
    if path.exists():
        return json.loads(path.read_text())
    train.prepare_missing("pystdlib")
    device = hardware.choose_device()
    hardware.keep_freed_memory(device)  # as train.py does
    works = {preset: training_step(preset, device) for preset in ("lpa_cpu", "dense_cpu")}
    bench.alternate(works, 3, device)  # warm up
    ms = {preset: statistics.median(times) for preset, times in bench.alternate(works, 20, device).items()}
    both = 60_000 * o.minutes / sum(ms.values())
    steps = dict.fromkeys(ms, int(both)) if both >= ENOUGH else {"lpa_cpu": int(60_000 * o.minutes / ms["lpa_cpu"])}
    print(f"a step takes {ms['lpa_cpu']:.0f} ms, dense {ms['dense_cpu']:.0f} ms: {steps} steps in {o.minutes:g} min")
    o.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(steps))
    return steps


def training_step(preset: str, device: torch.device) -> Callable[[], None]:
    """Return a step of a preset on random tokens."""
    c = load_config([f"config/{preset}.py"])
    c = train.with_vocabulary(c, data.open_corpus(c.dataset, "train"))
    c = replace(c, dtype=hardware.choose_dtype(c.dtype, device))
    with device:
        model = GPT(c.gpt, c.seed)
        x = torch.randint(len(model.lm_head.weight), (c.batch_size, c.gpt.block_size))  # (B, T)
    return bench.training(model, x, x, c, device)


def run(command: str) -> None:
    """Print a command and run it. Where it fails, it has said why: exit with its code."""
    print(f"\n$ python {command}", flush=True)
    if code := subprocess.run([sys.executable, *shlex.split(command)]).returncode:
        sys.exit(code)


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
