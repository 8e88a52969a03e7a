"""Spectra and outputs against dense float64 algebra and plain loops; the tables and pictures of real runs.

    .venv/bin/pytest tests/test_spectrum.py        CPU, about 15 s
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_here
from torch import nn

import data
from config import UserError, parse
from experiments.lpa import spectrum
from lpa import checkpoint
from lpa.counts import dense_weight
from model import LowRank

SHAPE = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--ffn_dim=48", "--max_steps=5"]
RUN = ["--batch_size=4", "--eval_interval=0", "--eval_tokens=640", "--compile=off", "--device=cpu"]
LPA = [f"--lowdim.{x}=8" for x in "qkvo"]
CPU = torch.device("cpu")


def randomly(layer: nn.Linear | LowRank) -> nn.Linear | LowRank:
    generator = torch.Generator().manual_seed(1)
    for p in layer.parameters():
        p.data.normal_(generator=generator)
    return layer


@torch.no_grad()
def test_the_spectrum_of_a_product_is_that_of_the_dense_matrix() -> None:
    for layer in (randomly(LowRank(40, 24, 7, bias=True)), randomly(LowRank(24, 40, 24, bias=False))):
        W = layer.B.double() @ layer.A.double()
        wanted = np.linalg.svd(W.numpy(), compute_uv=False)[: len(layer.A)]
        np.testing.assert_allclose(spectrum.spectrum(layer), wanted, rtol=1e-10)
    dense = randomly(nn.Linear(40, 24, bias=False))
    wanted = np.linalg.svd(dense.weight.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(spectrum.spectrum(dense), wanted, rtol=1e-12)


def test_ranks_of_spectra_whose_ranks_are_known() -> None:
    equal = torch.full((6,), 3.0, dtype=torch.float64)
    assert spectrum.stable_rank(equal) == pytest.approx(6)
    assert spectrum.effective_rank(equal) == pytest.approx(6)
    one = torch.tensor([5.0, 0, 0], dtype=torch.float64)
    assert spectrum.stable_rank(one) == pytest.approx(1)
    assert spectrum.effective_rank(one) == pytest.approx(1)
    values = torch.tensor([4.0, 2.0, 2.0], dtype=torch.float64)  # p = 1/2, 1/4, 1/4: an entropy of 1.5 bits
    assert spectrum.effective_rank(values) == pytest.approx(2**1.5)
    assert spectrum.stable_rank(values) == pytest.approx(24 / 16)


def test_the_mean_cosine_is_that_of_all_pairs() -> None:
    y = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1)) + 0.5
    y[1, 2] = 0  # a token whose output is zero is at a right angle to all
    pairs = [(b, i, j) for b in range(3) for i in range(5) for j in range(5) if i != j]
    cosines = [torch.cosine_similarity(y[b, i].double(), y[b, j].double(), dim=0).item() for b, i, j in pairs]
    assert spectrum.mean_cosine(y) == pytest.approx(np.mean(cosines), rel=1e-6)


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for name, more in (("dense", ["--pos=learned", "--mlp=relu", "--norm_order=post"]), ("lpa", [*LPA, "--bias=true"])):
        run_here(["train.py", *SHAPE, *RUN, *more, f"--dataset={corpus}", f"--out_dir={folder / name}"])
    return folder / "dense", folder / "lpa"


@torch.no_grad()
@pytest.mark.parametrize(("which", "ffn"), [(0, ["up", "down"]), (1, ["gate", "up", "down"])])
def test_a_row_is_what_the_whole_model_does(runs: tuple[Path, Path], corpus: Path, which: int, ffn: list[str]) -> None:
    """The walk block by block against the model's own forward pass, caught at other places."""
    rows, _ = spectrum.measure(runs[which], spectrum.Options(runs, tokens=320), CPU)
    assert {(row.layer, row.projection) for row in rows} == {(i, name) for i in range(2) for name in [*"qkvo", *ffn]}
    model = checkpoint.load_model(runs[which], CPU)[0]
    val = data.open_corpus(str(corpus), "val")
    idx, _ = data.eval_batch(val, 32, data.eval_windows(val, 32, 320))
    seen, last = {}, model.transformer.h[1]
    last.attn.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    last.attn.register_forward_hook(lambda _, inputs, y: seen.update(o=y))
    last.mlp.register_forward_hook(lambda _, inputs, y: seen.update(down=y))
    model(idx)
    v = last.attn.v
    seen["v"] = seen["x"] @ dense_weight(v).T + (0 if v.bias is None else v.bias)
    by_name = {row.projection: row for row in rows if row.layer == 1}
    for name in ("v", "o", "down"):
        s = np.linalg.svd(seen[name].flatten(0, 1).double().numpy(), compute_uv=False)
        p = s / s.sum()
        assert by_name[name].output == pytest.approx(math.exp(-sum(x * math.log(x) for x in p if x > 0)), rel=1e-4)
        assert by_name[name].cosine == pytest.approx(spectrum.mean_cosine(seen[name]), abs=1e-5)
    assert len(by_name["v"].values) == (len(v.A) if isinstance(v, LowRank) else 32)


def test_the_table_and_the_pictures(runs: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    arguments = [*map(str, runs), "--tokens=320", "--device=cpu", f"--out={tmp_path}/spectrum.md"]
    spectrum.main(parse(arguments, spectrum.Options))
    table = (tmp_path / "spectrum.md").read_text().splitlines()
    assert len([line for line in table if "| q | 32 x 32, r 8 |" in line]) == 1
    assert len([line for line in table if line.startswith("| ")]) == 2 + 13 + 26
    assert {len(line.split("|")) for line in table if line.startswith("| ") and " to " in line} == {9}
    assert (tmp_path / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    assert b"effective rank" in (tmp_path / "spectrum.svg").read_bytes()


def test_bad_input_is_one_line(runs: tuple[Path, Path], corpus: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ([tmp_path], "holds no checkpoint"),
        ([runs[0], f"--dataset={tmp_path}/none"], "no corpus"),
        ([], "no run is named"),
    ):
        with pytest.raises(UserError, match=message) as error:
            spectrum.main(parse([*map(str, arguments), "--device=cpu"], spectrum.Options))
        assert "\n" not in str(error.value)
