"""The CPU kernels that training installs, against plain formulas in float64.

    .venv/bin/pytest tests/test_cpu.py        CPU, about 2 s
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from config import load_config
from lpa import cpu

BF16, FP32 = torch.bfloat16, torch.float32


def randn(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compare(ours, exact, inputs: list[Tensor], rtol: float) -> None:
    """Hold the value and each gradient of ours to those of exact in float64, by the largest of them."""
    leaves = [[x.detach().to(dtype).requires_grad_() for x in inputs] for dtype in (inputs[0].dtype, torch.float64)]
    results = []
    for f, given in zip((ours, exact), leaves):
        y = f(*given)
        grads = torch.autograd.grad(y, given, randn(*y.shape, dtype=inputs[0].dtype, seed=9).to(y.dtype))
        results.append([y, *grads])
    for got, wanted in zip(*results):
        assert got.dtype == inputs[0].dtype
        assert (got.double() - wanted).abs().max() <= rtol * wanted.abs().max()


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize(("dtype", "rtol"), [(FP32, 1e-6), (BF16, 0.03)])
def test_attention(heads: int, dtype: torch.dtype, rtol: float) -> None:
    q, k, v = (randn(2, h, 33, 16, dtype=dtype, seed=h) for h in (4, heads, heads + 10))
    v = v[:, :heads]

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (y.repeat_interleave(4 // heads, dim=1) for y in (k, v))
        scores = (q @ k.mT / 4).masked_fill(torch.ones(33, 33).triu(1).bool(), -torch.inf)
        return scores.softmax(-1) @ v

    compare(lambda q, k, v: cpu.attention(q, k, v, is_causal=True, enable_gqa=heads < 4), exact, [q, k, v], rtol)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a PyTorch with oneDNN")
@pytest.mark.parametrize("rank", [1, 3, 40])
def test_products_by_onednn(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "smallest_onednn_product", lambda: 0)
    a, b = randn(50, rank, dtype=FP32), randn(rank, 70, dtype=FP32)
    for x, y in ((a, b), (b.T, a.T)):
        torch.testing.assert_close(cpu.mm(x, y).double(), x.double() @ y.double(), rtol=1e-5, atol=1e-5)


def test_what_is_installed_is_what_a_model_calls() -> None:
    """In bfloat16 a causal call takes the unfused path; with a mask, or longer than 512 tokens, PyTorch's kernel."""
    cpu.install(load_config(["--dtype=bfloat16"]))
    q, mask = randn(1, 2, 8, 16, dtype=BF16).requires_grad_(), torch.ones(8, 8).tril().bool()
    assert "View" in F.scaled_dot_product_attention(q, q, q, is_causal=True).grad_fn.name()
    assert "Flash" in F.scaled_dot_product_attention(q, q, q, mask).grad_fn.name()
    long = randn(1, 1, 513, 16, dtype=BF16).requires_grad_()
    assert "Flash" in F.scaled_dot_product_attention(long, long, long, is_causal=True).grad_fn.name()


@pytest.mark.parametrize(
    ("vendor", "capability", "options", "installed"),
    [
        ("GenuineIntel", "AVX512", [], None),
        ("AuthenticAMD", "AVX512", [], "mm"),
        ("AuthenticAMD", "AVX2", [], "mm"),
        ("AuthenticAMD", "AVX512", ["--n_embd=192"], None),
        ("AuthenticAMD", "AVX512", ["--dtype=bfloat16"], "scaled_dot_product_attention"),
        ("GenuineIntel", "AVX512", ["--dtype=bfloat16", "--block_size=1024"], None),
    ],
)
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a PyTorch with oneDNN")
def test_what_each_processor_installs(
    vendor: str, capability: str, options: list[str], installed: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: f"vendor_id : {vendor}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    calls: list[str] = []
    monkeypatch.setattr(cpu, "override", lambda operator, kernel, key: calls.append(operator))
    cpu.smallest_onednn_product.cache_clear()
    about = cpu.install(load_config(options))
    cpu.smallest_onednn_product.cache_clear()
    assert calls == ([installed] if installed else [])
    assert ("oneDNN" in about) == (installed == "mm")
