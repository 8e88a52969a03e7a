"""Plan and train the runs for a scaling law: sizes and lengths that fill the given hours of this machine.

Each preset is a family. Its model is made at each width, everything else in proportion, and trained for lengths that
double, each under a schedule of its own. See experiments/scaling/law.py.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import data
import train as trainer
from config import TrainConfig, UserError, as_arguments, load_config
from experiments import sweep
from lpa import hardware, optim
from lpa.distributed import DistInfo
from lpa.nonfinite import NonFiniteCheck
from model import GPT

START_SECONDS = 10  # of a process, until it trains
FEWEST_STEPS = 50


@dataclass(frozen=True)
class Grid:
    presets: tuple[str, ...] = ("config/setting2_cpu_dense.py", "config/setting2_cpu.py")
    """One family each; the second is compared with the first."""
    widths: tuple[int, ...] = (48, 72, 112, 160)
    """n_embd of the models; ranks and the like in proportion, the learning rate as 1 / width."""
    lengths: int = 4
    """Training lengths, each twice the one before."""
    hours: float = 6.0
    """For all runs together."""
    dataset: str | None = None
    """A corpus in place of the presets' own."""
    eval_tokens: int = 200_000
    """Validation tokens that give a run's loss."""
    jobs: int = 1
    """Run so many side by side, on one thread each."""
    dry_run: bool = False
    """Show the plan, and train nothing."""
    out_dir: Path = Path("out/scaling")

    def __post_init__(self) -> None:
        if len(self.widths) < 3 or self.lengths < 3:
            raise ValueError(f"widths are {self.widths} and lengths {self.lengths}, wanted 3 or more of each")
        if not 1 <= len(self.presets) <= 2:
            raise ValueError(f"presets are {self.presets}, wanted one or two")
        for name in ("hours", "eval_tokens", "jobs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted above 0")


def train(g: Grid) -> list[Path]:
    """Train what is missing of the plan. Return the folder of each family. Raise UserError when stopped."""
    sizes = [(preset, shaped(g, preset, width)) for preset in g.presets for width in g.widths]
    lengths = planned_lengths(g, sizes)
    # The shortest of all sizes first: a plan that is cut short leaves a smaller grid, not a size without runs.
    runs = [make_run(g, preset, settings, steps) for steps in lengths for preset, settings in sizes]
    for run in runs:
        c = run.config
        with torch.device("meta"):
            model = GPT(c.gpt)
        N, in_blocks = model.n_params(), model.n_params(embeddings=False)
        tokens = c.max_steps * (c.tokens_per_step or c.batch_size * c.gpt.block_size)
        print(f"{run.name}: {N:,} parameters, {in_blocks:,} in the blocks, {tokens:,} tokens")
    if not g.dry_run and (failed := sweep.train_all(runs, sweep.SweepConfig(jobs=g.jobs))):
        raise UserError("; ".join(failed))
    return [g.out_dir / Path(preset).stem for preset in g.presets]


def shaped(g: Grid, preset: str, width: int) -> dict[str, Any]:
    """Return what changes in a preset at another width."""
    c = load_config([preset])
    for name, rank in vars(c.gpt.lowdim).items():
        if isinstance(rank, str):
            raise UserError(f"{preset} has lowdim.{name}={rank}, wanted a number, which can follow the width")
    share = width / c.gpt.n_embd
    heads = next(n for n in range(c.gpt.n_head, 0, -1) if width % (2 * n) == 0)
    ranks = {name: max(1, round(share * rank)) for name, rank in dataclasses.asdict(c.gpt.lowdim).items() if rank}
    settings: dict[str, Any] = dict(n_embd=width, n_head=heads, lowdim=ranks)
    settings |= dict(learning_rate=c.learning_rate / share, min_lr=c.min_lr / share)
    settings |= dict(dataset=g.dataset or c.dataset, eval_tokens=g.eval_tokens, eval_interval=0)
    for name in ("attn_dim", "ffn_dim"):
        settings[name] = round(share * getattr(c.gpt, name) / heads) * heads
    return settings


def planned_lengths(g: Grid, sizes: list[tuple[str, dict[str, Any]]]) -> list[int]:
    """Return the steps of each length: as the plan in out_dir says, or so that all runs together take the hours.

    A file keeps them, since timings differ from start to start, and the same command must continue the same runs.
    """
    path = g.out_dir / "plan.json"
    asked = json.loads(json.dumps(dataclasses.asdict(g) | dict(jobs=None, dry_run=None), default=str))
    if path.exists():
        plan = json.loads(path.read_text())
        if plan["asked"] != asked:
            raise UserError(f"{path} has other options: give another --out_dir, or move it away")
        return plan["steps"]
    configs = [load_config([preset, *as_arguments(settings)]) for preset, settings in sizes]
    per_step = {c.tokens_per_step or c.batch_size * c.gpt.block_size for c in configs}
    if len(per_step) > 1:
        raise UserError(f"the presets have steps of {per_step} tokens, wanted the same in all")
    tokens, unique = per_step.pop(), data.open_corpus(configs[0].dataset, "train").tokens
    speeds = [seconds_per_step(c, g) for c in configs]
    evaluations = g.eval_tokens / tokens / 3 * sum(speeds)  # a forward pass is a third of a step
    beside = g.lengths * (evaluations + START_SECONDS * len(configs))
    per_longest = sum(speeds) * (2 - 2 ** (1 - g.lengths))  # lengths of 1 + 1/2 + 1/4 + ...
    longest, fewest = int((3600 * g.hours * g.jobs - beside) / per_longest), FEWEST_STEPS * 2 ** (g.lengths - 1)
    if unique < fewest * tokens:
        raise UserError(f"the corpus has {unique:,} tokens, wanted {fewest * tokens:,} for {g.lengths} lengths")
    if longest < fewest:
        hours = math.ceil((fewest * per_longest + beside) / 36 / g.jobs) / 100
        raise UserError(f"hours is {g.hours:g}, wanted {hours:g}: the shortest runs need {FEWEST_STEPS} steps")
    if longest * tokens > unique:
        print(f"the lengths end with the corpus, {unique:,} tokens seen once: {g.hours:g} hours are not needed")
        longest = unique // tokens
    steps = [longest // 2**i for i in reversed(range(g.lengths))]
    if not g.dry_run:
        g.out_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(asked=asked, steps=steps), indent=1))
    return steps


def seconds_per_step(c: TrainConfig, g: Grid) -> float:
    """Return the time of the fastest training step within a second, on random tokens."""
    info = DistInfo(0, 1, hardware.choose_device(c.device))
    torch.set_num_threads(1 if g.jobs > 1 else torch.get_num_threads())
    c = trainer.with_vocabulary(c, *(data.open_corpus(c.dataset, split) for split in ("train", "val")))
    c, micro_steps = trainer.share_step(c, info)
    c = dataclasses.replace(c, dtype=hardware.choose_dtype(c.dtype, info.device))
    model = GPT(c.gpt, c.seed).to(info.device)
    x = torch.randint(len(model.lm_head.weight), (c.batch_size, c.gpt.block_size), device=info.device)  # (B, T)
    optimizers, check = optim.make_optimizers(model, c), NonFiniteCheck(info.device)
    scaler = torch.amp.GradScaler(info.device.type, enabled=False)

    def step() -> None:
        trainer.train_step(model, iter([(x, x)] * micro_steps), micro_steps, optimizers, scaler, check, c, info)

    return hardware.fastest(step, info.device, seconds=1.0)


def make_run(g: Grid, preset: str, settings: dict[str, Any], steps: int) -> sweep.Run:
    warmup = min(load_config([preset]).warmup_steps, steps // 10)
    settings = settings | dict(max_steps=steps, warmup_steps=warmup, save_interval=max(1, steps // 4))
    name = f"width {settings['n_embd']} steps {steps}"
    return sweep.make_run(name, [preset, *as_arguments(settings)], g.out_dir / Path(preset).stem)
