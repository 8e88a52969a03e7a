"""transformers' own model of a dense GPT's shape, to compare its speed with ours: bench.py --against=dense,hf."""

import dataclasses
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from config import UserError
from lpa import hf
from model import GPTConfig


def hf_model(c: GPTConfig) -> nn.Module:
    """Return a Llama or GPT-2 of this shape. Raise UserError, by the rules of export, where there is none.

    Llama applies RoPE also where pos is 'none', as it has no form without.
    """
    try:
        import transformers
    except ImportError:
        raise UserError("comparing with transformers needs it: pip install 'transformers>=4.56,<6'") from None
    if c.dropout:
        raise UserError(f"dropout is {c.dropout}, wanted 0 against transformers")
    c = dataclasses.replace(c, pos="rope") if c.pos == "none" else c
    options = hf.config_json(hf.architecture(c), c, c.vocab_size or 0) | dict(bos_token_id=None, eos_token_id=None)
    config = transformers.AutoConfig.for_model(str(options.pop("model_type")), **options)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


class Twin(nn.Module):
    """Give transformers' model the interface of ours, so that the same code trains and evaluates it.

    Two things stay its own: a float32 residual stream under autocast, and in decoding its default cache and generate().
    """

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.hf: Any = hf_model(c)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = self.hf(idx, use_cache=False).logits
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def compile_as(self, mode: str) -> None:
        layers = self.hf.base_model.layers if self.hf.config.model_type == "llama" else self.hf.base_model.h
        for module in {"off": [], "model": [self.hf], "block": layers}[mode]:
            module.compile(dynamic=False)
