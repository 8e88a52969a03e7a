"""Large corpora from the web: streamed from the Hugging Face hub, or from local files.

    python -m data.webtext.prepare --corpus=openwebtext                        pip install datasets
    python -m data.webtext.prepare --corpus=pile --tokens=2.6e9 --name=pile    stops at 2.6 billion training tokens
    python -m data.webtext.prepare --path=my_jsonl_folder --name=mine
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from config import UserError, parse, user_errors
from data.texts import Piece, find_files, identity_of, kind_of, read_file, share_of
from data.writing import PrepareOptions, Source, prepare


class Hub(NamedTuple):
    dataset: str
    subset: str | None
    column: str


CORPORA = {
    "openwebtext": Hub("Skylion007/openwebtext", None, "text"),  # 8 million documents, 9 billion GPT-2 tokens
    "pile": Hub("monology/pile-uncopyrighted", None, "text"),  # 177 million documents; pip install zstandard, too
    "fineweb_edu": Hub("HuggingFaceFW/fineweb-edu", "sample-10BT", "text"),  # 10 billion GPT-2 tokens
}
VAL_SHARE = 0.001


@dataclass(frozen=True)
class Options(PrepareOptions):
    name: str = "webtext"
    """Folder of the result below data/, or a path."""
    corpus: Literal["openwebtext", "pile", "fineweb_edu"] = "openwebtext"
    """Which one of the hub; not used with --path."""
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
        identity = {"hub": list(CORPORA[options.corpus])}
        pieces = lambda: hub_pieces(CORPORA[options.corpus])  # noqa: E731
    else:
        files = find_files(options.path)
        identity = {**identity_of(files), "column": options.column}
        pieces = lambda: local_pieces(files, options.column)  # noqa: E731
    prepare(options, Source(pieces, identity), options.tokens)


def split_of(key: str) -> str:
    return "val" if share_of(key) < VAL_SHARE else "train"


def local_pieces(files: list[Path], column: str) -> Iterator[Piece]:
    """Yield every document: a row, or a .txt file, which comes in pieces and is split by its name."""
    for file in files:
        rows = kind_of(file) in (".jsonl", ".parquet")
        for text, ends_document in read_file(file, column):
            yield Piece(split_of(text if rows else file.name), text, ends_document)


def hub_pieces(hub: Hub) -> Iterator[Piece]:
    try:
        import datasets
    except ImportError:
        raise UserError("streaming from the hub needs: pip install datasets; or give local files: --path") from None
    try:
        for row in datasets.load_dataset(hub.dataset, hub.subset, split="train", streaming=True):
            if row[hub.column]:
                yield Piece(split_of(row[hub.column]), row[hub.column])
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot read {hub.dataset} from the hub ({type(error).__name__}); the same command continues after the "
            f"last whole shard, or give local files with --path"
        ) from None


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, description=__doc__))
