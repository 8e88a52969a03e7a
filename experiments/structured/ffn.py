"""Do structured feed-forwards pay? Their time against dense, and what a small model learns with them, guided or not.

    python -m experiments.structured_ffn --part=speed         a feed-forward, training and decoding, merged ahead or not
    python -m experiments.structured_ffn --part=throughput    tokens a second of wide and structured models, and of GQA
    python -m experiments.structured_ffn --part=train         perplexity of dense and the three kinds, and loss spikes
    python -m experiments.structured_ffn --part=scaling       loss against training FLOPs at three sizes, and its slope
    python -m experiments.structured_ffn --part=draws         the guide drawn for a step, or for each layer
    python -m experiments.structured_ffn --part=init          the start and rates of Qiu et al. (arXiv 2406.06248)
    python -m experiments.structured_ffn --part=scaling --dry_run     what it would train

Writes results/structured_ffn_PART.md and pictures beside it. What trains goes below out/structured_ffn/, so it may be
stopped and run again (experiments/structured_runs.py).

Shapes: C width, 4 C hidden, N tokens, K blocks, B batch.
"""

import datetime
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from experiments.structured_runs import RunOptions, kind_at, share
from torch import Tensor, nn

import bench
from config import TrainConfig, load_config, parse, user_errors
from experiments import plot, structured_runs
from lpa import decode, hardware, structured
from model import GPT, Dense, LowRank


@dataclass(frozen=True)
class Options:
    part: Literal["speed", "throughput", "train", "scaling", "draws", "init"] = "speed"
    runs: Annotated[RunOptions, tyro.conf.arg(name="")] = field(default_factory=RunOptions)
    widths: tuple[int, ...] = (768, 2048)
    """speed: C, a multiple of 16. Published: 768 to 6144."""
    tokens: tuple[int, ...] = (1, 4096)
    """speed: tokens of a call; one of 1 to 4 is timed forward alone, as decoding is. Published: up to 30,000."""
    few: tuple[int, ...] = (1, 4, 16, 64)
    """speed: tokens of a decoding step, timed with and without the dense matrix merged ahead."""
    rounds: int = 5
    """speed: the kinds take turns; the median of their ratios to dense counts."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """speed, throughput."""
    generate: int = 256
    """throughput: tokens of each sequence, as published."""
    gigabytes: float | None = None
    """throughput: weights and cache take at most so much; None = 0.9 of a GPU's memory, or 8 on a CPU."""
    largest_batch: int | None = None
    """throughput: no batch beyond this one; None = as memory allows."""
    presets: tuple[str, ...] = ("gqa_m", "wide_structured_m", "gqa_l", "wide_structured_l")
    """throughput: each pair of a plain preset and the one held against it."""


def main(o: Options) -> None:
    if o.part == "speed":
        lines = speed(o)
    elif o.part == "throughput":
        lines = throughput(o)
    else:
        planned, report = structured_runs.PARTS[o.part]
        if o.runs.dry_run:
            print(structured_runs.listing(planned(o.runs)))
            return
        lines = report(o.runs, {run: structured_runs.trained(run) for run in planned(o.runs)})
    on = hardware.describe(hardware.choose_device())
    head = [f"# Structured feed-forwards: {o.part}\n", f"torch {torch.__version__}, {on}, {datetime.date.today()}."]
    head.append(f"Command: `python -m experiments.structured_ffn {shlex.join(sys.argv[1:])}`\n")
    text = "\n".join([*head, *lines]) + "\n"
    Path("results").mkdir(exist_ok=True)
    name = o.runs.name if o.part == "train" else o.part
    Path(f"results/structured_ffn_{name}.md").write_text(text)
    print(text)


# --- Speed ---------------------------------------------------------------------------------------------------------

Ratios = dict[tuple[str, int, int], float]  # of the time of 'low rank 32 %' to dense's, by that name, C and N


def speed(o: Options) -> list[str]:
    device, ratios = hardware.choose_device(), {}
    if device.type == "cpu":
        hardware.keep_freed_memory()  # as train.py does
    lines = ["Up and down with nothing between; forward and backward, or forward alone for 1 to 4 tokens."]
    lines += ["Milliseconds; in brackets how many times as fast as dense. einsum: blocks' products by torch.einsum.\n"]
    lines += [f"| C | tokens | | dense | {' | '.join(columns(o))} |", "|---" * (4 + len(columns(o))) + "|"]
    for C in o.widths:
        for N in o.tokens:
            for part in o.runs.parts:
                times = bench.alternate(calls(C, N, part, o, device), o.rounds, device)
                cells = [f"{statistics.median(times['dense']) / copies(C, N):.3g}"]
                for name in columns(o):
                    ratio = statistics.median(a / b for a, b in zip(times["dense"], times[name]))
                    ratios[f"{name} {share(part)}", C, N] = 1 / ratio
                    cells.append(f"{statistics.median(times[name]) / copies(C, N):.3g} ({ratio:.2f})")
                lines.append(f"| {C} | {N} | {share(part)} | {' | '.join(cells)} |")
                print(lines[-1], flush=True)
    draw_speed(o, {key: ratio for key, ratio in ratios.items() if "einsum" not in key[0]})
    return [*lines, "\n![time over dense](structured_ffn_speed.png)\n", *decoding(o, device)]


def columns(o: Options) -> list[str]:
    return [name for kind in o.runs.kinds for name in (kind, *([f"{kind}, einsum"] if kind != "low rank" else []))]


def copies(C: int, N: int) -> int:
    """How many feed-forwards a call goes through: 2**24 numbers of dense ones, which no cache keeps, or fewer where
    many tokens make that long."""
    return max(1, min(2**24 // (8 * C * C), 2**28 // (8 * C * C * N)))


def calls(C: int, N: int, part: int, o: Options, device: torch.device) -> dict[str, Callable[[], None]]:
    """What is timed of each kind."""
    x = torch.randn(N, C, device=device, requires_grad=True)
    runs = {}
    for name in ("dense", *columns(o)):
        kind, _, form = name.partition(", ")
        pairs = feed_forwards(0 if kind == "dense" else kind_at(kind, C, part), C, copies(C, N), device)
        runs[name] = timed(einsum if form else call, pairs, x, o, device, learning=N > 4)
    return runs


def feed_forwards(kind: int | str, C: int, number: int, device: torch.device) -> list[tuple[nn.Module, nn.Module]]:
    return [(make(kind, C, 4 * C, device), make(kind, 4 * C, C, device)) for _ in range(number)]


def make(kind: int | str, d_in: int, d_out: int, device: torch.device) -> nn.Module:
    with device:
        if isinstance(kind, str):
            layer = structured.make(kind, d_in, d_out, bias=False)
        else:
            layer = LowRank(d_in, d_out, kind, bias=False) if kind else Dense(d_in, d_out, bias=False)
    for p in layer.parameters():
        nn.init.normal_(p, 0, 0.02)
    return layer


def call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def einsum(layer: nn.Module, x: Tensor) -> Tensor:
    h = torch.einsum("nkp,kqp->nkq", x.unflatten(-1, (layer.blocks, -1)), layer.A)  # (N, K, Q)
    if isinstance(layer, structured.BlockDense):
        return layer.widen(h.flatten(1))
    dealt = h.flatten(1).unflatten(1, (-1, layer.blocks))
    return torch.einsum("npk,kqp->nqk", dealt, layer.B).flatten(1)


def timed(
    form: Callable[[nn.Module, Tensor], Tensor],
    pairs: list[tuple[nn.Module, nn.Module]],
    x: Tensor,
    o: Options,
    device: torch.device,
    learning: bool,
) -> Callable[[], None]:
    """A run through all pairs of up and down, each of them from the same x (N, C); learning: backward, too."""

    def run() -> None:
        with torch.set_grad_enabled(learning):
            for up, down in pairs:
                with hardware.autocast(device, o.dtype):
                    y = form(down, form(up, x))
                if learning:
                    y.backward(y.detach())

    return run


def draw_speed(o: Options, ratios: Ratios) -> None:
    """Time over dense, against the width at the most tokens, and against the tokens at the largest width."""
    figure, (axes,) = plot.new_figure(11, 4.8, columns=2, sharey="row")
    most, widest = max(o.tokens), max(o.widths)
    for number, name in enumerate(dict.fromkeys(name for name, *_ in ratios)):
        axes[0].plot(o.widths, [ratios[name, C, most] for C in o.widths], label=name, **plot.style(number))
        axes[1].plot(o.tokens, [ratios[name, widest, N] for N in o.tokens], label=name, **plot.style(number))
    axes[0].set(ylabel="time over dense", xlabel=f"width C, at {most:,} tokens", xticks=o.widths)
    axes[1].set(xlabel=f"tokens of a call, at width {widest}", xticks=o.tokens)
    for ax, values in zip(axes, (o.widths, o.tokens)):
        ax.axhline(1, color="0.5", linewidth=1)
        ax.set(xscale="log", ylim=(0, None), xticks=values, xticklabels=[f"{value:,}" for value in values])
        ax.minorticks_off()
    plot.add_legend(figure, axes[0])
    plot.save(figure, Path("results/structured_ffn_speed"))


def decoding(o: Options, device: torch.device) -> list[str]:
    """A table of one decoding step, forward alone, with the factors, and as decode.premerge leaves the layers."""
    part, kinds = o.runs.parts[-1], o.runs.kinds
    lines = [f"A decoding step through up and down at {share(part)}: time over dense with the factors, and with them"]
    lines += ["merged ahead where that was measured to be faster: up to so many tokens, of up and of down.\n"]
    titles = [f"{kind}{form}" for kind in kinds for form in ("", " merged", " up to")]
    lines += [f"| C | tokens | dense ms | {' | '.join(titles)} |", "|---" * (3 + len(titles)) + "|"]
    for C in o.widths:
        pairs = {"dense": feed_forwards(0, C, copies(C, 1), device)}
        few = {}
        for kind in kinds:
            pairs[kind] = feed_forwards(kind_at(kind, C, part), C, copies(C, 1), device)
            pairs[f"{kind} merged"], few[kind] = merged(pairs[kind], o, device)
        for N in o.few:
            x = torch.randn(N, C, device=device)
            runs = {name: timed(call, of_name, x, o, device, learning=False) for name, of_name in pairs.items()}
            times = bench.alternate(runs, o.rounds, device)
            cells = [f"{statistics.median(times['dense']) / copies(C, 1):.3g}"]
            for kind in kinds:
                for name in (kind, f"{kind} merged"):
                    cells.append(f"{statistics.median(b / a for a, b in zip(times['dense'], times[name])):.2f}")
                cells.append(few[kind])
            lines.append(f"| {C} | {N} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    return lines


def merged(
    pairs: list[tuple[nn.Module, nn.Module]], o: Options, device: torch.device
) -> tuple[list[tuple[nn.Module, nn.Module]], str]:
    """The pairs as decode.premerge would leave them, and the tokens that it finds few."""
    beside = []
    with torch.no_grad(), hardware.autocast(device, o.dtype):
        for layers in zip(*pairs):
            wrapped = [decode.Merged(layer) for layer in layers]
            few = decode.few_tokens(wrapped)
            for layer in wrapped:
                layer.few = few
            beside.append(wrapped)
    return list(zip(*beside)), ", ".join(str(layers[0].few) for layers in beside)


# --- Throughput ----------------------------------------------------------------------------------------------------


def throughput(o: Options) -> list[str]:
    """Tokens a second at batches that double until memory is full, and the most of them, of each preset."""
    device = hardware.choose_device()
    lines = [f"{o.generate} tokens of each sequence, greedy, from one token on; weights drawn at random, in {o.dtype}."]
    lines += [f"Weights and cache within {budget(o, device) / 1e9:.1f} GB; batches 1, 2, 4, ...\n"]
    lines += ["| preset | parameters | tokens/s by batch | most | at batch | over the preset above |", "|---" * 6 + "|"]
    best: dict[str, float] = {}
    for number, preset in enumerate(o.presets):
        rates = throughputs(o, preset, device)
        batch = max(rates, key=lambda b: rates[b])
        best[preset] = rates[batch]
        over = f"{rates[batch] / best[o.presets[number - 1]] - 1:+.1%}" if number % 2 else ""
        shown = ", ".join(f"{b}: {rate:,.0f}" for b, rate in rates.items())
        count = n_params(o, preset)
        lines.append(f"| {preset} | {count / 1e6:.1f}M | {shown} | {rates[batch]:,.0f} | {batch} | {over} |")
        print(lines[-1], flush=True)
    return [*lines, "\nPublished, A100: m 84,202 and 91,147 (+8 %), l 64,737 and 75,930 (+17 %)."]


def budget(o: Options, device: torch.device) -> float:
    if o.gigabytes is not None:
        return 1e9 * o.gigabytes
    return 0.9 * torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 8e9


def model_options(o: Options, preset: str) -> TrainConfig:
    flags = ["--vocab_size=32000", f"--block_size={o.generate + 1}", f"--dtype={o.dtype}"]
    return load_config([f"config/{preset}.py", *flags])


def n_params(o: Options, preset: str) -> int:
    with torch.device("meta"):
        return GPT(model_options(o, preset).gpt).n_params()


def throughputs(o: Options, preset: str, device: torch.device) -> dict[int, float]:
    """Batch -> tokens a second, of the batches that fit; the first token of all warms up."""
    options, size = model_options(o, preset), hardware.DTYPES[o.dtype].itemsize
    with device:
        model = bench.served(GPT(options.gpt, options.seed), o.dtype)
    a_sequence = size * decode.cache_numbers_per_token(options.gpt) * options.gpt.block_size
    rates, batch = {}, 1
    while size * model.n_params() + batch * a_sequence <= budget(o, device):
        if o.largest_batch is not None and batch > o.largest_batch:
            break
        x = torch.zeros(batch, 1, dtype=torch.long, device=device)
        try:
            bench.decoding(model, x, 1, options)()
            draw = bench.decoding(model, x, o.generate, options)
            hardware.synchronize(device)
            start = time.perf_counter()
            draw()
            hardware.synchronize(device)
        except torch.OutOfMemoryError:
            break
        rates[batch] = batch * o.generate / (time.perf_counter() - start)
        print(f"{preset}, batch {batch}: {rates[batch]:,.0f} tokens/s", flush=True)
        batch *= 2
    return rates


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
