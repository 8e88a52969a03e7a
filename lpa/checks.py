"""Checks of the model's options: one clear line for what cannot be built."""

from dataclasses import asdict
from typing import Any

from lpa import structured


def check_model(c: Any) -> None:
    """Raise ValueError where a GPTConfig cannot be built. Its widths are numbers by now, not None."""
    at_least_1 = ("n_layer", "n_head", "n_embd", "block_size", "attn_dim", "n_kv_head", "ffn_dim")
    for name in at_least_1:
        want(c, name, getattr(c, name) >= 1, "1 or more")
    want(c, "vocab_size", c.vocab_size is None or c.vocab_size >= 1, "1 or more")
    want(c, "norm_eps", c.norm_eps > 0, "above 0")
    want(c, "rope_theta", c.rope_theta > 0, "above 0")
    want(c, "dropout", 0 <= c.dropout < 1, "at least 0 and below 1")
    heads = "n_embd" if c.attn_dim == c.n_embd else "attn_dim"
    want(c, heads, c.attn_dim % c.n_head == 0, f"a multiple of n_head = {c.n_head}")
    want(c, "n_kv_head", c.n_head % c.n_kv_head == 0, f"a divisor of n_head = {c.n_head}")
    if c.rope_dim is not None:
        want(c, "rope_dim", c.pos == "rope", f"None for pos = {c.pos!r}")
        want(c, "rope_dim", c.rope_dim >= 2 and c.rope_dim % 2 == 0, "an even number from 2")
    elif c.pos == "rope":
        want(c, "head_dim", c.head_dim % 2 == 0, "an even width for pos = 'rope'")
    for name, rank in asdict(c.lowdim).items():
        if rank and name not in c.projections:
            raise ValueError(f"lowdim.{name} is {rank}, but mlp = {c.mlp!r} has no {name}")
        if not rank:
            continue
        narrower = min(c.projections[name])
        if isinstance(rank, str):
            try:
                structured.parse(rank, *c.projections[name])
            except ValueError as error:
                raise ValueError(f"lowdim.{name} is {error}") from None
        elif not 0 < rank <= narrower:
            raise ValueError(f"lowdim.{name} is {rank}, wanted a rank from 0 (dense) to {narrower}, its narrower side")


def want(c: Any, name: str, fine: bool, wanted: str) -> None:
    if not fine:
        raise ValueError(f"{name} is {getattr(c, name)}, wanted {wanted}")
