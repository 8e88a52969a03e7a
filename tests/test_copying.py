"""The copy tasks and their curriculum.

.venv/bin/pytest tests/test_copying.py                CPU, about 30 s, 20 of them for a run that learns to copy
.venv/bin/pytest -m slow tests/test_copying.py        CPU, about 5 minutes: the fast run of the presets, 3 seeds
"""

import itertools
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import read_log, run_here, run_ranks
from test_train import same, tensors

import data
import eval as evaluation
from config import CopyTask, UserError, load_config
from data import copying
from data.tokenizers import load_tokenizer
from experiments import recurrent as comparison

PRESET = "config/copy_small.py"


def split(name: str, **task: int) -> copying.Copying:
    task = CopyTask(**dict(keep=4, noise=12, alphabet=8) | task)
    return copying.Copying(name, "train", 1, task, task.noise)


@pytest.mark.parametrize("name", copying.TASKS)
def test_the_answer_is_what_stands_in_the_text_in_its_order(name: str) -> None:
    corpus = split(name)
    x, y = corpus.samples(range(400))
    assert x.shape == (400, 20)
    for text, answer in zip(x.tolist(), y.tolist()):
        assert text[-4:] == [7] * 4
        assert [token for token in text[:-4] if token] == answer
        assert all(1 <= token <= 6 for token in answer)
    assert set(y.flatten().tolist()) == set(range(1, 7))
    places = (x[:, :16] > 0).float().mean(0)  # (16,)
    if name == "copy":
        assert places.tolist() == [1.0] * 4 + [0.0] * 12
    else:
        assert (places - 4 / 16).abs().max() < 0.1


def test_a_sample_is_a_function_of_seed_number_stage_and_split() -> None:
    c = load_config([PRESET])
    stage = copying.first_stage(c.task)["noise"]
    a = copying.open_task(c, "train", stage)
    for other in (copying.open_task(c, "val", stage), copying.open_task(c, "train", 2 * stage)):
        assert a.sample(3)[1].tolist() != other.sample(3)[1].tolist()
    assert torch.equal(a.samples([2, 5])[0][1], a.sample(5)[0])
    # A step has the same samples however many ranks share it.
    alone = data.batch(a, 0, 8, seed=1, step=3)[0]
    shared = [data.batch(a, 0, 4, seed=1, step=3, rank=rank, world_size=2)[0] for rank in (0, 1)]
    assert torch.equal(alone, torch.cat(shared))
    tokenizer = load_tokenizer(a.folder, a.meta["tokenizer"])
    assert tokenizer.decode([0, 1, 8, 9]) == ".AH~"
    with pytest.raises(UserError, match=r"block_size is 100, wanted task.noise \+ 2 task.keep = 144"):
        copying.open_task(load_config([PRESET, "--block_size=100"]), "train", 32)


def test_the_curriculum_doubles_below_the_threshold_and_follows_either_rule() -> None:
    task = CopyTask(keep=16, noise=4096, start_noise=128, rates="code")
    stage = copying.first_stage(task)
    assert copying.next_stage(task, stage, 0.31) == stage
    assert copying.next_stage(task, stage, math.nan) == stage
    for noise in (256, 512, 1024, 2048, 4096):
        stage = copying.next_stage(task, stage, 0.29)
        assert stage["noise"] == noise
    assert stage["rate"] == pytest.approx(0.298, abs=5e-4)  # as the published code has it from 128 to 4096
    slower = copying.next_stage(task, stage, 0.1)
    assert slower["rate"] == pytest.approx(stage["rate"] * (1 - math.exp(-0.1)))
    assert copying.next_stage(task, slower, 2.0)["rate"] == slower["rate"]

    note = CopyTask(keep=16, noise=4096, start_noise=2048, rates="note")
    stage = copying.first_stage(note)
    assert stage["rate"] == pytest.approx(1 - 0.5 * 2048 / 4128)
    stage = copying.next_stage(note, stage, 0.2)
    assert stage["rate"] == pytest.approx(1 - 0.5 * 4096 / 4128)
    assert copying.next_stage(note, stage, 2.0)["rate"] == pytest.approx(stage["top"] * (1 - math.exp(-2)))


TINY = ["--task.keep=2", "--task.noise=12", "--task.start_noise=3", "--task.samples=32", "--block_size=16"]
TINY += ["--window=4", "--n_embd=16", "--batch_size=8", "--task.threshold=9", "--dropout=0.1", "--device=cpu"]
TINY += ["--eval_interval=4", "--log_interval=1", "--max_steps=14", "--task.rates=note"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stops. With a threshold above every loss the noise doubles at steps 4 and 8."""
    out = tmp_path_factory.mktemp("copying") / "whole"
    run_here(["train.py", PRESET, *TINY, f"--out_dir={out}"])
    return out


def test_a_run_stopped_between_stages_goes_on_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    for stop in ("--stop_step=4", "--stop_step=8", "--stop_step=9", "--stop_step=14"):
        run_here(["train.py", PRESET, *TINY, f"--out_dir={parts}", "--resume=auto", stop])
    assert same(tensors(parts, 14), tensors(whole, 14))
    evaluations = [line for line in read_log(whole) if "val_loss" in line]
    assert [line["noise"] for line in evaluations] == [3, 6, 12, 12]
    assert {"token_accuracy", "sequence_accuracy", "alpha"} <= evaluations[-1].keys()
    logged = [[(line["loss"], line["tokens"]) for line in read_log(out) if "loss" in line] for out in (whole, parts)]
    assert logged[0] == logged[1]
    read = [8 * (4 + noise) for noise in 4 * [3] + 4 * [6] + 6 * [12]]  # 8 sequences a step, of noise + 2 keep tokens
    assert [tokens for _, tokens in logged[0]] == list(itertools.accumulate(read))


def test_a_stop_within_an_evaluation_moves_the_stage_once(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal while the first evaluation measures accuracy: what it decides is saved then, and not due again."""
    parts, accuracy = tmp_path / "parts", copying.accuracy
    with monkeypatch.context() as patch:
        patch.setattr(copying, "accuracy", lambda *a: os.kill(os.getpid(), signal.SIGTERM) or accuracy(*a))
        run_here(["train.py", PRESET, *TINY, f"--out_dir={parts}"])
    assert json.loads((parts / "stopped.json").read_text())["step"] == 4
    run_here(["train.py", PRESET, *TINY, f"--out_dir={parts}", "--resume"])
    keys = ("step", "tokens", "loss", "noise")
    told = [[[line.get(key) for key in keys] for line in read_log(out)] for out in (whole, parts)]
    assert told[0] == told[1]


def test_two_ranks_follow_the_curriculum_as_one_process_does(tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    flags = [*TINY, "--dropout=0", "--tokens_per_step=128"]
    run_here(["train.py", PRESET, *flags, f"--out_dir={alone}"])
    run_ranks(2, ["train.py", PRESET, *flags, "--batch_size=4", f"--out_dir={shared}"], tmp_path)
    told = [[line for line in read_log(out) if "val_loss" in line] for out in (alone, shared)]
    for one, two in zip(*told, strict=True):
        for key in ("step", "noise", "rate_share", "token_accuracy", "sequence_accuracy"):
            assert two[key] == pytest.approx(one[key], rel=1e-6)
        assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-5)


def test_eval_says_where_the_figures_of_a_task_are(whole: Path) -> None:
    with pytest.raises(UserError, match=r"copy is made as it is read, no corpus: its figures are in log\.jsonl"):
        evaluation.main(evaluation.EvalConfig(whole, device="cpu"))


def test_a_run_of_other_options_is_not_taken_for_the_one_that_is_asked_for(whole: Path) -> None:
    """The steps of a preset that was edited, or other flags; not the folder."""
    asked = [PRESET, *TINY]
    assert comparison.other_options(whole, load_config(asked)) == []
    changed = comparison.other_options(whole, load_config([*asked, "--learning_rate=2e-3"]))
    assert changed == ["learning_rate: the checkpoint has None, this run 0.002"]
    found = comparison.last_evaluation(whole, 14)
    losses = [line["val_loss"] for line in read_log(whole) if "val_loss" in line]
    assert (found["val_loss"], found["best_val_loss"]) == (losses[-1], min(losses))
    assert comparison.last_evaluation(whole, 12) is None


def test_a_part_of_a_comparison_has_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "compare", lambda o: ["a table"])
    for only, flags in (("", ""), ("plain", "--task.noise=64")):
        comparison.main(comparison.Options("copy_small", only=only, flags=flags, device="cpu", results=tmp_path))
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"recurrent_copy_small.md", "recurrent_copy_small_plain_task_noise_64.md"}


def final(out: Path) -> dict:
    return [line for line in read_log(out) if "val_loss" in line][-1]


def test_twenty_seconds_of_training_copy_eight_tokens(tmp_path: Path) -> None:
    short = ["--task.noise=32", "--block_size=48", "--max_steps=120", "--task.samples=320", "--save_interval=120"]
    run_here(["train.py", PRESET, *short, f"--out_dir={tmp_path / 'run'}", "--device=cpu"])
    assert final(tmp_path / "run")["token_accuracy"] >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_copying_is_learned_by_accumulating(tmp_path: Path, seed: int) -> None:
    run_here(["train.py", PRESET, f"--seed={seed}", f"--out_dir={tmp_path / 'run'}", "--device=cpu"])
    end = final(tmp_path / "run")
    assert end["noise"] == 128
    assert end["token_accuracy"] >= 0.99


@pytest.mark.slow
def test_selective_copying_is_learned(tmp_path: Path) -> None:
    """Half of the preset's steps: chance is 0.125, three seeds ended at 0.99 after all of them."""
    run_here(["train.py", "config/selective_copy_small.py", "--max_steps=2200", f"--out_dir={tmp_path / 'run'}"])
    end = final(tmp_path / "run")
    assert end["noise"] == 64
    assert end["token_accuracy"] >= 0.85


@pytest.mark.slow
def test_copying_is_not_learned_by_forgetting(tmp_path: Path) -> None:
    control = ["--alpha=0", "--alpha_learned=false"]
    run_here(["train.py", PRESET, *control, f"--out_dir={tmp_path / 'run'}", "--device=cpu"])
    assert final(tmp_path / "run")["token_accuracy"] < 0.5
