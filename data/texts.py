"""Read text from files, one piece at a time, so that a corpus is never in memory as a whole."""

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
TASK_CHARACTERS = 60_000  # with a million, memory was fragmented: 570 MB after 2 GB of text
LONGEST_WORD = 16_000_000  # characters; a document without a safe place to cut is cut after so many


class Piece(NamedTuple):
    """A document of a split, or the next part of one."""

    split: str
    text: str
    ends_document: bool = True


class Task(NamedTuple):
    """The text that one thread tokenises at once."""

    split: str
    pieces: list[Piece]


def find_files(path: str) -> list[Path]:
    """Return the one file, or the readable files of a folder in the order of their names. Print what is skipped.

    Raise UserError if there are none.
    """
    root = Path(path)
    if not root.exists():
        raise UserError(f"no file or folder {path}")
    files = sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]
    readable = [file for file in files if kind_of(file) in KINDS]
    others = [str(file.relative_to(root)) if root.is_dir() else path for file in files if file not in readable]
    listed = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
    if not readable:
        raise UserError(
            f"{path} holds no .txt, .jsonl or .parquet (each also as .gz or .xz); found {listed or 'nothing'}"
        )
    if others:
        print(f"skipped, since not .txt, .jsonl or .parquet: {listed}")
    return readable


def kind_of(file: Path) -> str:
    """Return '.txt' for both book.txt and book.txt.xz."""
    return Path(file.stem).suffix.lower() if file.suffix in (".gz", ".xz") else file.suffix.lower()


def read_file(file: Path, column: str = "text") -> Iterator[tuple[str, bool]]:
    """Yield (text, whether it ends a document). A text file is one document, a row of the other kinds is one.

    Raise UserError if the file is damaged or not UTF-8, or if a row has no text in `column`.
    """
    try:
        with {".gz": gzip.open, ".xz": lzma.open}.get(file.suffix, open)(file, "rb") as stream:
            if kind_of(file) == ".parquet":
                yield from read_parquet(file, stream, column)
            elif kind_of(file) == ".jsonl":
                yield from read_jsonl(file, stream, column)
            else:
                yield from read_text(file, stream)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file} is damaged or cut: {error}") from None


def read_text(file: Path, stream: BufferedIOBase) -> Iterator[tuple[str, bool]]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    text, done = "", 0
    try:
        while contents := stream.read(READ_BYTES):
            if text:
                yield text, False
            pending = len(decoder.getstate()[0])  # bytes of a character that the previous read has cut
            text = decoder.decode(contents)
            done += len(contents)
        pending = len(decoder.getstate()[0])
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


def read_parquet(file: Path, stream: BufferedIOBase, column: str) -> Iterator[tuple[str, bool]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("reading .parquet needs: pip install pyarrow") from None
    table = pyarrow.parquet.ParquetFile(stream)
    if column not in table.schema_arrow.names:
        fields = ", ".join(table.schema_arrow.names)
        raise UserError(f"{file} has no column {column!r}, it has {fields}; choose with --column")
    for rows in table.iter_batches(batch_size=256, columns=[column]):
        yield from ((text, True) for text in rows.column(0).to_pylist() if text)


def hub_rows(dataset: str, subset: str | None, split: str, streaming: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the rows of a dataset on the Hugging Face hub. Raise UserError without the library or the network."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"reading {dataset} from the hub needs: pip install datasets; or give local files") from None
    try:
        yield from datasets.load_dataset(dataset, subset, split=split, streaming=streaming)  # pyrefly: ignore
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot read {dataset} from the hub ({type(error).__name__}); try again, or give local files"
        ) from None


def identity_of(files: list[Path]) -> dict[str, Any]:
    """Return names and sizes: a stopped preparation continues only if they are unchanged."""
    return {"files": [[file.name, file.stat().st_size] for file in files]}


def split_of_name(name: str) -> str | None:
    """Return 'val' for valid.txt, dev.jsonl.gz or validation-0001.parquet, and None for a name without a split."""
    match = re.match(r"(wiki\.)?(train|val|valid|validation|dev|test)(?![a-z])", name.lower())
    if match is None:
        return None
    return match[2] if match[2] in ("train", "test") else "val"


def share_of(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone: a share s of all documents has numbers below s."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def cut_by_position(text: Iterable[tuple[str, bool]], train_characters: int) -> Iterator[Piece]:
    """Cut one document: its first characters are train, the rest is val."""
    left = train_characters
    for part, ends in text:
        if part[:left]:
            yield Piece("train", part[:left], ends or len(part) >= left)
        if part[left:]:
            yield Piece("val", part[left:], ends)
        left = max(0, left - len(part))


def in_tasks(pieces: Iterable[Piece], cut: bool = True) -> Iterator[Task]:
    """Group small documents of a split and, with `cut`, cut long ones to TASK_CHARACTERS."""
    waiting: dict[str, list[Piece]] = {}
    characters = Counter()
    for piece in cut_safely(pieces, TASK_CHARACTERS if cut else LONGEST_WORD):
        waiting.setdefault(piece.split, []).append(piece)
        characters[piece.split] += len(piece.text)
        if characters[piece.split] >= TASK_CHARACTERS // 2:
            yield Task(piece.split, waiting.pop(piece.split))
            characters[piece.split] = 0
    for split, rest in waiting.items():
        yield Task(split, rest)


# Places where a cut changes no token: after a line break and before a letter or digit, or before a space, if there is
# no other white space beside it. The patterns of GPT-2 and of tiktoken's other encodings start a new word there. (It
# must be a letter, since "!\n/" can be one word in o200k_base.) SentencePiece has no such place: it marks the start of
# each text that it gets.
SAFE_PLACE = re.compile(r"(?<=\S\n)(?=\w)|(?<=\S)(?= \S)")
LAST_SAFE_PLACE = re.compile(r".*\S(?:\n(?=\w)|(?= \S))", re.DOTALL)


def cut_safely(pieces: Iterable[Piece], longest: int) -> Iterator[Piece]:
    """Join the parts of each document, and cut it again at safe places if it has more characters than `longest`."""
    rest = ""
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
