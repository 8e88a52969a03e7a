"""Checkpoints that survive a crash: out/RUN/ckpt/step_N/ is written whole, its manifest last.

    out/RUN/ckpt/step_1000/    model.pt, optimizer.pt, the tokenizer, manifest.json
    out/RUN/ckpt/last, best    one line each: the name of a step folder, swapped with os.replace

With shard=true the tensors are in the files of torch.distributed.checkpoint, each rank's shards in its own; any number
of ranks, or one process, reads either form. The manifest holds everything a person may want to read (options, step,
losses, versions), size and sha256 of each file, and a sha256 of itself. Nothing here can run code when it is loaded:
the .pt files hold tensors alone and are loaded with weights_only, and of a sharded one's index only the classes it
consists of are made.
"""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from config import UserError
from data.tokenizers import Tokenizer, load_tokenizer
from lpa import structured
from lpa.distributed import World
from model import GPT, GPTConfig, LowDim
from recurrent import RecurrentConfig, new_model

Parts = dict[str, dict[str, Tensor]]  # 'model' and 'optimizer', each by names like transformer.h.0.attn.q.A.exp_avg

# --- Saving ------------------------------------------------------------------------------------------------------


class Saver:
    """Saves in the background. A step waits until the tensors are copied to the host's memory, and for an earlier save
    that is not done.

    Sharded tensors are saved by all ranks together, others by rank 0. What fails is told by failure() or close().
    """

    def __init__(self, run: Path, tokenizer: Tokenizer, world: World, shard: bool, timeout: float = 1800.0) -> None:
        self.run, self.tokenizer, self.world, self.shard = run, tokenizer, world, shard
        # The threads' words must not mix with those of the steps.
        self.group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if shard else None
        self.worker = ThreadPoolExecutor(1, "save")
        self.jobs: list[Future] = []
        self.failed: str | None = None

    def save(self, parts: Parts, state: dict[str, Any]) -> str | None:
        """`parts` are the live tensors, `state` goes into the manifest as it is now -> what the save before it met."""
        self.wait()
        earlier, self.failed = self.failure(), None
        state, partial = json.loads(json.dumps(state)), partial_folder(self.run, state["step"])
        if self.shard:
            flat = {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
            writer = dcp.FileSystemWriter(partial)
            written: Any = dcp.async_save(flat, storage_writer=writer, process_group=self.group)
            self.submit(lambda: self.publish_shards(written, partial, state))
        elif self.world.rank == 0:
            copies = {part: {k: t.detach().to("cpu", copy=True) for k, t in parts[part].items()} for part in parts}
            self.submit(lambda: save(self.run, copies, state, self.tokenizer))
        return earlier

    def publish_shards(self, written: Future, partial: Path, state: dict[str, Any]) -> None:
        try:
            written.result()  # here on every rank, or on none
        except (dcp.CheckpointException, OSError) as error:
            if self.world.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"could not save {partial.with_suffix('')}: {last_line(error)}; {AS_BEFORE}") from None
        if self.world.rank == 0:
            with telling(partial):
                publish(self.run, partial, state, self.tokenizer)

    def mark_best(self, step: int, val_loss: float) -> None:
        if self.world.rank == 0:
            self.submit(lambda: mark_best(self.run, step, val_loss))

    def submit(self, job: Callable[[], None]) -> None:
        self.jobs.append(self.worker.submit(job))

    def wait(self) -> None:
        """Until what was begun is on the disk, or has failed."""
        for job in self.jobs:
            job.exception()

    def failure(self) -> str | None:
        """The first thing that went wrong since a save that went well. Does not wait."""
        for job in [job for job in self.jobs if job.done()]:
            self.jobs.remove(job)
            try:
                job.result()
            except UserError as error:
                self.failed = self.failed or str(error)
        return self.failed

    def newest(self) -> Path | None:
        """The folder of the last save, which is then done. Raises UserError where it failed."""
        self.wait()
        if self.failure():
            raise UserError(self.failed)
        return newest(self.run)[0]

    def close(self) -> None:
        """Raises UserError where the last save failed."""
        self.worker.shutdown()
        if self.failure():
            raise UserError(self.failed)


AS_BEFORE = "earlier checkpoints are as they were"


def save(run: Path, parts: Parts, state: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Write step_N of `parts` (one .pt file each) and `state` (JSON), then point `last` at it.

    Keeps the two newest and the best. Where it fails, on a full disk say, UserError, and the earlier ones stay.
    """
    partial = partial_folder(run, state["step"])
    with telling(partial):
        clear_leftovers(run)
        partial.mkdir(parents=True)
        for name, tensors in parts.items():
            torch.save(tensors, partial / f"{name}.pt")
        publish(run, partial, state, tokenizer)


@contextlib.contextmanager
def telling(partial: Path) -> Iterator[None]:
    """An error of the disk becomes one line, and what was half written goes, as the disk may be full."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: what torch.save makes of a failed write
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"could not save {partial.with_suffix('')}: {last_line(error)}; {AS_BEFORE}") from None


def last_line(error: BaseException) -> str:
    return getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[-1]


def publish(run: Path, partial: Path, state: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Tokenizer and manifest, all of it onto the disk, and only then under its name; then what is too old goes."""
    manifest = state | dict(tokenizer=tokenizer.save(partial))
    manifest["files"] = {f.name: dict(bytes=f.stat().st_size, sha256=sha256(f)) for f in sorted(partial.iterdir())}
    (partial / "manifest.json").write_text(sealed(manifest))
    for path in (*partial.iterdir(), partial):
        sync(path)
    folder = partial.with_suffix("")
    if folder.exists():  # of a run that was here before and then went back; broken, or it would have been resumed
        shutil.rmtree(folder)
    os.rename(partial, folder)
    sync(folder.parent)
    point(run, "last", folder.name)
    kept = run / "ckpt" / "best"
    best_name = kept.read_text(errors="replace").strip() if kept.exists() else None
    older = [old for old in steps(run) if step_of(old) < state["step"]]  # what is newer was broken, and passed over
    for old in older[1:]:
        if old.name != best_name:
            shutil.rmtree(old)


def partial_folder(run: Path, step: int) -> Path:
    return run / "ckpt" / f"step_{step}.tmp"


def clear_leftovers(run: Path) -> None:
    """Of a save that a crash cut short."""
    for leftover in (run / "ckpt").glob("step_*.tmp"):
        shutil.rmtree(leftover)


def set_aside(folder: Path) -> None:
    """A step folder that does not verify gets a name that no resume looks at."""
    shutil.rmtree(folder.with_suffix(".broken"), ignore_errors=True)
    folder.rename(folder.with_suffix(".broken"))


def mark_best(run: Path, step: int, val_loss: float) -> None:
    """The checkpoint of this step, saved already, has the lowest validation loss so far."""
    folder = run / "ckpt" / f"step_{step}"
    if not folder.exists():  # it could not be saved, as is told elsewhere
        return
    with telling(partial_folder(run, step)):
        point(run, "best", folder.name)  # first: a resume evaluates again what the manifest does not know of
        manifest = json.loads((folder / "manifest.json").read_text())
        write_whole(folder / "manifest.json", sealed(manifest | dict(best_val_loss=val_loss)))


def sealed(manifest: dict[str, Any]) -> str:
    """As JSON, with the sha256 of all the rest in it."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    seal = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return json.dumps(rest | dict(sha256=seal), indent=1)


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
    if "sha256" in manifest and manifest["sha256"] != json.loads(sealed(manifest))["sha256"]:  # old ones have none
        raise UserError(f"{folder / 'manifest.json'} is not what was saved: its own sha256 differs")
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


# --- Loading -----------------------------------------------------------------------------------------------------


def is_sharded(folder: Path) -> bool:
    return (folder / ".metadata").exists()


def load_tensors(folder: Path, part: str, mapped: bool = False) -> dict[str, Tensor]:
    """All of 'model' or 'optimizer', on the CPU, however many ranks saved it.

    mapped: the tensors stay in the file until they are read, unless the checkpoint is sharded.
    """
    if not is_sharded(folder):
        if not (folder / f"{part}.pt").exists():
            raise UserError(f"{folder} holds no {part}.pt, so it is of another version of this program")
        return torch.load(folder / f"{part}.pt", map_location="cpu", weights_only=True, mmap=mapped)
    index: dict[str, Any] = Reader(folder).read_metadata().state_dict_metadata
    names = [name for name in index if name.startswith(f"{part}.")]
    whole = {name: torch.empty(index[name].size, dtype=index[name].properties.dtype) for name in names}
    read_shards(folder, whole)
    return {name.removeprefix(f"{part}."): tensor for name, tensor in whole.items()}


def fill(folder: Path, part: str, live: dict[str, Tensor]) -> None:
    """Give the tensors of `live`, sharded or not, the values they have in a checkpoint, sharded or not.

    Every rank reads what it needs, and nothing is sent. Raises UserError where names or shapes are others.
    """
    saved = shapes(folder, part)
    wrong = [n for n in saved | live if n not in saved or n not in live or saved[n] != live[n].shape]
    if wrong:
        was, wanted = saved.get(wrong[0]), live[wrong[0]].shape if wrong[0] in live else None
        raise UserError(f"{folder} is of another model: {wrong[0]} has there shape {was}, wanted {wanted}")
    if is_sharded(folder):
        read_shards(folder, {f"{part}.{name}": tensor for name, tensor in live.items()})
        return
    whole = load_tensors(folder, part, mapped=True)
    for name, tensor in live.items():
        value = whole[name]
        if isinstance(tensor, DTensor):
            value, place = value.to(tensor.device), (tensor.device_mesh, tensor.placements)
            value = distribute_tensor(value, *place, src_data_rank=None)
        tensor.copy_(value)


def shapes(folder: Path, part: str) -> dict[str, torch.Size]:
    if not is_sharded(folder):
        return {name: tensor.shape for name, tensor in load_tensors(folder, part, mapped=True).items()}
    index: dict[str, Any] = Reader(folder).read_metadata().state_dict_metadata
    return {name.removeprefix(f"{part}."): index[name].size for name in index if name.startswith(f"{part}.")}


def read_shards(folder: Path, live: dict[str, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as is meant: nothing is sent
        dcp.load(live, storage_reader=Reader(folder), no_dist=True)


class Reader(dcp.FileSystemReader):
    """That of torch, but for how it reads the index, a pickle: whoever made the file cannot choose what is run."""

    def read_metadata(self, *_: Any, **__: Any) -> dcp.Metadata:
        try:
            with open(Path(self.path) / ".metadata", "rb") as file:
                index = IndexOnly(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.path}/.metadata is no index of a sharded checkpoint: {error}") from None
        index.storage_meta.load_id = self.load_id
        return index


class IndexOnly(pickle.Unpickler):
    KNOWN: ClassVar = {
        "torch.distributed.checkpoint.metadata": {
            *("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex"),
            *("StorageMeta", "_MEM_FORMAT_ENCODING"),
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", "float32", "float64", "bfloat16"},
        "pathlib": {"PosixPath", "WindowsPath"},
    }

    def find_class(self, module: str, name: str) -> Any:
        module = module.removesuffix("._local")  # where Python 3.13 keeps pathlib's classes
        if name not in self.KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def optimizer_tensors(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The live state of the optimizers, by the parameter's name and its own: {'lm_head.weight.exp_avg': ...}."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    state = ((p, of_p) for optimizer in optimizers for p, of_p in optimizer.state.items())
    return {f"{names[p]}.{key}": tensor for p, of_p in state for key, tensor in of_p.items()}


@torch.no_grad()
def restore(folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Weights and moments as they were; rates, decay and the like stay as the optimizers were made with."""
    fill(folder, "model", model.state_dict())
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    for name, shape in shapes(folder, "optimizer").items():
        p = named.get(name.rpartition(".")[0])
        if p is None or p not in owner:
            raise UserError(f"{folder} has an optimizer's {name}, of which this run has no parameter")
        empty = torch.zeros_like(p) if shape == p.shape else torch.zeros(shape, device=p.device)
        owner[p].state[p][name.rpartition(".")[2]] = empty.detach()
    fill(folder, "optimizer", optimizer_tensors(model, optimizers))


def load_model(run: Path, device: torch.device, mapped: bool = False) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """A run folder (its newest whole checkpoint), one step folder, or `last` or `best` -> model, tokenizer, manifest.

    The model is in eval mode. Raises UserError where there is none, or one that is cut or of another version.

    mapped, for the CPU: the weights stay in the file until they are read, so the model may be larger than memory.
    """
    if run.is_file() and run.parent.name == "ckpt":
        run = run.parent / run.read_text(errors="replace").strip()
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


def explicit(c: GPTConfig) -> dict[str, Any]:
    """The model's options, with the widths that None stands for."""
    return asdict(c) | dict(attn_dim=c.heads_dim, n_kv_head=c.kv_heads, ffn_dim=c.hidden_dim)


def gpt_config(options: dict[str, Any]) -> GPTConfig:
    """The model's options as a manifest holds them -> GPTConfig."""
    others = dict(options)
    return GPTConfig(lowdim=LowDim(**others.pop("lowdim")), **others)


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
