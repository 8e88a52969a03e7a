"""Fixtures: a small real corpus, and train.py run as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import train
from config import load_config

ROOT = Path(__file__).parent.parent


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
    *arguments: str, expect: int = 0, env: dict[str, str] | None = None, stdin: str | None = None
) -> subprocess.CompletedProcess:
    """A Python of this environment in the repository's root, on one thread; its exit code must be `expect`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    command = [sys.executable, *arguments]
    pipes = dict(input=stdin, capture_output=True, text=True, timeout=300)
    result = subprocess.run(command, cwd=ROOT, env=environment, **pipes)
    assert result.returncode == expect, f"{command} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}"
    return result


def run_here(arguments: list[str]) -> None:
    """train.py in this process, which saves the seconds of a start; an error is raised."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        train.main(load_config(arguments[1:]))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def read_log(run_folder: Path) -> list[dict]:
    """log.jsonl but for its first line of each start."""
    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "versions" not in line]
