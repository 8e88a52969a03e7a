"""Does a low-rank layer decode faster as its merged matrix B A, and layers that share an input as one joined matrix?

    python -m experiments.premerge

For each width and number of tokens a table line: microseconds of CPU time on one thread, which other programs on the
machine hardly change. It holds several copies of each layer, as a model has many layers, so that no weight is in a
cache.

Shapes: C width, R rank, F ffn width, N tokens.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from config import parse, user_errors
from lpa.cpu import linear


@dataclass(frozen=True)
class Options:
    rounds: int = 15
    """The median is printed."""
    megabytes: int = 64
    """Copies of the layers take at least so much together."""


SHAPES = {"lpa_130m": (768, 128, 2048), "lpa_cpu": (192, 48, 512)}  # C, R, F
TOKENS = (1, 2, 4, 8, 16, 32, 64)


@torch.inference_mode()
def main(o: Options) -> None:
    torch.set_num_threads(1)  # what is measured is the time of the calling thread
    print(f"torch {torch.__version__}, 1 thread, microseconds; ratios over the form before\n")
    columns = ["shape", "tokens"]
    for before, after in (("B (A x)", "(B A) x"), ("q, k, v apart", "joined"), ("gate, up apart", "joined")):
        columns += [before, after, "ratio"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, (C, R, F) in SHAPES.items():
        copies = max(2, o.megabytes * 2**20 // (4 * 2 * F * C))
        forms = layers(C, R, F, copies)
        for N in TOKENS:
            cells = times(forms, torch.randn(N, 1, C), copies, o.rounds)
            ratios = [f"{a:.1f} | {b:.1f} | {b / a:.2f}" for a, b in zip(cells[::2], cells[1::2])]
            print(f"| {name} | {N} | {' | '.join(ratios)} |", flush=True)


def layers(C: int, R: int, F: int, copies: int) -> list[Callable[[Tensor, int], object]]:
    """The forms that are compared, two by two, of copy i applied to x (N, 1, C)."""
    A, B, merged = weights(copies, R, C), weights(copies, C, R), weights(copies, C, C)
    qkv, joined_qkv = weights(copies, 3, R, C), weights(copies, 3 * R, C)
    gate_up, joined_gate_up = weights(copies, 2, F, C), weights(copies, 2 * F, C)
    return [
        lambda x, i: linear(linear(x, A[i]), B[i]),
        lambda x, i: linear(x, merged[i]),
        lambda x, i: [linear(x, w) for w in qkv[i]],
        lambda x, i: linear(x, joined_qkv[i]).split(R, -1),
        lambda x, i: [linear(x, w) for w in gate_up[i]],
        lambda x, i: linear(x, joined_gate_up[i]).split(F, -1),
    ]


def weights(*shape: int) -> Tensor:
    return torch.randn(shape)


def times(forms: list[Callable[[Tensor, int], object]], x: Tensor, copies: int, rounds: int) -> list[float]:
    """Microseconds of one call of each form: the median of `rounds` passes over all copies, taken in turns."""
    taken: list[list[float]] = [[] for _ in forms]
    for _ in range(rounds + 1):  # the first warms up
        for form, passes in zip(forms, taken):
            start = time.thread_time()
            for i in range(copies):
                form(x, i)
            passes.append(1e6 * (time.thread_time() - start) / copies)
    return [statistics.median(passes[1:]) for passes in taken]


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
