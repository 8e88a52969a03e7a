"""Form the dense matrices of factored layers ahead, for decoding, where that is measured to be faster.

    python -m experiments.structured.premerge out/lpa_cpu

Prints which layers are merged, up to how many tokens per call, and the time per decoded token before and after. In
results/decode_cpu.md merging was 1.4 to 2.2 times slower at C 768 and R 128, so sample.py does not do it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from config import parse, user_errors
from experiments.structured.guides import FACTORED
from lpa import checkpoint, decode, hardware
from lpa.counts import dense_weight
from model import GPT

MOST_TOKENS = 1024  # of a call for which premerge tries the dense matrix


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[Path]
    tokens: int = 64


def main(o: Options) -> None:
    device = hardware.choose_device()
    model, _, _ = checkpoint.load_model(o.run, device)
    idx = torch.zeros(1, 1, dtype=torch.long, device=device)

    def draw() -> None:
        for _ in decode.generate(model, idx, o.tokens, model.config.vocab_size, temperature=0):
            pass

    before = hardware.fastest(draw, device, seconds=2.0)
    print("\n".join(premerge(model)))
    after = hardware.fastest(draw, device, seconds=2.0)
    print(f"ms per token: {1e3 * before / o.tokens:.3f} before, {1e3 * after / o.tokens:.3f} after")


class Merged(nn.Module):
    """A factored layer with its dense matrix beside it, which does not follow the factors.

    A call of up to `few` tokens, batch and time together, takes the matrix, as it costs one product; a longer one takes
    the factors, as they cost fewer FLOPs (arXiv 2406.16450).
    """

    weight: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.few = layer, 0
        self.register_buffer("weight", dense_weight(layer).detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() <= self.few * x.size(-1):
            return F.linear(x, self.weight, self.layer.bias)
        return self.layer(x)


@torch.inference_mode()
def premerge(model: GPT) -> list[str]:
    """Wrap the factored layers for which a dense matrix is faster, here and now. Return lines that say what was found.

    k and v stay as they are where the cache keeps their latents, which need B apart.
    """
    rank_k, rank_v = decode.latent_ranks(model.config)
    apart = {name for name, rank in (("k", rank_k), ("v", rank_v)) if rank}
    groups: dict[tuple, list[str]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, FACTORED) and name.rpartition(".")[2] not in apart:
            groups.setdefault((type(layer).__name__, layer.A.shape, layer.B.shape), []).append(name)
    lines, extra = [], 0
    for (kind, *_), names in groups.items():
        layers = [Merged(model.get_submodule(name)) for name in names]
        few, (d_out, d_in) = few_tokens(layers), layers[0].weight.shape
        found = f"merged for calls of up to {few} tokens" if few else "left apart, which is faster for one token too"
        lines.append(f"{len(layers)} {kind} layers {d_in} -> {d_out}: {found}")
        for name, layer in zip(names, layers):
            if few:
                layer.few = few
                model.set_submodule(name, layer)
                extra += layer.weight.nbytes
    return [*lines, f"{extra / 1e6:.1f} MB of merged weights"]


def few_tokens(layers: list[Merged]) -> int:
    """Return up to how many tokens, of 1, 2, 4, ..., the matrices of these layers of one shape are faster; 0 = none."""
    weight, few = layers[0].weight, 0
    while (tokens := max(1, 2 * few)) <= MOST_TOKENS:
        x = weight.new_ones(tokens, 1, weight.size(1))
        if seconds_of(layers, x, few=tokens) >= seconds_of(layers, x, few=0):
            break
        few = tokens
    return few


def seconds_of(layers: list[Merged], x: Tensor, few: int) -> float:
    """Return the time of all layers in turn, so that their weights come from cache or memory as in the model."""
    for layer in layers:
        layer.few = few
    return hardware.fastest(lambda: [layer(x) for layer in layers], x.device, seconds=0.03)


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
