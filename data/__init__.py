"""Corpora: token shards on disk, the batches of a training step, the fixed windows of an evaluation.

A corpus is a folder with {train,val,test}_00000.bin, ... and meta.json, written by `python -m data.NAME.prepare`.
A folder of llm.c, modded-nanogpt or nanoGPT has no meta.json and is a corpus too; data/shards.py says how it is read.

Letters: N tokens of a split, T block_size, B batch_size.
"""

import json
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import UserError
from data.shards import HEADER_BYTES, SHARD_MAGIC, check_shard, describe_foreign, foreign_files
from data.tokenizers import load_tokenizer

DATA = Path(__file__).parent
CHUNK = 1 << 20  # tokens whose bytes are counted at a time


@dataclass(frozen=True)
class Corpus:
    """One split of a corpus. Nothing is loaded or kept open: each window reads its own bytes from the shards."""

    folder: Path
    split: str
    meta: dict[str, Any]
    """The whole of meta.json; its "tokenizer" is what data.tokenizers.load_tokenizer takes."""

    @property
    def tokens(self) -> int:
        return self.meta["splits"][self.split]["tokens"]

    @cached_property
    def bytes(self) -> int:
        """UTF-8 bytes of the text behind the tokens, for bits per byte; in files of others they are counted."""
        if "bytes" in self.meta["splits"][self.split]:
            return self.meta["splits"][self.split]["bytes"]
        tokenizer = load_tokenizer(self.folder, self.meta["tokenizer"])
        lengths = np.array([len(tokenizer.decode_bytes(token)) for token in range(tokenizer.vocab_size)])
        if tokenizer.end_of_text is not None:
            lengths[tokenizer.end_of_text] = 0
        chunks = range(0, self.tokens, CHUNK)
        return sum(int(lengths[self.window(start, min(CHUNK, self.tokens - start))].sum()) for start in chunks)

    @property
    def max_token(self) -> int:
        """The largest id that occurs."""
        return self.meta["splits"][self.split]["max_token"]

    @property
    def vocab_size(self) -> int:
        return self.meta["vocab_size"]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with any token, in files of others with any near an end of a file.

        A resumed run recognises its data by them.
        """
        hashes = [shard["sha256"] for shard in self.meta["splits"][self.split]["shards"]]
        return sha256(" ".join(hashes).encode()).hexdigest()[:16]

    @cached_property
    def shard_ends(self) -> list[int]:
        """Where each shard ends, in tokens from the start of the split."""
        return np.cumsum([s["tokens"] for s in self.meta["splits"][self.split]["shards"]]).tolist()

    def window(self, start: int, length: int) -> np.ndarray:
        """Tokens start, start + 1, ... of the split as int64 (length,); after the last token comes the first.

        A read takes half the time of opening a memory map anew, and a map that stays open makes the process grow by
        every page it has touched (nanoGPT issue 287). Raises UserError where a shard was cut meanwhile, or holds a
        token beyond the vocabulary.
        """
        dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        parts = [np.empty(0, dtype=dtype)]
        while length > 0:
            start %= self.tokens
            shard = bisect_right(self.shard_ends, start)
            first = start - (self.shard_ends[shard - 1] if shard else 0)
            count = min(length, self.shard_ends[shard] - start)
            described = self.meta["splits"][self.split]["shards"][shard]
            path, header_bytes = self.folder / described["file"], described.get("header_bytes", HEADER_BYTES)
            part = np.fromfile(path, dtype, count, offset=header_bytes + first * dtype.itemsize)
            if len(part) < count:
                raise UserError(f"{path} ends after {first + len(part)} tokens, wanted {first + count} or more")
            if part.max() >= self.vocab_size:
                raise UserError(f"{path} holds token {part.max()}, wanted below vocab_size = {self.vocab_size}")
            parts.append(part)
            start, length = start + count, length - count
        return np.concatenate(parts).astype(np.int64)


def open_corpus(dataset: str, split: str) -> Corpus:
    """The split of a corpus below data/, or of any folder that holds meta.json or token files of others.

    All is checked here but the tokens of our own shards, whose largest one meta.json tells.

    Raises UserError: no such corpus (with the command that prepares it) or split, a shard missing, cut or foreign.
    """
    folder = corpus_folder(dataset)
    meta = read_meta(folder)
    if split not in meta["splits"]:
        raise UserError(f"corpus {dataset} has no split {split!r}; it has {', '.join(meta['splits'])}")
    corpus = Corpus(folder, split, meta)
    for shard in meta["splits"][split]["shards"]:
        if "header_bytes" not in shard:  # those of others were checked when they were described
            check_shard(folder / shard["file"], meta["dtype"], shard["tokens"])
    if corpus.max_token >= corpus.vocab_size:
        raise UserError(f"{folder} holds token {corpus.max_token}, wanted below vocab_size = {corpus.vocab_size}")
    return corpus


def corpus_folder(dataset: str) -> Path:
    """Where the corpus is. Names below data/ come first, whatever the working directory."""
    places = (DATA / dataset, Path(dataset))
    for folder in places:
        if (folder / "meta.json").is_file():
            return folder
    if any(any(folder.glob(note)) for folder in places for note in ("progress*.jsonl", "meta_*.json")):
        raise UserError(f"corpus {dataset} is not finished; run the command that prepares it again, it goes on")
    if (DATA / dataset / "prepare.py").is_file():
        raise UserError(f"corpus {dataset} is not prepared; run: python -m data.{dataset}.prepare")
    for folder in places:
        if foreign_files(folder):
            return folder
    ready = ", ".join(sorted(script.parent.name for script in DATA.glob("*/prepare.py")))
    raise UserError(
        f"no corpus {dataset} below {DATA.name}/, no {Path(dataset) / 'meta.json'} and no train.bin; prepare your "
        f"own text with: python -m data.own_text.prepare --path=TEXT --name={Path(dataset).name}, or one of {ready}"
    )


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json, or what it would say of files of others. Raises UserError where it is not one of ours."""
    if not (folder / "meta.json").is_file():
        return describe_foreign(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        ours = is_ours(meta)
    except (ValueError, KeyError, TypeError, AttributeError):
        ours = False
    if not ours:
        raise UserError(f"{folder / 'meta.json'} is not the description of a corpus of format 1; prepare it again")
    return meta


def is_ours(meta: Any) -> bool:
    """Whether what is read of a meta.json is there, of the right kind, and adds up; may raise where it is not."""
    counts = [meta["vocab_size"]]
    for split in meta["splits"].values():
        shards = split["shards"]
        counts += [split["tokens"], split["bytes"], 1 + split["max_token"], *(shard["tokens"] for shard in shards)]
        if split["tokens"] != sum(shard["tokens"] for shard in shards):
            return False
        if not all(isinstance(shard[name], str) for shard in shards for name in ("file", "sha256")):
            return False
    if not all(type(count) is int and count > 0 for count in counts) or meta["dtype"] not in SHARD_MAGIC:
        return False
    fits = meta["vocab_size"] <= 256 ** np.dtype(meta["dtype"]).itemsize
    return fits and meta["format"] == 1 and isinstance(meta["tokenizer"], dict)


def batch(
    corpus: Corpus,
    block_size: int,
    batch_size: int,
    seed: int,
    step: int,
    micro_step: int = 0,
    micro_steps: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one micro-step on one rank, int64 (B, T) each. A pure function: there is no state to save.

    Samples are numbered over the whole run, and a step holds the same ones however many ranks share it.
    Raises UserError where the corpus is shorter than a block.
    """
    first = (step * micro_steps + micro_step) * world_size * batch_size + rank * batch_size
    starts = [sample_start(corpus.tokens, block_size, seed, first + b) for b in range(batch_size)]
    return windows_at(corpus, block_size, starts)


def sample_start(tokens: int, block_size: int, seed: int, sample: int) -> int:
    """Where sample number 0, 1, 2, ... begins in a split of N = `tokens`.

    An epoch has N // T windows, laid end to end from a start of its own and taken in an order of its own. A window
    reads one token more than T, the target of its last position, so that every token is a target once an epoch,
    but for a rest shorter than T that is another one in each epoch.
    """
    windows = max(1, tokens // block_size)
    epoch, i = divmod(sample, windows)
    key = f"{seed}/{epoch}".encode()
    offset = int.from_bytes(blake2b(b"offset", key=key, digest_size=8).digest(), "little") % block_size
    return (offset + permuted(i, windows, key) * block_size) % tokens


def permuted(i: int, n: int, key: bytes) -> int:
    """Where a keyed permutation of 0 ... n - 1 takes i.

    A Feistel network permutes the next power of four; what falls outside is sent through again. It needs no table of
    n entries, and a hash is the same in every version of every library, which random generators do not promise.
    """
    half = (max(n - 1, 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for turn in range(6):
            digest = blake2b(b"%d %d" % (turn, right), key=key, digest_size=8).digest()
            left, right = right, left ^ int.from_bytes(digest, "little") & mask
        i = left << half | right
        if i < n:
            return i


def eval_windows(corpus: Corpus, block_size: int, tokens: int | None = None) -> np.ndarray:
    """Numbers of the windows that an evaluation reads: the same ones for every model, step and world size.

    The split holds (N - 1) // T disjoint windows. With `tokens`, tokens // T of them (at least one), evenly spread.
    A rank takes eval_windows(...)[rank::world_size]. Raises UserError where the corpus is shorter than a block.
    """
    require_block(corpus, block_size)
    windows = (corpus.tokens - 1) // block_size
    count = windows if tokens is None else min(windows, max(1, tokens // block_size))
    return np.arange(count) * windows // count


def eval_batch(corpus: Corpus, block_size: int, windows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Inputs and targets of those windows, int64 (len(windows), T) each."""
    return windows_at(corpus, block_size, [int(window) * block_size for window in windows])


def windows_at(corpus: Corpus, block_size: int, starts: list[int]) -> tuple[Tensor, Tensor]:
    require_block(corpus, block_size)
    tokens = np.empty((len(starts), block_size + 1), dtype=np.int64)
    for row, start in zip(tokens, starts):
        row[:] = corpus.window(start, block_size + 1)
    return torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(tokens[:, 1:].copy())


def require_block(corpus: Corpus, block_size: int) -> None:
    if corpus.tokens < block_size + 1:
        raise UserError(
            f"the {corpus.split} split of {corpus.folder} has {corpus.tokens} tokens, shorter than a block: "
            f"wanted block_size + 1 = {block_size + 1} or more"
        )
