"""Prepare WikiText-103: 28,000 long Wikipedia articles, about 103 million words, one document per article.

    python -m data.wikitext103.prepare                             from the Hugging Face hub: pip install datasets
    python -m data.wikitext103.prepare --path=wikitext-103-raw     a folder with {train,valid,test}.txt or wiki.*.tokens

The tokenizer is a BPE of 32,000 ids, trained on the train split. The same script prepares a local WikiText-2:
    python -m data.wikitext103.prepare --path=wikitext-2-raw --name=wikitext2 --tokenizer=gpt2
"""

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from config import UserError, parse, user_errors
from data.texts import Piece, find_files, hub_rows, identity_of, read_file, split_of_name
from data.writing import PrepareOptions, Source, prepare

HUB = ("Salesforce/wikitext", "wikitext-103-raw-v1")
TITLE = re.compile(r" = [^=\n]+ = \n?")  # " = = Section = = " is not one


@dataclass(frozen=True)
class Options(PrepareOptions):
    name: str = "wikitext103"
    path: str | None = None
    """A folder with the three files; None = download them."""
    tokenizer: str = "bpe:32000"


def main(options: Options) -> None:
    if options.path is None:
        prepare(options, Source(lambda: articles(hub_lines()), {"hub": list(HUB)}))
        return
    files = {split_of_name(file.name): file for file in find_files(options.path)}
    if not {"train", "val", "test"} <= files.keys():
        raise UserError(f"{options.path} has splits {sorted(filter(None, files))}, wanted train, valid and test files")
    files = {split: files[split] for split in ("train", "val", "test")}
    total = sum(file.stat().st_size for file in files.values())
    prepare(options, Source(lambda: articles(file_lines(files)), identity_of(list(files.values())), total))


def articles(lines: Iterable[tuple[str, str]]) -> Iterator[Piece]:
    """Yield a document for each article of (split, line), with its title. No line is skipped."""
    current, article = "", []
    for split, line in lines:
        if article and (split != current or TITLE.fullmatch(line)):
            yield Piece(current, "".join(article))
            article = []
        current = split
        article.append(line)
    if article:
        yield Piece(current, "".join(article))


def file_lines(files: dict[str, Path]) -> Iterator[tuple[str, str]]:
    for split, file in files.items():
        rest = ""
        for text, _ in read_file(file):
            *lines, rest = (rest + text).split("\n")
            yield from ((split, line + "\n") for line in lines)
        if rest:
            yield split, rest


def hub_lines() -> Iterator[tuple[str, str]]:
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        yield from ((split, row["text"]) for row in hub_rows(*HUB, name))


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, description=__doc__))
