"""The recipes of CONTRIBUTING.md: each applies to a copy of the repository, is as short as it says, and trains.

    .venv/bin/pytest tests/test_contributing.py        CPU, about 6 s
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, read_log

PAGE = (ROOT / "CONTRIBUTING.md").read_text()
RECIPES = dict(zip(("kind", "corpus", "preset"), re.findall(r"```diff\n(.*?)```", PAGE, flags=re.DOTALL), strict=True))
LIMITS = dict(kind=15, corpus=15, preset=10)
HEADS = dict(kind="A kind of linear layer", corpus="A corpus", preset="A preset")
FILES = dict(kind=2, corpus=1, preset=1)

# In one process, as importing torch takes longer than all of it
TRY = """
import runpy, sys, torch, train
from lpa import decode, hf
from model import GPT
sys.argv = ["prepare", "--name=" + sys.argv[1] + "/names"]
runpy.run_module("data.unicode_names.prepare", run_name="__main__")
small = ["--device=cpu", "--n_layer=1", "--batch_size=2", "--tokens_per_step=512", "--max_steps=1"]
small += ["--eval_tokens=512", "--dtype=float32"]
for name, options in (
    ("kind", ["config/lpa_cpu.py", "--latent=silu", "--dataset=names"]),
    ("preset", ["config/narrow_cpu.py", "--dataset=names"]),
):
    train.main(train.load_config([*options, *small, "--out_dir=out/" + name]))
c = train.load_config(["config/lpa_cpu.py", "--latent=silu", "--vocab_size=64", "--mlp=swiglu", "--qk_norm=false"])
model, idx = GPT(c.gpt).double().eval(), torch.arange(16).view(2, 8)
for p in model.parameters():
    p.data.normal_(0, 0.1)
cache = decode.new_cache(model, 2)
assert all(cache.absorbed)
with torch.no_grad():
    logits = torch.cat([model(part, cache=cache) for part in idx.split(2, 1)], 1)
    torch.testing.assert_close(logits, model(idx))
try:
    hf.architecture(c.gpt)
except hf.UserError as error:
    assert "latent = 'silu'" in str(error)
else:
    raise AssertionError("an export of CoLA was not refused")
"""


def added(diff: str) -> list[str]:
    """The lines that a diff adds, without empty ones."""
    return [line for line in diff.splitlines() if line.startswith("+") and line[1:].strip() and line[:3] != "+++"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_as_few_lines_in_one_place_as_the_page_says(recipe: str) -> None:
    number = len(added(RECIPES[recipe]))
    section = next(part for part in PAGE.split("\n## ") if part.startswith(HEADS[recipe]))
    assert f"{number} lines and the empty ones between" in section
    assert 0 < number <= LIMITS[recipe]
    assert RECIPES[recipe].count("\n+++ ") == FILES[recipe]
    assert all(len(line) <= 121 for line in added(RECIPES[recipe]))


def test_the_recipes_apply_and_train(tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("no git here to apply the recipes with")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, copy)
    for folder in ("config", "data", "lpa"):
        leave_out = shutil.ignore_patterns("*.bin", "*.json", "*.jsonl", "__pycache__")
        shutil.copytree(ROOT / folder, copy / folder, ignore=leave_out)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GIT_CEILING_DIRECTORIES": str(tmp_path)}
    plain = dict(cwd=copy, env=environment, text=True, capture_output=True)
    for recipe, diff in RECIPES.items():
        result = subprocess.run(["git", "apply", "-"], input=diff, **plain)
        assert result.returncode == 0, f"{recipe}: {result.stderr}"
    result = subprocess.run([sys.executable, "-c", TRY, str(copy)], timeout=300, **plain)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^q +192 +192 +24 ", result.stdout, flags=re.MULTILINE)
    for name in ("kind", "preset"):
        assert read_log(copy / "out" / name)[-1]["val_loss"] < 5.54, "one step from ln 256 = 5.545"
