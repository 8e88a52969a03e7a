"""Train the recurrent transformer, or its plain twin, on a corpus or a copy task with its curriculum.

    python -m experiments.recurrent.train experiments/recurrent/config/copy_small.py
    python -m experiments.recurrent.train experiments/recurrent/config/copy_small.py --max_steps=400 --resume
    torchrun --nproc_per_node=2 -m experiments.recurrent.train experiments/recurrent/config/copy_small.py --device=cpu

The loop is that of train.py and calls its functions. New here: the stage of the curriculum, which an evaluation decides
and a checkpoint holds; the accuracy, in each evaluation of a task; and alpha, which stays in [0, 1].
"""

import json
import math
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

import data
import train
from config import TrainConfig, UserError, as_arguments, as_command, load_config, user_errors
from data.tokenizers import load_tokenizer
from experiments.recurrent import tasks
from experiments.recurrent.model import RecurrentConfig, RecurrentGPT
from experiments.recurrent.tasks import Copying, CopyTask
from lpa import checkpoint, distributed, hardware, optim, run_folder
from lpa.distributed import DistInfo
from lpa.log import Log
from lpa.nonfinite import NonFiniteCheck
from model import GPT


@dataclass(frozen=True)
class Options:
    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """dataset may also be copy or selective_copy."""
    model: Literal["recurrent", "gpt"] = "recurrent"
    """gpt: the plain twin, which attends to the full text."""
    recurrent: RecurrentConfig = field(default_factory=RecurrentConfig)
    task: CopyTask = field(default_factory=CopyTask)

    def __post_init__(self) -> None:
        for name, none in dict(shard=False, init_from=None, sample_interval=0).items():
            if (given := getattr(self.train, name)) != none:
                raise ValueError(f"{name} is {given}, wanted {none}: train.py alone has it")
        # Selective recomputation fails under autocast: a block's second pass reuses the cast weights of its first.
        recompute = self.train.recompute
        if self.model == "recurrent" and recompute not in ("none", "block"):
            raise ValueError(f"recompute is {recompute}, wanted block or none for model = 'recurrent'")


def main(c: Options) -> None:
    info = distributed.init_distributed(c.train.device, c.train.hang_timeout)
    with distributed.hang_report(info, c.train.hang_timeout):
        pretrain(c, info)
        info.close()


def pretrain(o: Options, info: DistInfo) -> None:
    # --- Set-up: data, batch, folder -------------------------------------------------------------------------------
    c, run = o.train, Path(o.train.out_dir)
    hardware.keep_freed_memory(info.device)
    stop = distributed.StopSignal(info, c.max_hours)
    stage = tasks.first_stage(o.task) if c.dataset in tasks.TASKS else None
    info.run_on_rank_0(lambda: train.prepare_missing(c.dataset))
    train_data, val_data = open_data(o, stage)
    tokenizer = load_tokenizer(train_data.folder, train_data.meta["tokenizer"])
    c = train.with_vocabulary(c, train_data, val_data)
    own = dict(model=o.model, recurrent=asdict(o.recurrent), task=asdict(o.task))
    asked = [as_command(c), *as_arguments(own)]
    c, micro_steps = train.share_step(c, info)
    T, sequences = c.gpt.block_size, c.batch_size * info.world_size * micro_steps  # of a step

    # What must not change when a run resumes, beside the model's options
    order = dict(data=train_data.fingerprint, seed=c.seed, tokens_per_step=sequences * T, optimizer=c.optimizer)
    order |= dict(model=o.model) | own["recurrent"]
    folder, manifest = info.run_on_rank_0(lambda: run_folder.prepare(run, c, order))
    c = replace(c, dtype=train.choose_dtype(c, manifest, info))
    state: dict[str, Any] = dict(step=0, tokens=0, seconds=0.0, best_val_loss=None, wandb_id=None)
    state |= dict(stage=stage, nonfinite=None, scaler=None)
    state = {name: manifest.get(name, value) for name, value in state.items()}
    state |= dict(order=order, options=asdict(c) | own)
    info.run_on_rank_0(lambda: (run / "config.json").write_text(json.dumps(state["options"], indent=1)))

    # --- Model and optimizer: new, or as the checkpoint in `folder` has them ---------------------------------------
    seed = c.seed if folder is None else None
    with torch.device(info.device):
        model = RecurrentGPT(c.gpt, o.recurrent, seed) if o.model == "recurrent" else GPT(c.gpt, seed)
    wrapped = distributed.parallelize(model, c, info)
    optimizers = optim.make_optimizers(model, c)
    if folder is not None:
        checkpoint.restore(folder, model, optimizers)
    scaler = torch.amp.GradScaler(info.device.type, enabled=c.dtype == "float16")
    scaler.load_state_dict(state["scaler"] or scaler.state_dict())
    check = NonFiniteCheck(info.device, state["nonfinite"])
    saver = checkpoint.Saver(run, tokenizer, info, shard=False)

    last_step = c.max_steps if c.stop_step is None else min(c.max_steps, c.stop_step)
    log = Log(run, c, state, model, sequences * T, last_step, info, resumed=folder is not None)
    log.say(f"{optim.describe(optimizers)}\noptions: {' '.join(asked)}")
    log.say(f"a step: {sequences} sequences, of at most {T:,} tokens, of {c.dataset}")
    log.say(f"continuing from {folder}" if folder else f"writing to {run}")
    first_step, saved_step = state["step"], state["step"] if folder else None

    def save() -> int:
        state.update(seconds=log.seconds, wandb_id=log.wandb_id)
        state.update(nonfinite=check.state(), scaler=scaler.state_dict())
        saver.save(checkpoint.live_tensors(model, optimizers), state)
        log.start_clock(state["step"])
        return state["step"]

    # --- Loop ------------------------------------------------------------------------------------------------------
    while True:
        step, stage = state["step"], state["stage"]
        # Before the last step, an evaluation of a task decides the next stage. It is due until a saved state has that.
        deciding = stage is not None and step < last_step
        done = deciding and stage["decided"] == step
        if train.evaluation_due(step, last_step, c) and not done:
            val_data = open_data(o, stage)[1]
            val_loss = evaluate(model, val_data, c, info, stop)
            comparable = step == last_step or stage is None  # each stage has losses of its own
            if comparable and val_loss < (state["best_val_loss"] or math.inf):
                saved_step = saved_step if saved_step == step else save()
                state["best_val_loss"] = val_loss
                saver.mark_best(step, val_loss)
            if not stop.agreed:  # else a signal cut it short
                report: dict[str, Any] = {}
                if stage is not None:
                    report = tasks.accuracy(model, val_data, c, info.device)
                    report |= dict(noise=stage["noise"], rate_share=stage["rate"])
                if isinstance(model, RecurrentGPT):
                    report["alpha"] = model.alpha.item()
                bits = val_loss * val_data.tokens / val_data.bytes / math.log(2)
                log.evaluation(step, val_loss, bits, report)
                if deciding and math.isfinite(val_loss):
                    state["stage"] = stage = tasks.next_stage(o.task, stage, val_loss, step)
            log.start_clock(step)
        if saver.failed():
            stop.caught.append("a save that failed")
        reason = stop.reason()
        if step >= last_step or reason:
            break

        if stage is None:
            batches = train.micro_batches(train_data, c, step, micro_steps, info)
        else:
            train_data = open_data(o, stage)[0]
            batches = train_data.micro_batches(c.batch_size, step, micro_steps, info)
            log.tokens_per_step = sequences * train_data.tokens
        share = 1.0 if stage is None else stage["rate"]  # of the learning rate
        scaled = replace(c, learning_rate=c.learning_rate * share, min_lr=c.min_lr * share)
        rate = optim.set_learning_rate(optimizers, step, scaled)
        train.seed_dropout(c.seed, step, info.rank)
        loss, norm = train.train_step(wrapped, batches, micro_steps, optimizers, scaler, check, c, info)
        if isinstance(model, RecurrentGPT):
            model.hold_alpha()
        state["step"] = step = step + 1
        state["tokens"] += log.tokens_per_step

        saving = step == last_step or train.due(step, c.save_interval)
        if log.first or saving or train.due(step, c.log_interval) or train.due(step, c.eval_interval):
            log.step(step, state["tokens"], loss.item(), norm.item(), rate, check.counts())
            check.stop_if_lost(step)
        if saving:
            saved_step = save()

    # --- End: save what a signal interrupted, and wait for the disk ------------------------------------------------
    lost = reason in distributed.LOST
    if reason and not lost and saved_step != step:
        if step > first_step and step != log.clock_step:
            log.step(step, state["tokens"], loss.item(), norm.item(), rate, check.counts())
        saved_step = save()
    info.run_on_rank_0(saver.close)  # raises UserError where a save failed
    if lost:
        raise UserError(f"{reason}: stopped at step {step} without saving; --resume continues from step {saved_step}")
    if reason:
        info.run_on_rank_0(lambda: run_folder.note_stop(run, reason, step))
        log.say(f"{reason}: saved step {step} in {run}; the same command with --resume continues from there")
    log.close(state["best_val_loss"])
    stop.close()


def evaluate(model: GPT, val_data: Any, c: TrainConfig, info: DistInfo, stop: distributed.StopSignal) -> float:
    if isinstance(val_data, Copying):
        windows, read = np.arange(val_data.task.samples), val_data.samples
    else:
        windows = data.eval_windows(val_data, c.gpt.block_size, c.eval_tokens)
        read = partial(data.eval_batch, val_data, c.gpt.block_size)
    return train.evaluate(model, read, windows, c, info, stop)


def open_data(o: Options, stage: dict[str, float] | None) -> tuple[Any, Any]:
    """Return what to train on and what to validate with: each a data.Corpus, or a task at a stage."""
    if stage is not None:
        return tasks.open_task(o.train, o.task, stage["noise"])
    return data.open_corpus(o.train.dataset, "train"), data.open_corpus(o.train.dataset, "val")


if __name__ == "__main__":
    with user_errors():
        main(load_config(sys.argv[1:], Options, __doc__))
