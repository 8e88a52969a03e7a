"""Count what a training step needs in memory: bench.py --mode=plan.

    python bench.py config/lpa_3b.py --mode=plan --gpus=8 --memory=80GB         a table
    python bench.py config/lpa_3b.py --mode=plan --gpus=8 --memory=80GB --json  for other programs

ddp: every process holds all parameters, gradients (DDP's buckets) and moments in float32, and autocast copies the
matrices in dtype. fsdp: each process holds a share of each in float32, and the blocks at work are gathered in dtype, as
lpa/distributed.py shards them. Each micro-step is counted as if it reduced its gradients; FSDP keeps unsharded ones
between the micro-steps of a step.

The tensors are fake: they have sizes and no memory. Fragmentation, the CUDA context and the buffers of cuBLAS and NCCL
are not counted; ALLOWANCE is left for them. Kernels are those that run without torch.compile.
"""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from config import Dtype, TrainConfig, UserError
from lpa import hardware, optim
from lpa.counts import CPU, LiveStorages
from lpa.recompute import apply_recompute
from model import GPT, GPTConfig

ALLOWANCE = 0.1  # of a GPU's memory, for what is not counted
LINE_FROM = 2**15  # tokens in a batch from which on memory grows along a line
UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def main(c: TrainConfig, gpus: int, memory: str, as_json: bool) -> None:
    """Print the plan. Raise UserError where memory is no size, or not even one sequence per process fits."""
    if c.dtype == "auto":
        c = replace(c, dtype="bfloat16")  # what hardware.choose_dtype chooses on a GPU
    limit = int((1 - ALLOWANCE) * size_of(memory))
    rows: dict[str, dict[str, Any]] = {}
    for engine in ("ddp", "fsdp"):
        for recompute in ("none", "elementwise", "latents", "block"):
            option = replace(c, recompute=recompute)
            need = needed(option, engine, gpus)
            largest = largest_batch(lambda n, o=option, e=engine: needed(at(o, n), e, gpus).total, limit)
            counted = asdict(need) | dict(total=need.total)
            rows[f"{engine} {recompute}"] = dict(engine=engine, recompute=recompute) | counted
            rows[f"{engine} {recompute}"] |= dict(fits=need.total <= limit, largest_batch_size=largest)
    if not any(row["largest_batch_size"] for row in rows.values()):
        least = min((needed(at(c, 1, row["recompute"]), row["engine"], gpus).total, name) for name, row in rows.items())
        raise UserError(
            f"memory is {memory} on {gpus} GPUs, wanted more of either: one sequence per process takes at least"
            f" {size_name(least[0])} ({least[1]}), and {1 - ALLOWANCE:.0%} of {memory} are {size_name(limit)}"
        )
    plan = dict(gpus=gpus, memory=size_of(memory), allowance=ALLOWANCE, usable=limit, batch_size=c.batch_size)
    plan |= dict(dtype=c.dtype, optimizer=c.optimizer, block_size=c.gpt.block_size, rows=list(rows.values()))
    print(json.dumps(plan, indent=1) if as_json else table(plan, memory))


def size_of(text: str) -> int:
    """Return the bytes of a size: '80GB' is 80 * 10**9, '79.2GiB' is 79.2 * 2**30."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]i?b)", text.strip(), re.IGNORECASE)
    if match is None or match[2].upper() not in UNITS or not float(match[1]):
        raise UserError(f"memory is {text!r}, wanted a size such as 80GB or 79.2GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def size_name(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def at(
    c: TrainConfig, batch_size: int, recompute: Literal["none", "elementwise", "latents", "block"] | None = None
) -> TrainConfig:
    return replace(c, batch_size=batch_size, recompute=recompute or c.recompute)


# --- One process -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """Bytes of the process that holds the most. The first three are always held, the others at their own times."""

    parameters: int
    """float32, with the buffers."""
    gradients: int
    """float32; all of them, as DDP's buckets and gradient accumulation keep them."""
    optimizer: int
    """float32; two moments per parameter of AdamW, one of Muon."""
    gathered: int
    """fsdp, in dtype: the outer group, the block at work with its gradient, and the next block; see gathered_bytes."""
    activations: int
    """The most that forward and backward add: what backward needs, weights in dtype, the head's logits."""
    optimizer_step: int
    """The most that the optimizer's step adds. Muon under fsdp: as if each process gathered all of a matrix."""

    @property
    def total(self) -> int:
        kept = self.parameters + self.gradients + self.optimizer
        return kept + max(self.gathered + self.activations, self.optimizer_step)


def needed(c: TrainConfig, engine: str, gpus: int) -> Need:
    """Return what a step of c.batch_size sequences on each of so many GPUs needs; engine is 'ddp' or 'fsdp'."""
    sharded = engine == "fsdp"
    parameters, optimizer, optimizer_step = resident(c.gpt, c.optimizer, c.dtype, gpus if sharded else 1)
    with torch.device("meta"):
        model = GPT(c.gpt)
    buffers = sum(b.nbytes for b in model.buffers())
    held = (c.gpt, c.dtype, c.batch_size, c.recompute, sharded)
    gathered = gathered_bytes(model, c.dtype) if sharded else 0
    return Need(parameters + buffers, parameters, optimizer, gathered, activation_peak(*held), optimizer_step)


@functools.cache
def resident(c: GPTConfig, optimizer: Literal["adamw", "muon"], dtype: Dtype, shares: int) -> tuple[int, int, int]:
    """Return bytes of the parameters, of the optimizers' state, and the most that a step of the optimizers adds.

    They are those of process 0, which has the largest of the `shares` parts of each tensor along its first dimension.
    """

    def part(t: Tensor) -> int:
        return t.nbytes if t.ndim == 0 else -(-len(t) // shares) * (t.nbytes // len(t))

    with FakeTensorMode():
        model = GPT(c, seed=None)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizers = optim.make_optimizers(model, TrainConfig(c, optimizer=optimizer, dtype=dtype))
        with LiveStorages() as storages:
            for o in optimizers * 2:  # the moments exist from the second step on
                storages.peak = storages.now
                o.step()
        states = [t for o in optimizers for state in o.state.values() for t in state.values()]
        working = storages.peak - sum(t.nbytes for t in states)
        return sum(map(part, model.parameters())), sum(map(part, states)), max(0, working)


def gathered_bytes(model: GPT, dtype: str) -> int:
    """Return the bytes that FSDP gathers, in dtype, beside the shards when activations are at their peak.

    Embeddings, head and last norm stay gathered from forward to the end. One block is at work and has its gradient; the
    next one is being gathered. Gradients are reduced later, when fewer activations are left.
    """
    block = max(sum(p.numel() for p in block.parameters()) for block in model.transformer.h)
    outside = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.transformer.h.parameters())
    return hardware.DTYPES[dtype].itemsize * (outside + 3 * block)


@functools.cache
def activation_peak(c: GPTConfig, dtype: str, batch_size: int, recompute: str, sharded: bool) -> int:
    """Return the most bytes that forward and backward hold beyond parameters and gradients.

    All blocks but the first are alike, so the rest follows from models of two and three blocks. In the same way larger
    batches follow from two, once the blocks outweigh the constant share of the head's chunks: a line through both was
    at most 4 % off (tests/test_planning.py).
    """
    few = max(1, LINE_FROM // c.block_size)
    if batch_size > 2 * few:
        low, high = (activation_peak(c, dtype, n, recompute, sharded) for n in (few, 2 * few))
        return low + (batch_size - few) * (high - low) // few
    low, high = (step_peak(replace(c, n_layer=n), dtype, batch_size, recompute, sharded) for n in (2, 3))
    return low + (c.n_layer - 2) * (high - low)


def step_peak(c: GPTConfig, dtype: str, batch_size: int, recompute: str, sharded: bool) -> int:
    """Return the most bytes alive in a forward and backward on fake CPU tensors, whose attention is fused as on a GPU.

    Gradients exist before, as in any micro-step but the first, and do not count. Sharded: the weights are in dtype from
    the start, and the gradients of a block are dropped at once; gathered_bytes adds what that leaves out.
    """
    with FakeTensorMode():
        model = GPT(c, seed=None)
        apply_recompute(model, recompute)
        if sharded:
            for p in model.parameters():
                p.data = p.data.to(hardware.DTYPES[dtype])
            for p in model.transformer.h.parameters():
                p.register_post_accumulate_grad_hook(drop_gradient)
        else:
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
        with LiveStorages() as storages:
            idx = torch.zeros(batch_size, c.block_size, dtype=torch.long)
            with hardware.autocast(CPU, dtype):
                loss = model(idx, idx)
            loss.backward()
        return storages.peak


def drop_gradient(p: nn.Parameter) -> None:
    p.grad = None


def largest_batch(total: Callable[[int], int], limit: int) -> int:
    """Return the most sequences whose total is within the limit; 0 where one is too many.

    The total grows almost linearly, so the next try is where a line through two known totals meets the limit.
    """
    if total(1) > limit:
        return 0
    fits, tried = 1, 2
    while total(tried) <= limit:
        slope = max(1, (total(tried) - total(fits)) // (tried - fits))
        fits, tried = tried, tried + max(1, (limit - total(tried)) // slope)
    while tried - fits > 1:
        slope = max(1, (total(tried) - total(fits)) // (tried - fits))
        middle = min(tried - 1, fits + max(1, (limit - total(fits)) // slope))
        fits, tried = (middle, tried) if total(middle) <= limit else (fits, middle)
    return fits


def table(plan: dict[str, Any], memory: str) -> str:
    """Return the plan in columns."""
    names = [field.name for field in fields(Need)]
    usable, rows = size_name(plan["usable"]), plan["rows"]
    lines = [
        f"GB on each of {plan['gpus']} GPUs, batch_size {plan['batch_size']}, T {plan['block_size']}, {plan['dtype']},"
        f" {plan['optimizer']}; of {memory} {usable} to use, as {ALLOWANCE:.0%} is left to what is not counted",
        f"{'':17}" + "".join(f"{name.replace('_', ' '):>15}" for name in (*names, "total")) + f"{'largest batch':>15}",
    ]
    for row in rows:
        shown = "".join(f"{row[name] / 1e9:15.3f}" for name in (*names, "total"))
        too_much = "" if row["fits"] else "  does not fit"
        lines.append(f"{row['engine']:5}{row['recompute']:12}{shown}{row['largest_batch_size']:15,}{too_much}")
    lines += [
        "total = parameters + gradients + optimizer + the larger of (gathered + activations) and optimizer step",
        "not counted: fragmentation, CUDA context, cuBLAS's and NCCL's buffers; what torch.compile saves or adds",
    ]
    return "\n".join(lines)
