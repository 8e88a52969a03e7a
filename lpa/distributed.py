"""The processes of a run: who they are, how they agree to stop, how the model is spread over them.

    World       this process among the others, and the few words they exchange
    Watch       whether to stop: a signal, a deadline, a failed save, known to all ranks before they act on it
    spread      compile and recompute, then DDP, or FSDP with shard=true
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
from lpa import hardware, structured
from model import GPT

ROLL_CALL_SECONDS = 5.0  # how long the ranks that saw a time-out wait for others to say so too


@dataclass(frozen=True)
class World:
    """This process among those of the run, and its device."""

    rank: int
    size: int
    device: torch.device
    store: dist.Store | None = None
    """Where ranks can leave word for each other when their connections are gone."""

    def mean(self, value: Tensor) -> Tensor:
        """The mean over ranks of a tensor on the device; no synchronisation with the host."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value / self.size

    def from_rank_0(self, f: Callable[[], Any]) -> Any:
        """What f returns on rank 0, on all ranks; a UserError there is one on all of them."""
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = f()
            except UserError as error:
                answer[1] = str(error)
        if self.size > 1:
            dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise UserError(answer[1])
        return answer[0]

    def leave(self) -> None:
        """Together: a rank that goes while another still saves would break its connections."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()


def join_world(device: str, timeout: float = 1800.0) -> World:
    """torchrun says who we are; without it we are alone. timeout: seconds that a rank waits for the others.

    Raises UserError where they do not come.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = hardware.choose_device(device)
    if size == 1:
        return World(rank, size, chosen)
    try:
        return World(rank, size, chosen, meet(rank, size, chosen, timeout))
    except (RuntimeError, ValueError) as error:  # no store, no other ranks; a variable that torchrun would have set
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        why = str(error).splitlines()[0]
        raise UserError(f"rank {rank} did not find {size} ranks at {place} within {timeout:g} s: {why}") from None


def meet(rank: int, size: int, device: torch.device, timeout: float) -> dist.Store:
    """Wait for the other ranks -> what all of them can read and write."""
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timedelta(seconds=timeout)))
    store = dist.PrefixStore(name_start(store, rank, size, timeout), store)
    options: dict[str, Any] = dict(store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **options)
    else:
        dist.init_process_group("gloo", **options)
    return store


def name_start(store: dist.Store, rank: int, size: int, timeout: float) -> str:
    """A name for this start of the run, the same on all ranks and not that of any other start.

    torchrun keeps one store over all restarts, and a rank that comes first would read there the address of a rank that
    was killed. So each leaves a new mark, and the marks together are the name, when all ranks have seen the same ones.
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
def roll_call(world: World, timeout: float) -> Iterator[None]:
    """Around what ranks do together: where some wait in vain, the ranks that did not answer are named, exit code 1.

    torchrun then starts all of them again, if --max-restarts lets it. A rank whose wait ended leaves word in the store;
    one that hangs does not. Where NCCL's own watchdog is first to lose patience, it ends the process without a name.
    """
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's are of this class
        timed_out = any(words in str(error).lower() for words in ("timed out", "timeout"))
        if world.store is None or not (timed_out or "gloo" in str(error).lower()):
            raise
        waited = f" within {timeout:g} s" if timed_out else ""
        try:
            missing = absent(world, world.store)
            who = f"rank {', '.join(map(str, missing))} did not answer" if missing else "the connection broke"
            speaker = min(set(range(world.size)) - set(missing))
        except dist.DistError:  # the store ended with the process that held it
            who, speaker = "rank 0, or the torchrun that keeps the list of ranks, is gone", world.rank
        if world.rank == speaker:
            print(f"error: {who}{waited} ({str(error).splitlines()[0]})", file=sys.stderr, flush=True)
        os._exit(1)  # the usual way out would wait for the others again


def absent(world: World, store: dist.Store) -> list[int]:
    """The ranks that do not leave word, as this one does, that they waited in vain; DistError if the store is gone."""
    store.set(f"waited/{world.rank}", socket.gethostname())
    time.sleep(ROLL_CALL_SECONDS)
    return [rank for rank in range(world.size) if not store.check([f"waited/{rank}"])]


# --- When to stop ------------------------------------------------------------------------------------------------

REASONS = ("", "SIGTERM", "SIGINT", "max_hours", "a save that failed", "torchrun is gone")
LOST = REASONS[-2:]  # with these nothing is to be saved: it cannot be, or another start of the run may be under way


class Watch:
    """Whether the run is to stop, asked before each step and each batch of an evaluation.

    The ranks agree over the CPU, so that no device waits, and at most every second: the number of questions from one
    agreement to the next follows from how long they take, on all ranks alike.
    """

    def __init__(self, world: World, max_hours: float | None = None) -> None:
        self.world = world
        self.caught, self.before = catch_signals()
        self.deadline = time.monotonic() + 3600 * max_hours if max_hours else float("inf")
        self.agreed, self.parent = "", os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.restart()

    def close(self) -> None:
        """Signals mean again what they did: a notebook goes on after this."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def restart(self) -> None:
        """What comes next takes another time to each question."""
        self.every, self.asked, self.since = 1, 0, time.monotonic()

    def stop(self) -> str:
        """One of REASONS, the same on all ranks; '' to go on."""
        if not self.agreed:
            mine = self.caught[0] if self.caught else "max_hours" if time.monotonic() > self.deadline else ""
            if self.parent not in (None, os.getppid()):  # a killed torchrun leaves its workers
                mine = "torchrun is gone"
            self.agreed = mine if self.world.size == 1 else self.agree(mine)
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
    """A list to which SIGTERM and SIGINT add their names, and what they did before; a second Ctrl-C stops at once."""
    caught: list[str] = []

    def remember(number: int, _frame: Any) -> None:
        caught.append(signal.Signals(number).name)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    return caught, {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}


# --- The model on all ranks --------------------------------------------------------------------------------------


def spread(model: GPT, c: TrainConfig, world: World) -> nn.Module:
    """Recompute and compile in place, so that parameters keep their names, then FSDP or DDP where there are ranks.

    FSDP makes each block a group of its own, which is gathered while it computes; embeddings, tied or not, the last
    norm and the head are one more. Its weights stay float32 in their shards, and are gathered in c.dtype.
    """
    for block in model.transformer.h:
        block.recompute = c.recompute
    mode = hardware.choose_compile(c.compile, world.device)
    for module in {"off": [], "model": [model], "block": model.transformer.h}[mode]:
        module.compile(dynamic=False)
    if world.size == 1:
        return model
    if c.shard:
        low = hardware.DTYPES[c.dtype] if c.dtype == "bfloat16" else None
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if low else None)
        mesh = init_device_mesh(world.device.type, (world.size,))
        for module in (*model.transformer.h, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        return model
    guided = any(isinstance(module, structured.Guided) for module in model.modules())  # and not in every step
    devices = [world.device] if world.device.type == "cuda" else None
    return DDP(model, device_ids=devices, gradient_as_bucket_view=True, find_unused_parameters=guided)


@contextlib.contextmanager
def communicating(model: nn.Module, last: bool) -> Iterator[None]:
    """Around a micro-step: only the last one's backward shares gradients. DDP decides so in forward."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        yield
    else:
        with model.no_sync() if isinstance(model, DDP) and not last else contextlib.nullcontext():
            yield


def whole(value: Tensor) -> Tensor:
    """A tensor that may be spread over the ranks -> all of it, on each."""
    return value.full_tensor() if isinstance(value, DTensor) else value
