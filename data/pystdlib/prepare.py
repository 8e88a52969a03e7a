"""The embedded corpus: the sources of the Python standard library that runs this, about 11 MB, no network, seconds.

    python -m data.pystdlib.prepare

Bytes are the tokens. About 5 % of the text is held out, in whole files chosen by a hash of their path, so that another
version of Python splits the files they share in the same way; encodings/ is all train, being tables of numbers.
"""

import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from config import parse, user_errors
from data.texts import Piece, share_of
from data.writing import PrepareOptions, Source
from data.writing import prepare as write_corpus

VAL_SHARE = 0.07  # of the files outside encodings/
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Options(PrepareOptions):
    name: str = "pystdlib"
    """Folder of the result below data/, or a path."""
    path: str | None = None
    """Another folder of Python sources; None = the standard library of this Python."""
    tokenizer: str = "byte"
    """As for data.own_text.prepare."""


def prepare(options: Options | None = None) -> None:
    """Writes the corpus; train.py calls it where pystdlib is wanted and missing."""
    options = options or Options()
    root = Path(options.path or sysconfig.get_path("stdlib"))
    files = sources(root)
    identity = {"files": len(files), "file_bytes": sum(file.stat().st_size for file in files)}
    write_corpus(options, Source(lambda: pieces(root, files), identity, identity["file_bytes"]))


def sources(root: Path) -> list[Path]:
    """*.py in the order of their paths, without tests and without what was configured for this machine."""
    return [file for file in sorted(root.rglob("*.py")) if not left_out(file.relative_to(root))]


def left_out(path: Path) -> bool:
    configured = path.name.startswith("_sysconfigdata") or any(part.startswith("config-") for part in path.parts)
    return configured or not LEFT_OUT.isdisjoint(path.parts)


def pieces(root: Path, files: list[Path]) -> Iterator[Piece]:
    for file in files:
        path = file.relative_to(root).as_posix()
        try:
            with tokenize.open(file) as source:  # in the encoding that its first lines declare
                text = source.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        held_out = share_of(path) < VAL_SHARE and not path.startswith("encodings/")
        if text:
            yield Piece("val" if held_out else "train", text)


if __name__ == "__main__":
    with user_errors():
        prepare(parse(sys.argv[1:], Options, description=__doc__))
