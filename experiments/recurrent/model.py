"""The recurrent transformer: model.GPT's blocks carried over a sliding window, in time linear in the sequence.

A layer applies one block T of model.py to chunks x_1 ... x_n of W tokens, of which the last may be shorter, M tokens
(B. N. Kausik, Scaling Efficient LLMs, arXiv 2402.14746, as its published code does):

    p_1 = x_1, h_1 = T(x_1)
    (y_i, h_{i+1}) = T([alpha p_i + h_i ; alpha p_i[:M] + x_{i+1}]),  p_{i+1} = y_i        window 2 W, split at W
    y_n = T(alpha p_n[:M] + h_n)

T sees each token twice, in the right half of a window and then in the left half of the next. alpha is one number for
all layers: 0 forgets, above 0 accumulates the past. The published last step is y_n = T(h_n), which makes the logits of
a token depend on whether another chunk follows. With the step above they do not; at alpha 0 both are the same.

Shapes: L layers, B batch, T tokens, C n_embd, W window, M tokens of a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from config import UserError
from data.tokenizers import Tokenizer, load_tokenizer
from lpa import checkpoint
from lpa.decode import KVCache, draw, new_cache
from model import GPT, Block, GPTConfig, rope_table


@dataclass(frozen=True)
class RecurrentConfig:
    """What a recurrent model has beside GPTConfig."""

    window: int = 16
    """Tokens of a chunk: half of what attention sees at once."""
    alpha: float = 0.5
    """The share of the past that is kept; if it is learned, where it starts."""
    alpha_learned: bool = True

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window is {self.window}, wanted 1 or more")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}, wanted 0 to 1")


@dataclass
class State:
    """What generation keeps of a text: as many bytes after a thousand chunks as before the first token.

    T is causal, so of earlier tokens it needs only keys and values. In chunk i, a new token passes T at the right of
    window i - 1, which gives its h, and at the left of window i, which gives its y. Tensors are (L, B, W, C).
    """

    right: KVCache
    """Of window i - 1, up to 2 W tokens: its left half, and chunk i so far."""
    left: KVCache
    """Of window i: chunk i so far."""
    before: Tensor
    """p of chunk i - 1."""
    p: Tensor
    """p of chunk i; in the first chunk its x, so far."""
    y: Tensor
    """y of chunk i so far, which will be p of chunk i + 1."""
    length: int = 0
    """Tokens so far."""


class RecurrentGPT(GPT):
    """model.GPT with the recurrence in place of attention to the full text. `cache` is a State here.

    Without learned positions, block_size limits training sequences only, and no State.
    """

    def __init__(self, c: GPTConfig, r: RecurrentConfig, seed: int | None = 1) -> None:
        super().__init__(c, seed)
        self.window = r.window
        if c.pos == "rope":  # positions in a window, which may be longer than the training sequences
            self.rope = rope_table(replace(c, block_size=max(c.block_size, 2 * r.window)))
        if r.alpha_learned:
            self.alpha = nn.Parameter(torch.tensor(r.alpha))
        else:  # saved too, so that a plain GPT never loads these weights by mistake
            self.register_buffer("alpha", torch.tensor(r.alpha))

    def hidden(self, idx: Tensor, cache: State | None = None) -> Tensor:
        """Token ids (B, T) -> what the head reads, (B, T, C). Raise ValueError beyond block_size."""
        past = 0 if cache is None else cache.length
        end = past + idx.size(1)
        if end > self.config.block_size and (cache is None or self.config.pos == "learned"):
            raise ValueError(f"position {end} is beyond block_size = {self.config.block_size}")
        x = self.transformer.wte(idx)  # (B, T, C)
        if self.config.pos == "learned":
            x = x + self.transformer.wpe.weight[past:end]
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = self.transformer.drop(x)
        if cache is not None:
            x = self.extend(x, cache)
        else:
            for block in self.transformer.h:
                x = self.layer(block, x)
        return self.transformer.norm(x) if self.config.norm_order == "pre" else x

    def layer(self, block: Block, x: Tensor) -> Tensor:
        """x (B, T, C) -> y (B, T, C), one window after the other."""
        W = self.window
        first, *others = x.split(W, dim=1)
        p, h, ys = first, self.apply_block(block, first), []
        for new in others:  # (B, M, C)
            p = self.alpha * p
            y = self.apply_block(block, torch.cat([p + h, p[:, : new.size(1)] + new], dim=1))  # (B, W + M, C)
            p, h = y[:, :W], y[:, W:]
            ys.append(p)
        return torch.cat([*ys, self.apply_block(block, self.alpha * p[:, : h.size(1)] + h)], dim=1)

    def apply_block(self, block: Block, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """T of x (B, M, C), which follows what is in the cache. RoPE counts from the start of the window."""
        start = 0 if cache is None else cache.start
        end = start + x.size(1)
        rope = None if self.rope is None else self.rope[:, start:end].to(x.dtype)
        return block(x, rope, self.attention_mask(x.size(1), end), cache)

    @torch.no_grad()
    def hold_alpha(self) -> None:
        """Keep alpha in [0, 1]; call it after each step of the optimizer."""
        self.alpha.clamp_(0, 1)

    # --- Generation ----------------------------------------------------------------------------------------------

    def extend(self, x: Tensor, state: State) -> Tensor:
        """Embeddings (B, T, C) of the next tokens of a text -> the last layer's output. Update the state.

        Call it without gradients: the state would keep their graph.
        """
        W, found = self.window, []
        while x.size(1):
            held, first = state.length % W, state.length < W
            y, x = x[:, : W - held], x[:, W - held :]
            here = slice(held, held + y.size(1))  # in the chunk
            start = held if first else W + held
            state.right.extend(slice(start, start + y.size(1)), None)
            state.left.extend(here, None)
            for layer, block in enumerate(self.transformer.h):
                if first:
                    state.p[layer, :, here] = y
                else:
                    y = self.alpha * state.before[layer, :, here] + y  # (B, M, C)
                h = self.apply_block(block, y, state.right)
                y = self.apply_block(block, self.alpha * state.p[layer, :, here] + h, state.left)
                state.y[layer, :, here] = y
            state.length += y.size(1)
            if state.length % W == 0:  # the chunk is complete, and becomes the left half of the next window
                state.before, state.p, state.y = state.p, state.y, state.before
                for right, left in zip(state.right.held, state.left.held):
                    for name in left:
                        right[name][:, :, :W] = left[name]
            found.append(y)
        return torch.cat(found, dim=1)

    def new_state(self, batch_size: int) -> State:
        """Return the state before any token, in the precision of the products, which autocast sets."""
        right, left = (new_cache(self, batch_size, tokens) for tokens in (2 * self.window, self.window))
        held = right.held[0]["v"]
        shape = (self.config.n_layer, batch_size, self.window, self.config.n_embd)
        return State(right, left, *(held.new_empty(shape) for _ in range(3)))

    def flops_per_token(self, context: int | None = None) -> int:
        """Count as GPT does, with each block applied twice in windows of 2 W tokens, whatever the context."""
        return 2 * super().flops_per_token(2 * self.window) - 2 * self.lm_head.weight.numel()  # the head runs once


def load(run: Path, device: torch.device) -> tuple[RecurrentGPT, Tokenizer]:
    """Return the model of a checkpoint (see checkpoint.find) in eval mode, and its tokenizer."""
    folder, manifest = checkpoint.find(run)
    options: dict[str, Any] = manifest["options"]
    if options.get("model") != "recurrent":
        raise UserError(f"{folder} holds no recurrent model; sample.py writes text from a plain one")
    with device:
        model = RecurrentGPT(checkpoint.gpt_config(options["gpt"]), RecurrentConfig(**options["recurrent"]), seed=None)
    checkpoint.read(folder, {f"model.{name}": tensor for name, tensor in model.state_dict().items()})
    return model.eval(), load_tokenizer(folder, manifest["tokenizer"])


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
    """Yield `tokens` times the next token (B,) after idx (B, T), as decode.generate does, in constant memory.

    Only learned positions end, at block_size: 'stop' ends there, 'window' starts again with the last half of it.
    """
    block_size = model.config.block_size
    ends = model.config.pos == "learned"
    kept = max(1, block_size // 2)
    state, new = model.new_state(len(idx)), idx[:, -block_size:] if ends else idx
    recent = new[:, -kept:]
    for _ in range(tokens):
        if ends and state.length + new.size(1) > block_size:
            if beyond == "stop":
                return
            state, new = model.new_state(len(idx)), recent
        for part in new.split(model.window, dim=1):  # so that a long prompt takes no more memory than a short one
            logits = model(part, cache=state, last=True)[:, -1, :vocab_size].float()  # (B, V)
        new = draw(logits, temperature, top_k, top_p, generator)  # (B, 1)
        recent = torch.cat([recent, new], dim=1)[:, -kept:] if ends else new
        yield new[:, 0]
