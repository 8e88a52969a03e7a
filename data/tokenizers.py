"""Text to token ids and back: by bytes, by characters, by byte pairs (BPE), or as a tokenizer.json says.

Each kind has
    vocab_size, end_of_text      the number of ids; the id that ends a document, or None
    encode(text)                 a list of ids; what looks like a special token in the text is ordinary text
    encode_array(text)           the same as an array
    decode(ids)                  text; bytes that are not UTF-8 become the replacement character
    decode_bytes(id)             the bytes of one token, for output as it comes
    spec()                       what makes it again, a dict for JSON
    save(folder)                 writes what else it needs there and returns the spec
and load_tokenizer(folder, spec) makes it again without a network.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from config import UserError

END_OF_TEXT = "<|endoftext|>"
# GPT-2's way to split text into words before merging, in the form that tiktoken runs fastest.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
RANKS_FILE = "tokenizer.tiktoken"
TOKENIZER_FILE = "tokenizer.json"


class ByteTokenizer:
    """The 256 bytes of UTF-8. Byte 255 occurs in no UTF-8 text, so it can end documents without a 257th id."""

    vocab_size = 256
    end_of_text = 255

    def encode(self, text: str) -> list[int]:
        return list(as_utf8(text))

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(as_utf8(text), dtype=np.uint8)

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(map(self.decode_bytes, ids)).decode("utf-8", errors="replace")

    def decode_bytes(self, token: int) -> bytes:
        return END_OF_TEXT.encode() if token == self.end_of_text else bytes([token])

    def spec(self) -> dict[str, Any]:
        return {"kind": "byte", "vocab_size": self.vocab_size, "end_of_text": self.end_of_text}

    def save(self, folder: Path) -> dict[str, Any]:
        return self.spec()


class CharTokenizer:
    """The characters of one corpus, in the order of their code points."""

    end_of_text = None

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = sorted(characters)
        self.vocab_size = len(self.characters)
        self.ids = np.full(0x110000, -1, dtype=np.int32)  # by code point
        self.ids[[ord(character) for character in self.characters]] = np.arange(self.vocab_size)

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """Raises UserError naming the characters that it does not know."""
        ids = self.ids[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")]
        if (ids < 0).any():
            unknown = sorted(set(text) - set(self.characters))
            more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
            raise UserError(
                f"the tokenizer has no {' '.join(map(repr, unknown[:10]))}{more}; "
                f"it knows the {self.vocab_size} characters of its corpus"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.characters[token] for token in ids)

    def decode_bytes(self, token: int) -> bytes:
        return self.characters[token].encode()

    def spec(self) -> dict[str, Any]:
        return {"kind": "char", "vocab_size": self.vocab_size, "characters": "".join(self.characters)}

    def save(self, folder: Path) -> dict[str, Any]:
        return self.spec()


class BPETokenizer:
    """Byte pairs with tiktoken: one of its encodings, or one trained on the corpus; its last id is the end of text."""

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int], end_of_text: int) -> None:
        self.name, self.pattern, self.ranks, self.end_of_text = name, pattern, ranks, end_of_text
        special = {END_OF_TEXT: end_of_text}
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.vocab_size = self.encoding.n_vocab

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def encode_array(self, text: str) -> np.ndarray:
        return self.encoding.encode_to_numpy(as_utf8(text).decode(), disallowed_special=())

    def decode(self, ids: Iterable[int]) -> str:
        return self.encoding.decode(list(ids))

    def decode_bytes(self, token: int) -> bytes:
        return self.encoding.decode_single_token_bytes(token)

    @cached_property
    def ranks_file(self) -> bytes:
        return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in self.ranks.items())

    def spec(self) -> dict[str, Any]:
        spec = {"kind": "bpe", "name": self.name, "vocab_size": self.vocab_size, "end_of_text": self.end_of_text}
        return {**spec, "pattern": self.pattern, "sha256": hashlib.sha256(self.ranks_file).hexdigest()}

    def save(self, folder: Path) -> dict[str, Any]:
        (folder / RANKS_FILE).write_bytes(self.ranks_file)
        return self.spec()


class HFTokenizer:
    """A tokenizer.json of byte-level or SentencePiece's form, by the library that reads them: that of a Llama, say.

    Nothing is put before or after a text. Raises UserError without the library or for another form, and whatever the
    library raises where the contents are none.
    """

    def __init__(self, contents: dict[str, Any], end_of_text: int | None) -> None:
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"a {TOKENIZER_FILE} needs: pip install tokenizers") from None
        if contents["model"]["type"] == "WordPiece":
            raise UserError(f"a {TOKENIZER_FILE} of WordPiece, wanted byte-level or SentencePiece's form")
        plain = dict.fromkeys(("truncation", "padding", "post_processor"))
        self.contents, self.end_of_text = {**contents, **plain}, end_of_text
        self.model = tokenizers.Tokenizer.from_str(json.dumps(self.contents))
        self.model.encode_special_tokens = True  # what looks like one in a text is text
        self.vocab_size = 1 + max(self.model.get_vocab().values())
        self.added = {added["id"]: added["content"] for added in contents["added_tokens"]}
        self.byte_of = byte_of_printable() if '"ByteLevel"' in json.dumps(contents.get("decoder")) else {}

    def encode(self, text: str) -> list[int]:
        return self.model.encode(as_utf8(text).decode(), add_special_tokens=False).ids

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), dtype=np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        return self.model.decode(list(ids), skip_special_tokens=False)

    def decode_bytes(self, token: int) -> bytes:
        """SentencePiece marks a space by U+2581, and names a byte that is no character like <0x0A>."""
        text = self.added.get(token, self.model.id_to_token(token)) or ""
        if self.byte_of and token not in self.added:
            return bytes(self.byte_of[c] for c in text)
        named = re.fullmatch(r"<0x([0-9A-F]{2})>", text)
        return bytes([int(named[1], 16)]) if named else text.replace("\u2581", " ").encode()

    def spec(self) -> dict[str, Any]:
        spec = {"kind": "hf", "vocab_size": self.vocab_size, "end_of_text": self.end_of_text}
        return {**spec, "sha256": hashlib.sha256(self.as_text().encode()).hexdigest()}

    def as_text(self) -> str:
        return json.dumps(self.contents, sort_keys=True)

    def save(self, folder: Path) -> dict[str, Any]:
        (folder / TOKENIZER_FILE).write_text(self.as_text(), encoding="utf-8")
        return self.spec()


Tokenizer = ByteTokenizer | CharTokenizer | BPETokenizer | HFTokenizer


def load_tokenizer(folder: Path | str, spec: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a spec, from its file in the folder, or where it is one of tiktoken's without that file.

    Raises UserError where the file is missing or another one, or the spec is not one of ours.
    """
    try:
        return from_spec(Path(folder), spec)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        told = f"{type(error).__name__}: {error}"
        raise UserError(f"{folder} describes its tokenizer as {str(spec)[:80]}, which is none ({told})") from None


def from_spec(folder: Path, spec: dict[str, Any]) -> Tokenizer:
    if spec["kind"] == "byte":
        return ByteTokenizer()
    if spec["kind"] == "char":
        return CharTokenizer(spec["characters"])
    if spec["kind"] not in ("bpe", "hf"):
        raise UserError(f"{folder} has a tokenizer of kind {spec['kind']!r}, wanted 'byte', 'char', 'bpe' or 'hf'")
    path = folder / (RANKS_FILE if spec["kind"] == "bpe" else TOKENIZER_FILE)
    if not path.is_file() and spec.get("name") in tiktoken.list_encoding_names():
        return tiktoken_encoding(spec["name"])
    contents = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(contents).hexdigest() != spec["sha256"]:
        state = "is not the file that was saved" if contents else "is missing"
        raise UserError(f"{path} {state}, wanted sha256 {spec['sha256'][:16]}...")
    if spec["kind"] == "hf":
        return HFTokenizer(json.loads(contents), spec["end_of_text"])
    pairs = [line.split() for line in contents.splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    return BPETokenizer(spec["name"], spec["pattern"], ranks, spec["end_of_text"])


def tiktoken_encoding(name: str) -> BPETokenizer:
    """One of tiktoken's own, such as gpt2. Raises UserError where its files cannot be had."""
    try:
        encoding = tiktoken.get_encoding(name)
    except OSError as error:
        raise UserError(
            f"cannot download the vocabulary {name} ({type(error).__name__}); without a network set TIKTOKEN_CACHE_DIR "
            f"to a folder with tiktoken's cached files, or use --tokenizer=byte"
        ) from None
    return BPETokenizer(name, encoding._pat_str, encoding._mergeable_ranks, encoding.eot_token)


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """A byte-level BPE as GPT-2's, end of text included in vocab_size. Raises UserError where the texts are too few."""
    try:
        import tokenizers
    except ImportError:
        raise UserError("training a BPE needs: pip install tokenizers") from None
    if vocab_size < 257:
        raise UserError(f"a BPE of {vocab_size} ids, wanted 257 or more: the bytes and the end of text")
    words = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = words
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=words.alphabet(), special_tokens=[], show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    byte_of = byte_of_printable()
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in bpe.get_vocab().items()}
    if len(ranks) < vocab_size - 1:
        raise UserError(f"the train split gives a BPE of at most {len(ranks) + 1} ids, wanted {vocab_size}")
    ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    return BPETokenizer(f"bpe:{vocab_size}", GPT2_PATTERN, ranks, vocab_size - 1)


def as_hf(tokenizer: Tokenizer) -> dict[str, Any]:
    """The contents of a tokenizer.json that gives the same ids. Raises UserError where there is none.

    One of theirs is as it was. All others but characters become GPT-2's form, a BPE over printable stand-ins of bytes;
    bytes alone merge nothing.
    """
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.contents
    try:
        from tokenizers import Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Model
    except ImportError:
        raise UserError("a tokenizer for Hugging Face needs: pip install tokenizers") from None
    if isinstance(tokenizer, CharTokenizer):
        made = Model(models.WordLevel({c: i for i, c in enumerate(tokenizer.characters)}))
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        made.decoder = decoders.Fuse()
        return json.loads(made.to_str())
    splits_words = isinstance(tokenizer, BPETokenizer)
    if splits_words and tokenizer.pattern != GPT2_PATTERN:
        raise UserError(f"the tokenizer {tokenizer.name} splits words in a way that has no equal there; wanted GPT-2's")
    ranks = tokenizer.ranks if splits_words else {bytes([byte]): byte for byte in range(255)}
    printable = {byte: character for character, byte in byte_of_printable().items()}
    shown = {token: "".join(printable[byte] for byte in token) for token in ranks}
    vocabulary = {shown[token]: rank for token, rank in ranks.items()} | {END_OF_TEXT: tokenizer.end_of_text}
    made = Model(models.BPE(vocabulary, [(shown[a], shown[b]) for a, b in merges(ranks)]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits_words)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([END_OF_TEXT])
    return json.loads(made.to_str())


def merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The two tokens that each longer token is made of, the first merge first: what its bytes are before the last."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            made = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            i = made.index(min(made))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def read_hf(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder; None where it has no tokenizer.json. Raises UserError for a broken one.

    Where it is of a form that as_hf writes, or GPT-2's own, it is one of ours, so that ids and specs are the same.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return None
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        config = folder / "config.json"
        ends = json.loads(config.read_text(encoding="utf-8")).get("eos_token_id") if config.is_file() else None
        return own_form(contents) or HFTokenizer(contents, ends[0] if isinstance(ends, list) else ends)
    except UserError:
        raise
    except Exception as error:  # the library raises no kind of its own
        raise UserError(f"{path} is no tokenizer.json that can be read ({type(error).__name__}: {error})") from None


def own_form(contents: dict[str, Any]) -> Tokenizer | None:
    """One of our tokenizers that gives the same ids as a tokenizer.json, or None. Raises KeyError where parts lack."""
    model, split = contents["model"], contents["pre_tokenizer"] or {}
    if contents["normalizer"] or model["type"] not in ("WordLevel", "BPE"):
        return None
    vocabulary: dict[str, int] = model["vocab"]
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    if model["type"] == "WordLevel":
        alone = split.get("type") == "Split" and not contents["added_tokens"] and max(map(len, tokens)) == 1
        in_order = tokens == sorted(tokens) and vocabulary[tokens[-1]] == len(tokens) - 1
        return CharTokenizer(tokens) if alone and in_order else None
    end = next((t["id"] for t in contents["added_tokens"] if t["content"] == END_OF_TEXT), None)
    byte_of = byte_of_printable()
    ordinary = [token for token in tokens if vocabulary[token] != end]
    if end is None or len(contents["added_tokens"]) > 1:
        return None
    if split.get("type") != "ByteLevel" or split["add_prefix_space"]:
        return None
    if not byte_of.keys() >= set("".join(ordinary)):
        return None
    ranks = {bytes(byte_of[c] for c in token): vocabulary[token] for token in ordinary}
    if not split.get("use_regex", True):
        return ByteTokenizer() if ranks == {bytes([byte]): byte for byte in range(255)} else None
    made = ["".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    if made != [token for token in ordinary if len(token) > 1] or len(ranks) - len(made) != 256:
        return None  # merged in another order than that of the ids
    return BPETokenizer("gpt2" if end == 50256 else f"bpe:{len(ranks) + 1}", GPT2_PATTERN, ranks, end)


def byte_of_printable() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte -> the byte: itself where it can be seen, else 256, 257, ..."""
    seen = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(unseen)}


def as_utf8(text: str) -> bytes:
    """JSON can hold half a surrogate pair, which UTF-8 cannot: it becomes the replacement character."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
