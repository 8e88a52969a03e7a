"""Checkpoints that survive a crash: out/RUN/ckpt/step_N/ is written whole, its manifest last.

    out/RUN/ckpt/step_1000/    the tensors, as torch.distributed.checkpoint (DCP) writes them; tokenizer; manifest.json
    out/RUN/ckpt/last, best    one line each: the name of a step folder, swapped with os.replace

Any number of processes reads what any number wrote. The manifest holds what a person may want to read (options, step,
losses, versions), the size and sha256 of each file, and a sha256 of itself. Loading a checkpoint runs no code from it:
tensors are read with weights_only, and of DCP's index, a pickle, only its own classes are made.
"""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from config import UserError
from data.tokenizers import Tokenizer, load_tokenizer
from data.writing import sha256_of, sync, write_whole
from lpa.distributed import DistInfo
from model import GPT, GPTConfig, LowDim

AS_BEFORE = "earlier checkpoints are as they were"

# --- Saving ------------------------------------------------------------------------------------------------------


class Saver:
    """Saves in the background. A step waits until the tensors are copied to the host, and for an earlier save.

    Sharded tensors are saved by all processes together, others by process 0.
    """

    def __init__(self, run: Path, tokenizer: Tokenizer, info: DistInfo, shard: bool, timeout: float = 1800.0) -> None:
        self.run, self.tokenizer, self.info, self.shard = run, tokenizer, info, shard
        # A group of its own: what the saving threads send must not mix with what the steps send.
        self.group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if shard else None
        self.worker = ThreadPoolExecutor(1, "save")
        self.jobs: list[Future] = []

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Begin to save: `tensors` are live ones, `state` goes into the manifest as it is now."""
        self.wait()
        state, partial = json.loads(json.dumps(state)), partial_folder(self.run, state["step"])
        if self.shard:
            written: Any = dcp.async_save(tensors, storage_writer=writer(partial), process_group=self.group)
            self.jobs.append(self.worker.submit(self.publish_shards, written, partial, state))
        elif self.info.rank == 0:
            copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            self.jobs.append(self.worker.submit(save, self.run, copies, state, self.tokenizer))

    def publish_shards(self, written: Future, partial: Path, state: dict[str, Any]) -> None:
        with disk_errors(partial, self.info.rank == 0):
            written.result()  # fails on every process, or on none
            if self.info.rank == 0:
                publish(self.run, partial, state, self.tokenizer)

    def mark_best(self, step: int, val_loss: float) -> None:
        if self.info.rank == 0:
            self.jobs.append(self.worker.submit(mark_best, self.run, step, val_loss))

    def wait(self) -> None:
        """Wait until what was begun is on the disk, or has failed."""
        for job in self.jobs:
            job.exception()

    def failed(self) -> bool:
        """Say whether a save has failed, without waiting for one that is under way."""
        return any(job.done() and job.exception() for job in self.jobs)

    def close(self) -> None:
        """Finish all saves. Raise UserError where one failed."""
        self.worker.shutdown()
        for job in self.jobs:
            job.result()


def writer(folder: Path) -> dcp.FileSystemWriter:
    return dcp.FileSystemWriter(folder, overwrite=True)


def save(run: Path, tensors: dict[str, Tensor], state: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Write step_N of the tensors and of `state` (JSON), then make `last` point to it.

    Keeps the two newest and the best. Where it fails, on a full disk say, UserError, and the earlier ones stay.
    """
    partial = partial_folder(run, state["step"])
    with disk_errors(partial), quiet():
        clear_leftovers(run)
        partial.mkdir(parents=True)
        dcp.save(tensors, storage_writer=writer(partial), no_dist=True)
        publish(run, partial, state, tokenizer)


@contextlib.contextmanager
def disk_errors(partial: Path, writes: bool = True) -> Iterator[None]:
    """Make one line of an error of the disk, and remove what is half written, as the disk may be full."""
    try:
        yield
    except (dcp.CheckpointException, OSError, RuntimeError) as error:  # RuntimeError: a failed write of torch.save
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"could not save {partial.with_suffix('')}: {last_line(error)}; {AS_BEFORE}") from None


def last_line(error: BaseException) -> str:
    if isinstance(error, dcp.CheckpointException) and error.failures:
        return last_line(next(iter(error.failures.values()))[0])
    return getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[-1]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide DCP's warnings that nothing is sent between processes, as is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        yield


def publish(run: Path, partial: Path, state: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Add tokenizer and manifest, sync all to the disk, and only then give the folder its name; remove old ones."""
    manifest = state | dict(tokenizer=tokenizer.save(partial))
    manifest["files"] = {f.name: dict(bytes=f.stat().st_size, sha256=sha256_of(f)) for f in sorted(partial.iterdir())}
    (partial / "manifest.json").write_text(sealed(manifest))
    for path in (*partial.iterdir(), partial):
        sync(path)
    folder = partial.with_suffix("")
    if folder.exists():  # it is broken, or the run would have resumed from it
        shutil.rmtree(folder)
    os.rename(partial, folder)
    sync(folder.parent)
    point(run, "last", folder.name)
    kept = run / "ckpt" / "best"
    best_name = kept.read_text(errors="replace").strip() if kept.exists() else None
    older = [old for old in steps(run) if step_of(old) < state["step"]]  # a newer one is broken and was skipped
    for old in older[1:]:
        if old.name != best_name:
            shutil.rmtree(old)


def partial_folder(run: Path, step: int) -> Path:
    return run / "ckpt" / f"step_{step}.tmp"


def clear_leftovers(run: Path) -> None:
    """Remove what a save left that a crash cut short."""
    for leftover in (run / "ckpt").glob("step_*.tmp"):
        shutil.rmtree(leftover)


def set_aside(folder: Path) -> None:
    """Rename a step folder that does not verify, so that no resume looks at it."""
    shutil.rmtree(folder.with_suffix(".broken"), ignore_errors=True)
    folder.rename(folder.with_suffix(".broken"))


def mark_best(run: Path, step: int, val_loss: float) -> None:
    """Note that the checkpoint of this step, saved already, has the lowest validation loss so far."""
    folder = run / "ckpt" / f"step_{step}"
    if not folder.exists():  # it could not be saved, which Saver reports
        return
    with disk_errors(partial_folder(run, step)):
        point(run, "best", folder.name)  # first: a resume evaluates again what the manifest does not hold
        manifest = json.loads((folder / "manifest.json").read_text())
        write_whole(folder / "manifest.json", sealed(manifest | dict(best_val_loss=val_loss)))


def sealed(manifest: dict[str, Any]) -> str:
    """Return the manifest as JSON, with the sha256 of all the rest in it."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    seal = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return json.dumps(rest | dict(sha256=seal), indent=1)


def point(run: Path, pointer: str, name: str) -> None:
    """Write `last` or `best`, for people and scripts; a resume looks at the step folders themselves."""
    write_whole(run / "ckpt" / pointer, name + "\n")


def steps(run: Path) -> list[Path]:
    """Return the step folders of a run, newest first."""
    found = [folder for folder in (run / "ckpt").glob("step_*") if folder.name.removeprefix("step_").isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint whose files are all there and unchanged. UserError names what is not."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no whole checkpoint: its manifest.json cannot be read ({error})") from None
    known = {"step", "options", "tokenizer", "files", "sha256"}
    if not isinstance(manifest, dict) or not known <= manifest.keys():
        raise UserError(f"{folder / 'manifest.json'} is not one of ours, wanted one with {', '.join(sorted(known))}")
    if manifest["sha256"] != json.loads(sealed(manifest))["sha256"]:
        raise UserError(f"{folder / 'manifest.json'} is not what was saved: its own sha256 differs")
    for name, seen in manifest["files"].items():
        size = (folder / name).stat().st_size if (folder / name).exists() else None
        if size != seen["bytes"]:
            raise UserError(f"{folder / name} is {size} bytes, wanted {seen['bytes']}: this checkpoint is cut")
        if sha256_of(folder / name) != seen["sha256"]:
            raise UserError(f"{folder / name} is not what was saved: its sha256 differs from the manifest's")
    return manifest


def newest(run: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """Return the newest checkpoint that verifies, its manifest, and a line about each newer one that does not."""
    complaints = []
    for folder in steps(run):
        try:
            return folder, read_manifest(folder), complaints
        except UserError as error:
            complaints.append(str(error))
    return None, {}, complaints


# --- Loading -----------------------------------------------------------------------------------------------------


def load_tensors(folder: Path, part: str) -> dict[str, Tensor]:
    """Return all of 'model' or 'optimizer' on the CPU."""
    index = saved_index(folder)
    names = [name for name in index if name.startswith(f"{part}.")]
    tensors = {name: torch.empty(index[name].size, dtype=index[name].properties.dtype) for name in names}
    read(folder, tensors)
    return {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items()}


def saved_index(folder: Path) -> dict[str, Any]:
    """Return shape and dtype of each tensor by its name. Raise UserError where there is no index."""
    if not (folder / ".metadata").exists():
        raise UserError(f"{folder} holds no .metadata, so another version of this program wrote it")
    return Reader(folder).read_metadata().state_dict_metadata


def read(folder: Path, live: dict[str, Tensor]) -> None:
    """Fill the tensors of `live`, sharded or not. Every process reads what it needs, and nothing is sent.

    Raise UserError where a name or a shape differs from those saved under the same prefix.
    """
    parts = {name.partition(".")[0] for name in live}
    index = {name: entry for name, entry in saved_index(folder).items() if name.partition(".")[0] in parts}
    for name in index | live:
        was = tuple(index[name].size) if name in index else None
        wanted = tuple(live[name].shape) if name in live else None
        if was != wanted:
            name = name.partition(".")[2]
            raise UserError(f"{folder} is of another model: {name} has there shape {was}, wanted {wanted}")
    with quiet():
        dcp.load(live, storage_reader=Reader(folder), no_dist=True)


class Reader(dcp.FileSystemReader):
    """DCP's reader, except that its index, a pickle, cannot choose what code runs."""

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
        "torch": {"Size", "float32", "float64", "bfloat16", "int32", "int64"},
        "pathlib": {"PosixPath", "WindowsPath"},
    }

    def find_class(self, module: str, name: str) -> Any:
        module = module.removesuffix("._local")  # where Python 3.13 keeps pathlib's classes
        if name not in self.KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def live_tensors(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return weights and moments by name: 'model.lm_head.weight', 'optimizer.lm_head.weight.exp_avg', ..."""
    weights = model.state_dict()  # first: after an evaluation, FSDP leaves the head gathered until then
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    state = ((p, of_p) for optimizer in optimizers for p, of_p in optimizer.state.items())
    moments = {f"optimizer.{names[p]}.{key}": tensor for p, of_p in state for key, tensor in of_p.items()}
    return {f"model.{name}": tensor for name, tensor in weights.items()} | moments


@torch.no_grad()
def restore(folder: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Load weights and moments. Rates, decay and the like stay as the optimizers were made with."""
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    for full_name, entry in saved_index(folder).items():
        part, _, name = full_name.partition(".")
        if part == "optimizer":
            p, key = named.get(name.rpartition(".")[0]), name.rpartition(".")[2]
            if p is None or p not in owner:
                raise UserError(f"{folder} has an optimizer's {name}, of which this run has no parameter")
            empty = torch.zeros_like(p) if entry.size == p.shape else torch.zeros(entry.size, device=p.device)
            owner[p].state[p][key] = empty.detach()
    read(folder, live_tensors(model, optimizers))


def find(run: Path) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint that a run folder (the newest whole one), a step folder, `last` or `best` names.

    Raise UserError where there is none, or one that is cut.
    """
    if run.is_file() and run.parent.name == "ckpt":
        run = run.parent / run.read_text(errors="replace").strip()
    if (run / "manifest.json").exists():
        return run, read_manifest(run)
    folder, manifest, complaints = newest(run)
    if folder is None:
        raise UserError("; ".join(complaints) or f"{run} holds no checkpoint: train first, or name a run folder")
    for complaint in complaints:
        print(f"warning: {complaint}; using {folder.name}")
    return folder, manifest


def load_model(run: Path, device: torch.device) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Return the model of a checkpoint (see find) in eval mode, its tokenizer and its manifest."""
    folder, manifest = find(run)
    try:
        with device:
            model = GPT(gpt_config(manifest["options"]["gpt"]), seed=None)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # options that this version does not have
        raise UserError(f"{folder} is of another version: {' '.join(str(error).split())[:200]}") from None
    read(folder, {f"model.{name}": tensor for name, tensor in model.state_dict().items()})
    return model.eval(), load_tokenizer(folder, manifest["tokenizer"]), manifest


def gpt_config(options: dict[str, Any]) -> GPTConfig:
    """Return the GPTConfig of a manifest's options."""
    others = dict(options)
    return GPTConfig(lowdim=LowDim(**others.pop("lowdim")), **others)


def differences(saved: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """Return ['n_layer: the checkpoint has 4, this run 6', ...] for each field that differs."""
    found = []
    for name in saved | wanted:
        old, new = saved.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name}: the checkpoint has {old}, this run {new}")
    return found
