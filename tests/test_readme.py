"""Every command of the pages and the docstrings names what exists, parses, and, for the three of the demo, runs.

    .venv/bin/pytest tests/test_readme.py        CPU, about 20 s
"""

import ast
import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, run

import bench
import eval as evaluation
import export
import sample
from config import TrainConfig, load_config, parse
from lpa import hf

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "experiments").glob("*/README.md"))
BLOCKS = [block for page in PAGES for block in re.findall(r"```\n(.*?)```", page.read_text(), flags=re.DOTALL)]
FILES = ("*.py", "config/*.py", "data/*.py", "data/*/prepare.py", "lpa/*.py", "experiments/*.py", "experiments/*/*.py")
PATHS = [path for pattern in FILES for path in sorted(ROOT.glob(pattern))]
DOCSTRINGS = [ast.get_docstring(ast.parse(path.read_text())) or "" for path in PATHS]
COMMANDS = sorted({
    line.split("#")[0].split("|")[-1].strip()
    for block in BLOCKS
    for line in block.splitlines()
    if re.match(r"(python|torchrun|make|cat) ", line)
} | {
    re.split(r" {2,}| > ", command)[0].strip()
    for docstring in DOCSTRINGS
    for command in re.findall(r"^(?:launch)? *(?:echo .*\| )?((?:python|torchrun) .*)", docstring, flags=re.MULTILINE)
    if "$" not in command and "config/mine.py" not in command  # what the shell fills in, a preset of the reader
})  # fmt: skip


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 160
    assert len(README.split()) <= 1600


def test_the_readme_has_commands() -> None:
    assert len(COMMANDS) >= 10
    assert any(command.startswith("torchrun") for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_exists_and_its_options_parse(command: str) -> None:
    program, *arguments = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        return
    while program == "torchrun" and arguments[0].startswith("--"):
        arguments = arguments[1:]
    if arguments[0] == "-m":
        module = importlib.import_module(arguments[1])
        if arguments[1] == "experiments.sweep":
            base, grid, _ = module.split_arguments(arguments[2:])
            for more in module.arms(grid).values():
                load_config([*base, *more])
        else:
            options = sample.SampleConfig if arguments[1].endswith("sample") else module.Options
            load_config(arguments[2:], options)
        return
    script, *arguments = arguments
    assert (ROOT / script).exists()
    plain = {"sample.py": sample.SampleConfig, "eval.py": evaluation.EvalConfig, "export.py": export.ExportConfig}
    if script in plain:
        parse(arguments, plain[script])
    else:
        load_config(arguments, {"train.py": TrainConfig, "bench.py": bench.BenchConfig}[script])


def test_the_line_that_begins_with_gpt2_has_its_options(tmp_path: Path) -> None:
    pytest.importorskip("transformers").GPT2Config().save_pretrained(tmp_path)  # of the published 124M
    theirs = dataclasses.replace(hf.read_options(tmp_path, *hf.read_config(tmp_path)), bias=True)
    command = next(command for command in COMMANDS if "--init_from=gpt2" in command)
    assert load_config(shlex.split(command)[2:]).gpt == theirs


def test_code_of_the_walkthrough_stands_in_the_model() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "walkthrough.md").read_text(), flags=re.DOTALL)
    assert blocks
    code = (ROOT / "model.py").read_text().splitlines()
    assert [line for block in blocks for line in block.splitlines() if line not in code] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(r"(?:config|docs|experiments|tests|results)/[\w/]+\.(?:py|md|ipynb|sh)", page.read_text())
    not_yet = {"config/mine.py", "config/PRESET.py", "config/narrow_cpu.py", "results/lpa.md", "results/h200.md"}
    assert [name for name in named if name not in not_yet and not (ROOT / name).exists()] == []


def test_every_file_of_the_tree_exists_and_none_is_missing() -> None:
    tree = next(block for block in BLOCKS if block.startswith("model.py"))
    named = set(re.findall(r"\b\w+\.py|^\w+(?=/)", tree, flags=re.MULTILINE))
    assert all((ROOT / name).exists() for name in named)
    code = {path.name for path in ROOT.glob("*.py")}
    assert code <= named


def test_the_commands_of_the_demo_run(tmp_path: Path) -> None:
    """Those that `make demo` runs, on less."""
    demo = re.search(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1]
    lines = [line.replace("$(python)", "python").strip() for line in demo.splitlines()]
    assert all(line in README for line in lines)
    less = {"train.py": [f"--out_dir={tmp_path}/run", "--max_steps=2", "--eval_tokens=640", "--device=cpu"]}
    less |= {"sample.py": ["--max_new_tokens=5"], "bench.py": ["--pairs=1", "--device=cpu"]}
    for line in lines:
        _, script, *arguments = shlex.split(line)
        arguments = [argument.replace("out/lpa_cpu", f"{tmp_path}/run") for argument in arguments]
        assert run(script, *arguments, *less[script]).stdout
