"""From text to token shards: what every `python -m data.NAME.prepare` does with its text.

Threads tokenise (tiktoken works outside Python's lock, so they use every core and share one memory); one writer puts
the results into shards in the order of the text. A shard that is full is flushed to the disk, renamed and noted in
progress.jsonl; a run that was killed goes on after the last of them, and ends with the same bytes.
"""

import hashlib
import json
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken
from tqdm import tqdm

from config import UserError
from data import DATA, corpus_folder, read_meta
from data.shards import HEADER_BYTES, shard_header
from data.texts import Piece, Task, cut_safely, in_tasks
from data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    HFTokenizer,
    Tokenizer,
    load_tokenizer,
    read_hf,
    tiktoken_encoding,
    train_bpe,
)

BPE_CHARACTERS = 1_000_000_000  # a BPE learns from so much text at most; more would change little


@dataclass(frozen=True)
class PrepareOptions:
    """What every prepare script offers. A script adds its own and changes the defaults."""

    name: str
    """Folder of the result below data/, or a path."""
    path: str | None = None
    """Local text to use: a file, or a folder of .txt, .jsonl or .parquet, each also as .gz or .xz."""
    tokenizer: str = "gpt2"
    """byte, char, an encoding of tiktoken such as gpt2, bpe:32000 (trained on the train split), or a prepared corpus
    or a Hugging Face folder whose tokenizer is to be used."""
    threads: int | None = None
    """None = one per core. The result does not depend on it."""
    shard_tokens: int = 100_000_000
    """A shard is closed when it holds so many."""
    force: bool = False
    """Throw away what the folder holds already."""

    def __post_init__(self) -> None:
        for name in ("threads", "shard_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, wanted 1 or more")


@dataclass(frozen=True)
class Source:
    """The text of a corpus."""

    pieces: Callable[[], Iterable[Piece]]
    """All text anew, in the same order each time; the parts of a document follow each other."""
    identity: dict[str, Any]
    """What must not have changed when a stopped preparation goes on."""
    total_bytes: int | None = None
    """For the progress bar; None = not known."""


def prepare(options: PrepareOptions, source: Source, train_tokens: float | None = None) -> None:
    """Writes the shards and meta.json of a corpus, or says that they are there already.


    train_tokens: stop when the train split has so many; None = at the end of the text.
    Raises UserError: the folder holds something else, the text or the tokenizer cannot be had, the disk is full.
    """
    folder = DATA / options.name
    asked = {"tokenizer": options.tokenizer, "shard_tokens": options.shard_tokens, "train_tokens": train_tokens}
    asked |= source.identity
    if not options.force and is_prepared(folder, asked):
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        print(f"{options.name} is prepared already:\n{summary(meta)}")
        return
    try:
        tokenizer, spec, shards = start_or_go_on(folder, asked, options, source)
        shards = write_shards(folder, shards, tokenizer, source, options, train_tokens)
    except KeyboardInterrupt:
        raise UserError("stopped; the same command goes on after the last whole shard") from None
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; the same command goes on where it was") from None
    meta = describe(tokenizer, spec, shards, asked)
    write_whole(folder / "meta.json", json.dumps(meta, indent=1, ensure_ascii=False))
    (folder / "progress.jsonl").unlink()
    print(f"{options.name} is prepared:\n{summary(meta)}")


def is_prepared(folder: Path, asked: dict[str, Any]) -> bool:
    """Whether the folder holds what is asked, all of it. Raises UserError where it holds something else."""
    if not (folder / "meta.json").is_file():
        return False
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    refuse_difference(folder, meta.get("prepared_with", {}), asked)
    for shard in (shard for split in meta["splits"].values() for shard in split["shards"]):
        path = folder / shard["file"]
        if not path.is_file() or sha256_of(path) != shard["sha256"]:
            state = "is damaged" if path.is_file() else "is missing"
            raise UserError(f"{path} {state}, wanted sha256 {shard['sha256'][:16]}...; --force prepares all again")
    return True


def refuse_difference(folder: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raises UserError where the folder was prepared from another text or with other options."""
    for name in sorted(there.keys() | asked.keys()):
        if there.get(name) != asked.get(name):
            was, now = (f"{value.get(name)}"[:100] for value in (there, asked))
            raise UserError(
                f"{folder} was prepared with {name} = {was}, now wanted {now}; "
                f"choose another --name, or --force to throw it away"
            )


def remove_prepared(folder: Path) -> None:
    """Remove only what prepare() writes."""
    names = ["*_[0-9][0-9][0-9][0-9][0-9].bin*", "meta*.json*", "meta.json", "progress*.jsonl*"]
    for file in (file for name in names for file in folder.glob(name)):
        file.unlink(missing_ok=True)


def start_or_go_on(
    folder: Path, asked: dict[str, Any], options: PrepareOptions, source: Source
) -> tuple[Tokenizer, dict[str, Any], list[dict[str, Any]]]:
    """The tokenizer, its spec and the shards noted in progress.jsonl, which it begins where there is none."""
    progress = folder / "progress.jsonl"
    lines = progress.read_text(encoding="utf-8").splitlines(keepends=True) if progress.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]  # the last one may have been cut
    if options.force or len(whole) < 2:
        tokenizer = choose_tokenizer(options.tokenizer, source)  # first: where it fails, --force has removed nothing
        folder.mkdir(parents=True, exist_ok=True)
        if options.force:
            remove_prepared(folder)
        spec = tokenizer.save(folder)
        write_whole(progress, json.dumps({"prepared_with": asked, "tokenizer": spec}) + "\n")
        return tokenizer, spec, []
    start, *shards = map(json.loads, whole)
    refuse_difference(folder, start["prepared_with"], asked)
    for shard in shards:
        if not (folder / shard["file"]).is_file():
            raise UserError(
                f"{folder / shard['file']} is missing, though {progress.name} notes it; --force starts over"
            )
    write_whole(progress, "".join(whole))
    print(f"going on after {len(shards)} whole shards in {folder}")
    return load_tokenizer(folder, start["tokenizer"]), start["tokenizer"], shards


def choose_tokenizer(choice: str, source: Source) -> Tokenizer:
    """What --tokenizer names. Raises UserError where it names nothing."""
    if choice == "byte":
        return ByteTokenizer()
    if choice == "char":
        return CharTokenizer(set().union(*(piece.text for piece in source.pieces())))
    if re.fullmatch(r"bpe:\d+", choice):
        print(f"training a BPE of {choice[4:]} ids on the train split")
        return train_bpe(bpe_texts(source), int(choice[4:]))
    if choice in tiktoken.list_encoding_names():
        return tiktoken_encoding(choice)
    ours = any(Path(choice).glob("meta*.json")) or any(Path(choice).glob("progress*.jsonl"))
    if not ours and (tokenizer := read_hf(Path(choice))):
        if tokenizer.end_of_text is None:
            print(f"warning: {choice} has no config.json with an eos_token_id: documents will not be set apart")
        return tokenizer
    try:
        folder = corpus_folder(choice)
    except UserError:
        raise UserError(
            f"tokenizer is {choice!r}, wanted byte, char, bpe:SIZE, the name of a prepared corpus, "
            f"a folder with tokenizer.json, or one of tiktoken's {', '.join(sorted(tiktoken.list_encoding_names()))}"
        ) from None
    return load_tokenizer(folder, read_meta(folder)["tokenizer"])


def bpe_texts(source: Source) -> Iterator[str]:
    left = BPE_CHARACTERS
    for piece in cut_safely(source.pieces()):
        if piece.split == "train" and left > 0:
            left -= len(piece.text)
            yield piece.text
        elif left <= 0:
            return


def write_shards(
    folder: Path,
    shards: list[dict[str, Any]],
    tokenizer: Tokenizer,
    source: Source,
    options: PrepareOptions,
    train_tokens: float | None,
) -> list[dict[str, Any]]:
    """Tokenises all that the shards do not hold yet and writes more of them -> all, as progress.jsonl notes them."""
    writers: dict[str, SplitWriter] = {}
    done = Counter()  # tasks per split that whole shards hold
    for shard in shards:
        done[shard["split"]] += shard["tasks"]

    def writer(split: str) -> SplitWriter:
        if split not in writers:
            writers[split] = SplitWriter(folder, split, tokenizer, options.shard_tokens, shards)
        return writers[split]

    tasks = not_done(in_tasks(source.pieces(), cut=not isinstance(tokenizer, HFTokenizer)), done)
    threads = options.threads or os.cpu_count() or 1
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=source.total_bytes, unit="B", unit_scale=True, desc=options.name, disable=None) as bar,
    ):
        bar.update(sum(shard["bytes"] for shard in shards))
        for result in in_order(pool, lambda task: tokenize(tokenizer, task), tasks, 4 * threads):
            bar.update(result.bytes)
            writer(result.split).add(result)
            if train_tokens is not None and writer("train").tokens >= train_tokens:
                break
    for split in writers.values():
        split.close_shard()
    return shards


def in_order(pool: ThreadPoolExecutor, work: Callable, tasks: Iterable, ahead: int) -> Iterator:
    """Results in the order of the tasks. Only `ahead` tasks are in memory; Executor.map would read them all at once."""
    tasks = iter(tasks)
    pending = deque(pool.submit(work, task) for task in islice(tasks, ahead))
    while pending:
        result = pending.popleft().result()
        pending.extend(pool.submit(work, task) for task in islice(tasks, 1))
        yield result


class Tokens(NamedTuple):
    """A task, tokenised."""

    split: str
    ids: np.ndarray
    bytes: int
    documents: int


def tokenize(tokenizer: Tokenizer, task: Task) -> Tokens:
    end = [] if tokenizer.end_of_text is None else [np.array([tokenizer.end_of_text], dtype=np.uint32)]
    ids = []
    for piece in task.pieces:
        ids += [tokenizer.encode_array(piece.text), *(end if piece.ends_document else [])]
    size = sum(len(piece.text.encode("utf-8", "replace")) for piece in task.pieces)
    return Tokens(task.split, np.concatenate(ids), size, sum(piece.ends_document for piece in task.pieces))


def not_done(tasks: Iterable[Task], done: Counter) -> Iterator[Task]:
    """The tasks without the first done[split] of each split."""
    seen = Counter()
    for task in tasks:
        seen[task.split] += 1
        if seen[task.split] > done[task.split]:
            yield task


class SplitWriter:
    """The shards of one split. A file named .tmp is not whole; the next run begins it anew."""

    def __init__(
        self, folder: Path, split: str, tokenizer: Tokenizer, shard_tokens: int, shards: list[dict[str, Any]]
    ) -> None:
        """Goes on after `shards`, the whole shards of all splits, and appends to them."""
        self.folder, self.split = folder, split
        self.dtype, self.shard_tokens, self.shards = dtype_of(tokenizer), shard_tokens, shards
        before = [shard for shard in shards if shard["split"] == split]
        self.number, self.tokens = len(before), sum(shard["tokens"] for shard in before)
        self.open = None

    def add(self, result: Tokens) -> None:
        if self.open is None:
            file = f"{self.split}_{self.number:05d}.bin"
            self.shard = {"split": self.split, "file": file, "tokens": 0, "bytes": 0, "documents": 0, "tasks": 0}
            self.shard["max_token"] = 0
            self.open = open(self.folder / f"{file}.tmp", "wb")  # noqa: SIM115 (open from one call to the next)
            self.open.seek(HEADER_BYTES)
        self.open.write(np.ascontiguousarray(result.ids, dtype=np.dtype(self.dtype).newbyteorder("<")).data)
        self.shard["tokens"] += len(result.ids)
        self.shard["bytes"] += result.bytes
        self.shard["documents"] += result.documents
        self.shard["tasks"] += 1
        self.shard["max_token"] = max(self.shard["max_token"], int(result.ids.max()))
        self.tokens += len(result.ids)
        if self.shard["tokens"] >= self.shard_tokens:
            self.close_shard()

    def close_shard(self) -> None:
        """From .tmp to a whole shard, noted in progress.jsonl: first the bytes, then the name, then the note."""
        if self.open is None:
            return
        self.open.seek(0)
        self.open.write(shard_header(self.dtype, self.shard["tokens"]))
        flush_to_disk(self.open)
        self.open.close()
        path = self.folder / self.shard["file"]
        os.replace(f"{path}.tmp", path)
        self.shard["sha256"] = sha256_of(path)
        with open(self.folder / "progress.jsonl", "a", encoding="utf-8") as progress:
            progress.write(json.dumps(self.shard) + "\n")
            flush_to_disk(progress)
        self.shards.append(self.shard)
        self.number, self.open = self.number + 1, None


def dtype_of(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"


def describe(
    tokenizer: Tokenizer, spec: dict[str, Any], shards: list[dict[str, Any]], asked: dict[str, Any]
) -> dict[str, Any]:
    """meta.json"""
    return {
        "format": 1,
        "tokenizer": spec,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype_of(tokenizer),
        "end_of_text": tokenizer.end_of_text,
        "splits": splits_of(shards),
        "prepared_with": asked,
    }


def splits_of(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """The totals of each split, and its shards."""
    splits = {}
    for split in sorted({shard["split"] for shard in shards}, key=["train", "val", "test"].index):
        own = [shard for shard in shards if shard["split"] == split]
        splits[split] = {name: sum(shard[name] for shard in own) for name in ("tokens", "bytes", "documents")}
        splits[split]["max_token"] = max(shard["max_token"] for shard in own)
        splits[split]["shards"] = [{k: v for k, v in shard.items() if k not in ("split", "tasks")} for shard in own]
    return splits


def summary(meta: dict[str, Any]) -> str:
    lines = [
        f"  {split:5} {s['tokens']:15,} tokens  {s['bytes']:15,} bytes  {s['documents']:10,} documents  "
        f"{len(s['shards'])} shards"
        for split, s in meta["splits"].items()
    ]
    return "\n".join([*lines, f"  vocabulary {meta['vocab_size']:,}, stored as {meta['dtype']}"])


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, text: str) -> None:
    """The file has its old contents or the new ones, never a part."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write(text)
        flush_to_disk(file)
    os.replace(f"{path}.tmp", path)


def flush_to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
