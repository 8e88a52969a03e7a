"""A GPT with low-dimensional projected attention (LPA, arXiv 2411.02063) and its dense twin, in one file.

LPA writes each attention projection as two thin matrices with nothing between them,

    y = B (A x) + bias        A: (R, C_in)   B: (C_out, R)   R < C_in C_out / (C_in + C_out),

and leaves the feed-forward dense. `lowdim` gives every sublayer a rank of its own; rank 0 is a dense matrix.

Shapes: B batch, T time, C n_embd, H heads, G key and value heads, D head width, F ffn_dim, R rank, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Literal, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LowDim:
    """A rank per sublayer; 0 = a dense matrix."""

    q: int = 0
    k: int = 0
    v: int = 0
    o: int = 0
    gate: int = 0
    up: int = 0
    down: int = 0


@dataclass(frozen=True)
class GPTConfig:
    """What the model is. The defaults are the paper's setting 2: RMSNorm before, SwiGLU, RoPE, no biases."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 512
    """Longest context, in tokens."""
    vocab_size: int | None = None
    """None = that of the corpus, padded to a multiple of 128."""
    attn_dim: int | None = None
    """Width of all heads together; None = n_embd."""
    n_kv_head: int | None = None
    """Key and value heads, each shared by n_head / n_kv_head query heads; None = n_head."""
    ffn_dim: int | None = None
    """None = 4 n_embd, or for swiglu 8/3 n_embd rounded up to a multiple of 16."""
    lowdim: LowDim = field(default_factory=LowDim)
    factor_init: Literal["spectral", "matched", "torch"] = "spectral"
    """Law of the factors at the start; see GPT.init_weights."""
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_eps: float = 1e-6
    norm_order: Literal["pre", "post"] = "pre"
    """pre: x + f(Norm x), and a last norm. post: x + Norm(f x), and no last norm."""
    mlp: Literal["relu", "gelu", "swiglu"] = "swiglu"
    """gelu is the tanh form of GPT-2."""
    pos: Literal["learned", "rope", "none"] = "rope"
    rope_theta: float = 10000.0
    bias: bool = False
    """In the projections and in LayerNorm; a factored projection has it after its last factor."""
    head_bias: bool = False
    tie_embeddings: bool = False
    dropout: float = 0.0
    """On the embeddings and on what each sublayer adds to the residual stream."""

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted 1 or more")
        if self.heads_dim % self.n_head:
            name = "n_embd" if self.attn_dim is None else "attn_dim"
            raise ValueError(f"{name} is {self.heads_dim}, wanted a multiple of n_head = {self.n_head}")
        if self.kv_heads < 1 or self.n_head % self.kv_heads:
            raise ValueError(f"n_kv_head is {self.kv_heads}, wanted a divisor of n_head = {self.n_head}")
        if self.pos == "rope" and self.head_dim % 2:
            raise ValueError(f"heads are {self.head_dim} wide, wanted an even width for pos = 'rope'")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, wanted at least 0 and below 1")
        for sublayer in fields(self.lowdim):
            rank = getattr(self.lowdim, sublayer.name)
            if rank < 0:
                raise ValueError(f"lowdim.{sublayer.name} is {rank}, wanted a rank, or 0 for a dense matrix")
        if self.lowdim.gate and self.mlp != "swiglu":
            raise ValueError(f"lowdim.gate is {self.lowdim.gate}, but mlp = '{self.mlp}' has no gate")

    @property
    def heads_dim(self) -> int:
        return self.n_embd if self.attn_dim is None else self.attn_dim

    @property
    def head_dim(self) -> int:
        return self.heads_dim // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def hidden_dim(self) -> int:
        if self.ffn_dim is not None:
            return self.ffn_dim
        return -(-8 * self.n_embd // 48) * 16 if self.mlp == "swiglu" else 4 * self.n_embd


class Cache(Protocol):
    """What attention needs of a key-value cache; decode.py has it."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """k, v of the new tokens, each (B, G, T, D) -> those of all tokens so far, and a mask or None."""


class Dense(nn.Module):
    """y = W x + bias. As nn.Linear, without the initialisation that init_weights would overwrite."""

    rank = 0

    def __init__(self, d_in: int, d_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class LowRank(nn.Module):
    """y = B (A x) + bias: a matrix of rank R that is never formed (paper, section 3.1)."""

    def __init__(self, d_in: int, d_out: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.rank = rank
        self.A = nn.Parameter(torch.empty(rank, d_in))
        self.B = nn.Parameter(torch.empty(d_out, rank))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.A), self.B, self.bias)

    def materialise(self) -> Tensor:
        """The dense matrix (d_out, d_in) that this layer stands for."""
        return self.B @ self.A


def projection(d_in: int, d_out: int, rank: int, bias: bool) -> nn.Module:
    return LowRank(d_in, d_out, rank, bias) if rank else Dense(d_in, d_out, bias)


def project(x: Tensor, layers: tuple[nn.Module, ...]) -> list[Tensor]:
    """x (B, T, C) through layers that share it, their first matrices as one product: [(B, T, d_out) per layer].

    The weights stay apart, so that every optimizer sees them apart.
    """
    first = [layer.A if layer.rank else layer.weight for layer in layers]
    bias = None
    if any(layer.bias is not None and not layer.rank for layer in layers):
        bias = torch.cat([w.new_zeros(len(w)) if layer.rank else layer.bias for layer, w in zip(layers, first)])
    parts = F.linear(x, torch.cat(first), bias).split([len(weight) for weight in first], dim=-1)
    return [F.linear(h, layer.B, layer.bias) if layer.rank else h for layer, h in zip(layers, parts)]


class Norm(nn.Module):
    """LayerNorm, or RMSNorm which neither centres nor shifts (arXiv 1910.07467)."""

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.eps, self.rms = c.norm_eps, c.norm == "rmsnorm"
        self.weight = nn.Parameter(torch.empty(c.n_embd))
        self.bias = nn.Parameter(torch.empty(c.n_embd)) if c.bias and not self.rms else None

    def forward(self, x: Tensor) -> Tensor:
        if self.rms:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def rotations(c: GPTConfig, device: torch.device) -> Tensor:
    """cos and sin of the angle of each position and channel pair, (2, block_size, D/2) (RoPE, arXiv 2104.09864)."""
    frequency = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, device=device).float() / c.head_dim)
    angle = torch.outer(torch.arange(c.block_size, device=device).float(), frequency)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn channel i with channel i + D/2 by the angle of the position. x (B, T, H, D), rotation (2, T, D/2)."""
    cos, sin = rotation[:, :, None, :]  # each (T, 1, D/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x)


class Attention(nn.Module):
    """Causal self-attention whose four projections may be low-rank."""

    def __init__(self, c: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, c.head_dim
        kv_dim = c.kv_heads * c.head_dim
        self.q = projection(c.n_embd, c.heads_dim, c.lowdim.q, c.bias)
        self.k = projection(c.n_embd, kv_dim, c.lowdim.k, c.bias)
        self.v = projection(c.n_embd, kv_dim, c.lowdim.v, c.bias)
        self.o = projection(c.heads_dim, c.n_embd, c.lowdim.o, c.bias)

    def forward(self, x: Tensor, rotation: Tensor | None, cache: Cache | None = None) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in project(x, (self.q, self.k, self.v)))  # (B, T, H, D)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D); k, v (B, G, T, D)
        mask = None
        if cache is not None:
            k, v, mask = cache.append(self.layer, k, v)
        # Without a mask, new tokens are all there is (causal), or one token that may see everything before it.
        causal = mask is None and q.size(2) == k.size(2)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.size(1) != k.size(1))
        return self.o(y.transpose(1, 2).flatten(2))  # (B, T, C)


class MLP(nn.Module):
    """Two matrices around an activation, or three for SwiGLU (arXiv 2002.05202)."""

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.kind = c.mlp
        if c.mlp == "swiglu":
            self.gate = projection(c.n_embd, c.hidden_dim, c.lowdim.gate, c.bias)
        self.up = projection(c.n_embd, c.hidden_dim, c.lowdim.up, c.bias)
        self.down = projection(c.hidden_dim, c.n_embd, c.lowdim.down, c.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        h = self.up(x)  # (B, T, F)
        return self.down(F.relu(h) if self.kind == "relu" else F.gelu(h, approximate="tanh"))


class Block(nn.Module):
    def __init__(self, c: GPTConfig, layer: int) -> None:
        super().__init__()
        self.pre = c.norm_order == "pre"
        self.norm1, self.norm2 = Norm(c), Norm(c)
        self.attn = Attention(c, layer)
        self.mlp = MLP(c)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, rotation: Tensor | None, cache: Cache | None = None) -> Tensor:
        if self.pre:
            x = x + self.dropout(self.attn(self.norm1(x), rotation, cache))
            return x + self.dropout(self.mlp(self.norm2(x)))
        x = x + self.dropout(self.norm1(self.attn(x, rotation, cache)))
        return x + self.dropout(self.norm2(self.mlp(x)))


class GPT(nn.Module):
    """The language model. `model(idx)` gives logits, `model(idx, targets)` the mean loss in nats per token."""

    def __init__(self, c: GPTConfig, seed: int = 1) -> None:
        """Raises ValueError where vocab_size is None: only the corpus knows it."""
        super().__init__()
        if c.vocab_size is None:
            raise ValueError("vocab_size is None, wanted a number of tokens")
        self.config = c
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(c.vocab_size, c.n_embd, _weight=torch.empty(c.vocab_size, c.n_embd)),
                drop=nn.Dropout(c.dropout),
                h=nn.ModuleList(Block(c, layer) for layer in range(c.n_layer)),
            )
        )
        if c.pos == "learned":
            wpe = torch.empty(c.block_size, c.n_embd)
            self.transformer.wpe = nn.Embedding(c.block_size, c.n_embd, _weight=wpe)
        if c.norm_order == "pre":
            self.transformer.norm = Norm(c)
        self.lm_head = Dense(c.n_embd, c.vocab_size, c.head_bias)
        if c.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        rotation = rotations(c, self.lm_head.weight.device) if c.pos == "rope" else None
        self.register_buffer("rotation", rotation, persistent=False)
        if not self.lm_head.weight.is_meta:
            self.init_weights(seed)

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: Cache | None = None, start: int = 0) -> Tensor:
        """Token ids (B, T) at positions start, start + 1, ... -> logits (B, T, V), or with targets (B, T) the loss.

        Raises ValueError where the last position is beyond block_size.
        """
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"position {end} is beyond block_size = {self.config.block_size}")
        x = self.transformer.wte(idx)  # (B, T, C)
        if self.config.pos == "learned":
            x = x + self.transformer.wpe.weight[start:end]
        x = self.transformer.drop(x)
        rotation = self.rotation[:, start:end] if self.rotation is not None else None
        for block in self.transformer.h:
            x = block(x, rotation, cache)
        if self.config.norm_order == "pre":
            x = self.transformer.norm(x)
        logits = self.lm_head(x)  # (B, T, V)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
