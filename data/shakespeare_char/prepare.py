"""Tiny Shakespeare by characters: 1.1 MB, a vocabulary of 65, the first 90 % for training.

python -m data.shakespeare_char.prepare
python -m data.shakespeare_char.prepare --path=input.txt       without a network
"""

import sys
import urllib.request
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from config import UserError, parse, user_errors
from data.texts import cut_by_position
from data.writing import PrepareOptions, Source, prepare

ADDRESS = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


@dataclass(frozen=True)
class Options(PrepareOptions):
    name: str = "shakespeare_char"
    """Folder of the result below data/, or a path."""
    path: str | None = None
    """A local copy: input.txt, or the folder that holds it; None = download it."""
    tokenizer: str = "char"
    """As for data.own_text.prepare."""


def main(options: Options) -> None:
    text = read_input(options.path)
    train_characters = len(text) * 9 // 10
    identity = {"text": sha256(text.encode()).hexdigest()}
    prepare(options, Source(lambda: cut_by_position([(text, True)], train_characters), identity, len(text.encode())))


def read_input(path: str | None) -> str:
    if path is None:
        try:
            with urllib.request.urlopen(ADDRESS, timeout=30) as answer:
                return answer.read().decode("utf-8")
        except OSError as error:
            raise UserError(f"cannot download {ADDRESS} ({error}); give a local copy with --path=input.txt") from None
    file = Path(path) / "input.txt" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"no file {file}, wanted the text of Tiny Shakespeare")
    return file.read_text(encoding="utf-8")


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, description=__doc__))
