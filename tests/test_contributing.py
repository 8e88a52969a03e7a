"""The examples of CONTRIBUTING.md: each goes into a copy of the project, is as short as the page says, and trains.

    .venv/bin/pytest tests/test_contributing.py        CPU, about 10 s
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, read_log

SECTIONS = {part.splitlines()[0]: part for part in (ROOT / "CONTRIBUTING.md").read_text().split("\n## ")}
VALUE = re.search(r"```python\n(.*?)\n```", SECTIONS["Add a value to the log"], flags=re.DOTALL)[1]
KIND = re.search(r"```diff\n(.*?)```", SECTIONS["Add a kind of linear layer"], flags=re.DOTALL)[1]
NEW_FILES = {
    "data/unicode_names/prepare.py": SECTIONS["Add a corpus"],
    "config/narrow_cpu.py": SECTIONS["Add a preset"],
}

# In one process, as importing torch takes longer than all of it
TRY = """
import runpy, sys, torch, train
from lpa import decode, hf
from model import GPT
sys.argv = ["prepare", "--name=" + sys.argv[1] + "/names"]
runpy.run_module("data.unicode_names.prepare", run_name="__main__")
small = ["--device=cpu", "--n_layer=1", "--batch_size=2", "--tokens_per_step=512", "--max_steps=1"]
small += ["--eval_tokens=512", "--dtype=float32", "--dataset=names"]
for name, options in (("kind", ["config/lpa_cpu.py", "--latent=silu"]), ("preset", ["config/narrow_cpu.py"])):
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


def insert(text: str, hunk: str) -> str:
    """Insert the + lines of a hunk beside the lines that show the place, which must be there once."""
    place = "".join(line[1:] + "\n" for line in hunk.splitlines() if line[0] == " ")
    assert text.count(place) == 1, f"CONTRIBUTING.md shows a place that is not in the code:\n{place}"
    return text.replace(place, "".join(line[1:] + "\n" for line in hunk.splitlines()))


def test_the_examples_go_in_and_train(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, copy)
    for folder in ("config", "data", "lpa"):
        leave_out = shutil.ignore_patterns("*.bin", "*.json", "*.jsonl", "__pycache__")
        shutil.copytree(ROOT / folder, copy / folder, ignore=leave_out)
    parts = re.split(r"^(\S+\.py)\n", KIND, flags=re.MULTILINE)
    changed = dict(zip(parts[1::2], parts[2::2]))
    assert list(changed) == ["model.py", "lpa/hf.py"]
    new = [line[1:] for line in KIND.splitlines() if line.startswith("+") and line[1:]]
    assert f"are new, {len(new)} of them" in SECTIONS["Add a kind of linear layer"]
    for name, hunks in changed.items():
        text = (copy / name).read_text()
        for hunk in hunks.strip("\n").split("\n\n"):
            text = insert(text, hunk)
        (copy / name).write_text(text)
    text = (copy / "train.py").read_text()
    assert text.count("check.counts())") == 1
    (copy / "train.py").write_text(text.replace("check.counts())", f"{VALUE})"))
    for name, section in NEW_FILES.items():
        source = re.search(r"```python\n(.*?)```", section, flags=re.DOTALL)[1]
        assert f"`{name}`" in section
        assert f"One file of {sum(map(bool, source.splitlines()))} lines" in section
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(source)
    result = subprocess.run(
        [sys.executable, "-c", TRY, str(copy)],
        cwd=copy,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^q +192 +192 +24 ", result.stdout, flags=re.MULTILINE)
    for name in ("kind", "preset"):
        *_, step, evaluation = read_log(copy / "out" / name)
        assert 0 < step["head_grad_norm"] <= step["grad_norm"]
        assert evaluation["val_loss"] < 5.54, "one step from ln 256 = 5.545"
