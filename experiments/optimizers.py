"""Which optimizer, and which rule for the factors A and B, learns a small LPA model fastest? On real text.

    python -m experiments.optimizers --steps=500 --seeds=2

Every arm is the same model on the same batches, at each of its learning rates with seed 1, then at the best of them
with the other seeds. A finished run is a line of out/optimizers/runs.jsonl, so the command may be stopped and run
again. The table goes to results/optimizers.md. What wins is in optim.py; the other rules live here only.
Shapes: N matrices of one shape, H heads, D head width, R rank.
"""

import dataclasses
import datetime
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lpa.guard import Guard
from torch import Tensor, nn

import data
import train
from config import TrainConfig, load_config, parse, user_errors
from lpa import hardware, optim
from lpa.distributed import World
from model import GPT, LowRank


@dataclass(frozen=True)
class Arm:
    """What differs from the optimizer of the same name in optim.py."""

    optimizer: str
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    """Factors of the learning rate, by group: A, B."""
    rule: str = "plain"
    """plain, 'heads', 'spectron' or 'product decay': see FactorMuon and decay_products."""
    low_rank: bool = True


ARMS = {
    "adamw, dense twin": Arm("adamw", low_rank=False),
    "adamw": Arm("adamw"),
    "adamw, A x 1/2, B x C/2R (muP)": Arm("adamw", rates=dict(A=0.5, B=2.0)),
    "adamw, B x 2": Arm("adamw", rates=dict(B=2.0)),
    "adamw, decay of the product": Arm("adamw", rule="product decay"),
    "muon, dense twin": Arm("muon", low_rank=False),
    "muon": Arm("muon"),
    "muon, A and B x 1/2": Arm("muon", rates=dict(A=0.5, B=0.5)),
    "muon, A and B x 2": Arm("muon", rates=dict(A=2.0, B=2.0)),
    "muon, B of q, k, v per head": Arm("muon", rule="heads"),
    "muon, Spectron's bound": Arm("muon", rates=dict(A=3.0, B=3.0), rule="spectron"),
    "muon, decay of the product": Arm("muon", rule="product decay"),
}


@dataclass(frozen=True)
class Options:
    preset: str = "config/lpa_cpu.py"
    dataset: str | None = None
    """A corpus in place of the preset's own."""
    steps: int = 500
    seeds: int = 2
    adamw_rates: tuple[float, ...] = (7e-4, 1.4e-3)
    muon_rates: tuple[float, ...] = (2.5e-3, 5e-3)
    eval_tokens: int = 200_000


def main(o: Options) -> None:
    torch.set_flush_denormal(True)  # a rate too high leaves activations that a CPU takes a hundred times as long for
    done = Path("out/optimizers/runs.jsonl")
    done.parent.mkdir(parents=True, exist_ok=True)
    table = {}
    for name, arm in ARMS.items():
        tried = {rate: run(o, name, arm, rate, 1, done) for rate in getattr(o, f"{arm.optimizer}_rates")}
        best = min(tried, key=lambda rate: tried[rate]["bits_per_byte"])
        runs = [tried[best], *(run(o, name, arm, best, seed, done) for seed in range(2, o.seeds + 1))]
        table[name] = (best, runs)
    write(o, table)


def run(o: Options, name: str, arm: Arm, rate: float, seed: int, done: Path) -> dict:
    """The result of one training run, made now unless a line of `done` has it."""
    c = config(o, arm, rate, seed)
    key = dict(arm=name, rule=dataclasses.asdict(arm), options=dataclasses.asdict(c))
    for line in done.read_text().splitlines() if done.exists() else []:
        record = json.loads(line)
        if record["key"] == json.loads(json.dumps(key)):
            return record
    record = dict(key=key, **trained(c, arm))
    with open(done, "a") as file:
        file.write(json.dumps(record) + "\n")
    print(f"{name}, rate {rate:g}, seed {seed}: {record['bits_per_byte']:.4f} bits per byte", flush=True)
    return record


def config(o: Options, arm: Arm, rate: float, seed: int) -> TrainConfig:
    """A tenth of warm-up, constant, then linear to zero over the last half: it suits short runs of either optimizer."""
    flags = [f"--max_steps={o.steps}", f"--seed={seed}", f"--learning_rate={rate}", f"--optimizer={arm.optimizer}"]
    flags += ["--schedule=wsd", "--decay_share=0.5", "--min_lr=0", "--weight_decay=0.1"]
    flags += [f"--warmup_steps={o.steps // 10}", f"--eval_tokens={o.eval_tokens}"]
    flags += [f"--lowdim.{name}=0" for name in "qkvo" if not arm.low_rank]
    return load_config([o.preset, *flags, *([f"--dataset={o.dataset}"] if o.dataset else [])])


def trained(c: TrainConfig, arm: Arm) -> dict:
    """train.py's steps with the arm's optimizers -> bits per byte at the end, and seconds of training."""
    world = World(0, 1, hardware.choose_device(c.device))
    c = dataclasses.replace(c, dtype=hardware.choose_dtype(c.dtype, world.device))
    train_data, val_data = data.open_corpus(c.dataset, "train"), data.open_corpus(c.dataset, "val")
    c, micro_steps = train.share_step(train.with_vocabulary(c, train_data, val_data), world)
    model = GPT(c.gpt, c.seed).to(world.device)
    optimizers = make_optimizers(model, c, arm)
    scaler, guard = torch.amp.GradScaler(world.device.type, enabled=False), Guard(world.device)
    start = time.perf_counter()
    for step in range(c.max_steps):
        rate = optim.set_learning_rate(optimizers, step, c)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate * arm.rates.get(group["name"], 1.0)
        batches = train.micro_batches(train_data, c, step, micro_steps, world)
        train.train_step(model, batches, micro_steps, optimizers, scaler, guard, c, world)
        if arm.rule == "product decay":
            decay_products(model, rate * c.weight_decay)
    seconds = time.perf_counter() - start
    windows = data.eval_windows(val_data, c.gpt.block_size, c.eval_tokens)
    loss = train.evaluate(model, val_data, windows, c, world)
    return dict(bits_per_byte=loss * val_data.tokens / val_data.bytes / math.log(2), seconds=seconds)


def make_optimizers(model: GPT, c: TrainConfig, arm: Arm) -> list[torch.optim.Optimizer]:
    """Those of optim.py, whose group of factors is taken apart into A and B, by the arm's rule."""
    optimizers = optim.make_optimizers(model, c)
    last: Any = optimizers[-1]  # holds the factors
    b = {layer.B for layer in model.modules() if isinstance(layer, LowRank)}
    groups = []
    for group in last.param_groups:
        if arm.rule == "product decay" and group["name"] == "factors":
            group["weight_decay"] = 0.0
        parts = dict(A=[p for p in group["params"] if p not in b], B=[p for p in group["params"] if p in b])
        for name, params in parts.items():
            if params:
                of_factors = group["name"] == "factors"
                groups.append(group | dict(name=name if of_factors else group["name"], params=params))
    if arm.rule in ("heads", "spectron"):
        optimizers[-1] = FactorMuon(groups, c.learning_rate, last.bfloat16, model, arm.rule)
    elif c.optimizer == "muon":
        optimizers[-1] = optim.Muon(groups, c.learning_rate, bfloat16=last.bfloat16)
    else:
        optimizers[-1] = torch.optim.AdamW(groups, c.learning_rate, fused=True)
    return optimizers


class FactorMuon(optim.Muon):
    """Muon with another direction for factors.

    heads: B of q, k and v is H matrices (D, R), each made orthogonal by itself (GLM-5's Muon Split).
    spectron: the step of either factor times 1 / (s_A + s_B + 1), s their largest singular values, which bounds what
    one step can change of the product B A (Spectron).
    """

    def __init__(self, groups: list[dict], lr: float, bfloat16: bool, model: GPT, rule: str) -> None:
        super().__init__(groups, lr, bfloat16=bfloat16)
        self.rule, self.head_dim = rule, model.config.head_dim
        self.split = {getattr(block.attn, n).B for block in model.transformer.h for n in "qkv"}
        layers = [layer for layer in model.modules() if isinstance(layer, LowRank)]
        self.partner = {p: other for m in layers for p, other in ((m.A, m.B), (m.B, m.A))}

    def direction(self, momentum: Tensor, params: list[nn.Parameter]) -> Tensor:
        if self.rule == "spectron":
            update = super().direction(momentum, params)
            for i, p in enumerate(params):
                if p in self.partner:
                    update[i] /= torch.linalg.matrix_norm(p, 2) + torch.linalg.matrix_norm(self.partner[p], 2) + 1
            return update
        mine = [i for i, p in enumerate(params) if p in self.split]
        if not mine:
            return super().direction(momentum, params)
        update = torch.empty_like(momentum)
        if rest := [i for i in range(len(params)) if i not in mine]:
            update[rest] = optim.orthogonal(momentum[rest], self.bfloat16)
        heads = momentum[mine].unflatten(1, (-1, self.head_dim))  # (N, H, D, R)
        update[mine] = optim.orthogonal(heads.flatten(0, 1), self.bfloat16).view_as(heads).flatten(1, 2)
        update[mine] *= (max(heads.shape[-2:]) / max(momentum.shape[-2:])) ** 0.5  # step_batch scales for the whole
        return update


@torch.no_grad()
def decay_products(model: GPT, amount: float) -> None:
    """A step down the gradient of amount/2 ||B A||^2 (Frobenius decay, Khodak et al., arXiv 2105.01029)."""
    for layer in (m for m in model.modules() if isinstance(m, LowRank)):
        a, b = layer.A.clone(), layer.B.clone()
        layer.A.sub_(amount * (b.T @ b) @ a)
        layer.B.sub_(amount * b @ (a @ a.T))


def write(o: Options, table: dict[str, tuple[float, list[dict]]]) -> None:
    on = hardware.describe(hardware.choose_device())
    lines = [
        "# Optimizers and rules for the factors\n",
        f"{o.preset}, {o.steps} steps, {o.seeds} seeds, {o.eval_tokens:,} validation tokens, {datetime.date.today()},",
        f"torch {torch.__version__}, {on}. Rates tried with seed 1: {o.adamw_rates} (AdamW), {o.muon_rates} (Muon).",
        f"Command: `python -m experiments.optimizers {' '.join(sys.argv[1:])}`\n",
        "| arm | rate | val bits per byte, mean | standard deviation | over its plain form |",
        "|---|---|---|---|---|",
    ]
    for name, (rate, runs) in table.items():
        values = [record["bits_per_byte"] for record in runs]
        plain = statistics.mean(record["bits_per_byte"] for record in table[ARMS[name].optimizer][1])
        spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "–"
        mean = statistics.mean(values)
        lines.append(f"| {name} | {rate:g} | {mean:.4f} | {spread} | {mean - plain:+.4f} |")
    text = "\n".join(lines) + "\n"
    Path("results").mkdir(exist_ok=True)
    Path("results/optimizers.md").write_text(text)
    print(text)


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
