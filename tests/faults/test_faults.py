"""Broken checkpoints, a full disk, signals and deadlines: nothing is lost, and what is wrong is said in one line.

    .venv/bin/pytest tests/faults/test_faults.py        CPU
"""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import read_log, run, run_here, run_ranks, start
from test_train import arguments, losses, same, tensors

from config import UserError
from lpa import checkpoint

SIX = ["--max_steps=6", "--save_interval=2"]


SHARDED = [*SIX, "--tokens_per_step=256", "--shard"]


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    run_here(arguments(corpus, out, *SIX))
    return out


@pytest.fixture(scope="module")
def finished_shards(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished_shards")
    run_ranks(2, arguments(corpus, folder / "run", *SHARDED), folder)
    return folder / "run"


def tensor_files(folder: Path) -> list[Path]:
    """The tensors of each rank that saved some."""
    return sorted(folder.glob("*.distcp"))


def cut(folder: Path) -> None:
    os.truncate(tensor_files(folder)[-1], 1000)


def flip(folder: Path) -> None:
    file = tensor_files(folder)[0]
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 3] ^= 4
    file.write_bytes(contents)


def empty(folder: Path) -> None:
    os.truncate(tensor_files(folder)[0], 0)


def without_file(folder: Path) -> None:
    tensor_files(folder)[-1].unlink()


def without_index(folder: Path) -> None:
    (folder / ".metadata").unlink()


def cut_index(folder: Path) -> None:
    os.truncate(folder / ".metadata", 100)


def without_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def torn_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 100)


def never_renamed(folder: Path) -> None:
    folder.rename(folder.with_suffix(".tmp"))


DAMAGES = [cut, flip, empty, without_file, without_index, cut_index, without_manifest, torn_manifest, never_renamed]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_passed_over(
    damage: Callable, corpus: Path, tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    damage(out / "ckpt" / "step_6")
    run_here(arguments(corpus, out, *SIX, "--resume=auto"))
    assert_passed_over(damage, capsys.readouterr().out, out, finished)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_shards_is_named_and_passed_over(
    damage: Callable, corpus: Path, tmp_path: Path, finished_shards: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished_shards, out)
    damage(out / "ckpt" / "step_6")
    printed = run_ranks(2, arguments(corpus, out, *SHARDED, "--resume=auto"), tmp_path)
    assert_passed_over(damage, printed, out, finished_shards)


def assert_passed_over(damage: Callable, printed: str, out: Path, whole: Path) -> None:
    """The run went on from step 4, said why, and ended with the bits of the undisturbed one."""
    assert "continuing from" in printed
    assert "step_4" in printed.split("continuing from")[1].splitlines()[0]
    assert ("skipped" in printed) == (damage is not never_renamed)  # that is no checkpoint, but a leftover
    assert losses(out) == losses(whole)
    assert same(tensors(out, 6), tensors(whole, 6))
    assert not list(out.glob("ckpt/*.tmp"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_shards_is_detected_and_what_is_damaged_named(
    damage: Callable, tmp_path: Path, finished_shards: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished_shards, out)
    newest = out / "ckpt" / "step_6"
    before = {file: file.read_bytes() for file in newest.iterdir()}
    damage(newest)
    (damaged,) = [file for file in before if not file.exists() or file.read_bytes() != before[file]][:1]
    folder, manifest, complaints = checkpoint.newest(out)
    assert (folder.name, manifest["step"]) == ("step_4", 4)
    assert len(complaints) == (damage is not never_renamed)
    assert all(damaged.name in complaint and "step_6" in complaint for complaint in complaints)


def test_a_full_disk_stops_the_run(corpus: Path, tmp_path: Path) -> None:
    out, output = tmp_path / "run", tmp_path / "out.txt"
    options = ["--max_steps=10", "--save_interval=2"]
    process = start(arguments(corpus, out, *options), output, hook="events.full_disk")
    process.join()
    assert process.exitcode == 2, output.read_text()
    assert "error: could not save" in output.read_text()
    assert "earlier checkpoints are as they were" in output.read_text()
    assert checkpoint.newest(out)[0].name == "step_2"
    assert not list(out.glob("ckpt/*.tmp"))  # what was half written has made room again


def test_a_signal_ends_an_evaluation_which_a_resume_makes_up_for(corpus: Path, tmp_path: Path) -> None:
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


def test_a_signal_to_one_rank_stops_all_of_them(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--tokens_per_step=256", "--max_steps=100000", "--log_interval=1000", "--shard", "--hang_timeout=60"]
    run_ranks(2, arguments(corpus, out, *options), tmp_path, "events.signal_rank_1")
    stopped = json.loads((out / "stopped.json").read_text())
    assert stopped["reason"] == "SIGTERM"
    assert checkpoint.newest(out)[0].name == f"step_{stopped['step']}"


def test_all_ranks_stop_without_a_save_when_torchrun_is_gone(corpus: Path, tmp_path: Path) -> None:
    """Another start of the run may be under way, and write the same checkpoints."""
    out = tmp_path / "run"
    options = ["--tokens_per_step=256", "--max_steps=100000", "--log_interval=1000", "--save_interval=3"]
    printed = run_ranks(2, arguments(corpus, out, *options), tmp_path, "events.torchrun_dies_after_step_4", expect=2)
    said = re.search(r"error: torchrun is gone: stopped at step (\d+) .* continues from step (\d+)", printed)
    stopped, saved = said.groups()
    assert checkpoint.newest(out)[0].name == f"step_{saved}"
    assert int(saved) == int(stopped) // 3 * 3
    assert not (out / "stopped.json").exists()


def test_no_rank_0_to_meet_is_told_in_a_line(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.txt"
    place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", WORLD_SIZE="2", RANK="1")  # where nobody listens
    process = start(arguments(corpus, tmp_path / "run", "--hang_timeout=0.3"), output, place)
    process.join()
    assert process.exitcode == 2, output.read_text()
    assert "error: process 1 did not find all 2 processes at 127.0.0.1:1 within 0.3 s" in output.read_text()
    assert "Traceback" not in output.read_text()


def test_a_write_that_fails_on_one_rank_fails_the_sharded_save_of_all(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--tokens_per_step=256", "--max_steps=6", "--save_interval=2", "--shard"]
    printed = run_ranks(2, arguments(corpus, out, *options), tmp_path, "events.no_room_on_rank_1", expect=2)
    assert "error: could not save" in printed
    assert checkpoint.newest(out)[0].name == "step_2"
    assert not list(out.glob("ckpt/*.tmp"))
    shard = next((out / "ckpt" / "step_2").glob("__1_*.distcp"))
    contents = bytearray(shard.read_bytes())
    contents[len(contents) // 2] ^= 1
    shard.write_bytes(contents)
    printed = run_ranks(2, arguments(corpus, out, *options, "--resume=auto"), tmp_path, expect=2)
    assert "its sha256 differs" in printed


def test_a_log_that_cannot_be_written_is_told_once_and_costs_nothing(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    output = tmp_path / "out.txt"
    process = start(arguments(corpus, tmp_path / "run", "--max_steps=3"), output, hook="events.log_to_a_full_device")
    process.join()
    assert process.exitcode == 0, output.read_text()
    assert output.read_text().count("cannot write log.jsonl: No space left on device") == 1
    assert checkpoint.newest(tmp_path / "run")[0].name == "step_3"


def test_what_was_passed_over_takes_no_place_of_what_is_kept(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_here(arguments(corpus, out, "--max_steps=6", "--save_interval=2"))
    flip(out / "ckpt" / "step_6")
    run_here(arguments(corpus, out, "--max_steps=8", "--save_interval=1", "--stop_step=5", "--resume"))
    assert [folder.name for folder in checkpoint.steps(out)] == ["step_5", "step_4"]
    assert (out / "ckpt" / "step_6.broken").exists()


def test_the_best_is_marked_by_the_resume_if_the_mark_was_lost(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, options = tmp_path / "run", ["--max_steps=4", "--save_interval=2", "--eval_interval=2"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Saver, "mark_best", lambda *_: None)
        run_here(arguments(corpus, out, *options, "--stop_step=2"))
    assert not (out / "ckpt" / "best").exists()
    run_here(arguments(corpus, out, *options, "--resume"))
    manifest = checkpoint.read_manifest(out / "ckpt" / "step_2")
    assert manifest["best_val_loss"] == next(line["val_loss"] for line in read_log(out) if "val_loss" in line)
    assert (out / "ckpt" / "best").read_text().strip() in ("step_2", "step_4")


def test_other_data_is_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("Other words, again and again. " * 400)
    places = [f"--path={tmp_path / 'other.txt'}", f"--name={tmp_path / 'other'}"]
    run("-m", "data.own_text.prepare", *places, "--tokenizer=byte")
    out = tmp_path / "run"
    run_here(arguments(corpus, out, "--max_steps=2"))
    with pytest.raises(UserError, match="data: the checkpoint has"):
        run_here(arguments(tmp_path / "other", out, "--max_steps=3", "--resume"))
