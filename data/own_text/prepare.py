"""Prepare your own text: a file or a folder of .txt, .jsonl or .parquet, each also as .gz or .xz.

    python -m data.own_text.prepare --path=my_books --name=books
    python -m data.own_text.prepare --path=my.jsonl --column=content --tokenizer=bpe:8000 --name=mine

A .txt file is one document; of the other kinds, each row is one. If there are files named train* and val* (or valid*,
dev*), their names decide: test* is a third split, and all others are train. Otherwise val is a share of the documents,
chosen by a hash of the text, or for .txt of the file name; fewer than ten .txt files are each cut by position instead.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from config import UserError, parse, user_errors
from data.texts import Piece, cut_by_position, find_files, identity_of, kind_of, read_file, share_of, split_of_name
from data.writing import PrepareOptions, Source, prepare

FEW_TEXTS = 10


@dataclass(frozen=True)
class Options(PrepareOptions):
    name: str = "own_text"
    column: str = "text"
    """The field of a .jsonl or .parquet row that holds its text."""
    val_share: float = 0.1
    """The share of the documents that is val, if file names do not say it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.val_share < 1:
            raise ValueError(f"val_share is {self.val_share}, wanted above 0 and below 1")


def main(options: Options) -> None:
    if options.path is None:
        raise UserError("path is not given, wanted --path=FILE_OR_FOLDER with your text")
    files = find_files(options.path)
    identity = {**identity_of(files), "column": options.column, "val_share": options.val_share}
    plain = all(file.suffix == ".txt" for file in files)
    total = sum(file.stat().st_size for file in files) if plain else None
    prepare(options, Source(lambda: with_both_splits(pieces(files, options)), identity, total))


def with_both_splits(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """Yield the pieces. Raise UserError at their end if none was train, or none was val."""
    missing = {"train", "val"}
    for piece in pieces:
        missing.discard(piece.split)
        yield piece
    if missing:
        raise UserError(
            f"the text gives no {' and no '.join(sorted(missing))} split: add documents, raise --val_share, or name a"
            " file for it, such as val.txt"
        )


def pieces(files: list[Path], options: Options) -> Iterator[Piece]:
    splits = [split_of_name(file.name) for file in files]
    if {"train", "val"} <= set(splits):
        for file, split in zip(files, splits):
            for text, ends_document in read_file(file, options.column):
                yield Piece(split or "train", text, ends_document)
        return
    texts = [file for file in files if kind_of(file) in (".txt", ".tokens")]
    val_texts = sorted(texts, key=lambda file: share_of(file.name))[: max(1, round(options.val_share * len(texts)))]
    for file in files:
        if file not in texts:
            for text, _ in read_file(file, options.column):
                yield Piece("val" if share_of(text) < options.val_share else "train", text)
        elif len(texts) < FEW_TEXTS:
            characters = sum(len(text) for text, _ in read_file(file))
            yield from cut_by_position(read_file(file), int((1 - options.val_share) * characters))
        else:
            for text, ends_document in read_file(file):
                yield Piece("val" if file in val_texts else "train", text, ends_document)


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, description=__doc__))
