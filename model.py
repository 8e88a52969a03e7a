"""A GPT with low-dimensional projected attention (LPA, arXiv 2411.02063), and its dense twin.

LPA writes each attention projection as two thin matrices with nothing between them, and keeps the feed-forward dense:

    y = B (A x) + bias        A: (R, C_in)   B: (C_out, R)

It saves parameters if R < C_in C_out / (C_in + C_out). `lowdim` sets each rank; all 0 is the dense twin, like Llama.

Shapes: B batch, T new tokens, S tokens so far, C n_embd, H heads, G key and value heads, D head width, D_r rope_dim,
F ffn_dim, R rank of a projection, V vocabulary.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lpa import checks, init, structured
from lpa.loss import chunked_cross_entropy


@dataclass(frozen=True)
class LowDim:
    """The rank R of each projection; 0 = dense; 'blockdense:R:K', 'blockshuffle:K': K blocks (lpa/structured.py)."""

    q: int | str = 0
    k: int | str = 0
    v: int | str = 0
    o: int | str = 0
    gate: int | str = 0
    up: int | str = 0
    down: int | str = 0


@dataclass(frozen=True)
class GPTConfig:
    """The model. The defaults are setting 2 of the paper: RMSNorm first, SwiGLU, RoPE, no biases."""

    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    block_size: int = 512
    vocab_size: int | None = None
    """None = that of the corpus, padded to a multiple of 128."""
    attn_dim: int | None = None
    """The width of all heads together; None = n_embd."""
    n_kv_head: int | None = None
    """Key and value heads, each shared by n_head / n_kv_head query heads; None = n_head."""
    ffn_dim: int | None = None
    """None = 4 n_embd, or for swiglu 8/3 n_embd, rounded up to a multiple of 16."""
    lowdim: LowDim = field(default_factory=LowDim)
    first_ffn_dense: bool = False
    """Keep gate, up and down of the first block dense, whatever lowdim says (arXiv 2406.16450)."""
    factor_init: Literal["spectral", "matched", "torch"] = "spectral"
    """How A and B are drawn; see GPT.init_weights."""
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_eps: float = 1e-6
    norm_order: Literal["pre", "post"] = "pre"
    """pre: x + f(norm(x)), and a last norm. post: x + norm(f(x)), and no last norm."""
    mlp: Literal["relu", "relu2", "gelu", "swiglu"] = "swiglu"
    """gelu is GPT-2's tanh form; relu2 is the square of relu (arXiv 2109.08668)."""
    pos: Literal["learned", "rope", "none"] = "rope"
    rope_theta: float = 10000.0
    rope_dim: int | None = None
    """Decoupled RoPE (arXiv 2405.04434): each head gets so many extra channels, and only these rotate. Their key is
    shared by all heads. The other channels do not rotate, so a cache can hold latents. None = rotate the whole head."""
    qk_norm: bool = False
    """Normalise each head's query and key to length sqrt(D) before RoPE (arXiv 2010.04245)."""
    bias: bool = False
    """In the projections and in LayerNorm; a factored projection adds it after B."""
    head_bias: bool = False
    tie_embeddings: bool = False
    zero_init: bool = False
    """Start o, down and the head (if it is not tied) at zero: blocks add nothing, all tokens are equally likely."""
    dropout: float = 0.0
    """On the embeddings and on the output of attention and of the feed-forward."""

    def __post_init__(self) -> None:
        ffn_dim = -(-8 * self.n_embd // 48) * 16 if self.mlp == "swiglu" else 4 * self.n_embd
        for name, value in dict(attn_dim=self.n_embd, n_kv_head=self.n_head, ffn_dim=ffn_dim).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)  # as the dataclass is frozen
        checks.check_model(self)

    @property
    def head_dim(self) -> int:
        return self.attn_dim // self.n_head

    @property
    def projections(self) -> dict[str, tuple]:
        """Return the width in and the width out of each projection of a block."""
        C, q, kv, ffn = self.n_embd, self.attn_dim, self.n_kv_head * self.head_dim, self.ffn_dim
        gate = dict(gate=(C, ffn)) if self.mlp == "swiglu" else {}
        return dict(q=(C, q), k=(C, kv), v=(C, kv), o=(q, C)) | gate | dict(up=(C, ffn), down=(ffn, C))


class LowRank(nn.Module):
    """Compute y = B (A x) + bias: a matrix of rank R that is never formed (paper, section 3.1)."""

    def __init__(self, d_in: int, d_out: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, d_in))
        self.B = nn.Parameter(torch.empty(d_out, rank))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None

    def latent(self, x: Tensor) -> Tensor:
        return F.linear(x, self.A)  # (..., C_in) -> (..., R)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.latent(x), self.B, self.bias)  # (..., R) -> (..., C_out)


def dense(d_in: int, d_out: int, bias: bool) -> nn.Linear:
    layer = nn.Linear(d_in, d_out, bias, device="meta")  # here PyTorch draws no weights: init_weights does
    layer.weight = nn.Parameter(torch.empty(d_out, d_in))
    layer.register_parameter("bias", nn.Parameter(torch.empty(d_out)) if bias else None)
    return layer


def projection(c: GPTConfig, name: str) -> nn.Module:
    """Return the layer that c.lowdim asks for: dense, low-rank, or block-structured."""
    d_in, d_out = c.projections[name]
    rank = getattr(c.lowdim, name)
    if isinstance(rank, str):
        return structured.make(rank, d_in, d_out, c.bias)
    return LowRank(d_in, d_out, rank, c.bias) if rank else dense(d_in, d_out, c.bias)


class Norm(nn.Module):
    """LayerNorm, or RMSNorm, which neither centres nor shifts (arXiv 1910.07467)."""

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.eps, self.rms = c.norm_eps, c.norm == "rmsnorm"
        self.weight = nn.Parameter(torch.empty(c.n_embd))
        self.bias = nn.Parameter(torch.empty(c.n_embd)) if c.bias and not self.rms else None

    def forward(self, x: Tensor) -> Tensor:
        # Without autocast, which would keep float32 copies for backward; the kernels sum in float32 anyway.
        weight = self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if self.rms:
                return F.rms_norm(x, weight.shape, weight, self.eps)
            return F.layer_norm(x, weight.shape, weight, bias, self.eps)


def rope_table(c: GPTConfig) -> Tensor:
    """Return cos and sin by position and angle (arXiv 2104.09864): (2, block_size, D/2), with rope_dim D_r/2."""
    width = c.rope_dim or c.head_dim
    frequency = c.rope_theta ** (-torch.arange(0, width, 2).float() / width)
    angle = torch.outer(torch.arange(c.block_size).float(), frequency)
    return torch.stack([angle.cos(), angle.sin()])


def apply_rope(x: Tensor, rope: Any) -> Tensor:
    """Rotate channel i with channel i + D/2. x (B, T, H, D); rope (2, T, D/2), or (2, B, T, D/2) by row."""
    cos, sin = rope[..., None, :]  # equal for all heads: each (T, 1, D/2) or (B, T, 1, D/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    """Causal self-attention whose four projections may be low-rank."""

    def __init__(self, c: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.rope_dim = layer, c.head_dim, c.rope_dim
        self.qk_norm, self.norm_eps = c.qk_norm, c.norm_eps
        self.q, self.k, self.v, self.o = (projection(c, name) for name in "qkvo")
        if c.rope_dim is not None:  # position enters by extra channels, which stay dense
            self.qr = dense(c.n_embd, c.n_head * c.rope_dim, bias=False)
            self.kr = dense(c.n_embd, c.rope_dim, bias=False)

    def forward(self, x: Tensor, rope: Tensor | None, mask: Tensor | None, cache: Any = None) -> Tensor:
        """x (B, T, C) -> (B, T, C). mask (T, S) or (B, 1, T, S), True where a token may look; None = causal."""
        if cache is not None and cache.absorbs(self):  # it holds latents and needs no k or v (lpa/decode.py)
            return self.o(cache.attend(self, x, rope, mask))
        q, k = self.queries_and_keys(x, rope)  # (B, H, T, D), (B, G, T, D)
        v = self.split_heads(self.v(x)).transpose(1, 2)  # (B, G, T, D)
        if cache is not None:
            k, v = cache.append(self, x, k, v)  # (B, G, S, D)
        v = F.pad(v, (0, self.rope_dim)) if self.rope_dim else v  # fused kernels want v as wide as k
        causal = mask is None and x.size(1) > 1  # a single new token sees all tokens before it
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=q.size(1) != k.size(1))
        return self.o(y[..., : self.head_dim].transpose(1, 2).flatten(2))  # cut v's padding; (B, T, H D) -> (B, T, C)

    def queries_and_keys(self, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, T, C) -> q (B, H, T, D), k (B, G, T, D); with rope_dim, D + D_r wide."""
        q, k = self.split_heads(self.q(x)), self.split_heads(self.k(x))  # (B, T, H, D), (B, T, G, D)
        if self.qk_norm:
            q, k = (F.rms_norm(y, (self.head_dim,), eps=self.norm_eps) for y in (q, k))
        if self.rope_dim is not None:  # qr (B, T, H, D_r), kr (B, T, 1, D_r)
            qr, kr = (apply_rope(y.unflatten(-1, (-1, self.rope_dim)), rope) for y in (self.qr(x), self.kr(x)))
            q, k = torch.cat([q, qr], dim=-1), torch.cat([k, kr.expand(*k.shape[:3], -1)], dim=-1)
        elif rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        return q.transpose(1, 2), k.transpose(1, 2)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # (B, T, H D) -> (B, T, H, D)


class MLP(nn.Module):
    """Two matrices around an activation, or three for SwiGLU (arXiv 2002.05202)."""

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.kind = c.mlp
        self.gate = projection(c, "gate") if c.mlp == "swiglu" else None
        self.up, self.down = projection(c, "up"), projection(c, "down")

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)  # (B, T, F)
        if self.kind == "swiglu":
            h = F.silu(self.gate(x)) * h
        elif self.kind == "gelu":
            h = F.gelu(h, approximate="tanh")
        else:
            h = F.relu(h) if self.kind == "relu" else F.relu(h).square()
        return self.down(h)  # (B, T, C)


class Block(nn.Module):
    def __init__(self, c: GPTConfig, layer: int) -> None:
        super().__init__()
        if c.first_ffn_dense and layer == 0:
            c = replace(c, lowdim=replace(c.lowdim, gate=0, up=0, down=0))
        self.pre = c.norm_order == "pre"
        self.norm1, self.norm2 = Norm(c), Norm(c)
        self.attn = Attention(c, layer)
        self.mlp = MLP(c)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, rope: Tensor | None, mask: Tensor | None, cache: Any = None) -> Tensor:
        if self.pre:
            x = x + self.dropout(self.attn(self.norm1(x), rope, mask, cache))
            return x + self.dropout(self.mlp(self.norm2(x)))
        x = x + self.dropout(self.norm1(self.attn(x, rope, mask, cache)))
        return x + self.dropout(self.norm2(self.mlp(x)))


class GPT(nn.Module):
    """The language model. `model(idx)` gives logits, `model(idx, targets)` the mean loss in nats per token."""

    def __init__(self, c: GPTConfig, seed: int | None = 1) -> None:
        """Draw the weights from `seed`, or leave them unset for a checkpoint. Raise ValueError without vocab_size."""
        super().__init__()
        if c.vocab_size is None:
            raise ValueError("vocab_size is None, wanted a number of tokens")
        self.config = c
        wte = nn.Embedding(c.vocab_size, c.n_embd, _weight=torch.empty(c.vocab_size, c.n_embd))
        h = nn.ModuleList(Block(c, layer) for layer in range(c.n_layer))
        self.transformer: Any = nn.ModuleDict(dict(wte=wte, drop=nn.Dropout(c.dropout), h=h))
        if c.pos == "learned":
            self.transformer.wpe = nn.Embedding(c.block_size, c.n_embd, _weight=torch.empty(c.block_size, c.n_embd))
        if c.norm_order == "pre":
            self.transformer.norm = Norm(c)
        self.lm_head = dense(c.n_embd, c.vocab_size, c.head_bias)
        if c.tie_embeddings:
            self.lm_head.weight = self.transformer.get_parameter("wte.weight")
        self.register_buffer("rope", rope_table(c) if c.pos == "rope" else None, persistent=False)
        if seed is not None and not self.lm_head.weight.is_meta:
            self.init_weights(seed)

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: Any = None, last: bool = False) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V), of the last token (B, 1, V), or the mean loss of the last M positions.

        targets (B, M). idx continues what is in the cache (lpa/decode.py). Raise ValueError beyond block_size.
        """
        x = self.hidden(idx, cache)  # (B, T, C)
        if targets is not None:  # never holds all logits (lpa/loss.py)
            return chunked_cross_entropy(self.lm_head, x[:, -targets.size(1) :], targets)
        return self.lm_head(x[:, -1:] if last else x)

    def hidden(self, idx: Tensor, cache: Any = None) -> Tensor:
        """Token ids (B, T) -> what the head reads: the last block's output, normed, (B, T, C)."""
        past = 0 if cache is None else cache.length
        end = past + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"position {end} is beyond block_size = {self.config.block_size}")
        positions, mask = slice(past, end), self.attention_mask(idx.size(1), end)
        if cache is not None:
            positions, mask = cache.extend(positions, mask)  # they differ by row where prompts differ in length
        x = self.transformer.wte(idx)  # (B, T, C)
        if self.config.pos == "learned":
            x = x + self.transformer.wpe.weight[positions]
        if torch.is_autocast_enabled(x.device.type):  # keep the residual stream in bfloat16: products round it anyway
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = self.transformer.drop(x)
        rope = None if self.rope is None else self.rope[:, positions].to(x.dtype)
        for block in self.transformer.h:
            x = block(x, rope, mask, cache)
        return self.transformer.norm(x) if self.config.norm_order == "pre" else x

    def attention_mask(self, T: int, S: int) -> Tensor | None:
        """Return which of S tokens each of the last T may look at, (T, S). None: attention needs no tensor for it."""
        if T in (1, S):  # a single token sees all; T = S is the causal mask
            return None
        return torch.ones(T, S, dtype=torch.bool, device=self.lm_head.weight.device).tril(S - T)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw every parameter. A test measures each row of this table.

        s is 0.02. For o and down, which write into the residual stream, it is 0.02 / sqrt(2 n_layer); with norm_order
        'post' it is not, since the norm would undo it. N(0, s) has the standard deviation s, as has the product B A.

        embeddings, head   N(0, 0.02)
        dense projection   N(0, s)
        A, B: 'spectral'   truncated SVD of a dense N(0, s) matrix, split evenly (arXiv 2105.01029)
              'matched'    N(0, sqrt(s / sqrt(R))): B A has the variance of a dense matrix
              'torch'      U(-a, a) with a = 1 / sqrt(width in), as in the authors' code; then B times s / 0.02
              of blocks    each block orthogonal (arXiv 2406.16450); then B times s / 0.02
        bias; norm weight  0; 1
        zero_init          then sets o, down and an untied head to 0; where they are factored, only B
        """
        c, std = self.config, 0.02
        generator = torch.Generator(self.lm_head.weight.device).manual_seed(seed)
        for name, module in self.named_modules():
            last = name.endswith((".o", ".down"))
            s = std / (2 * c.n_layer) ** 0.5 if last and c.norm_order == "pre" else std
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0, s, generator=generator)
            elif isinstance(module, LowRank | structured.BlockDense | structured.BlockShuffle):
                init.fill(module.A, module.B, c.factor_init, s, std, generator)
            elif isinstance(module, Norm):
                module.weight.fill_(1)
            elif next(module.parameters(recurse=False), None) is not None:
                raise ValueError(f"no rule to initialise {name}, a {type(module).__name__}: add one to init_weights")
            if c.zero_init and (last or (module is self.lm_head and not c.tie_embeddings)):
                (module.weight if isinstance(module, nn.Linear) else module.B).zero_()
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()

    def n_params(self, embeddings: bool = True) -> int:
        """Count the parameters, shared ones once; embeddings=False leaves out wte, wpe and lm_head."""
        outside = () if embeddings else ("transformer.wte.", "transformer.wpe.", "lm_head.")
        return sum(p.numel() for name, p in self.named_parameters() if not name.startswith(outside))

    def flops_per_token(self, context: int | None = None) -> int:
        """Count matmul and attention FLOPs of a forward pass, 2 per multiply-add; training takes 3 times as many."""
        c = self.config
        layers = [m for m in self.modules() if not isinstance(m, nn.Embedding)]
        matrices = sum(p.numel() for m in layers for p in m.parameters(recurse=False) if p.ndim > 1)
        widths = 2 * c.attn_dim + c.n_head * (c.rope_dim or 0)  # a token looks at half of the context on average
        return 2 * matrices + c.n_layer * (context or c.block_size) * widths
