"""Fixtures: a small real corpus, and train.py run as a user runs it."""

import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from config import TrainConfig, load_config, user_errors

ROOT = Path(__file__).parent.parent


def pytest_xdist_auto_num_workers() -> int:
    """Two more than the cores: many tests wait for time to pass, or for other processes."""
    return 2 + (os.cpu_count() or 1)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Models this small gain nothing from a second thread, and lose much where the machine is busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 KB of the standard library's own text, as bytes, prepared by the real script."""
    folder = tmp_path_factory.mktemp("corpus")
    stdlib = Path(sysconfig.get_path("stdlib"))
    text = "".join((stdlib / f"{name}.py").read_text() for name in ("argparse", "ast", "dataclasses"))
    (folder / "text.txt").write_text(text[:200_000])
    places = [f"--path={folder / 'text.txt'}", f"--name={folder / 'prepared'}"]
    run("-m", "data.own_text.prepare", *places, "--tokenizer=byte")
    return folder / "prepared"


def run(
    *arguments: str, expect: int = 0, env: dict[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess:
    """A Python of this environment in the repository's root, on one thread; its exit code must be `expect`.

    A script of ours in no other environment begins as a copy of a process that has imported torch: seconds less.
    """
    if arguments[0].endswith(".py") and env is None:
        result = run_script(arguments, stdin)
    else:
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
        pipes = dict(input=stdin, capture_output=True, text=True, timeout=300)
        result = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, **pipes)
    assert result.returncode == expect, f"{arguments}: {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def run_script(arguments: tuple[str, ...], stdin: str) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("in", "out", "err")]
        streams[0].write_text(stdin)
        process = FORKSERVER.Process(target=script, args=(arguments, streams))
        process.start()
        process.join(300)
        if process.exitcode is None:
            process.kill()
        return subprocess.CompletedProcess(arguments, process.exitcode, *(path.read_text() for path in streams[1:]))


def script(arguments: tuple[str, ...], streams: list[Path]) -> None:
    os.chdir(ROOT)
    for number, (path, mode) in enumerate(zip(streams, "rww")):
        with open(path, mode) as file:
            os.dup2(file.fileno(), number)
    sys.stdin, sys.argv = open(0), list(arguments)  # noqa: SIM115  multiprocessing had closed it
    torch.set_num_threads(1)
    runpy.run_path(arguments[0], run_name="__main__")


def main_of(arguments: list[str]) -> None:
    """Call main of train.py, or of a module such as experiments.recurrent.train, which has Options of its own."""
    module = importlib.import_module(arguments[0].removesuffix(".py"))
    module.main(load_config(arguments[1:], vars(module).get("Options", TrainConfig)))


def run_here(arguments: list[str]) -> None:
    """Train in this process, which saves the seconds of a start; an error is raised."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        main_of(arguments)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["train", "bench", "sample"])  # then a process starts in a tenth of a second


def start(arguments: list[str], output: Path, env: dict[str, str] | None = None, hook: str = "") -> BaseProcess:
    """train.py in a process of its own, which begins as a copy of one that has imported everything.

    What it prints goes to the file `output`; hook = 'module.function' is called in it first.
    """
    process = FORKSERVER.Process(target=child, args=(arguments, output, env or {}, hook))
    process.start()
    return process


def run_apart(arguments: list[str], output: Path, hook: str = "") -> str:
    """train.py by `start` to its end, which must be a good one -> what it printed."""
    process = start(arguments, output, hook=hook)
    process.join(300)
    assert process.exitcode == 0, output.read_text()
    return output.read_text()


def child(arguments: list[str], output: Path, env: dict[str, str], hook: str) -> None:
    os.chdir(ROOT)
    os.environ.update(env)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if hook:
        module, _, function = hook.rpartition(".")
        getattr(importlib.import_module(module), function)()
    with user_errors():
        main_of(arguments)


def run_ranks(
    size: int, arguments: list[str], folder: Path, hook: str = "", expect: int = 0, env: dict[str, str] | None = None
) -> str:
    """As start_ranks -> what they printed; `expect` is the exit code of each."""
    codes, printed = start_ranks(size, arguments, folder, hook, env)
    assert codes == [expect] * size, printed
    return printed


def start_ranks(
    size: int, arguments: list[str], folder: Path, hook: str = "", env: dict[str, str] | None = None
) -> tuple[list[int | None], str]:
    """train.py on so many ranks, as torchrun would start them -> their exit codes, and what they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(size))
    outputs = [folder / f"rank_{rank}.txt" for rank in range(size)]
    ranks = [dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(size)]
    processes = [start(arguments, output, (env or {}) | place | rank, hook) for output, rank in zip(outputs, ranks)]
    for process in processes:
        process.join(300)
    printed = "".join(f"rank {rank}:\n{output.read_text()}" for rank, output in enumerate(outputs))
    return [process.exitcode for process in processes], printed


def read_log(run_folder: Path) -> list[dict]:
    """log.jsonl but for its first line of each start."""
    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "versions" not in line]
