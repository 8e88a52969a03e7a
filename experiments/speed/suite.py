"""The standing list of bench.py: what it measures on a CPU and on a GPU, and where the figures are kept.

    python -m experiments.speed.suite                      results/cpu2.json or results/h200.json, and a .md beside it
    python -m experiments.speed.suite --out_dir=out        elsewhere

Each row is a bench.py command that anyone can run by hand, in a process of its own. The file is written after each row,
so the same command continues where it was stopped. A row that is there is skipped if it was measured on the same kind
of device with the same Python, torch and transformers. To measure a row again after a change of the code, delete it
from the file, or the file.
"""

import datetime
import json
import platform
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from config import UserError, parse, user_errors
from lpa import checkpoint, hardware

SIZES = ("cpu", "130m_s1", "370m_s1", "130m", "370m", "3b")  # of the presets
RANKS = "--lowdim.q=256 --lowdim.k=256 --lowdim.v=256 --lowdim.o=256"
STEP = f"--n_layer=4 --n_embd=1024 --n_head=16 --block_size=512 --vocab_size=8192 --batch_size=2 {RANKS}"
LPA_130M, LPA_370M, LPA_3B = (f"config/lpa_{size}.py --vocab_size=32000" for size in ("130m", "370m", "3b"))
LPA_370M += " --block_size=1024"
T1024 = f"{LPA_370M} --recompute=none"  # as transformers has it


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
    out_dir: Path = Path("results")
    device: str = "auto"


def main(o: Options) -> None:
    device = hardware.choose_device(o.device)
    rows = gpu_rows() if device.type == "cuda" else cpu_rows()
    if o.device != "auto":
        rows = [f"{row} --device={o.device}" for row in rows]
    measure(rows, o.out_dir / f"{short_name(device)}.json", device)


def short_name(device: torch.device) -> str:
    """Return 'h200' of NVIDIA H200, 'a100' of NVIDIA A100-SXM4-80GB; 'cpu2' of a CPU that we use two threads of."""
    if device.type == "cuda":
        words = re.split(r"[ -]", torch.cuda.get_device_name(device).lower())
        return next((word for word in words if re.search(r"\d", word)), words[-1])
    return f"cpu{torch.get_num_threads()}" if device.type == "cpu" else device.type


def measure(rows: list[str], path: Path, device: torch.device) -> None:
    """Run each row that path does not hold yet. Raise UserError at the end where some failed; the others are kept."""
    machine = dict(device=hardware.describe(device), python=platform.python_version())
    machine |= {name: version(name) for name in ("torch", "transformers")}
    commands, kept, failed = [f"python bench.py {row}" for row in rows], read(path), []
    for number, command in enumerate(commands, 1):
        if any(old["command"] == command and old["machine"] == machine for old in kept):
            continue
        print(f"{number} of {len(rows)}: {command}", flush=True)
        start = time.perf_counter()
        call = [sys.executable, *shlex.split(command)[1:], "--json"]
        done = subprocess.run(call, capture_output=True, text=True)
        if done.returncode:
            failed.append(f"{command}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
            print(failed[-1], flush=True)
            continue
        new = dict(command=command, date=str(datetime.date.today()), seconds=round(time.perf_counter() - start))
        new |= dict(machine=machine, results=json.loads(done.stdout))
        kept = [old for old in kept if old["command"] != command] + [new]
        # In the order of the list; rows of an earlier list come last.
        kept.sort(key=lambda old: commands.index(old["command"]) if old["command"] in commands else len(rows))
        checkpoint.write_whole(path, json.dumps(kept, indent=1) + "\n")  # an interrupted suite keeps what it has
        checkpoint.write_whole(path.with_suffix(".md"), markdown(kept))
    if failed:
        raise UserError(f"{len(failed)} of {len(rows)} rows failed. " + "; ".join(failed))
    print(f"{path} and {path.with_suffix('.md')} hold all {len(rows)} rows")


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of an earlier call, and make the folder. Raise UserError where either is impossible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return json.loads(path.read_text()) if path.exists() else []
    except OSError as error:
        raise UserError(f"cannot use out_dir {path.parent}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not a suite's JSON: {error}; move it away") from None


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return a section per row: its command, where and when it was measured, its figures, its ratios."""
    lines = ["# What `python -m experiments.speed.suite` measured", ""]
    lines += ["mfu is of the machine's measured matmul rate. roofline is the least time that the counted FLOPs at that"]
    lines += ["rate, or the bytes that must move at the measured copy rate, would take, and the share of it reached."]
    for row in rows:
        results, machine = row["results"], row["machine"]
        where = ", ".join([machine["device"], *(f"{k} {v}" for k, v in machine.items() if k != "device")])
        lines += ["", "```", row["command"], "```", "", f"{where}, {row['date']}, {row['seconds']} s", ""]
        lines += timed_table(results) if "ms_median" in results["model"] else count_table(results)
    return "\n".join(lines) + "\n"


def timed_table(results: dict[str, Any]) -> list[str]:
    titles = ("", "ms (median, min to max)", "tokens/s", "mfu", "roofline ms (share)", "peak memory, GiB")
    lines, ratios = [table_row(*titles), "|---" * len(titles) + "|"], []
    for name, found in results.items():
        peak = found["peak_memory_bytes"]
        times = f"{found['ms_median']:,.2f} ({found['ms_min']:,.2f} to {found['ms_max']:,.2f})"
        roofline = f"{found['roofline_ms']:,.2f} ({found['roofline_share']:.3f})"
        memory = "" if peak is None else f"{peak / 2**30:.2f}"
        rate, mfu = f"{found['tokens_per_second']:,.1f}", f"{found['mfu']:.3f}"
        lines.append(table_row(name, times, rate, mfu, roofline, memory))
        for key, ratio in found.items():
            if key.startswith("ratio_to_"):
                quartiles = "quartiles {:.3f} to {:.3f}".format(*ratio["ms_quartiles"])
                memory = "" if ratio["peak_memory"] is None else f", peak memory {ratio['peak_memory']:.3f}"
                times = f"time {ratio['ms']:.3f} ({quartiles})"
                ratios.append(f"- {name} over {key[9:]}: {times}, counted FLOPs {ratio['flops']:.3f}{memory}")
    rates = [results["model"]["matmul_flops_per_second"] / 1e12, results["model"]["copy_bytes_per_second"] / 1e9]
    return [*lines, "", *ratios, f"- measured rates: {rates[0]:.3g} TFLOP/s, {rates[1]:.3g} GB/s"]


def count_table(results: dict[str, Any]) -> list[str]:
    lines = [table_row("", *results, "ratio"), "|---" * (len(results) + 2) + "|"]
    for key in results["model"]:
        values = [found[key] for found in results.values()]
        lines.append(table_row(key, *(f"{value:,}" for value in values), f"{values[0] / values[1]:.3f}"))
    return lines


def table_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
