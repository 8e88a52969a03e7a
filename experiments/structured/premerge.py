"""Merge factored layers into dense matrices for decoding, where a measurement finds that faster.

    python -m experiments.structured.premerge out/lpa_cpu

Prints which layers are merged, for calls of up to how many tokens, and the time per decoded token before and after. In
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
from lpa import checkpoint, decode, hardware
from lpa.counts import dense_weight
from lpa.optim import FACTORED
from model import GPT

TOKENS = 64  # to decode for a measurement
MOST_TOKENS = 1024  # of a call for which premerge tries the dense matrix


@dataclass(frozen=True)
class Options:
    run: tyro.conf.Positional[Path]


def main(o: Options) -> None:
    device = hardware.choose_device()
    model, _, _ = checkpoint.load_model(o.run, device)
    idx = torch.zeros(1, 1, dtype=torch.long, device=device)

    def write() -> None:
        for _ in decode.generate(model, idx, TOKENS, model.config.vocab_size, temperature=0):
            pass

    before = hardware.fastest(write, device, seconds=2.0)
    print("\n".join(premerge(model)))
    after = hardware.fastest(write, device, seconds=2.0)
    print(f"ms per token: {1e3 * before / TOKENS:.3f} before, {1e3 * after / TOKENS:.3f} after")


class Merged(nn.Module):
    """Apply the dense matrix of a factored layer in calls of up to `few` tokens, and the factors in longer ones.

    The matrix needs only one product, the factors need fewer FLOPs (arXiv 2406.16450). It does not follow later changes
    of the factors.
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
    """Replace the factored layers for which the dense matrix is faster on this device. Return a report in lines.

    k and v stay factored where the cache holds their latents, because decoding then needs B alone.
    """
    latent = {name for name, rank in zip("kv", decode.latent_ranks(model.config)) if rank}
    groups: dict[tuple, list[str]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, FACTORED) and name.rpartition(".")[2] not in latent:
            groups.setdefault((type(layer).__name__, layer.A.shape, layer.B.shape), []).append(name)
    lines, extra = [], 0
    for (kind, *_), names in groups.items():
        layers = {name: Merged(model.get_submodule(name)) for name in names}
        few, (d_out, d_in) = few_tokens(list(layers.values())), layers[names[0]].weight.shape
        found = f"merged for calls of up to {few} tokens" if few else "not merged, slower for one token too"
        lines.append(f"{len(layers)} {kind} layers {d_in} -> {d_out}: {found}")
        if few:
            for name, layer in layers.items():
                layer.few = few
                model.set_submodule(name, layer)
                extra += layer.weight.nbytes
    return [*lines, f"{extra / 1e6:.1f} MB of merged weights"]


def few_tokens(layers: list[Merged]) -> int:
    """Return the largest of 0, 1, 2, 4, ... tokens up to which the matrices of these equal layers are faster."""
    weight, few = layers[0].weight, 0
    while (tokens := max(1, 2 * few)) <= MOST_TOKENS:
        x = weight.new_ones(tokens, 1, weight.size(1))
        if seconds_of(layers, x, few=tokens) >= seconds_of(layers, x, few=0):
            break
        few = tokens
    return few


def seconds_of(layers: list[Merged], x: Tensor, few: int) -> float:
    """Return the time of all layers one after the other, so that caches hold as much of their weights as in a model."""
    for layer in layers:
        layer.few = few
    return hardware.fastest(lambda: [layer(x) for layer in layers], x.device, seconds=0.03)


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
