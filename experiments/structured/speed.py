"""Time the feed-forwards of arXiv 2406.16450 against dense ones, and how fast its models write.

    python -m experiments.structured.speed                      up and down, forward and backward, by kind and width
    python -m experiments.structured.speed --part=throughput    tokens per second of wide and structured models, of GQA

Writes results/structured_ffn_PART.md. Shapes: C width, 4 C hidden, N tokens.
"""

import datetime
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

import bench
from config import load_config, parse, user_errors
from lpa import cpu, hardware, structured
from model import GPT, LowRank, dense


@dataclass(frozen=True)
class Options:
    part: Literal["speed", "throughput"] = "speed"
    dtype: Literal["float32", "bfloat16"] = "float32"
    widths: tuple[int, ...] = (768, 2048)
    """speed: C, a multiple of 16. Published: 768 to 6144."""
    tokens: tuple[int, ...] = (1, 4096)
    """speed: tokens of a call; one of 1 to 4 is timed forward alone, as decoding is. Published: up to 30,000."""
    rounds: int = 5
    """speed: the kinds take turns; the median of their ratios to dense counts."""
    presets: tuple[str, ...] = ("gqa_m", "wide_structured_m", "gqa_l", "wide_structured_l")
    """throughput: each pair of a plain preset and the one that is compared with it."""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    """throughput: rows written side by side, until memory ends."""
    generate: int = 256
    """throughput: tokens of each row, as published."""
    out: Path = Path("results")


def main(o: Options) -> None:
    device = hardware.choose_device()
    hardware.keep_freed_memory(device)  # as train.py does
    if device.type == "cpu":
        cpu.install(o.dtype)
    on = f"torch {torch.__version__}, {hardware.describe(device)}, {datetime.date.today()}, {o.dtype}."
    command = f"python -m experiments.structured.speed {shlex.join(sys.argv[1:])}".rstrip()
    lines = [f"# Structured feed-forwards: {o.part}\n", on, f"Command: `{command}`\n"]
    lines += speed(o, device) if o.part == "speed" else throughput(o, device)
    o.out.mkdir(parents=True, exist_ok=True)
    (o.out / f"structured_ffn_{o.part}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def kinds(C: int, part: int) -> dict[str, int | str]:
    """Return each kind at 1.25 / part of a dense feed-forward: 63 % for part 2, 32 % for part 4."""
    rank = 2 * round(2 * C / (3 * part))
    return {"low rank": C // part, "block-dense": f"blockdense:{rank}:2", "block-shuffle": f"blockshuffle:{part}"}


def make(kind: int | str, d_in: int, d_out: int, device: torch.device) -> nn.Module:
    with device:
        if isinstance(kind, str):
            layer = structured.make(kind, d_in, d_out, bias=False)
        else:
            layer = LowRank(d_in, d_out, kind, bias=False) if kind else dense(d_in, d_out, bias=False)
    for p in layer.parameters():
        nn.init.normal_(p, 0, 0.02)
    return layer


def speed(o: Options, device: torch.device) -> list[str]:
    """Return a table of the milliseconds of a feed-forward, with how many times as fast as dense it is."""
    names = list(kinds(16, 2))
    lines = ["Up and down with nothing between; forward and backward, or forward alone for 1 to 4 tokens."]
    lines += ["Milliseconds; in brackets how many times as fast as dense.\n"]
    lines += [f"| C | tokens | | dense | {' | '.join(names)} |", "|---" * (4 + len(names)) + "|"]
    for C in o.widths:
        for N in o.tokens:
            copies = max(1, min(2**24 // (8 * C * C), 2**28 // (8 * C * C * N)))  # few tokens: more than a cache holds
            for share, part in (("63 %", 2), ("32 %", 4)):
                runs = {
                    name: feed_forward(kind, C, N, copies, o.dtype, device)
                    for name, kind in ({"dense": 0} | kinds(C, part)).items()
                }
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
    """Return a call that sends N tokens through so many feed-forwards, and back where N is above 4."""
    pairs = [(make(kind, C, 4 * C, device), make(kind, 4 * C, C, device)) for _ in range(copies)]
    x = torch.randn(N, C, device=device, requires_grad=True)

    def run() -> None:
        with torch.set_grad_enabled(N > 4):
            for up, down in pairs:
                with hardware.autocast(device, dtype):
                    y = down(up(x))
                if N > 4:
                    y.backward(y.detach())

    return run


def throughput(o: Options, device: torch.device) -> list[str]:
    """Return a table of the tokens per second of each preset, greedy, with weights drawn at random."""
    lines = [f"{o.generate} tokens of each row, greedy, from one token on; weights drawn at random.\n"]
    lines += ["| preset | parameters | tokens/s by batch | most | over the preset above |", "|---" * 5 + "|"]
    most: list[float] = []
    for number, preset in enumerate(o.presets):
        flags = ["--vocab_size=32000", f"--block_size={o.generate + 1}", f"--dtype={o.dtype}"]
        c = load_config([f"experiments/structured/config/{preset}.py", *flags])
        with device:
            model = GPT(c.gpt, c.seed)
        rates: dict[int, float] = {}
        for batch in o.batches:
            x = torch.zeros(batch, 1, dtype=torch.long, device=device)
            try:
                bench.decoding(model, x, 1, c)()
                draw = bench.decoding(model, x, o.generate, c)
                hardware.synchronize(device)
                start = time.perf_counter()
                draw()
                hardware.synchronize(device)
            except torch.OutOfMemoryError:
                break
            rates[batch] = batch * o.generate / (time.perf_counter() - start)
        most.append(max(rates.values(), default=0.0))
        over = f"{most[-1] / most[-2] - 1:+.1%}" if number % 2 and most[-2] else ""
        shown = ", ".join(f"{batch}: {rate:,.0f}" for batch, rate in rates.items())
        lines.append(f"| {preset} | {model.n_params() / 1e6:.1f}M | {shown} | {most[-1]:,.0f} | {over} |")
        print(lines[-1], flush=True)
    return [*lines, "\nPublished, A100: m 84,202 and 91,147 (+8 %), l 64,737 and 75,930 (+17 %)."]


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
