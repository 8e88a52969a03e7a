"""The recurrent transformer: model.GPT's block carried over a sliding window, in time linear in the sequence.

A layer T, one block of model.py, reads its input in blocks x_1 ... x_n of w tokens, of which the last may be shorter, m
tokens (B. N. Kausik, Scaling Efficient LLMs, arXiv 2402.14746, as the code for the paper has it):

    p_1 = x_1, h_1 = T(x_1)
    (y_i, h_{i+1}) = T([alpha p_i + h_i ; alpha p_i[:m] + x_{i+1}]),   p_{i+1} = y_i        window 2 w, split at w
    y_n = T(alpha p_n[:m] + h_n)

Each token passes T twice, as right half and as left half. alpha is one number for all layers: 0 forgets, above 0
accumulates what has been. The published closing is y_n = T(h_n), by which a token's logits depend on whether another
block follows; with this one they are the same for every continuation, and at alpha 0 both are one.

Shapes: B batch, T time, C n_embd, W window, M tokens of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lpa.decode import KVCache, draw, new_cache
from model import GPT, Attention, Block, GPTConfig, attend, describe, project, rotations


@dataclass(frozen=True)
class RecurrentConfig:
    """What model = 'recurrent' adds to the options of a GPT."""

    window: int = 16
    """Tokens of a block: half of what attention sees at once."""
    alpha: float = 0.5
    """How much of what has been stays; where it is learned, where it starts."""
    alpha_learned: bool = True

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window is {self.window}, wanted 1 or more")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}, wanted 0 to 1")


@dataclass
class State:
    """All that a text so far leaves behind: as many bytes after a thousand blocks as before the first token.

    A token of the open block i passes T twice: in window i - 1, as right half, it gets its h, and in window i, as left
    half, its y. T is causal, so of the tokens before it only keys and values are needed, and a left half has those by
    which its block was closed. Tensors are (L, B, W, C), L layers.
    """

    window: KVCache
    """Of the 2 W tokens of window i - 1: the left half, and the open block so far."""
    closing: KVCache
    """Of the open block in window i."""
    before: Tensor
    """p of i - 1, which the right half adds."""
    p: Tensor
    """p of i; in the first block x, so far."""
    y: Tensor
    """y of i, which will be p of i + 1, so far."""
    length: int = 0
    """Tokens so far."""


class RecurrentGPT(GPT):
    """As model.GPT, with the recurrence in place of attention to the whole text. `cache` is a State here.

    Without learned positions block_size bounds the training sequences alone, and no State.
    """

    def __init__(self, c: GPTConfig, r: RecurrentConfig, seed: int | None = 1) -> None:
        super().__init__(c, seed)
        self.recurrent, self.window, self.forgets = r, r.window, r.alpha == 0 and not r.alpha_learned
        if c.pos == "rope":  # of the places in a window, which may be longer than the texts it is trained on
            self.rotation = rotations(replace(c, block_size=2 * r.window), self.lm_head.weight.device)
        self.alpha = nn.Parameter(torch.tensor(r.alpha)) if r.alpha_learned else r.alpha

    def hidden(self, idx: Tensor, cache: State | None = None, last: bool = False) -> Tensor:
        """What the head reads of token ids (B, T): (B, T, C), or with last (B, 1, C). Raises ValueError as GPT's."""
        end = idx.size(1) + (0 if cache is None else cache.length)
        if end > self.config.block_size and (cache is None or self.config.pos == "learned"):
            raise ValueError(f"position {end} is beyond block_size = {self.config.block_size}")
        x = self.embed(idx, slice(end - idx.size(1), end))  # (B, T, C)
        if cache is not None:
            x = self.extend(x, cache)
        else:
            for block in self.transformer.h:
                x = self.forget(block, x) if self.forgets else self.accumulate(block, x)
        if last:
            x = x[:, -1:]
        return self.transformer.norm(x) if self.config.norm_order == "pre" else x

    # One layer

    def apply_block(self, block: Block, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """T of x, which follows what a cache holds. A rotation turns by the place in the window, which is all that a
        product of two turned vectors knows."""
        start = 0 if cache is None else cache.length
        places = slice(start, start + x.size(1))
        return block(x, None if self.rotation is None else self.rotation[:, places].to(x.dtype), cache)

    def step(self, block: Block, p: Tensor, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """p, h (B, W, C) of a block and the x (B, M, C) of the next -> y of the one (B, W, C), h of the other."""
        p = self.alpha_now() * p
        y = self.apply_block(block, torch.cat([p + h, p[:, : x.size(1)] + x], dim=1))  # (B, W + M, C)
        return y[:, : self.window], y[:, self.window :]

    def close(self, block: Block, p: Tensor, h: Tensor) -> Tensor:
        """y (B, M, C) of the last block from its h (B, M, C)."""
        return self.apply_block(block, self.alpha_now() * p[:, : h.size(1)] + h)

    def alpha_now(self) -> Tensor | float:
        return self.alpha.clamp(0, 1) if isinstance(self.alpha, Tensor) else self.alpha

    @torch.no_grad()
    def hold_alpha(self) -> None:
        """After a step of the optimizer: beyond [0, 1] clamp has no gradient, and a learned alpha would stay there."""
        if isinstance(self.alpha, Tensor):
            self.alpha.clamp_(0, 1)

    def accumulate(self, block: Block, x: Tensor) -> Tensor:
        """The layer for any alpha, (B, T, C) -> (B, T, C), a step after the other."""
        first, *others = x.split(self.window, dim=1)
        p, h, ys = first, self.apply_block(block, first), []
        for new in others:
            p, h = self.step(block, p, h, new)
            ys.append(p)
        return torch.cat([*ys, self.close(block, p, h)], dim=1)

    def forget(self, block: Block, x: Tensor) -> Tensor:
        """The layer for alpha 0, (B, T, C) -> (B, T, C).

        As attention is causal, y_i = T(h_i) then needs no right half: all y are one product, and the steps, which have
        to come one after the other, are about the right half alone.
        """
        B, T, C = x.shape
        first, *others = x.split(self.window, dim=1)
        hs = [self.apply_block(block, first)]
        for new in others:
            hs.append(self.right_half(block, hs[-1], new))
        rest = -T % self.window
        h = F.pad(torch.cat(hs, dim=1), (0, 0, 0, rest)).view(-1, self.window, C)  # (B n, W, C)
        return self.apply_block(block, h).reshape(B, T + rest, C)[:, :T]

    def right_half(self, block: Block, h: Tensor, x: Tensor) -> Tensor:
        """T([h ; x]) of h (B, W, C) and x (B, M, C), the right half of it (B, M, C)."""
        rotation = None if self.rotation is None else self.rotation[:, : self.window + x.size(1)].to(x.dtype)

        def run(h: Tensor, x: Tensor) -> Tensor:
            left = LeftHalf(block.norm1(h) if block.pre else h, rotation)
            after = None if rotation is None else rotation[:, self.window :]
            return block(x, after, left)  # pyrefly: ignore (a block asks a cache for `attend` alone)

        if block.recompute == "none" or not torch.is_grad_enabled():
            return run(h, x)
        return checkpoint(run, h, x, use_reentrant=False, preserve_rng_state=block.dropout.p > 0)

    # A text that goes on

    def extend(self, x: Tensor, state: State) -> Tensor:
        """Embeddings (B, T, C) of what follows a text -> what the layers make of them (B, T, C). The state goes on.

        Each T sees the new tokens alone, twice. Without gradients: the State would keep their graph.
        """
        found = []
        while x.size(1):
            held, first = state.length % self.window, state.length < self.window
            state.closing.length, state.window.length = held, held if first else self.window + held
            y, x = x[:, : self.window - held], x[:, self.window - held :]
            here = slice(held, held + y.size(1))
            for layer, block in enumerate(self.transformer.h):
                if first:
                    state.p[layer, :, here] = y
                else:
                    y = self.alpha_now() * state.before[layer, :, here] + y  # (B, M, C)
                h = self.apply_block(block, y, state.window)
                y = self.apply_block(block, self.alpha_now() * state.p[layer, :, here] + h, state.closing)
                state.y[layer, :, here] = y
            state.length += y.size(1)
            if state.length % self.window == 0:  # the block is whole, and the next window's left half
                state.before, state.p, state.y = state.p, state.y, state.before
                for name, values in state.closing.held.items():
                    state.window.held[name][..., : self.window, :] = values
            found.append(y)
        return torch.cat(found, dim=1)

    def new_state(self, batch_size: int) -> State:
        """Of no text, in the precision that the model's products have here and now."""
        c = self.config
        window, closing = (new_cache(self, batch_size, tokens) for tokens in (2 * self.window, self.window))
        shape = (c.n_layer, batch_size, self.window, c.n_embd)
        before, p, y = (torch.empty(shape, device=window.device, dtype=window.dtype) for _ in range(3))
        return State(window, closing, before, p, y)

    def flops_per_token(self, context: int | None = None) -> int:
        """As GPT's, with each block passed twice, in windows of 2 W tokens: the same at any context."""
        return 2 * super().flops_per_token(2 * self.window) - 2 * self.lm_head.weight.numel()  # the head is passed once

    def __repr__(self) -> str:
        r = self.recurrent
        alpha = f"alpha {r.alpha:g}{', learned' if r.alpha_learned else ''}"
        return f"{describe(self)}\nrecurrent: blocks of {r.window} tokens, {alpha}"


@dataclass
class LeftHalf:
    """A model.Cache that holds one block, normed (B, W, C), which the tokens after it attend to, and keeps nothing."""

    h: Tensor
    rotation: Tensor | None
    """Of the whole window."""
    length: int = field(default=0, init=False)

    def attend(self, attention: Attention, narrow: list[Tensor], rotation: Tensor | None) -> Tensor:
        W, M = self.h.size(1), narrow[0].size(1)
        before = None if self.rotation is None else self.rotation[:, :W]
        apart = () if attention.rope_dim is None else (attention.kr,)
        left = project(self.h, (attention.k, attention.v, *apart))
        q = attention.heads("q", narrow[0], rotation)  # (B, H, M, D)
        k, v = (
            torch.cat([attention.heads(name, old, before), attention.heads(name, new, rotation)], dim=2)
            for name, old, new in zip("kv", left, narrow[1:])
        )  # (B, G, W + M, D)
        turned = []
        if apart:
            kr = torch.cat([attention.turn(left[2], before), attention.turn(narrow[4], rotation)], dim=2)
            turned = [attention.turn(narrow[3], rotation), kr]  # (B, H, M, R), (B, 1, W + M, R)
        mask = torch.ones(M, W + M, dtype=torch.bool, device=q.device).tril(W)
        return attend(q, k, v, *turned, mask=mask)


def new_model(kind: str, gpt: GPTConfig, recurrent: RecurrentConfig, seed: int | None) -> GPT:
    """The model of TrainConfig.model."""
    return GPT(gpt, seed) if kind == "gpt" else RecurrentGPT(gpt, recurrent, seed)


@torch.inference_mode()
def generate(
    model: RecurrentGPT,
    idx: Tensor,
    tokens: int,
    vocab_size: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    beyond: Literal["window", "stop"] = "window",
) -> Iterator[Tensor]:
    """As decode.generate: `tokens` times the next token (B,) after idx (B, T), in memory that does not grow.

    Only learned positions come to an end: at block_size 'stop' ends there, 'window' begins anew with the last half.
    """
    ends = model.config.pos == "learned"
    block_size = model.config.block_size
    kept = max(1, block_size // 2)
    state, new = model.new_state(len(idx)), idx[:, -block_size:] if ends else idx
    recent = new[:, -kept:] if ends else None  # what a text begins anew with
    for _ in range(tokens):
        if recent is not None and state.length + new.size(1) > block_size:
            if beyond == "stop":
                return
            state, new = model.new_state(len(idx)), recent
        for part in new.split(model.window, dim=1):  # so that a long prompt needs no more than a short one
            logits = model(part, cache=state, last=True)[:, -1, :vocab_size].float()  # (B, V)
        new = draw(logits, temperature, top_k, top_p, generator)  # (B, 1)
        if recent is not None:
            recent = torch.cat([recent, new], dim=1)[:, -kept:]
        yield new[:, 0]
