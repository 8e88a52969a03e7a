"""bench.py's JSON, its counts against plain arithmetic, and its timed modes on a small model.

    .venv/bin/pytest tests/test_bench.py        CPU, about 30 s
"""

import json

import pytest
import torch
from conftest import run

import bench
from config import UserError, load_config
from model import GPT, GPTConfig, LowDim

COUNTS = {"params", "params_non_embedding", "flops_per_token_forward", "flops_per_token_train"}
COUNTS |= {"activation_bytes_per_token", "kv_bytes_per_token"}
TIMES = {"ms_median", "ms_min", "ms_max", "tokens_per_second", "mfu", "peak_memory_bytes"}


def test_counts_of_the_papers_model_without_its_weights() -> None:
    """Against the formulas of LPA written out: d 1024, 24 layers, FFN 2736, r 256, T 512, V 32000."""
    command = ["bench.py", "config/lpa_370m.py", "--vocab_size=32000", "--mode=count", "--json"]
    found = json.loads(run(*command).stdout)
    assert found.keys() == {"model", "dense"}
    d, layers, ffn, r, T, V = 1024, 24, 2736, 256, 512, 32000
    for name, attention, cached in (("model", 4 * 2 * r * d, d + r), ("dense", 4 * d * d, 2 * d)):
        counts = found[name]
        assert counts.keys() == COUNTS
        blocks = layers * (attention + 3 * d * ffn + 2 * d) + d
        assert counts["params_non_embedding"] == blocks
        assert counts["params"] == blocks + 2 * V * d
        assert counts["flops_per_token_forward"] == 2 * layers * (attention + 3 * d * ffn + T * d) + 2 * V * d
        assert counts["flops_per_token_train"] == 3 * counts["flops_per_token_forward"]
        assert counts["kv_bytes_per_token"] == 2 * layers * cached  # the rotated key and the value's latent


def test_the_ratio_of_flops_that_the_speed_target_names() -> None:
    c = GPTConfig(n_layer=4, n_head=16, n_embd=1024, block_size=512, vocab_size=8192, lowdim=LowDim(256, 256, 256, 256))
    with torch.device("meta"):
        low, dense = GPT(c).flops_per_token(), GPT(bench.dense_twin(c)).flops_per_token()
    assert low / dense == pytest.approx(0.862, abs=5e-4)


@pytest.mark.parametrize("lowdim", [LowDim(), LowDim(q=8, k=8, v=8, o=8)])
def test_activation_bytes_are_those_of_the_tensors_that_backward_needs(lowdim: LowDim) -> None:
    """To the byte, in a model small enough to write them down: post-norm, ReLU, no positions, no biases."""
    C, F, V, T, H, r = 32, 128, 96, 16, 4, 8
    options = dict(mlp="relu", norm="layernorm", norm_order="post", pos="none", ffn_dim=F)
    c = GPTConfig(n_layer=1, n_head=H, n_embd=C, block_size=T, vocab_size=V, lowdim=lowdim, **options)
    attention = C + 3 * C + C + H  # its input; q, k, v; its output and log-sum-exp
    if lowdim.q:
        attention += 3 * r + r  # the latents of q, k, v and of o
    mlp = C + F  # its input, and the ReLU's output, from which its gradient and that of down follow
    norms = 2 * (C + 2)  # the input of each, its mean and its inverse deviation
    head = C  # the gradient of its input, made with the loss
    assert bench.activation_bytes_per_token(c, "float32") == 4 * (attention + mlp + norms + head)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the count against its allocator")
@pytest.mark.parametrize("recompute", ["none", "latents", "block"])
def test_activation_bytes_are_those_of_the_cuda_allocator(recompute: str) -> None:
    """Within 5 %. With LayerNorm, which both devices fuse; see activation_bytes_per_token on RMSNorm."""
    ranks = LowDim(q=128, k=128, v=128, o=128)
    c = GPTConfig(n_layer=4, n_head=8, n_embd=512, block_size=1024, vocab_size=8192, norm="layernorm", lowdim=ranks)
    with torch.device("cuda"):
        model = GPT(c)
    for block in model.transformer.h:
        block.recompute = recompute
    held = {}
    for batch_size in (2, 2, 4):  # the first one also makes the libraries' workspaces
        idx = torch.zeros(batch_size, c.block_size, dtype=torch.long, device="cuda")
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(idx, idx)
        held[batch_size] = torch.cuda.memory_allocated() - before
        del loss
    measured = (held[4] - held[2]) / (2 * c.block_size)
    assert bench.activation_bytes_per_token(c, "bfloat16", recompute) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("mode", ["train", "eval", "prefill", "decode"])
def test_timed_modes_report_both_variants(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=64", "--vocab_size=128", "--batch_size=2"]
    small += ["--lowdim.q=8", "--lowdim.k=8", "--lowdim.v=8", "--lowdim.o=8", "--device=cpu", "--decode_tokens=8"]
    bench.main(load_config([*small, f"--mode={mode}", "--pairs=3", "--json"], bench.BenchConfig))
    found = json.loads(capsys.readouterr().out)
    for variant in found.values():
        assert variant.keys() >= COUNTS | TIMES
        assert 0 < variant["ms_min"] <= variant["ms_median"] <= variant["ms_max"]
        tokens = 2 * (8 if mode == "decode" else 64)
        assert variant["tokens_per_second"] == pytest.approx(1000 * tokens / variant["ms_median"])
        assert 0 < variant["mfu"] < 1.5
        assert variant["peak_memory_bytes"] is None  # a CPU has no such count
    assert found["model"]["ratio_to_dense"].keys() >= {"ms", "flops", "peak_memory"}
    assert 0.5 < found["model"]["ratio_to_dense"]["flops"] < 1


@pytest.mark.parametrize("mode", ["train", "decode"])
@pytest.mark.parametrize("shape", [[], ["--norm=layernorm", "--mlp=gelu", "--pos=learned", "--bias"]])
def test_transformers_can_be_a_third_variant(mode: str, shape: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=64", "--vocab_size=128", "--batch_size=2"]
    small += ["--decode_tokens=8", "--context=40", "--device=cpu", f"--mode={mode}", "--pairs=2", *shape]
    bench.main(load_config([*small, "--against=dense,hf", "--json"], bench.BenchConfig))
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"model", "dense", "hf"}
    assert found["dense"]["ratio_to_hf"]["flops"] == 1
    assert found["hf"]["ms_median"] > 0


def test_transformers_has_the_parameters_of_the_dense_twin() -> None:
    for options in ({}, dict(norm="layernorm", mlp="gelu", pos="learned", bias=True, tie_embeddings=True)):
        c = GPTConfig(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=96, **options)
        assert sum(p.numel() for p in bench.HuggingFace(c).parameters()) == GPT(c).n_params()
    with pytest.raises(UserError, match="transformers' Llama and GPT-2 have no post-rmsnorm swiglu pos=rope form"):
        bench.HuggingFace(GPTConfig(norm_order="post", vocab_size=96))


def test_the_table_names_both_variants_and_every_count(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(load_config(["config/lpa_cpu.py", "--vocab_size=256"], bench.BenchConfig))
    text = capsys.readouterr().out
    assert "model" in text
    assert "dense" in text
    assert all(count in text for count in COUNTS)


def test_options_of_the_twins_differ_in_lowdim_only() -> None:
    c = load_config(["config/lpa_370m.py"]).gpt
    assert bench.dense_twin(c) == load_config(["config/dense_370m.py"]).gpt
