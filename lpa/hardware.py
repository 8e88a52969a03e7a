"""The machine: which device, which precision, whether to compile, and how fast it is."""

import contextlib
import ctypes
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from config import Dtype, UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str = "auto") -> torch.device:
    """'auto' is CUDA, then Apple's MPS, then the CPU; under torchrun every local rank has a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("device is cuda, but torch sees no CUDA device here; use --device=auto or --device=cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            ranks, gpus = os.environ["LOCAL_WORLD_SIZE"], torch.cuda.device_count()
            raise UserError(f"nproc_per_node is {ranks}, wanted at most {gpus}, the GPUs of this machine")
        torch.cuda.set_device(device)
        return device
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device is mps, but torch sees no Apple GPU here; use --device=auto or --device=cpu")
    return torch.device(name)


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """Matrix products in dtype; nothing for float32."""
    return contextlib.nullcontext() if dtype == "float32" else torch.autocast(device.type, DTYPES[dtype])


def keep_freed_memory(device: torch.device) -> None:
    """Let glibc keep what is freed on a CPU. It would return large blocks and fetch them again in each step, page by
    page: a new tensor of 64 MiB is then filled several times faster (`python -m experiments.speed.products`)."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" and device.type == "cpu" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def choose_dtype(dtype: Dtype, device: torch.device) -> Dtype:
    """'auto' is bfloat16 on a GPU that has it and on a CPU that multiplies it faster, else float32.

    A CPU with bfloat16 units has 4 times its float32 rate, one without them a hundredth: no flag tells them apart on
    all systems, a product of 256 x 256 does.
    """
    if dtype != "auto":
        return dtype
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type == "mps":
        return "float32"
    rates = {name: matmul_rate(device, name, seconds=0.05, n=256) for name in ("float32", "bfloat16")}
    return "bfloat16" if rates["bfloat16"] > 1.5 * rates["float32"] else "float32"


def choose_compile(mode: str, device: torch.device) -> str:
    """'auto' compiles by block on CUDA, and nowhere else: on a CPU it gains little and needs a C++ compiler.

    A wish that the machine cannot grant becomes 'off' with a warning.
    """
    if mode == "auto":
        mode = "block" if device.type == "cuda" else "off"
    if mode == "off":
        return mode
    reason = None
    if device.type == "mps" or sys.platform == "win32":
        reason = f"torch.compile is not dependable on {device.type if device.type == 'mps' else 'Windows'}"
    elif device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        reason = "torch.compile needs a C++ compiler on the CPU and found none"
    if reason and os.environ.get("RANK", "0") == "0":
        print(f"warning: compile is off: {reason}", file=sys.stderr)
    return "off" if reason else mode


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} ({processor()}, {threads} thread{'s' if threads > 1 else ''})"


def processor() -> str:
    """Its name where the system tells it (Linux), else its architecture."""
    about = Path("/proc/cpuinfo")
    names = [line for line in about.read_text().splitlines() if line.startswith("model name")] if about.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Bytes that the device's allocator held at most since the last reset; None where there is no such count."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def matmul_rate(device: torch.device, dtype: str, seconds: float = 0.5, n: int | None = None) -> float:
    """FLOP/s of one large square matrix product, the fastest of those that fit in `seconds`: what MFU divides by."""
    n = n or (8192 if device.type == "cuda" else 1024)
    a, b = torch.randn(2, n, n, device=device, dtype=DTYPES[dtype])
    with torch.no_grad():
        return 2 * n**3 / fastest(lambda: torch.mm(a, b), device, seconds)


def copy_rate(device: torch.device, seconds: float = 0.5) -> float:
    """Bytes/s, read and written ones together, of one large copy, the fastest of those that fit in `seconds`."""
    n = 2**30 if device.type == "cuda" else 2**28  # beyond any cache
    source, target = torch.ones(2, n, device=device, dtype=torch.uint8)
    return 2 * n / fastest(lambda: target.copy_(source), device, seconds)


def fastest(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest run, of those that fit in `seconds` after a first one."""
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
