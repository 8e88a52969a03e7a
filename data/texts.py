"""Text from files, a piece at a time, so that no corpus is ever in memory as a whole."""

import codecs
import gzip
import hashlib
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

from config import UserError

KINDS = (".txt", ".tokens", ".jsonl", ".parquet")
READ_BYTES = 1 << 16
TASK_CHARACTERS = 60_000  # with a million the allocator's holes grew with the corpus, to 570 MB after 2 GB of text
LONGEST_WORD = 16_000_000  # characters without a safe place after which a document is cut anyway


class Piece(NamedTuple):
    """A document of a split, or the next part of one."""

    split: str
    text: str
    ends_document: bool = True


class Task(NamedTuple):
    """What is tokenised at once."""

    split: str
    pieces: list[Piece]


def find_files(path: str) -> list[Path]:
    """The readable files of a folder in order of their names, or the one file. Says which files it leaves out.

    Raises UserError where there are none.
    """
    root = Path(path)
    if not root.exists():
        raise UserError(f"no file or folder {path}")
    files = sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]
    readable = [file for file in files if kind_of(file) in KINDS]
    others = [str(file.relative_to(root)) if root.is_dir() else str(file) for file in files if file not in readable]
    listed = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
    if not readable:
        raise UserError(
            f"{path} holds no .txt, .jsonl or .parquet (each also as .gz or .xz); found {listed or 'nothing'}"
        )
    if others:
        print(f"left out, being neither .txt nor .jsonl nor .parquet: {listed}")
    return readable


def kind_of(file: Path) -> str:
    """'.txt' of both book.txt and book.txt.xz"""
    return Path(file.stem).suffix.lower() if file.suffix in (".gz", ".xz") else file.suffix.lower()


def read_file(file: Path, column: str = "text") -> Iterator[tuple[str, bool]]:
    """(text, whether a document ends with it): one document of a text file, one of each row of the other kinds.

    Raises UserError where the file is damaged, not UTF-8, or a row has no text in `column`.
    """
    try:
        if kind_of(file) == ".parquet":
            yield from read_parquet(file, column)
            return
        with open_file(file) as stream:
            yield from read_jsonl(file, stream, column) if kind_of(file) == ".jsonl" else read_text(file, stream)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file} is damaged or cut: {error}") from None


def open_file(file: Path) -> BufferedIOBase:
    return {".gz": gzip.open, ".xz": lzma.open}.get(file.suffix, open)(file, "rb")


def read_text(file: Path, stream: BufferedIOBase) -> Iterator[tuple[str, bool]]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    text, done = "", 0
    try:
        while contents := stream.read(READ_BYTES):
            if text:
                yield text, False
            pending = len(decoder.getstate()[0])  # the bytes of a character cut by the previous read
            text = decoder.decode(contents)
            done += len(contents)
        pending, contents = len(decoder.getstate()[0]), b""
        text += decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        where = done - pending + error.start
        raise UserError(f"{file} is not UTF-8 at byte {where}; convert it with: iconv -f latin1 -t utf-8") from None
    if text:
        yield text, True


def read_jsonl(file: Path, stream: BufferedIOBase, column: str) -> Iterator[tuple[str, bool]]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}, line {number} is not JSON: {error}") from None
        text = row.get(column) if isinstance(row, dict) else None
        if not isinstance(text, str):
            fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise UserError(f"{file}, line {number} has no text in {column!r}, it has {fields}; choose with --column")
        if text:
            yield text, True


def read_parquet(file: Path, column: str) -> Iterator[tuple[str, bool]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("reading .parquet needs: pip install pyarrow") from None
    with open_file(file) as stream:
        table = pyarrow.parquet.ParquetFile(stream)
        if column not in table.schema_arrow.names:
            fields = ", ".join(table.schema_arrow.names)
            raise UserError(f"{file} has no column {column!r}, it has {fields}; choose with --column")
        for rows in table.iter_batches(batch_size=256, columns=[column]):
            for text in rows.column(0).to_pylist():
                if text:
                    yield text, True


def split_of_name(name: str) -> str | None:
    """'val' of valid.txt, dev.jsonl.gz or validation-0001.parquet; None where the name tells nothing."""
    match = re.match(r"(wiki\.)?(train|val|valid|validation|dev|test)(?![a-z])", name.lower())
    if match is None:
        return None
    return match[2] if match[2] in ("train", "test") else "val"


def share_of(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: documents below a share are that share of them."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def cut_by_position(text: Iterable[tuple[str, bool]], train_characters: int) -> Iterator[Piece]:
    """One document: its first characters are train, the rest is val."""
    left = train_characters
    for part, ends in text:
        if part[:left]:
            yield Piece("train", part[:left], ends or len(part) >= left)
        if part[left:]:
            yield Piece("val", part[left:], ends)
        left = max(0, left - len(part))


def identity_of(files: list[Path]) -> dict[str, Any]:
    """Names and sizes: a preparation that was stopped goes on only where these are the same."""
    return {"files": [[file.name, file.stat().st_size] for file in files]}


def in_tasks(pieces: Iterable[Piece], cut: bool = True) -> Iterator[Task]:
    """Small documents together and, where `cut`, long ones cut to TASK_CHARACTERS; a task is of one split."""
    waiting: dict[str, list[Piece]] = {}
    characters = Counter()
    for piece in cut_safely(pieces, cut):
        waiting.setdefault(piece.split, []).append(piece)
        characters[piece.split] += len(piece.text)
        if characters[piece.split] >= TASK_CHARACTERS // 2:
            yield Task(piece.split, waiting.pop(piece.split))
            characters[piece.split] = 0
    for split, rest in waiting.items():
        yield Task(split, rest)


# Where cutting changes no token: after a line break and before a letter or digit, or before a space, both between
# characters that are not white space. There the patterns of GPT-2 and of tiktoken's other encodings begin a new word,
# whatever comes before and after. ("!\n/" can be one word in o200k_base, so a letter it must be.) No place is safe for
# SentencePiece, which marks the beginning of what it is given.
SAFE_PLACE = re.compile(r"(?<=\S\n)(?=\w)|(?<=\S)(?= \S)")
LAST_SAFE_PLACE = re.compile(r".*\S(?:\n(?=\w)|(?= \S))", re.DOTALL)


def cut_safely(pieces: Iterable[Piece], short: bool = True) -> Iterator[Piece]:
    """Documents joined from their parts and, where longer than TASK_CHARACTERS, cut anew at safe places.

    Not short: only where longer than LONGEST_WORD.
    """
    rest, longest = "", TASK_CHARACTERS if short else LONGEST_WORD
    for split, text, ends_document in pieces:
        rest += text
        while len(rest) > longest:
            found = LAST_SAFE_PLACE.match(rest, 0, longest) or SAFE_PLACE.search(rest, longest)
            if found is None and len(rest) <= LONGEST_WORD:
                break
            cut = found.end() if found else LONGEST_WORD
            yield Piece(split, rest[:cut], False)
            rest = rest[cut:]
        if ends_document:
            yield Piece(split, rest, True)
            rest = ""
