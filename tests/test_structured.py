"""Block-dense and block-shuffle layers against their formulas, the guide, the published counts and ratios.

.venv/bin/pytest tests/test_structured.py        CPU, about 30 s
"""

import dataclasses
import math
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import run_here, run_ranks
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from config import TrainConfig, UserError, load_config
from experiments.structured import guides, speed
from experiments.structured import train as guided_train
from experiments.structured.premerge import Merged, few_tokens, premerge
from lpa import checkpoint, decode, init, optim
from lpa.counts import dense_weight, table
from lpa.structured import BlockDense, BlockShuffle
from model import GPT, GPTConfig, LowDim, LowRank

SMALL = dict(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=96)
MIXED = LowDim(q="blockshuffle:4", k="blockdense:8:2", v="blockdense:12:4", o="blockshuffle:2", gate=6,
               up="blockdense:10:2", down="blockshuffle:4")  # fmt: skip
SHAPES = [(6, 10, 2), (10, 6, 2), (12, 12, 3), (9, 15, 3), (16, 8, 1), (4, 12, 4)]  # C_in, C_out, K


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    for p in module.parameters():
        p.data.normal_(0, p.size(-1) ** -0.5 if p.ndim > 1 else 0.3, generator=generator)
    return module


def layers(d_in: int, d_out: int, K: int, bias: bool = True) -> list[torch.nn.Module]:
    rank = min(d_in, d_out) // K * K
    made = [BlockDense(d_in, d_out, rank, K, bias), BlockShuffle(d_in, d_out, K, bias), LowRank(d_in, d_out, 3, bias)]
    return [randomise(layer) for layer in made]


def idx(c: GPTConfig, batch_size: int = 3) -> torch.Tensor:
    return torch.randint(c.vocab_size, (batch_size, c.block_size), generator=torch.Generator().manual_seed(0))


# --- Layers ------------------------------------------------------------------------------------------------------


def by_loops(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The published steps for one vector x (C_in), a block and a channel at a time."""
    K = len(layer.A)
    h = torch.cat([block @ part for block, part in zip(layer.A, x.chunk(K))])
    if isinstance(layer, BlockDense):
        return layer.B @ h + layer.bias
    y = torch.empty(len(layer.bias), dtype=x.dtype)
    for j in range(K):
        dealt = torch.stack([h[i] for i in range(len(h)) if i % K == j])
        for s, value in enumerate(layer.B[j] @ dealt):
            y[s * K + j] = value
    return y + layer.bias


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_layer_is_its_dense_matrix_and_its_formula_with_gradients_in_float64(shape: tuple) -> None:
    x = draw(2, 5, 2 * shape[0])[..., ::2].requires_grad_()  # of a stride that no view can take away
    for layer in layers(*shape):
        layer.double()
        with torch.no_grad():
            identity = torch.eye(shape[0], dtype=torch.float64)
            torch.testing.assert_close((layer(identity) - layer.bias).T, dense_weight(layer), atol=1e-12, rtol=0)
            if not isinstance(layer, LowRank):
                torch.testing.assert_close(layer(x)[1, 3], by_loops(layer, x[1, 3]), atol=1e-12, rtol=0)
        names = ("A", "B", "bias")
        inputs = (x, *(getattr(layer, name) for name in names))
        call = lambda x, *p: torch.func.functional_call(layer, dict(zip(names, p)), (x,))  # noqa: B023, E731
        assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("shape", [(64, 256, 4), (256, 64, 2)], ids=str)
def test_blocks_start_orthogonal(shape: tuple) -> None:
    for layer in layers(*shape)[:2]:
        with torch.no_grad():
            init.fill(layer.A, layer.B, "spectral", 0.01, 0.02, torch.Generator().manual_seed(1))
        for factor, scale in ((layer.A, 1.0), (layer.B, 0.5)):
            values = torch.linalg.svdvals(factor.detach())
            torch.testing.assert_close(values, torch.full_like(values, scale), atol=1e-5, rtol=0)


# --- The model ---------------------------------------------------------------------------------------------------


def mixed(**options: object) -> GPT:
    return randomise(GPT(GPTConfig(**SMALL, lowdim=MIXED, **options)))


@pytest.mark.parametrize("options", [{}, dict(first_ffn_dense=True, bias=True, n_kv_head=2)], ids=str)
def test_a_merged_model_gives_the_same_logits(options: dict) -> None:
    low = mixed(**options)
    dense = GPT(dataclasses.replace(low.config, lowdim=LowDim()))
    state = {n: p for n, p in low.state_dict().items() if not n.endswith((".A", ".B"))}
    state |= {f"{n}.weight": dense_weight(m) for n, m in low.named_modules() if isinstance(m, optim.FACTORED)}
    dense.load_state_dict(state)
    torch.testing.assert_close(low(idx(low.config)), dense(idx(low.config)), atol=1e-4, rtol=1e-4)
    assert ("transformer.h.0.mlp.up.weight" in low.state_dict()) == low.config.first_ffn_dense


@pytest.mark.parametrize("pos", ["rope", "none"])
@torch.inference_mode()
def test_the_cache_keeps_the_latents_of_block_dense_keys_and_values(pos: str) -> None:
    model = mixed(pos=pos, n_kv_head=2).eval()
    full = model(idx(model.config))
    cache = decode.new_cache(model, 3)
    steps = [model(part, cache=cache) for part in idx(model.config).split([7, 1, 1, 7], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), full, atol=1e-4, rtol=0)
    assert cache.held[0]["v"].shape[1:] == (1, 16, 12)
    assert cache.held[0]["k"].shape[1:] == ((1, 16, 8) if pos == "none" else (2, 16, 8))
    shuffled = dataclasses.replace(model.config, lowdim=LowDim(k="blockshuffle:2", v="blockshuffle:2"))
    assert decode.cached_widths(shuffled) == {"k": (2, 8), "v": (2, 8)}


@pytest.mark.parametrize("first", [False, True])
def test_counts_and_the_printed_table(first: bool) -> None:
    model = GPT(GPTConfig(**SMALL, lowdim=MIXED, first_ffn_dense=first))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 16, dtype=torch.long))
    full_square = 2 * 4 * 16 * 16 * 32  # torch charges what the causal mask leaves out, too
    assert counter.get_total_flops() - full_square // 2 == 16 * model.flops_per_token()
    rows = {line.split()[0]: line.split() for line in table(model).splitlines()[1:]}
    assert rows["q"] == ["q", "32", "32", "blockshuffle:4", "512", "50%", "1,024"]
    assert rows["k"] == ["k", "32", "32", "blockdense:8:2", "384", "38%", "768"]
    assert model.n_params() == sum(p.numel() for p in model.parameters())


def test_muon_treats_every_block_as_a_matrix_and_factors_decay_by_half() -> None:
    model = mixed()
    c = TrainConfig(gpt=model.config, optimizer="muon", weight_decay=0.1, learning_rate=0.01)
    _, muon = optim.make_optimizers(model, c)
    assert {p for group in muon.param_groups if group["name"] == "factors" for p in group["params"]} == {
        p for m in model.modules() if isinstance(m, optim.FACTORED) for p in (m.A, m.B)
    }
    factor = model.transformer.h[0].attn.q.A  # (4, 8, 8)
    before = factor.detach().clone()
    model(idx(model.config), idx(model.config)).backward()
    gradient = factor.grad.clone()
    muon.step()
    for block, g, old in zip(factor, gradient, before):
        step = optim.orthogonal(g[None])[0] * 0.01 * 0.2 * 8**0.5
        torch.testing.assert_close(block, old * (1 - 0.01 * 0.05) - step, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("blockdense:8", "is 'blockdense:8', wanted a rank, 'blockdense:R:K' or 'blockshuffle:K'"),
        ("monarch:4", "wanted a rank, 'blockdense:R:K' or 'blockshuffle:K'"),
        ("1.5", "is '1.5', wanted a rank"),
        ("blockdense:512:5", "wanted for K a divisor of width in = 768: 1, 2, 3, 4, 6"),
        ("blockdense:0:4", "wanted for R a multiple of K = 4 from 4 to 768"),
        ("blockdense:1024:4", "wanted for R a multiple of K = 4 from 4 to 768"),
        ("blockshuffle:0", "wanted for K a divisor of width in = 768 and width out = 2048: 1, 2, 4, 8"),
        ("blockshuffle:3", "wanted for K a divisor of width in = 768 and width out = 2048: 1, 2, 4, 8"),
    ],
)
def test_a_wrong_kind_is_one_line_that_says_what_would_be_valid(kind: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config([f"--lowdim.up={kind}"])
    assert f"lowdim.up is '{kind}'" in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_presets_and_the_command_line_take_ranks_and_kinds(tmp_path: Path) -> None:
    (tmp_path / "preset.py").write_text("lowdim = dict(q=256, up='blockdense:512:4')\n")
    c = load_config([str(tmp_path / "preset.py"), "--lowdim.down=blockshuffle:4", "--lowdim.k=64"])
    assert c.gpt.lowdim == LowDim(q=256, k=64, up="blockdense:512:4", down="blockshuffle:4")
    assert checkpoint.gpt_config(dataclasses.asdict(c.gpt)) == c.gpt


# --- Published counts --------------------------------------------------------------------------------------------

SIZES = {  # d, layers, heads, then (B, R) of block-dense at 63 % and 32 %
    "s": (768, 12, 12, (2, 512), (2, 256)),
    "m": (1024, 24, 16, (4, 768), (4, 384)),
    "l": (1536, 24, 12, (2, 1024), (2, 512)),
    "xl": (2048, 24, 16, (4, 1536), (4, 768)),
}
MILLIONS = {  # of all parameters and of the feed-forward: dense, low rank and block-shuffle 63 %, 32 %, block-dense
    "s": [(109.5, 56.6), (90.0, 37.2), (73.8, 20.9), (90.0, 37.2), (73.8, 20.9)],
    "m": [(334.8, 201.3), (262.4, 129.0), (202.1, 68.7), (254.9, 121.4), (198.3, 64.9)],
    "l": [(728.6, 453.0), (565.8, 290.2), (430.2, 154.5), (565.8, 290.2), (430.2, 154.5)],
    "xl": [(1273.5, 805.3), (984.1, 515.9), (742.9, 274.7), (953.9, 485.8), (727.8, 259.7)],
}


def published(size: str, up: int | str = 0) -> GPT:
    """On the meta device, and without the biases, norms and positions that the published counts leave out."""
    d, n_layer, n_head, *_ = SIZES[size]
    c = load_config(["experiments/structured/config/structured.py", f"--n_embd={d}", f"--n_layer={n_layer}",
                     f"--n_head={n_head}", "--vocab_size=32000", f"--lowdim.up={up}",
                     f"--lowdim.down={up}"])  # fmt: skip
    with torch.device("meta"):
        return GPT(c.gpt)


def matrices(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters() if p.ndim > 1) / 1e6


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_of_the_grid_are_the_published(size: str) -> None:
    d, *_, wide, narrow = SIZES[size]
    dense, wide_low, narrow_low, wide_block, narrow_block = MILLIONS[size]
    block_dense = [f"blockdense:{R}:{B}" for B, R in (wide, narrow)]
    for kinds, wanted in (
        ([0], dense), ([d // 2, "blockshuffle:2"], wide_low), ([d // 4, "blockshuffle:4"], narrow_low),
        (block_dense[:1], wide_block), (block_dense[1:], narrow_block),
    ):  # fmt: skip
        for kind in kinds:
            model = published(size, kind)
            ffn = sum(matrices(block.mlp) for block in model.transformer.h)
            assert (matrices(model), ffn) == (pytest.approx(wanted[0], abs=0.06), pytest.approx(wanted[1], abs=0.06))


@pytest.mark.parametrize(
    ("size", "low", "block"), [("s", 0.301, 0.301), ("m", 0.380, 0.395), ("l", 0.413, 0.413), ("xl", 0.432, 0.449)]
)
def test_fixed_flop_ratios_are_the_published(size: str, low: float, block: float) -> None:
    """Published FLOPs charge attention the full square of T: the twice as long causal one here."""
    B, R = SIZES[size][4]
    dense = published(size).flops_per_token(2 * 1024)
    for kind, wanted in ((SIZES[size][0] // 4, low), ("blockshuffle:4", low), (f"blockdense:{R}:{B}", block)):
        model = published(size, kind)
        ratio = guides.fixed_flop_ratio(model, dense, model.flops_per_token(2 * 1024))
        assert ratio == pytest.approx(wanted, abs=6e-4)


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("gqa_m", 334.8), ("wide_structured_m", 219.2), ("gqa_l", 728.6), ("wide_structured_l", 464.0)],
)
def test_wide_presets_have_the_published_counts(preset: str, millions: float) -> None:
    c = load_config([f"experiments/structured/config/{preset}.py", "--vocab_size=32000"])
    with torch.device("meta"):
        assert matrices(GPT(c.gpt)) == pytest.approx(millions, abs=0.06)
    assert c.gpt.n_kv_head * c.gpt.head_dim == 256


# --- The guide ---------------------------------------------------------------------------------------------------


def test_a_guide_changes_nothing_at_first_then_mixes_and_never_evaluates() -> None:
    model = mixed(bias=True)
    plain = model(idx(model.config))
    guides.add_guides(model)
    for alpha_step in (0, 3):
        guides.set_guides(model, alpha_step, 10, seed=1)
        torch.testing.assert_close(model(idx(model.config)), plain, atol=1e-4, rtol=1e-4)
    layer = model.transformer.h[0].mlp.down
    layer.guide.data.normal_()
    layer.guiding, x = True, draw(5, layer.guide.size(1), dtype=torch.float32)
    mixture = 0.7 * F.linear(x, layer.guide) + 0.3 * F.linear(x, dense_weight(layer)) + layer.bias
    layer.alpha.fill_(0.7)
    torch.testing.assert_close(layer(x), mixture, atol=1e-4, rtol=1e-4)
    model.eval()
    torch.testing.assert_close(model(idx(model.config)), plain, atol=1e-4, rtol=1e-4)


def test_the_guide_takes_part_with_probability_alpha() -> None:
    layer, seen = layers(6, 10, 2)[1], []
    guides.add_guides(layer)
    for step in range(2000):
        guides.set_guides(layer, step, 2000, seed=3)
        assert layer.alpha.item() == pytest.approx((1 + math.cos(math.pi * step / 2000)) / 2, abs=1e-6)
        seen.append(layer.guiding)
    assert sum(seen) / 2000 == pytest.approx(0.5, abs=0.03)
    assert sum(seen[:1000]) / 1000 == pytest.approx(0.5 + 1 / math.pi, abs=0.03)  # the mean of alpha over that half
    guides.set_guides(layer, 500, 2000, seed=3)
    assert layer.guiding == seen[500]  # a function of step and seed


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_guide_that_rests_keeps_its_weights_and_moments(optimizer: str) -> None:
    model = mixed()
    guides.add_guides(model)
    c = TrainConfig(gpt=model.config, optimizer=optimizer, weight_decay=0.1, learning_rate=0.01)
    optimizers = optim.make_optimizers(model, c)
    guide = model.transformer.h[0].attn.q.guide
    for guiding in (True, False):
        for layer in guides.factored_layers(model):
            layer.guiding = guiding
            layer.alpha.fill_(0.5)
        before = guide.detach().clone()
        model(idx(model.config), idx(model.config)).backward()
        assert (guide.grad is None) != guiding
        for o in optimizers:
            o.step()
            o.zero_grad()
        assert torch.equal(guide, before) != guiding


TINY = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--lowdim.up=blockdense:8:2", "--lowdim.k=8",
        "--lowdim.down=blockshuffle:4", "--batch_size=2", "--learning_rate=1e-2", "--log_interval=1", "--device=cpu",
        "--weight_decay=0.1", "--eval_interval=0", "--eval_tokens=2000"]  # fmt: skip


def trained(corpus: Path, out: Path, *options: str) -> dict[str, torch.Tensor]:
    run_here(["experiments.structured.train", *TINY, f"--dataset={corpus}", f"--out_dir={out}", *options])
    return checkpoint.load_tensors(checkpoint.newest(out)[0], "model")


def test_a_guided_run_may_stop_anywhere_and_ends_without_its_guide(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while guided, by a signal in the last guided step, just after it, and later: the weights are the same."""
    options, original = ["--max_steps=8", "--self_guided=0.5"], guides.set_guides
    straight = trained(corpus, tmp_path / "straight", *options)
    options_of_run = checkpoint.find(tmp_path / "straight")[1]["options"]["gpt"]
    assert straight.keys() == GPT(checkpoint.gpt_config(options_of_run)).state_dict().keys()
    parts = tmp_path / "parts"
    assert "transformer.h.1.mlp.down.guide" in trained(corpus, parts, *options, "--stop_step=2")
    checkpoint.mark_best(parts, 2, val_loss=0.1)
    with monkeypatch.context() as patch:
        stop = lambda m, step, *rest: original(m, step, *rest) or (step == 3 and signal.raise_signal(signal.SIGTERM))  # noqa: E731
        patch.setattr(guides, "set_guides", stop)
        assert "transformer.h.1.mlp.down.guide" in trained(corpus, parts, *options, "--resume")
    assert trained(corpus, parts, *options, "--stop_step=4", "--resume").keys() == straight.keys()
    trained(corpus, parts, *options, "--stop_step=6", "--resume")
    resumed = trained(corpus, parts, *options, "--resume")
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    assert checkpoint.load_model(parts / "ckpt/best", torch.device("cpu"))[2]["step"] == 2  # which had guides
    with pytest.raises(UserError, match="was begun with"):
        trained(corpus, parts, "--max_steps=8", "--self_guided=0.25", "--resume")
    with pytest.raises(UserError, match="self_guided is nan, wanted a share"):
        trained(corpus, parts, "--self_guided=nan")

    def look(model: GPT, step: int, *_: int) -> None:
        layer = model.transformer.h[1].mlp.up
        kept = torch.equal(layer.A, straight["transformer.h.1.mlp.up.A"])
        found.append((step, kept, torch.equal(layer.guide, dense_weight(layer))))

    found: list[tuple[int, bool, bool]] = []
    monkeypatch.setattr(guides, "set_guides", look)
    trained(corpus, tmp_path / "from", *options, f"--init_from={tmp_path / 'straight'}", "--stop_step=1")
    assert found == [(0, True, True)]


@pytest.mark.parametrize(
    "changes",
    [dict(lowdim=LowDim(q=8, k=8, v=8, down=8)), dict(lowdim=LowDim(v="blockdense:8:2"), bias=True),
     dict(lowdim=LowDim(q=8, k=8, v=8), pos="none")],
    ids=str,
)  # fmt: skip
def test_a_guided_model_is_evaluated_and_decoded_as_without_its_guide(changes: dict) -> None:
    """Also while it learns; from the cache of latents, where that is what its config asks for."""
    model = randomise(GPT(GPTConfig(**SMALL, **changes))).eval()
    full = model(idx(model.config))
    guides.add_guides(model)
    for layer in guides.factored_layers(model):
        layer.guide.data.normal_()
    torch.testing.assert_close(model.eval()(idx(model.config)), full)
    cache = decode.new_cache(model, 3)
    with torch.no_grad():
        steps = [model(part, cache=cache) for part in idx(model.config).split([7, 1, 8], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), full, atol=1e-4, rtol=1e-4)
    assert (model.train()(idx(model.config)) - full).abs().max() > 0.1


def test_a_guide_of_no_step_is_an_error(corpus: Path) -> None:
    c = TrainConfig(gpt=GPTConfig(**SMALL, lowdim=MIXED), max_steps=1, dataset=str(corpus))
    with pytest.raises(UserError, match=r"self_guided is 0.4: 0 steps, wanted 1 to max_steps = 1"):
        guided_train.plan(guided_train.Options(c, 0.4))
    c = dataclasses.replace(c, gpt=dataclasses.replace(c.gpt, vocab_size=None), max_steps=100, warmup_steps=10)
    longer, guided_steps, new_steps = guided_train.plan(guided_train.Options(c, "flops"))
    assert longer.max_steps == new_steps + guided_steps == 100 + guided_steps
    assert longer.warmup_steps == round(longer.max_steps / 10)  # as published: a tenth of all


def test_a_guided_model_compiles_to_two_graphs_whatever_alpha_is() -> None:
    model = GPT(GPTConfig(**SMALL, lowdim=LowDim(q="blockshuffle:4", up=8, down="blockdense:8:2")))
    guides.add_guides(model)
    for block in model.transformer.h:  # as --compile=block does
        block.compile(backend="eager")
    counters.clear()
    guided = set()
    for step in range(12):
        guides.set_guides(model, step, 12, seed=1)
        guided.add(model.transformer.h[0].mlp.up.guiding)
        model(idx(model.config), idx(model.config)).backward()
    assert guided == {False, True}
    assert counters["stats"]["unique_graphs"] == 2


def test_two_processes_are_guided_as_one(corpus: Path, tmp_path: Path) -> None:
    """By DDP, and by FSDP."""
    options = ["--max_steps=6", "--self_guided=0.5", "--tokens_per_step=128"]
    layer = layers(6, 10, 2)[0]
    guides.add_guides(layer)
    drawn = [guides.set_guides(layer, step, 3, seed=1) or layer.guiding for step in range(3)]
    assert drawn == [True, True, False]  # so one of the guided steps leaves the guides without gradient
    one = trained(corpus, tmp_path / "one", *options)
    for shard in ("false", "true"):
        places = [f"--dataset={corpus}", f"--out_dir={tmp_path / shard}", f"--shard={shard}"]
        run_ranks(2, ["experiments.structured.train", *TINY, *options, *places], tmp_path)
        two = checkpoint.load_tensors(checkpoint.newest(tmp_path / shard)[0], "model")
        torch.testing.assert_close(two, one, atol=2e-4, rtol=1e-3)


def test_fixed_flops_add_the_guided_steps_and_see_their_tokens_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = train.micro_batches
    monkeypatch.setattr(train, "micro_batches", lambda *a: seen.append(a[2]) or original(*a))
    trained(corpus, tmp_path / "run", "--max_steps=6", "--self_guided=flops")
    again = len(seen) - 6
    assert 0 < again < 6
    assert seen == [*range(6), *range(again)]


# --- Merged ahead ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("few", [0, 4, 1024])
@pytest.mark.parametrize("options", [dict(pos="none"), dict(pos="rope", bias=True, n_kv_head=2)], ids=str)
@torch.inference_mode()
def test_a_merged_model_decodes_as_its_factors_do(options: dict, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the dense matrices never, for calls of up to 4 tokens, and always."""
    model = randomise(GPT(GPTConfig(**SMALL, lowdim=dataclasses.replace(MIXED, k=6, v=5), **options))).eval()
    full = model(idx(model.config))
    monkeypatch.setattr("experiments.structured.premerge.few_tokens", lambda layers: few)
    premerge(model)
    merged = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, Merged)}
    assert ("v" not in merged) and (("q" in merged) == bool(few))  # v's latents are cached: B stays apart
    cache = decode.new_cache(model, 3)
    steps = [model(part, cache=cache) for part in idx(model.config).split([7, 1, 8], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), full, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_few_is_where_the_factors_become_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of our own: the matrix takes 10 seconds and 1 per token, the factors `first` and half a second."""
    built = [Merged(layers(6, 10, 2)[1])]
    for first, wanted in ((10, 0), (12, 2), (20, 16), (1e9, 1024)):
        seconds = lambda layers, x, few: 10 + len(x) if few else first + len(x) / 2  # noqa: B023, E731
        monkeypatch.setattr("experiments.structured.premerge.seconds_of", seconds)
        assert few_tokens(built) == wanted


# --- Speed -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("C", [48, 192, 768, 2048, 5120])
@pytest.mark.parametrize(("part", "share"), [(2, 0.625), (4, 0.3125)])
def test_every_kind_has_the_share_that_its_label_says(C: int, part: int, share: float) -> None:
    for kind in speed.kinds(C, part).values():
        with torch.device("meta"):
            kept = sum(p.numel() for p in speed.make_pair(kind, C).parameters()) / (8 * C * C)
        assert kept == pytest.approx(share, rel=0.001 if C > 48 else 0.04), kind


def test_the_table_of_speed(tmp_path: Path) -> None:
    speed.main(speed.Options(widths=(512,), tokens=(1, 8), rounds=1, out=tmp_path))
    rows = [row.split(" | ") for row in (tmp_path / "structured_ffn_speed.md").read_text().splitlines()]
    rows = [row for row in rows if row[0] == "| 512"]
    assert [row[1:3] for row in rows] == [["1", "63 %"], ["1", "32 %"], ["8", "63 %"], ["8", "32 %"]]
    assert all(float(cell.partition(" (")[0]) > 0 for row in rows for cell in row[3:6])
