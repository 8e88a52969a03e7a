"""The same numbers on a GPU as on the CPU, in float32 and bfloat16. Skipped where there is none.

    .venv/bin/pytest tests/test_cuda.py        one CUDA GPU, about a minute
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import read_log, run_here
from torch.profiler import ProfilerActivity, profile

from config import TrainConfig
from lpa import counts, decode, hardware, optim
from lpa.distributed import DistInfo, StopSignal
from lpa.nonfinite import NonFiniteCheck
from lpa.recompute import apply_recompute
from model import GPT, GPTConfig, LowDim
from train import train_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

SIZES = dict(n_layer=2, n_head=4, n_embd=128, block_size=64, vocab_size=256)
SETTINGS = {
    "setting 2": dict(lowdim=LowDim(q=32, k=32, v=32, o=32)),
    "setting 1": dict(norm="layernorm", norm_order="post", mlp="relu", pos="learned", bias=True, lowdim=LowDim(v=32)),
    "dense, shared key heads": dict(n_kv_head=2),
    "fast trainers": dict(mlp="relu2", qk_norm=True, lowdim=LowDim(q=32, k=32, v=32, o=32)),
    "rope_dim": dict(rope_dim=16, lowdim=LowDim(q=32, k=32, v=32, o=32)),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 5e-2)])
def test_logits_and_gradients_are_those_of_the_cpu(setting: str, dtype: str, tolerance: float) -> None:
    c = GPTConfig(**SIZES, **SETTINGS[setting])
    reference = GPT(c)
    model = GPT(c).cuda()
    model.load_state_dict(reference.state_dict())
    idx = torch.randint(256, (4, 65), generator=torch.Generator().manual_seed(1))
    reference(idx[:, :-1], idx[:, 1:]).backward()
    with hardware.autocast(torch.device("cuda"), dtype):
        loss = model(idx[:, :-1].cuda(), idx[:, 1:].cuda())
    loss.backward()
    torch.testing.assert_close(loss.cpu(), reference(idx[:, :-1], idx[:, 1:]), atol=tolerance, rtol=tolerance)
    norms = {name: p.grad.norm() for name, p in reference.named_parameters()}
    for (name, p), q in zip(reference.named_parameters(), model.parameters()):
        # Without RoPE the bias of k moves all scores of a query alike: its gradient is 0 but for rounding.
        scale = norms[name.replace("attn.k.bias", "attn.q.bias") if c.pos != "rope" else name]
        difference = (p.grad - q.grad.cpu()).norm() / scale
        assert difference < (1e-4 if dtype == "float32" else 5e-2), name


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("recompute", ["latents", "block"])
def test_gradients_with_recompute_are_those_without(setting: str, recompute: str) -> None:
    model = GPT(GPTConfig(**SIZES, **SETTINGS[setting])).cuda()
    idx = torch.randint(256, (4, 65), generator=torch.Generator().manual_seed(1)).cuda()
    grads = {}
    for mode in ("none", recompute):
        apply_recompute(model, mode)
        grads[mode] = torch.autograd.grad(model(idx[:, :-1], idx[:, 1:]), list(model.parameters()))
    for a, b in zip(*grads.values()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 5e-2)])
@torch.inference_mode()
def test_the_cache_gives_the_logits_of_a_full_forward(setting: str, dtype: str, tolerance: float) -> None:
    """A prompt at once, then tokens in latent space; and rows of unequal length."""
    model = GPT(GPTConfig(**SIZES, **SETTINGS[setting])).cuda().eval()
    idx = torch.randint(256, (3, 64), generator=torch.Generator().manual_seed(2)).cuda()
    with hardware.autocast(torch.device("cuda"), dtype):
        for padding in (None, torch.tensor([0, 20, 7], device="cuda")):
            cache = decode.new_cache(model, 3)
            cache.padding = padding
            logits = torch.cat([model(part, cache=cache) for part in idx.split([40, 1, 1, 22], dim=1)], dim=1)
            for row, skipped in enumerate([0, 0, 0] if padding is None else padding.tolist()):
                full = model(idx[row : row + 1, skipped:])[0]
                torch.testing.assert_close(logits[row, skipped:], full, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", [(256, 1024), (1024, 256), (512, 512)])
def test_orthogonal_in_bfloat16_is_that_of_float32(shape: tuple[int, int]) -> None:
    g = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(optim.orthogonal(g.cuda(), bfloat16=True).cpu(), optim.orthogonal(g), atol=0.02, rtol=0)


@pytest.mark.parametrize("mode", ["off", "block", "model"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_learns_and_resumes(corpus: Path, tmp_path: Path, mode: str, optimizer: str) -> None:
    options = ["--n_layer=2", "--n_head=4", "--n_embd=64", "--block_size=64", "--lowdim.k=16", "--lowdim.v=16"]
    options += [f"--dataset={corpus}", f"--compile={mode}", f"--optimizer={optimizer}", "--dtype=bfloat16"]
    options += ["--log_interval=1", "--eval_interval=0", "--eval_tokens=640", "--max_steps=20", "--dropout=0.1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_here(["train.py", *options, f"--out_dir={whole}"])
    run_here(["train.py", *options, f"--out_dir={parts}", "--stop_step=10"])
    run_here(["train.py", *options, f"--out_dir={parts}", "--resume"])
    a, b = ([line["loss"] for line in read_log(out) if "loss" in line] for out in (whole, parts))
    assert a == pytest.approx(b, rel=2e-3)
    assert a[-1] < a[0] - 0.3


def test_the_checks_of_a_step_add_no_synchronisation() -> None:
    """The check of loss and gradient and the question whether to stop; against a plain loop."""
    c = TrainConfig(gpt=GPTConfig(**SIZES), dtype="bfloat16", compile="off")
    info = DistInfo(0, 1, torch.device("cuda", torch.cuda.current_device()))
    x, y = torch.randint(256, (2, 4, 64), generator=torch.Generator().manual_seed(1)).cuda()
    model = GPT(c.gpt).cuda()
    optimizers = optim.make_optimizers(model, c)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    check, stop = NonFiniteCheck(info.device), StopSignal(info, max_hours=1.0)

    def plain() -> None:
        with hardware.autocast(info.device, c.dtype):
            loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        for optimizer in optimizers:
            optimizer.found_inf = None
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def checked() -> None:
        assert not stop.reason()
        train_step(model, iter([(x, y)]), 1, optimizers, scaler, check, c, info)

    try:
        plain(), checked()  # whatever comes with the first time
        assert waits(checked) == waits(plain)
        assert waits(lambda: (checked(), check.skipped.item())) >= waits(plain) + 10  # so it does count them
        torch.cuda.set_sync_debug_mode("error")
        checked()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        stop.close()
    assert check.skipped.item() == 0


def waits(step: Callable[[], object]) -> int:
    """How often the host waits for the device in 10 steps, by the profiler's record of the calls of CUDA."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        for _ in range(10):
            step()
    called = [event.name() for event in record.profiler.kineto_results.events()]
    return sum(name in ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize") for name in called)


def test_counted_activations_are_those_that_the_allocator_holds() -> None:
    c = GPTConfig(n_layer=4, n_head=8, n_embd=512, block_size=512, vocab_size=8192, lowdim=LowDim(128, 128, 128, 128))
    model = GPT(c).cuda()
    held = []
    for batch_size in (4, 8, 16):  # the first also makes cuBLAS take its workspace
        idx = torch.zeros(batch_size, c.block_size, dtype=torch.long, device="cuda")
        before = torch.cuda.memory_allocated()
        with hardware.autocast(torch.device("cuda"), "bfloat16"):
            loss = model(idx, idx)
        held.append(torch.cuda.memory_allocated() - before)
        loss.backward()
        del loss
    measured = (held[2] - held[1]) / (8 * c.block_size)
    assert counts.activation_bytes_per_token(c, "bfloat16") == pytest.approx(measured, rel=0.05)
