"""The recurrent transformer against the plain loop of the paper's code, in float64, and its commands.

.venv/bin/pytest tests/test_recurrent.py        CPU, about 15 s
"""

from pathlib import Path

import pytest
import torch
from conftest import read_log, run_here
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from config import TrainConfig, UserError
from experiments.recurrent import lengths, sample
from experiments.recurrent.model import RecurrentConfig, RecurrentGPT, generate, load
from lpa import checkpoint, hardware, optim
from lpa.planning import LiveStorages
from lpa.recompute import apply_recompute
from model import GPTConfig, LowDim
from sample import SampleConfig

W = 4
SHAPE = dict(n_layer=2, n_head=2, n_embd=16, vocab_size=20, block_size=64, mlp="gelu", norm="layernorm")
VARIANTS = {
    "learned positions": dict(pos="learned"),
    "no positions": dict(pos="none", n_layer=1),
    "rope": dict(pos="rope"),
    "shared rope, latents": dict(pos="rope", rope_dim=4, lowdim=LowDim(q=4, k=4, v=4, o=4), n_kv_head=1),
    "post-norm, biases": dict(pos="learned", norm_order="post", bias=True),
    "as a llama, heads normed": dict(pos="rope", norm="rmsnorm", mlp="swiglu", qk_norm=True),
    "blocks in factors": dict(pos="none", lowdim=LowDim(q="blockdense:4:2", o="blockshuffle:2", up="blockshuffle:2")),
}


def make(alpha: float = 0.5, learned: bool = False, **changes: object) -> RecurrentGPT:
    """Weights ten times their usual size, so that every path through the blocks matters."""
    model = RecurrentGPT(GPTConfig(**SHAPE | dict(pos="learned") | changes), RecurrentConfig(W, alpha, learned))
    model = model.double().eval()
    with torch.no_grad():
        for block in model.transformer.h:
            for p in block.parameters():
                p.mul_(10 if p.ndim > 1 else 1)
    return model


def tokens(length: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(20, (batch, length), generator=torch.Generator().manual_seed(seed))


def plain(model: RecurrentGPT, idx: Tensor) -> Tensor:
    """Section 1 of the notes on the paper, letter by letter, with the last step of this project -> logits."""
    c, alpha = model.config, float(model.alpha)
    x = model.transformer.wte.weight[idx]
    if c.pos == "learned":
        x = x + model.transformer.wpe.weight[: idx.size(1)]

    def T(block: torch.nn.Module, z: Tensor) -> Tensor:
        return block(z, None if model.rope is None else model.rope[:, : z.size(1)], None)

    for block in model.transformer.h:
        parts = [x[:, i : i + W] for i in range(0, x.size(1), W)]
        p, h, ys = parts[0], T(block, parts[0]), []
        for new in parts[1:]:
            m = new.size(1)
            out = T(block, torch.cat([alpha * p + h, alpha * p[:, :m] + new], dim=1))
            y, h = out[:, :W], out[:, W:]
            ys.append(y)
            p = y
        ys.append(T(block, alpha * p[:, : h.size(1)] + h))
        x = torch.cat(ys, dim=1)
    return model.lm_head(model.transformer.norm(x) if c.norm_order == "pre" else x)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_model_is_the_plain_loop_on_ragged_lengths(variant: str, alpha: float) -> None:
    model = make(alpha, **VARIANTS[variant])
    for length in (1, 3, 4, 5, 7, 8, 9, 16, 22):
        idx = tokens(length)
        torch.testing.assert_close(model(idx), plain(model, idx), rtol=1e-11, atol=1e-11)


def test_counts_are_the_published_ones_and_logits_those_of_commit_f374173() -> None:
    shape = dict(n_layer=1, n_head=6, n_embd=96, vocab_size=16, block_size=4128, mlp="relu", norm="layernorm")
    with torch.device("meta"):
        copy = RecurrentGPT(GPTConfig(**shape, pos="learned", tie_embeddings=True), RecurrentConfig(32), None)
    assert (copy.n_params(), copy.flops_per_token()) == (508_705, 470_016)
    shape = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=20, block_size=64, pos="rope", rope_dim=4)
    c, idx = GPTConfig(**shape, lowdim=LowDim(q=4, k=4, v=4, o=4)), torch.arange(38).view(2, 19) % 20
    for alpha, total, loss in ((0.5, 67.1380780, 3.0104015), (0.0, 71.1749212, 2.9736316)):
        model = RecurrentGPT(c, RecurrentConfig(4, alpha, False))
        assert model(idx).double().abs().sum().item() == pytest.approx(total, rel=1e-6)
        assert model(idx, idx).item() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_prefix_has_the_same_logits_alone_as_in_the_full_text(alpha: float) -> None:
    model, idx = make(alpha), tokens(21)
    full = model(idx)
    for end in range(1, 22):
        torch.testing.assert_close(model(idx[:, :end]), full[:, :end], rtol=1e-11, atol=1e-11)


def test_accumulating_carries_gradients_back_and_forgetting_does_not() -> None:
    """The last position's loss: the first chunk's gradient as a share of the last one's, 17 chunks, at the start."""
    reach, w = {}, 16
    for alpha in (0.0, 0.5):
        c = GPTConfig(**SHAPE | dict(n_layer=1, n_embd=64, n_head=4, mlp="relu", block_size=17 * w, pos="learned"))
        model = RecurrentGPT(c, RecurrentConfig(w, alpha, False)).double()
        model(tokens(17 * w), tokens(1)).backward()
        norms = model.transformer.wpe.weight.grad.unflatten(0, (17, w)).square().sum((1, 2)).sqrt()
        reach[alpha] = (norms[0] / norms[-1]).item()
        assert (norms > 0).all()
    assert reach[0.0] < 1e-6
    assert reach[0.5] > 1e-2


@pytest.mark.parametrize("lowdim", [LowDim(), LowDim(q="blockdense:4:2", up="blockshuffle:2")])
def test_flops_are_linear_in_the_length_and_are_those_that_are_counted(lowdim: LowDim) -> None:
    counted = {}
    model = make(0.5, block_size=512, lowdim=lowdim)
    for length in (64, 128, 256):
        with FlopCounterMode(display=False) as counter:
            model(tokens(length))
        counted[length] = counter.get_total_flops()
    assert counted[256] / counted[128] == pytest.approx(2, rel=0.05)
    assert model.flops_per_token() == model.flops_per_token(1)
    attention = 4 * W * model.config.n_layer * model.config.attn_dim * 2  # the counter sees no fused attention
    assert counted[256] / 512 == pytest.approx(model.flops_per_token() - attention, rel=0.03)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_window_longer_than_the_training_sequences_still_rotates(alpha: float) -> None:
    model, wide = (make(alpha, pos="rope", block_size=size) for size in (W + 1, 64))
    drawn, expected = (list(generate(m, tokens(3), 3 * W, vocab_size=20, temperature=0)) for m in (model, wide))
    assert torch.equal(torch.stack(drawn), torch.stack(expected))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_recomputing_and_compiling_change_no_gradient(alpha: float, dtype: str) -> None:
    grads = {}
    for kind in ("plain", "recompute", *(("compile",) if dtype == "float32" else ())):
        model = make(alpha, learned=alpha > 0, n_layer=1).float().train()
        if kind == "recompute":
            apply_recompute(model, "block")
        elif kind == "compile":
            model.transformer.h[0].compile(dynamic=False, backend="aot_eager")  # which needs no C++ compiler
        with hardware.autocast(torch.device("cpu"), dtype):
            loss = model(tokens(18), tokens(18, seed=1))
        loss.backward()
        grads[kind] = [p.grad for p in model.parameters()]
    torch.testing.assert_close(grads["recompute"], grads["plain"])
    if "compile" in grads:
        torch.testing.assert_close(grads["compile"], grads["plain"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("start", "end"), [(0.05, 0.0), (0.95, 1.0)])
def test_a_learned_alpha_stays_in_its_bounds(start: float, end: float) -> None:
    model = make(start, learned=True).float()
    (optimizer,) = optim.make_optimizers(model, TrainConfig(model.config, learning_rate=0.1))
    model.alpha.grad = torch.tensor(start - end)  # leads beyond
    optimizer.step()
    assert not 0 <= model.alpha.item() <= 1
    model.hold_alpha()
    assert model.alpha.item() == end


# --- Generation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("prompt", [1, 4, 11])
def test_generation_equals_the_full_forward(variant: str, alpha: float, prompt: int) -> None:
    model = make(alpha, **VARIANTS[variant])
    text = tokens(prompt)
    for token in generate(model, text, 15, vocab_size=18, temperature=0):
        logits = model(text)[:, -1, :18]
        assert torch.equal(token, logits.argmax(-1))
        text = torch.cat([text, token[:, None]], dim=1)
    state = model.new_state(2)
    assert state.left.absorbed == [variant == "shared rope, latents"] * model.config.n_layer
    with torch.no_grad():
        pieces = [model(part, cache=state) for part in text.split([1, 2, text.size(1) - 3], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(text), rtol=1e-11, atol=1e-11)


def test_a_text_in_bfloat16_continues_as_the_full_forward() -> None:
    model, text = make(0.5, lowdim=LowDim(q=4, k=4, v=4, o=4)).float(), tokens(22)
    with torch.no_grad(), hardware.autocast(torch.device("cpu"), "bfloat16"):
        state = model.new_state(2)
        pieces = torch.cat([model(part, cache=state) for part in text.split(3, dim=1)], dim=1)
        torch.testing.assert_close(pieces, model(text), rtol=0.02, atol=0.01)
    assert state.right.held[0]["v"].dtype == state.p.dtype == torch.bfloat16


@pytest.mark.parametrize("pos", ["none", "rope"])
def test_generation_holds_the_same_bytes_after_any_number_of_tokens(pos: str) -> None:
    """All storages that are alive whenever a chunk has as many tokens, far on both sides of block_size."""
    model, alive = make(0.5, pos=pos, block_size=64).float(), []
    with LiveStorages() as storages:
        for number, _ in enumerate(generate(model, tokens(W, seed=2), 30 * W, vocab_size=20)):
            if number >= 2 * W and number % W == 0:
                alive.append(storages.now)
    assert len(alive) == 28
    assert len(set(alive)) == 1
    state = model.new_state(2)
    tensors = [t for cache in (state.right, state.left) for held in cache.held for t in held.values()]
    tensors += [state.before, state.p, state.y]
    assert sum(t.nbytes for t in tensors) == (2 * 3 * W + 3 * W) * 2 * 2 * 16 * 4  # k and v, p: 2 layers, 2 texts


def test_learned_positions_end_or_start_again() -> None:
    model = make(0.5, block_size=12)
    assert len(list(generate(model, tokens(8), 30, 20, beyond="stop"))) == 5
    assert len(list(generate(model, tokens(8), 30, 20, temperature=0))) == 30
    with pytest.raises(ValueError, match="position 13 is beyond block_size = 12"):
        model(tokens(13))


# --- Commands ------------------------------------------------------------------------------------------------------


def test_it_trains_on_a_corpus_resumes_and_writes_text(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["experiments.recurrent.train", "--recurrent.window=8", "--n_layer=1", "--n_head=2", "--n_embd=32"]
    flags += ["--block_size=20", "--lowdim.q=4", f"--dataset={corpus}", "--eval_tokens=400", "--device=cpu"]
    flags += ["--log_interval=1", "--learning_rate=1e-2", "--eval_interval=0", "--max_steps=6"]
    full, parts, twin = tmp_path / "full", tmp_path / "parts", tmp_path / "twin"
    run_here([*flags, f"--out_dir={full}"])
    run_here([*flags, f"--out_dir={parts}", "--stop_step=3"])
    run_here([*flags, f"--out_dir={parts}", "--resume"])
    models = [load(out, torch.device("cpu"))[0] for out in (full, parts)]
    assert models[0].alpha.item() != 0.5
    for a, b in zip(*(model.state_dict().values() for model in models)):
        assert torch.equal(a, b)
    losses = [line["loss"] for line in read_log(full) if "loss" in line]
    assert losses[-1] < losses[0]
    for flag, message in (("recurrent.window=4", "has 8, this run 4"), ("model=gpt", "has recurrent, this run gpt")):
        name = flag.partition("=")[0].rpartition(".")[2]
        with pytest.raises(UserError, match=f"{name}: the checkpoint {message}"):
            run_here([*flags, f"--out_dir={parts}", "--resume", f"--{flag}"])
    for flag, message in (
        ("--shard", "wanted False: train.py alone has it"),
        ("--recompute=latents", "wanted block or"),
    ):
        with pytest.raises(UserError, match=message):
            run_here([*flags, flag])

    capsys.readouterr()
    sample.main(SampleConfig(full, prompt="import", max_new_tokens=40, temperature=0, device="cpu"))
    text = capsys.readouterr().out
    assert text.startswith("import")
    assert len(text) > 20
    run_here([*flags, f"--out_dir={twin}", "--model=gpt"])
    checkpoint.load_model(twin, torch.device("cpu"))
    with pytest.raises(UserError, match=r"holds no recurrent model; sample\.py writes text"):
        load(twin, torch.device("cpu"))
    with pytest.raises(UserError, match="is of another model: alpha"):
        checkpoint.load_model(full, torch.device("cpu"))


def test_the_table_of_lengths_shows_that_a_state_does_not_grow(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    small = dict(lengths=(32, 64), plain_up_to=64, width=16, window=8, seconds=0.01, device="cpu")
    lengths.main(lengths.Options(**small, results=tmp_path))
    lines = (tmp_path / "recurrent_lengths.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith(("| recurrent", "| plain"))]
    kept = {(row[0], int(row[1])): int(row[5].replace(",", "")) for row in rows}
    assert kept["recurrent", 32] == kept["recurrent", 64] == (2 * 3 * 8 + 3 * 8) * 16 * 4  # keys and values, three p
    assert kept["plain", 64] == 2 * kept["plain", 32] == 2 * 64 * 16 * 4  # k and v
    assert (tmp_path / "recurrent_lengths.png").exists()
