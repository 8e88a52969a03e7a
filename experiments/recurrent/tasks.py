"""Copying and selective copying: tasks of memory, generated as a function of (seed, number of the sample, stage).

    tokens to keep     noise                          markers      to answer
    c a b              . . . . . . . . . . . . .      ~ ~ ~        c a b           copy
    . . c . . . . a . . . . b . . .                   ~ ~ ~        c a b           selective_copy

Of A symbols 0 is noise, A - 1 the marker, and the M tokens to keep are drawn from the rest; selective_copy scatters
them over the first L + M places. The answer to the j-th marker is the j-th token, and nothing else is asked. The stage
of the curriculum is its L, which doubles when the validation loss falls below a threshold, and what the learning rate
is multiplied by (B. N. Kausik, arXiv 2402.14746).

Shapes: B batch, L noise tokens, M tokens to keep, T = L + 2 M.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import CopyTask, TrainConfig, UserError

TASKS = ("copy", "selective_copy")


@dataclass(frozen=True)
class Copying:
    """One split of a task at one stage, where train.py otherwise has a data.Corpus."""

    name: str
    split: str
    seed: int
    task: CopyTask
    noise: int

    folder = Path()

    @property
    def tokens(self) -> int:
        """Of a sequence; there is no end of sequences."""
        return self.noise + 2 * self.task.keep

    bytes = tokens

    @property
    def vocab_size(self) -> int:
        return self.task.alphabet

    @property
    def max_token(self) -> int:
        return self.task.alphabet - 1

    @property
    def meta(self) -> dict[str, Any]:
        """The symbols as characters, in the order of their ids: '.', 'A', 'B', ... and '~'."""
        letters = "".join(chr(ord("A") + i) for i in range(self.task.alphabet - 2))
        return dict(tokenizer=dict(kind="char", vocab_size=self.task.alphabet, characters=f".{letters}~"))

    @property
    def fingerprint(self) -> str:
        """What all its samples are a function of, but for seed and stage."""
        return f"{self.name} {self.task.keep} {self.task.noise} {self.task.start_noise} {self.task.alphabet}"

    def samples(self, numbers: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Inputs (B, T) and answers (B, M) of the samples of these numbers."""
        x, y = zip(*(self.sample(int(number)) for number in numbers))
        return torch.stack(x), torch.stack(y)

    def sample(self, number: int) -> tuple[Tensor, Tensor]:
        M, A = self.task.keep, self.task.alphabet
        key = f"{self.name} {self.split} {self.seed} {self.noise} {number}".encode()
        seed = int.from_bytes(blake2b(key, digest_size=7).digest())
        generator = torch.Generator().manual_seed(seed)
        kept = torch.randint(1, A - 1, (M,), generator=generator)
        places = torch.arange(M)
        if self.name == "selective_copy":
            places = torch.rand(self.noise + M, generator=generator).argsort()[:M].sort().values
        x = torch.zeros(self.tokens, dtype=torch.long)
        x[places], x[-M:] = kept, A - 1
        return x, kept


def open_task(c: TrainConfig, split: str, noise: int) -> Copying:
    """The validation samples are those of no seed of training. Raises UserError where block_size is too short."""
    longest = c.task.noise + 2 * c.task.keep
    if c.gpt.block_size < longest:
        raise UserError(f"block_size is {c.gpt.block_size}, wanted task.noise + 2 task.keep = {longest} or more")
    return Copying(c.dataset, split, c.seed if split == "train" else 0, c.task, noise)


# The curriculum


def first_stage(task: CopyTask) -> dict[str, float]:
    """noise: the L of now. rate: what the learning rate is multiplied by. top: what it was when L came to this.

    train.py adds `decided`: the step whose evaluation chose the stage.
    """
    noise = task.start_noise or task.noise
    share = 1 - 0.5 * noise / (task.noise + 2 * task.keep) if task.rates == "note" else 1.0
    return dict(noise=noise, rate=share, top=share)


def next_stage(task: CopyTask, stage: dict[str, float], loss: float) -> dict[str, float]:
    """The stage after a validation loss.

    The published note has 1 - 0.5 L / T of the rate while L grows; the published code multiplies it by 1 - 0.5 L / T at
    each growth, T without the markers. At the full length both take 1 - exp(-loss) of that, the code never more than
    before.
    """
    noise, rate, top = stage["noise"], stage["rate"], stage["top"]
    if noise < task.noise:
        if not loss < task.threshold:
            return stage
        noise = min(2 * noise, task.noise)
        if task.rates == "note":
            top = 1 - 0.5 * noise / (task.noise + 2 * task.keep)
        elif task.rates == "code":
            top *= 1 - 0.5 * noise / task.noise
        return dict(noise=noise, rate=top, top=top)
    if task.rates == "constant":
        return stage
    decayed = top * (1 - math.exp(-loss))
    return stage | dict(rate=decayed if task.rates == "note" else min(rate, decayed))


@torch.no_grad()
def accuracy(
    model: Callable[[Tensor], Tensor], val: Copying, batch_size: int, device: torch.device
) -> dict[str, float]:
    """Shares of the answered tokens, and of the whole answers, that are right; the model is to be in eval mode."""
    tokens = answers = 0
    for start in range(0, val.task.samples, batch_size):
        x, y = val.samples(range(start, min(start + batch_size, val.task.samples)))
        right = model(x.to(device))[:, -val.task.keep :].argmax(-1) == y.to(device)  # (B, M)
        tokens += right.sum().item()
        answers += right.all(1).sum().item()
    return dict(token_accuracy=tokens / val.task.samples / val.task.keep, sequence_accuracy=answers / val.task.samples)
