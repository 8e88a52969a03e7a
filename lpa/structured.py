"""Projections of other structures than two thin matrices, and the dense guide that helps any of them to learn.

Both are of Wei et al. (arXiv 2406.16450); no bias and no nonlinearity stands between their factors:

    blockdense:R:K   y = B (A x)              A block-diagonal: K blocks of (R/K, C_in/K); B (C_out, R) dense
    blockshuffle:K   y = P^-1 B P (A x)       A and B block-diagonal, K blocks each, between them min(C_in, C_out) wide

P deals the channels out, as cards to K players: block j gets those of index j modulo K. So every output sees every
input, where a block is at least K wide (Monarch, arXiv 2204.00595). The zeros outside the blocks are never stored.

Shapes: N tokens, K blocks, P width in and Q width out of a block, C_in and C_out those of the layer, R rank.
"""

import math
import random
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lpa.cpu import linear, onednn, suits_onednn


def parse(kind: str, d_in: int, d_out: int) -> tuple[int, int]:
    """'blockdense:R:K' -> (R, K), 'blockshuffle:K' -> (0, K). Raises ValueError that says what would be valid."""
    name, *numbers = kind.split(":")
    wanted = {"blockdense": 2, "blockshuffle": 1}.get(name)
    if len(numbers) != wanted or not all(number.isdecimal() for number in numbers):
        raise ValueError(f"{kind!r}, wanted a rank, 'blockdense:R:B' or 'blockshuffle:B'")
    rank, blocks = int(numbers[0]) if name == "blockdense" else 0, int(numbers[-1])
    shared = d_in if name == "blockdense" else math.gcd(d_in, d_out)
    narrower = min(d_in, d_out)
    if not 1 <= blocks <= narrower or shared % blocks:
        widths = f"width in = {d_in}" if name == "blockdense" else f"width in = {d_in} and width out = {d_out}"
        few = ", ".join(str(n) for n in range(1, narrower + 1) if shared % n == 0 and n <= 64)
        raise ValueError(f"{kind!r}, wanted for B a divisor of {widths}: {few}")
    if name == "blockdense" and (not 0 < rank <= narrower or rank % blocks):
        raise ValueError(f"{kind!r}, wanted for R a multiple of B = {blocks} from {blocks} to {narrower}")
    return rank, blocks


def make(kind: str, d_in: int, d_out: int, bias: bool) -> nn.Module:
    rank, blocks = parse(kind, d_in, d_out)
    return BlockDense(d_in, d_out, rank, blocks, bias) if rank else BlockShuffle(d_in, d_out, blocks, bias)


class BlockDense(nn.Module):
    """y = B (A x) + bias, A block-diagonal: between them is a latent of width R, as in a low-rank layer."""

    def __init__(self, d_in: int, d_out: int, rank: int, blocks: int, bias: bool) -> None:
        super().__init__()
        self.rank, self.blocks = rank, blocks
        self.A = nn.Parameter(torch.empty(blocks, rank // blocks, d_in // blocks))
        self.B = nn.Parameter(torch.empty(d_out, rank))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.widen(self.narrow(x))

    def narrow(self, x: Tensor) -> Tensor:
        """From (..., C_in) to the latent (..., R)."""
        h = block_product(x.reshape(-1, self.blocks, self.A.size(2)), self.A)  # (N, K, R/K)
        return h.view(*x.shape[:-1], self.rank)

    def widen(self, y: Tensor) -> Tensor:
        """From the latent (..., R) to (..., C_out)."""
        return linear(y, self.B, self.bias)

    def materialise(self) -> Tensor:
        """The dense matrix (C_out, C_in) that this layer stands for."""
        return self.B @ torch.block_diag(*self.A)


class BlockShuffle(nn.Module):
    """y = P^-1 B P (A x) + bias, A and B block-diagonal."""

    rank = 0  # no latent is narrower than both sides

    def __init__(self, d_in: int, d_out: int, blocks: int, bias: bool) -> None:
        super().__init__()
        self.blocks, hidden = blocks, min(d_in, d_out)
        self.A = nn.Parameter(torch.empty(blocks, hidden // blocks, d_in // blocks))
        self.B = nn.Parameter(torch.empty(blocks, d_out // blocks, hidden // blocks))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        h = block_product(x.reshape(-1, self.blocks, self.A.size(2)), self.A)  # (N, K, H/K), H the width between
        z = h.flatten(1).unflatten(1, (-1, self.blocks)).mT  # (N, K, H/K), the same channels dealt out: a view
        y = block_product(z, self.B, interleaved=True)  # (N, K, C_out/K)
        y = y.mT.reshape(*x.shape[:-1], -1)  # (..., C_out): a view, as y is interleaved
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def narrow(self, x: Tensor) -> Tensor:
        return self(x)

    def widen(self, y: Tensor) -> Tensor:
        """From narrow's result to the layer's: nothing is left to do."""
        return y

    def materialise(self) -> Tensor:
        """The dense matrix (C_out, C_in) that this layer stands for."""
        dealt = torch.block_diag(*self.A).unflatten(0, (-1, self.blocks)).transpose(0, 1).flatten(0, 1)  # (H, C_in)
        return (torch.block_diag(*self.B) @ dealt).unflatten(0, (self.blocks, -1)).transpose(0, 1).flatten(0, 1)


def fill(A: Tensor, B: Tensor, scale: float, generator: torch.Generator) -> None:
    """Draw every block of A and B, and a B without blocks, orthogonal: all its singular values are 1, of B's scale."""
    for factor in (A, B):
        gaussian = torch.randn(factor.shape, device=factor.device, generator=generator)
        tall = gaussian if factor.size(-2) >= factor.size(-1) else gaussian.mT
        q, r = torch.linalg.qr(tall)
        q = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]  # makes q uniform (arXiv math-ph/0609050)
        factor.copy_(q if tall is gaussian else q.mT)
    B.mul_(scale)


# --- Products of blocks ------------------------------------------------------------------------------------------


def block_product(x: Tensor, weight: Tensor, interleaved: bool = False) -> Tensor:
    """x (N, K, P) of any strides times weight (K, Q, P)^T of its block: (N, K, Q).

    interleaved: y lies in memory as (N, Q, K), so that y.mT is contiguous.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if not torch.is_grad_enabled():  # saves microseconds, which count where one token is decoded
        return multiply(x, weight, interleaved)
    return BlockProduct.apply(x, weight, interleaved)


def multiply(x: Tensor, weight: Tensor, interleaved: bool) -> Tensor:
    N, K, Q = len(x), *weight.shape[:2]
    y = x.new_empty(N, Q, K).mT if interleaved else x.new_empty(N, K, Q)
    if not by_block(x, weight):
        return batched(x, weight, y)
    for block, w in enumerate(weight):
        y[:, block] = onednn(x[:, block], w)
    return y


class BlockProduct(torch.autograd.Function):
    """block_product with its gradients. That of x lies in memory as x does, so that it is a view wherever x was one.

    On a CPU in float32 a product a block, by oneDNN; elsewhere one batched product (experiments/structured_ffn.py
    measures both).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = multiply(x, weight, interleaved)
        # Compiled by torch 2.11, what was written in place has gradients of zero; its copy has the right ones.
        return y.clone() if torch.compiler.is_compiling() else y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        if by_block(x, weight):
            for block, w in enumerate(weight):
                g = grad[:, block].contiguous()  # (N, Q); oneDNN is very slow at a strided matrix on the right
                if for_x is not None:
                    for_x[:, block] = onednn(g, w.T)
                if for_weight is not None:
                    for_weight[block] = onednn(g.T, x[:, block].contiguous().T)
        else:
            if for_x is not None:
                batched(grad, weight.mT, for_x)
            if for_weight is not None:
                batched(grad.permute(2, 1, 0), x.permute(1, 2, 0), for_weight.transpose(0, 1))
        return for_x, for_weight, None


def by_block(x: Tensor, weight: Tensor) -> bool:
    """Whether a product a block pays: a call of oneDNN costs about 20 microseconds."""
    return len(x) * weight[0].numel() >= 2**23 and suits_onednn(x, weight)


def batched(x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    """Write x (N, K, P) times weight (K, Q, P)^T into y (N, K, Q), and return it: one product of strided views."""
    if x.device.type == "cuda" and not torch.compiler.is_compiling():  # which takes no `out` of these strides
        torch.bmm(x.transpose(0, 1), weight.mT, out=y.transpose(0, 1))
        return y
    if x.device.type == "cpu" and len(x) <= 2:  # where MKL reads the matrix on the left twice as fast
        return y.copy_(torch.bmm(weight, x.permute(1, 2, 0)).permute(2, 0, 1))
    return y.copy_(torch.bmm(x.transpose(0, 1), weight.mT).transpose(0, 1))


# --- The guide ---------------------------------------------------------------------------------------------------


class Guided(nn.Module):
    """A factored layer and a dense matrix that guides it while it learns: y = alpha W x + (1 - alpha) B (A x) + bias.

    W starts as the product of the factors, so at first alpha changes nothing, and goes when alpha is 0. set_guides says
    before each step whether W takes part and with what alpha; in evaluation it never does.
    """

    layer: Any  # BlockDense, BlockShuffle or LowRank
    alpha: Tensor

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.guiding = layer, True
        self.guide = nn.Parameter(layer.materialise().detach().clone())  # (C_out, C_in)
        # A tensor, since torch.compile would make a graph for every value of a number
        self.register_buffer("alpha", self.guide.new_ones(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if not (self.guiding and self.training):
            return y
        return torch.lerp(y, linear(x, self.guide, self.layer.bias), self.alpha.to(y.dtype))

    # While it learns nothing of it is narrow; in evaluation it is the layer alone, whose latents decoding keeps.

    @property
    def rank(self) -> int:
        return 0 if self.training else self.layer.rank

    @property
    def B(self) -> Tensor:
        return self.layer.B

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def narrow(self, x: Tensor) -> Tensor:
        return self(x) if self.training else self.layer.narrow(x)

    def widen(self, y: Tensor) -> Tensor:
        return y if self.training else self.layer.widen(y)


def add_guides(model: nn.Module) -> None:
    """Wrap every factored layer."""
    factored = [(name, layer) for name, layer in model.named_modules() if hasattr(layer, "materialise")]
    for name, layer in factored:
        model.set_submodule(name, Guided(layer))


def drop_guides(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Unwrap the layers, and let the optimizers forget the guides: what is saved then holds nothing of them."""
    for name, module in [(name, m) for name, m in model.named_modules() if isinstance(m, Guided)]:
        model.set_submodule(name, module.layer)
    for optimizer in optimizers:
        for group in [group for group in optimizer.param_groups if group["name"] == "guides"]:
            for p in group["params"]:
                optimizer.state.pop(p, None)
            optimizer.param_groups.remove(group)


def without_guides(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A guided model's state_dict -> that of the model without guides; any other as it is."""
    guided = {name.removesuffix("guide") for name in state if name.endswith(".guide")}
    kept = {}
    for name, tensor in state.items():
        if not name.endswith(".guide"):
            prefix = name.rpartition("layer.")[0]
            kept[prefix + name.removeprefix(f"{prefix}layer.") if prefix in guided else name] = tensor
    return kept


def set_guides(model: nn.Module, step: int, guided_steps: int, seed: int) -> None:
    """Say whether the guides take part in the update after `step` finished ones: with probability alpha.

    alpha falls from 1 to 0 as a cosine over guided_steps. One draw for all layers, a function of (seed, step), so that
    ranks and resumed runs agree and a compiled model needs two graphs. Published: a draw for each layer.
    """
    alpha = (1 + math.cos(math.pi * step / guided_steps)) / 2
    guiding = random.Random(f"guide {seed} {step}").random() < alpha
    for module in model.modules():
        if isinstance(module, Guided):
            module.guiding = guiding
            module.alpha.fill_(alpha)


def guide_flops(model: nn.Module) -> int:
    """FLOPs a token that guides, not yet there, would add to a forward pass in which they take part."""
    factored = [m for m in model.modules() if hasattr(m, "materialise")]
    return sum(2 * math.prod(m.materialise().shape) for m in factored)


def fixed_flop_ratio(dense: int, structured: int, guide: int) -> float:
    """The guided share that makes a self-guided run cost what the dense twin costs, from forward FLOPs a token.

    A run of n new steps, r n of them guided, is followed by r n more over the guided phase's tokens: it costs
    n ((1 + r) structured + r guide / 2) = n dense, as the guide takes part in half of the guided steps on average.
    The published ratios, .301 for size s, charge attention for the whole square of the context; train.py counts what
    the causal mask leaves, and finds .327.
    """
    return (dense - structured) / (guide / 2 + structured)
