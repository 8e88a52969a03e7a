"""Several ranks against one process: DDP and FSDP, checkpoints from one number of ranks to another, time-outs.

    .venv/bin/pytest tests/test_parallel.py        CPU, gloo
"""

import copy
import dataclasses
import itertools
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import read_log, run_ranks
from test_train import arguments, losses, same, tensors

import data
import train
from config import TrainConfig, UserError, load_config
from lpa import checkpoint, cpu, distributed, optim
from model import GPT

STEP = ["--tokens_per_step=512", "--warmup_steps=5", "--learning_rate=0.003"]


def in_float64() -> None:
    torch.set_default_dtype(torch.float64)


@pytest.fixture(scope="module")
def alone(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 steps of one process in float64."""
    folder = tmp_path_factory.mktemp("alone")
    run_ranks(1, arguments(corpus, folder / "run", *STEP, "--max_steps=50"), folder, "test_parallel.in_float64")
    return folder / "run"


@pytest.mark.parametrize(("ranks", "shard"), [(2, False), (2, True), (4, False), (4, True)])
def test_ranks_train_as_one_process_does(corpus: Path, tmp_path: Path, alone: Path, ranks: int, shard: bool) -> None:
    """In float64 nothing hides behind rounding: 50 losses agree to 1e-9."""
    out = tmp_path / "run"
    options = [*STEP, "--max_steps=50", f"--shard={str(shard).lower()}"]
    printed = run_ranks(ranks, arguments(corpus, out, *options), tmp_path, "test_parallel.in_float64")
    assert printed.count("step 1/50") == 1
    assert losses(out) == pytest.approx(losses(alone), rel=1e-9)
    for a, b in zip(read_log(out), read_log(alone), strict=True):
        assert a.get("grad_norm", 0.0) == pytest.approx(b.get("grad_norm", 0.0), rel=1e-9)
        assert a.get("val_loss", 0.0) == pytest.approx(b.get("val_loss", 0.0), rel=1e-9)
    ours, theirs = tensors(out, 50), tensors(alone, 50)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    "options",
    [["--optimizer=muon"], ["--tie_embeddings", "--eval_interval=1"], ["--recompute=elementwise", "--bias"]],
)
def test_shards_change_nothing(corpus: Path, tmp_path: Path, options: list[str]) -> None:
    """Muon, whose matrices are gathered; tied embeddings; recomputation: 3 sharded ranks, of uneven rows, against 1."""
    options = ["--tokens_per_step=384", "--max_steps=4", *options]
    run_ranks(1, arguments(corpus, tmp_path / "one", *options), tmp_path, "test_parallel.in_float64")
    run_ranks(3, arguments(corpus, tmp_path / "three", *options, "--shard"), tmp_path, "test_parallel.in_float64")
    rounding = 1e-5 if "--optimizer=muon" in options else 1e-9  # orthogonal matrices are made in float32
    assert losses(tmp_path / "three") == pytest.approx(losses(tmp_path / "one"), rel=rounding)
    ours, theirs = tensors(tmp_path / "three", 4), tensors(tmp_path / "one", 4)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e3 * rounding, atol=10 * rounding, msg=name)


def test_any_number_of_ranks_goes_on_from_any_other(corpus: Path, tmp_path: Path) -> None:
    """2 sharded ranks -> 4 -> 1 alone -> 2 by DDP -> 2 sharded: each loads what the one before saved, unchanged."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    options = [*STEP, "--max_steps=10"]
    run_ranks(1, arguments(corpus, whole, *options), tmp_path)
    for stop, (ranks, shard) in zip((2, 4, 6, 8, 10), [(2, True), (4, True), (1, False), (2, False), (2, True)]):
        more = [f"--stop_step={stop}", "--resume=auto", f"--shard={str(shard).lower()}"]
        hook = "test_parallel.noting_what_is_read"
        printed = run_ranks(ranks, arguments(corpus, out, *options, *more), tmp_path, hook)
        assert printed.count("equal to the file") == (ranks if stop > 2 else 0)
    assert losses(out) == pytest.approx(losses(whole), rel=1e-5)
    model, _, manifest = checkpoint.load_model(out, torch.device("cpu"))  # as sample.py, eval.py and export.py load it
    assert manifest["step"] == 10
    assert same(dict(model.state_dict()), checkpoint.load_tensors(out / "ckpt" / "step_10", "model"))


def noting_what_is_read() -> None:
    """Have restore compare what it filled, gathered from all ranks, with what one process reads from the files."""
    original = checkpoint.restore

    def restore(folder: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        original(folder, model, optimizers)
        live = checkpoint.live_tensors(model, optimizers)
        found = {name: distributed.full_tensor(tensor) for name, tensor in live.items()}
        parts = {part: checkpoint.load_tensors(folder, part) for part in ("model", "optimizer")}
        assert same(found, {f"{part}.{name}": value for part, saved in parts.items() for name, value in saved.items()})
        print("equal to the file", flush=True)

    checkpoint.restore = restore


def test_shards_compute_in_bfloat16_and_are_kept_in_float32(corpus: Path, tmp_path: Path) -> None:
    """5 steps of 2 micro-steps on 2 ranks against a plain loop; the same in float32 is another run."""
    command = arguments(corpus, tmp_path / "run", *STEP, "--max_steps=5", "--dtype=bfloat16", "--shard")
    run_ranks(2, command, tmp_path)
    expected, weights = in_one_process(load_config(command[1:]), torch.bfloat16)
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=2e-5)
    in_float32, _ = in_one_process(load_config(command[1:]), torch.float32)
    assert losses(tmp_path / "run") != pytest.approx(in_float32, rel=1e-4)
    saved = tensors(tmp_path / "run", 5)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    for name, weight in weights.items():
        torch.testing.assert_close(saved[f"model.{name}"], weight, rtol=1e-3, atol=1e-4, msg=name)


def in_one_process(c: TrainConfig, dtype: torch.dtype) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses and the weights of what 2 ranks with 2 micro-steps are to do, without FSDP or autocast of weights.

    Each pass reads the weights rounded to dtype; its gradients are added, averaged and applied in float32.
    """
    cpu.install(dataclasses.replace(c, dtype=str(dtype).removeprefix("torch.")))  # as the processes do
    corpus = data.open_corpus(c.dataset, "train")
    c = train.with_vocabulary(c, corpus)
    model, found = GPT(c.gpt, c.seed), []
    optimizers = optim.make_optimizers(model, c)
    for step in range(c.max_steps):
        optim.set_learning_rate(optimizers, step, c)
        passes, total = [], 0.0
        for rank, micro_step in itertools.product(range(2), range(2)):
            rounded = copy.deepcopy(model).to(dtype)
            batch = data.batch(corpus, c.gpt.block_size, c.batch_size, c.seed, step, micro_step, 2, rank, 2)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = rounded(*batch) / 2
            loss.backward()
            total += loss.item() / 2
            passes.append([p.grad.float() for p in rounded.parameters()])
        for p, *grads in zip(model.parameters(), *passes):
            p.grad = sum(grads) / 2
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
        found.append(total)
    return found, model.state_dict()


def test_a_foreign_index_is_not_unpickled(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_ranks(2, arguments(corpus, out, "--tokens_per_step=256", "--max_steps=1", "--shard"), tmp_path)
    folder = out / "ckpt" / "step_1"

    class Touch:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "was here",))

    (folder / ".metadata").write_bytes(pickle.dumps(Touch()))
    with pytest.raises(UserError, match=r"\.metadata is no index of a sharded checkpoint: it asks for "):
        checkpoint.load_tensors(folder, "model")
    assert not (tmp_path / "was here").exists()


def test_a_start_does_not_read_what_an_earlier_one_left_in_the_store() -> None:
    """Ranks that come one after the other, as after a restart under torchrun, which keeps its store."""
    store = dist.HashStore()
    names = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 0)):  # and once on two ranks
        with ThreadPoolExecutor(3) as ranks:
            coming = []
            for rank in order:
                coming.append(ranks.submit(distributed.name_start, store, rank, len(order), 30.0))
                time.sleep(0.12)
            agreed = {rank.result() for rank in coming}
        assert len(agreed) == 1
        names += agreed
    assert len(set(names)) == 3
    with pytest.raises(RuntimeError, match="not all of them came"):
        distributed.name_start(store, 0, 2, 0.3)


def test_a_rank_that_hangs_is_named(corpus: Path, tmp_path: Path) -> None:
    options = ["--tokens_per_step=256", "--max_steps=50", "--hang_timeout=4"]
    command = arguments(corpus, tmp_path / "run", *options)
    printed = run_ranks(2, command, tmp_path, "test_parallel.rank_1_hangs", expect=1)
    assert "error: process 1 did not answer within 4 s" in printed


def rank_1_hangs() -> None:
    """From the third step on. It ends by itself, when the others are gone."""
    original = train.seed_dropout

    def seed_dropout(seed: int, step: int, rank: int) -> None:
        original(seed, step, rank)
        if rank == 1 and step == 2:
            time.sleep(14)
            os._exit(1)

    train.seed_dropout = seed_dropout
