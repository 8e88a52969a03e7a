"""Training by subprocess, as a user runs it: exact resume, ranks, signals, broken files, bad input.

    .venv/bin/pytest tests/test_train.py        CPU, 2 cores, about 90 s
"""

import dataclasses
import errno
import gc
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, read_log, run, run_apart, run_here, run_ranks

import data
import train
from config import TrainConfig, UserError, load_config
from data.tokenizers import ByteTokenizer
from lpa import checkpoint, hardware, optim
from lpa.distributed import DistInfo, StopSignal
from lpa.nonfinite import NonFiniteCheck
from model import GPT, GPTConfig, LowDim

TINY = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", *(f"--lowdim.{x}=8" for x in "qkvo")]
TINY += ["--batch_size=4", "--log_interval=1", "--eval_interval=0", "--eval_tokens=640", "--compile=off"]
CPU = torch.device("cpu")


def arguments(corpus: Path, out: Path, *more: str) -> list[str]:
    return ["train.py", *TINY, f"--dataset={corpus}", f"--out_dir={out}", "--device=cpu", *more]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_log(out) if "loss" in line]


def tensors(out: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, weights and optimizer, by name."""
    folder = out / "ckpt" / f"step_{step}"
    parts = {part: checkpoint.load_tensors(folder, part) for part in ("model", "optimizer")}
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- Resume ------------------------------------------------------------------------------------------------------

STOCHASTIC = ["--dropout=0.2", "--tokens_per_step=256", "--warmup_steps=5", "--learning_rate=0.01"]

def drop_the_seed() -> None:
    """Train without dropout's seed of each step, and without anything that could restore the generator in its place."""
    torch.manual_seed(1)
    train.seed_dropout = lambda *_: None


def test_twenty_steps_equal_ten_and_a_resume_and_ten_bit_for_bit(corpus: Path, tmp_path: Path) -> None:
    whole, parts, output = tmp_path / "whole", tmp_path / "parts", tmp_path / "out.txt"
    options = [*STOCHASTIC, "--max_steps=20"]
    run_apart(arguments(corpus, whole, *options), output)
    run_apart(arguments(corpus, parts, *options, "--stop_step=10"), output)
    assert "continuing from" in run_apart(arguments(corpus, parts, *options, "--resume"), output)
    assert losses(parts) == losses(whole)
    assert len(losses(whole)) == 20
    assert same(tensors(parts, 20), tensors(whole, 20))

    # The control: the same test fails where the state of the random numbers is dropped.
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    for out, more in ((broken, "--stop_step=10"), (broken, "--resume"), (unbroken, "--resume=never")):
        run_apart(arguments(corpus, out, *options, more), output, hook="test_train.drop_the_seed")
    assert losses(broken)[:10] == losses(unbroken)[:10]
    assert losses(broken)[10:] != losses(unbroken)[10:]
    assert not same(tensors(broken, 20), tensors(unbroken, 20))


def test_a_resume_may_train_for_longer_but_not_another_model(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run_here(arguments(corpus, out, "--max_steps=3"))
    before = tensors(out, 3)
    with pytest.raises(UserError) as error:
        run_here(arguments(corpus, out, "--max_steps=5", "--resume", "--n_embd=48", "--lowdim.q=4"))
    assert "n_embd: the checkpoint has 32, this run 48" in str(error.value)
    assert "lowdim.q: the checkpoint has 8, this run 4" in str(error.value)
    assert "n_head" not in str(error.value)
    with pytest.raises(UserError) as error:
        run_here(arguments(corpus, out, "--max_steps=5", "--resume", "--seed=7", "--tokens_per_step=256"))
    assert "seed: the checkpoint has 1, this run 7" in str(error.value)
    assert "tokens_per_step: the checkpoint has 128, this run 256" in str(error.value)
    assert same(before, tensors(out, 3))
    run_here(arguments(corpus, out, "--max_steps=5", "--resume"))
    assert "is left" not in capsys.readouterr().out
    run_here(arguments(corpus, out, "--max_steps=5", "--resume"))
    assert "step_5: no step is left of 5\n" in capsys.readouterr().out
    assert [line["step"] for line in read_log(out) if "loss" in line] == [1, 2, 3, 4, 5]


def test_a_broken_checkpoint_is_named_and_passed_over(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run_here(arguments(corpus, out, "--max_steps=4", "--save_interval=2"))
    whole = tensors(out, 4)
    file = out / "ckpt" / "step_4" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"step_4/__0_0\.distcp is \d+ bytes, wanted \d+: this checkpoint is cut"):
        checkpoint.load_model(out / "ckpt" / "step_4", CPU)
    capsys.readouterr()
    run_here(arguments(corpus, out, "--max_steps=4", "--resume=auto"))
    printed = capsys.readouterr().out
    assert "step_4/__0_0.distcp is" in printed
    assert "continuing from" in printed
    assert same(tensors(out, 4), whole)

    for folder in (out / "ckpt").glob("step_*"):  # one flipped bit in each
        contents = bytearray((folder / "__0_0.distcp").read_bytes())
        contents[len(contents) // 2] ^= 1
        (folder / "__0_0.distcp").write_bytes(contents)
    with pytest.raises(UserError, match="its sha256 differs"):
        run_here(arguments(corpus, out, "--max_steps=4", "--resume=auto"))


@pytest.mark.parametrize(
    "place", ["torch.save", "json.dumps", "lpa.checkpoint.sync", "os.rename", "lpa.checkpoint.point"]
)
def test_a_crash_while_saving_leaves_a_whole_checkpoint(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving stops dead at one of the places where it touches the disk."""

    class Crash(BaseException):
        pass

    def crash(*_: object, **__: object) -> None:
        raise Crash

    def save(step: int) -> None:
        parts = {"model.x": torch.full((9,), step)}
        checkpoint.save(tmp_path, parts, dict(step=step, options={}), ByteTokenizer())

    save(1)
    with monkeypatch.context() as patch, pytest.raises((Crash, UserError)):  # DCP makes errors of its own of some
        patch.setattr(place, crash)
        save(2)
    folder, _, complaints = checkpoint.newest(tmp_path)
    assert complaints == []
    step = 2 if place == "lpa.checkpoint.point" else 1  # there the new one is whole, though `last` does not name it yet
    assert torch.equal(checkpoint.load_tensors(folder, "model")["x"], torch.full((9,), step))
    save(3)
    assert (tmp_path / "ckpt" / "last").read_text() == "step_3\n"
    assert not list(tmp_path.glob("ckpt/*.tmp"))


def test_a_checkpoint_newer_than_the_one_just_saved_was_broken_and_costs_it_nothing(tmp_path: Path) -> None:
    def save(step: int) -> None:
        parts = {"model.x": torch.full((9,), step)}
        checkpoint.save(tmp_path, parts, dict(step=step, options={}), ByteTokenizer())

    for step in (10, 20, 30):
        save(step)
    for step in (20, 30):
        (tmp_path / "ckpt" / f"step_{step}" / "__0_0.distcp").write_bytes(b"cut")
    save(15)
    assert checkpoint.newest(tmp_path)[0].name == "step_15"
    for step in (40, 50, 60):
        save(step)
    checkpoint.mark_best(tmp_path, 50, 1.5)
    for step in (70, 80):
        save(step)
    assert [folder.name for folder in checkpoint.steps(tmp_path)] == ["step_80", "step_70", "step_50"]
    assert checkpoint.read_manifest(tmp_path / "ckpt" / "step_50")["best_val_loss"] == 1.5


def test_a_resume_takes_the_options_of_this_run_for_the_optimizer(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run_here(arguments(corpus, out, "--max_steps=2", "--weight_decay=0.1"))
    capsys.readouterr()
    run_here(arguments(corpus, out, "--max_steps=4", "--weight_decay=0.3", "--resume"))
    assert re.search(r"AdamW +matrices .* decay 0\.3\n", capsys.readouterr().out)


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    run_here(arguments(corpus, out, "--max_steps=2"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"could not save .*step_3: No space left on device; earlier checkpoints are"):
        run_here(arguments(corpus, out, "--max_steps=3", "--resume"))
    assert checkpoint.newest(out)[0].name == "step_2"


def test_sigterm_saves_and_exits_with_zero(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, *arguments(corpus, out, "--max_steps=100000")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=env)
    for line in process.stdout:
        if line.startswith("step 5/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 0
    assert "SIGTERM: saved step" in rest
    folder, _, complaints = checkpoint.newest(out)
    assert int(folder.name.removeprefix("step_")) >= 5
    assert complaints == []


def test_the_best_checkpoint_is_that_of_the_lowest_val_loss_and_the_last_is_the_last(
    corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = ["--max_steps=8", "--eval_interval=1", "--learning_rate=0.5", "--warmup_steps=8", "--save_interval=5"]
    run_here(arguments(corpus, out, *options, "--stop_step=7"))
    saved = {folder.name for folder in checkpoint.steps(out)}
    run_here(arguments(corpus, out, *options, "--resume"))  # must not take a worse loss for the best
    val_losses = {line["step"]: line["val_loss"] for line in read_log(out) if "val_loss" in line}
    best = min(val_losses, key=val_losses.get)
    assert len(val_losses) == 8
    assert 1 < best < 6, "the rate is to rise until the loss does"
    pointers = [(out / "ckpt" / name).read_text() for name in ("best", "last")]
    assert pointers == [f"step_{best}\n", "step_8\n"]
    assert saved == {f"step_{best}", "step_5", "step_7"}  # not at each evaluation
    assert checkpoint.read_manifest(out / "ckpt" / f"step_{best}")["best_val_loss"] == val_losses[best]


def test_a_resume_in_float16_goes_on_with_the_loss_scale(corpus: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--dtype=float16", "--max_steps=6"]
    run_here(arguments(corpus, whole, *options))
    run_here(arguments(corpus, parts, *options, "--stop_step=3"))
    assert checkpoint.newest(parts)[1]["scaler"]["_growth_tracker"] == 3
    run_here(arguments(corpus, parts, *options, "--resume"))
    assert checkpoint.newest(parts)[1]["scaler"] == checkpoint.newest(whole)[1]["scaler"]
    assert checkpoint.newest(parts)[1]["scaler"]["_growth_tracker"] == 6
    assert losses(parts) == losses(whole)


def test_a_resume_holds_no_second_copy_of_what_it_read(pieces: tuple, tmp_path: Path) -> None:
    """After restoring there are the weights and moments, as before saving; what came from the file is gone."""
    c, model, optimizers, scaler, check, batches, info = pieces
    train.train_step(model, batches, 1, optimizers, scaler, check, c, info)
    parts = checkpoint.live_tensors(model, optimizers)
    checkpoint.save(tmp_path, parts, dict(step=1, options={}), ByteTokenizer())

    def held() -> int:
        gc.collect()
        plain = (torch.Tensor, torch.nn.Parameter)  # other tests may have left tensors without a storage
        tensors = [x for x in gc.get_objects() if type(x) in plain and x.device == CPU]
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())

    read = sum(tensor.numel() * tensor.element_size() for tensor in parts.values())
    again = GPT(c.gpt, seed=None)
    restored = optim.make_optimizers(again, c)
    before = held()
    checkpoint.restore(checkpoint.newest(tmp_path)[0], again, restored)
    moments = sum(t.numel() * t.element_size() for name, t in parts.items() if name.startswith("optimizer."))
    assert held() - before < moments + 0.2 * read


def test_a_new_run_never_overwrites_an_earlier_one(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run_here(arguments(corpus, out, "--max_steps=1"))
    first = tensors(out, 1)
    run_here(arguments(corpus, out, "--max_steps=1", "--seed=2"))
    assert "was moved to" in capsys.readouterr().out
    assert same(tensors(tmp_path / "run.1", 1), first)


# --- Ranks -------------------------------------------------------------------------------------------------------


def test_two_ranks_train_as_one_does(corpus: Path, tmp_path: Path) -> None:
    """1 rank x 4 micro-steps against 2 gloo ranks x 2: the same samples in each step, the same losses and weights."""
    one, two = tmp_path / "one", tmp_path / "two"
    options = ["--tokens_per_step=512", "--max_steps=5"]
    run_here(arguments(corpus, one, *options))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = run(*torchrun, *arguments(corpus, two, *options))
    assert result.stdout.count("step 1/5") == 1  # rank 0 alone speaks
    for a, b in zip(read_log(one), read_log(two), strict=True):
        assert a.keys() == b.keys()
        for name in ("loss", "grad_norm", "val_loss"):
            assert a.get(name, 0.0) == pytest.approx(b.get(name, 0.0), rel=1e-6), name
    ours, theirs = tensors(one, 5), tensors(two, 5)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-5, rtol=1e-4, msg=name)
    # Adam's first moment after one step is 0.1 of the gradient: the plainest look at it from outside.
    run_here(arguments(corpus, one, *options, "--stop_step=1"))
    run_ranks(2, arguments(corpus, two, *options, "--stop_step=1"), tmp_path)
    ours, theirs = tensors(one, 1), tensors(two, 1)
    moments = [name for name in ours if name.endswith(".exp_avg")]
    assert len(moments) == len(list(GPT(GPTConfig(vocab_size=256, **small())).parameters()))
    for name in moments:
        assert (ours[name] - theirs[name]).norm() <= 1e-6 * ours[name].norm(), name


@pytest.mark.parametrize(("batch_size", "tokens", "ranks", "expected"), [
    (4, None, 1, (4, 1)), (4, None, 3, (4, 1)), (4, 512, 1, (4, 4)), (4, 512, 2, (4, 2)), (4, 512, 4, (4, 1)),
    (4, 512, 8, (2, 1)), (6, 192 * 5, 1, (6, 5)),
])  # fmt: skip
def test_a_step_is_shared_by_any_number_of_ranks(
    batch_size: int, tokens: int | None, ranks: int, expected: tuple[int, int]
) -> None:
    c = TrainConfig(gpt=GPTConfig(vocab_size=64, **small()), batch_size=batch_size, tokens_per_step=tokens)
    shared, micro_steps = train.share_step(c, DistInfo(0, ranks, CPU))
    assert (shared.batch_size, micro_steps) == expected


@pytest.mark.parametrize(("tokens", "ranks"), [(500, 1), (512, 3), (320, 1), (64, 4)])
def test_a_step_that_cannot_be_shared_is_an_error(tokens: int, ranks: int) -> None:
    c = TrainConfig(gpt=GPTConfig(vocab_size=64, **small()), batch_size=4, tokens_per_step=tokens)
    with pytest.raises(UserError, match=f"tokens_per_step is {tokens}, wanted a multiple of"):
        train.share_step(c, DistInfo(0, ranks, CPU))


def read_from(corpus: data.Corpus) -> Callable:
    return lambda windows: data.eval_batch(corpus, 32, windows)


def small() -> dict:
    return dict(n_layer=2, n_head=2, n_embd=32, block_size=32, lowdim=LowDim(q=8, k=8, v=8, o=8))


# --- Compile -----------------------------------------------------------------------------------------------------


def test_compiled_and_eager_checkpoints_have_the_same_keys_and_losses(corpus: Path, tmp_path: Path) -> None:
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    run_here(arguments(corpus, eager, "--max_steps=2"))
    run_here(arguments(corpus, compiled, "--max_steps=2", "--compile=block"))
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-5)
    assert tensors(compiled, 2).keys() == tensors(eager, 2).keys()


def test_a_smaller_last_batch_of_an_evaluation_is_not_compiled(corpus: Path) -> None:
    c = TrainConfig(gpt=GPTConfig(vocab_size=256, **small()), batch_size=4)
    shapes = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        shapes.append([tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)])
        return graph.forward

    torch._dynamo.reset()
    model, val = GPT(c.gpt), data.open_corpus(str(corpus), "val")
    for block in model.transformer.h:
        block.compile(backend=backend)
    windows, info = data.eval_windows(val, 32), DistInfo(0, 1, CPU)
    losses = [train.evaluate(model, read_from(val), windows[:n], c, info) for n in (8, 10)]
    assert all(map(math.isfinite, losses))
    seen = {shape[0] for found in shapes for shape in found if shape[1:] == (32, 32)}
    assert seen == {4}
    torch._dynamo.reset()


# --- The step ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["adamw", "muon", "muon scaled"])
def pieces(request: pytest.FixtureRequest) -> tuple:
    gpt = GPTConfig(vocab_size=64, **small())
    c = TrainConfig(gpt=gpt, learning_rate=0.01, weight_decay=0.1, optimizer=request.param.split()[0])
    model = GPT(c.gpt)
    optimizers = optim.make_optimizers(model, c)
    scaler = torch.amp.GradScaler("cpu", enabled="scaled" in request.param, init_scale=8.0)
    idx = torch.randint(64, (4, 33))
    return c, model, optimizers, scaler, NonFiniteCheck(CPU), [(idx[:, :-1], idx[:, 1:])], DistInfo(0, 1, CPU)


def test_a_step_that_is_not_finite_changes_nothing(pieces: tuple) -> None:
    c, model, optimizers, scaler, check, batches, info = pieces
    train.train_step(model, batches, 1, optimizers, scaler, check, c, info)

    def everything() -> dict[str, torch.Tensor]:
        found = {name: p.detach().clone() for name, p in model.named_parameters()}
        for number, optimizer in enumerate(optimizers):
            for i, state in optimizer.state_dict()["state"].items():
                found |= {f"{number}.{i}.{k}": v.clone() for k, v in state.items()}
        return found

    before, weight = everything(), model.transformer.h[0].mlp.up.weight
    for poison in (math.nan, math.inf):
        hook = weight.register_hook(lambda g, poison=poison: torch.full_like(g, poison))
        train.train_step(model, batches, 1, optimizers, scaler, check, c, info)
        hook.remove()
        assert same(everything(), before)
    assert check.skipped == 2
    train.train_step(model, batches, 1, optimizers, scaler, check, c, info)
    assert not same(everything(), before)
    assert (check.skipped, check.in_a_row, check.longest) == (2, 0, 2)
    check.stop_if_lost(4)
    for _ in range(10):
        check.verdict(torch.tensor(math.nan), torch.tensor(1.0), 1.0)
    with pytest.raises(UserError, match="10 steps in a row"):
        check.stop_if_lost(14)


def test_clipped_steps_are_counted_also_over_a_resume(corpus: Path, tmp_path: Path) -> None:
    """A norm between those of the steps, against the norms in the log; a skipped step is not a clipped one."""
    options = ["--max_steps=6", "--log_interval=1"]
    run_here(arguments(corpus, tmp_path / "free", *options, "--learning_rate=1e-20", "--min_lr=1e-20", "--grad_clip=0"))
    free = [line for line in read_log(tmp_path / "free") if "loss" in line]
    assert [line["clipped"] for line in free] == [0] * 6
    norms = [line["grad_norm"] for line in free]
    clip = sorted(norms)[2] * 1.0001  # three of six are above it
    options += ["--learning_rate=1e-20", "--min_lr=1e-20", f"--grad_clip={clip}"]
    run_here(arguments(corpus, tmp_path / "run", *options, "--stop_step=3"))
    run_here(arguments(corpus, tmp_path / "run", *options, "--resume"))
    counted = [line["clipped"] for line in read_log(tmp_path / "run") if "loss" in line]
    assert counted == [sum(norm > clip for norm in norms[: n + 1]) for n in range(6)]
    check = NonFiniteCheck(CPU)
    check.verdict(torch.tensor(1.0), torch.tensor(math.inf), 1.0)
    assert check.counts() == dict(skipped=1, clipped=0)


def test_a_run_that_diverges_stops_and_says_so(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"10 steps in a row, seen at step \d+, had a loss or gradient"):
        run_here(arguments(corpus, tmp_path / "run", "--max_steps=50", "--learning_rate=1e30", "--grad_clip=0"))
    assert len(losses(tmp_path / "run")) < 15


@pytest.mark.parametrize("pieces", ["adamw"], indirect=True)
def test_clipping_and_accumulation_equal_a_plain_step(pieces: tuple) -> None:
    """Two micro-batches, clipped, against one batch through torch's own AdamW with a plain loop over tokens."""
    c, model, optimizers, scaler, check, [(x, y)], info = pieces
    c = dataclasses.replace(c, grad_clip=0.1, weight_decay=0.0)
    reference = GPT(c.gpt)
    plain = torch.optim.AdamW(reference.parameters(), lr=c.learning_rate, betas=(0.9, 0.95), eps=c.eps, weight_decay=0)
    logits = reference(x).double()
    loss = -sum(logits[b, t].log_softmax(0)[y[b, t]] for b in range(4) for t in range(32)) / (4 * 32)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
    plain.step()
    for group in optimizers[0].param_groups:
        group["weight_decay"] = 0.0
    measured = train.train_step(model, [(x[:2], y[:2]), (x[2:], y[2:])], 2, optimizers, scaler, check, c, info)
    assert measured[0].item() == pytest.approx(loss.item(), rel=1e-6)
    assert measured[1].item() == pytest.approx(norm.item(), rel=1e-5)
    for (name, a), b in zip(model.named_parameters(), reference.parameters()):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0, msg=name)


def test_every_parameter_is_in_one_group_with_the_decay_that_its_product_needs() -> None:
    model = GPT(GPTConfig(vocab_size=64, **small(), bias=True, norm="layernorm", tie_embeddings=True))
    groups = optim.parameter_groups(model, 0.1)
    grouped = [p for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(model.parameters())
    decays = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert {decays[p] for n, p in model.named_parameters() if n.endswith((".A", ".B"))} == {0.05}
    assert {decays[p] for n, p in model.named_parameters() if n.endswith("mlp.up.weight")} == {0.1}
    assert decays[model.transformer.wte.weight] == 0
    assert {decays[p] for p in model.parameters() if p.ndim == 1} == {0}


@pytest.mark.parametrize("shape", [(48, 192), (192, 48), (64, 64), (96, 32)])
def test_orthogonal_equals_plain_newton_schulz_and_nearly_the_svd(shape: tuple[int, int]) -> None:
    g = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    ours = optim.orthogonal(g)
    torch.testing.assert_close(optim.orthogonal(g, bfloat16=True), ours, atol=0.03, rtol=0)
    for matrix, result in zip(g.double(), ours):
        x = matrix / matrix.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        torch.testing.assert_close(result.double(), x, atol=1e-3, rtol=0)
        values = torch.linalg.svdvals(result)
        assert values.max() < 1.3
        assert (values > 0.6).float().mean() > 0.95  # all but those that were nearly zero
        u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
        assert ((u @ vt) * result).sum() / (result.norm() * min(shape) ** 0.5) > 0.97


def test_a_muon_step_is_that_of_each_matrix_alone() -> None:
    c = TrainConfig(gpt=GPTConfig(vocab_size=64, **small()), learning_rate=0.02, weight_decay=0.1, optimizer="muon")
    model = GPT(c.gpt)
    adamw, muon = optim.make_optimizers(model, c)
    assert {p for o in (adamw, muon) for g in o.param_groups for p in g["params"]} == set(model.parameters())
    inside = {p for name, p in model.named_parameters() if p.ndim == 2 and ".h." in name}
    assert {p for group in muon.param_groups for p in group["params"]} == inside
    expected, momentum = {n: p.detach().clone() for n, p in model.named_parameters()}, {}
    for step in range(3):
        for i, (name, p) in enumerate(model.named_parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            if p in inside:
                beta = 0.85 + 0.1 * step / 300
                momentum[name] = beta * momentum.get(name, 0) + (1 - beta) * p.grad
                update = optim.orthogonal(((1 - beta) * p.grad + beta * momentum[name])[None])[0]
                decay = 0.05 if name.endswith((".A", ".B")) else 0.1
                expected[name] *= 1 - 0.02 * decay
                expected[name] -= 0.02 * 0.2 * max(p.shape) ** 0.5 * update
        optim.set_learning_rate([adamw, muon], step, c)
        muon.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, expected[name], atol=1e-5, rtol=0, msg=name)


def test_learning_rate_schedules() -> None:
    cosine = TrainConfig(GPTConfig(), learning_rate=1.0, min_lr=0.2, warmup_steps=4, max_steps=14)
    assert [optim.learning_rate(s, cosine) for s in (0, 1, 3, 4)] == [0.25, 0.5, 1.0, 1.0]
    assert optim.learning_rate(9, cosine) == pytest.approx(0.6)
    assert optim.learning_rate(14, cosine) == pytest.approx(0.2)
    wsd = dataclasses.replace(cosine, schedule="wsd", decay_share=0.5)
    assert [optim.learning_rate(s, wsd) for s in (4, 7)] == [1.0, 1.0]
    assert optim.learning_rate(14, wsd) == pytest.approx(0.2)
    assert optim.learning_rate(10, wsd) == pytest.approx(0.2 + 0.8 * 4 / 7)


def test_a_warm_up_as_long_as_the_run_or_longer_has_rates_all_the_same() -> None:
    for warmup_steps, schedule in itertools.product((1, 8, 20), ("cosine", "wsd")):
        c = TrainConfig(GPTConfig(), learning_rate=1.0, warmup_steps=warmup_steps, max_steps=8, schedule=schedule)
        rates = [optim.learning_rate(step, c) for step in range(8)]
        assert all(0 < rate <= 1 for rate in rates)
        assert rates[0] == 1 / warmup_steps


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        (dict(warmup_steps=7), None),
        (dict(warmup_steps=8), "steps is 8, wanted below max_steps = 8: the rate only rises, to 1.00e+00;"),
        (dict(warmup_steps=16), "steps is 16, wanted below max_steps = 8: the rate only rises, to 5.00e-01;"),
        (dict(warmup_steps=4, schedule="wsd", decay_share=0.5), None),
        (dict(warmup_steps=6, schedule="wsd", decay_share=0.5), "4, where the decay begins: the rate then falls"),
        (dict(warmup_steps=0, schedule="wsd", decay_share=1.0), None),
        (dict(warmup_steps=6, schedule="wsd", decay_share=1.0), "at most 0, where the decay begins"),
        (dict(warmup_steps=7, schedule="wsd", decay_share=1 / 8), None),
    ],
)
def test_a_warm_up_that_outlasts_the_start_of_the_decay_has_a_warning(options: dict, warning: str | None) -> None:
    told = optim.late_warm_up(TrainConfig(GPTConfig(), learning_rate=1.0, max_steps=8, **options))
    assert told is None if warning is None else warning in told


def test_a_late_warm_up_is_told_once_and_trains(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(arguments(corpus, tmp_path / "run", "--max_steps=2", "--warmup_steps=16"))
    warnings = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in warnings] == ["warning: warmup_steps is 16"]
    assert len(losses(tmp_path / "run")) == 2


def test_evaluation_is_the_mean_over_the_split_whatever_the_batch(corpus: Path) -> None:
    c = TrainConfig(gpt=GPTConfig(vocab_size=256, **small(), dropout=0.3), batch_size=3)
    model, val = GPT(c.gpt), data.open_corpus(str(corpus), "val")
    windows = data.eval_windows(val, 32)
    text = torch.from_numpy(val.window(0, len(windows) * 32 + 1)).long()
    model.eval()
    with torch.no_grad():
        logits = model(text[:-1].view(-1, 32)).flatten(0, 1).double()
    expected = F.cross_entropy(logits, text[1:]).item()
    for batch_size in (3, 7):
        options = dataclasses.replace(c, batch_size=batch_size)
        measured = train.evaluate(model, read_from(val), windows, options, DistInfo(0, 1, CPU))
        assert measured == pytest.approx(expected, rel=1e-6)
    watch = StopSignal(DistInfo(0, 1, CPU), max_hours=1e-9)
    assert math.isnan(train.evaluate(model, read_from(val), windows, c, DistInfo(0, 1, CPU), watch))


def test_every_rank_evaluates_its_share_of_the_windows(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where they are read: the loss would be the same if one rank read them all while the others wait."""
    c = TrainConfig(gpt=GPTConfig(vocab_size=256, **small()), batch_size=2)
    model, val = GPT(c.gpt), data.open_corpus(str(corpus), "val")
    windows, read = data.eval_windows(val, 32)[:10], []
    eval_batch = data.eval_batch
    monkeypatch.setattr(data, "eval_batch", lambda *place: read.extend(place[2].tolist()) or eval_batch(*place))
    monkeypatch.setattr(DistInfo, "mean", lambda info, value: value / info.world_size)  # of this rank alone
    counts = []
    for rank in range(3):
        train.evaluate(model, read_from(val), windows, c, DistInfo(rank, 3, CPU))
        counts.append(len(read) - sum(counts))
    assert sorted(counts) == [3, 3, 4]
    assert sorted(read) == windows.tolist()


def test_the_log_tells_the_setting_and_each_step(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr(hardware, "matmul_rate", lambda *_: 2.0**38)  # no machine's in a table
    options = ["--max_steps=4", "--log_interval=2", "--eval_interval=2", "--tokens_per_step=256"]
    run_here(arguments(corpus, out, *options))
    told = capsys.readouterr().out
    assert "a step: 256 tokens = 4 sequences x 32 tokens x 1 processes x 2 micro-steps\n" in told
    assert re.search(r"^AdamW +factors +16 tensors +4,096 parameters, decay 0\n", told, flags=re.MULTILINE)
    changed = re.search(r"^options: (.*)\n", told, flags=re.MULTILINE)[1]
    assert {"--tokens_per_step=256", "--n_embd=32", "--lowdim.q=8"} <= set(shlex.split(changed))
    assert "learning_rate" not in changed  # as by default
    first, *lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    tokens = data.open_corpus(str(corpus), "train").tokens
    assert f"data: {tokens:,} training tokens of {corpus}" in told
    assert f"; 4 steps are {4 * 256 / tokens:.3g} epochs\n" in told
    assert {"versions", "device", "options", "parameters"} <= first.keys()
    assert first["matmul_flops"] == 2.0**38
    assert first["options"]["gpt"]["lowdim"]["q"] == 8
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 4]
    keys = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "seconds", "skipped", "clipped"}
    assert all(keys <= line.keys() for line in steps)
    assert steps[-1]["tokens"] == 4 * 256
    flops = 3 * GPT(GPTConfig(vocab_size=256, **small())).flops_per_token()
    for line in steps:
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops / 2.0**38)
    for before, line in itertools.pairwise(steps):  # over all steps since the line before
        passed = line["seconds"] - before["seconds"]
        assert line["tokens_per_second"] * passed == pytest.approx(line["tokens"] - before["tokens"])
    evaluations = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in evaluations] == [2, 4]
    val = data.open_corpus(str(corpus), "val")
    for line in evaluations:
        bits = line["val_loss"] / math.log(2) * val.tokens / val.bytes
        assert line["val_bits_per_byte"] == pytest.approx(bits)


def test_wandb_goes_on_with_the_same_run(corpus: Path, tmp_path: Path) -> None:
    """A stand-in for the package that notes how it was called: all of log.jsonl reaches one run, and its options."""
    (tmp_path / "wandb.py").write_text(
        "import json, os\n"
        "class Run:\n"
        "    id = 'abc123'\n"
        "    def define_metric(self, *a, **k): pass\n"
        "    def log(self, record): note(dict(logged=record))\n"
        "    def finish(self): note(dict(finished=True))\n"
        "def note(record): print(json.dumps(record), file=open(os.environ['NOTES'], 'a'))\n"
        "def init(**options): note(dict(options, dir=None)); return Run()\n"
    )
    env = {"PYTHONPATH": str(tmp_path), "NOTES": str(tmp_path / "notes")}
    options = ["--wandb", "--sample_interval=2", "--eval_interval=2"]
    run(*arguments(corpus, tmp_path / "run", "--max_steps=2", *options), env=env)
    run(*arguments(corpus, tmp_path / "run", "--max_steps=4", *options, "--resume"), env=env)
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    assert [(note["id"], note["resume"]) for note in notes if "id" in note] == [(None, "allow"), ("abc123", "allow")]
    for config in (note["config"] for note in notes if "id" in note):
        assert config["gpt"]["lowdim"]["q"] == 8
        assert any(line.startswith("q ") for line in config["parameters"])
    assert sum("finished" in note for note in notes) == 2
    logged = [note["logged"] for note in notes if "logged" in note]
    assert logged == read_log(tmp_path / "run")
    for name in ("loss", "val_loss", "sample"):
        assert {record["step"] for record in logged if name in record} >= {2, 4}, name


# --- Bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning_rat=1"], "--learning_rate"),
        (["--tokens_per_step=1000"], "wanted a multiple of batch_size x block_size x processes"),
        (["--vocab_size=100"], "vocab_size is 100, but"),
        (["--block_size=1000000"], "shorter than a block"),
        (["--dataset=nowhere"], "no corpus nowhere"),
        (["--dataset=wikitext103"], "python -m data.wikitext103.prepare"),
        (["--out_dir={corpus}/meta.json/run"], "cannot write to out_dir"),
        (["--resume"], "nothing to resume"),
        (["--device=cuda"], "torch sees no CUDA device"),
        (["--stop_step=0"], "stop_step is 0, wanted above 0"),
        (["--tokens_per_step=-64"], "tokens_per_step is -64, wanted above 0"),
        (["--learning_rate=nan"], "learning_rate is nan, wanted above 0"),
        (["--beta1=2"], "beta1 is 2.0, wanted at least 0 and below 1"),
        (["--ffn_dim=0"], "ffn_dim is 0, wanted 1 or more"),
        (["--norm_eps=-1"], "norm_eps is -1.0, wanted above 0"),
        (["--shard", "--dtype=float16"], "wanted bfloat16 or float32 with shard"),
        (["--max_hours=0"], "max_hours is 0.0, wanted above 0"),
        (["--out_dir=."], "wanted a folder of its own"),
    ],
)
def test_bad_input_is_one_line(corpus: Path, tmp_path: Path, options: list[str], message: str) -> None:
    if options == ["--device=cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    if options == ["--dataset=wikitext103"] and (data.DATA / "wikitext103" / "meta.json").exists():
        pytest.skip("WikiText-103 is prepared here")
    options = [option.format(corpus=corpus) for option in options]
    with pytest.raises(UserError) as error:
        run_here(arguments(corpus, tmp_path / "run", "--max_steps=1", *options))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_error_of_the_user_is_one_line_and_exit_code_2() -> None:
    result = run("train.py", "config/lpa_cpu.py", "--learning_rat=1", expect=2)
    assert result.stderr == (
        "error: Unrecognized options: --learning_rat=1; perhaps you meant --learning_rate\n"
    )


def test_a_wandb_that_does_not_start_is_one_line(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Error(Exception):
        pass

    def init(**options: object) -> None:
        raise Error("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Error=Error, init=init))
    with pytest.raises(UserError) as error:
        run_here(arguments(corpus, tmp_path / "run", "--max_steps=2", "--wandb"))
    said = "No API key configured. Use `wandb login` to log in."
    assert str(error.value) == f"wandb did not start; WANDB_MODE=offline needs no account: {said}"


def test_importing_train_prints_nothing() -> None:
    assert run("-c", "import train, bench, sample, eval, export, lpa.hf, lpa.planning, lpa.init_from").stdout == ""


def test_threads_wait_as_the_user_says_or_else_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    show = "import os, train; print(os.environ['GOMP_SPINCOUNT'])"
    assert run("-c", show).stdout == "10000\n"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert run("-c", show).stdout == "7\n"


def test_presets_load_and_their_twins_are_dense() -> None:
    names = {path.stem for path in (ROOT / "config").glob("[a-z]*.py")}
    assert {name.removeprefix("lpa_") for name in names if name.startswith("lpa_")} == {
        name.removeprefix("dense_") for name in names if name.startswith("dense_")
    }
    for name in sorted(name for name in names if name.startswith("lpa_")):
        low, dense = (load_config([f"config/{n}.py"]) for n in (name, name.replace("lpa_", "dense_")))
        assert any(dataclasses.asdict(low.gpt.lowdim).values())
        assert dataclasses.replace(low.gpt, lowdim=LowDim()) == dense.gpt
        assert low.out_dir == f"out/{name}"
        assert dense.out_dir != low.out_dir


def test_auto_precision_follows_the_measured_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for rates, expected in (((1.0, 4.0), "bfloat16"), ((1.0, 1.1), "float32"), ((1.0, 0.01), "float32")):
        by_name = dict(zip(("float32", "bfloat16"), rates))
        monkeypatch.setattr(hardware, "matmul_rate", lambda device, name, seconds, n, by_name=by_name: by_name[name])
        assert hardware.choose_dtype("auto", cpu) == expected
    assert hardware.choose_dtype("float16", cpu) == "float16"


def test_automatic_precision_is_chosen_once_in_a_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume goes on in the precision of the checkpoint, whatever the machine would choose by then."""
    for choice, more in (("bfloat16", ["--stop_step=1"]), ("float32", ["--resume"])):
        monkeypatch.setattr(hardware, "choose_dtype", lambda *_, choice=choice: choice)
        run_here(arguments(corpus, tmp_path / "run", "--dtype=auto", "--max_steps=2", *more))
    lines = map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert [line["options"]["dtype"] for line in lines if "options" in line] == ["bfloat16", "bfloat16"]
