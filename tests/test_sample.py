"""Drawing text, and sample.py as a user runs it; tests/test_decode.py has the cache.

    .venv/bin/pytest tests/test_sample.py        CPU, about 20 s
"""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run, run_here

import data
import data.own_text.prepare as own_text
from config import UserError, parse
from data.tokenizers import CharTokenizer
from lpa import checkpoint, decode
from model import GPT, GPTConfig, LowDim

SMALL = dict(n_layer=3, n_head=4, n_embd=32, block_size=24, vocab_size=96)


def randomised(**options: object) -> GPT:
    model = GPT(GPTConfig(**SMALL, **options)).eval()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data.normal_(0, 0.3, generator=generator)
    return model


def test_greedy_text_is_that_of_repeated_full_forwards() -> None:
    model = randomised(lowdim=LowDim(q=8, k=8, v=8, o=8))
    idx = torch.randint(96, (2, 5), generator=torch.Generator().manual_seed(2))
    drawn = torch.stack(list(decode.generate(model, idx, 19, vocab_size=90, temperature=0)), dim=1)
    text = idx
    for _ in range(19):
        text = torch.cat([text, model(text)[:, -1, :90].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(drawn, text[:, 5:])
    assert drawn.max() < 90


def test_text_goes_on_beyond_block_size() -> None:
    """When 24 tokens are in the cache, the last 12 of them and the new one begin it anew."""
    model = randomised()
    idx = torch.randint(96, (1, 20), generator=torch.Generator().manual_seed(2))
    drawn = torch.stack(list(decode.generate(model, idx, 30, vocab_size=96, temperature=0)), dim=1)
    text = torch.cat([idx, drawn], dim=1)
    assert drawn.shape == (1, 30)
    assert drawn[0, 4] == model(text[:, :24])[0, -1].argmax()
    assert drawn[0, 5] == model(text[:, 13:25])[0, -1].argmax()
    assert drawn[0, 6] == model(text[:, 13:26])[0, -1].argmax()


def test_text_stops_at_block_size_if_told() -> None:
    idx = torch.randint(96, (1, 20), generator=torch.Generator().manual_seed(2))
    drawn = list(decode.generate(randomised(), idx, 30, vocab_size=96, temperature=0, beyond="stop"))
    assert len(drawn) == 5  # the last one is drawn from 24 tokens, and would be the 25th


def test_a_prompt_longer_than_block_size_keeps_its_end() -> None:
    model = randomised()
    idx = torch.randint(96, (1, 60), generator=torch.Generator().manual_seed(2))
    long, short = (next(decode.generate(model, x, 1, 96, temperature=0)) for x in (idx, idx[:, -24:]))
    assert torch.equal(long, short)


def test_draws_follow_the_softmax_cut_by_top_k_and_top_p() -> None:
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    logits = p.log().expand(20_000, 4)
    generator = torch.Generator().manual_seed(1)

    def shares(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> torch.Tensor:
        tokens = decode.draw(logits, temperature, top_k, top_p, generator)
        return tokens.flatten().bincount(minlength=4) / len(logits)

    def close(measured: torch.Tensor, expected: list[float]) -> None:
        torch.testing.assert_close(measured, torch.tensor(expected), atol=0.02, rtol=0)

    close(shares(), [0.4, 0.3, 0.2, 0.1])
    close(shares(temperature=0.5), (p**2 / (p**2).sum()).tolist())
    close(shares(temperature=0), [1.0, 0, 0, 0])
    close(shares(top_k=2), [4 / 7, 3 / 7, 0, 0])
    close(shares(top_k=100), [0.4, 0.3, 0.2, 0.1])
    close(shares(top_p=0.6), [4 / 7, 3 / 7, 0, 0])  # 0.4 alone has not reached 0.6, 0.7 has
    close(shares(top_p=0.01), [1.0, 0, 0, 0])


# --- sample.py ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that has moved away from where it was trained."""
    out = tmp_path_factory.mktemp("runs") / "here"
    options = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=4", "--eval_tokens=640"]
    run_here(["train.py", *options, f"--dataset={corpus}", f"--out_dir={out}", "--max_steps=3", "--device=cpu"])
    return Path(shutil.move(out, out.with_name("there")))


def test_sample_writes_text_from_a_run_folder_alone(trained: Path) -> None:
    command = ["sample.py", str(trained), "--max_new_tokens=40", "--seed=3", "--device=cpu"]
    first = run(*command, "--prompt=def café").stdout
    assert first.startswith("def café")
    assert len(first) > len("def café\n")
    assert run(*command, "--prompt=def café").stdout == first
    assert run(*command[:-2], "--seed=4", "--prompt=def café").stdout != first
    several = run(*command, "--num_samples=2", "--temperature=1.2", "--top_k=20", "--top_p=0.9").stdout
    assert "--- sample 1" in several
    assert "--- sample 2" in several


@pytest.mark.parametrize("tokenizer", ["char", "bpe:270"])
def test_the_tokenizer_is_in_the_checkpoint_and_needs_no_corpus(tokenizer: str, tmp_path: Path) -> None:
    text, corpus, out = tmp_path / "text.txt", tmp_path / "corpus", tmp_path / "run"
    text.write_text("To be, or not to be, that is the question. " * 100)
    own_text.main(parse([f"--path={text}", f"--name={corpus}", f"--tokenizer={tokenizer}"], own_text.Options))
    options = ["--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=16", "--batch_size=2", "--max_steps=1"]
    run_here(["train.py", *options, f"--dataset={corpus}", f"--out_dir={out}", "--device=cpu"])
    ids = data.open_corpus(str(corpus), "train").window(0, 20).tolist()
    shutil.rmtree(corpus)
    _, ours, _ = checkpoint.load_model(out, torch.device("cpu"))
    assert text.read_text().startswith(ours.decode(ids))
    assert ours.encode(ours.decode(ids)) == ids
    drawn = run("sample.py", str(out), "--prompt=To be", "--max_new_tokens=5", "--device=cpu").stdout
    assert drawn.startswith("To be")
    assert len(drawn) > len("To be\n")


def test_sample_stops_with_a_message_when_the_context_is_full(trained: Path) -> None:
    result = run("sample.py", str(trained), "--prompt=import", "--max_new_tokens=40", "--device=cpu", "--beyond=stop")
    assert result.stderr == "note: stopped after 27 of 40 tokens: the context of 32 tokens is full\n"


def test_sample_reads_a_file_and_standard_input(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("import os\n")
    out = run("sample.py", str(trained), f"--prompt_file={tmp_path / 'prompt.txt'}", "--max_new_tokens=5").stdout
    assert out.startswith("import os\n")
    out = run("sample.py", str(trained), "--prompt=-", "--max_new_tokens=5", stdin="class X:").stdout
    assert out.startswith("class X:")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "nowhere holds no checkpoint"),
        (["{run}", "--temperature=-1"], "temperature is -1.0, wanted 0 or more"),
        (["{run}", "--top_p=2"], "top_p is 2.0, wanted above 0 and at most 1"),
        (["{run}", "--prompt_file=nowhere.txt"], "cannot read prompt_file nowhere.txt"),
        (["{run}", "--tempratur=1"], "--temperature"),
    ],
)
def test_bad_input_is_one_line(trained: Path, options: list[str], message: str) -> None:
    error = run("sample.py", *(option.format(run=trained) for option in options), expect=2).stderr
    assert message in error
    assert error.count("\n") == 1


def test_a_prompt_with_unknown_characters_names_them() -> None:
    with pytest.raises(UserError, match="'é'"):
        CharTokenizer("abc").encode("abé")


def test_a_checkpoint_cannot_run_code(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "evil"
    shutil.copytree(trained, copy)
    folder, _, _ = checkpoint.newest(copy)

    class Evil:
        def __reduce__(self) -> tuple:
            return print, ("code ran",)

    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="is no index of a sharded checkpoint: it asks for "):
        checkpoint.load_tensors(folder, "model")
