"""Plan and train the runs for a scaling law: sizes and lengths that fill the given hours of this machine.

Each preset is a family. Its model is made at each width with everything else in proportion, and trained for
lengths that double, each with its own schedule. See experiments/scaling/law.py.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import bench
import data
from config import TrainConfig, UserError, as_arguments, load_config
from experiments import sweep
from lpa import hardware
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
    out_dir: Path = Path("out/scaling")

    def __post_init__(self) -> None:
        if len(self.widths) < 3 or self.lengths < 3:
            raise ValueError(f"widths are {self.widths} and lengths {self.lengths}, wanted 3 or more of each")
        if not 1 <= len(self.presets) <= 2:
            raise ValueError(f"presets are {self.presets}, wanted one or two")
        for name in ("hours", "eval_tokens"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted above 0")


def train(g: Grid) -> list[Path]:
    """Train what is missing of the plan. Return the folder of each family. Raise UserError when stopped."""
    lengths = planned_lengths(g)
    print(f"{g.hours:g} hours for widths {g.widths} of {' and '.join(g.presets)}, in {lengths} steps")
    # All sizes of the shortest length first: a plan that is stopped leaves a smaller grid.
    runs = [run for steps in lengths for run in make_runs(g, steps)]
    if failed := sweep.train_all(runs, sweep.SweepConfig()):
        raise UserError("; ".join(failed))
    return [g.out_dir / Path(preset).stem for preset in g.presets]


def make_runs(g: Grid, steps: int) -> list[sweep.Run]:
    """Return the run of each size with this many steps."""
    return [make_run(g, preset, width, steps) for preset in g.presets for width in g.widths]


def make_run(g: Grid, preset: str, width: int, steps: int) -> sweep.Run:
    """Return the run of a preset at another width, with everything else in proportion."""
    c = load_config([preset])
    share = width / c.gpt.n_embd
    heads = next(n for n in range(c.gpt.n_head, 0, -1) if width % (2 * n) == 0)
    ranks = {}
    for name, rank in vars(c.gpt.lowdim).items():
        if isinstance(rank, str):
            raise UserError(f"{preset} has lowdim.{name}={rank}, wanted a number, which can follow the width")
        if rank:
            ranks[name] = max(1, round(share * rank))
    settings: dict[str, Any] = dict(n_embd=width, n_head=heads, lowdim=ranks)
    for name in ("attn_dim", "ffn_dim"):
        settings[name] = round(share * getattr(c.gpt, name) / heads) * heads
    settings |= dict(learning_rate=c.learning_rate / share, min_lr=c.min_lr / share)
    settings |= dict(dataset=g.dataset or c.dataset, eval_tokens=g.eval_tokens, eval_interval=0)
    settings |= dict(max_steps=steps, warmup_steps=min(c.warmup_steps, steps // 10))
    settings |= dict(save_interval=max(1, steps // 4))
    arguments = [preset, *as_arguments(settings)]
    return sweep.make_run(f"width {width} steps {steps}", arguments, g.out_dir / Path(preset).stem)


def planned_lengths(g: Grid) -> list[int]:
    """Return the steps of each length: from the plan in out_dir, or such that all runs take the hours.

    A file keeps them: timings differ from start to start, and the same command must continue the same runs.
    """
    path = g.out_dir / "plan.json"
    asked = json.loads(json.dumps(dataclasses.asdict(g), default=str))
    if path.exists():
        plan = json.loads(path.read_text())
        if plan["asked"] != asked:
            raise UserError(f"{path} has other options: give another --out_dir, or move it away")
        return plan["steps"]
    configs = [run.config for run in make_runs(g, FEWEST_STEPS)]
    all_per_step = {c.tokens_per_step or c.batch_size * c.gpt.block_size for c in configs}
    if len(all_per_step) > 1:
        raise UserError(f"the presets have steps of {all_per_step} tokens, wanted the same in all")
    per_step = all_per_step.pop()
    unique = data.open_corpus(configs[0].dataset, "train").tokens
    seconds = sum(seconds_per_token(c) for c in configs)  # for a token of every size
    # A forward pass is a third of a step.
    fixed = g.lengths * (seconds * g.eval_tokens / 3 + START_SECONDS * len(configs))
    seconds *= 2 - 2 ** (1 - g.lengths)  # lengths of 1 + 1/2 + 1/4 + ...
    fewest = FEWEST_STEPS * per_step * 2 ** (g.lengths - 1)
    longest = min(int((3600 * g.hours - fixed) / seconds), unique)
    if longest < fewest:
        hours = math.ceil((fewest * seconds + fixed) / 36) / 100
        found = f"hours is {g.hours:g} and the corpus has {unique:,} tokens"
        raise UserError(f"{found}, wanted {hours:g} and {fewest:,}: {FEWEST_STEPS} steps are the fewest")
    steps = [longest // per_step // 2**i for i in reversed(range(g.lengths))]
    g.out_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(asked=asked, steps=steps), indent=1))
    return steps


def seconds_per_token(c: TrainConfig) -> float:
    """Return the time of the fastest training step within a second, on random tokens, for each of them."""
    device = hardware.choose_device(c.device)
    c = dataclasses.replace(c, dtype=hardware.choose_dtype(c.dtype, device))
    with device:
        model = GPT(c.gpt, c.seed)
        x = torch.randint(len(model.lm_head.weight), (c.batch_size, c.gpt.block_size))  # (B, T)
    return hardware.fastest(bench.training(model, x, x, c, device), device, seconds=1.0) / x.numel()
