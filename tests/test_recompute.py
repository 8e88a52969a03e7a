"""What backward rebuilds: the same gradients, the work that is run again, the memory that is not kept; and the loss.

    .venv/bin/pytest tests/test_recompute.py        CPU, about 20 s
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import read_log, run_here
from test_model import randomise
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._python_dispatch import TorchDispatchMode

from config import load_config
from lpa import counts
from lpa.loss import chunked_cross_entropy
from lpa.recompute import FUSED_ATTENTION, apply_recompute
from model import GPT, GPTConfig, LowDim

# Every width differs from every other, so that a product's shape tells which one it is.
SMALL = dict(n_layer=2, n_head=4, n_embd=32, attn_dim=48, ffn_dim=80, block_size=16, vocab_size=96)
RANKS = LowDim(q=8, k=6, v=5, o=7)
SETTING_1 = dict(norm="layernorm", norm_order="post", mlp="relu", pos="learned", bias=True, head_bias=True)
VARIANTS = {
    "setting 1": SETTING_1 | dict(lowdim=RANKS, dropout=0.2),
    "setting 2": dict(lowdim=RANKS),
    "dense, grouped heads": dict(n_kv_head=2, bias=True, dropout=0.2, tie_embeddings=True),
    "all low-rank, grouped heads": dict(lowdim=dataclasses.replace(RANKS, gate=9, up=10, down=11), n_kv_head=2),
    "gelu, no positions": dict(lowdim=RANKS, mlp="gelu", pos="none", norm="layernorm"),
}


def model_with(recompute: str, **options: Any) -> GPT:
    model = GPT(GPTConfig(**(SMALL | options)))
    randomise(model)
    apply_recompute(model, recompute)
    return model


def tokens(batch_size: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, each (B, T)."""
    idx = torch.randint(96, (batch_size, 17), generator=torch.Generator().manual_seed(0))
    return idx[:, :-1], idx[:, 1:]


def gradients(model: torch.nn.Module, forward: Callable | None = None) -> dict[str, torch.Tensor]:
    """The loss and the gradient of each parameter, always with the same dropout."""
    torch.manual_seed(3)
    loss = (model if forward is None else forward)(*tokens())
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= rtol * value.norm(), name


# --- The same gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["elementwise", "latents", "block"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_none(variant: str, recompute: str) -> None:
    expected = gradients(model_with("none", **VARIANTS[variant]))
    assert_close(gradients(model_with(recompute, **VARIANTS[variant])), expected)


@pytest.mark.parametrize("recompute", ["elementwise", "latents", "block"])
def test_gradients_under_autocast_are_those_of_none(recompute: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (gradients(model_with(r, **VARIANTS["setting 2"])) for r in ("none", recompute))
    assert found["loss"].dtype == torch.float32
    assert_close(found, expected)


@pytest.mark.parametrize("recompute", ["elementwise", "latents", "block"])
def test_a_block_compiles_without_a_graph_break(recompute: str) -> None:
    """With the partitioner that decides what a compiled backward computes again, but no C++ compiler."""
    options = dict(lowdim=RANKS, n_layer=1)
    model = model_with(recompute, **options)
    for block in model.transformer.h:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition")
    assert_close(gradients(model), gradients(model_with("none", **options)))


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("recompute", ["elementwise", "latents", "block"])
def test_ddp_sees_every_gradient_once(recompute: str) -> None:
    model = model_with(recompute, **VARIANTS["setting 1"])
    expected = gradients(model_with("none", **VARIANTS["setting 1"]))
    assert_close(gradients(model, DDP(model, gradient_as_bucket_view=True)), expected)


def test_training_losses_do_not_depend_on_it(corpus: Path, tmp_path: Path) -> None:
    losses = {}
    for recompute in ("none", "elementwise", "latents", "block"):
        out = tmp_path / recompute
        options = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--lowdim.q=8", "--lowdim.o=8"]
        options += ["--batch_size=4", "--tokens_per_step=256", "--dropout=0.1", "--max_steps=2", "--log_interval=1"]
        options += ["--eval_interval=0", "--eval_tokens=640", "--compile=off", "--device=cpu"]
        run_here(["train.py", *options, f"--dataset={corpus}", f"--out_dir={out}", f"--recompute={recompute}"])
        losses[recompute] = [line.get("loss", line.get("val_loss")) for line in read_log(out)]
    assert len(losses["none"]) == 3
    for recompute in ("elementwise", "latents", "block"):
        assert losses[recompute] == pytest.approx(losses["none"], rel=1e-6)


# --- What runs again ---------------------------------------------------------------------------------------------


class Work(TorchDispatchMode):
    """Counts attention forward passes, and products by the shapes of their two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.done: Counter = Counter()

    def __torch_dispatch__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in FUSED_ATTENTION:
            self.done["attention"] += 1
        elif function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.done[tuple(tuple(t.shape) for t in args[-2:])] += 1
        elif function in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
            raise AssertionError("a product that this count does not know")
        return function(*args, **(kwargs or {}))


def run_again(recompute: str, **options: Any) -> Counter:
    """Work of a backward pass beyond that of recompute='none'."""
    done = []
    for mode in (recompute, "none"):
        loss = model_with(mode, **options)(*tokens())
        with Work() as work:
            loss.backward()
        done.append(work.done)
    return done[0] - done[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_elementwise_runs_no_product_again(variant: str) -> None:
    assert not run_again("elementwise", **VARIANTS[variant])


@pytest.mark.parametrize("variant", ["setting 1", "setting 2"])
def test_latents_runs_no_attention_and_no_wide_product_again(variant: str) -> None:
    n, layers = 3 * 16, SMALL["n_layer"]
    up_projections = {((n, r), (r, width)): layers for r, width in ((8, 48), (6, 48), (5, 48), (7, 32))}
    assert run_again("latents", **VARIANTS[variant]) == up_projections
    # The control: whole blocks run all of it again.
    again = run_again("block", **VARIANTS[variant])
    assert again["attention"] == layers
    assert all(again[(n, 32), (32, r)] == layers for r in (8, 6, 5))
    assert again[(n, 32), (32, 80)] >= layers


@pytest.mark.parametrize("variant", ["dense, grouped heads", "all low-rank, grouped heads", "gelu, no positions"])
def test_latents_runs_no_attention_and_no_wide_product_again_in_other_models(variant: str) -> None:
    again = run_again("latents", **VARIANTS[variant])
    assert again["attention"] == 0
    assert all(shape[0][1] < 32 for shape in again), again


def test_evaluation_keeps_and_rebuilds_nothing() -> None:
    with torch.no_grad():
        losses = [model_with(recompute)(*tokens()).item() for recompute in ("none", "elementwise", "latents", "block")]
    assert len(set(losses)) == 1


# --- What is kept ------------------------------------------------------------------------------------------------


def test_activations_of_the_papers_370m_model() -> None:
    """Setting 2, T 1024, bfloat16: what a layer keeps, written out, and the issue's 0.45 MB a token for all of it."""
    c = dataclasses.replace(load_config(["config/lpa_370m.py", "--vocab_size=32000"]).gpt, block_size=1024)
    counted = counts.activation_bytes_per_token(c, "bfloat16", "latents")
    C, F_, r, H = 1024, 2736, 256, 16
    layer = 2 * (C + 3 * r + C + r + 2 * F_) + 4 * H  # input; latents; attention; latent; gate, up; log-sum-exp
    assert counted - 24 * layer <= 6 * 2 * C  # the last norm and the head's gradient
    assert counted <= 450_000


# --- The loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [7, 48, 1024])
@pytest.mark.parametrize("options", [dict(head_bias=True), dict(tie_embeddings=True)])
def test_chunked_loss_equals_plain_cross_entropy(options: dict, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lpa.loss.CHUNK", chunk)
    model, (x, y) = model_with("none", lowdim=RANKS, **options), tokens()
    found = gradients(model, lambda x, y: 3 * model(x, y))
    reference = model_with("none", lowdim=RANKS, **options).double()
    expected = gradients(reference, lambda x, y: 3 * F.cross_entropy(reference(x).flatten(0, 1), y.flatten()))
    assert_close(found, expected, rtol=2e-6)
    with torch.no_grad():
        assert model(x, y).item() == pytest.approx(expected["loss"].item() / 3, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_in_half_precision_is_float32_and_as_exact_as_the_plain_one(dtype: torch.dtype) -> None:
    """Against float64 on the same rounded inputs; float16 as the plain form has it with GradScaler's first scale."""
    generator = torch.Generator().manual_seed(5)
    x, w = (torch.randn(n, 64, generator=generator).to(dtype).requires_grad_() for n in (2048, 512))
    y = torch.randint(512, (2048,), generator=generator)
    errors = []
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    F.cross_entropy(F.linear(*exact), y).mul(65536).backward()
    head = torch.nn.Linear(64, 512, bias=False)
    head.weight = torch.nn.Parameter(w.detach())
    for loss, weight in (
        (chunked_cross_entropy(head, x, y), head.weight),
        (F.cross_entropy(F.linear(x, w).float(), y), w),
    ):
        x.grad = None
        loss.mul(65536).backward()
        assert loss.dtype == torch.float32
        errors.append([((t.grad - e.grad).norm() / e.grad.norm()).item() for t, e in zip((x, weight), exact)])
    for ours, plain in zip(*errors):
        assert ours <= 1.1 * plain + 1e-4


def test_the_loss_goes_backward_once() -> None:
    """Its gradients are scaled in place; a second time would scale them twice, so autograd must refuse it."""
    model = model_with("none", lowdim=RANKS)
    loss = model(*tokens())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
