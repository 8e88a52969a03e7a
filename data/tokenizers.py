"""Turn text into token ids and back: by bytes, by characters, by byte pairs (BPE), or by a tokenizer.json.

Each kind has
    vocab_size, end_of_text      the number of ids; the id that ends a document, or None
    encode(text)                 a list of ids; text that looks like a special token is ordinary text
    encode_array(text)           the same as an array
    decode(ids)                  text; bytes that are not UTF-8 become the replacement character
    decode_bytes(id)             the bytes of one token, to print text while it is sampled
    spec()                       a dict for JSON, from which the tokenizer is made again
    save(folder)                 write the file that it also needs, if any, and return the spec
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
# How GPT-2 splits text into words before it merges bytes, in the form that is fastest in tiktoken.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
RANKS_FILE = "tokenizer.tiktoken"
TOKENIZER_FILE = "tokenizer.json"


class ByteTokenizer:
    """The 256 bytes of UTF-8. No UTF-8 text holds byte 255, so it ends documents, and no 257th id is needed."""

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
        """Return the ids. Raise UserError that names unknown characters."""
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
    """Byte pairs by tiktoken: one of its encodings, or one trained on a corpus. The last id ends documents.

    The rank of a token is its id; tiktoken merges the pair with the lowest rank first.
    """

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
    """A tokenizer.json in the byte-level or SentencePiece form, such as Llama's, by the library tokenizers.

    It adds nothing before or after a text. Raise UserError without the library or for another form. For damaged
    contents, raise whatever the library raises.
    """

    def __init__(self, contents: dict[str, Any], end_of_text: int | None) -> None:
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"a {TOKENIZER_FILE} needs: pip install tokenizers") from None
        if contents["model"]["type"] == "WordPiece":
            raise UserError(f"a {TOKENIZER_FILE} of WordPiece, wanted the byte-level or SentencePiece form")
        plain = dict.fromkeys(("truncation", "padding", "post_processor"))
        self.contents, self.end_of_text = {**contents, **plain}, end_of_text
        self.model = tokenizers.Tokenizer.from_str(json.dumps(self.contents))
        self.model.encode_special_tokens = True  # text that looks like a special token is ordinary text
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
        """Return the bytes of one token. SentencePiece writes a space as U+2581, and a single byte as <0x0A>."""
        text = self.added.get(token, self.model.id_to_token(token)) or ""
        if self.byte_of and token not in self.added:
            return bytes(self.byte_of[c] for c in text)
        named = re.fullmatch(r"<0x([0-9A-F]{2})>", text)
        return bytes([int(named[1], 16)]) if named else text.replace("\u2581", " ").encode()

    @cached_property
    def json_file(self) -> bytes:
        return json.dumps(self.contents, sort_keys=True).encode()

    def spec(self) -> dict[str, Any]:
        spec = {"kind": "hf", "vocab_size": self.vocab_size, "end_of_text": self.end_of_text}
        return {**spec, "sha256": hashlib.sha256(self.json_file).hexdigest()}

    def save(self, folder: Path) -> dict[str, Any]:
        (folder / TOKENIZER_FILE).write_bytes(self.json_file)
        return self.spec()


Tokenizer = ByteTokenizer | CharTokenizer | BPETokenizer | HFTokenizer


def load_tokenizer(folder: Path | str, spec: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer of a spec, from its file in the folder, or from tiktoken if the file is not there.

    Raise UserError if the file is missing or has changed, or if the spec is not valid.
    """
    try:
        if spec["kind"] == "byte":
            return ByteTokenizer()
        if spec["kind"] == "char":
            return CharTokenizer(spec["characters"])
        if spec["kind"] not in ("bpe", "hf"):
            raise ValueError("wanted kind byte, char, bpe or hf")
        path = Path(folder) / (RANKS_FILE if spec["kind"] == "bpe" else TOKENIZER_FILE)
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
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{folder} describes its tokenizer as {str(spec)[:80]}, which is not valid ({why})") from None


def tiktoken_encoding(name: str) -> BPETokenizer:
    """Return one of tiktoken's encodings, such as gpt2. Raise UserError if its files cannot be downloaded."""
    try:
        encoding = tiktoken.get_encoding(name)
    except OSError as error:
        raise UserError(
            f"cannot download the vocabulary {name} ({type(error).__name__}); without a network set TIKTOKEN_CACHE_DIR "
            f"to a folder with tiktoken's cached files, or use --tokenizer=byte"
        ) from None
    return BPETokenizer(name, encoding._pat_str, encoding._mergeable_ranks, encoding.eot_token)


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Train a byte-level BPE like GPT-2's; vocab_size counts the end of text. Raise UserError for too little text."""
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
    ids = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in ids}
    if len(ranks) < vocab_size - 1:
        raise UserError(f"the train split gives a BPE of at most {len(ranks) + 1} ids, wanted {vocab_size}")
    return BPETokenizer(f"bpe:{vocab_size}", GPT2_PATTERN, ranks, vocab_size - 1)


# --- Hugging Face's tokenizer.json -------------------------------------------------------------------------------


def as_hf(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the contents of a tokenizer.json that gives the same ids. Raise UserError if there is none.

    Bytes and BPE become GPT-2's form, a BPE over printable characters that stand for bytes; bytes have no merges.
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
    """Yield the two tokens that each longer token is merged from, in the order of the ids.

    tiktoken does not store them: merge the token's bytes by rank until two parts are left.
    """
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            made = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
            i = made.index(min(made))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            yield parts[0], parts[1]


def read_hf(folder: Path) -> Tokenizer | None:
    """Return the tokenizer of a Hugging Face folder, or None if it has no tokenizer.json.

    If as_hf can write the file, or if it is GPT-2's own, return our own kind, with the same ids and the same spec.
    Raise UserError if the file cannot be read.
    """
    path, config = folder / TOKENIZER_FILE, folder / "config.json"
    if not path.is_file():
        return None
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        end = json.loads(config.read_text(encoding="utf-8")).get("eos_token_id") if config.is_file() else None
        return own_form(contents) or HFTokenizer(contents, end[0] if isinstance(end, list) else end)
    except UserError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path} is no tokenizer.json that can be read ({type(error).__name__}: {error})") from None


def own_form(contents: dict[str, Any]) -> Tokenizer | None:
    """Return a tokenizer of our own kinds with the same ids as a tokenizer.json, or None. Raise KeyError if cut."""
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
        return None  # the order of merges is not that of the ids, which tiktoken needs
    return BPETokenizer("gpt2" if end == 50256 else f"bpe:{len(ranks) + 1}", GPT2_PATTERN, ranks, end)


def byte_of_printable() -> dict[str, int]:
    """Return the byte of each of GPT-2's printable characters: itself if it is visible, else 256, 257, ..."""
    seen = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(unseen)}


def as_utf8(text: str) -> bytes:
    """Return the bytes of a text. JSON can hold half a surrogate pair, which becomes the replacement character."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
