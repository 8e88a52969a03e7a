"""Decoding: the key-value cache, attention to latents, and the loop that draws the next tokens.

Where k or v is low-rank, y = B c with c = A x, the cache can hold the latents c alone, and B is never applied to them:

    scores  q_h . (B_k,h c_t + b_k,h) = (B_k,h^T q_h) . c_t + a constant of the query, which softmax ignores
    values  sum_t p_t (B_v,h c_t + b_v,h) = B_v,h (sum_t p_t c_t) + b_v,h, as the p_t sum to 1

So B_k is absorbed into the query and B_v applied to the sum (arXiv 2405.04434). A rotation of whole keys stands between
B_k and the score, so such keys are cached in full width. And before anything is absorbed, each layer's own forward is
compared with the formulas above: a layer that computes anything else, after an edit of model.py say, is cached in full
width too, where model.py's own code runs.

Shapes: B batch, T new tokens, S tokens so far, H heads, G key and value heads, D head width, D_r rope_dim, R rank, V
vocabulary.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lpa.structured import BlockDense, parse
from model import GPT, Attention, GPTConfig, LowRank

WITH_LATENT = LowRank | BlockDense  # layers that have `latent`, and a B that widens it


def cached_widths(c: GPTConfig) -> dict[str, tuple]:
    """Return how many heads of k, v and kr a layer caches per token, and how wide. Latents are one head."""
    rank_k, rank_v = latent_ranks(c)
    extra = c.rope_dim or 0
    widths = {"k": (1, rank_k) if rank_k else (c.n_kv_head, c.head_dim + extra)}
    widths["v"] = (1, rank_v) if rank_v else (c.n_kv_head, c.head_dim)
    return widths | ({"kr": (1, extra)} if rank_k and extra else {})


def latent_ranks(c: GPTConfig) -> tuple[int, int]:
    """Return the widths of the latents of k and v, 0 where there is none or a norm or rotation follows it."""
    rank_k, rank_v = (parse(r, *c.projections[n])[0] if isinstance(r, str) else r for n, r in lowdim_kv(c))
    between = c.qk_norm or (c.pos == "rope" and c.rope_dim is None)
    return 0 if between else rank_k, rank_v


def lowdim_kv(c: GPTConfig) -> list[tuple[str, int | str]]:
    return [("k", c.lowdim.k), ("v", c.lowdim.v)]


def cache_numbers_per_token(c: GPTConfig) -> int:
    """Return how many numbers a cache holds for each token, all layers together."""
    return c.n_layer * sum(heads * width for heads, width in cached_widths(c).values())


class KVCache:
    """Keys and values of all layers, or their latents, allocated once for block_size tokens.

    padding (B,) counts the tokens at the left of each row that are none: no token sees them, and the first after them
    is at position 0. None: there are none.
    """

    def __init__(self, model: GPT, batch_size: int, tokens: int, dtype: torch.dtype, checked: bool = False) -> None:
        """Decide for each layer whether its latents are cached; checked: all of them, without a check."""
        c, device = model.config, model.lm_head.weight.device
        full = replace(c, lowdim=replace(c.lowdim, k=0, v=0))
        self.ranks = latent_ranks(c)
        layers = [block.attn for block in model.transformer.h] if any(self.ranks) else [None] * c.n_layer
        self.absorbed = [layer is not None and (checked or latents_are_exact(model, layer)) for layer in layers]
        self.held: list[dict[str, Tensor]] = []
        for absorbed in self.absorbed:
            widths = cached_widths(c if absorbed else full)
            shapes = {name: (batch_size, heads, tokens, width) for name, (heads, width) in widths.items()}
            self.held.append({name: torch.empty(shape, device=device, dtype=dtype) for name, shape in shapes.items()})
        self.start = self.length = 0  # before and after the tokens of the current call
        self.padding: Tensor | None = None

    def extend(self, positions: slice, mask: Tensor | None) -> tuple[slice | Tensor, Tensor | None]:
        """Add tokens at these positions. Return positions and mask, which with padding differ by row:
        (B, T) and (B, 1, T, S)."""
        self.start, self.length = positions.start, positions.stop
        if self.padding is None:
            return positions, mask
        key = torch.arange(self.length, device=self.padding.device)
        query = key[positions]
        if mask is None:
            mask = key <= query[:, None]  # (T, S)
        real = key >= self.padding[:, None, None, None]  # (B, 1, 1, S)
        mask = mask & real | (key == query[:, None])  # padding sees itself: a row that sees nothing would be NaN
        return (query - self.padding[:, None]).clamp(min=0), mask

    def append(self, attention: Attention, x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, G, T, D) of new tokens, or the latents of x (B, T, C). Return k and v of all tokens."""
        layer = attention.layer
        if not self.absorbed[layer]:
            self.store(layer, k=k, v=v)
            return self.read(layer, "k"), self.read(layer, "v")
        rank_k, rank_v = self.ranks
        self.store(layer, k=latent(attention.k, x) if rank_k else k, v=latent(attention.v, x) if rank_v else v)
        if "kr" in self.held[layer]:
            self.store(layer, kr=k[:, :1, :, attention.head_dim :])
        return k, v  # these are all tokens: later ones go to attend

    def store(self, layer: int, **new: Tensor) -> None:
        for name, y in new.items():
            self.held[layer][name][:, :, self.start : self.length] = y

    def read(self, layer: int, name: str) -> Tensor:
        return self.held[layer][name][:, :, : self.length]

    def absorbs(self, attention: Attention) -> bool:
        """Say whether attend does the work. The first tokens take the full width, which needs the fewest FLOPs."""
        return self.start > 0 and self.absorbed[attention.layer]

    def attend(self, attention: Attention, x: Tensor, rope: Tensor | None, mask: Tensor | None) -> Tensor:
        """Store new tokens x (B, T, C) and let them look at all so far, in latent space: (B, T, H D).

        Plain products, as PyTorch's fused kernels want keys as wide as values and none wider than 256.
        """
        layer, D = attention.layer, attention.head_dim
        rank_k, rank_v = self.ranks
        qr = None
        if rank_k and attention.rope_dim is None:
            q = attention.split_heads(attention.q(x)).transpose(1, 2)  # (B, H, T, D)
            self.store(layer, k=latent(attention.k, x))
        else:
            q, k = attention.queries_and_keys(x, rope)  # (B, H, T, D), (B, G, T, D), with rope_dim D + D_r wide
            if rank_k:
                q, qr = q[..., :D], q[..., D:]
                self.store(layer, k=latent(attention.k, x), kr=k[:, :1, :, D:])
            else:
                self.store(layer, k=k)
        v = latent(attention.v, x) if rank_v else attention.split_heads(attention.v(x)).transpose(1, 2)
        self.store(layer, v=v)
        scale = (D + (attention.rope_dim or 0)) ** -0.5
        q = q * scale
        if rank_k:
            q = per_head(q, attention.k.B.unflatten(0, (-1, D)))  # (B, H, T, R)
        scores = shared(q, self.read(layer, "k").mT)  # (B, H, T, S)
        if qr is not None:
            scores = scores + shared(qr * scale, self.read(layer, "kr").mT)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        share = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        y = shared(share.type_as(q), self.read(layer, "v"))  # (B, H, T, D) or (B, H, T, R)
        if rank_v:
            bias = None if attention.v.bias is None else attention.v.bias.unflatten(0, (-1, 1, D))
            y = per_head(y, attention.v.B.unflatten(0, (-1, D)).mT, bias)  # (B, H, T, D)
        return y.transpose(1, 2).flatten(2)


def latent(layer: Any, x: Tensor) -> Tensor:
    return layer.latent(x).unsqueeze(1)  # (B, T, C) -> (B, 1, T, R)


@torch.inference_mode()
def latents_are_exact(model: GPT, attention: Attention) -> bool:
    """Compare what attention reads of 4 tokens in latent space with what its own forward computes of them."""
    for layer, rank in zip((attention.k, attention.v), latent_ranks(model.config)):
        if rank and not isinstance(layer, WITH_LATENT):
            return False
    T, weight = min(4, model.config.block_size), model.lm_head.weight
    x = torch.linspace(-2, 2, T * model.config.n_embd, device=weight.device).sin().view(1, T, -1).to(weight.dtype)
    rope = first = last = None
    if model.rope is not None:
        rope = model.rope[:, :T].to(x.dtype)
        first, last = rope[:, : T - 1], rope[:, T - 1 :]
    cache = KVCache(model, 1, T, x.dtype, checked=True)
    with torch.autocast(weight.device.type, enabled=False):
        cache.extend(slice(0, T - 1), None)
        attention(x[:, : T - 1], first, model.attention_mask(T - 1, T - 1), cache)
        cache.extend(slice(T - 1, T), None)
        seen = attention.o(cache.attend(attention, x[:, T - 1 :], last, model.attention_mask(1, T)))
        wanted = attention(x, rope, model.attention_mask(T, T))[:, T - 1 :]
    error = (seen - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)
    return bool(error <= torch.finfo(x.dtype).eps ** 0.5)


def shared(x: Tensor, held: Tensor) -> Tensor:
    """Multiply x (B, H, T, N) by held (B, G, N, M), each matrix of which serves H / G heads: (B, H, T, M).

    The heads that share a matrix are its rows in one product, which reads it once.
    """
    B, H, T, _ = x.shape
    return (x.reshape(B, held.size(1), -1, x.size(-1)) @ held).view(B, H, T, -1)


def per_head(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply x (B, H, T, N) by the weight (G, N, M) of its head or group, plus bias (G, 1, M): (B, H, T, M)."""
    B, H, T, N = x.shape
    rows = x.reshape(B, len(weight), -1, N).transpose(0, 1).flatten(1, 2)  # (G, B T H / G, N)
    y = rows @ weight if bias is None else torch.baddbmm(bias, rows, weight)
    return y.unflatten(1, (B, -1)).transpose(0, 1).reshape(B, H, T, -1)


# --- Generation ----------------------------------------------------------------------------------------------------


def new_cache(model: GPT, batch_size: int, tokens: int | None = None) -> KVCache:
    """Return an empty cache for so many tokens (None = block_size), in autocast's precision where it is on."""
    weight = model.lm_head.weight
    autocast = torch.is_autocast_enabled(weight.device.type)
    dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
    return KVCache(model, batch_size, tokens or model.config.block_size, dtype)


@torch.inference_mode()
def generate(
    model: GPT,
    idx: Tensor,
    tokens: int,
    vocab_size: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    cache: KVCache | None = None,
    lengths: Tensor | None = None,
    beyond: Literal["window", "stop"] = "window",
) -> Iterator[Tensor]:
    """Yield `tokens` times the next token (B,) of each sequence that begins with idx (B, T), T at least 1.

    A cache given here holds the first of these tokens, and not the last. temperature 0 takes the most likely token.
    Ids from vocab_size on are padding of the head and never drawn. lengths (B,): prompts of unequal length stand at
    the right of idx, each the last so many tokens of its row; nothing looks at what is left of them.

    When the cache is full, 'window' fills it again with the last half of block_size tokens, so a text can continue for
    ever; 'stop' ends there. Raise ValueError for lengths that are not from 1 to T.
    """
    block_size = model.config.block_size
    if lengths is not None and not bool(((lengths >= 1) & (lengths <= idx.size(1))).all()):
        raise ValueError(f"lengths are {lengths.tolist()}, wanted 1 to {idx.size(1)}, the width of idx")
    text = idx[:, -block_size:]  # what the model may look at
    cache = cache or new_cache(model, len(idx))
    cache.padding = None if lengths is None else (text.size(1) - lengths).clamp(min=0)
    new = text[:, cache.length :]
    for _ in range(tokens):
        if cache.length + new.size(1) > block_size:
            if beyond == "stop":
                return
            kept = max(1, block_size // 2)
            if cache.padding is not None:
                cache.padding = (cache.padding - (text.size(1) - kept)).clamp(min=0)
            new = text = text[:, -kept:]
            cache.length = 0
        logits = model(new, cache=cache, last=True)[:, -1, :vocab_size].float()  # (B, V)
        new = draw(logits, temperature, top_k, top_p, generator)  # (B, 1)
        text = torch.cat([text, new], dim=1)
        yield new[:, 0]


def draw(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """Draw a token (B, 1) per row of logits (B, V), from the top_k most likely and the smallest set of mass top_p."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    likely, token = (logits / temperature).sort(dim=-1, descending=True)
    if top_k is not None:
        likely, token = likely[:, :top_k], token[:, :top_k]
    p = likely.softmax(dim=-1)
    if top_p is not None:
        p = p * (p.cumsum(dim=-1) - p < top_p)  # a token stays while what precedes it has not reached top_p
    return token.gather(1, torch.multinomial(p, 1, generator=generator))
