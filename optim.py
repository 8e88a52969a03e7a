"""Parameter groups, the optimizer and the learning rate of each step."""

import math

import torch
from torch import nn

from config import TrainConfig
from model import GPT, LowRank


def parameter_groups(model: GPT, weight_decay: float) -> list[dict]:
    """Every parameter once, by the decay it gets.

    matrices: weight_decay. factors: half of it each, since (1 - d/2) A (1 - d/2) B decays B A by d, as a dense matrix
    would. Embeddings, norms and biases: none; decay would pull rare tokens to zero between their gradients.
    """
    factors = {p for m in model.modules() if isinstance(m, LowRank) for p in (m.A, m.B)}
    embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    groups = {name: [] for name in ("matrices", "factors", "embeddings", "vectors")}
    for p in model.parameters():
        other = "matrices" if p.ndim > 1 else "vectors"
        groups["factors" if p in factors else "embeddings" if p in embeddings else other].append(p)
    decay = {"matrices": weight_decay, "factors": weight_decay / 2, "embeddings": 0.0, "vectors": 0.0}
    return [dict(name=name, params=ps, weight_decay=decay[name]) for name, ps in groups.items() if ps]


def make_optimizer(model: GPT, c: TrainConfig) -> torch.optim.Optimizer:
    """Fused AdamW: its kernel skips a step by itself where `optimizer.found_inf` is 1, without asking the host."""
    groups = parameter_groups(model, c.weight_decay)
    return torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), eps=c.eps, fused=True)


def describe(optimizer: torch.optim.Optimizer) -> str:
    """A line per parameter group."""
    lines = []
    for group in optimizer.param_groups:
        tensors, count = len(group["params"]), sum(p.numel() for p in group["params"])
        lines.append(f"{group['name']:11}{tensors:5} tensors{count:15,} parameters, decay {group['weight_decay']:g}")
    return "\n".join(lines)


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, c: TrainConfig) -> float:
    rate = learning_rate(step, c)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def learning_rate(step: int, c: TrainConfig) -> float:
    """The rate of the update after `step` finished ones: a function of nothing else, so a resume cannot miss it."""
    if step < c.warmup_steps:
        return c.learning_rate * (step + 1) / c.warmup_steps
    if c.schedule == "cosine":
        progress = (step - c.warmup_steps) / (c.max_steps - c.warmup_steps)
        return c.min_lr + (c.learning_rate - c.min_lr) * (1 + math.cos(math.pi * progress)) / 2
    left = (c.max_steps - step) / (c.decay_share * c.max_steps)
    return c.min_lr + (c.learning_rate - c.min_lr) * min(1.0, left)
