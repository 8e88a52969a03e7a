"""What takes minutes: make test-slow.

    .venv/bin/pytest -m slow tests/test_slow.py        CPU, 2 cores, about 2 minutes
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_train import arguments, losses, same, tensors

pytestmark = pytest.mark.slow


def test_a_run_killed_again_and_again_ends_as_an_undisturbed_one(corpus: Path, tmp_path: Path) -> None:
    """SIGKILL at random times, while it trains or saves, and --resume=auto: weights and losses are the same bits."""
    options = ["--dropout=0.1", "--tokens_per_step=256", "--max_steps=400", "--save_interval=3"]
    random.seed(1)
    kills = 0
    for out in (tmp_path / "whole", tmp_path / "killed"):
        while True:
            command = [sys.executable, *arguments(corpus, out, *options, "--resume=auto")]
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            if out.name == "killed" and kills < 12:
                time.sleep(random.uniform(2.5, 5.5))
                kills += process.poll() is None
                process.kill()
            if process.wait() == 0:
                break
    assert kills > 5
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert same(tensors(tmp_path / "killed", 400), tensors(tmp_path / "whole", 400))
