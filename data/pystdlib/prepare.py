"""Prepare the embedded corpus: the source code of Python's standard library, 11 MB, in seconds and without a network.

    python -m data.pystdlib.prepare

Bytes are the tokens. About 5 % of the text is val: whole files, chosen by a hash of their path, so that another version
of Python splits the files that both have in the same way. The tables of numbers in encodings/ are all train.
"""

import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from config import parse, user_errors
from data import writing
from data.texts import Piece, share_of

VAL_SHARE = 0.07  # of the files outside encodings/
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Options(writing.PrepareOptions):
    name: str = "pystdlib"
    path: str | None = None
    """Another folder of Python source code; None = the standard library of this Python."""
    tokenizer: str = "byte"


def prepare(options: Options | None = None) -> None:
    """Write the corpus. train.py calls this if pystdlib is asked for and missing."""
    options = options or Options()
    root = Path(options.path or sysconfig.get_path("stdlib"))
    files = [file for file in sorted(root.rglob("*.py")) if not is_skipped(file.relative_to(root))]
    identity = {"files": len(files), "file_bytes": sum(file.stat().st_size for file in files)}
    writing.prepare(options, writing.Source(lambda: pieces(root, files), identity, identity["file_bytes"]))


def is_skipped(path: Path) -> bool:
    """Say whether a file holds tests, or the configuration of this machine."""
    configured = path.name.startswith("_sysconfigdata") or any(part.startswith("config-") for part in path.parts)
    return configured or not SKIPPED.isdisjoint(path.parts)


def pieces(root: Path, files: list[Path]) -> Iterator[Piece]:
    for file in files:
        path = file.relative_to(root).as_posix()
        try:
            with tokenize.open(file) as source:  # in the encoding that its first lines declare
                text = source.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        is_val = share_of(path) < VAL_SHARE and not path.startswith("encodings/")
        if text:
            yield Piece("val" if is_val else "train", text)


if __name__ == "__main__":
    with user_errors():
        prepare(parse(sys.argv[1:], Options, description=__doc__))
