"""Presets: what is wrong with one is said in a line.

    .venv/bin/pytest tests/test_presets.py        CPU, seconds
"""

from pathlib import Path

import pytest

from config import UserError, load_config


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


def test_presets_stack_and_the_command_line_wins(tmp_path: Path) -> None:
    first = "import math\nn_layer = 2 * 3\nlowdim = dict(q=8, k=8)\nmax_steps = 7\nwandb = True\n"
    (tmp_path / "a.py").write_text(first)
    (tmp_path / "b.py").write_text("lowdim = {}\nmax_steps = 8\n")
    c = load_config([str(tmp_path / "a.py"), str(tmp_path / "b.py"), "--max_steps=9", "--wandb=false", "--resume"])
    assert (c.gpt.n_layer, c.gpt.lowdim.q, c.max_steps, c.wandb, c.resume) == (6, 0, 9, False, "must")
