"""Decoding: the key-value cache and the loop that draws one token after the other.

Shapes: B batch, T new tokens, S tokens so far, G key and value heads, D head width, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from model import GPT, GPTConfig


class KVCache:
    """Keys (rotated, where the model rotates) and values of all layers, allocated once for block_size tokens."""

    def __init__(self, c: GPTConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (c.n_layer, batch_size, c.kv_heads, c.block_size, c.head_dim)
        self.k, self.v = torch.empty(2, *shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """k, v of the new tokens, each (B, G, T, D) -> those of all tokens (B, G, S, D), and a mask (T, S) or None."""
        new = k.size(2)
        end = self.length + new
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        mask = None
        if new > 1 and self.length > 0:
            mask = torch.ones(new, end, dtype=torch.bool, device=k.device).tril(self.length)
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end], mask


def new_cache(model: GPT, batch_size: int) -> KVCache:
    """An empty cache in the precision that the model's products have here and now, autocast or not."""
    weight = model.lm_head.weight
    autocast = torch.is_autocast_enabled(weight.device.type)
    dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
    return KVCache(model.config, batch_size, weight.device, dtype)


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
) -> Iterator[Tensor]:
    """Yield `tokens` times the next token (B,) of each sequence that begins with idx (B, T), T at least 1.

    A cache given here holds the first of these tokens, and not the last. temperature 0 takes the most likely token.
    Ids from vocab_size on are padding of the head and never drawn. When the cache is full, it is built anew from the
    last half of block_size tokens, so a text may go on for ever.
    """
    block_size = model.config.block_size
    text = idx[:, -block_size:]  # what the model may look at
    cache = cache or new_cache(model, len(idx))
    new = text[:, cache.length :]
    for _ in range(tokens):
        if cache.length + new.size(1) > block_size:
            new = text = text[:, -max(1, block_size // 2) :]
            cache.length = 0
        logits = model(new, cache=cache)[:, -1, :vocab_size].float()  # (B, V)
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
