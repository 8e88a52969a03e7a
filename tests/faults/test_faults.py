"""Broken checkpoints, a full disk, signals and deadlines: nothing is lost, and what is wrong is said in one line.

    .venv/bin/pytest tests/faults/test_faults.py        CPU
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import read_log, run_here, run_ranks, start
from test_train import arguments, losses, same, tensors

import checkpoint

SIX = ["--max_steps=6", "--save_interval=2"]


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    run_here(arguments(corpus, out, *SIX))
    return out


def cut(folder: Path) -> None:
    os.truncate(folder / "optimizer.pt", 1000)


def flip(folder: Path) -> None:
    contents = bytearray((folder / "model.pt").read_bytes())
    contents[len(contents) // 3] ^= 4
    (folder / "model.pt").write_bytes(contents)


def empty(folder: Path) -> None:
    os.truncate(folder / "model.pt", 0)


def without_file(folder: Path) -> None:
    (folder / "optimizer.pt").unlink()


def without_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def torn_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 100)


def never_renamed(folder: Path) -> None:
    folder.rename(folder.with_suffix(".tmp"))


@pytest.mark.parametrize("damage", [cut, flip, empty, without_file, without_manifest, torn_manifest, never_renamed])
def test_damage_is_named_and_passed_over(
    damage: Callable, corpus: Path, tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    damage(out / "ckpt" / "step_6")
    run_here(arguments(corpus, out, *SIX, "--resume=auto"))
    printed = capsys.readouterr().out
    assert "going on from" in printed
    assert "step_4" in printed.split("going on from")[1].splitlines()[0]
    assert ("passed over" in printed) == (damage is not never_renamed)  # that is no checkpoint, but a leftover
    assert losses(out) == losses(finished)
    assert same(tensors(out, 6), tensors(finished, 6))
    assert not list(out.glob("ckpt/*.tmp"))


def test_a_full_disk_stops_the_run_or_not(corpus: Path, tmp_path: Path) -> None:
    out, output = tmp_path / "run", tmp_path / "out.txt"
    options = ["--max_steps=10", "--save_interval=2"]
    process = start(arguments(corpus, out, *options), output, hook="events.full_disk")
    process.join()
    assert process.exitcode == 2, output.read_text()
    assert "error: could not save" in output.read_text()
    assert "earlier checkpoints are as they were" in output.read_text()
    assert checkpoint.newest(out)[0].name == "step_2"
    assert not list(out.glob("ckpt/*.tmp"))  # what was half written has made room again

    process = start(arguments(corpus, out, *options, "--save_errors=go_on"), output, hook="events.full_disk")
    process.join()
    assert process.exitcode == 0, output.read_text()
    assert "warning: could not save" in output.read_text()
    assert [folder.name for folder in checkpoint.steps(out)] == ["step_10", "step_8"]
    run_here(arguments(corpus, tmp_path / "roomy", *options))
    assert losses(out) == losses(tmp_path / "roomy")


def test_one_signal_to_one_rank_stops_all_of_them_during_an_evaluation(corpus: Path, tmp_path: Path) -> None:
    out, output = tmp_path / "run", tmp_path / "out.txt"
    options = ["--max_steps=8", "--eval_interval=4", "--eval_tokens=12800", "--save_interval=4"]
    process = start(arguments(corpus, out, *options), output, hook="events.slow_evaluation")
    while "step 4/8" not in (output.read_text() if output.exists() else ""):
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    asked = time.monotonic()
    process.join()
    assert process.exitcode == 0, output.read_text()
    assert time.monotonic() - asked < 20  # the evaluation would have taken 25 s more
    assert json.loads((out / "stopped.json").read_text())["reason"] == "SIGTERM"
    assert [line for line in read_log(out) if "val_loss" in line] == []
    run_here(arguments(corpus, out, *options, "--resume"))  # and what was cut short is made up for
    assert [line["step"] for line in read_log(out) if "val_loss" in line] == [4, 8]
    assert not (out / "stopped.json").exists()


def test_the_deadline_ends_all_ranks_and_a_resume_goes_on(corpus: Path, tmp_path: Path) -> None:
    options = ["--tokens_per_step=256", "--max_steps=100000", "--log_interval=1000", "--max_hours=0.0008"]
    out = tmp_path / "run"
    run_ranks(2, arguments(corpus, out, *options), tmp_path)
    stopped = json.loads((out / "stopped.json").read_text())
    assert stopped["reason"] == "max_hours"
    assert checkpoint.newest(out)[0].name == f"step_{stopped['step']}"
    more = [f"--stop_step={stopped['step'] + 1}", "--resume"]
    run_ranks(2, arguments(corpus, out, *options[:-1], *more), tmp_path)
    assert checkpoint.newest(out)[0].name == f"step_{stopped['step'] + 1}"
