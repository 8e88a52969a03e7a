"""Prepare a large corpus from the web: streamed from the Hugging Face hub, or from local files.

python -m data.webtext.prepare --corpus=openwebtext                        pip install datasets
python -m data.webtext.prepare --corpus=pile --tokens=2.6e9 --name=pile    stops at 2.6 billion training tokens
python -m data.webtext.prepare --path=my_jsonl_folder --name=mine
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from config import parse, user_errors
from data.texts import Piece, find_files, hub_rows, identity_of, kind_of, read_file, share_of
from data.writing import PrepareOptions, Source, prepare

CORPORA = {  # dataset, subset, column
    "openwebtext": ("Skylion007/openwebtext", None, "text"),  # 8 million documents, 9 billion GPT-2 tokens
    "pile": ("monology/pile-uncopyrighted", None, "text"),  # 177 million documents; needs: pip install zstandard
    "fineweb_edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", "text"),  # 10 billion GPT-2 tokens
}
VAL_SHARE = 0.001


@dataclass(frozen=True)
class Options(PrepareOptions):
    name: str = "webtext"
    corpus: Literal["openwebtext", "pile", "fineweb_edu"] = "openwebtext"
    """Which corpus of the hub; not used with --path."""
    column: str = "text"
    """The field of a local .jsonl or .parquet row that holds its text."""
    tokens: float | None = None
    """Stop when the train split has so many; None = take everything."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens is not None and self.tokens <= 0:
            raise ValueError(f"tokens is {self.tokens}, wanted above 0")


def main(options: Options) -> None:
    if options.path is None:
        hub = CORPORA[options.corpus]
        prepare(options, Source(partial(hub_pieces, *hub), {"hub": list(hub)}), options.tokens)
    else:
        files = find_files(options.path)
        identity = {**identity_of(files), "column": options.column}
        prepare(options, Source(partial(local_pieces, files, options.column), identity), options.tokens)


def split_of(key: str) -> str:
    return "val" if share_of(key) < VAL_SHARE else "train"


def local_pieces(files: list[Path], column: str) -> Iterator[Piece]:
    """Yield every document. The hash of a row's text gives its split; of a .txt file, that of its name."""
    for file in files:
        rows = kind_of(file) in (".jsonl", ".parquet")
        for text, ends_document in read_file(file, column):
            yield Piece(split_of(text if rows else file.name), text, ends_document)


def hub_pieces(dataset: str, subset: str | None, column: str) -> Iterator[Piece]:
    texts = (row[column] for row in hub_rows(dataset, subset, "train", streaming=True))
    return (Piece(split_of(text), text) for text in texts if text)


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, description=__doc__))
