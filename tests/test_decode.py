"""The cache against the full forward pass: every form of it, prompts in pieces, and prompts of unequal length.

    .venv/bin/pytest tests/test_decode.py        CPU, about 10 s
"""

import dataclasses
import itertools

import pytest
import torch

from lpa import decode
from lpa.counts import table
from model import GPT, GPTConfig, LowDim

SMALL = dict(n_layer=2, n_head=4, n_embd=32, block_size=24, vocab_size=96)
POSITIONS = [dict(pos="learned"), dict(pos="none"), dict(pos="rope"), dict(pos="rope", rope_dim=6)]
RANKS = [LowDim(), LowDim(q=8, k=6, v=5, o=7), LowDim(k=6), LowDim(q=8, v=5)]
SHAPES = [dict(), dict(n_kv_head=2, attn_dim=48, bias=True), dict(n_kv_head=1, attn_dim=24, qk_norm=True)]
FORMS = [dict(lowdim=r, **p, **s) for p, r, s in itertools.product(POSITIONS, RANKS, SHAPES)]


def randomised(**options: object) -> GPT:
    """A model whose every parameter matters to its logits, which are of order 1."""
    model = GPT(GPTConfig(**SMALL, **options)).eval()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data.normal_(0, 0.3, generator=generator)
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(96, shape, generator=torch.Generator().manual_seed(2))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", FORMS, ids=str)
@torch.inference_mode()
def test_logits_with_the_cache_equal_those_of_a_full_forward(options: dict) -> None:
    """A prompt at once, token by token, and in pieces that follow an empty and a filled cache."""
    model, idx = randomised(**options), tokens(3, 24)
    full = model(idx)
    for pieces in ([24], [1] * 24, [7, 1, 1, 5, 10], [1, 23]):
        cache = decode.new_cache(model, 3)
        steps = [model(part, cache=cache) for part in idx.split(pieces, dim=1)]
        close(torch.cat(steps, dim=1), full)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_weights_in_bfloat16_cache_what_those_in_float32_do(options: dict) -> None:
    model = randomised(**options)
    absorbed = decode.new_cache(model, 1).absorbed
    idx = tokens(3, 24)
    wanted = model.to(torch.bfloat16)(idx)
    cache = decode.new_cache(model, 3)
    assert cache.absorbed == absorbed
    with torch.inference_mode():
        logits = torch.cat([model(part, cache=cache) for part in idx.split([20, 1, 1, 1, 1], dim=1)], dim=1)
    torch.testing.assert_close(logits.float(), wanted.float(), atol=0.15, rtol=0.05)


@pytest.mark.parametrize("options", FORMS, ids=str)
@torch.inference_mode()
def test_padded_prompts_have_the_logits_of_each_prompt_alone(options: dict) -> None:
    model, idx, lengths = randomised(**options), tokens(3, 24), [24, 5, 14]
    for pieces in ([24], [16, 1, 1, 1, 5]):
        cache = decode.new_cache(model, 3)
        cache.padding = torch.tensor([24 - length for length in lengths])
        steps = [model(part, cache=cache) for part in idx.split(pieces, dim=1)]
        logits = torch.cat(steps, dim=1)
        for row, length in enumerate(lengths):
            close(logits[row, -length:], model(idx[row : row + 1, -length:])[0])


@pytest.mark.parametrize("options", [dict(pos="learned", lowdim=RANKS[1]), dict(pos="rope"), POSITIONS[3]], ids=str)
def test_a_batch_of_unequal_prompts_is_continued_as_each_alone(options: dict) -> None:
    """Within block_size, and beyond it: there the last 12 tokens, the new one included, begin anew."""
    model, idx, lengths = randomised(**options), tokens(3, 9), torch.tensor([9, 2, 6])
    drawn = list(decode.generate(model, idx, 20, vocab_size=96, temperature=0, lengths=lengths))
    text = torch.cat([idx, torch.stack(drawn, dim=1)], dim=1)
    for row, length in enumerate(lengths.tolist()):
        for end in (9, 15, 24):
            assert text[row, end] == model(text[row : row + 1, 9 - length : end])[0, -1].argmax()
        assert text[row, 25] == model(text[row : row + 1, 13:25])[0, -1].argmax()
    with pytest.raises(ValueError, match=r"lengths are \[9, 0, 6\], wanted 1 to 9"):
        next(decode.generate(model, idx, 1, 96, lengths=torch.tensor([9, 0, 6])))


def test_numbers_cached_per_token() -> None:
    """At the paper's 370M: 2 r of 2 d without a rotation, d + r with it, 2 r + R with rope_dim; and what is stored."""
    d, r, layers = 1024, 256, 24
    low = GPTConfig(n_layer=layers, n_head=16, n_embd=d, vocab_size=96, lowdim=LowDim(r, r, r, r))
    for options, wanted in [
        (dict(), d + r),
        (dict(rope_dim=64), 2 * r + 64),
        (dict(pos="none"), 2 * r),
        (dict(pos="learned"), 2 * r),
        (dict(lowdim=LowDim()), 2 * d),
        (dict(lowdim=LowDim(), rope_dim=64, n_kv_head=4), 2 * d // 4 + 4 * 64),
        (dict(lowdim=LowDim(k=r)), 2 * d),
        (dict(lowdim=LowDim(k=r), pos="none"), d + r),
    ]:
        c = dataclasses.replace(low, **options)
        assert decode.cache_numbers_per_token(c) == layers * wanted
    for options in FORMS:
        model = randomised(**options)
        held = decode.new_cache(model, 3).held
        numbers = sum(buffer.numel() for layer in held for buffer in layer.values())
        assert numbers == 3 * 24 * decode.cache_numbers_per_token(model.config)


@pytest.mark.parametrize("lowdim", RANKS, ids=str)
def test_rope_dim_is_its_formula(lowdim: LowDim) -> None:
    """Written out for one head at a time in float64: D unrotated and R rotated channels, the rotated key shared."""
    torch.manual_seed(0)
    model = randomised(n_kv_head=2, rope_dim=6, lowdim=lowdim).double()
    attn, rotation, x = model.transformer.h[0].attn, model.rope[:, :7], torch.randn(1, 7, 32, dtype=torch.float64)
    q, k, v, qr, kr = (getattr(attn, name)(x)[0] for name in ("q", "k", "v", "qr", "kr"))
    turn = torch.view_as_complex(rotation.movedim(0, -1).contiguous()).to(torch.complex128)  # (T, 3)

    def turned(y: torch.Tensor) -> torch.Tensor:
        y = torch.complex(*y.chunk(2, dim=-1)) * turn
        return torch.cat([y.real, y.imag], dim=-1)

    heads = []
    for h in range(4):
        own, shared = slice(8 * h, 8 * h + 8), slice(8 * (h // 2), 8 * (h // 2) + 8)
        scores = q[:, own] @ k[:, shared].T + turned(qr[:, 6 * h : 6 * h + 6]) @ turned(kr).T
        scores = (scores / (8 + 6) ** 0.5).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ v[:, shared])
    y = attn.o(torch.cat(heads, dim=-1))
    torch.testing.assert_close(attn(x, rotation, None)[0], y, atol=1e-10, rtol=0)


def test_rope_dim_is_counted_trained_and_checked() -> None:
    model = GPT(GPTConfig(**SMALL, rope_dim=6, lowdim=LowDim(q=4, k=4, v=4, o=4)))
    plain = GPT(dataclasses.replace(model.config, rope_dim=None))
    extra = 32 * (4 * 6 + 6)  # C (H R + R)
    assert model.n_params() - plain.n_params() == 2 * extra
    assert model.flops_per_token() - plain.flops_per_token() == 2 * (2 * extra + 24 * 4 * 6)
    assert model.transformer.h[1].attn.qr.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert "\nqr             32      24   dense" in table(model)
    model(tokens(2, 24), tokens(2, 24)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    for options, message in [
        (dict(rope_dim=6, pos="none"), "rope_dim is 6, wanted None for pos = 'none'"),
        (dict(rope_dim=5), "rope_dim is 5, wanted an even number from 2"),
        (dict(rope_dim=0), "rope_dim is 0, wanted an even number from 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            GPTConfig(**SMALL, **options)
