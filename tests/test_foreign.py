"""Token files of llm.c, modded-nanogpt and nanoGPT, written here by hand: `pytest tests/test_foreign.py`; about 15 s.

GPT-2's vocabulary comes from ../shared; without it the tests are skipped.
"""

import json
import math
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, read_log, run, run_here

from config import UserError
from data import batch, eval_batch, eval_windows, open_corpus
from data.tokenizers import tiktoken_encoding

CACHE = ROOT.parent / "shared" / "data" / "tiktoken_cache"
pytestmark = pytest.mark.skipif(not CACHE.is_dir(), reason="needs GPT-2's vocabulary in ../shared/data/tiktoken_cache")
TEXT = "Fußball – naïve café, 漢字 🙂, and so on and on; " * 200
SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=2", "--compile=off"]
SHORT = ["--max_steps=3", "--log_interval=1", "--eval_tokens=64", "--device=cpu"]


class Bomb:
    """A pickle that ends the test when it is let run what it wants."""

    def __reduce__(self) -> tuple:
        return pytest.fail, ("meta.pkl ran code",)


@pytest.fixture(autouse=True)
def vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
        gpt2 = tiktoken_encoding("gpt2")
    return np.array([gpt2.end_of_text, *gpt2.encode(TEXT)], dtype="<u2")


def header(*numbers: int) -> bytes:
    return struct.pack("<256i", *numbers, *[0] * (256 - len(numbers)))


def as_llm_c(path: Path, tokens: np.ndarray) -> None:
    path.write_bytes(header(20240520, 1, len(tokens)) + tokens.tobytes())


def folder_of(kind: str, folder: Path, tokens: np.ndarray) -> Path:
    """train: all tokens; val: the first 1,000 of them."""
    if kind == "nanoGPT":
        tokens.tofile(folder / "train.bin")
        tokens[:1000].tofile(folder / "val.bin")
    elif kind == "llm.c":
        as_llm_c(folder / "tiny_stories_train.bin", tokens)
        as_llm_c(folder / "tiny_stories_val.bin", tokens[:1000])
    else:
        cuts = np.split(tokens, [700, 1701])
        for number, shard in enumerate(cuts, start=1):
            as_llm_c(folder / f"fineweb_train_{number:06d}.bin", shard)
        as_llm_c(folder / "fineweb_val_000000.bin", tokens[:1000])
    return folder


@pytest.mark.parametrize("kind", ["llm.c", "modded-nanogpt", "nanoGPT"])
def test_batches_are_slices_of_the_tokens(tmp_path: Path, tokens: np.ndarray, kind: str) -> None:
    folder = folder_of(kind, tmp_path, tokens)
    train, val = (open_corpus(str(folder), split) for split in ("train", "val"))
    assert (train.tokens, val.tokens, train.vocab_size) == (len(tokens), 1000, 50257)
    assert train.max_token == 50256
    around = np.concatenate([tokens, tokens])
    for step in range(20):
        x, y = batch(train, 30, 4, seed=1, step=step)
        for inputs, targets in zip(x.numpy(), y.numpy()):
            starts = np.flatnonzero((np.lib.stride_tricks.sliding_window_view(around, 30) == inputs).all(1))
            assert any((around[start + 1 : start + 31] == targets).all() for start in starts)
    x, _ = eval_batch(val, 50, eval_windows(val, 50))
    np.testing.assert_array_equal(x.flatten(), tokens[: 19 * 50])
    # What is counted is the text itself; the end of a text has no bytes.
    assert train.bytes == len(TEXT.encode())
    assert not list(folder.glob("meta.json"))


def test_a_run_trains_and_samples(tmp_path: Path, tokens: np.ndarray) -> None:
    folder, out = folder_of("nanoGPT", tmp_path, tokens), tmp_path / "run"
    run_here(["train.py", *SMALL, *SHORT, f"--dataset={folder}", f"--out_dir={out}"])
    *steps, evaluation = read_log(out)
    assert [record["step"] for record in steps] == [1, 2, 3]
    nats = 1000 / len(tiktoken_encoding("gpt2").decode(tokens[1:1000]).encode("utf-8", "replace"))  # a nat a token
    assert evaluation["val_bits_per_byte"] == pytest.approx(evaluation["val_loss"] * nats / math.log(2), rel=2e-3)
    said = run("sample.py", str(out), "--prompt=naïve café", "--max_new_tokens=3", env={"TIKTOKEN_CACHE_DIR": "/none"})
    assert said.stdout.startswith("naïve café")
    manifest = json.loads((out / "ckpt" / "step_3" / "manifest.json").read_text())
    assert manifest["tokenizer"] == open_corpus(str(folder), "val").meta["tokenizer"]  # which eval.py asks for


def test_other_data_is_not_resumed_on(tmp_path: Path, tokens: np.ndarray) -> None:
    folder = folder_of("modded-nanogpt", tmp_path, tokens)
    before = open_corpus(str(folder), "train").fingerprint
    assert open_corpus(str(folder), "train").fingerprint == before
    as_llm_c(folder / "fineweb_train_000002.bin", tokens[701:1702])
    assert open_corpus(str(folder), "train").fingerprint != before


def test_nanogpt_s_characters_are_those_of_its_meta_pkl(tmp_path: Path) -> None:
    characters = sorted(set(TEXT))
    ids = np.array([characters.index(c) for c in TEXT], dtype="<u2")
    ids[:5000].tofile(tmp_path / "train.bin")
    ids[5000:].tofile(tmp_path / "val.bin")
    stoi = {c: i for i, c in enumerate(characters)}
    notes = dict(vocab_size=len(characters), itos=dict(enumerate(characters)), stoi=stoi)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(notes))
    val = open_corpus(str(tmp_path), "val")
    assert val.vocab_size == len(characters) and val.meta["tokenizer"]["kind"] == "char"
    assert val.bytes == len(TEXT[5000:].encode())
    turned = dict(stoi=dict(zip(reversed(characters), range(len(characters)))))
    words = dict(stoi=dict(the=0, owl=1))
    for wrong in (pickle.dumps(Bomb()), pickle.dumps(turned), pickle.dumps(words), pickle.dumps(notes)[:40], b""):
        (tmp_path / "meta.pkl").write_bytes(wrong)
        with pytest.raises(UserError, match=r"meta.pkl does not name characters as nanoGPT's does") as error:
            open_corpus(str(tmp_path), "val")
        assert "\n" not in str(error.value)


GOOD = np.arange(600, dtype="<u2").tobytes()


@pytest.mark.parametrize("file, contents, message", [
    ("a_train_000001.bin", header(20240521, 1, 600) + GOOD, r"starts with 20240521 1, wanted \(20240520, 1\)"),
    ("train.bin", header(20240521, 1, 600) + GOOD, r"starts with 20240521 1, wanted \(20240520, 1\)"),
    ("train.bin", header(20240520, 2, 600) + GOOD, r"starts with 20240520 2, wanted \(20240520, 1\)"),
    ("a_train.bin", GOOD, "starts with 65536 196610, wanted"),
    ("a_train.bin", header(20240801, 7, 300) + GOOD, "holds tokens of Llama 3"),
    ("a_train_1.bin", header(20240520, 1, 601) + GOOD, "has 2224 bytes, wanted 2226; it was cut"),
    ("train.bin", header(20240520, 1, 600) + GOOD[:-3], "has 2221 bytes, wanted 2224; it was cut"),
    ("a_train_1.bin", header(20240520, 1, 600)[:700], "has 700 bytes, wanted 2224; it was cut"),
    ("a_train_1.bin", b"", "has 0 bytes, wanted 1024"),
    ("a_train_1.bin", header(20240520, 1, 0), "holds no tokens"),
    ("train.bin", GOOD[:-1], "has 1199 bytes, an odd number; wanted uint16 tokens"),
    ("train.bin", b"", "holds no tokens"),
    ("train.bin", np.array([1, 50257], dtype="<u2").tobytes(), "holds token 50257, wanted below vocab_size = 50257"),
])  # fmt: skip
def test_a_bad_file_is_one_line(tmp_path: Path, file: str, contents: bytes, message: str) -> None:
    (tmp_path / file).write_bytes(contents)
    with pytest.raises(UserError, match=message) as error:
        open_corpus(str(tmp_path), "train")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_of_two_corpora_or_no_val_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.bin").mkdir()
    (tmp_path / "val.bin").symlink_to(tmp_path / "absent")
    with pytest.raises(UserError, match="no corpus"):
        open_corpus(str(tmp_path), "train")
    as_llm_c(tmp_path / "stories_train.bin", np.arange(50, dtype="<u2"))
    with pytest.raises(UserError, match="has no split 'val'; it has train"):
        open_corpus(str(tmp_path), "val")
    as_llm_c(tmp_path / "web_val.bin", np.arange(50, dtype="<u2"))
    with pytest.raises(UserError, match="holds token files of stories, web, wanted a folder for each"):
        open_corpus(str(tmp_path), "train")
