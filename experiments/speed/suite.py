"""Run the standard list of benchmarks for a CPU or a GPU, and keep the figures.

    python -m experiments.speed.suite --out=results/epyc        writes results/epyc.json and results/epyc.md

Each row is a bench.py command that anyone can run by hand, in a process of its own. The files are written after each
row, so the same command continues where it was stopped: a row is skipped if it was measured on the same kind of device
with the same Python, torch and transformers. To measure again after a change of the code, delete the .json file.
"""

import datetime
import json
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench import BenchConfig
from config import UserError, load_config, parse, user_errors
from experiments.sweep import write_page
from lpa import counts, hardware

SIZES = ("cpu", "130m_s1", "370m_s1", "130m", "370m", "3b")  # of the presets
RANKS = "--lowdim.q=256 --lowdim.k=256 --lowdim.v=256 --lowdim.o=256"
STEP = f"--n_layer=4 --n_embd=1024 --n_head=16 --block_size=512 --vocab_size=8192 --batch_size=2 {RANKS}"
LPA_130M, LPA_370M, LPA_3B = (f"config/lpa_{size}.py --vocab_size=32000" for size in ("130m", "370m", "3b"))
LPA_370M += " --block_size=1024"
T1024 = f"{LPA_370M} --recompute=none"  # as in transformers


def cpu_rows() -> list[str]:
    """Return arguments of bench.py, the targets first."""
    rows = [
        f"{STEP} --mode=train --against=dense,hf --pairs=15",
        f"{STEP} --mode=train --against=dense,hf --pairs=15 --compile=block",
        f"{STEP} --mode=train --against=plain --pairs=15 --recompute=latents",
    ]
    decoding = f"{LPA_130M} --block_size=2048 --dtype=float32 --mode=decode --context=1024 --decode_tokens=256"
    for batch_size, pairs in ((1, 3), (8, 1)):
        for pos in ("rope", "none"):
            rows.append(f"{decoding} --pos={pos} --batch_size={batch_size} --against=dense,hf --pairs={pairs}")
    rows.append(f"{STEP} --mode=eval --against=dense,hf --pairs=15")
    rows.append("config/setting2_cpu.py --vocab_size=256 --mode=train --against=dense,hf --pairs=45")
    rows.append("config/lpa_cpu.py --vocab_size=256 --mode=train --pairs=45")
    rows += [f"{LPA_370M} --mode=count --recompute={recompute}" for recompute in ("none", "elementwise", "latents")]
    for size in SIZES:  # a dense preset is the dense variant of the row of its twin
        rows.append(f"config/lpa_{size}.py --vocab_size={256 if size == 'cpu' else 32000} --mode=count")
    return rows


def gpu_rows() -> list[str]:
    """Return arguments of bench.py for one GPU of 139 GiB, the targets first; presets of the paper are bfloat16.

    At 16,384 tokens the dense 3B twin's cache takes 4.4 GB per sequence, the latent one 0.5 GB: 24 sequences of both
    stand beside both models' weights. transformers has no class of the 3B shape.
    """
    long = f"{LPA_3B} --pos=none --block_size=16640 --mode=decode --context=16384 --decode_tokens=64 --pairs=3"
    return [
        f"{T1024} --mode=train --against=dense,hf --pairs=15 --compile=block",
        f"{LPA_3B} --mode=train --pairs=7 --compile=block",
        f"{long} --batch_size=24",
        f"{T1024} --mode=train --against=dense,hf --pairs=15 --compile=off",
        f"{LPA_3B} --mode=eval --pairs=15 --compile=block",
        f"{T1024} --mode=eval --against=dense,hf --pairs=15 --compile=block",
        f"{LPA_370M} --mode=train --against=plain --pairs=15 --compile=block --recompute=latents",
        f"{T1024} --mode=train --against=dense,hf --pairs=15 --compile=model",
        f"{LPA_3B} --mode=train --pairs=7 --compile=model",
        f"{LPA_130M} --mode=train --against=dense,hf --pairs=15 --compile=block",
        f"{T1024} --mode=decode --against=dense,hf --pairs=5 --batch_size=8",
        f"{T1024} --mode=prefill --against=dense,hf --pairs=15",
        f"{LPA_130M} --mode=eval --against=dense,hf --pairs=15 --compile=block",
        f"{LPA_130M} --mode=decode --against=dense,hf --pairs=5 --batch_size=8",
        f"{LPA_130M} --mode=prefill --against=dense,hf --pairs=15",
        f"{LPA_3B} --mode=prefill --pairs=15",
        f"{LPA_3B} --mode=decode --pairs=5",
        f"{LPA_130M} --mode=train --against=dense,hf --pairs=15 --compile=model",
        f"{long} --batch_size=16",
    ]


@dataclass(frozen=True)
class Options:
    out: Path = Path("results/suite")
    device: str = "auto"


def main(o: Options) -> None:
    device = hardware.choose_device(o.device)
    measure(gpu_rows() if device.type == "cuda" else cpu_rows(), o.out, device)


def measure(rows: list[str], out: Path, device: torch.device) -> None:
    """Run each row that the files do not hold yet. Raise UserError at the end if some failed; the others are kept."""
    machine = dict(device=hardware.describe(device), python=platform.python_version())
    machine |= {name: version(name) for name in ("torch", "transformers")}
    path = out.with_suffix(".json")
    kept, failed = read(path), []
    for number, row in enumerate(rows, 1):
        if any(old["row"] == row and old["machine"] == machine for old in kept):
            continue
        print(f"{number} of {len(rows)}: python bench.py {row}", flush=True)
        start = time.perf_counter()
        call = [sys.executable, "bench.py", *shlex.split(row), f"--device={device.type}", "--json"]
        done = subprocess.run(call, capture_output=True, text=True)
        if done.returncode:
            failed.append(f"{row}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
            print(failed[-1], flush=True)
            continue
        new = dict(row=row, date=str(datetime.date.today()), seconds=round(time.perf_counter() - start))
        new |= dict(machine=machine, results=json.loads(done.stdout))
        kept = [old for old in kept if old["row"] != row] + [new]
        write_page(path, json.dumps(kept, indent=1) + "\n")
        write_page(path.with_suffix(".md"), markdown(kept))
    if failed:
        raise UserError(f"{len(failed)} of {len(rows)} rows failed. " + "; ".join(failed))
    print(f"{path} and {path.with_suffix('.md')} hold all {len(rows)} rows")


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of an earlier call. Raise UserError where they cannot be read."""
    try:
        return json.loads(path.read_text()) if path.exists() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a suite's JSON: {error}; move it away") from None


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return a section per row: its command, what bench.py prints for it, where and when it was measured."""
    lines = ["# What `python -m experiments.speed.suite` measured"]
    for row in rows:
        where = ", ".join(f"{name} {value}" for name, value in row["machine"].items())
        table = counts.comparison(row["results"], load_config(shlex.split(row["row"]), BenchConfig).train)
        lines += ["", "```", f"python bench.py {row['row']}", "", table, "```", ""]
        lines.append(f"{where}, {row['date']}, {row['seconds']} s")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
