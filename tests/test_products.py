"""products.linear against float64: every path it takes, its gradients, and inside torch.compile.

    .venv/bin/pytest tests/test_products.py        CPU, about 20 s, most of it to compile
"""

import shutil

import pytest
import torch
import torch.nn.functional as F

from lpa.cpu import Linear, linear, rms_norm


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("rows", [1, 3, 8, 70])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_without_gradients_equals_float64(rows: int, bias: bool) -> None:
    """Large enough that a CPU takes W x^T for 3 rows and oneDNN for the others; x strided as a slice of time is."""
    x, weight = draw(rows, 3, 1024)[:, -1:], draw(1100, 1024)  # (rows, 1, C_in)
    b = draw(1100) if bias else None
    wanted = F.linear(x.double(), weight.double(), None if b is None else b.double()).float()
    with torch.no_grad():
        y = linear(x, weight, b)
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x, weight, b).dtype == torch.bfloat16
    assert y.is_contiguous()
    torch.testing.assert_close(y, wanted, atol=2e-4, rtol=0)  # sums of 1024 products of order 1


@pytest.mark.parametrize(("bias", "compiled"), [(False, False), (True, False), (True, True)])
def test_gradients_of_linear_equal_float64(bias: bool, compiled: bool) -> None:
    """On both sides of the size from which oneDNN is taken, and with x laid out by time first."""
    if compiled and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    for width in (16, 300):
        inputs = [draw(40, 2, 256).transpose(0, 1), draw(width, 256), *([draw(width)] if bias else [])]
        grad, results = draw(2, 40, width), []
        for dtype, f in ((torch.float64, F.linear), (torch.float32, torch.compile(linear) if compiled else linear)):
            leaves = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
            y = f(*leaves)
            results.append([y, *torch.autograd.grad(y, leaves, grad.to(dtype))])
        torch.testing.assert_close([t.float() for t in results[0]], results[1], atol=2e-4, rtol=0)


def test_only_the_gradients_that_are_wanted_are_made() -> None:
    x, weight = draw(80, 256), draw(300, 256).requires_grad_()
    y = linear(x, weight)
    assert type(y.grad_fn).__name__ == f"{Linear.__name__}Backward"
    y.sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(300, -1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("weighted", [False, True])
def test_rms_norm_and_its_gradients_equal_the_formula(weighted: bool) -> None:
    """In float64 to the last digits; in bfloat16, whose sums are float32, to its rounding."""


    def formula(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return normed if weight is None else normed * weight

    x, weight = 3 * draw(2, 7, 48), draw(48)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        results = []
        for f, precision in ((rms_norm, dtype), (formula, torch.float64)):
            leaves = [t.to(dtype).to(precision, copy=True).requires_grad_() for t in (x, weight)]
            y = f(leaves[0], leaves[1] if weighted else None, 1e-3)
            grad = draw(*x.shape).flip(-1).to(dtype).to(y.dtype)
            results.append([y, *torch.autograd.grad(y, leaves[: 1 + weighted], grad)])
        for ours, exact in zip(*results):
            assert ours.dtype == dtype
            assert (ours.double() - exact).norm() <= tolerance * exact.norm()
