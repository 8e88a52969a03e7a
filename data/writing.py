"""Tokenise text and write shards: what every `python -m data.NAME.prepare` does with its text.

Threads tokenise: tiktoken releases Python's lock, so they use every core and share one memory. One writer puts the
results into shards in the order of the text. When a shard is full, it is flushed to the disk, renamed and noted in
progress.jsonl. A run that was killed continues after the last of these shards, and ends with the same bytes.
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
from data import DATA, corpus_folder, read_meta, tokenizers
from data.shards import HEADER_BYTES, shard_header
from data.texts import TASK_CHARACTERS, Piece, Task, cut_safely, in_tasks
from data.tokenizers import HFTokenizer, Tokenizer, load_tokenizer

BPE_CHARACTERS = 1_000_000_000  # a BPE is trained on so much text at most; more would change little


@dataclass(frozen=True)
class PrepareOptions:
    """The options of every prepare script, which adds its own and changes the defaults."""

    name: str
    """Folder of the result in data/, or a path."""
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
    """Remove what the folder holds already, and start again."""

    def __post_init__(self) -> None:
        for name in ("threads", "shard_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, wanted 1 or more")


@dataclass(frozen=True)
class Source:
    """The text of a corpus."""

    pieces: Callable[[], Iterable[Piece]]
    """Yield all text from the start, always in the same order; the parts of a document follow each other."""
    identity: dict[str, Any]
    """What must be unchanged when a stopped preparation continues."""
    total_bytes: int | None = None
    """For the progress bar; None = not known."""


def prepare(options: PrepareOptions, source: Source, train_tokens: float | None = None) -> None:
    """Write the shards and meta.json of a corpus, or print that they exist already.

    With train_tokens, stop when the train split has so many; without, at the end of the text. Raise UserError if the
    folder holds something else, if the text or the tokenizer cannot be read, or if the disk is full.
    """
    folder = DATA / options.name
    asked = {"tokenizer": options.tokenizer, "shard_tokens": options.shard_tokens, "train_tokens": train_tokens}
    asked |= source.identity
    if not options.force and (meta := prepared_meta(folder, asked)):
        print(f"{options.name} is prepared already:\n{summary(meta)}")
        return
    try:
        tokenizer, spec, shards = start_or_continue(folder, asked, options, source)
        write_shards(folder, shards, tokenizer, source, options, train_tokens)
    except KeyboardInterrupt:
        raise UserError("stopped; the same command continues after the last whole shard") from None
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; the same command continues") from None
    about = {"vocab_size": tokenizer.vocab_size, "dtype": dtype_of(tokenizer), "end_of_text": tokenizer.end_of_text}
    meta = {"format": 1, "tokenizer": spec, **about, "splits": splits_of(shards), "prepared_with": asked}
    write_whole(folder / "meta.json", json.dumps(meta, indent=1, ensure_ascii=False))
    (folder / "progress.jsonl").unlink()
    print(f"{options.name} is prepared:\n{summary(meta)}")


def prepared_meta(folder: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Return meta.json if the folder holds what is asked for, None if it is not prepared, else raise UserError."""
    if not (folder / "meta.json").is_file():
        return None
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    refuse_difference(folder, meta.get("prepared_with", {}), asked)
    for shard in (shard for split in meta["splits"].values() for shard in split["shards"]):
        path = folder / shard["file"]
        if not path.is_file() or sha256_of(path) != shard["sha256"]:
            state = "is damaged" if path.is_file() else "is missing"
            raise UserError(f"{path} {state}, wanted sha256 {shard['sha256'][:16]}...; --force prepares all again")
    return meta


def refuse_difference(folder: Path, before: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise UserError if the folder was prepared from another text or with other options."""
    for name in sorted(before.keys() | asked.keys()):
        if before.get(name) != asked.get(name):
            was, now = (str(value.get(name))[:100] for value in (before, asked))
            advice = "choose another --name, or --force to remove it"
            raise UserError(f"{folder} was prepared with {name} = {was}, now wanted {now}; {advice}")


def start_or_continue(
    folder: Path, asked: dict[str, Any], options: PrepareOptions, source: Source
) -> tuple[Tokenizer, dict[str, Any], list[dict[str, Any]]]:
    """Return the tokenizer, its spec, and the shards that progress.jsonl notes; start that file if it is not there."""
    progress = folder / "progress.jsonl"
    lines = progress.read_text(encoding="utf-8").splitlines(keepends=True) if progress.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]  # a kill may have cut the last one
    if options.force or len(whole) < 2:
        tokenizer = choose_tokenizer(options.tokenizer, source)  # first: if it fails, --force has removed nothing
        folder.mkdir(parents=True, exist_ok=True)
        if options.force:  # only what prepare() writes
            for pattern in ("*_[0-9][0-9][0-9][0-9][0-9].bin*", "meta.json*", "progress.jsonl*"):
                for file in folder.glob(pattern):
                    file.unlink()
        spec = tokenizer.save(folder)
        write_whole(progress, json.dumps({"prepared_with": asked, "tokenizer": spec}) + "\n")
        return tokenizer, spec, []
    start, *shards = map(json.loads, whole)
    refuse_difference(folder, start["prepared_with"], asked)
    for shard in shards:
        if not (folder / shard["file"]).is_file():
            raise UserError(f"{folder / shard['file']} is missing, but {progress.name} notes it; --force starts again")
    write_whole(progress, "".join(whole))
    print(f"continuing after {len(shards)} whole shards in {folder}")
    return load_tokenizer(folder, start["tokenizer"]), start["tokenizer"], shards


def choose_tokenizer(choice: str, source: Source) -> Tokenizer:
    """Return the tokenizer that --tokenizer names. Raise UserError if there is none of that name."""
    if choice == "byte":
        return tokenizers.ByteTokenizer()
    if choice == "char":
        return tokenizers.CharTokenizer(set().union(*(piece.text for piece in source.pieces())))
    if re.fullmatch(r"bpe:\d+", choice):
        print(f"training a BPE of {choice[4:]} ids on the train split")
        return tokenizers.train_bpe(bpe_texts(source), int(choice[4:]))
    if choice in tiktoken.list_encoding_names():
        return tokenizers.tiktoken_encoding(choice)
    ours = any((Path(choice) / name).is_file() for name in ("meta.json", "progress.jsonl"))
    if not ours and (tokenizer := tokenizers.read_hf(Path(choice))):
        if tokenizer.end_of_text is None:
            print(f"warning: {choice} has no config.json with an eos_token_id: nothing will separate documents")
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
    for piece in cut_safely(source.pieces(), TASK_CHARACTERS):
        if left <= 0:
            return
        if piece.split == "train":
            left -= len(piece.text)
            yield piece.text


def write_shards(
    folder: Path,
    shards: list[dict[str, Any]],
    tokenizer: Tokenizer,
    source: Source,
    options: PrepareOptions,
    train_tokens: float | None,
) -> None:
    """Tokenise what `shards` do not hold yet, write it, and append the new shards to them."""
    writers: dict[str, SplitWriter] = {}
    tasks = in_tasks(source.pieces(), cut=not isinstance(tokenizer, HFTokenizer))
    tasks = skip_done(tasks, shards, train_tokens)
    threads = options.threads or os.cpu_count() or 1
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=source.total_bytes, unit="B", unit_scale=True, desc=options.name, disable=None) as bar,
    ):
        bar.update(sum(shard["bytes"] for shard in shards))
        for result in in_order(pool, lambda task: tokenize(tokenizer, task), tasks, 4 * threads):
            bar.update(result.bytes)
            if result.split not in writers:
                dtype = dtype_of(tokenizer)
                writers[result.split] = SplitWriter(folder, result.split, dtype, options.shard_tokens, shards)
            writers[result.split].add(result)
            if train_tokens is not None and result.split == "train" and writers["train"].tokens >= train_tokens:
                break
    for writer in writers.values():
        writer.close_shard()


def skip_done(tasks: Iterable[Task], shards: list[dict[str, Any]], train_tokens: float | None) -> Iterator[Task]:
    """Yield the tasks that the shards do not hold; after the last task of a full train split, nothing."""
    left = Counter()
    for shard in shards:
        left[shard["split"]] += shard["tasks"]
    full = train_tokens is not None and tokens_of(shards, "train") >= train_tokens
    for task in tasks:
        left[task.split] -= 1
        if left[task.split] < 0:
            yield task
        if full and task.split == "train" and left["train"] == 0:
            return


def in_order(pool: ThreadPoolExecutor, work: Callable, tasks: Iterable, ahead: int) -> Iterator:
    """Yield results in the order of the tasks, with `ahead` tasks in memory. Executor.map would read all tasks."""
    tasks = iter(tasks)
    pending = deque(pool.submit(work, task) for task in islice(tasks, ahead))
    while pending:
        result = pending.popleft().result()
        pending.extend(pool.submit(work, task) for task in islice(tasks, 1))
        yield result


class Tokens(NamedTuple):
    """A task after tokenising."""

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


class SplitWriter:
    """Write the shards of one split. A file that ends in .tmp is not whole, and the next run starts it again."""

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int, shards: list[dict[str, Any]]) -> None:
        """Continue after `shards`, the whole shards of all splits, and append to them."""
        self.folder, self.split, self.dtype = folder, split, dtype
        self.shard_tokens, self.shards = shard_tokens, shards
        self.number = sum(shard["split"] == split for shard in shards)
        self.tokens = tokens_of(shards, split)
        self.open = None

    def add(self, result: Tokens) -> None:
        if self.open is None:
            counts = dict.fromkeys(("tokens", "bytes", "documents", "tasks", "max_token"), 0)
            self.shard: dict[str, Any] = {"split": self.split, "file": f"{self.split}_{self.number:05d}.bin", **counts}
            self.open = open(self.folder / f"{self.shard['file']}.tmp", "wb")  # noqa: SIM115 (stays open)
            self.open.seek(HEADER_BYTES)
        self.open.write(np.ascontiguousarray(result.ids, dtype=np.dtype(self.dtype).newbyteorder("<")).data)
        self.tokens += len(result.ids)
        added = dict(tokens=len(result.ids), bytes=result.bytes, documents=result.documents, tasks=1)
        self.shard |= {name: self.shard[name] + count for name, count in added.items()}
        self.shard["max_token"] = max(self.shard["max_token"], int(result.ids.max()))
        if self.shard["tokens"] >= self.shard_tokens:
            self.close_shard()

    def close_shard(self) -> None:
        """Make a whole shard of the .tmp file and note it: the bytes first, then the name, then progress.jsonl."""
        if self.open is None:
            return
        self.open.seek(0)
        self.open.write(shard_header(self.dtype, self.shard["tokens"]))
        self.open.close()
        path = self.folder / self.shard["file"]
        sync(Path(f"{path}.tmp"))
        os.replace(f"{path}.tmp", path)
        self.shard["sha256"] = sha256_of(path)
        with open(self.folder / "progress.jsonl", "a", encoding="utf-8") as progress:
            progress.write(json.dumps(self.shard) + "\n")
        sync(self.folder / "progress.jsonl")
        self.shards.append(self.shard)
        self.number, self.open = self.number + 1, None


def dtype_of(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"


def tokens_of(shards: list[dict[str, Any]], split: str) -> int:
    return sum(shard["tokens"] for shard in shards if shard["split"] == split)


def splits_of(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the "splits" of meta.json: the totals of each split, and its shards."""
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
    """Replace the file at once: a kill leaves the old contents or the new ones, never a part."""
    partial = Path(f"{path}.tmp")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's list of names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
