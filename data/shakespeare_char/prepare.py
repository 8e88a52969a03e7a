"""Prepare Tiny Shakespeare by characters: 1.1 MB, a vocabulary of 65, the first 90 % for training.

python -m data.shakespeare_char.prepare
python -m data.shakespeare_char.prepare --path=input.txt       without a network
"""

import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from config import UserError, parse, user_errors
from data.texts import Piece, cut_by_position
from data.writing import PrepareOptions, Source, prepare

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(frozen=True)
class Options(PrepareOptions):
    name: str = "shakespeare_char"
    path: str | None = None
    """A local copy: input.txt, or the folder that holds it; None = download it."""
    tokenizer: str = "char"


def main(options: Options) -> None:
    prepare(options, Source(lambda: pieces(options.path), {"text": SHA256}))


def pieces(path: str | None) -> Iterator[Piece]:
    contents = read_input(path)
    if sha256(contents).hexdigest() != SHA256:
        raise UserError(f"{path or URL} is not Tiny Shakespeare; for other text: python -m data.own_text.prepare")
    text = contents.decode("utf-8")
    yield from cut_by_position([(text, True)], len(text) * 9 // 10)


def read_input(path: str | None) -> bytes:
    if path is None:
        try:
            with urllib.request.urlopen(URL, timeout=30) as response:
                contents = response.read()
            return contents
        except OSError as error:
            raise UserError(f"cannot download {URL} ({error}); give a local copy with --path=input.txt") from None
    file = Path(path) / "input.txt" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"no file {file}, wanted the text of Tiny Shakespeare")
    return file.read_bytes()


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, description=__doc__))
