"""Checkpoints that survive a crash: out/RUN/ckpt/step_N/ is written whole, its manifest last.

    out/RUN/ckpt/step_1000/    model.pt, optimizers.pt, the tokenizer, manifest.json
    out/RUN/ckpt/last, best    one line each: the name of a step folder, swapped with os.replace

The manifest holds everything a person may want to read (options, step, losses, versions) and size and sha256 of each
file. The .pt files hold tensors and plain numbers, and are loaded with weights_only, so they cannot run code.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import factors
import structured
from config import UserError
from data.tokenizers import Tokenizer, load_tokenizer
from model import GPT, Dense, GPTConfig, LowDim, LowRank
from recurrent import RecurrentConfig, RecurrentGPT, new_model


def save(run: Path, tensors: dict[str, Any], state: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Write step_N of `tensors` (one .pt file a key) and `state` (JSON), then point `last` at it.

    Keeps the two newest and the best. Where it fails, on a full disk say, UserError, and the earlier ones stay.
    """
    folder = run / "ckpt" / f"step_{state['step']}"
    try:
        write(folder, tensors, state, tokenizer)
        point(run, "last", folder.name)
    except OSError as error:
        raise UserError(f"could not save {folder}: {error.strerror}; earlier checkpoints are as they were") from None
    kept = run / "ckpt" / "best"
    best_name = kept.read_text().strip() if kept.exists() else None
    older = [old for old in steps(run) if step_of(old) < state["step"]]  # what is newer was broken, and passed over
    for old in older[1:]:
        if old.name != best_name:
            shutil.rmtree(old)


def mark_best(run: Path, step: int, val_loss: float) -> None:
    """The checkpoint of this step, saved already, has the lowest validation loss so far."""
    folder = run / "ckpt" / f"step_{step}"
    manifest = json.loads((folder / "manifest.json").read_text())
    write_whole(folder / "manifest.json", json.dumps(manifest | dict(best_val_loss=val_loss), indent=1))
    point(run, "best", folder.name)


def write(folder: Path, tensors: dict[str, Any], state: dict[str, Any], tokenizer: Tokenizer) -> None:
    for leftover in folder.parent.glob("step_*.tmp"):  # of a save that a crash cut short
        shutil.rmtree(leftover)
    partial = folder.with_suffix(".tmp")
    partial.mkdir(parents=True)
    manifest = state | dict(tokenizer=tokenizer.save(partial))
    for name, value in tensors.items():
        torch.save(value, partial / f"{name}.pt")
    manifest["files"] = {f.name: dict(bytes=f.stat().st_size, sha256=sha256(f)) for f in sorted(partial.iterdir())}
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for path in (*partial.iterdir(), partial):
        sync(path)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was here before and then went back
    os.rename(partial, folder)
    sync(folder.parent)


def point(run: Path, pointer: str, name: str) -> None:
    """`last` and `best` are for people and scripts; a resume looks at the step folders themselves."""
    write_whole(run / "ckpt" / pointer, name + "\n")


def steps(run: Path) -> list[Path]:
    """The step folders of a run, newest first."""
    found = [folder for folder in (run / "ckpt").glob("step_*") if folder.name.removeprefix("step_").isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there, whole and unchanged; UserError names what is not."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no whole checkpoint: its manifest.json cannot be read ({error})") from None
    known = {"step", "options", "tokenizer", "files"}
    if not isinstance(manifest, dict) or not known <= manifest.keys():
        raise UserError(f"{folder / 'manifest.json'} is not one of ours, wanted one with {', '.join(sorted(known))}")
    for name, seen in manifest["files"].items():
        size = (folder / name).stat().st_size if (folder / name).exists() else None
        if size != seen["bytes"]:
            raise UserError(f"{folder / name} is {size} bytes, wanted {seen['bytes']}: this checkpoint is cut")
        if sha256(folder / name) != seen["sha256"]:
            raise UserError(f"{folder / name} is not what was saved: its sha256 differs from the manifest's")
    return manifest


def newest(run: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest checkpoint that verifies, its manifest, and a line about each newer one that does not."""
    complaints = []
    for folder in steps(run):
        try:
            return folder, read_manifest(folder), complaints
        except UserError as error:
            complaints.append(str(error))
    return None, {}, complaints


def load_tensors(folder: Path, name: str, mapped: bool = False) -> Any:
    return torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True, mmap=mapped)


def load_model(run: Path, device: torch.device, mapped: bool = False) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """A run folder (its newest whole checkpoint), or one step folder -> model in eval mode, tokenizer, manifest.

    mapped, for the CPU: the weights stay in the file until they are read, so the model may be larger than memory.
    """
    if (run / "manifest.json").exists():
        folder, manifest = run, read_manifest(run)
    else:
        folder, manifest, complaints = newest(run)
        if folder is None:
            raise UserError("; ".join(complaints) or f"{run} holds no checkpoint: train first, or name a run folder")
        for complaint in complaints:
            print(f"warning: {complaint}; using {folder.name}")
    try:
        with device:
            o = manifest["options"]
            recurrent = RecurrentConfig(**o.get("recurrent", {}))  # checkpoints of before it was there have none
            model = new_model(o.get("model", "gpt"), gpt_config(o["gpt"]), recurrent, seed=None)
        model.load_state_dict(structured.without_guides(load_tensors(folder, "model", mapped)), assign=mapped)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # options or names that this model does not have
        raise UserError(f"{folder} is of another model or version: {' '.join(str(error).split())[:200]}") from None
    return model.eval(), load_tokenizer(folder, manifest["tokenizer"]), manifest


# What may differ between a model and the one whose weights it starts from; of the rest, any would change the function.
FREE_TO_DIFFER = {"lowdim", "first_ffn_dense", "factor_init", "zero_init", "dropout", "block_size"}


@torch.no_grad()
def start_from(run: Path, model: GPT, tokenizer: dict[str, Any]) -> dict[str, float]:
    """Fill the model with the weights of a run or checkpoint -> the energy kept in each layer that changed its rank.

    Where a matrix is dense there and low-rank here, or of a higher rank there, A and B are its truncated SVD; where
    it is factored there and dense here, the product. `tokenizer` is the spec of this model's corpus. Raises UserError
    where the other model differs in more than structure, dropout and, without learned positions, block_size.

    Where `run` is no run, it is a Hugging Face folder, or a name on the hub, of a Llama or a GPT-2.
    """
    if (run / "ckpt").exists() or (run / "manifest.json").exists():
        source, _, manifest = load_model(run, torch.device("cpu"), mapped=True)
        spec = manifest["tokenizer"]
    else:
        import export  # which imports this file

        folder = export.find_folder(run)
        source, spec = export.read_model(folder, model.config.bias), export.read_tokenizer(folder)
        if spec is None:
            print(f"warning: {run} has no tokenizer.json; its token ids are taken to be those of the corpus")
    free = FREE_TO_DIFFER - ({"block_size"} if model.config.pos == "learned" else set())
    options = [{k: v for k, v in explicit(gpt.config).items() if k not in free} for gpt in (source, model)]
    for saved, gpt in zip(options, (source, model)):
        saved |= dict(model="gpt") if not isinstance(gpt, RecurrentGPT) else asdict(gpt.recurrent)
    changed = differences(*options)
    if spec is not None and {**spec, "name": None} != {**tokenizer, "name": None}:
        changed.append("its tokenizer is not that of the corpus")
    if changed:
        raise UserError(f"init_from is {run}, whose weights do not fit. " + "; ".join(changed))
    theirs, energy = dict(source.named_modules()), {}
    for name, layer in model.named_modules():
        same = [p.shape for p in layer.parameters(False)] == [p.shape for p in theirs[name].parameters(False)]
        if not same:
            energy[name] = change_rank(name, layer, theirs[name])
        for parameter in dict(layer.named_parameters(recurse=False)) if same else ["bias"]:
            if getattr(layer, parameter) is not None:
                getattr(layer, parameter).copy_(getattr(theirs[name], parameter))
    return energy


def change_rank(name: str, layer: nn.Module, source: nn.Module) -> float:
    """Fill a layer's matrix from one of another rank or structure, dense counting as full -> the energy kept."""
    if isinstance(layer, Dense):
        layer.weight.copy_(source.materialise())
        return 1.0
    if not isinstance(layer, LowRank):
        raise UserError(f"{name} has blocks and other widths than in the run it starts from; wanted a rank, or 0")
    if 0 < source.rank < layer.rank:
        raise UserError(f"{name} has rank {layer.rank}, wanted at most the {source.rank} of the run it starts from")
    if isinstance(source, LowRank):
        svd = factors.product_svd(source.A.to(layer.A.device), source.B.to(layer.A.device))
    else:
        matrix = source.weight if isinstance(source, Dense) else source.materialise()
        svd = torch.linalg.svd(matrix.to(layer.A.device), full_matrices=False)
    A, B, energy = factors.truncate(svd, layer.rank)
    layer.A.copy_(A)
    layer.B.copy_(B)
    return energy


def energy_table(energy: dict[str, float]) -> str:
    """What start_from gives, {'transformer.h.0.attn.q': 0.9, ...}, as a line a layer with a column a sublayer."""
    rows: dict[str, dict[str, float]] = {}
    for name, kept in energy.items():
        layer, _, sublayer = name.removeprefix("transformer.h.").split(".")
        rows.setdefault(layer, {})[sublayer] = kept
    if not rows:
        return "no layer changed its rank: the weights are those of the run they come from"
    lines = ["energy kept, in the squares of the singular values"]
    sublayers = list(dict.fromkeys(sublayer for row in rows.values() for sublayer in row))
    lines.append(f"{'layer':>5}" + "".join(f"{sublayer:>9}" for sublayer in sublayers))
    for layer, row in rows.items():
        lines.append(f"{layer:>5}" + "".join(f"{row[s]:9.2%}" if s in row else f"{'':9}" for s in sublayers))
    return "\n".join(lines)


def explicit(c: GPTConfig) -> dict[str, Any]:
    """The model's options, with the widths that None stands for."""
    return asdict(c) | dict(attn_dim=c.heads_dim, n_kv_head=c.kv_heads, ffn_dim=c.hidden_dim)


def gpt_config(options: dict[str, Any]) -> GPTConfig:
    """The model's options as a manifest holds them -> GPTConfig."""
    return GPTConfig(**options | dict(lowdim=LowDim(**options["lowdim"])))


def model_options(options: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's options that its weights depend on; what older checkpoints do not say is its default."""
    kind = options.get("model", "gpt")
    recurrent = options.get("recurrent", {}) if kind == "recurrent" else {}
    return options["gpt"] | recurrent | dict(model=kind)


def differences(saved: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """['n_layer: the checkpoint has 4, this run 6', ...] for each field that is not the same."""
    found = []
    for name in saved | wanted:
        old, new = saved.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name}: the checkpoint has {old}, this run {new}")
    return found


def sha256(file: Path) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_whole(path: Path, text: str) -> None:
    """The file has its old contents or the new ones, never a part of them."""
    partial = path.with_suffix(".tmp")
    partial.write_text(text)
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Onto the disk: a file's contents, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
