"""Measure what a longer text costs the recurrent transformer and the plain one, from 1K to 64K tokens.

    python -m experiments.recurrent.lengths        writes results/recurrent_lengths.md and .png

Training is on one sequence: the time is that of forward and backward, the memory what a forward pass keeps for
backward. The memory of generation is the State of the recurrent model, and the cache of the plain one.
"""

import datetime
import itertools
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from config import parse, user_errors
from experiments import plot
from experiments.recurrent.model import RecurrentConfig, RecurrentGPT
from lpa import decode, hardware
from lpa.planning import LiveStorages
from model import GPT, GPTConfig

COSTS = ("training, µs per token", "kept for backward, bytes per token", "generation, µs per token", "kept, bytes")
ROUNDS = 3  # the lengths take turns, and the least time counts


@dataclass(frozen=True)
class Options:
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    """Tokens of a sequence, multiples of the window."""
    plain_up_to: int = 8192
    """The longest sequence for the plain transformer, whose time grows as the square."""
    width: int = 64
    window: int = 64
    seconds: float = 1.0
    """To time each case in each round."""
    results: Path = Path("results")


def main(o: Options) -> None:
    device = hardware.choose_device(o.device)
    hardware.keep_freed_memory(device)  # as in training
    shape = dict(n_layer=1, n_head=4, n_embd=o.width, vocab_size=128, pos="rope", norm="layernorm", mlp="gelu")
    c = GPTConfig(**shape, block_size=max(o.lengths) + o.window)
    with device:
        models = {"recurrent": RecurrentGPT(c, RecurrentConfig(o.window)), "plain": GPT(c)}
    costs: dict[str, dict[int, list[float]]] = {name: {} for name in models}
    for _, T, name in itertools.product(range(ROUNDS), sorted(o.lengths), models):
        if name != "plain" or o.plain_up_to >= T:
            found = measure(models[name], T, o, device)
            costs[name][T] = [min(pair) for pair in zip(found, costs[name].get(T, found))]
            print(f"{name}, {T:,} tokens: {found[0]:.1f} µs per token in training, {found[2]:.0f} in generation")
    draw(o, costs)
    rows = [["model", "tokens", *COSTS], ["---"] * 6]
    for name, by_length in costs.items():
        rows += [[name, f"{T:,}", *(f"{value:,.0f}" for value in cost)] for T, cost in by_length.items()]
    text = f"""# The recurrent transformer: lengths

torch {torch.__version__}, {hardware.describe(device)}, {datetime.date.today()}.
Command: `python -m experiments.recurrent.lengths {shlex.join(sys.argv[1:])}`

One layer of width {o.width}, chunks of {o.window} tokens, float32, one sequence.

"""
    text += "\n".join(f"| {' | '.join(row)} |" for row in rows)
    (o.results / "recurrent_lengths.md").write_text(text + "\n\n![time and memory](recurrent_lengths.png)\n")
    print(text)


def measure(model: GPT, T: int, o: Options, device: torch.device) -> list[float]:
    """Return COSTS at T tokens."""
    idx = torch.randint(128, (1, T), device=device)

    def step() -> None:
        model(idx, idx).backward()
        model.zero_grad(set_to_none=True)

    seconds = hardware.fastest(step, device, o.seconds)
    with LiveStorages() as storages:
        loss = model(idx, idx)
    kept = storages.now
    del loss
    if isinstance(model, RecurrentGPT):
        text: Any = model.new_state(1)
        held = [text.before, text.p, text.y, *tensors(text.right), *tensors(text.left)]
    else:
        text = decode.new_cache(model, 1)
        held = [values[:, :, :T] for values in tensors(text)]
    for values in held:
        values.zero_()  # what the text holds does not change the time

    @torch.inference_mode()
    def write() -> None:
        text.length = T
        for _ in range(o.window):
            model(idx[:, :1], cache=text, last=True)

    each = hardware.fastest(write, device, o.seconds) / o.window
    return [1e6 * seconds / T, kept / T, 1e6 * each, sum(values.nbytes for values in held)]


def tensors(cache: decode.KVCache) -> list[Tensor]:
    return [values for layer in cache.held for values in layer.values()]


def draw(o: Options, costs: dict[str, dict[int, list[float]]]) -> None:
    """Draw seconds and bytes of a full sequence against its length on logarithmic axes, where slope 1 is linear."""
    figure, (axes,) = plot.new_figure(11, 4.6, columns=2)
    for number, (name, by_length) in enumerate(costs.items()):
        seconds = [T * cost[0] / 1e6 for T, cost in by_length.items()]
        axes[0].plot(list(by_length), seconds, label=name, **plot.style(number))
        axes[1].plot(list(by_length), [cost[3] for cost in by_length.values()], label=name, **plot.style(number))
    axes[0].set(ylabel="training: s per sequence, forward and backward")
    axes[1].set(ylabel="generation: bytes kept between two tokens")
    for ax in axes:
        ax.set(xscale="log", yscale="log", xlabel="tokens")
    plot.add_legend(figure, axes[0])
    plot.save(figure, o.results / "recurrent_lengths")


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
