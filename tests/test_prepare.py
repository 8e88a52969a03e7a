"""The prepare scripts: `pytest tests/test_prepare.py`; two CPU cores, about 15 seconds, no network."""

import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import tiktoken_ext.openai_public
from hypothesis import given, settings
from hypothesis import strategies as st

import data.own_text.prepare as own_text
import data.pystdlib.prepare as pystdlib
import data.shakespeare_char.prepare as shakespeare_char
import data.texts
import data.webtext.prepare as webtext
import data.wikitext103.prepare as wikitext103
from config import UserError, parse
from data import open_corpus, read_meta
from data.texts import Piece, cut_by_position, cut_safely, read_file, split_of_name
from data.tokenizers import load_tokenizer, tiktoken_encoding
from data.writing import sha256_of

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no shared/data beside the repository")


def tokens_of(corpus: Path, split: str) -> np.ndarray:
    opened = open_corpus(str(corpus), split)
    return opened.window(0, opened.tokens)


def text_of(corpus: Path, split: str) -> str:
    return load_tokenizer(corpus, read_meta(corpus)["tokenizer"]).decode(tokens_of(corpus, split).tolist())


def hashes(corpus: Path) -> list[tuple[str, str]]:
    return [(s["file"], s["sha256"]) for split in read_meta(corpus)["splits"].values() for s in split["shards"]]


def prepare_own(source: Path, corpus: Path, *arguments: str) -> None:
    options = [f"--path={source}", f"--name={corpus}", "--tokenizer=byte", *arguments]
    own_text.main(parse(options, own_text.Options))


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


# Cutting long documents


@pytest.fixture(scope="module")
def patterns():
    """How GPT-2, GPT-4 and GPT-4o split text into words; their vocabularies are not needed for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiktoken_ext.openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
        names = ("r50k_base", "cl100k_base", "o200k_base")
        return [regex.compile(getattr(tiktoken_ext.openai_public, name)()["pat_str"]) for name in names]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from([*"aB1!/_'s  \n\n\r\t.,é\u0301\u2028\x1c\xa0", "'ll", "word", " ", "\n"]), max_size=80))
def test_a_safe_cut_leaves_the_words_as_they_are(patterns, characters):
    text = "".join(characters)
    parts = [piece.text for piece in cut_safely([Piece("train", text[:30], False), Piece("train", text[30:])], 8)]
    assert "".join(parts) == text
    for pattern in patterns:
        assert [word for part in parts for word in pattern.findall(part)] == pattern.findall(text)


def test_a_word_without_end_is_cut_at_last(monkeypatch):
    monkeypatch.setattr(data.texts, "LONGEST_WORD", 100)
    pieces = [Piece("train", "x" * 25, i == 9) for i in range(10)]
    assert [len(piece.text) for piece in cut_safely(pieces, 10)] == [100, 100, 50]


@needs_shared
def test_real_text_in_pieces_gives_the_tokens_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    monkeypatch.setattr(data.texts, "TASK_CHARACTERS", 5000)
    source = SHARED / "tinyshakespeare" / "input.txt"
    prepare_own(source, tmp_path, "--tokenizer=gpt2")
    text = source.read_text(encoding="utf-8")
    whole = tiktoken.get_encoding("gpt2").encode_ordinary(text[: int(0.9 * len(text))])
    assert tokens_of(tmp_path, "train").tolist() == [*whole, 50256] and len(whole) == 301_966
    assert open_corpus(str(tmp_path), "val").tokens == 36_059 + 1


# The result depends on the text and the options, not on threads or accidents


def test_any_number_of_threads_gives_the_same_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(data.texts, "TASK_CHARACTERS", 1000)
    source = write_jsonl(tmp_path / "text.jsonl", [f"Document {i} says {i * i}. " * (i % 90) for i in range(300)])
    for threads in (1, 2, 5):
        prepare_own(source, tmp_path / f"{threads}", f"--threads={threads}", "--shard_tokens=20000", "--val_share=0.3")
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2") == hashes(tmp_path / "5")
    assert len(hashes(tmp_path / "1")) > 10
    assert {path.name for path in (tmp_path / "1").iterdir()} == {"meta.json", *(f for f, _ in hashes(tmp_path / "1"))}


SLOW = """
import sys, time
import data.own_text.prepare as own_text, data.texts, data.writing
from config import parse
data.texts.TASK_CHARACTERS = 1000
hash_shard = data.writing.sha256_of
data.writing.sha256_of = lambda path: (time.sleep(0.05), hash_shard(path))[1]
own_text.main(parse(sys.argv[1:], own_text.Options))
"""


def test_killed_and_run_again_it_ends_with_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(data.texts, "TASK_CHARACTERS", 1000)
    source = write_jsonl(tmp_path / "text.jsonl", [f"Document {i} says {i * i}. " * (i % 90) for i in range(300)])
    options = ["--shard_tokens=15000", "--val_share=0.3", "--tokenizer=bpe:300"]
    prepare_own(source, tmp_path / "calm", *options)
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", SLOW, f"--path={source}", f"--name={killed}", *options]
    for notes in (3, 7):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(lines_of(killed / "progress.jsonl")) < notes:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        with pytest.raises(UserError, match="not finished"):
            open_corpus(str(killed), "train")
    with (killed / "progress.jsonl").open("a") as progress:
        progress.write('{"a note": "cut by the ki')
    untouched = killed / "train_00000.bin"
    written = untouched.stat().st_mtime_ns
    prepare_own(source, killed, *options)
    assert hashes(killed) == hashes(tmp_path / "calm")
    assert untouched.stat().st_mtime_ns == written
    assert {path.name for path in killed.iterdir()} == {path.name for path in (tmp_path / "calm").iterdir()}
    assert all(sha256_of(killed / file) == sha256 for file, sha256 in hashes(killed))


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def test_what_is_there_is_never_lost_silently(tmp_path, capsys):
    source = write_jsonl(tmp_path / "text.jsonl", [f"Document {i}. " * 20 for i in range(50)])
    corpus = tmp_path / "corpus"
    prepare_own(source, corpus)
    before = hashes(corpus)
    prepare_own(source, corpus)
    assert "is prepared already" in capsys.readouterr().out
    with pytest.raises(UserError, match="was prepared with tokenizer = byte, now wanted char; choose another --name"):
        prepare_own(source, corpus, "--tokenizer=char")
    shard = corpus / before[0][0]
    shard.write_bytes(shard.read_bytes()[:-2] + b"!!")
    with pytest.raises(UserError, match=f"{shard.name} is damaged, wanted sha256 .*; --force prepares all again"):
        prepare_own(source, corpus)
    with pytest.raises(UserError, match="tokenizer is 'none'"):
        prepare_own(source, corpus, "--tokenizer=none", "--force")
    assert shard.is_file()
    prepare_own(source, corpus, "--force")
    assert hashes(corpus) == before
    prepare_own(source, corpus, "--tokenizer=char", "--force")
    assert read_meta(corpus)["tokenizer"]["kind"] == "char"


def test_big_vocabularies_are_stored_as_uint32(tmp_path):
    text = "".join(map(chr, [*range(0x20, 0xD800), *range(0xE000, 0xE000 + 15_000)]))
    source = tmp_path / "text.txt"
    source.write_text(text, encoding="utf-8")
    prepare_own(source, tmp_path / "corpus", "--tokenizer=char", "--val_share=0.5")
    meta = read_meta(tmp_path / "corpus")
    assert meta["dtype"] == "uint32" and meta["vocab_size"] == len(text) > 2**16
    assert tokens_of(tmp_path / "corpus", "val").max() == len(text) - 1
    assert text_of(tmp_path / "corpus", "train") + text_of(tmp_path / "corpus", "val") == text


def test_a_corpus_can_use_the_tokenizer_of_another(tmp_path):
    source = tmp_path / "text.txt"
    source.write_text("To be, or not to be, that is the question. " * 100, encoding="utf-8")
    prepare_own(source, tmp_path / "one", "--tokenizer=bpe:270")
    prepare_own(source, tmp_path / "two", f"--tokenizer={tmp_path / 'one'}")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    with pytest.raises(UserError, match="tokenizer is 'gtp2', wanted byte, char, bpe:SIZE"):
        prepare_own(source, tmp_path / "three", "--tokenizer=gtp2")


def test_a_vocabulary_that_cannot_be_downloaded_says_what_to_set(monkeypatch):
    def no_network(name):
        raise ConnectionError

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(UserError, match="set TIKTOKEN_CACHE_DIR"):
        tiktoken_encoding("gpt2")


# own_text


def test_named_files_of_every_kind_go_to_their_splits(tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    (source / "train.txt.xz").write_bytes(lzma.compress("naïve\r\n".encode()) + lzma.compress(b"second stream"))
    (source / "train_2.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbftwo"))
    write_jsonl(source / "valid.jsonl", ["three", "", "four"])
    (source / "test.txt").write_text("five")
    (source / "extra.txt").write_text("six")
    (source / "empty.txt").touch()
    (source / "manifest.tsv").write_text("not text")
    prepare_own(source, tmp_path / "corpus")
    end = "<|endoftext|>"
    assert text_of(tmp_path / "corpus", "train") == f"six{end}naïve\r\nsecond stream{end}two{end}"
    assert text_of(tmp_path / "corpus", "val") == f"three{end}four{end}"
    assert text_of(tmp_path / "corpus", "test") == f"five{end}"
    train = read_meta(tmp_path / "corpus")["splits"]["train"]
    assert (train["bytes"], train["documents"], train["max_token"]) == (3 + 21 + 3, 3, 255)
    assert "skipped, since not .txt, .jsonl or .parquet: manifest.tsv" in capsys.readouterr().out


@pytest.mark.parametrize("name, split", [
    ("train.txt", "train"), ("valid-00.jsonl.xz", "val"), ("dev.txt", "val"), ("validation_1.parquet", "val"),
    ("Test.TXT", "test"), ("wiki.valid.tokens", "val"), ("testament.txt", None), ("values.txt", None),
])  # fmt: skip
def test_split_of_name(name, split):
    assert split_of_name(name) == split


def test_unnamed_text_is_cut_by_position_or_split_by_document(tmp_path):
    single = tmp_path / "book.txt"
    single.write_text("".join(chr(97 + i % 26) for i in range(1000)))
    prepare_own(single, tmp_path / "one")
    assert text_of(tmp_path / "one", "train") == single.read_text()[:900] + "<|endoftext|>"
    assert text_of(tmp_path / "one", "val") == single.read_text()[900:] + "<|endoftext|>"
    folder = tmp_path / "books"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"book {i}")
    prepare_own(folder, tmp_path / "many")
    splits = read_meta(tmp_path / "many")["splits"]
    assert (splits["train"]["documents"], splits["val"]["documents"]) == (27, 3)
    rows = write_jsonl(tmp_path / "rows.jsonl", [f"row {i % 500}" for i in range(1000)])
    prepare_own(rows, tmp_path / "rows")
    train, val = (set(text_of(tmp_path / "rows", split).split("<|endoftext|>")) for split in ("train", "val"))
    assert train & val == {""} and 20 < len(val) < 90 and len(train | val) == 501


@pytest.mark.parametrize("name, contents, message", [
    ("a.jsonl", b'{"text": "fine"}\n\n{"text": "cut', "a.jsonl, line 3 is not JSON"),
    ("a.jsonl", b'{"content": "x", "id": 1}\n', "line 1 has no text in 'text', it has content, id; choose with --col"),
    ("a.jsonl", b'["x"]\n', "a.jsonl, line 1 has no text in 'text', it has list"),
    ("a.txt", b"x" * (1 << 16) + b"caf\xe9 ", "a.txt is not UTF-8 at byte 65539"),
    ("a.txt", "é".encode() * (1 << 15) + b"\xc3", "a.txt is not UTF-8 at byte 65536"),
    ("a.txt", b"x" * ((1 << 16) - 1) + b"\xc3(", "a.txt is not UTF-8 at byte 65535"),
    ("a.txt.xz", lzma.compress(b"x" * 1000)[:-20], "a.txt.xz is damaged or cut"),
    ("a.txt.gz", b"not gzip", "a.txt.gz is damaged or cut"),
    ("a.pdf", b"%PDF", "holds no .txt, .jsonl or .parquet .*; found a.pdf"),
])  # fmt: skip
def test_bad_text_is_named_in_one_line(tmp_path, name, contents, message):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(UserError, match=message) as error:
        prepare_own(tmp_path, tmp_path / "corpus")
    assert "\n" not in str(error.value)


@settings(deadline=None)
@given(st.text(min_size=1, max_size=60), st.integers(1, 7))
def test_text_is_read_whole_whatever_the_reads_cut(tmp_path_factory, text, size):
    file = tmp_path_factory.mktemp("read") / "text.txt"
    file.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.texts, "READ_BYTES", size)
        parts = list(read_file(file))
    assert "".join(part for part, _ in parts) == text.removeprefix("\ufeff")
    assert [ends for _, ends in parts] == [False] * (len(parts) - 1) + [True] * bool(parts)


@given(st.lists(st.text("ab", min_size=1, max_size=5), min_size=1), st.integers(0, 30))
def test_cut_by_position_keeps_every_character(parts, train_characters):
    pieces = list(cut_by_position([(part, i == len(parts) - 1) for i, part in enumerate(parts)], train_characters))
    text = "".join(parts)
    for split, wanted in (("train", text[:train_characters]), ("val", text[train_characters:])):
        own = [piece for piece in pieces if piece.split == split]
        assert "".join(piece.text for piece in own) == wanted
        assert [piece.ends_document for piece in own] == [False] * (len(own) - 1) + [True] * bool(own)


# The other scripts


def test_pystdlib_is_prepared_without_a_network(tmp_path):
    pystdlib.prepare(pystdlib.Options(name=str(tmp_path)))
    train, val = (open_corpus(str(tmp_path), split) for split in ("train", "val"))
    assert train.tokens > 8_000_000 and 0.02 < val.tokens / train.tokens < 0.1
    assert train.vocab_size == 256 and train.max_token == 255
    assert bytes(train.window(0, 50).tolist()).decode().startswith('"""Record of phased-in incompatible language')


def test_shakespeare_refuses_another_text(tmp_path):
    (tmp_path / "input.txt").write_text("Not by him.")
    with pytest.raises(UserError, match="is not Tiny Shakespeare"):
        shakespeare_char.main(shakespeare_char.Options(name=str(tmp_path / "corpus"), path=str(tmp_path)))


@needs_shared
def test_shakespeare_is_that_of_nanogpt(tmp_path):
    shakespeare_char.main(shakespeare_char.Options(name=str(tmp_path), path=str(SHARED / "tinyshakespeare")))
    train, val = (open_corpus(str(tmp_path), split) for split in ("train", "val"))
    assert (train.vocab_size, train.tokens, val.tokens) == (65, 1_003_854, 111_540)


def test_wikitext_has_one_article_per_document(tmp_path):
    lines = " \n = First = \n \n Text . \n = = Section = = \n More . \n \n = Second = \n \n Text = = . \n"
    for name in ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"):
        (tmp_path / name).write_text(lines)
    options = wikitext103.Options(name=str(tmp_path / "corpus"), path=str(tmp_path), tokenizer="byte")
    wikitext103.main(options)
    first, second = lines.split(" = Second")
    documents = [" \n", first.removeprefix(" \n"), " = Second" + second]
    assert text_of(tmp_path / "corpus", "train").split("<|endoftext|>") == [*documents, ""]


def test_webtext_stops_at_so_many_tokens(tmp_path):
    source = write_jsonl(tmp_path / "text.jsonl", [f"Document {i}. " * 30 for i in range(5000)])
    arguments = [f"--path={source}", "--tokenizer=byte", "--shard_tokens=300000"]
    webtext.main(parse([*arguments, f"--name={tmp_path / 'few'}", "--tokens=1e5"], webtext.Options))
    assert 1e5 <= open_corpus(str(tmp_path / "few"), "train").tokens < 1e6
