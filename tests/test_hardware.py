"""Which device, which precision, whether to compile: also for machines that are not here.

    .venv/bin/pytest tests/test_hardware.py        CPU, about 2 s
"""

import sys
from types import SimpleNamespace

import pytest
import torch

from config import UserError
from lpa import hardware

CPU, MPS = torch.device("cpu"), torch.device("mps")


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(False, False, "cpu"), (False, True, "mps"), (True, True, "cuda:0")]
)
def test_auto_takes_the_best_device_there_is(
    cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert hardware.choose_device("auto") == torch.device(expected)
    assert hardware.choose_device("cpu") == CPU
    for name, there in (("cuda", cuda), ("mps", mps)):
        if not there:
            with pytest.raises(UserError, match=f"device is {name}, but torch sees no"):
                hardware.choose_device(name)


def test_an_apple_gpu_computes_in_float32_unless_told() -> None:
    assert hardware.choose_dtype("auto", MPS) == "float32"
    assert hardware.choose_dtype("bfloat16", MPS) == "bfloat16"


def test_a_gpu_without_bfloat16_computes_in_float32_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A V100 or a T4, which want --dtype=float16."""
    cuda, units = torch.device("cuda"), False
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: units or including_emulation)
    assert hardware.choose_dtype("auto", cuda) == "float32"
    assert hardware.choose_dtype("float16", cuda) == "float16"
    units = True
    assert hardware.choose_dtype("auto", cuda) == "bfloat16"


def test_the_matmul_rate_is_the_flops_of_a_product_over_the_fastest_of_its_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock that only the products move; the first of them does not count."""
    now, took = 0.0, iter([1.0, 0.75, 0.5, 0.5, 2.0])
    shapes = []

    def product(a: torch.Tensor, b: torch.Tensor) -> None:
        nonlocal now
        now += next(took)
        shapes.append((*a.shape, *b.shape))

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(hardware, "time", SimpleNamespace(perf_counter=lambda: now))
    assert hardware.matmul_rate(CPU, "float32", seconds=2.5, n=64) == 2 * 64**3 / 0.5
    assert shapes == [(64, 64, 64, 64)] * 5


def test_autocast_is_of_the_device_and_nothing_in_float32() -> None:
    a = torch.ones(2, 2)
    with hardware.autocast(CPU, "bfloat16"):
        assert (a @ a).dtype == torch.bfloat16
    with hardware.autocast(CPU, "float32"):
        assert (a @ a).dtype == torch.float32
    assert hardware.autocast(MPS, "float16").device == "mps"


@pytest.mark.parametrize(
    ("device", "platform", "compiler", "expected", "reason"),
    [
        (CPU, "linux", True, "block", None),
        (CPU, "linux", False, "off", "found none"),
        (CPU, "win32", True, "off", "not reliable on Windows"),
        (MPS, "darwin", True, "off", "not reliable on MPS"),
        (torch.device("cuda"), "linux", False, "block", None),
    ],
    ids=str,
)
def test_compile_is_off_with_one_warning_where_it_cannot_work(
    device: torch.device,
    platform: str,
    compiler: bool,
    expected: str,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(hardware.shutil, "which", lambda _: "g++" if compiler else None)
    assert hardware.choose_compile("block", device) == expected
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == (reason is not None)
    assert all(reason in line for line in warnings)
    assert hardware.choose_compile("auto", device) == ("block" if device.type == "cuda" else "off")
    monkeypatch.setenv("RANK", "1")
    assert hardware.choose_compile("block", device) == expected
    assert hardware.choose_compile("off", device) == "off"
    assert capsys.readouterr().err == ""
