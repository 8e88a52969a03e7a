"""Copying and selective copying: memory tasks, whose samples are a function of (seed, stage, number of the sample).

    tokens to keep     noise                          markers      answer
    c a b              . . . . . . . . . . . . .      ~ ~ ~        c a b           copy
    . . c . . . . a . . . . b . . .                   ~ ~ ~        c a b           selective_copy

Of A symbols, 0 is noise and A - 1 the marker; the M tokens to keep are drawn from the rest. The answer to marker j is
token j, and the loss counts nothing else. selective_copy scatters the tokens over the first L + M places. A stage of
the curriculum is the number L of noise tokens, which doubles when the validation loss falls below a threshold, and a
factor of the learning rate (B. N. Kausik, arXiv 2402.14746).

Shapes: B batch, L noise tokens, M tokens to keep, T = L + 2 M.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from config import TrainConfig, UserError
from lpa import hardware
from lpa.distributed import DistInfo

TASKS = ("copy", "selective_copy")


@dataclass(frozen=True)
class CopyTask:
    """The samples of a task, and the curriculum."""

    keep: int = 16
    """Tokens to copy."""
    noise: int = 4096
    """Noise tokens; a sequence has noise + 2 keep."""
    start_noise: int | None = None
    """Noise tokens of the first stage; None = all of them."""
    alphabet: int = 16
    """Symbols, noise and marker among them."""
    threshold: float = 0.3
    """The validation loss below which the noise doubles."""
    rates: Literal["constant", "note", "code"] = "note"
    """How the learning rate follows noise and loss, see next_stage."""
    samples: int = 640
    """Of an evaluation, always the same."""

    def __post_init__(self) -> None:
        for name in ("keep", "noise", "start_noise", "threshold", "samples"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"task.{name} is {value}, wanted above 0")
        if not 4 <= self.alphabet <= 63:
            raise ValueError(f"task.alphabet is {self.alphabet}, wanted 4 to 63")
        if self.start_noise is not None and self.start_noise > self.noise:
            raise ValueError(f"task.start_noise is {self.start_noise}, wanted at most task.noise = {self.noise}")


@dataclass(frozen=True)
class Copying:
    """One split of a task at one stage, in the place of a data.Corpus."""

    name: str
    split: str
    seed: int
    task: CopyTask
    noise: int

    folder = Path()

    @property
    def tokens(self) -> int:
        """Return the tokens of a sequence; there is no end of sequences."""
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
        """Return the symbols as characters: '.', 'A', 'B', ... and '~'."""
        letters = "".join(chr(ord("A") + i) for i in range(self.task.alphabet - 2))
        return dict(tokenizer=dict(kind="char", vocab_size=self.task.alphabet, characters=f".{letters}~"))

    @property
    def fingerprint(self) -> str:
        return f"{self.name} {self.task.keep} {self.task.noise} {self.task.start_noise} {self.task.alphabet}"

    def samples(self, numbers: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Return inputs (B, T) and answers (B, M) of the samples of these numbers."""
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

    def micro_batches(self, size: int, step: int, micro_steps: int, info: DistInfo) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this process's micro-batches of a step. A step has the same samples for any number of processes."""
        for micro_step in range(micro_steps):
            first = ((step * micro_steps + micro_step) * info.world_size + info.rank) * size
            x, y = self.samples(range(first, first + size))
            yield x.to(info.device), y.to(info.device)


def open_task(c: TrainConfig, task: CopyTask, noise: float) -> tuple[Copying, Copying]:
    """Return the samples to train on and to validate with. Raise UserError where block_size is too short for them."""
    longest = task.noise + 2 * task.keep
    if c.gpt.block_size < longest:
        raise UserError(f"block_size is {c.gpt.block_size}, wanted task.noise + 2 task.keep = {longest} or more")
    return Copying(c.dataset, "train", c.seed, task, int(noise)), Copying(c.dataset, "val", 0, task, int(noise))


# --- The curriculum ----------------------------------------------------------------------------------------------


def first_stage(task: CopyTask) -> dict[str, float]:
    """Return the first stage.

    noise: the L of now. rate: the factor of the learning rate. top: what it was when L was reached. decided: the step
    whose evaluation chose the stage.
    """
    noise = task.start_noise or task.noise
    share = 1 - 0.5 * noise / (task.noise + 2 * task.keep) if task.rates == "note" else 1.0
    return dict(noise=noise, rate=share, top=share, decided=0)


def next_stage(task: CopyTask, stage: dict[str, float], loss: float, step: int) -> dict[str, float]:
    """Return the stage after the evaluation of a step.

    While L grows, the published note takes 1 - 0.5 L / T of the rate; the published code multiplies the rate by
    1 - 0.5 L / T at each growth, T without the markers. At the full L, both take 1 - exp(-loss) of that; the code never
    lets the rate rise again.
    """
    noise, rate, top = stage["noise"], stage["rate"], stage["top"]
    if noise < task.noise:
        if loss < task.threshold:
            noise = min(2 * noise, task.noise)
            if task.rates == "note":
                top = 1 - 0.5 * noise / (task.noise + 2 * task.keep)
            elif task.rates == "code":
                top *= 1 - 0.5 * noise / task.noise
            rate = top
    elif task.rates != "constant":
        decayed = top * (1 - math.exp(-loss))
        rate = decayed if task.rates == "note" else min(rate, decayed)
    return dict(noise=noise, rate=rate, top=top, decided=step)


@torch.no_grad()
def accuracy(model: nn.Module, val: Copying, c: TrainConfig, device: torch.device) -> dict[str, float]:
    """Return the shares of answered tokens and of full answers that are right."""
    model.eval()
    M, samples = val.task.keep, val.task.samples
    right = []
    with torch.compiler.set_stance("force_eager"), hardware.autocast(device, c.dtype):
        for numbers in torch.arange(samples).split(c.batch_size):
            x, y = val.samples(numbers.tolist())
            right.append(model(x.to(device))[:, -M:].argmax(-1) == y.to(device))  # (B, M)
    model.train()
    answers = torch.cat(right)
    return dict(
        token_accuracy=answers.sum().item() / samples / M,
        sequence_accuracy=answers.all(1).sum().item() / samples,
    )
