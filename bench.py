"""A model against its dense twin: counted FLOPs and bytes, measured time and memory.

    python bench.py config/lpa_370m.py --vocab_size=32000 --mode=count          needs no weights in memory
    python bench.py config/lpa_cpu.py --mode=train                              a training step, alternating
    python bench.py config/lpa_130m.py --vocab_size=32000 --mode=train --against=dense,hf   transformers' class, too
    python bench.py config/lpa_cpu.py --mode=decode --json                      for other programs
    python bench.py config/lpa_cpu.py --mode=decode --premerge                  factors merged where that is faster
    python bench.py config/lpa_cpu.py --mode=train --recompute=latents --against=plain      what recomputing costs
    python bench.py config/lpa_3b.py --mode=plan --gpus=8 --memory=80GB         what fits: see planning.py
    python bench.py --mode=suite                                                the standing list, into results/

The twin is the same configuration with lowdim = {}, run by the same code with the same flags in the same process; the
two take turns, so that a machine that slows down slows both. Shapes: B batch, T time.
"""

import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from lpa.guard import Guard
from torch import Tensor, nn

import data
import train
from config import TrainConfig, UserError, load_config, user_errors
from lpa import decode, hardware, optim, planning
from lpa.distributed import World, spread
from model import GPT, GPTConfig, LowDim


@dataclass(frozen=True)
class BenchConfig:
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    mode: Literal["count", "train", "eval", "prefill", "decode", "plan", "suite"] = "count"
    """Counts only, or the time of a training step, an evaluation step, a prompt's forward pass, a decoded token; or
    what training needs in memory; or all that suite.py lists."""
    against: Literal["dense", "dense,hf", "plain"] = "dense"
    """The dense twin, and with hf also transformers' Llama or GPT-2 class of the twin's shape; or, as plain, the model
    itself with recompute = 'none'."""
    pairs: int = 15
    """Measurements of each variant, in turns."""
    decode_tokens: int = 64
    """Tokens that a measurement of 'decode' draws."""
    premerge: bool = False
    """In 'prefill' and 'decode' form the dense matrices of factored layers where that is faster, as sample.py does."""
    context: int | None = None
    """Tokens that are in the cache before; None = the rest of block_size."""
    gpus: int = 1
    """Of 'plan': how many share the work."""
    memory: str = "80GB"
    """Of 'plan': what each GPU has, such as 80GB (10^9 bytes each) or 79.2GiB."""
    json: bool = False
    """Print one JSON object in place of tables."""
    suite_dir: str = "results"
    """Where 'suite' writes what it measured."""

    def __post_init__(self) -> None:
        if self.mode in ("prefill", "decode") and self.train.compile in ("model", "block"):
            raise ValueError(f"compile is {self.train.compile!r}, but mode {self.mode!r} runs eager: leave compile out")
        if self.premerge and self.mode not in ("prefill", "decode"):
            raise ValueError(f"premerge is True, wanted False for mode {self.mode!r}")
        for name in ("pairs", "gpus"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted 1 or more")
        limit = self.train.gpt.block_size
        if self.mode in ("prefill", "decode") and not 0 < self.decode_tokens < limit:
            raise ValueError(f"decode_tokens is {self.decode_tokens}, wanted 1 or more and below block_size = {limit}")
        if self.context is not None and not 0 < self.context <= limit - self.decode_tokens:
            limit -= self.decode_tokens
            raise ValueError(f"context is {self.context}, wanted 1 to block_size - decode_tokens = {limit}")
        if self.train.self_guided:
            raise ValueError(f"self_guided is {self.train.self_guided}, wanted 0: bench.py has no guides")
        if self.mode == "suite" and self.train != TrainConfig(device=self.train.device):
            raise ValueError("mode is 'suite', a standing list: wanted no preset and no options but device, suite_dir")
        if "hf" in self.against and self.train.optimizer != "adamw":
            raise ValueError(f"optimizer is {self.train.optimizer!r}, wanted 'adamw' against transformers")
        if "hf" in self.against and self.train.recompute != "none":
            raise ValueError(f"recompute is {self.train.recompute!r}, wanted 'none' against transformers")
        if self.train.model != "gpt":
            raise ValueError(f"model is {self.train.model!r}, wanted 'gpt'; for the other see experiments/recurrent.py")
        if self.against == "plain" and self.train.recompute == "none":
            raise ValueError("recompute is 'none', wanted 'latents' or 'block' against plain")


def main(c: BenchConfig) -> None:
    if c.mode == "plan":
        options = dataclasses.replace(c.train, gpt=with_vocabulary(c.train))
        planning.main(options, c.gpus, c.memory, c.json)
        return
    device = hardware.choose_device(c.train.device)
    if c.mode == "suite":
        import suite

        suite.main(Path(c.suite_dir), c.train.device, device)
        return
    if device.type == "cpu":
        hardware.keep_freed_memory()  # as train.py does
    dtype = hardware.choose_dtype(c.train.dtype, device)
    c = dataclasses.replace(c, train=dataclasses.replace(c.train, dtype=dtype))
    variants = make_variants(c)
    results = {name: count(variant.gpt, variant.dtype, variant.recompute) for name, variant in variants.items()}
    if "hf" in results:
        del results["hf"]["activation_bytes_per_token"]  # counted of our own modules only
    if c.mode != "count":
        try:
            measure(c, variants, results, device)
        except torch.OutOfMemoryError:
            raise UserError(f"batch_size is {c.train.batch_size}, wanted less: out of memory on {device}") from None
    print(json.dumps(results, indent=1) if c.json else tables(c, variants["model"].gpt, results))


def make_variants(c: BenchConfig) -> dict[str, TrainConfig]:
    """What is compared: the model first, then what it is held against."""
    model = dataclasses.replace(c.train, gpt=with_vocabulary(c.train))
    if c.against == "plain":
        return {"model": model, "plain": dataclasses.replace(model, recompute="none")}
    dense = dataclasses.replace(model, gpt=dense_twin(model.gpt))
    hf = {"hf": dense} if c.against == "dense,hf" and c.mode != "count" else {}
    return {"model": model, "dense": dense, **hf}


def dense_twin(c: GPTConfig) -> GPTConfig:
    return dataclasses.replace(c, lowdim=LowDim())


def with_vocabulary(c: TrainConfig) -> GPTConfig:
    """vocab_size as given, else the corpus's, else the paper's 32,000 with a note."""
    if c.gpt.vocab_size is not None:
        return c.gpt
    try:
        data.corpus_folder(c.dataset)
    except UserError:
        print(f"note: {c.dataset} is not prepared; counting with the paper's vocab_size = 32000", file=sys.stderr)
        return dataclasses.replace(c.gpt, vocab_size=32000)
    return train.with_vocabulary(c, data.open_corpus(c.dataset, "train")).gpt


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
        activation_bytes_per_token=planning.activation_bytes_per_token(c, dtype, recompute),
        kv_bytes_per_token=2 * decode.cache_numbers_per_token(c),  # in bf16
    )


def measure(c: BenchConfig, variants: dict[str, TrainConfig], results: dict[str, Any], device: torch.device) -> None:
    """Add times, rates and peak memory of each variant, and their ratios, to the results."""
    flop_rate, byte_rate = hardware.matmul_rate(device, c.train.dtype), hardware.copy_rate(device)
    works = {}
    for name, variant in variants.items():
        hardware.reset_peak_memory(device)
        others = hardware.peak_memory(device)  # what the variants before hold: weights, moments, a cache
        works[name] = make_work(c, name, variant, device)
        for _ in range(1 if c.mode == "decode" else 3):  # compiles, and warms up: decoding does so at its first token
            works[name].run()
        peak = hardware.peak_memory(device)
        results[name]["peak_memory_bytes"] = None if others is None or peak is None else peak - others
    times = alternate({name: work.run for name, work in works.items()}, c.pairs, device)
    for name, work in works.items():
        ms = statistics.median(times[name])
        least = 1000 * max(work.flops / flop_rate, work.bytes / byte_rate)
        results[name] |= dict(ms_median=ms, ms_min=min(times[name]), ms_max=max(times[name]))
        results[name] |= dict(tokens_per_second=1000 * work.tokens / ms, mfu=1000 * work.flops / ms / flop_rate)
        results[name] |= dict(roofline_ms=least, roofline_share=least / ms)
        results[name] |= dict(matmul_flops_per_second=flop_rate, copy_bytes_per_second=byte_rate)
    for name, other in itertools.combinations(works, 2):
        ratios = sorted(a / b for a, b in zip(times[name], times[other]))
        peaks = [results[n]["peak_memory_bytes"] for n in (name, other)]
        results[name][f"ratio_to_{other}"] = dict(
            ms=statistics.median(ratios),
            ms_quartiles=[ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
            flops=works[name].flops / works[other].flops,
            peak_memory=None if None in peaks else peaks[0] / peaks[1],
        )


def alternate(runs: dict[str, Callable[[], None]], pairs: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each run, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(pairs):
        for name, run in runs.items():
            hardware.synchronize(device)
            start = time.perf_counter()
            run()
            hardware.synchronize(device)
            times[name].append(1000 * (time.perf_counter() - start))
    return times


@dataclass(frozen=True)
class Work:
    """What is timed: run() handles `tokens` tokens with `flops` counted FLOPs and moves at least `bytes`."""

    run: Callable[[], None]
    tokens: int
    flops: int
    bytes: int


class HuggingFace(nn.Module):
    """transformers' model of a dense GPT's shape: LlamaForCausalLM, or GPT2LMHeadModel where c has GPT-2's options.

    All else is as our models have it. Training and evaluation: weights and AdamW's moments in float32, autocast to the
    same dtype, attention by SDPA, our mean cross entropy of float32 logits, the same train_step with its clipping and
    fused AdamW, the same compile mode (by block: its decoder layers). Prefill and decoding: weights in the same dtype,
    logits of the last token alone, its default cache and generate(), greedy and without an end-of-text token to look
    for. What stays its own: under autocast its residual stream is float32, as embeddings and additions are, where ours
    is of dtype; and Llama rotates also where pos = 'none', for it has no form without.
    """

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        try:
            import transformers
        except ImportError:
            raise UserError("comparing with transformers needs it: pip install 'transformers>=4.56,<6'") from None
        sizes: dict[str, Any] = dict(vocab_size=c.vocab_size, attn_implementation="sdpa", bos_token_id=None)
        sizes |= dict(tie_word_embeddings=c.tie_embeddings, eos_token_id=None)
        kind = (c.norm, c.norm_order, c.mlp, "rope" if c.pos == "none" else c.pos, c.bias)
        if c.qk_norm or c.rope_dim is not None:
            raise UserError("transformers' Llama and GPT-2 have no qk_norm and no rope_dim")
        if kind == ("rmsnorm", "pre", "swiglu", "rope", False):
            sizes |= dict(hidden_size=c.n_embd, intermediate_size=c.hidden_dim, num_hidden_layers=c.n_layer)
            sizes |= dict(num_attention_heads=c.n_head, num_key_value_heads=c.kv_heads, head_dim=c.head_dim)
            self.hf = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(**sizes, max_position_embeddings=c.block_size)
            )
            self.layers = self.hf.model.layers
        elif kind == ("layernorm", "pre", "gelu", "learned", True):
            sizes |= dict(n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head, n_inner=c.hidden_dim)
            sizes |= dict(resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=0.0)
            self.hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, n_positions=c.block_size))
            self.layers = self.hf.transformer.h
        else:
            raise UserError(f"transformers' Llama and GPT-2 have no {c.norm_order}-{c.norm} {c.mlp} pos={c.pos} form")

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = self.hf(idx, use_cache=False).logits
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def compile_as(self, mode: str) -> None:
        for module in {"off": [], "model": [self.hf], "block": self.layers}[mode]:
            module.compile(dynamic=False)


def make_work(c: BenchConfig, name: str, options: TrainConfig, device: torch.device) -> Work:
    """One variant's work for c.mode, on random tokens."""
    gpt = options.gpt
    with torch.device("meta"):
        counted = GPT(gpt)
    with device:
        model = HuggingFace(gpt) if name == "hf" else GPT(gpt, options.seed)
        idx = torch.randint(len(counted.lm_head.weight), (options.batch_size, gpt.block_size + 1))
    x, y = idx[:, :-1], idx[:, 1:]  # each (B, T)
    flops, tokens = counted.flops_per_token() * x.numel(), x.numel()
    if c.premerge and name == "model" and isinstance(model, GPT):
        served(model, options.dtype)
        print("\n".join(decode.premerge(model)), file=sys.stderr)
    if c.mode == "train":
        run = training(model, x, y, options, device)
        flops *= 3
    elif c.mode == "eval":
        run = evaluation(model, x, y, options, device)
    elif c.mode == "prefill":
        run = prefill(model, x, options)
    else:
        prompt = prompt_length(c, gpt)
        run = decoding(model, x[:, :prompt], c.decode_tokens, options)
        tokens = len(x) * c.decode_tokens
        # A new token meets all tokens before it, twice the average of a forward pass over them.
        flops = tokens * counted.flops_per_token(2 * prompt + c.decode_tokens)
    return Work(run, tokens, flops, least_bytes(c, counted, options))


def least_bytes(c: BenchConfig, counted: GPT, options: TrainConfig) -> int:
    """Bytes that the work of c.mode must read or write in memory, whoever does it; activations are left out.

    train    float32: each weight read in forward and again in backward, each gradient written and read, each weight
             and its moments (two of AdamW, at least one of Muon) read and written by the optimizer
    eval     float32: each weight read
    prefill  in dtype: each weight read, and the prompt's cache written
    decode   in dtype, for each of decode_tokens tokens of a sequence: each weight read, and all of its cache
    Weights that are read are those of products and norms: of an embedding table a step looks up few rows.
    """
    params = counted.n_params()
    tables = {m.weight for m in counted.modules() if isinstance(m, nn.Embedding)} - {counted.lm_head.weight}
    read = params - sum(p.numel() for p in tables)
    if c.mode == "train":
        moments = 2 if options.optimizer == "adamw" else 1
        return 4 * (2 * read + 2 * params + 2 * (1 + moments) * params)
    if c.mode == "eval":
        return 4 * read
    size = hardware.DTYPES[options.dtype].itemsize
    cached = options.batch_size * decode.cache_numbers_per_token(counted.config)  # numbers of a token in each row
    if c.mode == "prefill":
        return size * (read + cached * counted.config.block_size)
    prompt, tokens = prompt_length(c, counted.config), c.decode_tokens
    return size * (tokens * read + cached * (tokens * prompt + tokens * (tokens + 1) // 2))


def prompt_length(c: BenchConfig, gpt: GPTConfig) -> int:
    return gpt.block_size - c.decode_tokens if c.context is None else c.context


def compile_it(model: GPT | HuggingFace, options: TrainConfig, world: World) -> None:
    if isinstance(model, HuggingFace):
        model.compile_as(hardware.choose_compile(options.compile, world.device))
    else:
        spread(model, options, world)


def training(
    model: GPT | HuggingFace, x: Tensor, y: Tensor, options: TrainConfig, device: torch.device
) -> Callable[[], None]:
    """A whole step as train.py runs it: forward, backward, clipping, optimizer."""
    world = World(0, 1, device)
    compile_it(model, options, world)
    optimizers = optim.make_optimizers(model, options)  # pyrefly: ignore (AdamW takes any module)
    scaler = torch.amp.GradScaler(device.type, enabled=options.dtype == "float16")
    guard = Guard(device)

    def step() -> None:
        train.train_step(model, [(x, y)], 1, optimizers, scaler, guard, options, world)

    return step


def evaluation(
    model: GPT | HuggingFace, x: Tensor, y: Tensor, options: TrainConfig, device: torch.device
) -> Callable[[], None]:
    model.eval()
    compile_it(model, options, World(0, 1, device))

    @torch.no_grad()
    def evaluate() -> None:
        with hardware.autocast(device, options.dtype):
            model(x, y)

    return evaluate


def served(model: GPT | HuggingFace, dtype: str) -> GPT | HuggingFace:
    """Ready to answer: the weights in dtype, once and for all; buffers, such as the rotations, as they are."""
    for p in model.parameters():
        p.data = p.data.to(hardware.DTYPES[dtype])
    return model.eval()


def prefill(model: GPT | HuggingFace, x: Tensor, options: TrainConfig) -> Callable[[], Any]:
    """Reading a prompt x into a new cache, which run() returns."""
    model = served(model, options.dtype)

    @torch.inference_mode()
    def read() -> Any:
        if isinstance(model, HuggingFace):
            return model.hf(x, use_cache=True, logits_to_keep=1).past_key_values
        cache = decode.new_cache(model, len(x))
        model(x, cache=cache, last=True)
        return cache

    return read


def decoding(model: GPT | HuggingFace, x: Tensor, tokens: int, options: TrainConfig) -> Callable[[], None]:
    """Drawing so many tokens after a prompt x, all but the last token of which is in the cache."""
    read = prefill(model, x, options)
    if isinstance(model, HuggingFace):
        theirs: Any = read()
        hf: Any = model.hf

        @torch.inference_mode()
        def draw() -> None:
            theirs.crop(x.size(1) - 1 - theirs.get_seq_length())  # a negative number is how many go
            how: dict[str, Any] = dict(max_new_tokens=tokens, do_sample=False, attention_mask=torch.ones_like(x))
            hf.generate(x, past_key_values=theirs, **how)

        return draw

    cache = decode.new_cache(model, len(x))
    for held in cache.held.values():
        held.normal_()  # a prompt of many rows would take more memory to read than the cache that it leaves

    @torch.inference_mode()
    def draw() -> None:
        cache.length = x.size(1) - 1
        for _ in decode.generate(model, x, tokens, len(model.lm_head.weight), temperature=0, cache=cache):
            pass

    return draw


def tables(c: BenchConfig, gpt: GPTConfig, results: dict[str, Any]) -> str:
    """The results as columns a person can read: the model, what it is held against first, and the ratio."""
    ranks = ", ".join(f"{name} {rank}" for name, rank in dataclasses.asdict(gpt.lowdim).items() if rank) or "none"
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
    if c.mode != "count":
        for name, other in itertools.combinations(results, 2):
            ratio = results[name][f"ratio_to_{other}"]
            quartiles = "{:.3f} to {:.3f}".format(*ratio["ms_quartiles"])
            times = f"time {ratio['ms']:.3f} (quartiles {quartiles}, {c.pairs} pairs)"
            lines.append(f"{name} over {other}: {times}, counted FLOPs {ratio['flops']:.3f}")
        rates = [model["matmul_flops_per_second"] / 1e12, model["copy_bytes_per_second"] / 1e9]
        lines.append(f"mfu is of {rates[0]:.3g} TFLOP/s, measured here on a large {c.train.dtype} matrix product")
        lines.append(f"roofline: the counted FLOPs at that rate or the bytes at that of a copy, {rates[1]:.3g} GB/s")
    return "\n".join(lines)


if __name__ == "__main__":
    with user_errors():
        main(load_config(sys.argv[1:], BenchConfig, __doc__))
