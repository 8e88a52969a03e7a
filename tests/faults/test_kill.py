"""SIGKILL wherever a checkpoint touches the disk and at random moments: the resumed run ends with the same bits.

    .venv/bin/pytest tests/faults/test_kill.py                a dozen kills, and two of a sharded run
    .venv/bin/pytest -m slow tests/faults/test_kill.py        100 of them, and 20
"""

import collections
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, read_log, run, run_ranks, start, start_ranks
from test_train import arguments, losses, same, tensors

STEPS = 60
OPTIONS = ["--dropout=0.1", "--tokens_per_step=256", f"--max_steps={STEPS}", "--save_interval=3", "--eval_interval=10"]
OPTIONS += ["--eval_tokens=64"]
KINDS = ("open", "save", "write", "fsync", "rename", "mkdir", "prune")
SHARDED = ["--dropout=0.1", "--tokens_per_step=256", "--max_steps=24", "--save_interval=2", "--shard"]
POINTS = [(0, kind) for kind in KINDS[1:]]  # rank 0 publishes
POINTS += [(1, kind) for kind in ("save", "write", "fsync", "mkdir")]


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, collections.Counter]:
    """The run that nothing befell, and how often it touched the disk in each way."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(
        arguments(corpus, folder / "run", *OPTIONS),
        folder / "out.txt",
        dict(FAULT_LOG=str(folder / "events")),
        "events.kill_at",
    )
    process.join()
    assert process.exitcode == 0, (folder / "out.txt").read_text()
    return folder / "run", collections.Counter((folder / "events").read_text().split())


def assert_same_run(out: Path, whole: Path) -> None:
    """Every loss, the weights and moments, and which checkpoint is the best with what loss."""
    assert losses(out) == losses(whole)
    evaluations = [[line for line in read_log(run) if "val_loss" in line] for run in (out, whole)]
    assert evaluations[0] == evaluations[1]
    assert same(tensors(out, STEPS), tensors(whole, STEPS))
    best = [(run / "ckpt" / "best").read_text() for run in (out, whole)]
    assert best[0] == best[1]
    marked = [json.loads((run / "ckpt" / best[0].strip() / "manifest.json").read_text()) for run in (out, whole)]
    assert marked[0]["best_val_loss"] == marked[1]["best_val_loss"]


def kill_again_and_again(corpus: Path, whole: Path, folder: Path, kills: int, draw: random.Random) -> dict[str, int]:
    """Kill runs at drawn events until so many kills were met; each run is resumed until it ends. The kills, by kind."""
    met: collections.Counter[str] = collections.Counter()
    for number in range(kills):
        out = folder / f"run_{number}"
        while True:
            kind = KINDS[sum(met.values()) % len(KINDS)] if sum(met.values()) < kills else ""
            fault = dict(FAULT_LOG=str(folder / "events"), FAULT_KIND=kind, FAULT_AT=str(draw.randint(1, 12)))
            command = arguments(corpus, out, *OPTIONS, "--resume=auto")
            process = start(command, folder / "out.txt", fault, "events.kill_at")
            process.join()
            printed = (folder / "out.txt").read_text()
            assert process.exitcode in (0, -signal.SIGKILL), printed
            assert "skipped" not in printed  # nothing half written ever stands under a checkpoint's name
            if process.exitcode == 0:
                break
            met[kind] += 1
        assert_same_run(out, whole)
        if sum(met.values()) >= kills:
            break
    return dict(met)


def test_a_dozen_kills_lose_nothing(corpus: Path, tmp_path: Path, undisturbed: tuple) -> None:
    whole, events = undisturbed
    assert all(events[kind] > 12 for kind in KINDS)  # so each draw is met
    met = kill_again_and_again(corpus, whole, tmp_path, 12, random.Random(1))
    assert sum(met.values()) == 12
    assert met.keys() == set(KINDS)


@pytest.mark.slow
def test_eighty_kills_lose_nothing(corpus: Path, tmp_path: Path, undisturbed: tuple) -> None:
    met = kill_again_and_again(corpus, undisturbed[0], tmp_path, 80, random.Random(2))
    print(f"kills by event: {met}")
    assert sum(met.values()) == 80


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_nothing(corpus: Path, tmp_path: Path, undisturbed: tuple) -> None:
    draw, kills, number = random.Random(3), 0, 0
    while kills < 20:
        number += 1
        out = tmp_path / f"run_{number}"
        while True:
            process = start(arguments(corpus, out, *OPTIONS, "--resume=auto"), tmp_path / "out.txt")
            process.join(draw.uniform(0.5, 3.0) if kills < 20 else None)
            if process.exitcode is None:
                kills += 1
                process.kill()
                process.join()
            elif process.exitcode == 0:
                break
        assert_same_run(out, undisturbed[0])


@pytest.mark.slow
def test_a_worker_killed_under_torchrun_goes_on_by_itself(corpus: Path, tmp_path: Path) -> None:
    """--max-restarts starts all ranks again, and --resume=auto finds the last checkpoint."""
    options = ["--tokens_per_step=256", "--max_steps=12", "--save_interval=5", "--resume=auto"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    program = "import sys; sys.path[:0] = ['tests', 'tests/faults', '.']; import events, train\n"
    program += "events.die_once(); train.main(train.load_config(sys.argv[1:]))"
    (tmp_path / "dies.py").write_text(program)
    env = dict(FAULT_LOG=str(tmp_path / "killed"), PYTHONPATH=".")
    dies = [str(tmp_path / "dies.py"), *arguments(corpus, tmp_path / "run", *options)[1:]]
    result = run(*launch, "--max-restarts=2", *dies, env=env)
    assert (tmp_path / "killed").exists()
    assert "continuing from" in result.stdout
    run(*launch, *arguments(corpus, tmp_path / "whole", *options))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert same(tensors(tmp_path / "run", 12), tensors(tmp_path / "whole", 12))


@pytest.mark.slow
def test_workers_stop_when_torchrun_is_killed(corpus: Path, tmp_path: Path) -> None:
    """It took the store with it; nobody else would end them."""
    output, out = tmp_path / "out.txt", tmp_path / "run"
    options = ["--tokens_per_step=256", "--max_steps=1000000", "--max_hours=0.05", "--save_interval=5"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += arguments(corpus, out, *options)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(output, "w") as file:
        torchrun = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file)
    while not (out / "ckpt" / "last").exists():
        assert torchrun.poll() is None, output.read_text()
        time.sleep(0.1)
    torchrun.kill()
    torchrun.wait()
    deadline = time.monotonic() + 60
    while "torchrun is gone" not in output.read_text() and time.monotonic() < deadline:
        time.sleep(0.5)
    printed = output.read_text()
    assert "error: torchrun is gone: stopped at step" in printed, printed
    assert "Traceback" not in printed
    assert not (out / "stopped.json").exists()


# --- Two ranks that save their shards together -------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed_shards(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed_shards")
    run_ranks(2, arguments(corpus, folder / "run", *SHARDED), folder)
    return folder / "run"


def kill_ranks(corpus: Path, whole: Path, folder: Path, points: list[tuple[int, str, int]]) -> None:
    """A sharded run in which at each point, (rank, kind of event, which of that kind), a rank is killed in a save.

    The other rank then says so and ends, and both are started again, until nothing more befalls them.
    """
    command = arguments(corpus, folder / "run", *SHARDED, "--resume=auto")
    for rank, kind, at in points:
        fault = dict(FAULT_LOG=str(folder / "events"), FAULT_RANK=str(rank), FAULT_KIND=kind, FAULT_AT=str(at))
        codes, printed = start_ranks(2, command, folder, "events.kill_at", fault)
        assert (codes[rank], codes[1 - rank]) == (-signal.SIGKILL, 1), printed
        assert f"error: process {rank}" in printed  # 'did not answer', or that it and its list of ranks are gone
        assert "skipped" not in printed
        assert "Traceback" not in printed
    run_ranks(2, command, folder)
    assert losses(folder / "run") == losses(whole)
    assert same(tensors(folder / "run", 24), tensors(whole, 24))


def test_a_rank_killed_between_its_shard_and_the_manifest_costs_nothing(
    corpus: Path, tmp_path: Path, undisturbed_shards: Path
) -> None:
    kill_ranks(corpus, undisturbed_shards, tmp_path, [(1, "write", 2), (0, "rename", 3)])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [4, 5])
def test_ten_kills_of_a_rank_in_sharded_saves_lose_nothing(
    corpus: Path, tmp_path: Path, undisturbed_shards: Path, seed: int
) -> None:
    draw = random.Random(seed)
    points = [(rank, kind, draw.randint(1, 2)) for rank, kind in draw.sample(POINTS, len(POINTS))]
    kill_ranks(corpus, undisturbed_shards, tmp_path, points)
