"""Choose device, precision and compilation for this machine, and measure how fast it is."""

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
    """Return the device. 'auto': CUDA, else Apple's MPS, else the CPU. torchrun's processes get a GPU each."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("device is cuda, but torch sees no CUDA device here; use --device=auto or --device=cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            size, gpus = os.environ["LOCAL_WORLD_SIZE"], torch.cuda.device_count()
            raise UserError(f"nproc_per_node is {size}, wanted at most {gpus}, the GPUs of this machine")
        torch.cuda.set_device(device)
        return device
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device is mps, but torch sees no Apple GPU here; use --device=auto or --device=cpu")
    return torch.device(name)


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """Compute matrix products in dtype; for float32, change nothing."""
    return contextlib.nullcontext() if dtype == "float32" else torch.autocast(device.type, DTYPES[dtype])


def keep_freed_memory(device: torch.device) -> None:
    """Let glibc keep freed memory on a CPU. Otherwise each step gets its large blocks from the system again.

    A new tensor of 64 MiB is then filled several times faster (`python -m experiments.speed.products`).
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" and device.type == "cpu" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def choose_dtype(dtype: Dtype, device: torch.device) -> Dtype:
    """Return the precision. 'auto': bfloat16 on a GPU that has it and on a CPU that multiplies it faster, else float32.

    A CPU with bfloat16 units reaches 2 to 4 times its float32 rate; without them, a hundredth. No flag shows this on
    all systems, so a product of 512 x 512 is timed. With a smaller one, the time to wake the threads would decide.
    """
    if dtype != "auto":
        return dtype
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type == "mps":
        return "float32"
    rates = {name: matmul_rate(device, name, seconds=0.1, n=512) for name in ("float32", "bfloat16")}
    return "bfloat16" if rates["bfloat16"] > 1.5 * rates["float32"] else "float32"


def choose_compile(mode: str, device: torch.device) -> str:
    """Return what to compile. 'auto': each block on CUDA, else nothing: a CPU gains little and needs a C++ compiler.

    Where the machine cannot compile, return 'off' with a warning.
    """
    if mode == "auto":
        mode = "block" if device.type == "cuda" else "off"
    if mode == "off":
        return mode
    reason = None
    if device.type == "mps" or sys.platform == "win32":
        reason = f"torch.compile is not reliable on {'MPS' if device.type == 'mps' else 'Windows'}"
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
    """Return the processor's name (Linux), or its architecture."""
    about = Path("/proc/cpuinfo")
    names = [line for line in about.read_text().splitlines() if line.startswith("model name")] if about.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that the allocator held since the last reset; None if the device does not count."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def matmul_rate(device: torch.device, dtype: str, seconds: float = 0.5, n: int | None = None) -> float:
    """Return FLOP/s of a large square matrix product, the fastest within `seconds`. MFU divides by it."""
    n = n or (8192 if device.type == "cuda" else 1024)
    a, b = torch.randn(2, n, n, device=device, dtype=DTYPES[dtype])
    with torch.no_grad():
        return 2 * n**3 / fastest(lambda: torch.mm(a, b), device, seconds)


def copy_rate(device: torch.device, seconds: float = 0.5) -> float:
    """Return bytes/s, read and written together, of a large copy, the fastest within `seconds`."""
    n = 2**30 if device.type == "cuda" else 2**28  # beyond any cache
    source, target = torch.ones(2, n, device=device, dtype=torch.uint8)
    return 2 * n / fastest(lambda: target.copy_(source), device, seconds)


def fastest(run: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Return the time of the fastest run within `seconds`, after a first run that does not count."""
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
