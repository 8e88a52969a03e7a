"""Each page and docstring: its commands parse, its files exist, and the three commands of the demo run.

    .venv/bin/pytest tests/test_readme.py        CPU, about 20 s
"""

import ast
import dataclasses
import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import bench
from config import TrainConfig, load_config
from experiments import demo
from lpa import hf
from model import GPTConfig

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "experiments").glob("*/README.md"))
FOLDERS = ("config", "data", "lpa", "experiments")
CODE = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
CLASSES = dict(train="TrainConfig", sample="SampleConfig", eval="EvalConfig")
CLASSES |= dict(export="ExportConfig", bench="BenchConfig")
MADE_UP = {"config/mine.py", "config/narrow_cpu.py"}  # files that the reader writes


def commands_in(text: str) -> set[str]:
    """Return the commands of lines and of `code` in a page or docstring, without comments and placeholders."""
    text = re.sub(r" *\\\n *", " ", text)
    found = re.findall(r"^(?:launch)? *(?:echo .*\| )?((?:python|torchrun|make) .*)", text, flags=re.MULTILINE)
    found = [re.split(r" #| {2,}| > ", command)[0].strip() for command in found]
    today = "\n\n".join(part for part in text.split("\n\n") if "f374173" not in part)  # a commit with other commands
    found += re.findall(r"`((?:python|torchrun) (?:-m \w|\w+\.py)[^`\n]*)`", today)
    skip = r"\$|\bRUNS?\b|NAME|--key|--help|config/mine|narrow_cpu|unicode_names|=silu"
    return {command for command in found if not re.search(skip, command)}


DOCSTRINGS = [ast.get_docstring(ast.parse(path.read_text())) or "" for path in CODE]
COMMANDS = sorted(set.union(*(commands_in(text) for text in [*DOCSTRINGS, *(p.read_text() for p in PAGES)])))


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 160
    assert len(README.split()) <= 1600


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_exists_and_its_options_parse(command: str) -> None:
    program, *arguments = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        return
    while program == "torchrun" and arguments[0].startswith("--"):
        arguments = arguments[1:]
    name, *arguments = arguments[1:] if arguments[0] == "-m" else arguments
    module = importlib.import_module(name.removesuffix(".py"))
    if name == "experiments.sweep":
        base, grid, _ = module.split_arguments(arguments)
        for more in module.arms(grid).values():
            load_config([*base, *more])
    else:
        kind = "SampleConfig" if name.endswith(".sample") else CLASSES.get(module.__name__, "Options")
        load_config(arguments, getattr(module, kind))


def test_the_commands_of_each_kind_are_found() -> None:
    assert len(COMMANDS) >= 80
    programs = ("torchrun --nnodes=2", "python -m experiments.recurrent.train", "python export.py", "make demo")
    assert [p for p in programs if not any(c.startswith(p) for c in COMMANDS)] == []


def test_the_line_that_begins_with_gpt2_has_its_options(tmp_path: Path) -> None:
    pytest.importorskip("transformers").GPT2Config().save_pretrained(tmp_path)  # of the published 124M
    theirs = dataclasses.replace(hf.read_options(tmp_path, *hf.read_config(tmp_path)), bias=True)
    command = next(c for c in COMMANDS if "nanogpt_124m" in c and "--init_from=gpt2" in c)
    assert load_config(shlex.split(command)[2:]).gpt == theirs


def test_code_of_the_walkthrough_stands_in_the_model() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "walkthrough.md").read_text(), flags=re.DOTALL)
    assert blocks
    code = (ROOT / "model.py").read_text().splitlines()
    assert [line for block in blocks for line in block.splitlines() if line not in code] == []


def test_the_options_that_replace_those_of_nanogpt_exist() -> None:
    table = (ROOT / "docs" / "nanogpt.md").read_text().split("\n## ")[1]
    ours = " ".join(row.split("|")[2] for row in table.splitlines() if row.startswith("| `"))
    named = set(re.findall(r"(?<=`)(?:--)?[a-z_]{4,}(?=[`=])", ours))
    options = {field.name for kind in (TrainConfig, GPTConfig) for field in dataclasses.fields(kind)}
    assert len(named) >= 12
    assert {name.removeprefix("--") for name in named} <= options


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_and_link_of_a_page_exists(page: Path) -> None:
    text = page.read_text()
    folders = "config|docs|experiments|lpa|results|tests"
    named = re.findall(rf"(?<![\w/])(?:{folders})/[\w/]+\.(?:py|md|ipynb|sh|svg|png)", text)
    assert [name for name in named if name not in MADE_UP and not (ROOT / name).exists()] == []
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_tree_names_every_command_and_folder() -> None:
    tree = re.search(r"```\n(model\.py.*?)```", README, flags=re.DOTALL)[1]
    named = set(re.findall(r"\b\w+\.py|^\w+(?=/)", tree, flags=re.MULTILINE))
    assert all((ROOT / name).exists() for name in named)
    assert {path.name for path in ROOT.glob("*.py")} <= named


def test_the_commands_of_the_demo_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """All that `make demo` runs, on less. The number of steps is fixed at its start, and kept for the next call."""
    less = {"train.py": "--max_steps=2 --eval_tokens=640", "sample.py": "--max_new_tokens=5", "bench.py": "--pairs=1"}
    run = demo.run
    monkeypatch.setattr(demo, "run", lambda command: run(f"{command} {less.get(command.split()[0], '')}"))
    times = {"lpa_cpu": [50.0, 40.0, 60.0], "dense_cpu": [50.0]}
    monkeypatch.setattr(bench, "alternate", lambda works, rounds, device: times)
    demo.main(demo.Options(minutes=3.0, out=tmp_path))
    assert json.loads((tmp_path / "steps.json").read_text()) == {"lpa_cpu": 3600}
    assert (tmp_path / "curves.png").exists()
    written = capfd.readouterr().out
    assert f"train.py config/lpa_cpu.py --max_steps=3600 --log_interval=10 --out_dir={tmp_path}/lpa_cpu" in written
    for script in less:
        assert f"python {script} " in README
    times["lpa_cpu"] = [1.0]
    assert demo.planned_steps(demo.Options(out=tmp_path)) == {"lpa_cpu": 3600}
    both = demo.planned_steps(demo.Options(minutes=6.12, out=tmp_path / "fast"))
    assert both == {"lpa_cpu": 7200, "dense_cpu": 7200}
