"""A dense matrix that guides each factored layer while it learns (self-guided training, arXiv 2406.16450).

Applied from outside: add_guides wraps the factored layers of a new model, drop_guides unwraps them again.
"""

import math
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpa.counts import dense_weight
from lpa.structured import BlockDense, BlockShuffle
from model import LowRank

FACTORED = (LowRank, BlockDense, BlockShuffle)


class Guided(nn.Module):
    """Compute y = alpha W x + (1 - alpha) B (A x) + bias of a factored layer and its guide W.

    W starts as the product of the factors, so at first alpha changes nothing. set_guides decides before each step
    whether W takes part; in evaluation it never does.
    """

    alpha: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.guiding = layer, True
        self.guide = nn.Parameter(dense_weight(layer).detach().clone())  # (C_out, C_in)
        # A tensor: torch.compile would make a graph for every value of a number.
        self.register_buffer("alpha", self.guide.new_ones(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if not (self.guiding and self.training):
            return y
        return torch.lerp(y, F.linear(x, self.guide, self.layer.bias), self.alpha.to(y.dtype))


def add_guides(model: nn.Module) -> None:
    """Wrap every factored layer."""
    for name, layer in [(name, m) for name, m in model.named_modules() if isinstance(m, FACTORED)]:
        model.set_submodule(name, Guided(layer))


def drop_guides(model: nn.Module) -> None:
    """Unwrap the layers."""
    for name, module in [(name, m) for name, m in model.named_modules() if isinstance(m, Guided)]:
        model.set_submodule(name, module.layer)


def without_guides(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the live tensors of a guided model under the names of the model without guides.

    'model.h.0.mlp.up.layer.A' -> 'model.h.0.mlp.up.A', and the same for the optimizer's moments.
    """
    wrapped = [name.removesuffix("guide") for name in tensors if name.startswith("model.") and name.endswith(".guide")]
    kept = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        prefix = next((p for p in wrapped if f"model.{rest}".startswith(p)), None)
        if prefix is None:
            kept[name] = tensor
        elif f"model.{rest}".startswith(f"{prefix}layer."):
            kept[f"{part}.{prefix.removeprefix('model.')}{rest.split('.layer.', 1)[1]}"] = tensor
    return kept


def set_guides(model: nn.Module, step: int, guided_steps: int, seed: int) -> None:
    """Decide whether the guides take part in the update after `step` finished ones: with probability alpha.

    alpha falls from 1 to 0 as a cosine over guided_steps. There is one draw for all layers, a function of (seed, step):
    ranks and resumed runs agree, and a compiled model needs two graphs. The published code draws for each layer.
    """
    alpha = (1 + math.cos(math.pi * step / guided_steps)) / 2
    guiding = random.Random(f"guide {seed} {step}").random() < alpha
    for module in model.modules():
        if isinstance(module, Guided):
            module.guiding = guiding
            module.alpha.fill_(alpha)


def guide_flops(model: nn.Module) -> int:
    """Return the FLOPs per token that guides would add to a forward pass in which they take part."""
    return sum(2 * dense_weight(m).numel() for m in model.modules() if isinstance(m, FACTORED))


def fixed_flop_ratio(dense: int, structured: int, guide: int) -> float:
    """Return the guided share that makes a self-guided run cost what dense costs, from forward FLOPs per token.

    A run of n new steps, r n of them guided, is followed by r n more over the tokens of the guided phase: it costs
    n ((1 + r) structured + r guide / 2) = n dense, as the guide takes part in half of the guided steps on average. The
    published ratios, .301 for size s, charge attention for the full square of the context. We count what the causal
    mask leaves, and find .327.
    """
    return (dense - structured) / (guide / 2 + structured)
