"""Measure how fast the feed-forwards of arXiv 2406.16450 are, and how fast its models generate text.

    python -m experiments.structured.speed                      up and down, forward and backward, by kind and width
    python -m experiments.structured.speed --part=throughput    tokens per second of wide and structured models, of GQA

Writes results/structured_ffn_PART.md. Shapes: C width, 4 C hidden, N tokens.
"""

import datetime
import shlex
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

import bench
from config import load_config, parse, user_errors
from experiments.sweep import write_page
from lpa import cpu, hardware
from model import GPT, GPTConfig, LowDim, projection

PRESETS = ("gqa_m", "wide_structured_m", "gqa_l", "wide_structured_l")  # pairs: a plain one, then a structured one


@dataclass(frozen=True)
class Options:
    part: Literal["speed", "throughput"] = "speed"
    dtype: Literal["float32", "bfloat16"] = "float32"
    widths: tuple[int, ...] = (768, 2048)
    """speed: C, a multiple of 16. Published: 768 to 6144."""
    tokens: tuple[int, ...] = (1, 4096)
    """speed: tokens of a call; with 1 to 4 only the forward pass is timed, as in decoding. Published: up to 30,000."""
    rounds: int = 5
    """speed: measure the kinds in turns so many times, and take the median of their ratios to dense."""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    """throughput: sequences at once; stop when memory is full."""
    generate: int = 256
    """throughput: tokens of each sequence, as published."""
    out: Path = Path("results")


def main(o: Options) -> None:
    device = hardware.choose_device()
    hardware.keep_freed_memory(device)  # as train.py does
    if device.type == "cpu":
        cpu.install(load_config([f"--n_embd={max(o.widths)}", "--n_head=1", f"--dtype={o.dtype}"]))
    on = f"torch {torch.__version__}, {hardware.describe(device)}, {datetime.date.today()}, {o.dtype}."
    command = f"python -m experiments.structured.speed {shlex.join(sys.argv[1:])}".rstrip()
    lines = [f"# Structured feed-forwards: {o.part}\n", on, f"Command: `{command}`\n"]
    lines += speed(o, device) if o.part == "speed" else throughput(o, device)
    write_page(o.out / f"structured_ffn_{o.part}.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


def kinds(C: int, part: int) -> dict[str, int | str]:
    """Return each kind at 1.25 / part of a dense feed-forward: 63 % for part 2, 32 % for part 4."""
    rank = 2 * round(2 * C / (3 * part))
    return {"low rank": C // part, "block-dense": f"blockdense:{rank}:2", "block-shuffle": f"blockshuffle:{part}"}


def make_pair(kind: int | str, C: int) -> nn.ModuleList:
    """Return the layers C -> 4 C and 4 C -> C of a kind."""
    c = GPTConfig(n_embd=C, n_head=1, ffn_dim=4 * C, lowdim=LowDim(up=kind, down=kind))
    pair = nn.ModuleList([projection(c, "up"), projection(c, "down")])
    for p in pair.parameters():
        nn.init.normal_(p, 0, 0.02)
    return pair


def speed(o: Options, device: torch.device) -> list[str]:
    """Return a table of the milliseconds of a feed-forward, and how many times as fast as dense it is."""
    names = list(kinds(16, 2))
    lines = ["Up and down with nothing between; forward and backward, or only forward for 1 to 4 tokens."]
    lines += ["Milliseconds; in brackets how many times as fast as dense.\n"]
    lines += [f"| C | tokens | | dense | {' | '.join(names)} |", "|---" * (4 + len(names)) + "|"]
    for C in o.widths:
        for N in o.tokens:
            copies = max(1, min(2**24 // (8 * C * C), 2**28 // (8 * C * C * N)))  # few tokens: more than a cache holds
            for share, part in (("63 %", 2), ("32 %", 4)):
                all_kinds = {"dense": 0} | kinds(C, part)
                runs = {name: feed_forward(kind, C, N, copies, o.dtype, device) for name, kind in all_kinds.items()}
                bench.alternate(runs, 1, device)
                times = bench.alternate(runs, o.rounds, device)
                cells = [f"{statistics.median(times['dense']) / copies:.3g}"]
                for name in names:
                    ratio = statistics.median(a / b for a, b in zip(times["dense"], times[name]))
                    cells.append(f"{statistics.median(times[name]) / copies:.3g} ({ratio:.2f})")
                lines.append(f"| {C} | {N} | {share} | {' | '.join(cells)} |")
                print(lines[-1], flush=True)
    return lines


def feed_forward(kind: int | str, C: int, N: int, copies: int, dtype: str, device: torch.device) -> Callable[[], None]:
    """Return a function that runs N tokens forward through each copy of a feed-forward, and backward if N > 4."""
    with device:
        pairs = [make_pair(kind, C) for _ in range(copies)]
        x = torch.randn(N, C, requires_grad=True)

    def run() -> None:
        with torch.set_grad_enabled(N > 4):
            for up, down in pairs:
                with hardware.autocast(device, dtype):
                    y = down(up(x))
                if N > 4:
                    y.backward(y.detach())

    return run


def throughput(o: Options, device: torch.device) -> list[str]:
    """Return a table of the tokens per second of each preset, greedy, with random weights."""
    lines = [f"{o.generate} tokens of each sequence, greedy, after one token; random weights.\n"]
    lines += ["| preset | parameters | tokens/s by batch | most | over the preset above |", "|---" * 5 + "|"]
    most: list[float] = []
    for number, preset in enumerate(PRESETS):
        flags = ["--vocab_size=32000", f"--block_size={o.generate + 1}", f"--dtype={o.dtype}"]
        c = load_config([f"experiments/structured/config/{preset}.py", *flags])
        with device:
            model = GPT(c.gpt, c.seed)
        rates: dict[int, float] = {}
        for batch in o.batches:
            x = torch.zeros(batch, 1, dtype=torch.long, device=device)
            try:
                bench.decoding(model, x, 1, c)()
                times = bench.alternate({preset: bench.decoding(model, x, o.generate, c)}, 1, device)
            except torch.OutOfMemoryError:
                break
            rates[batch] = 1000 * batch * o.generate / times[preset][0]
        most.append(max(rates.values(), default=0.0))
        over = f"{most[-1] / most[-2] - 1:+.1%}" if number % 2 and most[-2] else ""
        shown = ", ".join(f"{batch}: {rate:,.0f}" for batch, rate in rates.items())
        lines.append(f"| {preset} | {model.n_params() / 1e6:.1f}M | {shown} | {most[-1]:,.0f} | {over} |")
        print(lines[-1], flush=True)
    return [*lines, "\nPublished, A100: m 84,202 and 91,147 (+8 %), l 64,737 and 75,930 (+17 %)."]


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
