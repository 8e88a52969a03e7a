"""Guide each factored layer with a dense matrix while it learns (self-guided training, arXiv 2406.16450).

    y = alpha W x + (1 - alpha) B (A x) + bias

The guide W starts as the product of the factors, so at first alpha changes nothing. A forward hook adds it, so the
other parameters keep their names. Evaluation does not use it.
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
    """Give every factored layer a guide. Call it before you make the optimizers, as the guides learn too."""
    for layer in factored_layers(model):
        layer.guiding = True
        layer.guide = nn.Parameter(dense_weight(layer).detach().clone())  # (C_out, C_in)
        # A tensor, as torch.compile would make a new graph for every value of a number
        layer.register_buffer("alpha", layer.guide.new_ones(()), persistent=False)
        layer.register_forward_hook(mix)


def factored_layers(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, FACTORED)]


def mix(layer: Any, inputs: tuple[Tensor], y: Tensor) -> Tensor:
    """Return alpha times the guide's output plus 1 - alpha times the layer's output y, both (..., C_out)."""
    if not (layer.guiding and layer.training):
        return y
    return torch.lerp(y, F.linear(inputs[0], layer.guide, layer.bias), layer.alpha.to(y.dtype))


def set_guides(model: nn.Module, step: int, guided_steps: int, seed: int) -> None:
    """Set alpha for the update after `step` finished ones. With probability alpha, the guides are used in it.

    alpha falls from 1 to 0 as a cosine over guided_steps. One random number decides for all layers, from seed and step
    alone: all processes and resumed runs agree, and a compiled model needs two graphs. The published code draws one
    per layer.
    """
    alpha = (1 + math.cos(math.pi * step / guided_steps)) / 2
    guiding = random.Random(f"guide {seed} {step}").random() < alpha
    for layer in factored_layers(model):
        layer.guiding = guiding
        layer.alpha.fill_(alpha)


def fixed_flop_ratio(model: nn.Module, dense: int, structured: int) -> float:
    """Return the guided share of steps with which a self-guided run costs as many FLOPs as a dense one.

    dense, structured: FLOPs per token of the forward passes of the dense twin and of `model` without guides. After n
    steps, r n of them guided, r n more steps read the tokens of the guided phase again. The guides are used in half of
    the guided steps on average, so n ((1 + r) structured + r guide / 2) = n dense. For size s this gives .327. The
    published .301 counts attention without the causal mask.
    """
    guide = sum(2 * dense_weight(layer).numel() for layer in factored_layers(model))
    return (dense - structured) / (guide / 2 + structured)
