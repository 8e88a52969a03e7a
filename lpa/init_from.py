"""Start from the weights of another model, a run or a Hugging Face folder, with its matrices cut to the ranks wanted.

    python train.py config/lpa_cpu.py --init_from=out/dense_cpu        start with that model's weights, truncated
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from config import UserError
from data.tokenizers import read_hf
from lpa import checkpoint, hf, init
from lpa.counts import dense_weight
from lpa.structured import BlockDense
from model import GPT, LowRank

# What may differ between a model and the one whose weights it starts from; of the rest, any would change the function.
FREE_TO_DIFFER = {"lowdim", "first_ffn_dense", "factor_init", "zero_init", "dropout", "block_size"}


@torch.no_grad()
def start_from(run: Path, model: GPT, tokenizer: dict[str, Any] | None) -> dict[str, float]:
    """Fill the model with the weights of a run or checkpoint. Return the energy kept in each layer whose rank changed.

    Where a matrix is dense there and low-rank here, or of a higher rank there, A and B are its truncated SVD; where
    it is factored there and dense here, the product. Of learned positions, the first block_size are taken. `tokenizer`
    is the spec of this model's corpus. Raise UserError where the other model differs in more than structure, dropout
    and block_size, or has learned fewer positions.

    `run` may also be a Hugging Face folder, or a name on the hub, of a Llama or a GPT-2.
    """
    hint = ""
    if run.is_file() or (run / "ckpt").exists() or (run / "manifest.json").exists():
        source, _, manifest = checkpoint.load_model(run, torch.device("cpu"))
        spec = manifest["tokenizer"]
    else:
        folder = hf.find_folder(run)
        hint = f". Options that fit: export.py {run} --to=preset"
        source, read = hf.read_model(folder, model.config.bias), read_hf(folder)
        spec = None if read is None else read.spec()
        if spec is None:
            print(f"warning: {run} has no tokenizer.json; its token ids are taken to be those of the corpus")
    too_long = model.config.pos == "learned" and model.config.block_size > source.config.block_size
    free = FREE_TO_DIFFER - ({"block_size"} if too_long else set())
    theirs, ours = ({k: v for k, v in asdict(gpt.config).items() if k not in free} for gpt in (source, model))
    changed = checkpoint.differences(theirs, ours)
    if spec is not None and {**spec, "name": None} != {**(tokenizer or {}), "name": None}:
        changed.append("its tokenizer is not that of the corpus")
    if changed:
        raise UserError(f"init_from is {run}, whose weights do not fit. " + "; ".join(changed) + hint)
    sources, energy = dict(source.named_modules()), {}
    for name, layer in model.named_modules():
        shapes = [[p.shape for p in owner.parameters(False)] for owner in (layer, sources[name])]
        same = shapes[0] == shapes[1] or isinstance(layer, nn.Embedding)
        if not same:
            energy[name] = change_rank(name, layer, sources[name])
        for parameter in dict(layer.named_parameters(recurse=False)) if same else ["bias"]:
            if (filled := getattr(layer, parameter)) is not None:
                given = getattr(sources[name], parameter)
                filled.copy_(given[: len(filled)] if isinstance(layer, nn.Embedding) else given)
    return energy


def change_rank(name: str, layer: nn.Module, source: nn.Module) -> float:
    """Fill a layer's matrix from one of another rank or structure. Return the energy kept."""
    for kind in (type(layer), type(source)):
        if issubclass(kind, LowRank) and kind is not LowRank:  # it may compute something else than B A
            raise UserError(f"{name} is a {kind.__name__} in one of the two models, wanted the same rank in both")
    if isinstance(layer, nn.Linear):
        layer.weight.copy_(dense_weight(source))
        return 1.0
    if not isinstance(layer, LowRank):
        raise UserError(f"{name} has blocks and other widths than in the run it starts from; wanted a rank, or 0")
    rank = len(layer.A)
    if isinstance(source, LowRank | BlockDense) and source.B.size(1) < rank:
        raise UserError(f"{name} has rank {rank}, wanted at most the {source.B.size(1)} of the run it starts from")
    if isinstance(source, LowRank):
        svd = init.product_svd(source.A.to(layer.A.device), source.B.to(layer.A.device))
    else:
        svd = torch.linalg.svd(dense_weight(source).to(layer.A.device), full_matrices=False)
    A, B, energy = init.truncate(svd, rank)
    layer.A.copy_(A)
    layer.B.copy_(B)
    return energy


def energy_table(energy: dict[str, float]) -> str:
    """Return what start_from returns, {'transformer.h.0.attn.q': 0.9, ...}, as a table: layers by projections."""
    rows: dict[str, dict[str, float]] = {}
    for name, kept in energy.items():
        layer, _, column = name.removeprefix("transformer.h.").split(".")
        rows.setdefault(layer, {})[column] = kept
    if not rows:
        return "no layer changed its rank: the weights are those of the run they come from"
    lines = ["energy kept, in the squares of the singular values"]
    names = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines.append(f"{'layer':>5}" + "".join(f"{column:>9}" for column in names))
    for layer, row in rows.items():
        lines.append(f"{layer:>5}" + "".join(f"{row[s]:9.2%}" if s in row else f"{'':9}" for s in names))
    return "\n".join(lines)
