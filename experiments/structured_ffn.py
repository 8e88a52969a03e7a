"""Do structured feed-forwards pay? Their time against dense, and what a small model learns with them, guided or not.

    python -m experiments.structured_ffn --part=speed      forward and backward, and one token, of a feed-forward
    python -m experiments.structured_ffn --part=train      perplexity of dense and the three kinds at 63 % and 32 %

Writes results/structured_ffn_PART.md. `train` trains what is missing below out/structured_ffn/, so it may be stopped
and run again.

Shapes: C width, 4 C hidden, N tokens, K blocks.
"""

import datetime
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import bench
import hardware
import structured
import train
from config import UserError, load_config, parse, user_errors
from model import Dense, LowRank


@dataclass(frozen=True)
class Options:
    part: Literal["speed", "train"] = "speed"
    widths: tuple[int, ...] = (768, 2048)
    """speed: C, a multiple of 16. Published: 768 to 6144."""
    tokens: tuple[int, ...] = (1, 4096)
    """speed: tokens of a call; one of 1 to 4 is timed forward alone, as decoding is. Published: up to 30,000."""
    rounds: int = 5
    """speed: the kinds take turns; the median of their ratios to dense counts."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    preset: str = "config/setting2_cpu.py"
    """train: with its attention made dense."""
    dataset: str = "pystdlib"
    steps: int = 800
    seeds: int = 1


def main(o: Options) -> None:
    lines = speed(o) if o.part == "speed" else learning(o)
    on = hardware.describe(hardware.choose_device())
    head = [f"# Structured feed-forwards: {o.part}\n", f"torch {torch.__version__}, {on}, {datetime.date.today()}."]
    head.append(f"Command: `python -m experiments.structured_ffn {' '.join(sys.argv[1:])}`\n")
    Path("results").mkdir(exist_ok=True)
    Path(f"results/structured_ffn_{o.part}.md").write_text("\n".join([*head, *lines]) + "\n")


def kinds(C: int, share: Literal["63 %", "32 %"]) -> dict[str, int | str]:
    """The published three at about that share of the dense matrices, for a feed-forward of width C and 4 C."""
    part = 2 if share == "63 %" else 4
    return {"low rank": C // part, "block-dense": f"blockdense:{C // part}:4", "block-shuffle": f"blockshuffle:{part}"}


# --- Speed -------------------------------------------------------------------------------------------------------


def speed(o: Options) -> list[str]:
    device = hardware.choose_device()
    lines = ["milliseconds; in brackets how many times as fast as dense. einsum: the two products by torch.einsum.\n"]
    lines += ["| C | tokens | | dense | low rank | block-dense | einsum | block-shuffle | einsum |", "|---" * 9 + "|"]
    for C in o.widths:
        for N in o.tokens:
            for share in ("63 %", "32 %"):
                times = bench.alternate(layers(C, N, share, o, device), o.rounds, device)
                cells = [f"{statistics.median(times['dense']):.3g}"]
                for name in list(times)[1:]:
                    ratio = statistics.median(a / b for a, b in zip(times["dense"], times[name]))
                    cells.append(f"{statistics.median(times[name]):.3g} ({ratio:.2f})")
                lines.append(f"| {C} | {N} | {share} | {' | '.join(cells)} |")
                print(lines[-1], flush=True)
    return lines


def layers(C: int, N: int, share: str, o: Options, device: torch.device) -> dict[str, Callable[[], None]]:
    """What is timed of each kind: up and down with nothing between, forward and backward, or forward for few tokens."""
    x = torch.randn(N, C, device=device, requires_grad=True)
    runs = {}
    for name, kind in {"dense": 0, **kinds(C, share)}.items():
        up, down = (make(kind, d_in, d_out, device) for d_in, d_out in ((C, 4 * C), (4 * C, C)))
        runs[name] = timed(lambda x, up=up, down=down: down(up(x)), x, o, device)
        if name.startswith("block"):
            runs[f"{name}, einsum"] = timed(lambda x, up=up, down=down: einsum(down, einsum(up, x)), x, o, device)
    return runs


def make(kind: int | str, d_in: int, d_out: int, device: torch.device) -> nn.Module:
    with device:
        if isinstance(kind, str):
            layer = structured.make(kind, d_in, d_out, bias=False)
        else:
            layer = LowRank(d_in, d_out, kind, bias=False) if kind else Dense(d_in, d_out, bias=False)
    for p in layer.parameters():
        nn.init.normal_(p, 0, 0.02)
    return layer


def einsum(layer: nn.Module, x: Tensor) -> Tensor:
    h = torch.einsum("nkp,kqp->nkq", x.unflatten(-1, (layer.blocks, -1)), layer.A)  # (N, K, Q)
    if isinstance(layer, structured.BlockDense):
        return layer.widen(h.flatten(1))
    dealt = h.flatten(1).unflatten(1, (-1, layer.blocks))
    return torch.einsum("npk,kqp->nqk", dealt, layer.B).flatten(1)


def timed(f: Callable[[Tensor], Tensor], x: Tensor, o: Options, device: torch.device) -> Callable[[], None]:
    def run() -> None:
        if len(x) <= 4:
            with torch.no_grad(), hardware.autocast(device, o.dtype):
                f(x)
            return
        with hardware.autocast(device, o.dtype):
            y = f(x)
        y.backward(y.detach())

    return run


# --- Training ----------------------------------------------------------------------------------------------------


def learning(o: Options) -> list[str]:
    """A table of each arm's perplexity, mean over seeds, and the largest rise of its training loss."""
    C = load_config([o.preset]).gpt.n_embd
    arms: dict[str, list[str]] = {"dense": []}
    for share in ("63 %", "32 %"):
        for name, kind in kinds(C, share).items():
            flags = [f"--lowdim.{x}={kind}" for x in ("gate", "up", "down")] + ["--first_ffn_dense=true"]
            arms[f"{name} {share}"] = flags
            arms[f"{name} {share}, guided"] = [*flags, "--self_guided=0.5"]
    lines = [f"{o.preset} with dense attention, {o.dataset}, {o.steps} steps, {o.seeds} seeds.\n"]
    lines += [
        "| feed-forward | val perplexity | largest rise of the training loss between logged steps |",
        "|---" * 3 + "|",
    ]
    for arm, flags in arms.items():
        logs = [trained(o, arm, flags, seed) for seed in range(1, o.seeds + 1)]
        perplexity = statistics.mean(math.exp(log[-1]["val_loss"]) for log in logs)
        rises = [max(b["loss"] - a["loss"] for a, b in itertools.pairwise(log[:-1])) for log in logs]
        lines.append(f"| {arm} | {perplexity:.3f} | {max(rises):.3f} |")
        print(lines[-1], flush=True)
    return lines


def trained(o: Options, arm: str, flags: list[str], seed: int) -> list[dict]:
    """The log of one run, its last line the evaluation, trained unless it is there."""
    name = arm.replace(" ", "_").replace("%", "pc").replace(",", "")
    out = Path("out/structured_ffn") / f"{name}_{o.dataset}_{o.steps}_{seed}"
    attention = [f"--lowdim.{x}=0" for x in "qkvo"]
    flags = [*attention, *flags, f"--dataset={o.dataset}", f"--max_steps={o.steps}", f"--seed={seed}"]
    flags += [f"--out_dir={out}", "--eval_interval=0", "--eval_tokens=200000", "--log_interval=10", "--resume=auto"]
    last = out / "ckpt" / "last"
    if not last.exists() or last.read_text().strip() != f"step_{o.steps}":
        train.main(load_config([o.preset, *flags]))
    if last.read_text().strip() != f"step_{o.steps}":
        raise UserError(f"{out} was stopped; the same command goes on")
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record or "val_loss" in record]


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
