"""Large corpora from the web: streamed from the Hugging Face hub, or from local files.

    python -m data.webtext.prepare --corpus=openwebtext                        pip install datasets
    python -m data.webtext.prepare --corpus=pile --tokens=2.6e9 --name=pile    stops at 2.6 billion training tokens
    python -m data.webtext.prepare --path=my_jsonl_folder --name=mine

Several machines can share the work: run `--part=1/16` on one, `--part=2/16` on the next, and so on, with the same other
options. Each writes shards of its own and meta_01of16.json. Whichever run finds all parts in its folder writes
meta.json; where folders are copied together afterwards, running any part again does it.

About 0.1 % of the documents are held out, chosen by a hash of their text: copies of a text are in the same split.
A run that was stopped reads the stream again from its start, but tokenises and writes only what is missing.
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from config import UserError, parse, user_errors
from data import DATA
from data.texts import Piece, find_files, identity_of, kind_of, read_file, share_of
from data.writing import PrepareOptions, Source, prepare, splits_of, summary, write_whole


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
    """Stop when the train split has so many, over all parts; None = take everything."""
    part: str = "1/1"
    """This machine's share of the work: 3/16 is the third of sixteen."""

    def __post_init__(self) -> None:
        super().__post_init__()
        numbers = re.fullmatch(r"(\d+)/(\d+)", self.part)
        if not numbers or not 1 <= int(numbers[1]) <= int(numbers[2]):
            raise ValueError(f"part is {self.part!r}, wanted K/N such as 3/16, with K from 1 to N")
        if self.tokens is not None and self.tokens <= 0:
            raise ValueError(f"tokens is {self.tokens}, wanted above 0")


def main(options: Options) -> None:
    part, parts = map(int, options.part.split("/"))
    if parts > 1 and (options.tokenizer == "char" or options.tokenizer.startswith("bpe:")):
        raise UserError(
            f"tokenizer is {options.tokenizer!r}, which each part would train on other text; "
            f"wanted one that is there already, such as gpt2 or the name of a prepared corpus"
        )
    if options.path is None:
        identity = {"hub": list(CORPORA[options.corpus])}
        pieces = lambda: hub_pieces(CORPORA[options.corpus], part, parts)  # noqa: E731
    else:
        files = find_files(options.path)
        identity = {**identity_of(files), "column": options.column}
        pieces = lambda: local_pieces(files, options.column, part, parts)  # noqa: E731
    train_tokens = options.tokens and options.tokens / parts
    prepare(options, Source(pieces, identity), part_mark(part, parts), train_tokens)
    if parts > 1:
        merge_parts(DATA / options.name, parts)


def part_mark(part: int, parts: int) -> str:
    return f"_{part:02d}of{parts:02d}" if parts > 1 else ""


def split_of(key: str) -> str:
    return "val" if share_of(key) < VAL_SHARE else "train"


def local_pieces(files: list[Path], column: str, part: int, parts: int) -> Iterator[Piece]:
    """Every parts-th document: a row, or a .txt file, which comes in pieces and is split by its name."""
    number = 0
    for file in files:
        rows = kind_of(file) in (".jsonl", ".parquet")
        for text, ends_document in read_file(file, column):
            if number % parts == part - 1:
                yield Piece(split_of(text if rows else file.name), text, ends_document)
            number += ends_document


def hub_pieces(hub: Hub, part: int, parts: int) -> Iterator[Piece]:
    try:
        import datasets
        from datasets.distributed import split_dataset_by_node
    except ImportError:
        raise UserError("streaming from the hub needs: pip install datasets; or give local files: --path") from None
    try:
        rows = datasets.load_dataset(hub.dataset, hub.subset, split="train", streaming=True)
        for row in split_dataset_by_node(rows, rank=part - 1, world_size=parts):
            if row[hub.column]:
                yield Piece(split_of(row[hub.column]), row[hub.column])
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot read {hub.dataset} from the hub ({type(error).__name__}); the same command goes on after the last "
            f"whole shard, or give local files with --path"
        ) from None


def merge_parts(folder: Path, parts: int) -> None:
    """meta.json of all parts, where all are there. Raises UserError where they do not fit together."""
    files = [folder / f"meta{part_mark(part, parts)}.json" for part in range(1, parts + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        print(f"{len(missing)} of {parts} parts are not in {folder} yet: {', '.join(missing[:5])}")
        return
    metas = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    for name in ("tokenizer", "prepared_with"):
        odd = [file.name for file, meta in zip(files, metas) if meta[name] != metas[0][name]]
        if odd:
            raise UserError(f"{folder / odd[0]} has another {name} than {files[0].name}; prepare that part again")
    shards = [
        {**shard, "split": name} for meta in metas for name, one in meta["splits"].items() for shard in one["shards"]
    ]
    missing = [shard["file"] for shard in shards if not (folder / shard["file"]).is_file()]
    if missing:
        raise UserError(f"{folder / missing[0]} is missing, though its part is there; copy it too")
    whole = {**metas[0], "splits": splits_of(shards)}
    write_whole(folder / "meta.json", json.dumps(whole, indent=1, ensure_ascii=False))
    print(f"all {parts} parts are there:\n{summary(whole)}")


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, description=__doc__))
