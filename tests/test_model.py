"""The model against Hugging Face's classes, plain formulas in float64, and the paper's counts.

    .venv/bin/pytest tests/test_model.py        CPU, about 15 s
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from config import UserError, load_config
from lpa.counts import dense_weight, table
from lpa.init import singular_values
from model import GPT, GPTConfig, LowDim, LowRank

SMALL = dict(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=96)
RANKS = LowDim(q=8, k=6, v=5, o=7)


def tokens(c: GPTConfig, batch_size: int = 3) -> torch.Tensor:
    return torch.randint(c.vocab_size, (batch_size, c.block_size), generator=torch.Generator().manual_seed(0))


def randomise(model: torch.nn.Module) -> None:
    """Weights of about 1 / sqrt(width), biases and norms away from 0 and 1, so that a mistake anywhere shows."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data.normal_(0, p.size(-1) ** -0.5 if p.ndim > 1 else 0.3, generator=generator)
        if p.ndim == 1:
            p.data.add_(0.5)


# --- Hugging Face ------------------------------------------------------------------------------------------------


def llama() -> tuple[GPT, torch.nn.Module, dict[str, str]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    c = GPTConfig(**SMALL, n_kv_head=2, ffn_dim=48)
    hf = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=48, num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head, num_key_value_heads=2, max_position_embeddings=c.block_size,
            rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, tie_word_embeddings=False,
        )
    )  # fmt: skip
    names = {"transformer.wte.weight": "model.embed_tokens.weight", "transformer.norm.weight": "model.norm.weight"}
    names["lm_head.weight"] = "lm_head.weight"
    ours_to_theirs = dict(norm1="input_layernorm", norm2="post_attention_layernorm")
    ours_to_theirs |= {f"attn.{x}": f"self_attn.{x}_proj" for x in "qkvo"}
    ours_to_theirs |= {f"mlp.{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    for i in range(c.n_layer):
        names |= {f"transformer.h.{i}.{a}.weight": f"model.layers.{i}.{b}.weight" for a, b in ours_to_theirs.items()}
    return GPT(c), hf, names


def copy_llama(ours: GPT, theirs: torch.nn.Module, names: dict[str, str]) -> None:
    state = theirs.state_dict()
    ours.load_state_dict({a: state[b] for a, b in names.items()})


def test_dense_twin_equals_llama_in_logits_and_after_an_adamw_step() -> None:
    ours, theirs, names = llama()
    randomise(theirs)
    copy_llama(ours, theirs, names)
    idx = tokens(ours.config)
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-4, rtol=0)

    loss, reference = ours(idx[:, :-1], idx[:, 1:]), theirs(idx, labels=idx).loss
    torch.testing.assert_close(loss, reference, atol=1e-5, rtol=0)
    for model, value in ((ours, loss), (theirs, reference)):
        value.backward()
        torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-3).step()
    after = dict(ours.named_parameters())
    for a, b in names.items():
        torch.testing.assert_close(after[a], theirs.get_parameter(b), atol=1e-4, rtol=0, msg=a)


def test_dense_twin_equals_gpt2_in_logits_and_after_an_adamw_step() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    options = dict(norm="layernorm", norm_eps=1e-5, mlp="gelu", pos="learned", bias=True, tie_embeddings=True)
    c = GPTConfig(**SMALL, **options)
    ours = GPT(c)
    sizes = dict(n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head, n_positions=c.block_size)
    dropouts = dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=c.vocab_size, **sizes, **dropouts))
    randomise(theirs)

    def mapped(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Their parameters under our names; Conv1D holds its matrix transposed, and q, k, v in one."""
        mine = {f"transformer.{x}.weight": state[f"transformer.{x}.weight"] for x in ("wte", "wpe")}
        mine["lm_head.weight"] = state["transformer.wte.weight"]
        for kind in ("weight", "bias"):
            mine[f"transformer.norm.{kind}"] = state[f"transformer.ln_f.{kind}"]
            for i in range(c.n_layer):
                block = f"transformer.h.{i}"
                mine[f"{block}.norm1.{kind}"] = state[f"{block}.ln_1.{kind}"]
                mine[f"{block}.norm2.{kind}"] = state[f"{block}.ln_2.{kind}"]
                for x, part in zip("qkv", state[f"{block}.attn.c_attn.{kind}"].chunk(3, dim=-1)):
                    mine[f"{block}.attn.{x}.{kind}"] = part.T if kind == "weight" else part
                theirs_by_ours = {"attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
                for a, b in theirs_by_ours.items():
                    matrix = state[f"{block}.{b}.{kind}"]
                    mine[f"{block}.{a}.{kind}"] = matrix.T if kind == "weight" else matrix
        return mine

    ours.load_state_dict(mapped(theirs.state_dict()))
    idx = tokens(c)
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-4, rtol=0)
    for model, loss in ((ours, ours(idx[:, :-1], idx[:, 1:])), (theirs, theirs(idx, labels=idx).loss)):
        loss.backward()
        torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-3).step()
    expected = mapped(theirs.state_dict())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, expected[name], atol=1e-4, rtol=0, msg=name)


# --- Layers and blocks -------------------------------------------------------------------------------------------


def test_low_rank_layer_equals_its_dense_matrix_with_gradients_in_float64() -> None:
    layer = LowRank(12, 9, rank=4, bias=True).double()
    randomise(layer)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, x @ (layer.B @ layer.A).T + layer.bias, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.latent(x), x @ layer.A.T, atol=1e-12, rtol=0)
    g = torch.randn_like(y)
    y.backward(g)
    torch.testing.assert_close(layer.A.grad, layer.B.T @ g.T @ x, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.B.grad, g.T @ x @ layer.A.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.bias.grad, g.sum(0), atol=1e-12, rtol=0)
    torch.testing.assert_close(x.grad, g @ layer.B @ layer.A, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(mlp="swiglu", norm="rmsnorm", pos="none", bias=False, head_bias=False),
        dict(mlp="relu2", qk_norm=True),
    ],
)
def test_post_norm_model_equals_the_papers_formula(options: dict) -> None:
    """Setting 1: x + Norm(f x), no last norm, biases everywhere; every sublayer low-rank, in float64."""
    setting1 = dict(norm="layernorm", norm_order="post", mlp="relu", pos="learned", bias=True, head_bias=True)
    ranks = LowDim(q=8, k=6, v=5, o=7, up=9, down=10, gate=4 if "swiglu" in options.values() else 0)
    c = GPTConfig(**SMALL, lowdim=ranks, **(setting1 | options))
    model = GPT(c).double()
    randomise(model)
    p, idx = dict(model.named_parameters()), tokens(c)
    T, heads = c.block_size, c.n_head

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ p[f"{name}.A"].T @ p[f"{name}.B"].T + p.get(f"{name}.bias", 0)

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        if c.norm == "layernorm":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt()
        return x * p[f"{name}.weight"] + p.get(f"{name}.bias", 0)

    x = p["transformer.wte.weight"][idx]
    if c.pos == "learned":
        x = x + p["transformer.wpe.weight"][:T]
    for i in range(c.n_layer):
        block = f"transformer.h.{i}"
        q, k, v = (linear(f"{block}.attn.{n}", x).view(3, T, heads, -1).transpose(1, 2) for n in "qkv")
        if c.qk_norm:
            q, k = (y / (y.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() for y in (q, k))
        scores = (q @ k.transpose(-1, -2) / q.size(-1) ** 0.5).masked_fill(~torch.ones(T, T).tril().bool(), -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(3, T, -1)
        x = x + norm(f"{block}.norm1", linear(f"{block}.attn.o", y))
        h = linear(f"{block}.mlp.up", x)
        if c.mlp == "swiglu":
            h = F.silu(linear(f"{block}.mlp.gate", x)) * h
        else:
            h = h.relu() ** (2 if c.mlp == "relu2" else 1)
        x = x + norm(f"{block}.norm2", linear(f"{block}.mlp.down", h))
    logits = x @ p["lm_head.weight"].T + p.get("lm_head.bias", 0)
    torch.testing.assert_close(model(idx), logits, atol=1e-10, rtol=0)


def test_merged_dense_model_gives_the_same_logits() -> None:
    low = GPT(GPTConfig(**SMALL, attn_dim=48, n_kv_head=2, lowdim=dataclasses.replace(RANKS, gate=8, up=9, down=10)))
    dense = GPT(dataclasses.replace(low.config, lowdim=LowDim()))
    randomise(low)
    state = {n: p for n, p in low.state_dict().items() if not n.endswith((".A", ".B"))}
    state |= {f"{n}.weight": dense_weight(m) for n, m in low.named_modules() if isinstance(m, LowRank)}
    dense.load_state_dict(state)
    torch.testing.assert_close(low(tokens(low.config)), dense(tokens(low.config)), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("pos", ["rope", "learned", "none"])
def test_no_position_sees_the_future(pos: str) -> None:
    model = GPT(GPTConfig(**SMALL, pos=pos, lowdim=RANKS))
    randomise(model)
    idx = tokens(model.config)
    changed = idx.clone()
    changed[:, 9] = (changed[:, 9] + 1) % model.config.vocab_size
    before, after = model(idx), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] - after[:, 9:]).abs().amax((0, 2)).min() > 1e-4


def test_dropout_acts_in_training_only() -> None:
    model = GPT(GPTConfig(**SMALL, dropout=0.5))
    randomise(model)
    idx = tokens(model.config)
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


# --- Counts ------------------------------------------------------------------------------------------------------

LPA = {f"lowdim.{x}": 256 for x in "qkvo"}
DENSE = dict.fromkeys(LPA, 0)


def changed(low: dict[str, int] | None = None, **options: int) -> list[str]:
    return [f"--{k}={v}" for k, v in {**(low or {}), **options}.items()]


def ffn(rank: int, *names: str) -> dict[str, int]:
    return DENSE | {f"lowdim.{n}": rank for n in names}


def all_of(rank: int) -> dict[str, int]:
    return dict.fromkeys(LPA, rank)


PAPER_COUNTS = [  # preset, overrides, millions of parameters
    ("dense_130m_s1", [], 134.60), ("lpa_130m_s1", [], 125.16),
    ("dense_370m_s1", [], 368.89), ("lpa_370m_s1", [], 318.56),
    ("dense_130m", [], 134.11), ("lpa_130m", [], 115.23), ("dense_370m", [], 367.97), ("lpa_370m", [], 317.64),
    ("dense_3b", [], 3228.9), ("lpa_3b", [], 2423.6), ("dense_3b", ["--n_layer=12"], 2487.2),
    ("lpa_370m_s1", changed(all_of(128)), 293.40), ("lpa_370m_s1", changed(all_of(64)), 280.81),
    ("lpa_370m_s1", changed(all_of(32)), 274.52),
    ("lpa_370m_s1", changed({"lowdim.q": 0, "lowdim.o": 0}), 343.73), ("lpa_370m_s1", changed({"lowdim.o": 0}), 331.15),
    ("lpa_370m", changed({"lowdim.q": 0, "lowdim.o": 0}), 342.80), ("lpa_370m", changed({"lowdim.o": 0}), 330.22),
    ("dense_130m_s1", ["--n_layer=11"], 127.5), ("dense_370m_s1", ["--n_layer=20"], 318.5),
    ("dense_370m", ["--n_layer=20"], 317.6),
    ("lpa_130m_s1", changed(ffn(512, "up", "down")), 125.2), ("lpa_370m_s1", changed(ffn(640, "up", "down")), 325.0),
    ("lpa_130m", changed(ffn(384, "gate", "up", "down")), 116.4),
    ("lpa_370m", changed(ffn(560, "gate", "up", "down")), 318.0),
    ("lpa_370m_s1", changed(all_of(320) | {"lowdim.up": 768, "lowdim.down": 768}), 318.4),
    ("lpa_130m_s1", ["--attn_dim=1536"], 134.6), ("lpa_370m_s1", ["--attn_dim=3072"], 369.0),
    ("lpa_130m_s1", ["--ffn_dim=3584"], 134.6), ("lpa_370m_s1", ["--ffn_dim=5120"], 369.0),
    ("lpa_130m_s1", ["--n_layer=14"], 137.8), ("lpa_370m_s1", ["--n_layer=29"], 371.0),
]  # fmt: skip


@pytest.mark.parametrize(("preset", "overrides", "millions"), PAPER_COUNTS)
def test_parameter_counts_are_the_papers(preset: str, overrides: list[str], millions: float) -> None:
    c = load_config([f"config/{preset}.py", "--vocab_size=32000", *overrides])
    with torch.device("meta"):
        model = GPT(c.gpt)
    assert model.n_params() == pytest.approx(1e6 * millions, rel=3e-3)
    assert model.n_params() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("lowdim", [LowDim(), RANKS])
@pytest.mark.parametrize("mlp", ["swiglu", "relu"])
def test_flops_agree_with_torch(lowdim: LowDim, mlp: str) -> None:
    c = GPTConfig(**SMALL, lowdim=lowdim, mlp=mlp, attn_dim=48, n_kv_head=2)
    model, T = GPT(c), c.block_size
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it counts the CPU's fused one as 0
        model(torch.zeros(1, T, dtype=torch.long))
    full_square = c.n_layer * 4 * T * T * c.attn_dim  # torch charges what the causal mask leaves out, too
    assert counter.get_total_flops() - full_square // 2 == T * model.flops_per_token()


# --- Initialisation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["pre", "post"])
def test_dense_init_has_the_documented_law(order: str) -> None:
    sizes = dict(n_layer=3, n_head=4, n_embd=256, block_size=64, vocab_size=512)
    model = GPT(GPTConfig(**sizes, norm="layernorm", norm_order=order, pos="learned", bias=True, head_bias=True))
    residual = 0.02 / 6**0.5 if order == "pre" else 0.02
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert torch.all(p == (1 if "norm" in name and name.endswith("weight") else 0)), name
        else:
            std = residual if name.endswith(("o.weight", "down.weight")) else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.02), name
            assert abs(p.mean().item()) < 5 * std / p.numel() ** 0.5, name


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("law", ["spectral", "matched", "torch"])
def test_factor_init_has_the_documented_law(law: str, order: str) -> None:
    """The product of the factors, against an SVD of dense draws, the dense element variance, and nn.Linear."""
    rank = 64
    c = GPTConfig(n_layer=3, n_head=4, n_embd=256, block_size=8, vocab_size=64, factor_init=law, norm_order=order,
                  attn_dim=384, lowdim=LowDim(rank, rank, rank, rank, down=rank), ffn_dim=512)  # fmt: skip
    blocks = GPT(c).transformer.h
    for name in ("q", "o", "down"):
        layers = [(block.mlp if name == "down" else block.attn).get_submodule(name) for block in blocks]
        scale = 1 / 6**0.5 if name in ("o", "down") and order == "pre" else 1.0
        A, B = (torch.stack([getattr(layer, f) for layer in layers]).detach() for f in "AB")
        if law == "torch":
            reference = torch.nn.Linear(A.size(-1), rank)
            assert A.std().item() == pytest.approx(reference.weight.std().item(), rel=0.02)
            assert A.abs().max() <= A.size(-1) ** -0.5
            assert B.std().item() == pytest.approx(scale * torch.nn.Linear(rank, 256).weight.std().item(), rel=0.02)
        elif law == "matched":
            assert (B @ A).std().item() == pytest.approx(0.02 * scale, rel=0.03)
            assert A.std().item() == pytest.approx(B.std().item(), rel=0.03)
        else:
            generator = torch.Generator().manual_seed(3)
            draws = torch.stack([torch.randn(B.size(1), A.size(2), generator=generator) for _ in range(8)])
            expected = 0.02 * scale * torch.linalg.svdvals(draws)[:, :rank].mean(0)
            measured = torch.linalg.svdvals(B @ A)[:, :rank]
            torch.testing.assert_close(measured, expected.expand_as(measured), rtol=0.02, atol=0)
            torch.testing.assert_close(A @ A.mT, B.mT @ B, atol=1e-5, rtol=0)  # split evenly


@pytest.mark.parametrize(("rows", "columns"), [(1024, 1024), (768, 3072), (300, 100)])
def test_singular_values_follow_those_of_a_drawn_matrix(rows: int, columns: int) -> None:
    drawn = torch.linalg.svdvals(torch.randn(rows, columns, generator=torch.Generator().manual_seed(5)).double())
    rank = min(rows, columns) // 2
    torch.testing.assert_close(singular_values(columns, rows, rank), drawn[:rank], rtol=0.02, atol=0)


def test_spectral_init_of_a_square_matrix_can_take_every_rank() -> None:
    assert singular_values(64, 64, 64).isfinite().all()


@pytest.mark.parametrize("tied", [False, True])
def test_zero_init_starts_from_blocks_that_add_nothing(tied: bool) -> None:
    c = GPTConfig(**SMALL, zero_init=True, tie_embeddings=tied, lowdim=LowDim(o=7))
    model = GPT(c)
    x, idx = torch.randn(2, 5, c.n_embd), tokens(c)
    for block in model.transformer.h:
        assert torch.equal(block(x, model.rope[:, :5], None), x)
    assert (model(idx) == 0).all() == (not tied)
    for _ in range(3):  # and every parameter leaves its start
        loss = model(idx, idx.roll(1, 0))
        for p, grad in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()))):
            p.data -= 10 * grad
    start = GPT(c).state_dict()
    assert all((p != start[name]).any() for name, p in model.state_dict().items())


def test_an_unknown_parameter_has_no_silent_init() -> None:
    model = GPT(GPTConfig(**SMALL))
    model.transformer.extra = torch.nn.Conv1d(3, 3, 1)
    with pytest.raises(ValueError, match=r"transformer\.extra"):
        model.init_weights(1)


# --- What a person reads -----------------------------------------------------------------------------------------


def test_printing_shows_each_sublayer_and_warns_of_a_rank_that_saves_nothing() -> None:
    with torch.device("meta"):
        text = table(GPT(GPTConfig(n_embd=64, n_head=4, vocab_size=100, lowdim=LowDim(q=8, o=40))))
    rows = {line.split()[0]: line.split() for line in text.splitlines()[1:]}
    assert rows["q"] == ["q", "64", "64", "8", "1,024", "25%", "2,048"]
    assert rows["k"][3] == "dense"
    assert "warning: o at rank 40 saves nothing; it would below 32" in text
    assert "warning: q" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n_head=7"], "n_embd is 768, wanted a multiple of n_head = 7"),
        (["--lowdim.q=-1"], "lowdim.q is -1, wanted a rank from 0"),
        (["--lowdim.q=800"], "lowdim.q is 800, wanted a rank from 0 (dense) to 768"),
        (["--lowdim.gate=8", "--mlp=relu"], "mlp = 'relu' has no gate"),
        (["--lowdim.z=3"], "--lowdim.z=3"),
        (["--n_kv_head=5"], "n_kv_head is 5, wanted a divisor of n_head = 12"),
        (["--n_head=768"], "wanted an even width"),
        (["--norm=batchnorm"], "--norm"),
        (["--n_layer=two"], "--n_layer"),
    ],
)
def test_a_wrong_option_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
