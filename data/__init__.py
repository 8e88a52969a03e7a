"""Read corpora: token shards on disk, the batches of a training step, the windows of an evaluation.

A corpus is a folder with meta.json and {train,val,test}_00000.bin, ..., written by `python -m data.NAME.prepare`.
Folders of llm.c, modded-nanogpt and nanoGPT have no meta.json; data/shards.py describes them in the same form.

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
CHUNK = 1 << 20  # tokens whose bytes are counted at once


@dataclass(frozen=True)
class Corpus:
    """One split of a corpus. It keeps nothing in memory and no file open: each window is read from the shards."""

    folder: Path
    split: str
    meta: dict[str, Any]
    """The contents of meta.json; load_tokenizer of data/tokenizers.py takes its "tokenizer"."""

    @property
    def tokens(self) -> int:
        return self.meta["splits"][self.split]["tokens"]

    @cached_property
    def bytes(self) -> int:
        """Return the UTF-8 bytes of the text, for bits per byte. Without meta.json they are counted here."""
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
        """Return the largest id in the split."""
        return self.meta["splits"][self.split]["max_token"]

    @property
    def vocab_size(self) -> int:
        return self.meta["vocab_size"]

    @cached_property
    def fingerprint(self) -> str:
        """Return 16 hex digits that differ for other data, by which a resumed run recognises its corpus.

        Any changed token changes them. Without meta.json, only the two ends of each file are hashed.
        """
        hashes = [shard["sha256"] for shard in self.meta["splits"][self.split]["shards"]]
        return sha256(" ".join(hashes).encode()).hexdigest()[:16]

    @cached_property
    def shard_ends(self) -> list[int]:
        """Return where each shard ends, in tokens from the start of the split."""
        return np.cumsum([s["tokens"] for s in self.meta["splits"][self.split]["shards"]]).tolist()

    def window(self, start: int, length: int) -> np.ndarray:
        """Return tokens start, start + 1, ... of the split as int64 (length,); the first follows the last.

        Reading is twice as fast as opening a memory map each time, and a map that stays open makes the process grow
        by every page that it has touched (nanoGPT issue 287). Raise UserError if a shard was cut after it was opened,
        or holds a token beyond the vocabulary.
        """
        dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        parts = [np.empty(0, dtype=dtype)]
        while length > 0:
            start %= self.tokens
            number = bisect_right(self.shard_ends, start)
            first = start - (self.shard_ends[number - 1] if number else 0)
            count = min(length, self.shard_ends[number] - start)
            shard = self.meta["splits"][self.split]["shards"][number]
            path, header_bytes = self.folder / shard["file"], shard.get("header_bytes", HEADER_BYTES)
            part = np.fromfile(path, dtype, count, offset=header_bytes + first * dtype.itemsize)
            if len(part) < count:
                raise UserError(f"{path} ends after {first + len(part)} tokens, wanted {first + count} or more")
            if part.max() >= self.vocab_size:
                raise UserError(f"{path} holds token {part.max()}, wanted below vocab_size = {self.vocab_size}")
            parts.append(part)
            start, length = start + count, length - count
        return np.concatenate(parts).astype(np.int64)


def open_corpus(dataset: str, split: str) -> Corpus:
    """Return a split of a corpus in data/, or of any folder with meta.json or with token files of another program.

    Raise UserError if there is no such corpus or split, or if a shard is missing, cut or of another format. The tokens
    of our own shards are not read: meta.json holds the largest one.
    """
    folder = corpus_folder(dataset)
    meta = read_meta(folder)
    if split not in meta["splits"]:
        raise UserError(f"corpus {dataset} has no split {split!r}; it has {', '.join(meta['splits'])}")
    corpus = Corpus(folder, split, meta)
    for shard in meta["splits"][split]["shards"]:
        if "header_bytes" not in shard:  # describe_foreign has checked the others
            check_shard(folder / shard["file"], meta["dtype"], shard["tokens"])
    if corpus.max_token >= corpus.vocab_size:
        raise UserError(f"{folder} holds token {corpus.max_token}, wanted below vocab_size = {corpus.vocab_size}")
    return corpus


def corpus_folder(dataset: str) -> Path:
    """Return the folder of a corpus. A name in data/ comes first, whatever the working directory."""
    places = (DATA / dataset, Path(dataset))
    for folder in places:
        if (folder / "meta.json").is_file():
            return folder
    if any((folder / "progress.jsonl").is_file() for folder in places):
        raise UserError(f"corpus {dataset} is not finished; run its prepare command again, and it continues")
    if (DATA / dataset / "prepare.py").is_file():
        raise UserError(f"corpus {dataset} is not prepared; run: python -m data.{dataset}.prepare")
    for folder in places:
        if foreign_files(folder):
            return folder
    ready = ", ".join(sorted(script.parent.name for script in DATA.glob("*/prepare.py")))
    raise UserError(
        f"no corpus {dataset} in {DATA.name}/, no {Path(dataset) / 'meta.json'} and no train.bin; prepare your "
        f"own text with: python -m data.own_text.prepare --path=TEXT --name={Path(dataset).name}, or one of {ready}"
    )


def read_meta(folder: Path) -> dict[str, Any]:
    """Return meta.json, or the same for token files of another program. Raise UserError if it is not valid."""
    if not (folder / "meta.json").is_file():
        return describe_foreign(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        valid = is_valid(meta)
    except (ValueError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise UserError(f"{folder / 'meta.json'} is not the description of a corpus of format 1; prepare it again")
    return meta


def is_valid(meta: Any) -> bool:
    """Say whether a meta.json has all that is read from it and adds up; may raise if it has not."""
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
    """Return inputs and targets of one micro-step in one process, int64 (B, T) each.

    This is a pure function, so a resumed run needs no state of a loader. Samples are numbered over the whole run, and
    a step reads the same ones for any number of processes. Raise UserError if the corpus is shorter than a block.
    """
    first = (step * micro_steps + micro_step) * world_size * batch_size + rank * batch_size
    starts = [sample_start(corpus.tokens, block_size, seed, first + b) for b in range(batch_size)]
    return windows_at(corpus, block_size, starts)


def sample_start(tokens: int, block_size: int, seed: int, sample: int) -> int:
    """Return where sample 0, 1, 2, ... of the run starts in a split of N = `tokens`.

    An epoch has N // T windows without gaps. Each epoch shifts their borders and shuffles their order anew. A window
    reads T + 1 tokens, since its last position needs a target. So every token is a target once per epoch, except for
    a rest shorter than T, which is another one in each epoch.
    """
    windows = max(1, tokens // block_size)
    epoch, i = divmod(sample, windows)
    key = f"{seed}/{epoch}".encode()
    offset = int.from_bytes(blake2b(b"offset", key=key, digest_size=8).digest(), "little") % block_size
    return (offset + permuted(i, windows, key) * block_size) % tokens


def permuted(i: int, n: int, key: bytes) -> int:
    """Return the image of i under a permutation of 0 ... n - 1 that depends on the key.

    A Feistel network permutes the next power of four, and is applied again while the result is not below n. It needs
    no table of n entries, and a hash is the same in every version of every library. A random generator may change.
    """
    half = (max(n - 1, 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for number in range(6):
            digest = blake2b(b"%d %d" % (number, right), key=key, digest_size=8).digest()
            left, right = right, left ^ int.from_bytes(digest, "little") & mask
        i = left << half | right
        if i < n:
            return i


def eval_windows(corpus: Corpus, block_size: int, tokens: int | None = None) -> np.ndarray:
    """Return the numbers of the windows that an evaluation reads, the same for every model and step.

    The split has (N - 1) // T windows that do not overlap. With `tokens`, return tokens // T of them (at least one)
    at equal distances. A process takes eval_windows(...)[rank::world_size].
    """
    require_block(corpus, block_size)
    windows = (corpus.tokens - 1) // block_size
    count = windows if tokens is None else min(windows, max(1, tokens // block_size))
    return np.arange(count) * windows // count


def eval_batch(corpus: Corpus, block_size: int, windows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return inputs and targets of these windows, int64 (len(windows), T) each."""
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
