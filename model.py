"""A GPT with low-dimensional projected attention (LPA, arXiv 2411.02063) and its dense twin, in one file.

LPA writes each attention projection as two thin matrices with nothing between them,

    y = B (A x) + bias        A: (R, C_in)   B: (C_out, R)   R < C_in C_out / (C_in + C_out),

and leaves the feed-forward dense. `lowdim` gives every sublayer a rank of its own, 0 for a dense matrix, or one of the
structures of structured.py.

Shapes: B batch, T time, C n_embd, H heads, G key and value heads, D head width, F ffn_dim, R rank, V vocabulary.
"""

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lpa import init
from lpa.cpu import linear, rms_norm
from lpa.loss import GatedProduct, HeadLoss, keep_wide


@dataclass(frozen=True)
class LowDim:
    """A rank per sublayer; 0 = a dense matrix; or 'blockdense:R:B' or 'blockshuffle:B', of B blocks."""

    q: int | str = 0
    k: int | str = 0
    v: int | str = 0
    o: int | str = 0
    gate: int | str = 0
    up: int | str = 0
    down: int | str = 0


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
    first_ffn_dense: bool = False
    """Leave gate, up and down of the first block dense, whatever lowdim says (arXiv 2406.16450)."""
    factor_init: Literal["spectral", "matched", "torch"] = "spectral"
    """Law of the factors of rank r at the start; see GPT.init_weights."""
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_eps: float = 1e-6
    norm_order: Literal["pre", "post"] = "pre"
    """pre: x + f(Norm x), and a last norm. post: x + Norm(f x), and no last norm."""
    mlp: Literal["relu", "relu2", "gelu", "swiglu"] = "swiglu"
    """gelu is the tanh form of GPT-2; relu2 the square of relu (arXiv 2109.08668)."""
    pos: Literal["learned", "rope", "none"] = "rope"
    rope_theta: float = 10000.0
    rope_dim: int | None = None
    """Rotate this many channels that each head gets besides its own, their key shared by all heads (the decoupled
    RoPE of arXiv 2405.04434), so that a cache needs only latents and them; None = the whole head rotates."""
    qk_norm: bool = False
    """Bring each head's query and key to length sqrt(D) before they turn and meet (arXiv 2010.04245)."""
    bias: bool = False
    """In the projections and in LayerNorm; a factored projection has it after its last factor."""
    head_bias: bool = False
    tie_embeddings: bool = False
    zero_init: bool = False
    """Start o, down and an untied head at zero: every block adds nothing at first, and all tokens are as likely."""
    dropout: float = 0.0
    """On the embeddings and on what each sublayer adds to the residual stream."""

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "attn_dim", "n_kv_head", "ffn_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted 1 or more")
        for name in ("norm_eps", "rope_theta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted above 0")
        if self.heads_dim % self.n_head:
            name = "n_embd" if self.attn_dim is None else "attn_dim"
            raise ValueError(f"{name} is {self.heads_dim}, wanted a multiple of n_head = {self.n_head}")
        if self.kv_heads < 1 or self.n_head % self.kv_heads:
            raise ValueError(f"n_kv_head is {self.kv_heads}, wanted a divisor of n_head = {self.n_head}")
        if self.rope_dim is not None and self.pos != "rope":
            raise ValueError(f"rope_dim is {self.rope_dim}, wanted None for pos = '{self.pos}'")
        if self.rope_dim is not None and (self.rope_dim < 2 or self.rope_dim % 2):
            raise ValueError(f"rope_dim is {self.rope_dim}, wanted an even number from 2")
        if self.pos == "rope" and self.rope_dim is None and self.head_dim % 2:
            raise ValueError(f"heads are {self.head_dim} wide, wanted an even width for pos = 'rope'")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, wanted at least 0 and below 1")
        for name, rank in asdict(self.lowdim).items():
            if rank and name not in self.sublayers:
                raise ValueError(f"lowdim.{name} is {rank}, but mlp = '{self.mlp}' has no {name}")
            if isinstance(rank, str):
                from lpa import structured

                try:
                    structured.parse(rank, *self.sublayers[name])
                except ValueError as error:
                    raise ValueError(f"lowdim.{name} is {error}") from None
            elif rank and not 0 < rank <= min(self.sublayers[name]):
                wanted = f"0 (dense) to {min(self.sublayers[name])}, its narrower side"
                raise ValueError(f"lowdim.{name} is {rank}, wanted a rank from {wanted}")

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
    def rotated_dim(self) -> int:
        """Channels of a query that rotate."""
        if self.pos != "rope":
            return 0
        return self.head_dim if self.rope_dim is None else self.rope_dim

    @property
    def hidden_dim(self) -> int:
        if self.ffn_dim is not None:
            return self.ffn_dim
        return -(-8 * self.n_embd // 48) * 16 if self.mlp == "swiglu" else 4 * self.n_embd

    @property
    def sublayers(self) -> dict[str, tuple[int, int]]:
        """Width in and width out of each projection of a block."""
        kv_dim = self.kv_heads * self.head_dim
        widths = {
            "q": (self.n_embd, self.heads_dim),
            "k": (self.n_embd, kv_dim),
            "v": (self.n_embd, kv_dim),
            "o": (self.heads_dim, self.n_embd),
            "gate": (self.n_embd, self.hidden_dim),
            "up": (self.n_embd, self.hidden_dim),
            "down": (self.hidden_dim, self.n_embd),
        }
        if self.mlp != "swiglu":
            del widths["gate"]
        return widths


class Cache(Protocol):
    """What the model needs of a key-value cache; decode.py has it. `length` tokens are in it."""

    length: int

    def positions(self, new: int) -> slice | Tensor:
        """The positions of `new` tokens that follow, as an index: a slice, or (B, T) where they differ by row."""

    def attend(self, attention: "Attention", narrow: list[Tensor], rotation: Tensor | None) -> Tensor:
        """What the heads read from the tokens so far and the new ones (B, T, H D), which are stored."""


class Dense(nn.Module):
    """y = W x + bias. As nn.Linear, without the initialisation that init_weights would overwrite."""

    rank = 0

    def __init__(self, d_in: int, d_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def narrow(self, x: Tensor) -> Tensor:
        return self(x)

    def widen(self, y: Tensor) -> Tensor:
        """From narrow's result to the layer's: nothing is left to do."""
        return y


class LowRank(nn.Module):
    """y = B (A x) + bias: a matrix of rank R that is never formed (paper, section 3.1).

    Not to decode either, but where measuring finds it faster (decode.premerge): merged ahead it was 1.4 to 2.2 times
    slower at C 768 and R 128 (results/decode_cpu.md).
    """

    def __init__(self, d_in: int, d_out: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.rank = rank
        self.A = nn.Parameter(torch.empty(rank, d_in))
        self.B = nn.Parameter(torch.empty(d_out, rank))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.widen(self.narrow(x))

    def narrow(self, x: Tensor) -> Tensor:
        """From (..., C_in) to the latent (..., R)."""
        return linear(x, self.A)

    def widen(self, y: Tensor) -> Tensor:
        """From the latent (..., R) to (..., C_out)."""
        return linear(y, self.B, self.bias)

    def materialise(self) -> Tensor:
        """The dense matrix (d_out, d_in) that this layer stands for."""
        return self.B @ self.A


def projection(c: GPTConfig, sublayer: str) -> nn.Module:
    d_in, d_out = c.sublayers[sublayer]
    rank = getattr(c.lowdim, sublayer)
    if isinstance(rank, str):
        from lpa import structured

        return structured.make(rank, d_in, d_out, c.bias)
    return LowRank(d_in, d_out, rank, c.bias) if rank else Dense(d_in, d_out, c.bias)


def project(x: Tensor, layers: tuple[Any, ...]) -> list[Tensor]:
    """The first matrix of each layer times x (B, T, C), which they share: [(B, T, R), or (B, T, d_out) where dense].

    On a GPU they are one product, unless the tokens are few or a layer has blocks. On a CPU joining the weights costs
    more than it gains.
    """
    if x.is_cuda and x.numel() // x.size(-1) > 32 and all(isinstance(layer, Dense | LowRank) for layer in layers):
        weights = [layer.A if layer.rank else layer.weight for layer in layers]
        return joined(x, weights, [None if layer.rank else layer.bias for layer in layers])
    return [layer.narrow(x) for layer in layers]


def joined(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """linear(x, weight, bias) of each, as one product; the weights stay apart, so that optimizers see them apart."""
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases)])
    return list(F.linear(x, torch.cat(weights), bias).split([len(w) for w in weights], dim=-1))


class Norm(nn.Module):
    """LayerNorm, or RMSNorm which neither centres nor shifts (arXiv 1910.07467)."""

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.eps, self.rms = c.norm_eps, c.norm == "rmsnorm"
        self.weight = nn.Parameter(torch.empty(c.n_embd))
        self.bias = nn.Parameter(torch.empty(c.n_embd)) if c.bias and not self.rms else None

    def forward(self, x: Tensor) -> Tensor:
        # In the precision of x: the kernels sum in float32 by themselves, and autocast would keep float32 copies.
        weight = self.weight.to(x.dtype)
        if self.rms:
            return rms_norm(x, weight, self.eps)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, weight.shape, weight, bias, self.eps)


def rotations(c: GPTConfig, device: torch.device) -> Tensor:
    """cos and sin of the angle of each position and channel pair, (2, block_size, D/2) (RoPE, arXiv 2104.09864).

    With rope_dim, here and in rotate, D is rope_dim.
    """
    frequency = c.rope_theta ** (-torch.arange(0, c.rotated_dim, 2, device=device).float() / c.rotated_dim)
    angle = torch.outer(torch.arange(c.block_size, device=device).float(), frequency)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn channel i with channel i + D/2 by the angle of the position.

    x (B, T, H, D), rotation (2, T, D/2), or (2, B, T, D/2) where the rows are at different positions.
    """
    cos, sin = rotation[..., None, :]  # each (T, 1, D/2) or (B, T, 1, D/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    """Causal self-attention whose four projections may be low-rank.

    With rope_dim R, position enters through R more channels a head, apart from the D that come from the latents: qr
    makes each head's query, kr one key for all heads. They are dense and, as they are small and turned, have no bias.
    """

    def __init__(self, c: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.rope_dim = layer, c.head_dim, c.rope_dim
        self.qk_norm, self.norm_eps = c.qk_norm, c.norm_eps
        self.q, self.k, self.v, self.o = (projection(c, name) for name in "qkvo")
        if c.rope_dim is not None:
            self.qr = Dense(c.n_embd, c.n_head * c.rope_dim, bias=False)
            self.kr = Dense(c.n_embd, c.rope_dim, bias=False)

    def forward(self, x: Tensor, rotation: Tensor | None, cache: Cache | None = None) -> Tensor:
        apart = () if self.rope_dim is None else (self.qr, self.kr)
        narrow = project(x, (self.q, self.k, self.v, *apart))  # of each the latent (B, T, R), or (B, T, H D)
        if cache is not None:
            return self.o(cache.attend(self, narrow, rotation))  # (B, T, C)
        turned = [self.turn(y, rotation) for y in narrow[3:]]  # (B, H, T, R) and (B, 1, T, R), with rope_dim
        q, k, v = (self.heads(name, y, rotation) for name, y in zip("qkv", narrow))  # (B, H, T, D); k, v (B, G, T, D)
        return self.o(attend(q, k, v, *turned))

    def heads(self, name: str, y: Tensor, rotation: Tensor | None) -> Tensor:
        """The second matrix of q, k or v times y (B, T, R), in heads (B, H, T, D), normed and turned if asked."""
        y = getattr(self, name).widen(y).unflatten(-1, (-1, self.head_dim))  # (B, T, H, D)
        if self.qk_norm and name != "v":
            y = rms_norm(y, None, self.norm_eps)
        if rotation is not None and name != "v" and self.rope_dim is None:
            y = rotate(y, rotation)
        return y.transpose(1, 2)

    def turn(self, y: Tensor, rotation: Tensor | None) -> Tensor:
        """The result of qr or kr (B, T, H R), split into heads and turned (B, H, T, R): with rope_dim all do turn."""
        assert rotation is not None
        return rotate(y.unflatten(-1, (-1, self.rope_dim)), rotation).transpose(1, 2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, qr: Tensor | None = None, kr: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Attention among the T tokens of q (B, H, T, D), k and v (B, G, T, D): (B, T, H D). Causal, or as mask says.

    qr (B, H, T, R) and kr (B, 1, T, R) are more channels of each query and key. The values get as many zeros, as the
    fused kernels want them as wide as keys.
    """
    width = v.size(-1)
    if qr is not None and kr is not None:
        q, k = torch.cat([q, qr], dim=-1), torch.cat([k, kr.expand(-1, k.size(1), -1, -1)], dim=-1)
        v = F.pad(v, (0, qr.size(-1)))
    few_scores = q.size(1) * q.size(2) ** 2 <= 2**18  # those of a sequence stay in the cache
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and few_scores and mask is None:
        y = attend_plainly(q, k, v)
    else:
        grouped = q.size(1) != k.size(1)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)
    return y[..., :width].transpose(1, 2).flatten(2)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention that forms its T x T scores: the CPU's fused kernel is slow at short texts in bfloat16."""
    B, H, T, D = q.shape
    q = q.reshape(-1, H // k.size(1) * T, D)  # (B G, H / G x T, D): the heads that share a key are more queries
    mask = torch.full((T, T), -torch.inf, dtype=q.dtype, device=q.device).triu(1).repeat(H // k.size(1), 1)
    scores = torch.baddbmm(mask, q, k.flatten(0, 1).mT, alpha=D**-0.5)  # (B G, H / G x T, T)
    return (scores.softmax(-1) @ v.flatten(0, 1)).view(B, H, T, -1)


class MLP(nn.Module):
    """Two matrices around an activation, or three for SwiGLU (arXiv 2002.05202)."""

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.kind = c.mlp
        if c.mlp == "swiglu":
            self.gate = projection(c, "gate")
        self.up, self.down = projection(c, "up"), projection(c, "down")

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "swiglu":
            return self.close(self.gate(x), self.up(x))
        h = self.up(x)  # (B, T, F)
        if self.kind == "gelu":
            return self.down(F.gelu(h, approximate="tanh"))
        h = F.relu(h)
        return self.down(h if self.kind == "relu" else h * h)

    def close(self, gate: Tensor, up: Tensor) -> Tensor:
        """The gated product, and down: of gate and up, each (B, T, F), to (B, T, C). torch.compile fuses by itself."""
        if self.closes_early and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return GatedProduct.apply(gate, up, self.down.weight)
        return self.down(F.silu(gate) * up)

    @property
    def closes_early(self) -> bool:
        """Whether down and its gate can be one step of autograd."""
        return self.kind == "swiglu" and isinstance(self.down, Dense) and self.down.bias is None


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
        self.recompute: Literal["none", "latents", "block"] = "none"
        wide = {c.n_embd, c.heads_dim}
        # Nothing in backward reads what a dense `down` makes, unless a norm or a dropout follows it.
        if c.norm_order == "post" or c.dropout or c.lowdim.down:
            wide.add(c.hidden_dim)
        self.keep = partial(create_selective_checkpoint_contexts, partial(keep_wide, wide))

    def forward(self, x: Tensor, rotation: Tensor | None, cache: Cache | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C). With `recompute`, backward rebuilds what it needs from x and what `keep` saves.

        What 'latents' costs on a CPU is in results/cpu2.md. Where it can, the last product stands outside of what is
        run again: autograd would find out only after running GatedProduct that it needs nothing of it.
        """
        if self.recompute == "none" or cache is not None or not torch.is_grad_enabled():
            return self.add_sublayers(x, rotation, cache)
        options: dict[str, Any] = dict(use_reentrant=False, preserve_rng_state=self.dropout.p > 0)
        if self.recompute == "latents":
            options["context_fn"] = self.keep
            if self.pre and self.mlp.closes_early and not self.dropout.p:
                x, gate, up = checkpoint(self.until_gate, x, rotation, **options)
                return x + self.mlp.close(gate, up)
        return checkpoint(self.add_sublayers, x, rotation, **options)

    def until_gate(self, x: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The first sublayer, and the first two products of the second, which `keep` keeps anyway."""
        x = x + self.attn(self.norm1(x), rotation)
        normed = self.norm2(x)
        return x, self.mlp.gate(normed), self.mlp.up(normed)

    def add_sublayers(self, x: Tensor, rotation: Tensor | None, cache: Cache | None = None) -> Tensor:
        if self.pre:
            x = x + self.dropout(self.attn(self.norm1(x), rotation, cache))
            return x + self.dropout(self.mlp(self.norm2(x)))
        x = x + self.dropout(self.norm1(self.attn(x, rotation, cache)))
        return x + self.dropout(self.norm2(self.mlp(x)))


class GPT(nn.Module):
    """The language model. `model(idx)` gives logits, `model(idx, targets)` the mean loss in nats per token."""

    transformer: Any  # a ModuleDict: to a type checker each of its parts might be a Tensor
    rotation: Tensor | None

    def __init__(self, c: GPTConfig, seed: int | None = 1) -> None:
        """seed=None leaves the weights unfilled, for a checkpoint. Raises ValueError where vocab_size is None."""
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
            self.lm_head.weight = self.transformer.get_parameter("wte.weight")
        rotation = rotations(c, self.lm_head.weight.device) if c.pos == "rope" else None
        self.register_buffer("rotation", rotation, persistent=False)
        if seed is not None and not self.lm_head.weight.is_meta:
            self.init_weights(seed)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: Cache | None = None, last: bool = False
    ) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V), or with targets (B, M) the mean loss of the last M positions.

        With a cache, idx follows what is in it, and is in it afterwards. last=True gives the logits of the last token
        alone, (B, 1, V), for the head costs as much as many layers. Raises ValueError beyond block_size.
        """
        x = self.hidden(idx, cache, last)  # (B, T, C)
        if targets is None:
            return self.lm_head(x)  # (B, T, V)
        x = x[:, -targets.size(1) :]  # (B, M, C)
        head, y = self.lm_head, targets.flatten()
        return HeadLoss.apply(x.flatten(0, 1), head.weight, head.bias, y, torch.is_grad_enabled()) / len(y)

    def hidden(self, idx: Tensor, cache: Cache | None = None, last: bool = False) -> Tensor:
        """What the head reads of token ids (B, T): their last states, normed where the model norms, (B, T, C).

        cache, last and the error are those of forward; with last=True (B, 1, C).
        """
        new = idx.size(1)
        end = new if cache is None else cache.length + new
        if end > self.config.block_size:
            raise ValueError(f"position {end} is beyond block_size = {self.config.block_size}")
        positions = slice(new) if cache is None else cache.positions(new)
        x = self.embed(idx, positions)  # (B, T, C)
        rotation = self.rotation[:, positions].to(x.dtype) if self.rotation is not None else None
        for block in self.transformer.h:
            x = block(x, rotation, cache)
        if cache is not None:
            cache.length = end
        if last:
            x = x[:, -1:]
        return self.transformer.norm(x) if self.config.norm_order == "pre" else x

    def embed(self, idx: Tensor, positions: slice | Tensor) -> Tensor:
        """What the first block reads of token ids (B, T) at these positions: (B, T, C)."""
        x = self.transformer.wte(idx)
        if self.config.pos == "learned":
            x = x + self.transformer.wpe.weight[positions]
        if torch.is_autocast_enabled(x.device.type):  # the residual stream too, as every product rounds it anyway
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return self.transformer.drop(x)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw every parameter. A test measures each row of this table.

        s is 0.02, but 0.02 / sqrt(2 n_layer) for o and down, which write the residual stream, unless norm_order is
        'post': there the norm would erase the scale. It falls on a factored projection once, on the product B A.

        | parameter              | law                                                                              |
        |------------------------|----------------------------------------------------------------------------------|
        | wte, wpe, lm_head      | N(0, 0.02)                                                                       |
        | weight of a Dense      | N(0, s)                                                                          |
        | A, B, 'spectral'       | that of the truncated SVD of a dense N(0, s) draw, its R singular values split    |
        |                        | evenly: same largest singular value as dense, fewer of them (arXiv 2105.01029)   |
        | A, B, 'matched'        | N(0, sqrt(s / sqrt(R))) each: the elements of B A have the variance of a dense draw |
        | A, B, 'torch'          | U(-a, a), a = 1 / sqrt(width in): PyTorch's default, as the paper's authors used; |
        |                        | B times s / 0.02                                                                 |
        | A, B of blocks         | each block, and a B without blocks, orthogonal (arXiv 2406.16450); B times s / 0.02 |
        | o, down, an untied     | with zero_init, in place of the above: 0; of a factored one B is 0 and A as above |
        | lm_head                |                                                                                  |
        | bias                   | 0                                                                                |
        | weight of a norm       | 1                                                                                |
        """
        c, std = self.config, 0.02
        generator = torch.Generator(self.lm_head.weight.device).manual_seed(seed)
        for name, module in self.named_modules():
            writes_residual = name.endswith((".o", ".down")) and c.norm_order == "pre"
            s = std / (2 * c.n_layer) ** 0.5 if writes_residual else std
            if isinstance(module, Dense | nn.Embedding):
                module.weight.normal_(0, s, generator=generator)
            elif isinstance(module, LowRank):
                init.fill(module.A, module.B, c.factor_init, s, std, generator)
            elif hasattr(module, "blocks"):
                from lpa import structured

                structured.fill(module.get_parameter("A"), module.get_parameter("B"), s / std, generator)
            elif isinstance(module, Norm):
                module.weight.fill_(1)
            elif next(module.parameters(recurse=False), None) is not None:
                raise ValueError(f"no rule to initialise {name}, a {type(module).__name__}")
            if c.zero_init and (name.endswith((".o", ".down")) or (module is self.lm_head and not c.tie_embeddings)):
                (module.weight if isinstance(module, Dense) else module.B).zero_()
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()

    def n_params(self, embeddings: bool = True) -> int:
        """Parameters, shared ones once, guides not; embeddings=False leaves out wte, wpe and lm_head."""
        outside = () if embeddings else ("transformer.wte.", "transformer.wpe.", "lm_head.")
        named = [(name, p) for name, p in self.named_parameters() if not name.endswith(".guide")]
        return sum(p.numel() for name, p in named if not name.startswith(outside))

    def flops_per_token(self, context: int | None = None) -> int:
        """Matmul and causal attention FLOPs of a forward pass, 2 a multiply-add, at a context of block_size tokens.

        A token attends to (T + 1) / 2 tokens on average, counted as T / 2: q k^T and its product with v together take
        2 T attn_dim a layer, and with rope_dim R another T n_head R. The head is counted, norms and activations are
        not. Training takes three times as much.
        """
        c = self.config
        kinds = [m for m in self.modules() if hasattr(m, "widen") and not hasattr(m, "layer")]  # not what wraps one
        matrices = sum(matrix_numbers(m) for m in kinds)
        widths = 2 * c.heads_dim + c.n_head * (c.rope_dim or 0)  # of all heads' keys and values
        return 2 * matrices + c.n_layer * (context or c.block_size) * widths

    def __repr__(self) -> str:
        return describe(self)


def matrix_numbers(layer: nn.Module) -> int:
    """Numbers in the matrices of a projection of any kind: its multiplications a token, too."""
    return sum(p.numel() for name, p in layer.named_parameters() if not name.endswith(("bias", "guide")))


def describe(model: GPT) -> str:
    """A table of a block's sublayers: shape, rank, parameters, FLOPs; and a warning where a rank saves nothing."""
    c = model.config
    title = f"GPT: {c.n_layer} layers, {model.n_params():,} parameters, {model.n_params(embeddings=False):,} of them"
    lines = [f"{title} in the blocks, {model.flops_per_token():,} FLOPs a token forward at T = {c.block_size}"]
    n = max(8, *(2 + len(str(rank)) for rank in asdict(c.lowdim).values()))  # width of the column of ranks
    numbers = f"{'parameters':>15}{'of dense':>10}{'FLOPs/token':>15}"
    lines.append(f"{'sublayer':10}{'in':>7}{'out':>8}{'rank':>{n}}{numbers}")
    warnings = []
    block = model.transformer.h[-1]  # the first one's feed-forward may be dense
    layers = {**dict(block.attn.named_children()), **dict(block.mlp.named_children()), "lm_head": model.lm_head}
    widths = c.sublayers | {"lm_head": (c.n_embd, len(model.lm_head.weight))}
    if c.rope_dim is not None:
        widths |= {"qr": (c.n_embd, c.n_head * c.rope_dim), "kr": (c.n_embd, c.rope_dim)}
    for name, layer in layers.items():
        d_in, d_out = widths[name]
        rank, params, dense = getattr(c.lowdim, name, 0), matrix_numbers(layer), d_in * d_out
        shown = rank or "dense"
        lines.append(f"{name:10}{d_in:7}{d_out:8}{shown:>{n}}{params:15,}{params / dense:10.0%}{2 * params:15,}")
        if params >= dense and rank:
            better = f"; it would below {dense / (d_in + d_out):.0f}" if isinstance(rank, int) else ""
            warnings.append(f"warning: {name} at {'rank ' if better else ''}{rank} saves nothing{better}")
    if c.first_ffn_dense:
        lines.append("of the last block; the feed-forward of the first is dense")
    return "\n".join(lines + warnings)
