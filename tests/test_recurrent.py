"""The recurrent transformer against the plain loop of the paper's code, in float64.

.venv/bin/pytest tests/test_recurrent.py        CPU, about 13 s
"""

import dataclasses
from pathlib import Path

import pytest
import recurrent
import torch
from conftest import read_log, run_here
from recurrent import RecurrentConfig, RecurrentGPT
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from config import TrainConfig, UserError, load_config
from experiments import recurrent as comparison
from lpa import checkpoint, hardware, optim
from lpa.planning import LiveStorages
from model import GPTConfig, LowDim

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


def make(alpha: float = 0.5, learned: bool = False, seed: int = 1, **changes: object) -> RecurrentGPT:
    """Weights ten times their usual size, so that every path through the blocks matters."""
    c = GPTConfig(**SHAPE | dict(pos="learned") | changes)
    model = RecurrentGPT(c, RecurrentConfig(W, alpha, learned), seed).double().eval()
    with torch.no_grad():
        for block in model.transformer.h:
            for p in block.parameters():
                p.mul_(10 if p.ndim > 1 else 1)
    return model


def tokens(length: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(20, (batch, length), generator=torch.Generator().manual_seed(seed))


def plain(model: RecurrentGPT, idx: Tensor) -> Tensor:
    """Section 1 of the notes on the paper, letter by letter, with the closing of this project -> logits."""
    c, alpha = model.config, float(model.alpha)
    x = model.transformer.wte.weight[idx]
    if c.pos == "learned":
        x = x + model.transformer.wpe.weight[: idx.size(1)]

    def T(block: torch.nn.Module, z: Tensor) -> Tensor:
        return block.add_sublayers(z, None if model.rotation is None else model.rotation[:, : z.size(1)])

    for block in model.transformer.h:
        parts = [x[:, i : i + W] for i in range(0, x.size(1), W)]
        p, h, ys = parts[0], T(block, parts[0]), []
        for new in parts[1:]:
            m = new.size(1)
            window = torch.cat([alpha * p + h, alpha * p[:, :m] + new], dim=1)
            out = T(block, window)
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
    assert model.forgets == (alpha == 0)
    for length in (1, 3, 4, 5, 7, 8, 9, 16, 22):
        idx = tokens(length)
        torch.testing.assert_close(model(idx), plain(model, idx), rtol=1e-11, atol=1e-11)


def test_one_block_is_the_layer_twice_and_the_published_count() -> None:
    model = make(0.5, n_layer=1, pos="none")
    T = model.transformer.h[0]
    x = model.transformer.wte(tokens(3))
    expected = model.lm_head(model.transformer.norm(T(0.5 * x + T(x, None), None)))
    torch.testing.assert_close(model(tokens(3)), expected)
    shape = dict(n_layer=1, n_head=6, n_embd=96, vocab_size=16, block_size=4128, mlp="relu", norm="layernorm")
    with torch.device("meta"):
        copy = RecurrentGPT(GPTConfig(**shape, pos="learned", tie_embeddings=True), RecurrentConfig(32), None)
    assert copy.n_params() == 508_705


@pytest.mark.parametrize("variant", ["rope", "learned positions"])
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_logits_see_all_before_them_and_nothing_after(variant: str, alpha: float) -> None:
    """Random changes of an embedding, since LayerNorm does not see a constant one."""
    model = make(alpha, **VARIANTS[variant])
    idx = tokens(19, batch=1)
    for i in (0, 3, 4, 10, 18):
        x = model.transformer.wte(idx).detach()
        changed = x.clone()
        changed[:, i] += torch.randn(x.size(-1), generator=torch.Generator().manual_seed(i))
        outs = []
        for z in (x, changed):
            model.embed = lambda idx, positions, z=z: z
            outs.append(model(idx))
        moved = (outs[0] - outs[1]).abs().amax(-1)[0]  # (T,)
        assert (moved[:i] == 0).all()
        assert (moved[i:] > 1e-12).all()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_prefix_has_the_logits_that_it_has_in_the_whole(alpha: float) -> None:
    model, idx = make(alpha), tokens(21)
    whole = model(idx)
    for end in range(1, 22):
        torch.testing.assert_close(model(idx[:, :end]), whole[:, :end], rtol=1e-11, atol=1e-11)


def test_accumulating_carries_gradients_back_and_forgetting_does_not() -> None:
    """Of the last position's loss: the first block's gradient as a share of the last one's, 17 blocks, at the start."""
    reach, w = {}, 16
    for alpha in (0.0, 0.5):
        c = GPTConfig(**SHAPE | dict(n_layer=1, n_embd=64, n_head=4, mlp="relu", block_size=17 * w, pos="learned"))
        model = RecurrentGPT(c, RecurrentConfig(w, alpha, False)).double()
        x = model.embed(tokens(17 * w), slice(17 * w)).detach().requires_grad_()
        model.embed = lambda idx, positions, x=x: x
        model(tokens(17 * w), tokens(1)).backward()
        norms = x.grad.unflatten(1, (17, w)).square().sum((0, 2, 3)).sqrt()
        reach[alpha] = (norms[0] / norms[-1]).item()
    assert reach[0.0] < 1e-6
    assert reach[0.5] > 1e-2


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_flops_grow_as_the_length_and_are_those_that_are_counted(alpha: float) -> None:
    counted = {}
    model = make(alpha, block_size=512)
    for length in (64, 128, 256):
        with FlopCounterMode(display=False) as counter:
            model(tokens(length))
        counted[length] = counter.get_total_flops()
    assert counted[256] / counted[128] == pytest.approx(2, rel=0.05)
    assert model.flops_per_token() == model.flops_per_token(1)
    # The counter sees products by a weight, but no fused attention; the keys of a left half are made twice to forget.
    attention = 4 * model.window * model.config.n_layer * model.config.heads_dim * 2
    again = 2 * 2 * 16 * 16 * 2 if alpha == 0 else 0
    assert counted[256] / 512 == pytest.approx(model.flops_per_token() - attention + again, rel=0.03)


def test_flops_of_blocks_in_factors_are_counted() -> None:
    """Against the products that were made, in which the counter sees no fused attention."""
    model = make(0.5, lowdim=LowDim(q="blockdense:4:2", up="blockshuffle:2"))
    with FlopCounterMode(display=False) as counter:
        model(tokens(64))
    attention = 4 * model.window * model.config.n_layer * model.config.heads_dim * 2
    assert counter.get_total_flops() / 128 == pytest.approx(model.flops_per_token() - attention, rel=0.05)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_window_longer_than_the_texts_of_training_still_rotates(alpha: float) -> None:
    model, wide = (make(alpha, pos="rope", block_size=size) for size in (W + 1, 64))
    text = tokens(3)
    drawn = torch.stack(list(recurrent.generate(model, text, 3 * W, vocab_size=20, temperature=0)), dim=1)
    expected = torch.stack(list(recurrent.generate(wide, text, 3 * W, vocab_size=20, temperature=0)), dim=1)
    assert torch.equal(drawn, expected)


def test_the_loss_of_fewer_targets_is_that_of_the_last_positions() -> None:
    model, idx = make(0.5), tokens(11)
    expected = torch.nn.functional.cross_entropy(model(idx)[:, -3:].flatten(0, 1), tokens(3).flatten())
    torch.testing.assert_close(model(idx, tokens(3)).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_recomputing_and_compiling_change_no_gradient(alpha: float) -> None:
    grads = {}
    for kind in ("plain", "recompute", "compile"):
        model = make(alpha, learned=alpha > 0).float().train()
        for block in model.transformer.h:
            block.recompute = "block" if kind == "recompute" else "none"
            if kind == "compile":
                block.compile(dynamic=False, backend="aot_eager")  # the graphs without the minutes of a C++ compiler
        model(tokens(18), tokens(18, seed=1)).backward()
        grads[kind] = [p.grad for p in model.parameters()]
    torch.testing.assert_close(grads["recompute"], grads["plain"])
    torch.testing.assert_close(grads["compile"], grads["plain"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_recomputing_whole_blocks_changes_no_gradient_under_autocast(alpha: float, dtype: str) -> None:
    grads = []
    for recompute in ("none", "block"):
        model = make(alpha).float().train()
        for block in model.transformer.h:
            block.recompute = recompute
        with hardware.autocast(torch.device("cpu"), dtype):
            loss = model(tokens(18), tokens(18, seed=1))
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads)
    with pytest.raises(UserError, match="recompute is latents, wanted block or none for model = 'recurrent'"):
        load_config(["--model=recurrent", "--recompute=latents", f"--dtype={dtype}"])


@pytest.mark.parametrize(("start", "end"), [(0.05, 0.0), (0.95, 1.0)])
def test_a_learned_alpha_comes_back_from_its_bounds(start: float, end: float) -> None:
    model = make(start, learned=True).float()
    (optimizer,) = optim.make_optimizers(model, TrainConfig(learning_rate=0.1))
    model.alpha.grad = torch.tensor(start - end)  # leads beyond
    optimizer.step()
    assert model.alpha.item() == end
    for _ in range(3):
        optimizer.zero_grad()
        ((model.alpha_now() - 0.5) ** 2).backward()
        optimizer.step()
    assert 0 < model.alpha.item() < 1


def test_compiling_a_block_compiles_the_steps_that_forget() -> None:
    """Its three shapes: the first block, the right half of a window, and all left halves at once."""
    torch.compiler.reset()  # of what other tests compiled
    model, graphs = make(0.0, n_layer=1).float(), []
    expected = model(tokens(3 * W))
    (block,) = model.transformer.h
    block.compile(dynamic=False, backend=lambda graph, inputs: graphs.append(graph) or graph)
    torch.testing.assert_close(model(tokens(3 * W)), expected)
    assert len(graphs) == 3


# --- Generation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("prompt", [1, 4, 11])
def test_generation_is_the_full_forward(variant: str, alpha: float, prompt: int) -> None:
    model = make(alpha, **VARIANTS[variant])
    text = tokens(prompt)
    for token in recurrent.generate(model, text, 15, vocab_size=18, temperature=0):
        logits = model(text)[:, -1, :18]
        assert torch.equal(token, logits.argmax(-1))
        text = torch.cat([text, token[:, None]], dim=1)
    state = model.new_state(2)
    pieces = [model(part, cache=state) for part in text.split([1, 2, text.size(1) - 3], dim=1)] if prompt > 1 else []
    if pieces:
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(text), rtol=1e-11, atol=1e-11)


def test_a_text_in_bfloat16_goes_on_as_the_full_forward() -> None:
    model, text = make(0.5, lowdim=LowDim(q=4, k=4, v=4, o=4)).float(), tokens(22)
    with torch.no_grad(), hardware.autocast(torch.device("cpu"), "bfloat16"):
        state = model.new_state(2)
        pieces = torch.cat([model(part, cache=state) for part in text.split(3, dim=1)], dim=1)
        torch.testing.assert_close(pieces, model(text), rtol=0.02, atol=0.01)
    assert state.window.held["v"].dtype == state.p.dtype == torch.bfloat16


def test_a_text_of_any_length_leaves_the_same_bytes_behind() -> None:
    """Of 2 layers and texts: keys and values of 2 W and of W tokens, and three p, 16 floats a token each."""
    model = make(0.5, pos="none", block_size=8).float()
    state = model.new_state(2)
    with torch.no_grad():
        for length in (41, 42, 43, 38, 164):
            model(tokens(length), cache=state, last=True)
            tensors = [*state.window.held.values(), *state.closing.held.values(), state.before, state.p, state.y]
            assert sum(t.untyped_storage().nbytes() for t in tensors) == (2 * 3 * W + 3 * W) * 2 * 2 * 16 * 4


@pytest.mark.parametrize("pos", ["none", "rope"])
def test_generation_holds_the_same_bytes_after_any_number_of_tokens(pos: str) -> None:
    """All storages that are alive whenever a block has as many tokens, far on both sides of block_size."""
    model, alive = make(0.5, pos=pos, block_size=64).float(), []
    with LiveStorages() as storages:
        for number, _ in enumerate(recurrent.generate(model, tokens(W, seed=2), 30 * W, vocab_size=20)):
            if number >= 2 * W and number % W == 0:
                alive.append(storages.now)
    assert len(alive) == 28
    assert len(set(alive)) == 1


def test_learned_positions_end_or_begin_anew() -> None:
    model = make(0.5, block_size=12)
    assert len(list(recurrent.generate(model, tokens(8), 30, 20, beyond="stop"))) == 5
    text = list(recurrent.generate(model, tokens(8), 30, 20, temperature=0))
    assert len(text) == 30
    with pytest.raises(ValueError, match="position 13 is beyond block_size = 12"):
        model(tokens(13))


# --- In the trainer ------------------------------------------------------------------------------------------------


def test_train_py_trains_resumes_and_loads_it(corpus: Path, tmp_path: Path) -> None:
    flags = ["--model=recurrent", "--window=8", "--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=20"]
    flags += ["--lowdim.q=4", f"--dataset={corpus}", "--eval_tokens=400", "--device=cpu", "--log_interval=1"]
    flags += ["--learning_rate=1e-2", "--eval_interval=0", "--max_steps=6"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_here(["train.py", *flags, f"--out_dir={whole}"])
    run_here(["train.py", *flags, f"--out_dir={parts}", "--stop_step=3"])
    run_here(["train.py", *flags, f"--out_dir={parts}", "--resume"])
    models = [checkpoint.load_model(out, torch.device("cpu"))[0] for out in (whole, parts)]
    assert isinstance(models[0], RecurrentGPT)
    assert models[0].alpha.item() != 0.5
    for a, b in zip(*(model.state_dict().values() for model in models)):
        assert torch.equal(a, b)
    losses = [line["loss"] for line in read_log(whole) if "loss" in line]
    assert losses[-1] < losses[0]
    with pytest.raises(Exception, match="window: the checkpoint has 8, this run 4"):
        run_here(["train.py", *flags, f"--out_dir={parts}", "--resume", "--window=4"])
    with pytest.raises(Exception, match="model: the checkpoint has recurrent, this run gpt"):
        run_here(["train.py", *flags, f"--out_dir={parts}", "--resume", "--model=gpt"])


def test_the_table_of_lengths_shows_what_a_text_leaves_behind(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    small = dict(lengths=(32, 64), plain_up_to=64, width=16, window=8, seconds=0.01, rounds=1, device="cpu")
    o = comparison.Options("lengths", **small)
    lines = comparison.measure_lengths(dataclasses.replace(o, results=tmp_path))
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith(("| recurrent", "| plain"))]
    held = {(row[0], row[1]): int(row[5].replace(",", "")) for row in rows}
    for alpha in ("0.5", "0"):
        assert held[f"recurrent, alpha {alpha}", "32"] == held[f"recurrent, alpha {alpha}", "64"]
        assert held[f"recurrent, alpha {alpha}", "32"] >= (2 * 3 * 8 + 3 * 8) * 16 * 4  # keys and values, and three p
    assert held["plain", "64"] == 2 * held["plain", "32"] == 2 * 64 * 16 * 4  # k and v
    assert (tmp_path / "recurrent_lengths.png").exists()
