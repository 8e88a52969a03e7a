"""Write text from a run folder alone: its checkpoint carries the options and the tokenizer.

    python sample.py out/lpa_cpu --prompt="def main("
    echo "Once upon a time" | python sample.py out/lpa_cpu --prompt=- --temperature=0.8 --top_p=0.95
"""

import codecs
import contextlib
import io
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from config import UserError, parse, user_errors
from lpa import checkpoint, decode, hardware


@dataclass(frozen=True)
class SampleConfig:
    run: tyro.conf.Positional[Path]
    """A run folder, or one of its checkpoints, such as RUN/ckpt/best."""
    prompt: str = ""
    """The start of the text; - reads standard input; empty starts a new text."""
    prompt_file: Path | None = None
    """Read the prompt from this file instead."""
    num_samples: int = 1
    max_new_tokens: int = 500
    temperature: float = 0.8
    """Below 1 sharper, above 1 wilder; 0 always takes the most likely token."""
    top_k: int | None = None
    """Draw from the k most likely tokens."""
    top_p: float | None = None
    """Draw from the smallest set of tokens that holds this share of the probability."""
    beyond: Literal["window", "stop"] = "window"
    """When the model's context is full: continue from the last half of it, or stop with a message."""
    seed: int = 1
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted 1 or more")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}, wanted 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, wanted 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, wanted above 0 and at most 1")


def main(c: SampleConfig) -> None:
    device = hardware.choose_device(c.device)
    model, tokenizer, _ = checkpoint.load_model(c.run, device)
    prompt = read_prompt(c)
    ids = list(tokenizer.encode(prompt))
    if not ids:
        ids = [0 if tokenizer.end_of_text is None else tokenizer.end_of_text]
    if len(ids) > model.config.block_size:
        print(f"note: the model sees the last {model.config.block_size} of {len(ids)} tokens", file=sys.stderr)
    idx = torch.tensor([ids], device=device)
    room = 1 + max(0, model.config.block_size - len(ids))  # tokens to draw until the context is full
    generator = torch.Generator(device).manual_seed(c.seed)
    for number in range(c.num_samples):
        if c.num_samples > 1:
            print(f"--- sample {number + 1}")
        print(prompt, end="", flush=True)
        pending = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span several tokens
        with hardware.autocast(device, c.dtype):
            options = (c.max_new_tokens, tokenizer.vocab_size, c.temperature, c.top_k, c.top_p, generator)
            for token in decode.generate(model, idx, *options, beyond=c.beyond):
                if token.item() == tokenizer.end_of_text:
                    break
                print(pending.decode(tokenizer.decode_bytes(int(token))), end="", flush=True)
            else:
                if c.beyond == "stop" and c.max_new_tokens > room:
                    limit = f"the context of {model.config.block_size} tokens is full"
                    print(f"note: stopped after {room} of {c.max_new_tokens} tokens: {limit}", file=sys.stderr)
        print(pending.decode(b"", final=True))


def read_prompt(c: SampleConfig) -> str:
    if c.prompt_file is not None:
        try:
            return c.prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read prompt_file {c.prompt_file}: {error}") from None
    return sys.stdin.read() if c.prompt == "-" else c.prompt


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    with user_errors(), contextlib.suppress(KeyboardInterrupt):
        main(parse(sys.argv[1:], SampleConfig, __doc__))
