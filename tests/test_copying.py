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
from conftest import ROOT, read_log, run_here, run_ranks
from test_train import same, tensors

from config import UserError, load_config
from data.tokenizers import load_tokenizer
from experiments.recurrent import tasks
from experiments.recurrent.tasks import Copying, CopyTask
from experiments.recurrent.train import Options
from lpa.distributed import DistInfo

PRESETS = "experiments/recurrent/config"
PRESET = f"{PRESETS}/copy_small.py"
TRAIN = ["experiments.recurrent.train", PRESET, "--device=cpu"]
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", tasks.TASKS)
def test_the_answer_is_what_stands_in_the_text_in_its_order(name: str) -> None:
    x, y = Copying(name, "train", 1, CopyTask(keep=4, noise=12, alphabet=8), 12).samples(range(400))
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
    o = load_config([PRESET], Options)
    a, val = tasks.open_task(o.train, o.task, 32)
    for other in (val, tasks.open_task(o.train, o.task, 64)[0]):
        assert a.sample(3)[1].tolist() != other.sample(3)[1].tolist()
    assert torch.equal(a.samples([2, 5])[0][1], a.sample(5)[0])
    # A step has the same samples for any number of ranks.
    ((alone, _),) = a.micro_batches(8, 3, 1, DistInfo(0, 1, CPU))
    shared = [next(a.micro_batches(4, 3, 1, DistInfo(rank, 2, CPU)))[0] for rank in (0, 1)]
    assert torch.equal(alone, torch.cat(shared))
    assert load_tokenizer(a.folder, a.meta["tokenizer"]).decode([0, 1, 8, 9]) == ".AH~"
    short = load_config([PRESET, "--block_size=100"], Options)
    with pytest.raises(UserError, match=r"block_size is 100, wanted task.noise \+ 2 task.keep = 144"):
        tasks.open_task(short.train, short.task, 32)


def test_the_curriculum_doubles_below_the_threshold_and_follows_either_rule() -> None:
    task = CopyTask(keep=16, noise=4096, start_noise=128, rates="code")
    stage = tasks.first_stage(task)
    assert tasks.next_stage(task, stage, 0.31, 50) == stage | dict(decided=50)
    for noise in (256, 512, 1024, 2048, 4096):
        stage = tasks.next_stage(task, stage, 0.29, 50)
        assert stage["noise"] == noise
    assert stage["rate"] == pytest.approx(0.298, abs=5e-4)  # as the published code has it from 128 to 4096
    slower = tasks.next_stage(task, stage, 0.1, 50)
    assert slower["rate"] == pytest.approx(stage["rate"] * (1 - math.exp(-0.1)))
    assert tasks.next_stage(task, slower, 2.0, 50)["rate"] == slower["rate"]

    note = CopyTask(keep=16, noise=4096, start_noise=2048, rates="note")
    stage = tasks.first_stage(note)
    assert stage["rate"] == pytest.approx(1 - 0.5 * 2048 / 4128)
    stage = tasks.next_stage(note, stage, 0.2, 50)
    assert stage["rate"] == pytest.approx(1 - 0.5 * 4096 / 4128)
    assert tasks.next_stage(note, stage, 2.0, 50)["rate"] == pytest.approx(stage["top"] * (1 - math.exp(-2)))


@pytest.mark.parametrize("path", sorted((ROOT / PRESETS).glob("*.py")), ids=lambda path: path.stem)
def test_a_preset_loads_and_opens_with_its_command(path: Path) -> None:
    o = load_config([str(path)], Options)
    assert (o.model == "gpt") == ("gpt" in path.stem)
    assert f"launch    python -m experiments.recurrent.train {PRESETS}/{path.name}" in path.read_text()


TINY = ["--task.keep=2", "--task.noise=12", "--task.start_noise=3", "--task.samples=32", "--block_size=16"]
TINY += ["--recurrent.window=4", "--n_embd=16", "--batch_size=8", "--task.threshold=9", "--dropout=0.1"]
TINY += ["--eval_interval=4", "--log_interval=1", "--max_steps=14", "--task.rates=note"]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stops. With a threshold above every loss the noise doubles at steps 4 and 8."""
    out = tmp_path_factory.mktemp("copying") / "full"
    run_here([*TRAIN, *TINY, f"--out_dir={out}"])
    return out


def test_a_run_stopped_between_stages_resumes_bit_for_bit(full: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    for stop in ("--stop_step=4", "--stop_step=8", "--stop_step=9", "--stop_step=14"):
        run_here([*TRAIN, *TINY, f"--out_dir={parts}", "--resume=auto", stop])
    assert same(tensors(parts, 14), tensors(full, 14))
    evaluations = [line for line in read_log(full) if "val_loss" in line]
    assert [line["noise"] for line in evaluations] == [3, 6, 12, 12]
    assert {"token_accuracy", "sequence_accuracy", "alpha"} <= evaluations[-1].keys()
    logged = [[(line["loss"], line["tokens"]) for line in read_log(out) if "loss" in line] for out in (full, parts)]
    assert logged[0] == logged[1]
    read = [8 * (4 + noise) for noise in 4 * [3] + 4 * [6] + 6 * [12]]  # 8 sequences a step, of noise + 2 keep tokens
    assert [tokens for _, tokens in logged[0]] == list(itertools.accumulate(read))


def test_a_stop_within_an_evaluation_moves_the_stage_once(
    full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal while the first evaluation measures accuracy: what it decides is saved then, and not due again."""
    parts, accuracy = tmp_path / "parts", tasks.accuracy
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "accuracy", lambda *a: os.kill(os.getpid(), signal.SIGTERM) or accuracy(*a))
        run_here([*TRAIN, *TINY, f"--out_dir={parts}"])
    assert json.loads((parts / "stopped.json").read_text())["step"] == 4
    run_here([*TRAIN, *TINY, f"--out_dir={parts}", "--resume"])
    keys = ("step", "tokens", "loss", "noise")
    logged = [[[line.get(key) for key in keys] for line in read_log(out)] for out in (full, parts)]
    assert logged[0] == logged[1]


def test_two_ranks_follow_the_curriculum_as_one_process_does(tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    flags = [*TINY, "--dropout=0", "--tokens_per_step=128"]
    run_here([*TRAIN, *flags, f"--out_dir={alone}"])
    run_ranks(2, [*TRAIN, *flags, "--batch_size=4", f"--out_dir={shared}"], tmp_path)
    logged = [[line for line in read_log(out) if "val_loss" in line] for out in (alone, shared)]
    for one, two in zip(*logged, strict=True):
        for key in ("step", "noise", "rate_share", "token_accuracy", "sequence_accuracy"):
            assert two[key] == pytest.approx(one[key], rel=1e-6)
        assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-5)


def learned(out: Path, preset: str, *flags: str) -> dict:
    """Train, and return the last evaluation."""
    run_here(["experiments.recurrent.train", f"{PRESETS}/{preset}.py", "--device=cpu", *flags, f"--out_dir={out}"])
    return [line for line in read_log(out) if "val_loss" in line][-1]


def test_twenty_seconds_of_training_copy_eight_tokens(tmp_path: Path) -> None:
    short = ["--task.noise=32", "--block_size=48", "--max_steps=120", "--task.samples=320", "--save_interval=120"]
    assert learned(tmp_path / "run", "copy_small", *short)["token_accuracy"] >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_copying_is_learned_by_accumulating(tmp_path: Path, seed: int) -> None:
    end = learned(tmp_path / "run", "copy_small", f"--seed={seed}")
    assert (end["noise"], end["token_accuracy"]) >= (128, 0.99)


@pytest.mark.slow
def test_selective_copying_is_learned_and_copying_is_not_by_forgetting(tmp_path: Path) -> None:
    """Half of the preset's steps: chance is 0.125, three seeds ended at 0.99 after all of them."""
    end = learned(tmp_path / "selective", "selective_copy_small", "--max_steps=2200")
    assert (end["noise"], end["token_accuracy"]) >= (64, 0.85)
    control = ["--recurrent.alpha=0", "--recurrent.alpha_learned=false"]
    assert learned(tmp_path / "forget", "copy_small", *control)["token_accuracy"] < 0.5
