"""The matrices of a model: their numbers, the dense matrix of a factored one, and a table of all projections."""

from typing import Any

from torch import Tensor, nn

from lpa.structured import BlockDense, BlockShuffle
from model import GPT, LowRank


def dense_weight(layer: Any) -> Tensor:
    """Return the matrix (C_out, C_in) of a projection of any kind. Raise TypeError for a kind that has none."""
    if isinstance(layer, LowRank):
        return layer.B @ layer.A
    if isinstance(layer, BlockDense | BlockShuffle):
        return layer.dense_weight()
    if isinstance(layer, nn.Linear):
        return layer.weight
    raise TypeError(f"{type(layer).__name__} has no dense matrix known to lpa/counts.py")


def matrix_numel(layer: nn.Module) -> int:
    """Return how many numbers the matrices of a projection hold: also its multiplications per token."""
    return sum(p.numel() for name, p in layer.named_parameters() if not name.endswith("bias"))


def table(model: GPT) -> str:
    """Return a table of a block's projections: shape, rank, parameters, FLOPs. Warn where a rank saves nothing."""
    c = model.config
    title = f"GPT: {c.n_layer} layers, {model.n_params():,} parameters, {model.n_params(embeddings=False):,} of them"
    lines = [f"{title} in the blocks, {model.flops_per_token():,} FLOPs per token forward at T = {c.block_size}"]
    block = model.transformer.h[-1]  # the feed-forward of the first may be dense
    layers = {**dict(block.attn.named_children()), **dict(block.mlp.named_children()), "lm_head": model.lm_head}
    widths = c.projections | {"lm_head": (c.n_embd, c.vocab_size)}
    if c.rope_dim is not None:
        widths |= {"qr": (c.n_embd, c.n_head * c.rope_dim), "kr": (c.n_embd, c.rope_dim)}
    kinds = {name: getattr(c.lowdim, name, 0) for name in layers}
    n = max(8, *(2 + len(str(kind)) for kind in kinds.values()))  # width of the column of ranks
    numbers = f"{'parameters':>15}{'of dense':>10}{'FLOPs/token':>15}"
    lines.append(f"{'projection':10}{'in':>7}{'out':>8}{'rank':>{n}}{numbers}")
    warnings = []
    for name, layer in layers.items():
        d_in, d_out = widths[name]
        kind, numel, dense = kinds[name], matrix_numel(layer), d_in * d_out
        lines.append(
            f"{name:10}{d_in:7}{d_out:8}{kind or 'dense':>{n}}{numel:15,}{numel / dense:10.0%}{2 * numel:15,}"
        )
        if numel >= dense and kind:
            better = f"; it would below {dense / (d_in + d_out):.0f}" if isinstance(kind, int) else ""
            warnings.append(f"warning: {name} at {'rank ' if better else ''}{kind} saves nothing{better}")
    if c.first_ffn_dense:
        lines.append("of the last block; the feed-forward of the first is dense")
    return "\n".join(lines + warnings)
