"""Train a model with structured layers that dense matrices guide at first (arXiv 2406.16450).

    python -m experiments.structured.train experiments/structured/config/structured_small.py --lowdim.up=128
    python -m experiments.structured.train config/lpa_cpu.py --self_guided=flops

The guided phase comes first; its end is saved without the guides, and train.py's own loop continues from there. So a
run may be stopped and resumed in either phase, and its checkpoints after the first are those of any other run.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

import data
import train
from config import TrainConfig, UserError, load_config, user_errors
from data.tokenizers import load_tokenizer
from experiments.structured import guides
from lpa import checkpoint, distributed, init_from
from lpa.distributed import DistInfo
from model import GPT, GPTConfig, LowDim


@dataclass(frozen=True)
class Options:
    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    self_guided: float | Literal["flops"] = 0.5
    """Share of the steps in which a dense matrix beside each factored layer guides it, with falling weight. flops: as
    many as bring the run to the training FLOPs of the dense twin, and as many steps more, which see the tokens of the
    guided ones again."""

    def __post_init__(self) -> None:
        if self.self_guided != "flops" and not 0 < self.self_guided <= 1:
            raise ValueError(f"self_guided is {self.self_guided}, wanted a share above 0, at most 1, or flops")
        if not any(vars(self.train.gpt.lowdim).values()):
            raise ValueError("lowdim leaves every matrix dense, wanted factored ones to guide")


def main(o: Options) -> None:
    info = distributed.init_distributed(o.train.device, o.train.hang_timeout)
    with distributed.hang_report(info, o.train.hang_timeout):
        info.run_on_rank_0(lambda: train.prepare_missing(o.train.dataset))  # its vocabulary counts
        train_in_phases(*plan(o), info)
        info.close()


def train_in_phases(c: TrainConfig, guided_steps: int, new_steps: int, info: DistInfo) -> None:
    run, started = Path(c.out_dir), time.monotonic()
    note = json.dumps(dict(guided_steps=guided_steps, new_steps=new_steps))
    done = info.run_on_rank_0(lambda: c.resume != "never" and saved_step(run, note) >= guided_steps)
    if not done:
        if info.rank == 0:
            print(f"self-guided: {guided_steps:,} of {c.max_steps:,} steps, which this table shows with their guides")
        guided = replace(c, stop_step=min(guided_steps, c.stop_step or guided_steps), init_from=None)
        train.pretrain(guided, info, partial(guided_model, c, note, info.rank), before_step(c, guided_steps))
        stopped = run / "stopped.json"  # a signal may come in the very last of these steps
        done = info.run_on_rank_0(lambda: not stopped.exists() and saved_step(run, note) >= guided_steps)
    if done:
        info.run_on_rank_0(lambda: drop_saved_guides(run))
        if c.stop_step is None or c.stop_step > guided_steps:
            left = c.max_hours and max(1e-6, c.max_hours - (time.monotonic() - started) / 3600)
            plain = replace(c, resume="must", max_hours=left)
            # Where there are more steps than new_steps, the last ones read the tokens of the guided ones again.
            train.pretrain(plain, info, before_step=lambda _, step: step % new_steps)


def plan(o: Options) -> tuple[TrainConfig, int, int]:
    """Return the options, of more steps with self_guided = 'flops', the guided steps, and the steps over new data."""
    c, ratio, new_steps = o.train, o.self_guided, o.train.max_steps
    if ratio == "flops":
        gpt = train.with_vocabulary(c, data.open_corpus(c.dataset, "train")).gpt
        with torch.device("meta"):
            low, dense = GPT(gpt), GPT(replace(gpt, lowdim=LowDim()))
        ratio = guides.fixed_flop_ratio(dense.flops_per_token(), low.flops_per_token(), guides.guide_flops(low))
        if not 0 < ratio <= 1:
            raise UserError(f"self_guided is flops, but would be {ratio:.2f} of the steps, wanted above 0, at most 1")
    guided_steps = round(ratio * new_steps)
    if not guided_steps:
        raise UserError(f"self_guided is {o.self_guided} of {new_steps} steps, less than one: wanted more of either")
    if o.self_guided == "flops":
        c = replace(c, max_steps=new_steps + guided_steps, warmup_steps=round((1 + ratio) * c.warmup_steps))
    return c, guided_steps, new_steps


def guided_model(c: TrainConfig, note: str, rank: int, gpt: GPTConfig, seed: int | None) -> GPT:
    """Make a model with guides, new or to be filled. Note the plan in the run's folder, which exists by now."""
    if rank == 0:
        checkpoint.write_whole(Path(c.out_dir) / "guided.json", note)
    model = GPT(gpt, seed)
    if seed is not None and c.init_from is not None:  # before the guides, which start as the products of the factors
        tokenizer = data.open_corpus(c.dataset, "train").meta["tokenizer"]
        energy = init_from.start_from(Path(c.init_from), model, tokenizer)
        if rank == 0:
            print(f"weights of {c.init_from}; {init_from.energy_table(energy)}")
    guides.add_guides(model)
    return model


def before_step(c: TrainConfig, guided_steps: int) -> Callable[[GPT, int], int]:
    def set_guides(model: GPT, step: int) -> int:
        guides.set_guides(model, step, guided_steps, c.seed)
        return step

    return set_guides


def saved_step(run: Path, note: str) -> int:
    """Return the step of the newest checkpoint, -1 without one. Raise UserError where the run has another plan."""
    path = run / "guided.json"
    if path.exists() and path.read_text() != note:
        raise UserError(f"{run} was begun with {path.read_text()}, wanted {note}: give it another out_dir")
    return checkpoint.newest(run)[1].get("step", -1)


def drop_saved_guides(run: Path) -> None:
    """Save the end of the guided phase again without the guides, and before it the best checkpoint, if another is."""
    best = run / "ckpt" / "best"
    for place in [best, run] if best.exists() else [run]:  # in this order, as `last` then points to the newest
        folder, manifest = checkpoint.find(place)
        if any(guides.is_guide(name) for name in checkpoint.saved_index(folder)):
            tensors = {
                f"{part}.{name}": tensor
                for part in ("model", "optimizer")
                for name, tensor in checkpoint.load_tensors(folder, part).items()
                if not guides.is_guide(name)
            }
            tokenizer = load_tokenizer(folder, manifest["tokenizer"])
            state = {name: value for name, value in manifest.items() if name not in ("files", "sha256", "tokenizer")}
            checkpoint.save(run, tensors, state, tokenizer)


if __name__ == "__main__":
    with user_errors():
        main(load_config(sys.argv[1:], Options, __doc__))
