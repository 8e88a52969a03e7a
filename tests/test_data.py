"""Shards, batches and tokenizers: `pytest tests/test_data.py`; one CPU core, seconds, no network.

The prepare scripts are in test_prepare.py.
"""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config import UserError
from data import Corpus, batch, eval_batch, eval_windows, open_corpus, permuted, sample_start
from data.tokenizers import ByteTokenizer, CharTokenizer, load_tokenizer, train_bpe

ROOT = Path(__file__).parent.parent
ENGLISH = "The quick brown fox doesn't jump over 12 lazy dogs; the dog's 34th nap, they'll say, isn't over!\n\n"


def header(*numbers: int) -> bytes:
    return struct.pack("<256i", *numbers, *[0] * (256 - len(numbers)))


def make_corpus(folder: Path, shards: list[np.ndarray], dtype: str = "uint16", vocab_size: int = 60000) -> Corpus:
    """A train split, written as the format of llm.c says and without the code under test."""
    described = []
    for i, tokens in enumerate(shards):
        magic, version = {"uint16": (20240520, 1), "uint32": (20240801, 7)}[dtype]
        contents = header(magic, version, len(tokens)) + tokens.astype(dtype).tobytes()
        (folder / f"train_{i:05d}.bin").write_bytes(contents)
        described.append({"file": f"train_{i:05d}.bin", "tokens": len(tokens), "sha256": f"{i}"})
    total = {"tokens": sum(map(len, shards)), "bytes": 7, "documents": 1, "max_token": int(max(map(max, shards)))}
    meta = {"format": 1, "tokenizer": {"kind": "byte"}, "vocab_size": vocab_size, "dtype": dtype, "end_of_text": None}
    meta["splits"] = {"train": {**total, "shards": described}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return open_corpus(str(folder), "train")


def counted(folder: Path, *lengths: int) -> Corpus:
    """Token i of the split is i, over shards of these lengths."""
    return make_corpus(folder, np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1]))


# Opening


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what a process has open on Linux only")
def test_no_shard_stays_open_or_mapped(tmp_path):
    """A map that stayed open would make the process grow by every page it has read."""
    corpus = counted(tmp_path, 3000, 3000)
    for step in range(50):
        batch(corpus, 32, 4, 1, step)
    opened = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert str(tmp_path) not in Path("/proc/self/maps").read_text() + "\n".join(opened)


def test_windows_read_over_shards_and_around_the_end(tmp_path):
    corpus = counted(tmp_path, 10, 1, 14)
    for start in range(50):
        expected = np.arange(start, start + 60) % 25
        np.testing.assert_array_equal(corpus.window(start, 60), expected)
    assert corpus.window(0, 3).dtype == np.int64


def test_tokens_above_65535_survive(tmp_path):
    corpus = make_corpus(tmp_path, [np.array([1, 65536, 99_999])], "uint32", 100_000)
    assert corpus.window(0, 3).tolist() == [1, 65536, 99_999]


@pytest.mark.parametrize("contents, message", [
    (header(20240520, 1, 10) + b"\0" * 19, "has 1043 bytes, wanted 1044"),
    (header(0, 0, 0) + b"\0" * 20, "starts with 0 0, wanted"),
    (header(20240801, 7, 10) + b"\0" * 20, "for a shard of uint16"),
    (header(20240520, 2, 10) + b"\0" * 20, "starts with 20240520 2, wanted"),
    (header(20240520, 1, 9) + b"\0" * 20, "a header for 9 tokens, wanted 10"),
    (None, "is missing, wanted a shard of 10 tokens"),
])  # fmt: skip
def test_a_bad_shard_is_named_in_one_line(tmp_path, contents, message):
    counted(tmp_path, 10, 10)
    shard = tmp_path / "train_00001.bin"
    shard.unlink() if contents is None else shard.write_bytes(contents)
    with pytest.raises(UserError, match=message) as error:
        open_corpus(str(tmp_path), "train")
    assert shard.name in str(error.value) and "\n" not in str(error.value)


def test_a_shard_cut_after_opening_is_noticed(tmp_path):
    corpus = counted(tmp_path, 10)
    (tmp_path / "train_00000.bin").write_bytes((tmp_path / "train_00000.bin").read_bytes()[:-4])
    with pytest.raises(UserError, match="ends after 8 tokens, wanted 10"):
        corpus.window(0, 10)


def test_what_cannot_be_opened_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("data.DATA", tmp_path)
    (tmp_path / "webtext").mkdir()
    (tmp_path / "webtext" / "prepare.py").touch()
    with pytest.raises(UserError, match=r"run: python -m data\.webtext\.prepare"):
        open_corpus("webtext", "train")
    with pytest.raises(UserError, match=r"data\.own_text\.prepare --path=TEXT --name=books"):
        open_corpus("books", "train")
    (tmp_path / "webtext" / "progress.jsonl").touch()
    with pytest.raises(UserError, match="not finished"):
        open_corpus("webtext", "train")
    (tmp_path / "books").mkdir()
    counted(tmp_path / "books", 10)
    assert open_corpus("books", "train").tokens == 10
    with pytest.raises(UserError, match="has no split 'val'; it has train"):
        open_corpus("books", "val")
    (tmp_path / "books" / "meta.json").write_text("[]")
    with pytest.raises(UserError, match=r"meta\.json is not"):
        open_corpus("books", "train")


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds token 300, wanted below vocab_size = 300"):
        make_corpus(tmp_path, [np.array([300])], vocab_size=300)


# Batches


@settings(deadline=None)
@given(st.integers(1, 700), st.binary(min_size=1, max_size=20))
def test_permuted_is_a_permutation(n, key):
    assert sorted(permuted(i, n, key) for i in range(n)) == list(range(n))


def test_permuted_takes_no_table_and_spreads():
    n = 10**12 + 1
    images = [permuted(i, n, b"1/0") for i in range(2000)]
    assert len(set(images)) == 2000
    assert abs(np.mean(images) / n - 0.5) < 0.03
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.1


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 400), st.integers(1, 40), st.integers(0, 5), st.integers(0, 3))
def test_every_token_is_a_target_once_an_epoch(tokens, block_size, seed, epoch):
    """All but a rest shorter than a block."""
    windows = max(1, tokens // block_size)
    if tokens < block_size + 1:
        return
    starts = [sample_start(tokens, block_size, seed, epoch * windows + i) for i in range(windows)]
    targets = np.concatenate([np.arange(start + 1, start + 1 + block_size) % tokens for start in starts])
    assert len(np.unique(targets)) == len(targets) == tokens - tokens % block_size


def all_samples(corpus: Corpus, steps: int, sequences: int, micro_steps: int, world_size: int) -> list[torch.Tensor]:
    """The inputs of each step, all ranks and micro-steps together."""
    size = sequences // micro_steps // world_size
    return [
        torch.cat([
            batch(corpus, 8, size, 3, step, micro, micro_steps, rank, world_size)[0]
            for micro in range(micro_steps)
            for rank in range(world_size)
        ])
        for step in range(steps)
    ]  # fmt: skip


def test_a_step_has_the_same_samples_for_any_number_of_ranks(tmp_path):
    corpus = counted(tmp_path, 100, 57, 203)
    reference = all_samples(corpus, 8, 6, 1, 1)
    for micro_steps, world_size in [(1, 2), (1, 3), (2, 1), (3, 2), (6, 1), (1, 6)]:
        for ours, theirs in zip(all_samples(corpus, 8, 6, micro_steps, world_size), reference):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_of_batches_covers_the_split(tmp_path, world_size):
    corpus = counted(tmp_path, 31, 200, 9)  # 240 tokens are 30 windows of 8: an epoch is 5 steps of 6
    seen = []
    for step in range(5, 10):
        for rank in range(world_size):
            x, y = batch(corpus, 8, 6 // world_size, 1, step, rank=rank, world_size=world_size)
            assert x.shape == y.shape == (6 // world_size, 8) and x.dtype == y.dtype == torch.int64
            assert torch.equal(y, (x + 1) % 240)
            seen.append(y.flatten())
    assert torch.cat(seen).sort().values.tolist() == list(range(240))


def test_epochs_and_seeds_differ_in_order_and_borders(tmp_path):
    starts = {
        (seed, epoch): [sample_start(10_000, 64, seed, epoch * 156 + i) for i in range(156)]
        for seed in (1, 2)
        for epoch in range(4)
    }
    assert len({min(start % 64 for start in each[:20]) for each in starts.values()}) > 4
    orders = {tuple((start - each[0]) % 10_000 // 64 for start in each) for each in starts.values()}
    assert len(orders) == 8


def test_batches_are_the_same_in_a_fresh_process_at_any_step(tmp_path):
    corpus = counted(tmp_path, 1000, 999)
    x, _ = batch(corpus, 16, 4, 7, 12345, micro_step=1, micro_steps=2, rank=1, world_size=2)
    code = (
        f"from data import batch, open_corpus; c = open_corpus({str(tmp_path)!r}, 'train');"
        "print(batch(c, 16, 4, 7, 12345, 1, 2, 1, 2)[0].tolist())"
    )
    fresh = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(fresh.stdout) == x.tolist()


def test_the_order_is_the_one_of_all_versions():
    """Written down once: a change here would change what every resumed run reads."""
    assert [sample_start(1000, 10, 1, g) for g in (0, 1, 2, 100, 12345)] == [272, 282, 842, 449, 969]


def test_a_corpus_shorter_than_a_block_is_refused(tmp_path):
    corpus = counted(tmp_path, 16)
    assert batch(corpus, 15, 2, 1, 0)[0].shape == (2, 15)
    for read in (lambda: batch(corpus, 16, 2, 1, 0), lambda: eval_windows(corpus, 16)):
        with pytest.raises(UserError, match="has 16 tokens, shorter than a block: wanted block_size \\+ 1 = 17"):
            read()


# Evaluation


@settings(deadline=None, max_examples=30)
@given(st.integers(20, 300), st.integers(1, 19), st.integers(1, 4))
def test_eval_windows_are_disjoint_and_complete(tmp_path_factory, tokens, block_size, world_size):
    corpus = counted(tmp_path_factory.mktemp("eval"), tokens)
    ranks = [eval_windows(corpus, block_size)[rank::world_size] for rank in range(world_size)]
    targets = torch.cat([eval_batch(corpus, block_size, windows)[1].flatten() for windows in ranks])
    count = (tokens - 1) // block_size * block_size
    assert targets.sort().values.tolist() == list(range(1, count + 1))


def test_fewer_eval_windows_are_spread_over_the_split(tmp_path):
    corpus = counted(tmp_path, 1001)
    assert eval_windows(corpus, 10, tokens=55).tolist() == [0, 20, 40, 60, 80]
    assert eval_windows(corpus, 10, tokens=3).tolist() == [0]
    assert len(eval_windows(corpus, 10, tokens=10**9)) == 100
    x, y = eval_batch(corpus, 10, eval_windows(corpus, 10)[100:])  # a rank without a window
    assert x.shape == y.shape == (0, 10)


# Tokenizers


def test_bytes_and_characters_come_back(tmp_path):
    text = "naïve – 漢字 🙂\r\n\0<|endoftext|>"
    for tokenizer in (ByteTokenizer(), CharTokenizer(set(text))):
        again = load_tokenizer(tmp_path, json.loads(json.dumps(tokenizer.save(tmp_path))))
        ids = again.encode(text)
        assert again.encode_array(text).tolist() == ids and max(ids) < again.vocab_size
        assert again.decode(ids) == text == b"".join(map(again.decode_bytes, ids)).decode()
        assert tokenizer.end_of_text not in ids


def test_unknown_characters_are_named():
    with pytest.raises(UserError, match=r"has no '\\x00' 'X' 'Y'; it knows the 3 characters"):
        CharTokenizer("abc").encode("aXbY\0c")
    with pytest.raises(UserError, match=r"has no '0' .* '9' and 2 more;"):
        CharTokenizer("abc").encode("a0123456789XY")


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([ENGLISH * 3, "été 漢字 naïve"], 320)


def test_bpe_comes_back_without_a_network(tmp_path, bpe):
    again = load_tokenizer(tmp_path, json.loads(json.dumps(bpe.save(tmp_path))))
    assert (again.vocab_size, again.end_of_text) == (320, 319)
    text = ENGLISH + "漢字 🙂\r\n\0<|endoftext|>"
    ids = again.encode(text)
    assert ids == bpe.encode(text) == again.encode_array(text).tolist()
    assert again.decode(ids) == text == b"".join(map(again.decode_bytes, ids)).decode()
    assert 319 not in ids and again.decode([319]) == "<|endoftext|>"
    spec = bpe.save(tmp_path)
    (tmp_path / "tokenizer.tiktoken").write_text("IQ== 0\n")
    with pytest.raises(UserError, match="is not the file that was saved"):
        load_tokenizer(tmp_path, spec)
    (tmp_path / "tokenizer.tiktoken").unlink()
    with pytest.raises(UserError, match="is missing"):
        load_tokenizer(tmp_path, spec)


@pytest.fixture(scope="module")
def hugging_face():
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    reference = tokenizers.Tokenizer(tokenizers.models.BPE())
    reference.pre_tokenizer = byte_level
    alphabet = byte_level.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=319, initial_alphabet=alphabet, show_progress=False)
    reference.train_from_iterator([ENGLISH * 3, "été 漢字 naïve"], trainer)
    return reference


@settings(deadline=None)
@given(st.text() | st.text("ab 't\n1!é\u2028\x1c\xa0"))
def test_bpe_gives_the_ids_of_hugging_face(bpe, hugging_face, text):
    assert bpe.encode(text) == hugging_face.encode(text).ids


def test_a_bpe_that_the_text_cannot_fill_is_refused():
    with pytest.raises(UserError, match=r"at most .* ids, wanted 5000"):
        train_bpe([ENGLISH], 5000)
    with pytest.raises(UserError, match="wanted 257 or more"):
        train_bpe([ENGLISH], 256)


def test_half_a_surrogate_pair_is_replaced(bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        assert tokenizer.decode(tokenizer.encode_array("a\ud800b")) == "a\ufffdb"
