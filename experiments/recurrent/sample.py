"""Write text from a run of a recurrent model, as sample.py does from a plain one, and with its options.

python -m experiments.recurrent.sample out/recurrent_shakespeare --prompt="ROMEO:" --max_new_tokens=2000
"""

import codecs
import contextlib
import sys

import torch

from config import parse, user_errors
from experiments.recurrent.model import generate, load
from lpa import hardware
from sample import SampleConfig, read_prompt


def main(c: SampleConfig) -> None:
    device = hardware.choose_device(c.device)
    model, tokenizer = load(c.run, device)
    prompt = read_prompt(c)
    ids = list(tokenizer.encode(prompt)) or [tokenizer.end_of_text or 0]
    generator = torch.Generator(device).manual_seed(c.seed)
    for number in range(c.num_samples):
        if c.num_samples > 1:
            print(f"--- sample {number + 1}")
        print(prompt, end="", flush=True)
        pending = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span several tokens
        options = (c.max_new_tokens, tokenizer.vocab_size, c.temperature, c.top_k, c.top_p, generator, c.beyond)
        with hardware.autocast(device, c.dtype):
            for token in generate(model, torch.tensor([ids], device=device), *options):
                if token.item() == tokenizer.end_of_text:
                    break
                print(pending.decode(tokenizer.decode_bytes(int(token))), end="", flush=True)
        print(pending.decode(b"", final=True))


if __name__ == "__main__":
    with user_errors(), contextlib.suppress(KeyboardInterrupt):
        main(parse(sys.argv[1:], SampleConfig, __doc__))
