"""bench.py's JSON, its counts against plain arithmetic, its timed modes on a small model, and the suite.

    .venv/bin/pytest tests/test_bench.py        CPU, about 45 s
"""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import run, run_script

import bench
from config import UserError, load_config
from experiments.speed import suite
from lpa import counts, twin
from lpa.recompute import apply_recompute
from model import GPT, GPTConfig, LowDim

COUNTS = {"params", "params_non_embedding", "flops_per_token_forward", "flops_per_token_train"}
COUNTS |= {"activation_bytes_per_token", "kv_bytes_per_token"}
TIMES = {"ms_median", "ms_min", "ms_max", "tokens_per_second", "mfu", "peak_memory_bytes"}
TIMES |= {"roofline_ms", "roofline_share"}
TINY = "--n_layer=1 --n_head=2 --n_embd=32 --block_size=64 --vocab_size=128 --batch_size=2 --pairs=1 --decode_tokens=8"


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
        low, dense = GPT(c).flops_per_token(), GPT(replace(c, lowdim=LowDim())).flops_per_token()
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
    assert counts.activation_bytes_per_token(c, "float32") == 4 * (attention + mlp + norms + head)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the count against its allocator")
@pytest.mark.parametrize("recompute", ["none", "elementwise", "latents", "block"])
def test_activation_bytes_are_those_of_the_cuda_allocator(recompute: str) -> None:
    """Within 5 %. With LayerNorm, which both devices fuse; see activation_bytes_per_token on RMSNorm."""
    ranks = LowDim(q=128, k=128, v=128, o=128)
    c = GPTConfig(n_layer=4, n_head=8, n_embd=512, block_size=1024, vocab_size=8192, norm="layernorm", lowdim=ranks)
    with torch.device("cuda"):
        model = GPT(c)
    apply_recompute(model, recompute)
    held = {}
    for batch_size in (2, 2, 4):  # the first one also makes the libraries' workspaces
        idx = torch.zeros(batch_size, c.block_size, dtype=torch.long, device="cuda")
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(idx, idx)
        held[batch_size] = torch.cuda.memory_allocated() - before
        del loss
    measured = (held[4] - held[2]) / (2 * c.block_size)
    assert counts.activation_bytes_per_token(c, "bfloat16", recompute) == pytest.approx(measured, rel=0.05)


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
        assert 0 < variant["mfu"] <= 1
        assert variant["roofline_share"] == pytest.approx(variant["roofline_ms"] / variant["ms_median"])
        flops = variant["mfu"] * variant["ms_median"]  # over the same rate as the roofline's FLOPs
        assert variant["roofline_ms"] >= flops * (1 - 1e-9)
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
    gpt2 = dict(norm="layernorm", mlp="gelu", pos="learned", bias=True, tie_embeddings=True)
    for options in ({}, dict(pos="none"), dict(tie_embeddings=True), gpt2):
        c = GPTConfig(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=96, **options)
        assert sum(p.numel() for p in twin.hf_model(c).parameters()) == GPT(c).n_params()
    with pytest.raises(UserError, match="cannot have norm_order = 'post'"):
        twin.hf_model(GPTConfig(norm_order="post", vocab_size=96))


def test_the_table_names_both_variants_and_every_count(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(load_config(["config/lpa_cpu.py", "--vocab_size=256"], bench.BenchConfig))
    text = capsys.readouterr().out
    assert "model" in text
    assert "dense" in text
    assert all(count in text for count in COUNTS)


def test_options_of_the_twins_differ_in_lowdim_only() -> None:
    c = load_config(["config/lpa_370m.py"]).gpt
    assert replace(c, lowdim=LowDim()) == load_config(["config/dense_370m.py"]).gpt


def test_the_bytes_that_must_move() -> None:
    """Written out for setting 2 at 1 layer: d 32, FFN 96, r 8, T 64, V 128, 2 sequences."""
    d, ffn, r, T, V, B = 32, 96, 8, 64, 128, 2
    read = 4 * 2 * r * d + 3 * d * ffn + 3 * d + V * d  # matrices, three norms, the head; not the embedding table
    expected = dict(train=4 * (2 * read + 8 * (read + V * d)), eval=4 * read, prefill=2 * (read + B * T * (d + r)))
    expected["decode"] = sum(2 * (read + B * length * (d + r)) for length in range(41, 49))
    options = f"{TINY} --dtype=bfloat16 --context=40"
    ranks = [f"--lowdim.{name}={r}" for name in "qkvo"]
    for mode, wanted in expected.items():
        c = load_config([*shlex.split(options), *ranks, f"--ffn_dim={ffn}", f"--mode={mode}"], bench.BenchConfig)
        with torch.device("meta"):
            place = (torch.bfloat16, c.train.batch_size, T if mode == "prefill" else 40, 8)
            assert counts.least_bytes(GPT(c.train.gpt), mode, "adamw", *place) == wanted, mode


def test_a_model_against_itself_without_recomputing(capsys: pytest.CaptureFixture[str]) -> None:
    options = f"{TINY} --device=cpu --mode=train --against=plain --lowdim.q=8"
    bench.main(load_config([*shlex.split(options), "--recompute=latents", "--json"], bench.BenchConfig))
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"model", "plain"}
    assert found["model"]["activation_bytes_per_token"] < found["plain"]["activation_bytes_per_token"]
    assert found["model"]["ratio_to_plain"]["flops"] == 1
    with pytest.raises(UserError, match="recompute is 'none', wanted another against plain"):
        load_config(shlex.split(options), bench.BenchConfig)


def test_weights_of_decoding_are_in_dtype_and_rotations_are_not() -> None:
    model = bench.to_inference(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=32, vocab_size=96)), "bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.rope.dtype == torch.float32


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_bfloat16_decodes_beside_transformers(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = f"{TINY} --device=cpu --dtype=bfloat16 --lowdim.k=8 --lowdim.v=8 --pos=none"
    bench.main(
        load_config([*shlex.split(options), f"--mode={mode}", "--against=dense,hf", "--json"], bench.BenchConfig)
    )
    assert json.loads(capsys.readouterr().out)["model"]["ratio_to_hf"]["ms"] > 0


# --- The suite ---------------------------------------------------------------------------------------------------


def test_every_row_of_the_suite_is_a_command_that_parses() -> None:
    for rows in (suite.cpu_rows(), suite.gpu_rows()):
        assert len(set(rows)) == len(rows)
        for row in rows:
            bench.make_variants(load_config(shlex.split(row), bench.BenchConfig))


def test_the_suite_keeps_each_row_and_skips_those_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Started as copies of a process that has imported torch: seconds less.
    monkeypatch.setattr(suite.subprocess, "run", lambda call, **_: run_script(tuple(call[1:]), ""))
    path, device = tmp_path / "new" / "cpu1", torch.device("cpu")
    count, step = f"{TINY} --lowdim.q=8", f"{TINY} --lowdim.q=8 --mode=eval"
    with pytest.raises(UserError, match=r"1 of 2 rows failed.*--n_layer=x: error: "):
        suite.measure([step, "--n_layer=x"], path, device)
    path = path.with_suffix(".json")
    (kept,) = json.loads(path.read_text())
    assert kept["row"] == step
    suite.measure([count, step], path, device)  # only what is missing
    rows = json.loads(path.read_text())
    assert rows[0] == kept
    gpt = load_config(shlex.split(count), bench.BenchConfig).train.gpt
    here = counts.count(gpt, "float32")  # in a process that may have installed the CPU kernels, which save less
    there = rows[1]["results"]["model"]
    assert {k: v for k, v in there.items() if "activation" not in k}.items() <= here.items()

    table = path.with_suffix(".md").read_text()
    assert all(f"python bench.py {row['row']}" in table for row in rows)
    assert f"model over dense: time {kept['results']['model']['ratio_to_dense']['ms']:.3f}" in table
    assert f"{there['params']:,}" in table

    before = path.read_bytes()
    suite.measure([count, step], path, device)
    assert path.read_bytes() == before
    rows[1]["machine"] = rows[1]["machine"] | {"torch": "1.0"}  # another version measures anew
    path.write_text(json.dumps(rows))
    suite.measure([count, step], path, device)
    printed = capsys.readouterr().out
    assert [printed.count(f": python bench.py {row}\n") for row in (count, step)] == [2, 1]
    assert json.loads(path.read_text())[1]["machine"] == kept["machine"]


def test_a_broken_suite_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cpu2.json").write_text("[{")
    with pytest.raises(UserError, match=r"cpu2.json is not a suite's JSON"):
        suite.measure([TINY], tmp_path / "cpu2", torch.device("cpu"))
