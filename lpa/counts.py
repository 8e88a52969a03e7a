"""Count what a model needs: parameters, FLOPs, bytes of activations and of the cache. Print them as tables."""

import gc
import itertools
import weakref
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import TrainConfig
from lpa import decode, hardware
from lpa.recompute import apply_recompute
from lpa.structured import BlockDense, BlockShuffle
from model import GPT, GPTConfig, LowRank

CPU = torch.device("cpu")


def dense_weight(layer: Any) -> Tensor:
    """Return the matrix (C_out, C_in) of a projection of any kind. Raise TypeError for a kind that has none."""
    if type(layer) is LowRank:  # a subclass may compute something else
        return layer.B @ layer.A
    if isinstance(layer, BlockDense | BlockShuffle):
        return layer.dense_weight()
    if isinstance(layer, nn.Linear):
        return layer.weight
    raise TypeError(f"{type(layer).__name__} has no dense matrix known to lpa/counts.py")


def matrix_numel(layer: nn.Module) -> int:
    """Return how many numbers the matrices of a projection hold: also its multiplications per token."""
    return sum(p.numel() for name, p in layer.named_parameters() if not name.endswith("bias"))


def table(model: GPT) -> str:
    """Return a table of a block's projections: shape, rank, parameters, FLOPs. Warn where a rank saves nothing."""
    c = model.config
    title = f"GPT: {c.n_layer} layers, {model.n_params():,} parameters, {model.n_params(embeddings=False):,} of them"
    lines = [f"{title} in the blocks, {model.flops_per_token():,} FLOPs per token forward at T = {c.block_size}"]
    block = model.transformer.h[-1]  # the feed-forward of the first may be dense
    layers = {**dict(block.attn.named_children()), **dict(block.mlp.named_children()), "lm_head": model.lm_head}
    widths = c.projections | {"lm_head": (c.n_embd, c.vocab_size)}
    if c.rope_dim is not None:
        widths |= {"qr": (c.n_embd, c.n_head * c.rope_dim), "kr": (c.n_embd, c.rope_dim)}
    kinds = {name: getattr(c.lowdim, name, 0) for name in layers}
    n = max(8, *(2 + len(str(kind)) for kind in kinds.values()))  # width of the column of ranks
    numbers = f"{'parameters':>15}{'of dense':>10}{'FLOPs/token':>15}"
    lines.append(f"{'projection':10}{'in':>7}{'out':>8}{'rank':>{n}}{numbers}")
    warnings = []
    for name, layer in layers.items():
        d_in, d_out = widths[name]
        kind, numel, dense = kinds[name], matrix_numel(layer), d_in * d_out
        lines.append(
            f"{name:10}{d_in:7}{d_out:8}{kind or 'dense':>{n}}{numel:15,}{numel / dense:10.0%}{2 * numel:15,}"
        )
        if numel >= dense and kind:
            better = f"; it would below {dense / (d_in + d_out):.0f}" if isinstance(kind, int) else ""
            warnings.append(f"warning: {name} at {'rank ' if better else ''}{kind} saves nothing{better}")
    if c.first_ffn_dense:
        lines.append("of the last block; the feed-forward of the first is dense")
    return "\n".join(lines + warnings)


def count(c: GPTConfig, dtype: str, recompute: str = "none") -> dict[str, Any]:
    """Return what needs no measurement; the weights are never in memory. Bytes per token are at block_size tokens."""
    with torch.device("meta"):
        model = GPT(c)
    forward = model.flops_per_token()
    return dict(
        params=model.n_params(),
        params_non_embedding=model.n_params(embeddings=False),
        flops_per_token_forward=forward,
        flops_per_token_train=3 * forward,
        activation_bytes_per_token=activation_bytes_per_token(c, dtype, recompute),
        kv_bytes_per_token=2 * decode.cache_numbers_per_token(c),  # in bfloat16
    )


def activation_bytes_per_token(c: GPTConfig, dtype: str, recompute: str = "none") -> int:
    """Return the bytes that a training step keeps between forward and backward per token, at a context of block_size.

    Counts the storages that a forward pass leaves alive, whatever holds them. On fake CPU tensors attention is fused,
    and keeps its output and log-sum-exp; on a real CPU in bfloat16, lpa/cpu.py keeps the scores of short contexts, too.
    The difference of two batch sizes leaves out what does not grow with the batch, such as the weights in dtype.
    """
    alive = []
    with FakeTensorMode():
        model = GPT(c, seed=None)
        apply_recompute(model, recompute)
        for batch_size in (1, 2):
            idx = torch.zeros(batch_size, c.block_size, dtype=torch.long)
            with LiveStorages() as storages, hardware.autocast(CPU, dtype):
                loss = model(idx, idx)
            gc.collect()
            alive.append(storages.now)
            del loss
    return (alive[1] - alive[0]) // c.block_size


class LiveStorages(TorchDispatchMode):
    """Count, without keeping them alive, the bytes of every storage that an operation makes: now and at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if not tensors:  # such as a question for the device
            return result
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for storage in (t.untyped_storage() for t in tensors):
            if storage._cdata not in self.seen and storage._cdata not in old:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes()).atexit = False  # pyrefly: ignore
        self.peak = max(self.peak, self.now)
        return result

    def forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def least_bytes(
    model: GPT, mode: str, optimizer: str, dtype: torch.dtype, batch_size: int, prompt: int, tokens: int
) -> int:
    """Return the bytes that the work of a mode of bench.py must read or write; activations are left out.

    train    float32: each weight read in forward and again in backward, each gradient written and read, each weight
             and its moments (two of AdamW, at least one of Muon) read and written by the optimizer
    eval     float32: each weight read
    prefill  in dtype: each weight read, and the cache of `prompt` tokens written
    decode   in dtype, for each of `tokens` tokens of a sequence: each weight read, and all of its cache
    Weights that are read are those of products and norms: a step looks up few rows of an embedding table.
    """
    params = model.n_params()
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)} - {model.lm_head.weight}
    read = params - sum(p.numel() for p in tables)
    if mode == "train":
        moments = 2 if optimizer == "adamw" else 1
        return 4 * (2 * read + 2 * params + 2 * (1 + moments) * params)
    if mode == "eval":
        return 4 * read
    cached = batch_size * decode.cache_numbers_per_token(model.config)  # numbers per token in all rows
    if mode == "prefill":
        return dtype.itemsize * (read + cached * prompt)
    return dtype.itemsize * (tokens * read + cached * (tokens * prompt + tokens * (tokens + 1) // 2))


def comparison(results: dict[str, Any], options: TrainConfig) -> str:
    """Return the results in columns: the model, what it is compared with, and the ratio."""
    gpt = options.gpt
    ranks = ", ".join(f"{name} {rank}" for name, rank in asdict(gpt.lowdim).items() if rank) or "none"
    model, (other, reference) = results["model"], list(results.items())[1]
    lines = [
        f"{gpt.n_layer} layers, n_embd {gpt.n_embd}, T {gpt.block_size}, vocabulary {gpt.vocab_size:,}, ranks: {ranks}",
        f"{'':32}{'model':>16}{other:>16}{'ratio':>9}",
    ]
    for key, value in reference.items():
        if not isinstance(value, int | float) or key in ("matmul_flops_per_second", "copy_bytes_per_second"):
            continue
        shown = [f"{v:,}" if isinstance(v, int) else f"{v:,.3f}" for v in (model[key], value)]
        lines.append(f"{key:32}{shown[0]:>16}{shown[1]:>16}{model[key] / value:9.3f}")
    if "ms_median" in model:
        for name, other in itertools.combinations(results, 2):
            ratio = results[name][f"ratio_to_{other}"]
            quartiles = "{:.3f} to {:.3f}".format(*ratio["ms_quartiles"])
            times = f"time {ratio['ms']:.3f} (quartiles {quartiles})"
            lines.append(f"{name} over {other}: {times}, counted FLOPs {ratio['flops']:.3f}")
        rates = [model["matmul_flops_per_second"] / 1e12, model["copy_bytes_per_second"] / 1e9]
        lines.append(f"mfu is of {rates[0]:.3g} TFLOP/s, measured here on a large {options.dtype} matrix product")
        lines.append(f"roofline: the counted FLOPs at that rate or the bytes at that of a copy, {rates[1]:.3g} GB/s")
    return "\n".join(lines)
