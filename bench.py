"""Compare a model with its dense twin: counted FLOPs and bytes, measured time and memory.

    python bench.py config/lpa_370m.py --vocab_size=32000 --mode=count          needs no weights in memory
    python bench.py config/lpa_cpu.py --mode=train                              the time of a training step
    python bench.py config/lpa_130m.py --vocab_size=32000 --mode=train --against=dense,hf   also transformers' class
    python bench.py config/lpa_cpu.py --mode=decode --json                      for other programs
    python bench.py config/lpa_cpu.py --mode=train --recompute=latents --against=plain      the cost of recompute
    python bench.py config/lpa_3b.py --mode=plan --gpus=8 --memory=80GB         what fits: see lpa/planning.py

The twin is the same configuration with lowdim = {}, run by the same code with the same flags in the same process. The
two are measured in turns, so that a machine that slows down slows both. Shapes: B batch, T time.
"""

import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

import data
import train
from config import TrainConfig, UserError, load_config, user_errors
from lpa import counts, decode, hardware, optim, planning
from lpa.distributed import DistInfo, parallelize
from lpa.nonfinite import NonFiniteCheck
from lpa.twin import Twin
from model import GPT, GPTConfig, LowDim


@dataclass(frozen=True)
class BenchConfig:
    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    mode: Literal["count", "train", "eval", "prefill", "decode", "plan"] = "count"
    """Counts only; the time of a training step, an evaluation step, the forward pass of a prompt, or decoded tokens; or
    what training needs in memory."""
    against: Literal["dense", "dense,hf", "plain"] = "dense"
    """The dense twin, and with hf also transformers' Llama or GPT-2 class of the twin's shape; or, as plain, the model
    itself with recompute = 'none'."""
    pairs: int = 15
    """Measurements of each variant."""
    decode_tokens: int = 64
    """Tokens per sequence that a measurement of 'decode' draws."""
    context: int | None = None
    """Tokens in the cache before them; None = the rest of block_size."""
    gpus: int = 1
    """plan: how many share the work."""
    memory: str = "80GB"
    """plan: what each GPU has, such as 80GB (10^9 bytes each) or 79.2GiB."""
    json: bool = False
    """Print one JSON object in place of tables."""

    def __post_init__(self) -> None:
        if self.mode in ("prefill", "decode") and self.train.compile in ("model", "block"):
            raise ValueError(f"compile is {self.train.compile!r}, but mode {self.mode!r} runs eager: leave compile out")
        for name in ("pairs", "gpus"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted 1 or more")
        limit = self.train.gpt.block_size
        if self.mode in ("prefill", "decode") and not 0 < self.decode_tokens < limit:
            raise ValueError(f"decode_tokens is {self.decode_tokens}, wanted 1 or more and below block_size = {limit}")
        if self.context is not None and not 0 < self.context <= limit - self.decode_tokens:
            limit -= self.decode_tokens
            raise ValueError(f"context is {self.context}, wanted 1 to block_size - decode_tokens = {limit}")
        if "hf" in self.against and self.train.optimizer != "adamw":
            raise ValueError(f"optimizer is {self.train.optimizer!r}, wanted 'adamw' against transformers")
        if "hf" in self.against and self.train.recompute != "none":
            raise ValueError(f"recompute is {self.train.recompute!r}, wanted 'none' against transformers")
        if self.against == "plain" and self.train.recompute == "none":
            raise ValueError("recompute is 'none', wanted another against plain")


def main(c: BenchConfig) -> None:
    if c.mode == "plan":
        options = dataclasses.replace(c.train, gpt=with_vocabulary(c.train))
        planning.main(options, c.gpus, c.memory, c.json)
        return
    device = hardware.choose_device(c.train.device)
    hardware.keep_freed_memory(device)  # as train.py does
    dtype = hardware.choose_dtype(c.train.dtype, device)
    c = dataclasses.replace(c, train=dataclasses.replace(c.train, dtype=dtype))
    variants = make_variants(c)
    results = {name: counts.count(variant.gpt, variant.dtype, variant.recompute) for name, variant in variants.items()}
    if "hf" in results:
        del results["hf"]["activation_bytes_per_token"]  # counted of our own modules only
    if c.mode != "count":
        try:
            measure(c, variants, results, device)
        except torch.OutOfMemoryError:
            raise UserError(f"batch_size is {c.train.batch_size}, wanted less: out of memory on {device}") from None
    print(json.dumps(results, indent=1) if c.json else counts.comparison(results, variants["model"]))


def make_variants(c: BenchConfig) -> dict[str, TrainConfig]:
    """Return what is compared: the model first, then the others."""
    model = dataclasses.replace(c.train, gpt=with_vocabulary(c.train))
    if c.against == "plain":
        return {"model": model, "plain": dataclasses.replace(model, recompute="none")}
    dense = dataclasses.replace(model, gpt=dataclasses.replace(model.gpt, lowdim=LowDim()))
    theirs = {"hf": dense} if c.against == "dense,hf" and c.mode != "count" else {}
    return {"model": model, "dense": dense} | theirs


def with_vocabulary(c: TrainConfig) -> GPTConfig:
    """Return the model with a vocab_size: as given, else the corpus's, else the paper's 32,000 with a note."""
    if c.gpt.vocab_size is not None:
        return c.gpt
    try:
        data.corpus_folder(c.dataset)
    except UserError:
        print(f"note: {c.dataset} is not prepared; counting with the paper's vocab_size = 32000", file=sys.stderr)
        return dataclasses.replace(c.gpt, vocab_size=32000)
    return train.with_vocabulary(c, data.open_corpus(c.dataset, "train")).gpt


def measure(c: BenchConfig, variants: dict[str, TrainConfig], results: dict[str, Any], device: torch.device) -> None:
    """Add times, rates and peak memory of each variant, and their ratios, to the results."""
    byte_rate, works = hardware.copy_rate(device), {}  # before the models fill the memory
    for name, variant in variants.items():
        hardware.reset_peak_memory(device)
        others = hardware.peak_memory(device)  # what the variants before hold: weights, moments, a cache
        works[name] = make_work(c, name, variant, device)
        for _ in range(1 if c.mode == "decode" else 3):  # compiles, and warms up: decoding does so with its first token
            works[name].run()
        peak = hardware.peak_memory(device)
        results[name]["peak_memory_bytes"] = None if others is None or peak is None else peak - others
    times = alternate({name: work.run for name, work in works.items()}, c.pairs, device)
    # Measured with the kernels that training has installed, and raised by anything faster, so that mfu is at most 1.
    rates = [1000 * work.flops / min(times[name]) for name, work in works.items()]
    flop_rate = max(hardware.matmul_rate(device, c.train.dtype), *rates)
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
    """Return the milliseconds of each run, measured in turns."""
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
    """Something to time: run() handles `tokens` tokens with `flops` counted FLOPs and moves at least `bytes`."""

    run: Callable[[], None]
    tokens: int
    flops: int
    bytes: int


def make_work(c: BenchConfig, name: str, options: TrainConfig, device: torch.device) -> Work:
    """Return one variant's work for c.mode, on random tokens."""
    gpt = options.gpt
    with torch.device("meta"):
        counted = GPT(gpt)
    with device:
        model = Twin(gpt) if name == "hf" else GPT(gpt, options.seed)
        idx = torch.randint(len(counted.lm_head.weight), (options.batch_size, gpt.block_size + 1))
    x, y = idx[:, :-1], idx[:, 1:]  # each (B, T)
    flops, tokens = counted.flops_per_token() * x.numel(), x.numel()
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
        # A new token looks at all tokens before it, twice the average of a forward pass over them.
        flops = tokens * counted.flops_per_token(2 * prompt + c.decode_tokens)
    prompt = gpt.block_size if c.mode == "prefill" else prompt_length(c, gpt)
    place = (hardware.DTYPES[options.dtype], options.batch_size, prompt, c.decode_tokens)
    return Work(run, tokens, flops, counts.least_bytes(counted, c.mode, options.optimizer, *place))


def prompt_length(c: BenchConfig, gpt: GPTConfig) -> int:
    return gpt.block_size - c.decode_tokens if c.context is None else c.context


def speed_up(model: GPT | Twin, options: TrainConfig, info: DistInfo) -> None:
    if isinstance(model, Twin):
        model.compile_as(hardware.choose_compile(options.compile, info.device))
    else:
        parallelize(model, options, info)


def training(
    model: GPT | Twin, x: Tensor, y: Tensor, options: TrainConfig, device: torch.device
) -> Callable[[], None]:
    """Return a step as train.py runs it: forward, backward, clipping, optimizer."""
    info = DistInfo(0, 1, device)
    speed_up(model, options, info)
    optimizers = optim.make_optimizers(model, options)  # pyrefly: ignore (AdamW takes any module)
    scaler = torch.amp.GradScaler(device.type, enabled=options.dtype == "float16")
    check = NonFiniteCheck(device)

    def step() -> None:
        train.train_step(model, [(x, y)], 1, optimizers, scaler, check, options, info)

    return step


def evaluation(
    model: GPT | Twin, x: Tensor, y: Tensor, options: TrainConfig, device: torch.device
) -> Callable[[], None]:
    model.eval()
    speed_up(model, options, DistInfo(0, 1, device))

    @torch.no_grad()
    def evaluate() -> None:
        with hardware.autocast(device, options.dtype):
            model(x, y)

    return evaluate


def to_inference(model: GPT | Twin, dtype: str) -> GPT | Twin:
    """Convert the weights to dtype once; buffers stay as they are."""
    for p in model.parameters():
        p.data = p.data.to(hardware.DTYPES[dtype])
    return model.eval()


def prefill(model: GPT | Twin, x: Tensor, options: TrainConfig) -> Callable[[], Any]:
    """Return a function that reads a prompt x into a new cache and returns it."""
    model = to_inference(model, options.dtype)

    @torch.inference_mode()
    def read() -> Any:
        if isinstance(model, Twin):
            return model.hf(x, use_cache=True, logits_to_keep=1).past_key_values
        cache = decode.new_cache(model, len(x))
        model(x, cache=cache, last=True)
        return cache

    return read


def decoding(model: GPT | Twin, x: Tensor, tokens: int, options: TrainConfig) -> Callable[[], None]:
    """Return a function that draws `tokens` tokens after a prompt x, whose tokens but the last are in the cache."""
    read = prefill(model, x, options)
    if isinstance(model, Twin):
        theirs: Any = read()

        @torch.inference_mode()
        def draw() -> None:
            theirs.crop(x.size(1) - 1 - theirs.get_seq_length())  # a negative number is how many to remove
            how: dict[str, Any] = dict(max_new_tokens=tokens, do_sample=False, attention_mask=torch.ones_like(x))
            model.hf.generate(x, past_key_values=theirs, **how)

        return draw

    cache = decode.new_cache(model, len(x))
    for held in (held for layer in cache.held for held in layer.values()):
        held.normal_()  # a prompt of many rows would take more memory to read than the cache that it leaves

    @torch.inference_mode()
    def draw() -> None:
        cache.length = x.size(1) - 1
        for _ in decode.generate(model, x, tokens, len(model.lm_head.weight), temperature=0, cache=cache):
            pass

    return draw


if __name__ == "__main__":
    with user_errors():
        main(load_config(sys.argv[1:], BenchConfig, __doc__))
