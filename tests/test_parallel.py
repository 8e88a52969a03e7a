"""Several ranks against one process: DDP and FSDP, checkpoints from one number of ranks to another, time-outs.

    .venv/bin/pytest tests/test_parallel.py        CPU, gloo
"""

from pathlib import Path

import pytest
import torch
from conftest import read_log, run_ranks
from test_train import arguments, losses, same, tensors

import checkpoint

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
    assert checkpoint.is_sharded(out / "ckpt" / "step_50") == shard
    ours, theirs = tensors(out, 50), tensors(alone, 50)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-9, msg=name)
