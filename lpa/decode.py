"""Decoding: the key-value cache, attention to it, weights merged ahead, and the loop that draws the next tokens.

Where k or v is low-rank or block-dense, y = B c with c = A x, the cache holds the latents c alone, and B is never
applied to them:

    scores  q_h . (B_k,h c_t + b_k,h) = (B_k,h^T q_h) . c_t + a constant of the query, which softmax ignores
    values  sum_t p_t (B_v,h c_t + b_v,h) = B_v,h (sum_t p_t c_t) + b_v,h, as the p_t sum to 1

so B_k is absorbed into the query and B_v applied to what was read (arXiv 2405.04434). A rotation between B_k and the
score forbids the first: keys that rotate as a whole are cached as such, in full width.

Shapes: B batch, T new tokens, S tokens so far, H heads, G key and value heads, D head width, R rank or rope_dim, V
vocabulary.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lpa.cpu import linear
from model import GPT, Attention, GPTConfig, attend, matrix_numbers


def cached_widths(c: GPTConfig) -> dict[str, tuple[int, int]]:
    """What a layer keeps of each token: how many heads of k, v and kr, and how wide. Latents are one head."""
    heads = (c.kv_heads, c.head_dim)
    widths = {"k": (1, latent(c, "k")) if latent_keys(c) else heads}
    widths["v"] = (1, latent(c, "v")) if latent(c, "v") else heads
    if c.rope_dim is not None:
        widths["kr"] = (1, c.rope_dim)
    return widths


def latent(c: GPTConfig, name: str) -> int:
    """Width of the latent of k or v, which one matrix widens; 0 where there is none."""
    rank = getattr(c.lowdim, name)
    if isinstance(rank, int):
        return rank
    from lpa import structured

    return structured.parse(rank, *c.sublayers[name])[0]


def latent_keys(c: GPTConfig) -> bool:
    """Whether scores can be had from the latents of k: not where a norm or a rotation stands between them."""
    return latent(c, "k") > 0 and not c.qk_norm and (c.pos != "rope" or c.rope_dim is not None)


def cache_numbers_per_token(c: GPTConfig) -> int:
    """Numbers that a cache holds for each token, all layers together."""
    return c.n_layer * sum(heads * width for heads, width in cached_widths(c).values())


class KVCache:
    """Keys and values of all layers, or their latents, allocated once for block_size tokens.

    padding (B,) counts the tokens at the left of each row that are none: no token sees them, and the first after them
    is at position 0. None: there are none.
    """

    def __init__(self, c: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
        self.held = {
            name: torch.empty(c.n_layer, batch_size, heads, c.block_size, width, device=device, dtype=dtype)
            for name, (heads, width) in cached_widths(c).items()
        }
        self.latent_k, self.latent_v = latent_keys(c), latent(c, "v") > 0
        self.device, self.dtype = device, dtype
        self.length = 0
        self.padding: Tensor | None = None

    def positions(self, new: int) -> slice | Tensor:
        """The positions of `new` tokens that follow: a slice, or with padding (B, T)."""
        if self.padding is None:
            return slice(self.length, self.length + new)
        index = torch.arange(self.length, self.length + new, device=self.device)
        return (index - self.padding[:, None]).clamp(min=0)

    def mask(self, new: int) -> Tensor | None:
        """Which of all tokens each new one sees, (T, S) or with padding (B, 1, T, S); None: all up to itself."""
        if self.padding is None and (new == 1 or self.length == 0):
            return None
        key = torch.arange(self.length + new, device=self.device)
        query = key[self.length :, None]  # (T, 1)
        mask = key <= query
        if self.padding is not None:
            real = key >= self.padding[:, None, None, None]  # (B, 1, 1, S)
            mask = mask & real | (key == query)  # padding sees itself: a row that sees nothing would be NaN
        return mask

    def attend(self, attention: Attention, narrow: list[Tensor], rotation: Tensor | None) -> Tensor:
        """Store the new tokens, and let them attend to all so far: (B, T, H D).

        narrow holds what Attention.forward makes first of q, k, v, and qr and kr. New tokens in an empty cache attend
        to each other in full width, which takes the fewest FLOPs for many; later ones in latent space, which reads the
        fewest bytes.
        """
        first = self.length == 0
        wide = {
            name: attention.heads(name, y, rotation)  # (B, H, T, D); k, v (B, G, T, D)
            for name, y, latent in zip("qkv", narrow, (False, self.latent_k, self.latent_v))
            if first or not latent
        }
        turned = [attention.turn(y, rotation) for y in narrow[3:]]  # (B, H, T, R) and (B, 1, T, R), with rope_dim
        k, v = (narrow[1][:, None] if self.latent_k else wide["k"], narrow[2][:, None] if self.latent_v else wide["v"])
        new = {"k": k, "v": v} | ({"kr": turned[1]} if turned else {})
        end = self.length + narrow[0].size(1)
        held = {}
        for name, y in new.items():
            self.held[name][attention.layer, :, :, self.length : end] = y
            held[name] = self.held[name][attention.layer, :, :, :end]  # (B, G, S, D), or (B, 1, S, R)
        mask = self.mask(narrow[0].size(1))
        if first:
            return attend(*wide.values(), *turned, mask=mask)
        k_layer, v_layer = attention.k if self.latent_k else None, attention.v if self.latent_v else None
        return attend_to_cache(wide["q"], turned[0] if turned else None, held, k_layer, v_layer, mask)


def attend_to_cache(
    q: Tensor,
    qr: Tensor | None,
    held: dict[str, Tensor],
    k_layer: nn.Module | None,
    v_layer: nn.Module | None,
    mask: Tensor | None,
) -> Tensor:
    """Attention of few queries q (B, H, T, D), qr (B, H, T, R) to all tokens: (B, T, H D).

    held k and v are (B, G, S, D) each, or latents (B, 1, S, R) where the layer that widens them is given; kr is
    (B, 1, S, R). Plain products, as PyTorch's fused kernels want keys as wide as values, and none wider than 256.
    """
    D = q.size(-1)
    scale = (D if qr is None else D + qr.size(-1)) ** -0.5
    q = q * scale
    if k_layer is not None:
        q = per_head(q, k_layer.B.unflatten(0, (-1, D)))  # (B, H, T, R)
    scores = read(q, held["k"].mT)  # (B, H, T, S)
    if qr is not None:
        scores = scores + read(qr * scale, held["kr"].mT)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    share = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    y = read(share.type_as(q), held["v"])  # (B, H, T, D) or (B, H, T, R)
    if v_layer is not None:
        bias = None if v_layer.bias is None else v_layer.bias.unflatten(0, (-1, 1, D))
        y = per_head(y, v_layer.B.unflatten(0, (-1, D)).mT, bias)  # (B, H, T, D)
    return y.transpose(1, 2).flatten(2)


def read(x: Tensor, held: Tensor) -> Tensor:
    """x (B, H, T, N) times held (B, G, N, M), each matrix of which serves H / G heads: (B, H, T, M).

    The heads that share a matrix are its rows in one product, which reads it once.
    """
    B, H, T, _ = x.shape
    return (x.reshape(B, held.size(1), -1, x.size(-1)) @ held).view(B, H, T, -1)


def per_head(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (B, H, T, N) times weight (G, N, M) of its head or group of heads, plus bias (G, 1, M): (B, H, T, M)."""
    B, H, T, N = x.shape
    rows = x.reshape(B, len(weight), -1, N).transpose(0, 1).flatten(1, 2)  # (G, B T H / G, N)
    y = rows @ weight if bias is None else torch.baddbmm(bias, rows, weight)
    return y.unflatten(1, (B, -1)).transpose(0, 1).reshape(B, H, T, -1)


# --- Weights merged ahead -----------------------------------------------------------------------------------------

MOST_TOKENS = 1024  # of a call for which premerge tries the dense matrix


class Merged(nn.Module):
    """A factored layer with the dense matrix (C_out, C_in) it stands for beside it, for decoding.

    A call of up to `few` tokens, batch and time together, takes the matrix, as it costs one product; a longer one takes
    the factors, as they cost fewer FLOPs (Wei et al., arXiv 2406.16450). The matrix does not follow the factors.
    """

    rank = 0  # no latent is seen from outside

    layer: Any
    weight: Tensor

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.few = layer, 0
        self.register_buffer("weight", layer.materialise().detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() <= self.few * x.size(-1):
            return linear(x, self.weight, self.layer.bias)
        return self.layer(x)

    def narrow(self, x: Tensor) -> Tensor:
        return self(x)

    def widen(self, y: Tensor) -> Tensor:
        """From narrow's result to the layer's: nothing is left to do."""
        return y


@torch.inference_mode()
def premerge(model: GPT) -> list[str]:
    """Wrap in Merged the factored layers that a dense matrix is faster for, here and now; a model to save stays as is.

    How many tokens are few is measured for each kind and shape of layer, in the precision in force (autocast or not),
    and kept with the model for as long as it is there: no file remembers it, as another load of the machine or another
    number of threads would make it wrong. k and v stay as they are where the cache keeps their latents, which need B
    apart. Returns lines that say what was found and what memory it takes.
    """
    apart = {name for name, kept in (("k", latent_keys(model.config)), ("v", latent(model.config, "v"))) if kept}
    groups: dict[tuple, list[str]] = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "materialise") and name.rpartition(".")[2] not in apart:
            groups.setdefault((type(layer).__name__, layer.A.shape, layer.B.shape), []).append(name)
    lines, extra = [], 0
    for (kind, *_), names in groups.items():
        layers = [Merged(model.get_submodule(name)) for name in names]
        few, (d_out, d_in) = few_tokens(layers), layers[0].weight.shape
        found = f"merged for calls of up to {few} tokens" if few else "left apart, which is faster for one token, too"
        lines.append(f"premerge: {len(layers)} {kind} layers {d_in} -> {d_out}: {found}")
        for name, layer in zip(names, layers):
            if few:
                layer.few = few
                model.set_submodule(name, layer)
                extra += layer.weight.nbytes
    size = model.lm_head.weight.element_size()
    factors = size * sum(matrix_numbers(model.get_submodule(name)) for names in groups.values() for name in names)
    return [*lines, f"premerge: {extra / 1e6:.1f} MB of merged weights beside {factors / 1e6:.1f} MB of factors"]


def few_tokens(layers: list[Merged]) -> int:
    """Up to how many tokens, of 1, 2, 4, ..., the matrices of these layers of one shape are faster; 0 = of none."""
    weight, few = layers[0].weight, 0
    while (tokens := max(1, 2 * few)) <= MOST_TOKENS:
        x = weight.new_ones(tokens, 1, weight.size(1))
        if seconds_of(layers, x, few=tokens) >= seconds_of(layers, x, few=0):
            break
        few = tokens
    return few


def seconds_of(layers: list[Merged], x: Tensor, few: int) -> float:
    """Of all layers in turns, so that their weights come from where they would in the model, be it cache or memory."""
    from lpa import hardware

    for layer in layers:
        layer.few = few
    return hardware.fastest(lambda: [layer(x) for layer in layers], x.device, seconds=0.03)


# --- Generation ----------------------------------------------------------------------------------------------------


def new_cache(model: GPT, batch_size: int, tokens: int | None = None) -> KVCache:
    """An empty cache for so many tokens, None = block_size, in the precision of the products here and now, autocast or
    not."""
    weight = model.lm_head.weight
    autocast = torch.is_autocast_enabled(weight.device.type)
    dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
    c = model.config if tokens is None else replace(model.config, block_size=tokens)
    return KVCache(c, batch_size, weight.device, dtype)


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
    the right of idx, each the last so many tokens of its row; what is left of them is not looked at.

    When the cache is full, 'window' builds it anew from the last half of block_size tokens, so a text may go on for
    ever; 'stop' ends there. Raises ValueError for lengths that are not from 1 to T.
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
    """One token (B, 1) of each row of logits (B, V), from the top_k most likely and the smallest set of mass top_p."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    likely, token = (logits / temperature).sort(dim=-1, descending=True)
    if top_k is not None:
        likely, token = likely[:, :top_k], token[:, :top_k]
    p = likely.softmax(dim=-1)
    if top_p is not None:
        p = p * (p.cumsum(dim=-1) - p < top_p)  # a token stays while what precedes it has not reached top_p
    return token.gather(1, torch.multinomial(p, 1, generator=generator))
