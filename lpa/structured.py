"""Projections of blocks, in place of two thin matrices (Wei et al., arXiv 2406.16450), as values of `lowdim`:

    blockdense:R:K   y = B (A x)              A block-diagonal: K blocks of (R/K, C_in/K); B (C_out, R) dense
    blockshuffle:K   y = P^-1 B P (A x)       A and B block-diagonal, K blocks each, between them min(C_in, C_out) wide

P deals the channels to the blocks as cards to K players: block j gets those with index j modulo K. So every output sees
every input where a block is at least K wide (Monarch, arXiv 2204.00595). The zeros outside the blocks are not stored.

Shapes: N tokens, K blocks, H width between A and B, C_in and C_out of the layer, R rank.
"""

import math

import torch
import torch.nn as nn
from torch import Tensor


def parse(kind: str, d_in: int, d_out: int) -> tuple[int, int]:
    """Return (R, K) of 'blockdense:R:K', (0, K) of 'blockshuffle:K'. Raise ValueError that says what is valid."""
    name, *numbers = kind.split(":")
    wanted = {"blockdense": 2, "blockshuffle": 1}.get(name)
    if len(numbers) != wanted or not all(number.isdecimal() for number in numbers):
        raise ValueError(f"{kind!r}, wanted a rank, 'blockdense:R:K' or 'blockshuffle:K'")
    rank, blocks = int(numbers[0]) if name == "blockdense" else 0, int(numbers[-1])
    shared = d_in if name == "blockdense" else math.gcd(d_in, d_out)
    narrower = min(d_in, d_out)
    if not 1 <= blocks <= narrower or shared % blocks:
        widths = f"width in = {d_in}" if name == "blockdense" else f"width in = {d_in} and width out = {d_out}"
        few = ", ".join(str(n) for n in range(1, narrower + 1) if shared % n == 0 and n <= 64)
        raise ValueError(f"{kind!r}, wanted for K a divisor of {widths}: {few}")
    if name == "blockdense" and (not 0 < rank <= narrower or rank % blocks):
        raise ValueError(f"{kind!r}, wanted for R a multiple of K = {blocks} from {blocks} to {narrower}")
    return rank, blocks


def make(kind: str, d_in: int, d_out: int, bias: bool) -> nn.Module:
    rank, blocks = parse(kind, d_in, d_out)
    return BlockDense(d_in, d_out, rank, blocks, bias) if rank else BlockShuffle(d_in, d_out, blocks, bias)


class BlockDense(nn.Module):
    """Compute y = B (A x) + bias, A block-diagonal. Between them is a latent of width R, as in a low-rank layer."""

    def __init__(self, d_in: int, d_out: int, rank: int, blocks: int, bias: bool) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(blocks, rank // blocks, d_in // blocks))
        self.B = nn.Parameter(torch.empty(d_out, rank))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None

    def latent(self, x: Tensor) -> Tensor:
        h = block_product(split_blocks(x, len(self.A)), self.A)  # (N, K, R/K)
        return h.reshape(*x.shape[:-1], -1)  # (..., R)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.latent(x), self.B, self.bias)  # (..., C_out)

    def dense_weight(self) -> Tensor:
        """Return the matrix (C_out, C_in) of this layer."""
        return self.B @ torch.block_diag(*self.A)


class BlockShuffle(nn.Module):
    """Compute y = P^-1 B P (A x) + bias, A and B block-diagonal. It has no latent narrower than both sides."""

    def __init__(self, d_in: int, d_out: int, blocks: int, bias: bool) -> None:
        super().__init__()
        hidden = min(d_in, d_out)
        self.A = nn.Parameter(torch.empty(blocks, hidden // blocks, d_in // blocks))
        self.B = nn.Parameter(torch.empty(blocks, d_out // blocks, hidden // blocks))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        K = len(self.A)
        h = block_product(split_blocks(x, K), self.A)  # (N, K, H/K)
        dealt = h.flatten(1).unflatten(1, (-1, K)).mT  # (N, K, H/K), the same channels dealt to the blocks
        y = block_product(dealt, self.B)  # (N, K, C_out/K)
        y = y.mT.reshape(*x.shape[:-1], -1)  # (..., C_out), the channels dealt back
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense_weight(self) -> Tensor:
        """Return the matrix (C_out, C_in) of this layer."""
        K = len(self.A)
        dealt = torch.block_diag(*self.A).unflatten(0, (-1, K)).transpose(0, 1).flatten(0, 1)  # (H, C_in)
        return (torch.block_diag(*self.B) @ dealt).unflatten(0, (K, -1)).transpose(0, 1).flatten(0, 1)


def split_blocks(x: Tensor, blocks: int) -> Tensor:
    return x.reshape(-1, blocks, x.size(-1) // blocks)  # (..., C_in) -> (N, K, C_in/K)


def block_product(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x (N, K, P) by the weight (K, Q, P)^T of its block: (N, K, Q)."""
    return torch.bmm(x.transpose(0, 1), weight.mT).transpose(0, 1)
