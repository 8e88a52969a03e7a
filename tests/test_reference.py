"""The model draws the weights, and computes the loss and gradients, that it did at commit f374173.

SUMS was printed there by `python -m tests.test_reference`. The sums are taken in float64; they agree between processors
to about 1e-7, as the QR decompositions that draw factors run in float32.
"""

import pytest
import torch

from model import GPT, GPTConfig, LowDim

R = dict(q=8, k=8, v=16, o=8)  # ranks of a small LPA
CASES = {
    "dense": dict(),
    "lpa": dict(lowdim=R),
    "matched": dict(lowdim=R, factor_init="matched", seed=2),
    "torch": dict(lowdim=R, factor_init="torch", seed=3),
    "everywhere": dict(lowdim=R | dict(gate=8, up=8, down=8), zero_init=True),
    "gqa": dict(lowdim=R, n_kv_head=2, attn_dim=48),
    "rope_dim": dict(lowdim=R, rope_dim=4, n_kv_head=2),
    "qk_norm": dict(lowdim=R, qk_norm=True, tie_embeddings=True),
    "post": dict(lowdim=R, norm="layernorm", norm_order="post", mlp="relu", pos="learned", bias=True, head_bias=True),
    "gpt2": dict(norm="layernorm", mlp="gelu", pos="learned", bias=True, tie_embeddings=True, zero_init=True),
    "relu2": dict(lowdim=R, mlp="relu2", pos="none", bias=True, ffn_dim=96),
    "blocks": dict(lowdim=dict(gate="blockdense:16:4", up="blockdense:8:2", down="blockshuffle:4"), bias=True),
    "first_dense": dict(lowdim=R | dict(q="blockshuffle:4", up=8), first_ffn_dense=True, seed=4),
}
SUMS = {
    "dense": (2.582339214, 4.305670866, 16.652821541),
    "lpa": (2.979791189, 4.298575956, 10.531475848),
    "matched": (7.420352305, 4.279645450, 9.579261512),
    "torch": (-3.778404136, 4.235863687, 7.315407373),
    "everywhere": (-9.660236168, 4.302689483, -3.029771303),
    "gqa": (1.711077591, 4.292879952, -2.392886767),
    "rope_dim": (1.914614190, 4.328631361, 6.830099661),
    "qk_norm": (3.195036072, 4.302153357, 1.424373641),
    "post": (6.563174965, 4.520912493, -23.176848640),
    "gpt2": (1.435117243, 4.242314512, -0.374028846),
    "relu2": (1.138539151, 4.259435705, 3.733081070),
    "blocks": (2.493824287, 4.219024110, -1.222997151),
    "first_dense": (-2.574497371, 4.257270778, 7.009753440),
}


def make(options: dict) -> GPT:
    options = dict(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=64) | options
    lowdim, seed = LowDim(**options.pop("lowdim", {})), options.pop("seed", 1)
    return GPT(GPTConfig(lowdim=lowdim, **options), seed)


def weigh(tensors: list[torch.Tensor]) -> float:
    """Return a sum that changes when a number changes, moves, or goes to another tensor."""
    flat = torch.cat([t.detach().flatten() for t in tensors]).double()
    return (flat * torch.arange(len(flat)).double().cos()).sum().item()


def sums(options: dict) -> tuple[float, float, float]:
    """Return sums of the parameters and of their gradients, and the loss between them."""
    model = make(options)
    parameters = list(model.parameters())
    drawn = weigh(parameters)
    model.double()
    # A model that starts at zero has gradients that say little, so every parameter is moved.
    with torch.no_grad():
        for p in parameters:
            p += 0.02 * torch.arange(p.numel()).double().sin().view_as(p)
    idx = torch.arange(2 * 17).view(2, 17) * 7 % 61
    loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    return drawn, loss.item(), weigh([p.grad for p in parameters])


@pytest.mark.parametrize("name", CASES)
def test_weights_loss_and_gradients_are_as_before(name: str) -> None:
    drawn, loss, gradients = sums(CASES[name])
    assert drawn == pytest.approx(SUMS[name][0], abs=1e-4)
    assert loss == pytest.approx(SUMS[name][1], rel=1e-6)
    assert gradients == pytest.approx(SUMS[name][2], rel=1e-5, abs=1e-5)


if __name__ == "__main__":
    for name, options in CASES.items():
        print(f'    "{name}": ({", ".join(f"{number:.9f}" for number in sums(options))}),')
