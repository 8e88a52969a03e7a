"""eval.py against a plain loop over positions in float64, and as a user runs it.

    .venv/bin/pytest tests/test_eval.py        CPU, about 25 s
"""

import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run, run_here

import data
import eval as evaluation
import train
from config import TrainConfig, UserError
from data.tokenizers import load_tokenizer
from lpa import checkpoint, perplexity
from lpa.distributed import DistInfo
from model import GPT

CPU = DistInfo(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few steps of a small model, enough for losses that differ from token to token."""
    out = tmp_path_factory.mktemp("eval") / "run"
    size = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=24", "--lowdim.q=8", "--lowdim.v=8"]
    steps = ["--batch_size=8", "--max_steps=20", "--learning_rate=0.01", "--eval_tokens=240"]
    run_here(["train.py", *size, *steps, f"--dataset={corpus}", f"--out_dir={out}", "--device=cpu"])
    return out


@pytest.fixture(scope="module")
def short(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same kind of corpus with a val split of a few hundred tokens, so that a loop over them is quick."""
    folder = tmp_path_factory.mktemp("short")
    text = "one two\nthree\n\n" * 20 + "the  end"
    (folder / "train.txt").write_text(text * 5)
    (folder / "val.txt").write_text(text)
    run("-m", "data.own_text.prepare", f"--path={folder}", f"--name={folder / 'prepared'}", "--tokenizer=byte")
    return folder / "prepared"


def plain_loop(model: GPT, tokens: list[int], stride: int) -> float:
    """Each position on its own, from the window of the definition: the first one on the grid that reaches it."""
    block, losses = model.config.block_size, []
    for target in range(1, len(tokens)):
        k = max(0, math.ceil((target - block) / stride))
        context = torch.tensor([tokens[k * stride : target]])
        losses.append(-model(context)[0, -1].log_softmax(-1)[tokens[target]].item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("stride", [24, 7, 1])
def test_all_targets_once_as_a_plain_loop(trained: Path, short: Path, stride: int) -> None:
    model, _, _ = checkpoint.load_model(trained, torch.device("cpu"))
    corpus = data.open_corpus(str(short), "val")
    ours = perplexity.evaluate(model, corpus, stride, 5, "float32", CPU)
    with torch.no_grad():
        reference = plain_loop(model.double(), corpus.window(0, corpus.tokens).tolist(), stride)
    assert corpus.tokens % 24 > 1  # there is a tail
    assert ours == pytest.approx(reference, rel=0, abs=1e-6)


@pytest.mark.parametrize(("tokens", "block", "stride"), [(2, 8, 8), (9, 8, 8), (10, 8, 8), (50, 8, 3), (50, 8, 1)])
def test_windows_cover_each_target_once(tokens: int, block: int, stride: int) -> None:
    found = perplexity.windows(tokens, block, stride)
    targets = [target for _, scored, end in found for target in range(scored, end + 1)]
    assert targets == list(range(1, tokens))
    assert all(start < scored and end - start <= block for start, scored, end in found)
    assert all(scored - start > block - stride for start, scored, _ in found[1:])


def test_words_are_counted_as_published(short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = data.open_corpus(str(short), "val")
    tokenizer = load_tokenizer(short, corpus.meta["tokenizer"])
    assert perplexity.count_words(corpus, tokenizer) == 20 * (3 + 3) + 2
    monkeypatch.setattr(perplexity, "CHUNK", 3)  # words that go on in the next chunk are one
    assert perplexity.count_words(corpus, tokenizer) == 20 * (3 + 3) + 2


def test_wikitext_2_has_its_published_words(tmp_path: Path) -> None:
    text = ROOT.parent / "shared" / "data" / "wikitext2" / "test.txt"
    if not text.exists():
        pytest.skip("WikiText-2 is not at hand")
    (tmp_path / "test.txt").write_bytes(text.read_bytes())
    for split in ("train", "valid"):
        (tmp_path / f"{split}.txt").write_text(" = Title = \n words \n")
    places = [f"--path={tmp_path}", f"--name={tmp_path / 'out'}", "--tokenizer=byte"]
    run("-m", "data.wikitext103.prepare", *places)
    corpus = data.open_corpus(str(tmp_path / "out"), "test")
    assert perplexity.count_words(corpus, load_tokenizer(tmp_path, corpus.meta["tokenizer"])) == 245_569


def test_two_ranks_say_what_one_says(trained: Path, short: Path) -> None:
    arguments = ["eval.py", str(trained), f"--dataset={short}", "--device=cpu", "--json", "--stride=10"]
    alone = json.loads(run(*arguments).stdout)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    both = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert both.returncode == 0, both.stderr
    together = json.loads(both.stdout)
    assert together["nats_per_token"] == pytest.approx(alone["nats_per_token"], rel=0, abs=1e-9)
    assert together.keys() == alone.keys()
    text_bytes = data.open_corpus(str(short), "val").bytes
    nats = alone["nats_per_token"]
    assert alone["perplexity"] == pytest.approx(math.exp(nats))
    assert alone["bits_per_byte"] == pytest.approx(nats * (alone["targets"] + 1) / text_bytes / math.log(2))
    assert alone["word_perplexity"] == pytest.approx(math.exp(nats * (alone["targets"] + 1) / 122))


def test_disjoint_windows_agree_with_training(trained: Path, corpus: Path) -> None:
    """train.py leaves out the tail; on a split whose windows fit exactly the two are the same number."""
    model, _, _ = checkpoint.load_model(trained, torch.device("cpu"))
    whole = data.open_corpus(str(corpus), "val")
    tail = (whole.tokens - 1) % 24
    nats = perplexity.evaluate(model, whole, 24, 8, "float32", CPU)
    c = TrainConfig(gpt=model.config, batch_size=8)
    theirs = train.evaluate(model, partial(data.eval_batch, whole, 24), data.eval_windows(whole, 24), c, CPU)
    assert nats == pytest.approx(theirs, abs=8 * tail / whole.tokens + 1e-6)


def test_bad_input_is_one_line(trained: Path, short: Path, tmp_path: Path) -> None:
    def complaint(run_folder: Path, **options: object) -> str:
        with pytest.raises(UserError) as error:
            evaluation.main(evaluation.EvalConfig(run_folder, device="cpu", **options))
        assert "\n" not in str(error.value)
        return str(error.value)

    with pytest.raises(ValueError, match="limit and num_fewshot need --tasks"):
        evaluation.EvalConfig(trained, limit=10)
    assert "holds no checkpoint" in complaint(tmp_path / "nothing")
    assert "holds no checkpoint" in complaint(tmp_path)
    assert "no split 'test'; it has train, val" in complaint(trained, split="test")
    assert "no corpus absent" in complaint(trained, dataset="absent")
    assert "stride is 25, wanted at most block_size = 24" in complaint(trained, stride=25)
    other = tmp_path / "other"
    shutil.copytree(short, other)
    meta = json.loads((other / "meta.json").read_text())
    meta["tokenizer"] = {"kind": "char", "vocab_size": 256, "characters": "abc"}
    (other / "meta.json").write_text(json.dumps(meta))
    assert "has the tokenizer char, the checkpoint byte" in complaint(trained, dataset=str(other))


def test_an_error_leaves_no_traceback(tmp_path: Path) -> None:
    said = run("eval.py", str(tmp_path / "nothing"), expect=2).stderr
    assert said == f"error: {tmp_path}/nothing holds no checkpoint: train first, or name a run folder\n"
