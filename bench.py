"""A model against its dense twin: counted FLOPs and bytes, measured time and memory.

    python bench.py config/lpa_370m.py --vocab_size=32000 --mode=count          needs no weights in memory
    python bench.py config/lpa_cpu.py --mode=train                              a training step, alternating
    python bench.py config/lpa_130m.py --vocab_size=32000 --mode=train --against=dense,hf   transformers' class, too
    python bench.py config/lpa_cpu.py --mode=decode --json                      for other programs

The twin is the same configuration with lowdim = {}, run by the same code with the same flags in the same process; the
two take turns, so that a machine that slows down slows both. Shapes: B batch, T time.
"""

import dataclasses
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import decode
import hardware
import optim
import train
from config import TrainConfig, UserError, load_config, user_errors
from model import GPT, GPTConfig, LowDim


@dataclass(frozen=True)
class BenchConfig:
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    mode: Literal["count", "train", "eval", "prefill", "decode"] = "count"
    """Counts only, or the time of a training step, an evaluation step, a prompt's forward pass, a decoded token."""
    against: Literal["dense", "dense,hf"] = "dense"
    """The dense twin, and with hf also transformers' Llama or GPT-2 class of the twin's shape."""
    pairs: int = 15
    """Measurements of each variant, in turns."""
    decode_tokens: int = 64
    """Tokens that a measurement of 'decode' draws."""
    context: int | None = None
    """Tokens that are in the cache before; None = the rest of block_size."""
    json: bool = False
    """Print one JSON object in place of tables."""

    def __post_init__(self) -> None:
        if self.mode in ("prefill", "decode") and self.train.compile in ("model", "block"):
            raise ValueError(f"compile is {self.train.compile!r}, but mode {self.mode!r} runs eager: leave compile out")
        if self.pairs < 1:
            raise ValueError(f"pairs is {self.pairs}, wanted 1 or more")
        limit = self.train.gpt.block_size
        if not 0 < self.decode_tokens < limit:
            raise ValueError(f"decode_tokens is {self.decode_tokens}, wanted 1 or more and below block_size = {limit}")
        if self.context is not None and not 0 < self.context <= limit - self.decode_tokens:
            limit -= self.decode_tokens
            raise ValueError(f"context is {self.context}, wanted 1 to block_size - decode_tokens = {limit}")
        if "hf" in self.against and self.train.optimizer != "adamw":
            raise ValueError(f"optimizer is {self.train.optimizer!r}, wanted 'adamw' against transformers")


def main(c: BenchConfig) -> None:
    gpt = with_vocabulary(c.train)
    variants = {"model": gpt, "dense": dense_twin(gpt)}
    results = {name: count(variant, c.train.dtype, c.train.recompute) for name, variant in variants.items()}
    if c.mode != "count":
        if "hf" in c.against:
            variants["hf"], results["hf"] = variants["dense"], dict(results["dense"])
        measure(c, variants, results, hardware.choose_device(c.train.device))
    print(json.dumps(results, indent=1) if c.json else tables(c, variants, results))


def dense_twin(c: GPTConfig) -> GPTConfig:
    return dataclasses.replace(c, lowdim=LowDim())


def with_vocabulary(c: TrainConfig) -> GPTConfig:
    """vocab_size as given, else the corpus's, else the paper's 32,000 with a note."""
    if c.gpt.vocab_size is not None:
        return c.gpt
    if (data.DATA / c.dataset / "meta.json").exists():
        return train.with_vocabulary(c, data.open_corpus(c.dataset, "train")).gpt
    print(f"note: {c.dataset} is not prepared; counting with the paper's vocab_size = 32000", file=sys.stderr)
    return dataclasses.replace(c.gpt, vocab_size=32000)


def count(c: GPTConfig, dtype: str, recompute: str = "none") -> dict[str, Any]:
    """What needs no measurement; the weights are never in memory. Bytes a token are for block_size tokens."""
    with torch.device("meta"):
        model = GPT(c)
    forward = model.flops_per_token()
    return dict(
        params=model.n_params(),
        params_non_embedding=model.n_params(embeddings=False),
        flops_per_token_forward=forward,
        flops_per_token_train=3 * forward,
        activation_bytes_per_token=activation_bytes_per_token(c, dtype, recompute),
        kv_bytes_per_token=2 * decode.cache_numbers_per_token(c),  # in bf16
    )


def activation_bytes_per_token(c: GPTConfig, dtype: str, recompute: str = "none") -> int:
    """Bytes that a training step keeps between forward and backward for each token, at a context of block_size.

    Storages are counted that a forward pass leaves alive, whatever holds them, on fake CPU tensors: there attention
    is fused, and keeps its output and log-sum-exp. RMSNorm is not fused there as it is on CUDA: one that is not
    recomputed is charged its float32 input and result, which a GPU would not keep. The difference of two batch sizes
    leaves out what does not grow with the batch, such as the weights' copies in dtype.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    alive = []
    with FakeTensorMode():
        model = GPT(c, seed=None)
        for block in model.transformer.h:
            block.recompute = recompute
        for batch_size in (1, 2):
            idx = torch.zeros(batch_size, c.block_size, dtype=torch.long)
            with LiveStorages() as storages, hardware.autocast(torch.device("cpu"), dtype):
                loss = model(idx, idx)
            alive.append(storages.bytes())
            del loss
    return (alive[1] - alive[0]) // c.block_size


class LiveStorages(TorchDispatchMode):
    """Remembers, without keeping alive, every storage that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in old:
                self.seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def bytes(self) -> int:
        gc.collect()
        return sum(size for reference, size in self.seen.values() if not reference.expired())



def measure(c: BenchConfig, variants: dict[str, GPTConfig], results: dict[str, Any], device: torch.device) -> None:
    """Add times, rates and peak memory of each variant, and their ratio, to the results."""
    rate = hardware.matmul_rate(device, c.train.dtype)
    for name, variant in variants.items():  # one at a time, so that neither stands in the other's memory
        hardware.reset_peak_memory(device)
        work = make_work(c, name, variant, device)
        work.run()
        work.run()
        results[name]["peak_memory_bytes"] = hardware.peak_memory(device)
        del work
        gc.collect()
    works = {name: make_work(c, name, variant, device) for name, variant in variants.items()}
    times = alternate({name: work.run for name, work in works.items()}, c.pairs, device)
    for name, work in works.items():
        ms = statistics.median(times[name])
        results[name] |= dict(ms_median=ms, ms_min=min(times[name]), ms_max=max(times[name]))
        results[name] |= dict(tokens_per_second=1000 * work.tokens / ms, mfu=1000 * work.flops / ms / rate)
        results[name] |= dict(matmul_flops_per_second=rate)
    for name, other in [("model", "dense"), *((n, "hf") for n in ("model", "dense") if "hf" in variants)]:
        ratios = sorted(a / b for a, b in zip(times[name], times[other]))
        peaks = [results[n]["peak_memory_bytes"] for n in (name, other)]
        results[name][f"ratio_to_{other}"] = dict(
            ms=statistics.median(ratios),
            ms_quartiles=[ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
            flops=works[name].flops / works[other].flops,
            peak_memory=None if None in peaks else peaks[0] / peaks[1],
        )


def alternate(runs: dict[str, Callable[[], None]], pairs: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each run, taken in turns; two rounds before the first warm up, and compile."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(2 + pairs):
        for name, run in runs.items():
            hardware.synchronize(device)
            start = time.perf_counter()
            run()
            hardware.synchronize(device)
            if i >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    return times


@dataclass(frozen=True)
class Work:
    """What is timed: run() handles `tokens` tokens with `flops` counted FLOPs."""

    run: Callable[[], None]
    tokens: int
    flops: int


class HuggingFace(nn.Module):
    """transformers' model of a dense GPT's shape, with its attention by SDPA and our mean loss in float32."""

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        import transformers

        sizes = dict(vocab_size=c.vocab_size, attn_implementation="sdpa")
        # Llama always rotates: the nearest that transformers has to pos='none', too
        pos = "rope" if c.pos == "none" else c.pos
        if (c.norm, c.norm_order, c.mlp, pos, c.bias) == ("rmsnorm", "pre", "swiglu", "rope", False):
            sizes |= dict(hidden_size=c.n_embd, intermediate_size=c.hidden_dim, num_hidden_layers=c.n_layer)
            sizes |= dict(num_attention_heads=c.n_head, num_key_value_heads=c.kv_heads, head_dim=c.head_dim)
            self.hf = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(**sizes, max_position_embeddings=c.block_size)
            )
            self.layers = self.hf.model.layers
        elif (c.norm, c.norm_order, c.mlp, c.pos, c.bias) == ("layernorm", "pre", "gelu", "learned", True):
            sizes |= dict(n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head, n_inner=c.hidden_dim)
            dropouts = dict(resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=0.0)
            self.hf = transformers.GPT2LMHeadModel(
                transformers.GPT2Config(**sizes, **dropouts, n_positions=c.block_size)
            )
            self.layers = self.hf.transformer.h
        else:
            raise UserError(f"transformers' Llama and GPT-2 have no {c.norm_order}-{c.norm} {c.mlp} pos={c.pos} form")

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = self.hf(idx, use_cache=False).logits
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def compile_as(self, mode: str) -> None:
        for module in {"off": [], "model": [self.hf], "block": self.layers}[mode]:
            module.compile(dynamic=False)


def make_work(c: BenchConfig, name: str, gpt: GPTConfig, device: torch.device) -> Work:
    """One variant's work for c.mode, on random tokens."""
    options = dataclasses.replace(c.train, gpt=gpt)
    world = train.World(rank=0, size=1, device=device)
    with torch.device("meta"):
        counted = GPT(gpt)
    with device:
        model = HuggingFace(gpt) if name == "hf" else GPT(gpt, options.seed)
        idx = torch.randint(gpt.vocab_size, (options.batch_size, gpt.block_size + 1))
    x, y = idx[:, :-1], idx[:, 1:]  # each (B, T)
    forward = counted.flops_per_token() * x.numel()

    def compile_it() -> None:
        if name == "hf":
            model.compile_as(hardware.choose_compile(options.compile, device))
        else:
            train.compile_and_wrap(model, options, world)

    if c.mode == "train":
        compile_it()
        optimizers = optim.make_optimizers(model, options)
        scaler = torch.amp.GradScaler(device.type, enabled=options.dtype == "float16")
        guard = train.Guard(device)

        def step() -> None:
            train.train_step(model, [(x, y)], 1, optimizers, scaler, guard, options, world)

        return Work(step, x.numel(), 3 * forward)

    @torch.no_grad()
    def evaluate() -> None:
        with hardware.autocast(device, options.dtype):
            model(x, y)

    @torch.inference_mode()
    def prefill() -> Any:
        with hardware.autocast(device, options.dtype):
            if name == "hf":
                return model.hf(x, use_cache=True, logits_to_keep=1).past_key_values
            cache = decode.new_cache(model, len(x))
            model(x, cache=cache, last=True)
            return cache

    model.eval()
    if c.mode == "eval":
        compile_it()
        return Work(evaluate, x.numel(), forward)
    if c.mode == "prefill":
        return Work(prefill, x.numel(), forward)
    prompt = gpt.block_size - c.decode_tokens if c.context is None else c.context
    x = x[:, :prompt]
    cache = prefill()

    @torch.inference_mode()
    def draw() -> None:
        if name == "hf":
            cache.crop(prompt - 1 - cache.get_seq_length())  # a negative number is how many go
            how = dict(max_new_tokens=c.decode_tokens, min_new_tokens=c.decode_tokens, do_sample=False)
            with hardware.autocast(device, options.dtype):
                model.hf.generate(x, past_key_values=cache, attention_mask=torch.ones_like(x), **how)
            return
        cache.length = prompt - 1  # all but the prompt's last token
        with hardware.autocast(device, options.dtype):
            for _ in decode.generate(model, x, c.decode_tokens, gpt.vocab_size, temperature=0, cache=cache):
                pass

    tokens = len(x) * c.decode_tokens
    # A new token meets all tokens before it, twice the average of a forward pass over them.
    return Work(draw, tokens, tokens * counted.flops_per_token(2 * prompt + c.decode_tokens))


def tables(c: BenchConfig, variants: dict[str, GPTConfig], results: dict[str, Any]) -> str:
    """The results as columns a person can read: the model, its dense twin, and the ratio."""
    gpt = variants["model"]
    ranks = ", ".join(f"{name} {rank}" for name, rank in dataclasses.asdict(gpt.lowdim).items() if rank) or "none"
    lines = [
        f"{gpt.n_layer} layers, n_embd {gpt.n_embd}, T {gpt.block_size}, vocabulary {gpt.vocab_size:,}, ranks: {ranks}",
        f"{'':32}{'model':>16}{'dense':>16}{'ratio':>9}",
    ]
    for key, dense in results["dense"].items():
        model = results["model"].get(key)
        if not isinstance(model, int | float) or key == "matmul_flops_per_second":
            continue
        shown = [f"{v:,}" if isinstance(v, int) else f"{v:,.3f}" for v in (model, dense)]
        lines.append(f"{key:32}{shown[0]:>16}{shown[1]:>16}{model / dense:9.3f}")
    if c.mode != "count":
        rate = results["model"]["matmul_flops_per_second"]
        for name, other in [("model", "dense"), ("model", "hf"), ("dense", "hf")]:
            if ratio := results[name].get(f"ratio_to_{other}"):
                quartiles = "{:.3f} to {:.3f}".format(*ratio["ms_quartiles"])
                times = f"time {ratio['ms']:.3f} (quartiles {quartiles}, {c.pairs} pairs)"
                lines.append(f"{name} over {other}: {times}, counted FLOPs {ratio['flops']:.3f}")
        lines.append(f"mfu is of {rate / 1e12:.3g} TFLOP/s, measured here on a large {c.train.dtype} matrix product")
    return "\n".join(lines)


if __name__ == "__main__":
    with user_errors():
        main(load_config(sys.argv[1:], BenchConfig, __doc__))
