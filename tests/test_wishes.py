"""docs/wishes.md: 25 wishes, each with tests that exist.

    .venv/bin/pytest tests/test_wishes.py        CPU, below 1 s
"""

import ast
import re
from functools import cache

import pytest
from conftest import ROOT

PAGE = (ROOT / "docs" / "wishes.md").read_text()
ROWS = [line for line in PAGE.splitlines() if re.match(r"\| \d+ \|", line)]
BELOW = PAGE.rpartition("|\n")[2]


@cache
def functions(file: str) -> list[ast.FunctionDef]:
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return [node for node in tree.body if isinstance(node, ast.FunctionDef)]


def test_the_wishes_are_numbered_from_1_to_25() -> None:
    assert [int(row.split("|")[1]) for row in ROWS] == list(range(1, 26))


@pytest.mark.parametrize("part", [*ROWS, BELOW], ids=[*range(1, 1 + len(ROWS)), "below"])
def test_the_named_tests_exist_and_run_in_make_test(part: str) -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", part)
    assert named
    for file, name in named:
        found = [function for function in functions(file) if function.name == name]
        assert len(found) == 1, f"{file} has {len(found)} tests {name}"
        marks = [ast.unparse(mark) for mark in found[0].decorator_list]
        assert "pytest.mark.slow" not in marks
