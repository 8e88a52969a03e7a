"""Read and write token files: our shards, and those of llm.c, modded-nanogpt and nanoGPT, which train as they are.

A shard has the format of llm.c and modded-nanogpt, so these programs can read ours: 256 little-endian int32 (magic
number, version, number of tokens, zeros), then the tokens as uint16 or uint32. nanoGPT's train.bin and val.bin are
uint16 tokens without a header. Token files of another program are called foreign here.
"""

import pickle
import re
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from config import UserError
from data.tokenizers import CharTokenizer, Tokenizer, tiktoken_encoding

HEADER_BYTES = 1024
SHARD_MAGIC = {"uint16": (20240520, 1), "uint32": (20240801, 7)}  # dtype -> magic number, version
FOREIGN_NAME = re.compile(r"(?:(.+)_)?(train|val|test)(?:_\d+)?\.bin")  # fineweb_train_000001.bin, train.bin
HASHED_BYTES = 1 << 20  # at each end of a foreign file: reading all 200 MB of it would slow each start down


def shard_header(dtype: str, tokens: int) -> bytes:
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = *SHARD_MAGIC[dtype], tokens
    return header.tobytes()


def check_shard(path: Path, dtype: str, tokens: int | None = None) -> int:
    """Return the number of tokens in the header. Raise UserError if the file is missing, cut or of another kind."""
    if not path.is_file():
        raise UserError(f"{path} is missing, wanted a shard of {tokens} tokens")
    size = path.stat().st_size
    magic, version, count = [*np.fromfile(path, "<i4", 3).tolist(), 0, 0, 0][:3]
    if size >= HEADER_BYTES and (magic, version) != SHARD_MAGIC[dtype]:
        raise UserError(f"{path} starts with {magic} {version}, wanted {SHARD_MAGIC[dtype]} for a shard of {dtype}")
    wanted = HEADER_BYTES + (count if tokens is None else tokens) * np.dtype(dtype).itemsize
    if size != wanted:
        raise UserError(f"{path} has {size} bytes, wanted {wanted}; it was cut or is not of this corpus")
    if tokens not in (None, count):
        raise UserError(f"{path} has a header for {count} tokens, wanted {tokens} as in meta.json")
    return count


# --- Foreign token files -----------------------------------------------------------------------------------------


def foreign_files(folder: Path) -> list[tuple[str, Path]]:
    """Return (split, file) in the order of the names. Raise UserError if they belong to several corpora."""
    named = [(FOREIGN_NAME.fullmatch(path.name), path) for path in sorted(folder.glob("*.bin")) if path.is_file()]
    corpora = sorted({str(match[1]) for match, _ in named if match})
    if len(corpora) > 1:
        raise UserError(f"{folder} holds token files of {', '.join(corpora)}, wanted a folder for each")
    return [(match[2], path) for match, path in named if match]


def describe_foreign(folder: Path) -> dict[str, Any]:
    """Return a meta.json for foreign files. It lacks the bytes of a split, which Corpus.bytes counts when needed.

    Raise UserError if a file is cut or of another kind, or if there is no tokenizer for it.
    """
    tokenizer = guess_tokenizer(folder)
    splits: dict[str, Any] = {}
    for split, path in foreign_files(folder):
        splits.setdefault(split, {"shards": []})["shards"].append(describe_file(path))
    for split in splits.values():
        split["tokens"] = sum(shard["tokens"] for shard in split["shards"])
        split["max_token"] = max(shard["max_token"] for shard in split["shards"])
    about = {"tokenizer": tokenizer.spec(), "vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text}
    return {"format": 1, "dtype": "uint16", **about, "splits": splits}


def describe_file(path: Path) -> dict[str, Any]:
    """Return the entry of meta.json for a file of uint16 tokens, with or without a header."""
    size, header = path.stat().st_size, np.fromfile(path, "<i4", HEADER_BYTES // 4)
    # A header has zeros after its third number, and no text does: so we also recognise a header of another format.
    has_header = len(header) == HEADER_BYTES // 4 and header[:3].all() and not header[3:].any()
    if path.stem not in ("train", "val", "test") or has_header:
        if tuple(header[:2]) == SHARD_MAGIC["uint32"]:
            raise UserError(f"{path} holds tokens of Llama 3, whose tokenizer is not here; wanted GPT-2's, as uint16")
        start, tokens = HEADER_BYTES, check_shard(path, "uint16")
    elif size % 2:
        raise UserError(f"{path} has {size} bytes, an odd number; wanted uint16 tokens, two bytes each")
    else:
        start, tokens = 0, size // 2
    if tokens == 0:
        raise UserError(f"{path} holds no tokens")
    with open(path, "rb") as file:
        ends = file.read(HASHED_BYTES)
        file.seek(max(0, size - HASHED_BYTES))
        ends += file.read()
    described = {"file": path.name, "tokens": tokens, "max_token": largest_token(path, start, path.stat().st_mtime_ns)}
    return described | {"header_bytes": start, "sha256": sha256(b"%d " % size + ends).hexdigest()}


@cache
def largest_token(path: Path, start: int, modified: int) -> int:
    """Return the largest id. `modified` is part of the cache's key: a file is read again only if it has changed."""
    return int(np.memmap(path, "<u2", "r", offset=start).max())


def guess_tokenizer(folder: Path) -> Tokenizer:
    """Return the characters in nanoGPT's meta.pkl, or without that file GPT-2's tokenizer, which the others use.

    Raise UserError if meta.pkl does not hold characters.
    """
    path = folder / "meta.pkl"
    if not path.exists():
        return tiktoken_encoding("gpt2")
    try:
        with open(path, "rb") as file:
            ids = PlainUnpickler(file).load()["stoi"]
        tokenizer = CharTokenizer(ids)
        if ids != {character: i for i, character in enumerate(tokenizer.characters)}:
            raise ValueError("its ids are not in the order of the code points")
    except Exception as error:  # a damaged pickle can raise anything
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} does not name characters as nanoGPT's does, one id each ({why})") from None
    return tokenizer


class PlainUnpickler(pickle.Unpickler):
    """Read numbers, strings, lists and dicts only. Without classes and functions, a pickle cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")
