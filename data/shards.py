"""Token files: our shards, and those of others, which train as they are.

A shard is a file as llm.c and modded-nanogpt have it, so theirs can be read here and ours there: 256 little-endian
int32 (magic, version, number of tokens, zeros), then the tokens as uint16 or uint32. nanoGPT's train.bin and val.bin
are uint16 tokens without a header.
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
SHARD_MAGIC = {"uint16": (20240520, 1), "uint32": (20240801, 7)}  # dtype -> magic, version
FOREIGN_NAME = re.compile(r"(?:(.+)_)?(train|val|test)(?:_\d+)?\.bin")  # fineweb_train_000001.bin, train.bin
HASHED_BYTES = 1 << 20  # at each end of a file of others, which may have 200 MB: a start should not read them twice


def shard_header(dtype: str, tokens: int) -> bytes:
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = *SHARD_MAGIC[dtype], tokens
    return header.tobytes()


def check_shard(path: Path, dtype: str, tokens: int | None = None) -> int:
    """The tokens that the header promises. Raises UserError: missing, not of this kind, or not of this length."""
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
        raise UserError(f"{path} says that it holds {count} tokens, wanted {tokens} as meta.json says")
    return count


# --- Folders of others -----------------------------------------------------------------------------------------------


def foreign_files(folder: Path) -> list[tuple[str, Path]]:
    """(split, file) in the order of their names. Raises UserError where they are of several corpora."""
    named = [(FOREIGN_NAME.fullmatch(path.name), path) for path in sorted(folder.glob("*.bin")) if path.is_file()]
    corpora = sorted({str(match[1]) for match, _ in named if match})
    if len(corpora) > 1:
        raise UserError(f"{folder} holds token files of {', '.join(corpora)}, wanted a folder for each")
    return [(match[2], path) for match, path in named if match]


def describe_foreign(folder: Path) -> dict[str, Any]:
    """What meta.json would say of a folder of others. The bytes of a split are not there: data.Corpus counts them.

    Raises UserError where a file is cut or of another kind, or a tokenizer cannot be had.
    """
    files = foreign_files(folder)
    tokenizer = guess_tokenizer(folder)
    splits: dict[str, Any] = {}
    for split, path in files:
        splits.setdefault(split, {"shards": []})["shards"].append(read_foreign(path))
    for split in splits.values():
        split["tokens"] = sum(shard["tokens"] for shard in split["shards"])
        split["max_token"] = max(shard["max_token"] for shard in split["shards"])
    about = {"tokenizer": tokenizer.spec(), "vocab_size": tokenizer.vocab_size, "end_of_text": tokenizer.end_of_text}
    return {"format": 1, "dtype": "uint16", **about, "splits": splits}


def read_foreign(path: Path) -> dict[str, Any]:
    """A file of uint16 tokens, with a header or without, as meta.json describes a shard."""
    size, header = path.stat().st_size, np.fromfile(path, "<i4", HEADER_BYTES // 4)
    # No text of 512 tokens has zeros from the seventh on, so a header of another kind is told from tokens.
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
def largest_token(path: Path, start: int, changed: int) -> int:
    """`changed`, the time of the file, is there so that a file is read once, and again where it was rewritten."""
    return int(np.memmap(path, "<u2", "r", offset=start).max())


def guess_tokenizer(folder: Path) -> Tokenizer:
    """GPT-2's, which others use without saying so; or the characters that nanoGPT's meta.pkl names.

    Raises UserError where meta.pkl names no characters: its tokens are then none of GPT-2's either.
    """
    path = folder / "meta.pkl"
    if not path.exists():
        return tiktoken_encoding("gpt2")
    try:
        with open(path, "rb") as file:
            ids = PlainValues(file).load()["stoi"]
        tokenizer = CharTokenizer(ids)
        if ids != {character: i for i, character in enumerate(tokenizer.characters)}:
            raise ValueError("its ids are not in the order of the code points")
    except Exception as error:  # a pickle that was cut or made by hand raises anything
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} does not name characters as nanoGPT's does, one id each ({why})") from None
    return tokenizer


class PlainValues(pickle.Unpickler):
    """Reads numbers, texts, lists and dicts alone: no class or function is looked up, so a pickle can run no code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")
