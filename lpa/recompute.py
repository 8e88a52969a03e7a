"""Activation checkpointing, applied to the blocks of a finished model: what backward computes again to save memory.

    none          nothing
    elementwise   all but matrix products and attention: the passes over single elements, norms and activations
    latents       also the products with B, which start from a narrow latent
    block         the whole block

Bytes per token of lpa_370m at T 1024 in bfloat16, and the time of a step, are in results/recompute.md.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# Attention kernels that never form the T x T scores, by device and by the shapes that they take
FUSED_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}
# Matrix products, and the place of x (..., width) among their arguments
PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1, torch.ops.aten.bmm.default: 0}


def apply_recompute(model: Any, mode: str) -> None:
    """Replace the forward of each block by one that saves less. Parameters keep their names."""
    if mode == "none":
        return
    for block in model.transformer.h:
        block.forward = checkpointed(block, block.forward, mode, model.config)


def checkpointed(block: nn.Module, forward: Callable[..., Tensor], mode: str, c: Any) -> Callable[..., Tensor]:
    context = {} if mode == "block" else dict(context_fn=partial(create_selective_checkpoint_contexts, saves(mode, c)))

    def run(x: Tensor, rope: Tensor | None, mask: Tensor | None, cache: Any = None) -> Tensor:
        if cache is not None or not torch.is_grad_enabled():
            return forward(x, rope, mask, cache)
        return checkpoint(forward, x, rope, mask, use_reentrant=False, preserve_rng_state=c.dropout > 0, **context)

    return run


def saves(mode: str, c: Any) -> Callable[..., CheckpointPolicy]:
    """Return the rule that says for each operation whether its result is saved."""
    wide = {c.n_embd, c.attn_dim}
    # Backward reads nothing of the product with a dense `down`, unless a norm or a dropout follows it.
    if c.norm_order == "post" or c.dropout or c.lowdim.down:
        wide.add(c.ffn_dim)

    def rule(_context: Any, op: Any, *args: Any, **_kwargs: Any) -> CheckpointPolicy:
        save = op in FUSED_ATTENTION
        if op in PRODUCTS:
            width = args[PRODUCTS[op]].size(-1)  # over which the product sums
            save = width in wide or (mode == "elementwise" and width != c.ffn_dim)
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    return rule
