"""Train a model whose factored layers are guided by dense matrices at first (arXiv 2406.16450).

    python -m experiments.structured.train experiments/structured/config/structured_small.py --lowdim.up=128
    python -m experiments.structured.train config/lpa_cpu.py --self_guided=flops

The guided phase comes first. Its end is saved without the guides, and train.py's own loop continues from there. You can
stop and resume a run in either phase. Checkpoints of the second phase are like those of any other run.
"""

import json
import sys
import time
from dataclasses import dataclass, replace
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
    """Share of the steps in which a dense matrix guides each factored layer, with falling weight. flops: the share that
    gives the run the training FLOPs of its dense twin. It then adds as many steps, which read the same tokens again."""

    def __post_init__(self) -> None:
        if self.self_guided != "flops" and not 0 < self.self_guided <= 1:
            raise ValueError(f"self_guided is {self.self_guided}, wanted a share above 0, at most 1, or flops")
        if not any(vars(self.train.gpt.lowdim).values()):
            raise ValueError("lowdim leaves every matrix dense, wanted factored ones to guide")


def main(o: Options) -> None:
    info = distributed.init_distributed(o.train.device, o.train.hang_timeout)
    with distributed.hang_report(info, o.train.hang_timeout):
        info.run_on_rank_0(lambda: train.prepare_missing(o.train.dataset))  # plan needs its vocabulary
        train_in_phases(*plan(o), info)
        info.close()


def plan(o: Options) -> tuple[TrainConfig, int, int]:
    """Return the options, with all steps in max_steps, the number of guided steps, and the steps that read new data."""
    c, ratio, new_steps = o.train, o.self_guided, o.train.max_steps
    if ratio == "flops":
        gpt = train.with_vocabulary(c, data.open_corpus(c.dataset, "train")).gpt
        with torch.device("meta"):
            model, dense = GPT(gpt), GPT(replace(gpt, lowdim=LowDim()))
        ratio = guides.fixed_flop_ratio(model, dense.flops_per_token(), model.flops_per_token())
    guided_steps = round(ratio * new_steps)
    if not 0 < guided_steps <= new_steps:
        raise UserError(f"self_guided is {o.self_guided}: {guided_steps} steps, wanted 1 to max_steps = {new_steps}")
    if o.self_guided == "flops":
        c = replace(c, max_steps=new_steps + guided_steps, warmup_steps=round((1 + ratio) * c.warmup_steps))
    return c, guided_steps, new_steps


def train_in_phases(c: TrainConfig, guided_steps: int, new_steps: int, info: DistInfo) -> None:
    run, started = Path(c.out_dir), time.monotonic()
    note = json.dumps(dict(guided_steps=guided_steps, new_steps=new_steps))

    def guided_model(gpt: GPTConfig, seed: int | None) -> GPT:
        if info.rank == 0:
            checkpoint.write_whole(run / "guided.json", note)  # only now does the run's folder exist
        model = GPT(gpt, seed)
        if seed is not None and c.init_from is not None:  # before the guides, which start as B A
            tokenizer = data.open_corpus(c.dataset, "train").meta["tokenizer"]
            energy = init_from.start_from(Path(c.init_from), model, tokenizer)
            if info.rank == 0:
                print(f"weights of {c.init_from}; {init_from.energy_table(energy)}")
        guides.add_guides(model)
        return model

    def set_guides(model: GPT, step: int) -> int:
        guides.set_guides(model, step, guided_steps, c.seed)
        return step

    done = info.run_on_rank_0(lambda: c.resume != "never" and saved_step(run, note) >= guided_steps)
    if not done:
        if info.rank == 0:
            print(f"self-guided: {guided_steps:,} of {c.max_steps:,} steps; the table counts the guides too")
        guided = replace(c, stop_step=min(guided_steps, c.stop_step or guided_steps), init_from=None)
        train.pretrain(guided, info, guided_model, set_guides)
        stopped = run / "stopped.json"  # a signal may arrive in the last of these steps
        done = info.run_on_rank_0(lambda: not stopped.exists() and saved_step(run, note) >= guided_steps)
    if done:
        info.run_on_rank_0(lambda: drop_saved_guides(run))
        if c.stop_step is None or c.stop_step > guided_steps:
            left = c.max_hours and max(1e-6, c.max_hours - (time.monotonic() - started) / 3600)
            # Steps after new_steps read the tokens of the guided phase again.
            plain = replace(c, resume="must", max_hours=left)
            train.pretrain(plain, info, before_step=lambda _, step: step % new_steps)


def saved_step(run: Path, note: str) -> int:
    """Return the step of the newest checkpoint, or -1. Raise UserError if the run has another plan."""
    path = run / "guided.json"
    if path.exists() and path.read_text() != note:
        raise UserError(f"{run} was begun with {path.read_text()}, wanted {note}: give it another out_dir")
    return checkpoint.newest(run)[1].get("step", -1)


def drop_saved_guides(run: Path) -> None:
    """Save the best checkpoint and the end of the guided phase again, without the guides."""
    best = run / "ckpt" / "best"
    for place in [best, run] if best.exists() else [run]:  # in this order, so that `last` names the newest
        folder, manifest = checkpoint.find(place)
        if any(".guide" in name for name in checkpoint.saved_index(folder)):
            tensors = checkpoint.load_tensors(folder, "model"), checkpoint.load_tensors(folder, "optimizer")
            kept = {f"model.{name}": tensor for name, tensor in tensors[0].items() if ".guide" not in name}
            kept |= {f"optimizer.{name}": tensor for name, tensor in tensors[1].items() if ".guide" not in name}
            checkpoint.save(run, kept, manifest, load_tokenizer(folder, manifest["tokenizer"]))


if __name__ == "__main__":
    with user_errors():
        main(load_config(sys.argv[1:], Options, __doc__))
