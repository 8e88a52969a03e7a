"""Presets: what is wrong with one is said in a line, and what its head says is so.

    .venv/bin/pytest tests/test_presets.py        CPU, seconds
"""

import ast
import dataclasses
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from config import TrainConfig, UserError, as_command, load_config, parse
from model import GPT, GPTConfig, LowDim

PRESETS = sorted(path.stem for path in (ROOT / "config").glob("[a-z]*.py"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_layr = 3", "perhaps you meant --n_layer"),
        ("n_layer = 'two'", "--n_layer"),
        ("lowdim = dict(z=3)", "--lowdim.z=3"),
        ("n_layer = ", "SyntaxError"),
        ("n_layer = 1 / 0", "ZeroDivisionError"),
        ("from config.nope import *", "ModuleNotFoundError"),
        ("raise SystemExit(3)", "SystemExit"),
    ],
)
def test_a_wrong_preset_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "preset.py").write_text(text)
    with pytest.raises(UserError) as error:
        load_config([str(tmp_path / "preset.py")])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("--lern_rate=3", "--learning_rate"),  # too far away for tyro
        ("--max_iters=5", "--max_steps"),
        ("--lowdim.qq=5", "--lowdim.q"),
        ("--quite_another=5", None),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_mistyped_option_names_the_nearest(
    argument: str, meant: str | None, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding))  # by which tyro draws its box
    with pytest.raises(UserError) as error:
        load_config([argument])
    message, _, names = str(error.value).partition("; perhaps you meant ")
    assert message == f"Unrecognized options: {argument}"
    assert names.split(" or ")[0] == (meant or "")


def test_presets_stack_and_the_command_line_wins(tmp_path: Path) -> None:
    first = "import math\nn_layer = 2 * 3\nlowdim = dict(q=8, k=8)\nmax_steps = 7\nwandb = True\n"
    (tmp_path / "a.py").write_text(first)
    (tmp_path / "b.py").write_text("lowdim = {}\nmax_steps = 8\n")
    c = load_config([str(tmp_path / "a.py"), str(tmp_path / "b.py"), "--max_steps=9", "--wandb=false", "--resume"])
    assert (c.gpt.n_layer, c.gpt.lowdim.q, c.max_steps, c.wandb, c.resume) == (6, 0, 9, False, "must")


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load_config(["--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    names = {field.name for options in (TrainConfig, GPTConfig) for field in dataclasses.fields(options)} - {"gpt"}
    names |= {f"lowdim.{field.name}" for field in dataclasses.fields(LowDim)}
    names.discard("lowdim")
    assert sorted(name for name in names if not re.search(rf"--{re.escape(name)}\b", told)) == []


@pytest.mark.parametrize("preset", PRESETS)
def test_the_options_that_a_run_tells_make_the_same_run(preset: str) -> None:
    c = load_config([f"config/{preset}.py", "--out_dir=out/two words"])
    assert load_config(shlex.split(as_command(c))) == c
    assert as_command(TrainConfig(GPTConfig(), max_steps=7)) == "--max_steps=7"


# --- Heads of presets --------------------------------------------------------------------------------------------


def head_of(preset: str) -> dict[str, list[str]]:
    """What stands behind each word of a preset's head, line by line."""
    told = ast.get_docstring(ast.parse((ROOT / "config" / f"{preset}.py").read_text()))
    head: dict[str, list[str]] = {}
    for line in told.split("\n\n")[1].splitlines():
        word, text = line[:10].strip(), line[10:].strip()
        head.setdefault(word or next(reversed(head)), []).append(text)
    return head


@pytest.mark.parametrize("preset", PRESETS)
def test_the_head_of_a_preset_tells_launch_hardware_time_and_loss(preset: str) -> None:
    head = head_of(preset)
    assert list(head) in (["launch", "hardware", "time", "loss"], ["launch", "hardware", "time", "accuracy"])
    assert all(text for texts in head.values() for text in texts)
    variables = dict(re.match(r"(\w+)=(.*)", line).groups() for line in head["launch"] if re.match(r"\w+=", line))
    commands = [re.split(r" {4,}", line)[0] for line in head["launch"] if not re.match(r"\w+=", line)]
    assert commands
    for command in commands:
        for name, value in variables.items():
            command = command.replace(f"${name}", value.strip('"'))
        assert f"config/{preset}.py" in command
        assert_parses(command)
    for file in re.findall(r"(?:results|config|experiments)/\w+\.\w+", (ROOT / f"config/{preset}.py").read_text()):
        assert (ROOT / file).exists(), file


def assert_parses(command: str) -> None:
    """That the options of train.py, or of a module that has Options, are what a command gives."""
    program, *arguments = shlex.split(command)
    while program == "torchrun" and arguments[0].startswith("--"):
        arguments = arguments[1:]
    if arguments[0] == "-m":
        module = importlib.import_module(arguments[1])
        if arguments[1] == "experiments.sweep":
            load_config(module.split_arguments(arguments[2:])[0])
        else:
            parse(arguments[2:], module.Options)
    else:
        assert arguments[0] == "train.py"
        load_config(arguments[1:])


@pytest.mark.parametrize("preset", PRESETS)
def test_the_command_that_prepares_the_corpus_parses(preset: str) -> None:
    for command in re.findall(r"^dataset = .*# (python -m .*)$", (ROOT / f"config/{preset}.py").read_text(), re.M):
        assert_parses(command)


HOURS = {preset: re.match(r"about ([\d,]+) hours of .* 40 % of its ([\d.]+) TFLOP", head_of(preset)["time"][0])
         for preset in PRESETS}  # fmt: skip


@pytest.mark.parametrize("preset", [preset for preset, match in HOURS.items() if match])
def test_hours_by_arithmetic_are_those_of_the_counted_flops(preset: str) -> None:
    hours, rate = (float(number.replace(",", "")) for number in HOURS[preset].groups())
    c = load_config([f"config/{preset}.py"])
    with torch.device("meta"):
        flops = 3 * GPT(dataclasses.replace(c.gpt, vocab_size=32_000)).flops_per_token()
    counted = flops * c.tokens_per_step * c.max_steps / (0.4 * rate * 1e12) / 3600
    assert hours == pytest.approx(counted, rel=0.1, abs=0.5)
