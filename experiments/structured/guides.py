"""A dense matrix that guides each factored layer while it learns (self-guided training, arXiv 2406.16450).

    y = alpha W x + (1 - alpha) B (A x) + bias

W, the guide, starts as the product of the factors, so at first alpha changes nothing. It is added from outside, by a
forward hook, so the other parameters keep their names. In evaluation it never takes part.
"""

import math
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpa.counts import dense_weight
from lpa.optim import FACTORED


def add_guides(model: nn.Module) -> None:
    """Give every factored layer a guide. Call it before the optimizers are made: the guide learns, too."""
    for layer in factored_layers(model):
        layer.guiding = True
        layer.guide = nn.Parameter(dense_weight(layer).detach().clone())  # (C_out, C_in)
        # A tensor: torch.compile would make a graph for every value of a number.
        layer.register_buffer("alpha", layer.guide.new_ones(()), persistent=False)
        layer.register_forward_hook(mix)


def factored_layers(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, FACTORED)]


def mix(layer: Any, inputs: tuple[Tensor], y: Tensor) -> Tensor:
    """Return the layer's output y (..., C_out) with what the guide makes of its input x (..., C_in)."""
    if not (layer.guiding and layer.training):
        return y
    return torch.lerp(y, F.linear(inputs[0], layer.guide, layer.bias), layer.alpha.to(y.dtype))


def set_guides(model: nn.Module, step: int, guided_steps: int, seed: int) -> None:
    """Decide whether the guides take part in the update after `step` finished ones: with probability alpha.

    alpha falls from 1 to 0 as a cosine over guided_steps. There is one draw for all layers, a function of (seed, step):
    all processes and resumed runs agree, and a compiled model needs two graphs. The published code draws per layer.
    """
    alpha = (1 + math.cos(math.pi * step / guided_steps)) / 2
    guiding = random.Random(f"guide {seed} {step}").random() < alpha
    for layer in factored_layers(model):
        layer.guiding = guiding
        layer.alpha.fill_(alpha)


def is_guide(name: str) -> bool:
    """Say whether a tensor of a checkpoint is a guide, or an optimizer's moment of one."""
    return "guide" in name.split(".")


def guide_flops(model: nn.Module) -> int:
    """Return the FLOPs per token that guides would add to a forward pass in which they take part."""
    return sum(2 * dense_weight(layer).numel() for layer in factored_layers(model))


def fixed_flop_ratio(dense: int, structured: int, guide: int) -> float:
    """Return the guided share that makes a self-guided run cost what dense costs, from forward FLOPs per token.

    A run of n new steps, r n of them guided, is followed by r n more over the tokens of the guided phase: it costs
    n ((1 + r) structured + r guide / 2) = n dense, as the guide takes part in half of the guided steps on average. The
    published ratios, .301 for size s, charge attention for the full square of the context. We count what the causal
    mask leaves, and find .327.
    """
    return (dense - structured) / (guide / 2 + structured)
