"""The processes of a run: who they are, how they agree to stop, and how the model is wrapped for them.

    DistInfo      this process among the others, and what they send each other
    StopSignal    whether to stop: a signal, a time limit, a failed save, agreed by all processes before they act
    parallelize   recompute and compile, then DDP, or FSDP with shard=true
"""

import contextlib
import hashlib
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

from config import TrainConfig, UserError
from lpa import cpu, hardware
from lpa.recompute import apply_recompute

REPORT_SECONDS = 5.0  # how long the processes that saw a time-out wait for others to report one


@dataclass(frozen=True)
class DistInfo:
    """This process among those of the run, and its device."""

    rank: int
    world_size: int
    device: torch.device
    store: dist.Store | None = None
    """Where processes can leave messages when their connections are gone."""

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean over processes of a tensor on the device, without waiting for the device."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value / self.world_size

    def run_on_rank_0(self, f: Callable[[], Any]) -> Any:
        """Run f on process 0 and broadcast its result. A UserError there is raised on all processes."""
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = f()
            except UserError as error:
                answer[1] = str(error)
        if self.world_size > 1:
            dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise UserError(answer[1])
        return answer[0]

    def close(self) -> None:
        """Wait for all processes: one that ends early would break the connections of one that still saves."""
        if self.world_size > 1:
            dist.barrier()
            dist.destroy_process_group()


def init_distributed(device: str, timeout: float = 1800.0) -> DistInfo:
    """Connect the processes that torchrun started; without torchrun this is the only one.

    timeout: seconds that a process waits for the others. Raise UserError where they do not come.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = hardware.choose_device(device)
    if world_size == 1:
        return DistInfo(rank, world_size, chosen)
    try:
        return DistInfo(rank, world_size, chosen, connect(rank, world_size, chosen, timeout))
    except (RuntimeError, ValueError) as error:  # no store, no other processes, or a missing variable of torchrun
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        why = str(error).splitlines()[0]
        found = f"process {rank} did not find all {world_size} processes at {place} within {timeout:g} s"
        raise UserError(f"{found}: {why}") from None


def connect(rank: int, size: int, device: torch.device, timeout: float) -> dist.Store:
    """Wait for the other processes. Return the store that all of them can read and write."""
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timedelta(seconds=timeout)))
    store = dist.PrefixStore(name_start(store, rank, size, timeout), store)
    options: dict[str, Any] = dict(store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **options)
    else:
        dist.init_process_group("gloo", **options)
    return store


def name_start(store: dist.Store, rank: int, size: int, timeout: float) -> str:
    """Return a name for this start of the run: the same on all processes, and different for each start.

    torchrun keeps one store over all restarts, so a process could read there the address of one that was killed. So
    each process leaves a new mark, and the marks together are the name, once all processes have seen the same ones.
    """
    marks, deadline = [f"mark/{other}" for other in range(size)], time.monotonic() + timeout
    store.set(marks[rank], uuid.uuid4().hex)
    while time.monotonic() < deadline:
        name = hashlib.sha256(b"".join(store.multi_get(marks))).hexdigest()
        seen = [f"{name}/{other}" for other in range(size)]
        store.set(seen[rank], "")
        if store.check(seen):
            return name
        time.sleep(0.05)
    raise RuntimeError("not all of them came")


@contextlib.contextmanager
def hang_report(info: DistInfo, timeout: float) -> Iterator[None]:
    """Name the processes that did not answer, where the others wait in vain; then end with exit code 1.

    torchrun then starts all of them again, if --max-restarts allows it. A process whose wait ended leaves a message in
    the store; one that hangs does not. NCCL's own watchdog may end the process earlier, without a name.
    """
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's are of this class
        timed_out = any(words in str(error).lower() for words in ("timed out", "timeout"))
        if info.store is None or not (timed_out or "gloo" in str(error).lower()):
            raise
        waited = f" within {timeout:g} s" if timed_out else ""
        try:
            missing = silent_ranks(info, info.store)
            who = f"process {', '.join(map(str, missing))} did not answer" if missing else "the connection broke"
            speaker = min(set(range(info.world_size)) - set(missing))
        except dist.DistError:  # the store ended with the process that held it
            who, speaker = "process 0, or the torchrun that holds the store, is gone", info.rank
        if info.rank == speaker:
            print(f"error: {who}{waited} ({str(error).splitlines()[0]})", file=sys.stderr, flush=True)
        os._exit(1)  # a normal exit would wait for the others again


def silent_ranks(info: DistInfo, store: dist.Store) -> list[int]:
    """Return the processes that do not report, as this one does, that they waited in vain. DistError: no store."""
    store.set(f"waited/{info.rank}", socket.gethostname())
    time.sleep(REPORT_SECONDS)
    return [rank for rank in range(info.world_size) if not store.check([f"waited/{rank}"])]


# --- When to stop ------------------------------------------------------------------------------------------------

REASONS = ("", "SIGTERM", "SIGINT", "max_hours", "a save that failed", "torchrun is gone")
LOST = REASONS[-2:]  # then nothing is saved: it cannot be, or another start of the run may already write


class StopSignal:
    """Whether the run shall stop, asked before each step and each batch of an evaluation.

    The processes agree over the CPU, so that no device waits, and at most once per second: the number of questions
    between two agreements follows from how long they take, on all processes alike.
    """

    def __init__(self, info: DistInfo, max_hours: float | None = None) -> None:
        self.info = info
        self.caught, self.before = catch_signals()
        self.deadline = time.monotonic() + 3600 * max_hours if max_hours else float("inf")
        self.agreed, self.parent = "", os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.reset_pace()

    def close(self) -> None:
        """Restore the signal handlers, so that a notebook can continue."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def reset_pace(self) -> None:
        """Forget how long a question took: the next ones stand between other work."""
        self.every, self.asked, self.since = 1, 0, time.monotonic()

    def reason(self) -> str:
        """Return one of REASONS, the same on all processes; '' = continue."""
        if not self.agreed:
            mine = self.caught[0] if self.caught else "max_hours" if time.monotonic() > self.deadline else ""
            if self.parent not in (None, os.getppid()):  # a killed torchrun leaves its workers
                mine = "torchrun is gone"
            self.agreed = mine if self.info.world_size == 1 else self.agree(mine)
        return self.agreed

    def agree(self, mine: str) -> str:
        self.asked += 1
        if self.asked < self.every:
            return ""
        now = time.monotonic()
        votes = torch.tensor([REASONS.index(mine), (now - self.since) / self.asked], dtype=torch.float64)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        self.every = max(1, min(2 * self.every, int(1 / max(votes[1].item(), 1e-6))))
        self.asked, self.since = 0, now
        return REASONS[int(votes[0].item())]


def catch_signals() -> tuple[list[str], dict[int, Any]]:
    """Return a list to which SIGTERM and SIGINT add their names, and the old handlers. A second Ctrl-C ends at once."""
    caught: list[str] = []

    def remember(number: int, _frame: Any) -> None:
        caught.append(signal.Signals(number).name)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    return caught, {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}


# --- The model on all processes ----------------------------------------------------------------------------------


def parallelize(model: Any, c: TrainConfig, info: DistInfo, find_unused: bool = False) -> nn.Module:
    """Apply what makes training smaller, faster or distributed, in place, and return what the loop calls.

    The order matters: CPU kernels replace PyTorch's own, recompute wraps the forward of a block, compile then sees all
    that a block does, and DDP or FSDP exchange gradients around the compiled blocks. Parameters keep their names, and
    model.py knows nothing of it.

    FSDP makes each block a group that is gathered while it computes; embeddings, last norm and head are one more. The
    shards of the weights stay float32 and are gathered in c.dtype. find_unused: some steps leave out some parameters.
    """
    if info.device.type == "cpu":
        cpu.install(c)
    apply_recompute(model, c.recompute)
    mode = hardware.choose_compile(c.compile, info.device)
    for module in {"off": [], "model": [model], "block": model.transformer.h}[mode]:
        module.compile(dynamic=False)
    if info.world_size == 1:
        return model
    if c.shard:
        low = torch.bfloat16 if c.dtype == "bfloat16" else None
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if low else None)
        mesh = init_device_mesh(info.device.type, (info.world_size,))
        for module in (*model.transformer.h, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        return model
    devices = [info.device] if info.device.type == "cuda" else None
    return DDP(model, device_ids=devices, gradient_as_bucket_view=True, find_unused_parameters=find_unused)


@contextlib.contextmanager
def gradient_sync(model: nn.Module, last: bool) -> Iterator[None]:
    """Exchange gradients in the last micro-step alone. DDP decides so in forward."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        yield
    else:
        with model.no_sync() if isinstance(model, DDP) and not last else contextlib.nullcontext():
            yield


def full_tensor(value: Tensor) -> Tensor:
    """Return all of a tensor, sharded or not, on each process."""
    return value.full_tensor() if isinstance(value, DTensor) else value
