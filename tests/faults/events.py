"""Hooks that make train.py meet a fault at a chosen event: conftest.start(..., hook='events.NAME')."""

import collections
import errno
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

import data
import train
from lpa import checkpoint, distributed, log

AUDITED = {"os.rename": "rename", "os.remove": "prune", "os.rmdir": "prune", "os.mkdir": "mkdir"}


def kill_at() -> None:
    """SIGKILL at the FAULT_AT-th event of FAULT_KIND by which this process touches the disk; FAULT_LOG lists them all.

    save: before a file of tensors is written. write: after it, when half of it is gone again, as after a power cut.
    open: before Python opens a file of a checkpoint to write it. fsync, rename, mkdir, prune: before the call. Of
    several ranks only FAULT_RANK is killed; the others then wait less than usual for one that will not answer.
    """
    kind, at = os.environ.get("FAULT_KIND", ""), int(os.environ.get("FAULT_AT", 0))
    distributed.REPORT_SECONDS = 0.5
    if os.environ.get("FAULT_RANK", "0") != os.environ.get("RANK", "0"):
        return
    counts: collections.Counter[str] = collections.Counter()
    lock = threading.RLock()
    events = os.open(os.environ["FAULT_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def event(name: str, file: Path | None = None) -> None:
        with lock:
            counts[name] += 1
            os.write(events, f"{name}\n".encode())
            if name == kind and counts[name] == at:
                if file is not None:
                    os.truncate(file, file.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

    fsync, write_data = os.fsync, dcp.FileSystemWriter.write_data

    def noted_write_data(self: Any, *arguments: Any) -> Any:
        event("save")
        written = write_data(self, *arguments)
        event("write", next(self.path.glob(f"__{os.environ.get('RANK', '0')}_*.distcp")))
        return written

    def noted_fsync(descriptor: int) -> None:
        event("fsync")
        fsync(descriptor)

    os.fsync, dcp.FileSystemWriter.write_data = noted_fsync, noted_write_data

    def noted_call(name: str, arguments: tuple) -> None:
        if name in AUDITED:
            event(AUDITED[name])
        elif name == "open" and "/ckpt/" in str(arguments[0]) and "w" in (arguments[1] or ""):
            event("open")

    sys.addaudithook(noted_call)


def full_disk() -> None:
    """From the save of step 4 to that of step 8 no file may grow beyond 50 KB, as if the disk were full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    original = checkpoint.save

    def save(run: Path, tensors: dict[str, Tensor], state: dict[str, Any], tokenizer: Any) -> None:
        limit = 50_000 if 4 <= state["step"] < 8 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        original(run, tensors, state, tokenizer)

    checkpoint.save = save


def slow_evaluation() -> None:
    """A quarter of a second a batch."""
    original = data.eval_batch

    def eval_batch(*arguments: Any) -> Any:
        time.sleep(0.25)
        return original(*arguments)

    data.eval_batch = eval_batch


def die_once() -> None:
    """Rank 1 is killed before step 7, if the file FAULT_LOG is not there yet."""
    original, marker = train.seed_dropout, Path(os.environ["FAULT_LOG"])

    def seed_dropout(seed: int, step: int, rank: int) -> None:
        if rank == 1 and step == 7 and not marker.exists():
            marker.write_text("killed")
            os.kill(os.getpid(), signal.SIGKILL)
        original(seed, step, rank)

    train.seed_dropout = seed_dropout


def signal_rank_1() -> None:
    """Rank 1 sends itself a SIGTERM before its fifth step."""
    original = train.seed_dropout

    def seed_dropout(seed: int, step: int, rank: int) -> None:
        original(seed, step, rank)
        if rank == 1 and step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    train.seed_dropout = seed_dropout


def torchrun_dies_after_step_4() -> None:
    """Rank 1 then has another parent, as a worker has whose torchrun was killed."""
    original = train.seed_dropout
    os.environ["TORCHELASTIC_RUN_ID"] = "none"

    def seed_dropout(seed: int, step: int, rank: int) -> None:
        original(seed, step, rank)
        if rank == 1 and step == 4:
            os.getppid = lambda: 1

    train.seed_dropout = seed_dropout


def no_room_on_rank_1() -> None:
    """From its second save on."""
    original, saves = dcp.FileSystemWriter.write_data, []

    def write_data(self: Any, *arguments: Any) -> Any:
        saves.append(1)
        if os.environ["RANK"] == "1" and len(saves) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, *arguments)

    dcp.FileSystemWriter.write_data = write_data


def log_to_a_full_device() -> None:
    """What is logged after the first line meets a full disk."""
    original = log.Log.log_setting

    def log_setting(self: log.Log, *arguments: Any) -> None:
        original(self, *arguments)
        self.file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115

    log.Log.log_setting = log_setting
