"""Parameter groups, AdamW and Muon, and the learning rate of each step."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from config import TrainConfig
from lpa.structured import BlockDense, BlockShuffle
from model import GPT, LowRank

FACTORED = (LowRank, BlockDense, BlockShuffle)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return groups that hold every parameter once, by the decay it gets.

    matrices: weight_decay. factors: half of it each, since (1 - d/2) A (1 - d/2) B decays B A by d, as a dense matrix
    would. Embeddings, norms and biases: none; decay would pull rare tokens to zero between their gradients.
    """
    factors = {p for m in model.modules() if isinstance(m, FACTORED) for p in (m.A, m.B)}
    embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    groups = {name: [] for name in ("matrices", "factors", "embeddings", "vectors")}
    for p in model.parameters():
        other = "matrices" if p.ndim > 1 else "vectors"
        groups["factors" if p in factors else "embeddings" if p in embeddings else other].append(p)
    decay = dict.fromkeys(groups, 0.0) | {"matrices": weight_decay, "factors": weight_decay / 2}
    return [dict(name=name, params=ps, weight_decay=decay[name]) for name, ps in groups.items() if ps]


def make_optimizers(model: GPT, c: TrainConfig) -> list[torch.optim.Optimizer]:
    """Make AdamW for everything, or Muon for the matrices inside the blocks and AdamW for the rest.

    Each skips a step by itself where its `found_inf` is 1, without waiting for the host.
    """
    groups = parameter_groups(model, c.weight_decay)
    muon = []
    if c.optimizer == "muon":
        muon = [group for group in groups if group["name"] in ("matrices", "factors")]
        head = model.lm_head.weight
        for group in muon:
            group["params"] = [p for p in group["params"] if p is not head]
        groups = [group for group in groups if group not in muon]
        if not model.config.tie_embeddings:
            groups.append(dict(name="head", params=[head], weight_decay=c.weight_decay))
    adamw = torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2), eps=c.eps, fused=True)
    return [adamw, Muon(muon, lr=c.learning_rate, bfloat16=c.dtype == "bfloat16")] if muon else [adamw]


class Muon(torch.optim.Optimizer):
    """Make the momentum of each matrix orthogonal before adding it (Jordan 2024, Moonshot arXiv 2502.16982).

    q, k, v and both factors of a low-rank layer are matrices of their own, and so is each block of a factor. The step
    of an (m, n) matrix is scaled by 0.2 sqrt(max(m, n)). Its elements then have the size that AdamW's have, so one
    learning rate serves both. bfloat16: orthogonalise in it, which is enough where the model's products use it.
    """

    def __init__(self, groups: list[dict], lr: float, bfloat16: bool = False) -> None:
        super().__init__(groups, dict(lr=lr, momentum=momentum(0), weight_decay=0.0))
        self.bfloat16 = bfloat16
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for shape in sorted({p.shape for p in group["params"]}):  # matrices of a shape in one batched product
                params = [p for p in group["params"] if p.shape == shape and p.grad is not None]
                for p in params:
                    self.state[p].setdefault("momentum", torch.zeros_like(p))
                if params:
                    self.step_batch(params, group)

    def step_batch(self, params: list[nn.Parameter], group: dict) -> None:
        """Step matrices of one shape. Under FSDP each process holds some rows m of each, so the sum of momentum and
        gradient is gathered before it is made orthogonal, by all processes alike."""
        going = 1.0 if self.found_inf is None else 1 - self.found_inf  # 0 leaves everything as it is
        weights = [local(p) for p in params]
        buffers = [local(self.state[p]["momentum"]) for p in params]
        grads = [local(p.grad) for p in params if p.grad is not None]
        grad = torch.stack(grads).nan_to_num_(0, 0, 0)  # (number, m, n), or (number, K, m, n)
        share = (1 - group["momentum"]) * going
        torch._foreach_mul_(buffers, 1 - share)
        torch._foreach_add_(buffers, list((grad * share).unbind()))
        ahead = grad.lerp_(torch.stack(buffers), group["momentum"])  # Nesterov's
        gathered = gather(ahead, params[0], len(params))
        step = orthogonal(gathered.flatten(0, -3), self.bfloat16).view_as(gathered)
        step = scatter(step, params[0]) * (group["lr"] * 0.2 * max(gathered.shape[-2:]) ** 0.5 * going)
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"] * going)
        torch._foreach_sub_(weights, list(step.unbind()))


def local(value: Tensor) -> Tensor:
    """Return what this process holds of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def gather(stacked: Tensor, p: Tensor, number: int) -> Tensor:
    """Return all of `number` stacked tensors like p, of which `stacked` is this process's part."""
    if not isinstance(p, DTensor):
        return stacked
    shape = torch.Size([number, *p.shape])
    strides = torch.empty(shape, device="meta").stride()
    placed: dict[str, Any] = dict(device_mesh=p.device_mesh, placements=[Shard(1)], run_check=False)
    return DTensor.from_local(stacked, **placed, shape=shape, stride=strides).full_tensor()


def scatter(stacked: Tensor, p: Tensor) -> Tensor:
    """Return this process's part again; nothing is sent, as every process has all of it."""
    if not isinstance(p, DTensor):
        return stacked
    return distribute_tensor(stacked, p.device_mesh, [Shard(1)], src_data_rank=None).to_local()


def orthogonal(g: Tensor, bfloat16: bool = False) -> Tensor:
    """Return about U V^T of each g = U S V^T, (number, m, n): five Newton-Schulz steps, singular values 0.7 to 1.2."""
    x = g.float().mT if g.size(-2) > g.size(-1) else g.float()  # (number, R, C), R <= C
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = newton_schulz(x.bfloat16()) if bfloat16 else newton_schulz_of_gram(x)
    return (x.mT if g.size(-2) > g.size(-1) else x).to(g.dtype)


COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of X <- (a + b X X^T + c (X X^T)^2) X (Jordan 2024)


def newton_schulz(x: Tensor) -> Tensor:
    """Take the steps on x (number, R, C), in its precision."""
    a, b, c = COEFFICIENTS
    for _ in range(5):
        gram = x @ x.mT  # (number, R, R)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def newton_schulz_of_gram(x: Tensor) -> Tensor:
    """Take the same steps in fewer multiplications, half as many for rank 48 and width 192; needs float32.

    X <- Q X with Q = a + b X X^T + c (X X^T)^2 makes X X^T <- Q (X X^T) Q, and Q commutes with it, so the wide X
    (number, R, C) is needed only at both ends. A bfloat16 Gram matrix would lose the squares of small singular values.
    """
    a, b, c = COEFFICIENTS
    gram = x @ x.mT  # (number, R, R)
    product = torch.eye(gram.size(-1), dtype=x.dtype, device=x.device).expand_as(gram)
    for _ in range(5):
        q = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        q.diagonal(dim1=-2, dim2=-1).add_(a)
        product = q @ product
        gram = q @ q @ gram
    return product @ x


def describe(optimizers: list[torch.optim.Optimizer]) -> str:
    """Return a line per parameter group."""
    lines = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            tensors, count = len(group["params"]), sum(p.numel() for p in group["params"])
            what = f"{tensors:5} tensors{count:15,} parameters, decay {group['weight_decay']:g}"
            lines.append(f"{type(optimizer).__name__:7}{group['name']:11}{what}")
    return "\n".join(lines)


def set_learning_rate(optimizers: list[torch.optim.Optimizer], step: int, c: TrainConfig) -> float:
    """Set the learning rate of every group for this step, and Muon's momentum. Return the rate."""
    rate = learning_rate(step, c)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = rate
        if "momentum" in group:
            group["momentum"] = momentum(step)
    return rate


def momentum(step: int) -> float:
    """Return Muon's momentum: 0.85 to 0.95 over the first 300 steps, as early gradients soon point elsewhere."""
    return 0.85 + 0.1 * min(1.0, step / 300)


def learning_rate(step: int, c: TrainConfig) -> float:
    """Return the rate of the update after `step` finished ones; it depends on nothing else that a resume must keep."""
    if step < c.warmup_steps:
        return c.learning_rate * (step + 1) / c.warmup_steps
    if c.schedule == "cosine":
        progress = (step - c.warmup_steps) / (c.max_steps - c.warmup_steps)
        return c.min_lr + (c.learning_rate - c.min_lr) * (1 + math.cos(math.pi * progress)) / 2
    left = (c.max_steps - step) / (c.decay_share * c.max_steps)
    return c.min_lr + (c.learning_rate - c.min_lr) * min(1.0, left)


def late_warm_up(c: TrainConfig) -> str | None:
    """Return a warning where the warm-up ends after the decay should have begun, else None.

    It is no error: a preset's warm-up is kept when max_steps is made small to try it out.
    """
    seen, trial = f"warmup_steps is {c.warmup_steps}, wanted", "--stop_step runs the start of a longer schedule"
    if c.warmup_steps >= c.max_steps:
        highest = learning_rate(c.max_steps - 1, c)
        return f"{seen} below max_steps = {c.max_steps}: the rate only rises, to {highest:.2e}; {trial}"
    decay_start = round((1 - c.decay_share) * c.max_steps)
    rate = learning_rate(c.warmup_steps, c)
    if c.schedule == "wsd" and c.warmup_steps > decay_start and rate < 0.9 * c.learning_rate:
        return f"{seen} at most {decay_start}, where the decay begins: the rate then falls at once to {rate:.2e}"
    return None
