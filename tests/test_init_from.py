"""Starting from another run's weights: truncated SVD, energy, the loss before healing, and what is refused.

    .venv/bin/pytest tests/test_init_from.py        CPU, about 15 s
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_log, run_here

import data
from config import TrainConfig, UserError, load_config
from lpa import checkpoint, init, init_from
from lpa.counts import dense_weight
from model import GPT, GPTConfig, LowDim, LowRank

SHAPE = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--bias=true", "--ffn_dim=48"]
RUN = ["--batch_size=4", "--log_interval=1", "--eval_interval=0", "--eval_tokens=640", "--compile=off", "--device=cpu"]
LPA = [f"--lowdim.{x}=8" for x in "qkvo"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dense(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model after a few steps at a high rate, so that its matrices are no longer those of the start."""
    return trained(corpus, tmp_path_factory.mktemp("runs") / "dense", "--max_steps=15", "--learning_rate=0.01")


def trained(corpus: Path, out: Path, *more: str) -> Path:
    run_here(["train.py", *SHAPE, *RUN, f"--dataset={corpus}", f"--out_dir={out}", *more])
    return out


def started(source: Path, **options: object) -> tuple[GPT, dict[str, float]]:
    """A model that differs from the source's in these options, and the energy it kept."""
    theirs, _, manifest = checkpoint.load_model(source, CPU)
    model = GPT(GPTConfig(**{**vars(theirs.config), **options})).eval()
    return model, init_from.start_from(source, model, manifest["tokenizer"])


def test_full_rank_gives_the_same_logits(dense: Path) -> None:
    theirs = checkpoint.load_model(dense, CPU)[0]
    model, energy = started(dense, lowdim=LowDim(q=32, k=32, v=32, o=32, gate=32, up=32, down=32))
    idx = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(idx), theirs(idx), rtol=1e-4, atol=1e-5)
    assert len(energy) == 14
    assert min(energy.values()) > 1 - 1e-9


def test_energy_and_factors_are_those_of_numpys_svd(dense: Path) -> None:
    theirs = checkpoint.load_model(dense, CPU)[0]
    model, energy = started(dense, lowdim=LowDim(q=8, down=5))
    for name, rank in (("transformer.h.1.attn.q", 8), ("transformer.h.0.mlp.down", 5)):
        W = theirs.get_submodule(name).weight.detach().double().numpy()
        u, s, vh = np.linalg.svd(W, full_matrices=False)
        layer = model.get_submodule(name)
        assert energy[name] == pytest.approx((s[:rank] ** 2).sum() / (s**2).sum(), rel=1e-5)
        nearest = u[:, :rank] * s[:rank] @ vh[:rank]
        np.testing.assert_allclose(dense_weight(layer).detach().numpy(), nearest, atol=1e-5)
        np.testing.assert_allclose(layer.A.norm(dim=1).detach(), s[:rank] ** 0.5, rtol=1e-4)
        np.testing.assert_allclose(layer.B.norm(dim=0).detach(), s[:rank] ** 0.5, rtol=1e-4)
    assert energy.keys() == {f"transformer.h.{i}.{name}" for i in range(2) for name in ("attn.q", "mlp.down")}


def test_a_matrix_of_zeros_keeps_all_of_its_energy() -> None:
    A, B, energy = init.truncate(torch.linalg.svd(torch.zeros(6, 5), full_matrices=False), 2)
    assert energy == 1.0  # NaN is not JSON, which log.jsonl is to be
    assert not (B @ A).any()


def test_the_svd_of_a_product_is_that_of_the_dense_matrix() -> None:
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(7, 40, generator=generator, dtype=torch.float64)
    B = torch.randn(24, 7, generator=generator, dtype=torch.float64)
    u, s, vh = init.product_svd(A, B)
    np.testing.assert_allclose(s, np.linalg.svd((B @ A).numpy(), compute_uv=False)[:7], rtol=1e-12)
    torch.testing.assert_close(u * s @ vh, B @ A, rtol=1e-12, atol=1e-12)


def test_the_loss_before_healing_is_that_of_the_truncated_model(corpus: Path, dense: Path, tmp_path: Path) -> None:
    """Steps of a rate too small to heal: the run's first record is the truncated model, evaluated by a plain loop."""
    out = trained(corpus, tmp_path / "lpa", *LPA, f"--init_from={dense}", "--max_steps=2", "--learning_rate=1e-9")
    merged = checkpoint.load_model(dense, CPU)[0]
    for block in merged.transformer.h:
        for layer in (block.attn.q, block.attn.k, block.attn.v, block.attn.o):
            u, s, vh = torch.linalg.svd(layer.weight.data.double())
            layer.weight.data = (u[:, :8] * s[:8] @ vh[:8]).float()
    val = data.open_corpus(str(corpus), "val")
    with torch.no_grad():
        losses = [merged(*data.eval_batch(val, 32, [window])).item() for window in data.eval_windows(val, 32, 640)]
    first, second, *_, last = read_log(out)
    assert set(first["energy_kept"]) == {f"transformer.h.{i}.attn.{name}" for i in range(2) for name in "qkvo"}
    assert second["step"] == 0
    assert second["val_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert last["val_loss"] == pytest.approx(np.mean(losses), abs=1e-4)
    trained(corpus, out, *LPA, f"--init_from={dense}", "--max_steps=4", "--learning_rate=1e-9", "--resume")
    steps = [line["step"] for line in read_log(out)]
    assert steps == [0, 0, 1, 2, 2, 3, 4, 4]  # continuing from step 2, not from the dense run again


def test_a_lower_rank_and_the_way_back(corpus: Path, dense: Path, tmp_path: Path) -> None:
    lpa = trained(corpus, tmp_path / "lpa", *LPA, "--max_steps=3")
    theirs = checkpoint.load_model(lpa, CPU)[0]
    idx = torch.randint(256, (2, 32), generator=torch.Generator().manual_seed(1))
    back, energy = started(lpa, lowdim=LowDim())
    torch.testing.assert_close(back(idx), theirs(idx), rtol=1e-4, atol=1e-5)
    assert set(energy.values()) == {1.0}
    lower, energy = started(lpa, lowdim=LowDim(q=4, k=8, v=8, o=8))
    W = dense_weight(theirs.transformer.h[0].attn.q).detach().double().numpy()
    s = np.linalg.svd(W, compute_uv=False)
    assert energy.keys() == {"transformer.h.0.attn.q", "transformer.h.1.attn.q"}
    assert energy["transformer.h.0.attn.q"] == pytest.approx((s[:4] ** 2).sum() / (s**2).sum(), rel=1e-5)
    assert lower.transformer.h[0].attn.k.A.equal(theirs.transformer.h[0].attn.k.A)


def test_what_does_not_fit_is_refused_in_one_line(dense: Path, tmp_path: Path) -> None:
    for options, message in (
        (dict(n_head=4), "n_head: the checkpoint has 2, this run 4"),
        (dict(mlp="relu", ffn_dim=48), "mlp: the checkpoint has swiglu, this run relu"),
        (dict(rope_theta=500.0), "rope_theta"),
    ):
        with pytest.raises(UserError, match=message) as error:
            started(dense, **options)
        assert "\n" not in str(error.value)
    model = GPT(checkpoint.load_model(dense, CPU)[0].config)
    with pytest.raises(UserError, match="its tokenizer is not that of the corpus"):
        init_from.start_from(dense, model, {"kind": "char"})
    with pytest.raises(UserError, match="holds no checkpoint"):
        init_from.start_from(tmp_path, model, {})
    with pytest.raises(UserError, match="wanted another folder than out_dir"):
        load_config(["--init_from=out/a", "--out_dir=out/../out/a"], TrainConfig)


def test_a_rank_above_the_other_run_s_is_refused(corpus: Path, tmp_path: Path) -> None:
    lpa = trained(corpus, tmp_path / "lpa", *LPA, "--max_steps=1")
    with pytest.raises(UserError, match=r"transformer.h.0.attn.q has rank 9, wanted at most the 8 of the run"):
        started(lpa, lowdim=LowDim(q=9, k=8, v=8, o=8))


@pytest.mark.parametrize("bent", [0, 1], ids=["the new layer", "its source"])
def test_a_subclass_of_another_rank_is_refused(bent: int) -> None:
    class Bent(LowRank):
        """Not the product B A, so that no singular values describe it."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.sin())

    kinds = [LowRank, LowRank]
    kinds[bent] = Bent
    layers = [kind(8, 8, rank, bias=False) for kind, rank in zip(kinds, (2, 4))]
    with pytest.raises(UserError, match=r"attn\.q is a Bent in one of the two models, wanted the same rank"):
        init_from.change_rank("attn.q", *layers)
