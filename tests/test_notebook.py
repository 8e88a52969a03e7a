"""docs/dense_and_lpa.ipynb: kept without outputs, and runs from top to bottom.

    .venv/bin/pytest tests/test_notebook.py                CPU, below 1 s
    .venv/bin/pytest -m slow tests/test_notebook.py        CPU, 2 cores, about 6 minutes
"""

import ast
import json
import os
from pathlib import Path

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "docs" / "dense_and_lpa.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]


def test_the_notebook_is_kept_without_outputs() -> None:
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert [cell["metadata"] for cell in code if cell["metadata"]] == [{"tags": ["parameters"]}]


def test_what_the_notebook_imports_exists() -> None:
    source = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code")
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if node.module.split(".")[0] in ("config", "experiments", "model")]
    assert len(ours) >= 5
    for node in ours:
        for alias in node.names:
            exec(f"from {node.module} import {alias.name}", {})


@pytest.mark.slow
@pytest.mark.parametrize("steps", [5, None], ids=["5 steps", "as it is"])
def test_the_notebook_runs(steps: int | None, tmp_path: Path) -> None:
    for package in ("nbclient", "nbformat", "ipykernel", "matplotlib"):
        pytest.importorskip(package, reason=f"executing the notebook needs: pip install {package}")
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    chosen = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    chosen.source += f"\nout = {str(tmp_path)!r}" + (f"\nsteps = {steps}" if steps else "")
    apart = {name: str(tmp_path / "jupyter") for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR")}
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}  # where Jupyter starts it
    nbclient.NotebookClient(notebook, timeout=1800, resources=place).execute(env=os.environ | apart)
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    told = "".join(output.text for found in outputs.values() for output in found if output.output_type == "stream")
    pictures = [output for found in outputs.values() for output in found if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    assert "dense: 1,4" in told and "lpa: 1,2" in told  # parameters
    assert told.count("bits per byte of text it has not seen") == 2
    if steps is None:
        losses = [float(line.split()[1]) for line in told.splitlines() if line.endswith("text it has not seen")]
        assert max(losses) < 2.3, "far from noise, which is 8"
