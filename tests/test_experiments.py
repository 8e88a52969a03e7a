"""The experiments: what they do to a model, and how they read the runs that they made.

    .venv/bin/pytest tests/test_experiments.py        CPU, seconds
"""

import json
from pathlib import Path

import pytest
import torch

from experiments import factor_init, optimizers, time_to_loss
from lpa import optim
from model import GPT, GPTConfig, LowDim

SMALL = dict(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=64, lowdim=LowDim(q=8, k=8, v=6, o=8))


def log(folder: Path, *records: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_a_run_reaches_its_target_at_the_first_evaluation_below_it(tmp_path: Path) -> None:
    steps = [dict(step=s, loss=3.0, seconds=2.5 * s) for s in (10, 20, 30)]
    losses = [dict(step=s, val_loss=x, val_bits_per_byte=x) for s, x in ((10, 2.1), (20, 1.9), (30, 1.8))]
    run = log(tmp_path, *(record for pair in zip(steps, losses) for record in pair))
    assert time_to_loss.reached(run, 1.9) == time_to_loss.Finish(50.0, 20, 1.9, 50.0)
    assert time_to_loss.reached(run, 1.7) == time_to_loss.Finish(None, None, 1.8, 75.0)


def test_the_median_counts_a_run_that_never_arrives_as_the_slowest() -> None:
    never, fast, slow = (time_to_loss.Finish(seconds, 1, 1.0, 9.0) for seconds in (None, 2.0, 3.0))
    assert time_to_loss.median([never, slow, fast]) == 3.0
    assert time_to_loss.median([never, never, fast]) is None


def test_a_preset_is_timed_once_for_its_options_and_tokens(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    preset = tmp_path / "tiny.py"
    preset.write_text(
        f"dataset = {str(corpus)!r}\nn_layer = 1\nn_head = 2\nn_embd = 16\nblock_size = 16\nbatch_size = 2\n"
        "max_steps = 6\neval_interval = 2\neval_tokens = 3200\ndevice = 'cpu'\n"
    )
    o = time_to_loss.Options(target=1e-9, presets=(str(preset),), seeds=1)
    time_to_loss.main(o)
    written = {run: (run / "log.jsonl").stat().st_mtime_ns for run in (tmp_path / "out/time_to_loss").iterdir()}
    assert len(written) == 1
    time_to_loss.main(o)
    assert written == {run: (run / "log.jsonl").stat().st_mtime_ns for run in written}
    assert "| not reached | not in " in next((tmp_path / "results").iterdir()).read_text()
    assert {time_to_loss.reached(run, 99.0).steps for run in written} == {2}
    preset.write_text(preset.read_text() + "n_layer = 2\n")
    assert time_to_loss.train_once(o, str(preset), 1) not in written


def test_a_start_is_trained_anew_for_another_preset(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    preset = tmp_path / "tiny.py"
    preset.write_text("n_layer = 1\nn_head = 2\nn_embd = 16\nblock_size = 16\nbatch_size = 2\ndevice = 'cpu'\n")
    o = factor_init.Options(str(preset), str(corpus), steps=2)
    losses = [factor_init.trained(o, "matched", {}, 1e-3, 1) for _ in range(2)]
    assert losses[0] == losses[1]
    assert len(list((tmp_path / "out/factor_init").iterdir())) == 1
    preset.write_text(preset.read_text() + "n_embd = 32\n")
    assert factor_init.trained(o, "matched", {}, 1e-3, 1) != losses[0]


def test_heads_of_b_are_made_orthogonal_one_by_one() -> None:
    model = GPT(GPTConfig(**SMALL))
    muon = optimizers.FactorMuon([dict(params=list(model.transformer.h.parameters()))], 1.0, False, model, "heads")
    attention = model.transformer.h[0].attn
    params = [attention.q.B, attention.o.B, model.transformer.h[1].attn.k.B]  # all (32, 8); o has no heads to its B
    momentum = torch.randn(3, 32, 8)
    update = muon.direction(momentum, params)
    for i in (0, 2):
        for head in range(4):
            rows = slice(8 * head, 8 * head + 8)
            torch.testing.assert_close(update[i, rows], 0.5 * optim.orthogonal(momentum[i, rows][None])[0])
    torch.testing.assert_close(update[1], optim.orthogonal(momentum[1:2])[0])


def test_a_bounded_step_changes_the_product_by_at_most_the_rate() -> None:
    """Spectron: |B A| moves by no more than the rate, in the largest singular value, to first order and beyond."""
    model = GPT(GPTConfig(**SMALL))
    layer = model.transformer.h[0].attn.q
    layer.A.data.mul_(20), layer.B.data.mul_(20)
    muon = optimizers.FactorMuon([dict(params=[layer.A, layer.B])], 1.0, False, model, "spectron")
    rate = 0.01
    a = layer.A - rate * muon.direction(torch.randn(1, *layer.A.shape), [layer.A])[0]
    b = layer.B - rate * muon.direction(torch.randn(1, *layer.B.shape), [layer.B])[0]
    moved = torch.linalg.matrix_norm(b @ a - layer.B @ layer.A, 2)
    assert 0.2 * rate < moved < 1.25 * rate  # orthogonal() leaves singular values of up to 1.2


def test_decay_of_the_product_is_a_step_down_its_frobenius_norm() -> None:
    model = GPT(GPTConfig(**SMALL)).double()
    layer = model.transformer.h[1].attn.v
    loss = (layer.B @ layer.A).square().sum() / 2
    grads = torch.autograd.grad(loss, [layer.A, layer.B])
    expected = [p.detach() - 0.3 * grad for p, grad in zip((layer.A, layer.B), grads)]
    optimizers.decay_products(model, 0.3)
    torch.testing.assert_close([layer.A.data, layer.B.data], expected, atol=1e-12, rtol=0)


def test_the_arms_of_the_optimizer_experiment_train(tmp_path: Path, corpus: Path) -> None:
    """Every rule, for two steps: each parameter in one group once, finite, and another rule is another result."""
    shape = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16"]
    (tmp_path / "tiny.py").write_text("\n".join(line[2:] for line in shape) + "\nlowdim = dict(q=4, k=4, v=4, o=4)\n")
    o = optimizers.Options(preset=str(tmp_path / "tiny.py"), dataset=str(corpus), steps=3, eval_tokens=64)
    results = [optimizers.trained(optimizers.config(o, arm, 1e-2, 1), arm) for arm in optimizers.ARMS.values()]
    values = [result["bits_per_byte"] for result in results]
    assert all(0 < value < 16 for value in values)
    assert len(set(values)) >= len(values) - 2  # without weight decay both kinds of it are nothing
