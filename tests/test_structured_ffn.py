"""experiments/structured_ffn.py: its baseline, its spikes and slopes, and that no run is made twice.

.venv/bin/pytest tests/test_structured_ffn.py        CPU, about 10 s
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments import structured_ffn, structured_runs
from experiments.structured_runs import RunOptions

TINY = "n_layer = 2\nn_head = 2\nn_embd = 32\nblock_size = 16\nbatch_size = 2\ndevice = 'cpu'\n"


@pytest.mark.parametrize("kind", ["blockdense:16:4", "blockshuffle:4"])
def test_einsum_computes_what_the_layer_does(kind: str) -> None:
    layer = structured_ffn.make(kind, 32, 64, torch.device("cpu"))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(structured_ffn.einsum(layer, x), x @ layer.materialise().T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("C", [48, 192, 768, 2048, 5120])
@pytest.mark.parametrize(("part", "share"), [(2, 0.625), (4, 0.3125)])
def test_every_kind_is_at_the_share_that_its_label_says(C: int, part: int, share: float) -> None:
    for kind in RunOptions().kinds:
        pair = structured_ffn.feed_forwards(structured_runs.kind_at(kind, C, part), C, 1, torch.device("meta"))[0]
        kept = sum(p.numel() for layer in pair for p in layer.parameters()) / (8 * C * C)
        assert kept == pytest.approx(share, rel=0.001 if C > 48 else 0.04), kind


def test_a_spike_is_what_dense_does_not_show_on_the_same_batches() -> None:
    o = RunOptions(steps=400)
    falling = np.geomspace(6, 2, 400) + np.random.default_rng(1).normal(0, 0.2, 400)  # hard and easy batches
    spiked = falling + 0.1
    spiked[200:220] += 1.0
    dense, calm, spike = (
        SimpleNamespace(steps=[dict(step=i + 1, loss=loss) for i, loss in enumerate(losses)])
        for losses in (falling, falling + np.linspace(0, 0.5, 400), spiked)
    )
    assert structured_runs.largest_spike(o, dense, dense) == 0
    assert structured_runs.largest_spike(o, spike, dense) == pytest.approx(1.0, abs=1e-9)
    # What grows over all steps is no spike: within 3 windows of 8 steps it rises by 24 of 399 parts.
    assert structured_runs.largest_spike(o, calm, dense) == pytest.approx(0.5 * 24 / 399, rel=0.2)


def test_the_slope_is_the_exponent_and_its_error_that_of_the_residuals() -> None:
    flops = np.array([1e12, 1e13, 1e14, 1e15])
    s, error = structured_runs.slope(flops, 7 * flops**-0.06)
    assert s == pytest.approx(-0.06)
    assert error == pytest.approx(0, abs=1e-9)
    draw, slopes = np.random.default_rng(1), []
    for _ in range(4000):
        slopes.append(structured_runs.slope(flops, 7 * flops**-0.06 * np.exp(draw.normal(0, 0.01, 4))))
    found, errors = np.array(slopes).T
    assert found.std() == pytest.approx(math.sqrt((errors**2).mean()), rel=0.05)
    assert all(map(math.isnan, structured_runs.slope(flops[:1], flops[:1])))


def test_runs_are_made_once_and_reported(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.py").write_text(TINY)
    runs = RunOptions(preset="tiny.py", dataset=str(corpus), steps=6, kinds=("low rank",), parts=(4,), name="tiny")
    o = structured_ffn.Options(part="train", runs=runs)
    structured_ffn.main(o)
    logs = {log: log.read_bytes() for log in Path("out/structured_ffn").glob("*/log.jsonl")}
    assert len(logs) == 3
    written = Path("results/structured_ffn_tiny.md").read_text()
    for log, text in logs.items():
        last = [line for line in map(json.loads, text.decode().splitlines()) if "val_loss" in line][-1]
        (row,) = [row for row in written.splitlines() if f"| {math.exp(last['val_loss']):.3f} |" in row]
        assert ("guided" in row) == ("guided" in str(log))
    structured_ffn.main(o)
    assert {log: log.read_bytes() for log in Path("out/structured_ffn").glob("*/log.jsonl")} == logs


def test_the_table_of_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(structured_ffn, "copies", lambda C, N: 1)
    runs = RunOptions(kinds=("block-dense",), parts=(4,))
    structured_ffn.main(structured_ffn.Options(runs=runs, widths=(32,), tokens=(1, 8), few=(2,), rounds=1))
    rows = Path("results/structured_ffn_speed.md").read_text().splitlines()
    rows = [row.split(" | ") for row in rows if row.startswith("| 32 ")]
    assert [row[1] for row in rows] == ["1", "8", "2"]  # two of training and decoding, one merged ahead
    assert all(float(row[4].partition(" (")[0]) > 0 for row in rows[:2])
    assert Path("results/structured_ffn_speed.svg").exists()
