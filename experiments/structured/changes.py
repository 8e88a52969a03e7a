"""What the runs of experiments/structured_runs.py alter in train.py, each for as long as a `with` lasts.

None of them is an option of train.py: the drawing by layer was measured against its own drawing, and the start and
rates of Qiu et al. (arXiv 2406.06248) against its own start; see `--part=draws` and `--part=init`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from config import TrainConfig
from lpa import init, optim, structured
from model import GPT


@contextlib.contextmanager
def drawn_by_layer() -> Iterator[None]:
    """In place of structured.set_guides: every layer draws for itself in each step whether it is guided.

    The published code draws also for each micro-batch and rank; here all micro-batches of a step share a layer's draw.
    It is a function of (seed, step, layer), so that a run may be resumed. Not for torch.compile: every combination of
    layers would be a graph.
    """
    for_all = structured.set_guides

    def set_guides(model: nn.Module, step: int, guided_steps: int, seed: int) -> None:
        guided = [module for module in model.modules() if isinstance(module, structured.Guided)]
        for number, module in enumerate(guided):
            for_all(module, step, guided_steps, seed * len(guided) + number)

    with mock.patch.object(structured, "set_guides", set_guides):
        yield


@contextlib.contextmanager
def structure_aware() -> Iterator[None]:
    """The start of Qiu et al.: N(0, min(1, sqrt(out / in)) / sqrt(in)), in and out those of a factor or its blocks.

    The last projection of each sublayer and the head start at zero besides, which is the option zero_init.
    """

    def fill(A: Tensor, B: Tensor, *rest: object) -> None:
        for factor in (A, B):
            out, inside = factor.shape[-2:]
            factor.normal_(0, min(1.0, (out / inside) ** 0.5) / inside**0.5, generator=rest[-1])

    with mock.patch.object(init, "fill", fill), mock.patch.object(structured, "fill", fill):
        yield


@contextlib.contextmanager
def rates_by_factor() -> Iterator[None]:
    """AdamW's rate for each factor as Qiu et al. have it (see rate_shares); what is not a factor keeps the run's."""
    make, set_rate = optim.make_optimizers, optim.set_learning_rate

    def make_optimizers(model: GPT, c: TrainConfig) -> list[torch.optim.Optimizer]:
        shares = {p: share for m in model.modules() if hasattr(m, "materialise") for p, share in rate_shares(m).items()}
        (adamw,) = make(model, c)
        groups, adamw.param_groups = adamw.param_groups, []
        for group in groups:
            for share in sorted({shares.get(p, 1.0) for p in group["params"]}):
                params = [p for p in group["params"] if shares.get(p, 1.0) == share]
                adamw.param_groups.append(group | dict(params=params, share=share))
        return [adamw]

    def set_learning_rate(optimizers: list[torch.optim.Optimizer], step: int, c: TrainConfig) -> float:
        rate = set_rate(optimizers, step, c)
        for group in optimizers[0].param_groups:
            group["lr"] *= group["share"]
        return rate

    with mock.patch.multiple(optim, make_optimizers=make_optimizers, set_learning_rate=set_learning_rate):
        yield


def rate_shares(layer: Any) -> dict[nn.Parameter, float]:
    """Of each factor: width in of the layer over width in of the factor or its blocks, over the number of factors."""
    d_in = layer.A[..., 0, :].numel()
    return {factor: d_in / factor.size(-1) / 2 for factor in (layer.A, layer.B)}


@contextlib.contextmanager
def structure_aware_with_rates() -> Iterator[None]:
    with structure_aware(), rates_by_factor():
        yield
