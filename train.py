"""Pretrain a GPT on shards of tokens. Read `pretrain` and `train_step` first.

    python train.py config/lpa_cpu.py                                       one process, CPU or one GPU
    torchrun --nproc_per_node=8 train.py config/lpa_370m.py                 many GPUs of one machine
    torchrun --nproc_per_node=8 train.py config/lpa_3b.py --shard           the model sharded over them (FSDP)
    torchrun --nproc_per_node=2 train.py config/lpa_cpu.py --device=cpu     two processes on a CPU, over gloo
    python train.py config/lpa_cpu.py --max_steps=5000 --resume             continue from the last checkpoint

A run writes out/RUN/config.json, log.jsonl (a line per logged step and evaluation) and ckpt/ (see lpa/checkpoint.py).
SIGTERM, Ctrl-C and max_hours save, write out/RUN/stopped.json and exit with code 0.
"""

import dataclasses
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # CPU threads that wait soon leave their core to other programs

import numpy as np
import torch
from torch import Tensor, nn

import data
from config import TrainConfig, UserError, as_command, load_config, user_errors
from data.tokenizers import Tokenizer, load_tokenizer
from lpa import checkpoint, decode, distributed, hardware, init_from, optim, run_folder
from lpa.distributed import DistInfo, StopSignal, full_tensor, gradient_sync, hang_report, init_distributed, parallelize
from lpa.log import Log
from lpa.nonfinite import NonFiniteCheck
from model import GPT


def main(c: TrainConfig) -> None:
    info = init_distributed(c.device, c.hang_timeout)
    with hang_report(info, c.hang_timeout):
        pretrain(c, info)
        info.close()


def pretrain(
    c: TrainConfig, info: DistInfo, make_model: Callable[..., GPT] = GPT, before_step: Callable[..., int] | None = None
) -> None:
    """Train. An experiment may make another model; before_step(model, step) returns the step whose data is read."""
    # --- Set-up: data, batch, folder -------------------------------------------------------------------------------
    hardware.keep_freed_memory(info.device)
    stop = StopSignal(info, c.max_hours)
    info.run_on_rank_0(lambda: prepare_missing(c.dataset))
    train_data, val_data = data.open_corpus(c.dataset, "train"), data.open_corpus(c.dataset, "val")
    tokenizer = load_tokenizer(train_data.folder, train_data.meta["tokenizer"])
    windows = data.eval_windows(val_data, c.gpt.block_size, c.eval_tokens)
    val_batch = partial(data.eval_batch, val_data, c.gpt.block_size)
    c = with_vocabulary(c, train_data, val_data)
    asked = as_command(c)
    c, micro_steps = share_step(c, info)
    tokens_per_step = c.batch_size * c.gpt.block_size * info.world_size * micro_steps

    # What must not change when a run resumes, beside the model.
    order = dict(data=train_data.fingerprint, seed=c.seed, tokens_per_step=tokens_per_step, optimizer=c.optimizer)
    run = Path(c.out_dir)
    folder, manifest = info.run_on_rank_0(lambda: run_folder.prepare(run, c, order))
    c = dataclasses.replace(c, dtype=choose_dtype(c, manifest, info))
    state: dict[str, Any] = dict(step=0, tokens=0, seconds=0.0, best_val_loss=None, wandb_id=None)
    state |= dict(nonfinite=None, scaler=None)
    state = {name: manifest.get(name, value) for name, value in state.items()}
    state |= dict(order=order, options=dataclasses.asdict(c))
    info.run_on_rank_0(lambda: (run / "config.json").write_text(json.dumps(state["options"], indent=1)))

    # --- Model and optimizer: new, or as the checkpoint in `folder` has them ---------------------------------------
    with torch.device(info.device):
        model = make_model(c.gpt, c.seed if folder is None else None)
    energy = {}
    if folder is None and c.init_from is not None:
        energy = init_from.start_from(Path(c.init_from), model, train_data.meta["tokenizer"])
    wrapped = parallelize(model, c, info, find_unused=make_model is not GPT)
    optimizers = optim.make_optimizers(model, c)
    if folder is not None:
        checkpoint.restore(folder, model, optimizers)
    scaler = torch.amp.GradScaler(info.device.type, enabled=c.dtype == "float16")
    scaler.load_state_dict(state["scaler"] or scaler.state_dict())
    check = NonFiniteCheck(info.device, state["nonfinite"])
    saver = checkpoint.Saver(run, tokenizer, info, c.shard and info.world_size > 1, c.hang_timeout)

    last_step = c.max_steps if c.stop_step is None else min(c.max_steps, c.stop_step)
    log = Log(run, c, state, model, tokens_per_step, last_step, info, resumed=folder is not None)
    log.start(c, asked, optimizers, train_data, val_data, micro_steps, folder)
    if folder is None and c.init_from is not None:
        log.say(f"weights of {c.init_from}; {init_from.energy_table(energy)}")
        log.write(dict(step=0, energy_kept=energy))
    first_step, saved_step = state["step"], state["step"] if folder else None

    def save() -> int:
        state.update(seconds=log.seconds, wandb_id=log.wandb_id)
        state.update(nonfinite=check.state(), scaler=scaler.state_dict())
        saver.save(checkpoint.live_tensors(model, optimizers), state)
        log.start_clock(state["step"])
        return state["step"]

    def log_step() -> None:
        log.step(state["step"], state["tokens"], loss.item(), norm.item(), rate, check.counts())

    # --- Loop. `step` counts finished updates; the log's clock stands still while we save and evaluate. -------------
    while True:
        step = state["step"]
        # A step is saved before it is evaluated: a run that ends in between evaluates it again when it resumes.
        if evaluation_due(step, last_step, c):
            val_loss = evaluate(model, val_batch, windows, c, info, stop)
            if step > 0 and val_loss < (state["best_val_loss"] or math.inf):
                saved_step = saved_step if saved_step == step else save()
                state["best_val_loss"] = val_loss
                saver.mark_best(step, val_loss)
            if not stop.agreed:  # else a signal cut it short
                log.evaluation(step, val_loss, val_loss * val_data.tokens / val_data.bytes / math.log(2))
            log.start_clock(step)
        if step and due(step, c.sample_interval) and step not in log.sampled:
            log.sample(step, write_sample(model, tokenizer, c, info))
            log.start_clock(step)
        if saver.failed():
            stop.caught.append("a save that failed")
        reason = stop.reason()
        if step >= last_step or reason:
            break

        # Learning rate, batch and dropout are functions of the step, so a resume has no state of theirs to restore.
        rate = optim.set_learning_rate(optimizers, step, c)
        seed_dropout(c.seed, step, info.rank)
        data_step = step if before_step is None else before_step(model, step)
        batches = micro_batches(train_data, c, data_step, micro_steps, info)
        loss, norm = train_step(wrapped, batches, micro_steps, optimizers, scaler, check, c, info)
        state["step"] = step = step + 1
        state["tokens"] += tokens_per_step

        # Only here does the host wait for the device.
        saving = step == last_step or due(step, c.save_interval)
        if log.first or saving or any(due(step, n) for n in (c.log_interval, c.eval_interval, c.sample_interval)):
            log_step()
            check.stop_if_lost(step)
        if saving:
            saved_step = save()

    # --- End: save what a signal interrupted, and wait for the disk ------------------------------------------------
    if reason and reason not in distributed.LOST and saved_step != step:
        if step > first_step and step != log.clock_step:
            log_step()
        saved_step = save()
    info.run_on_rank_0(saver.close)  # raises UserError where a save failed
    if reason in distributed.LOST:
        raise UserError(f"{reason}: stopped at step {step} without saving; --resume continues from step {saved_step}")
    if reason:
        info.run_on_rank_0(lambda: run_folder.note_stop(run, reason, step))
        log.say(f"{reason}: saved step {step} in {run}; the same command with --resume continues from there")
    log.close(state["best_val_loss"])
    stop.close()


def train_step(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    micro_steps: int,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    check: NonFiniteCheck,
    c: TrainConfig,
    info: DistInfo,
) -> tuple[Tensor, Tensor]:
    """Update the model once. Return the mean loss over all processes and the gradient norm, on the device.

    Every sequence has the same length, so the mean of the micro-batches' means is the mean over tokens. Afterwards each
    parameter's .grad holds its clipped gradient until the next step.
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=info.device)
    for micro_step, (x, y) in enumerate(batches):
        with gradient_sync(model, micro_step == micro_steps - 1):
            with hardware.autocast(info.device, c.dtype):
                loss = model(x, y) / micro_steps
            scaler.scale(loss).backward()
        total += loss.detach()
    total = info.mean(total)
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    max_norm = c.grad_clip or math.inf
    norm = full_tensor(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
    # If the loss or a gradient is not finite, the optimizers change nothing. The verdict stays on the device. We do not
    # call scaler.step, because it would make the host wait.
    skip = check.verdict(total, norm, max_norm)
    for optimizer in optimizers:
        optimizer.found_inf = skip  # pyrefly: ignore  (torch's optimizers look for it, and declare it nowhere)
        optimizer.step()
    scaler.update()
    return total, norm


@torch.no_grad()
def evaluate(
    model: nn.Module,
    read: Callable[[np.ndarray], tuple[Tensor, Tensor]],
    windows: np.ndarray,
    c: TrainConfig,
    info: DistInfo,
    stop: StopSignal | None = None,
) -> float:
    """Return the mean loss over the same windows every time, shared by all processes; nan where a signal says stop.

    read: from numbers of windows to their inputs and targets.
    """
    model.eval()
    mine = windows[info.rank :: info.world_size]
    total = torch.zeros((), device=info.device)
    if stop is not None:
        stop.reset_pace()
    for start in range(0, -(-len(windows) // info.world_size), c.batch_size):  # the same number on each process
        if stop is not None and stop.reason():
            total.fill_(math.nan)
            break
        chunk = mine[start : start + c.batch_size]
        weight = len(chunk)
        chunk = chunk if weight else windows[:1]  # FSDP needs every process, also one that has no window left
        x, y = (t.to(info.device) for t in read(chunk))
        # A last, smaller batch is not worth another compilation.
        stance = torch.compiler.set_stance("default" if len(chunk) == c.batch_size else "force_eager")
        with stance, hardware.autocast(info.device, c.dtype):
            total += model(x, y) * weight
    model.train()
    if stop is not None:
        stop.reset_pace()
    return (info.mean(total) * info.world_size / len(windows)).item()


def write_sample(model: GPT, tokenizer: Tokenizer, c: TrainConfig, info: DistInfo) -> str:
    """Return a text that starts like a document of the corpus, on process 0; from the same random numbers each time."""
    if info.rank > 0:
        return ""
    model.eval()
    with torch.compiler.set_stance("force_eager"), hardware.autocast(info.device, c.dtype):
        idx = torch.tensor([[tokenizer.end_of_text or 0]], device=info.device)
        generator = torch.Generator(info.device).manual_seed(c.seed)
        options: dict[str, Any] = dict(temperature=0.8, generator=generator, beyond="stop")
        ids = [int(token) for token in decode.generate(model, idx, 200, tokenizer.vocab_size, **options)]
    model.train()
    return b"".join(map(tokenizer.decode_bytes, ids)).decode(errors="replace")


def micro_batches(
    corpus: data.Corpus, c: TrainConfig, step: int, micro_steps: int, info: DistInfo
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this process's micro-batches of a step, on the device."""
    for micro_step in range(micro_steps):
        place = (c.seed, step, micro_step, micro_steps, info.rank, info.world_size)
        batch = data.batch(corpus, c.gpt.block_size, c.batch_size, *place)
        if info.device.type == "cuda":  # pinned memory lets the copy run while the device computes
            batch = tuple(t.pin_memory() for t in batch)
        x, y = (t.to(info.device, non_blocking=True) for t in batch)
        yield x, y


def seed_dropout(seed: int, step: int, rank: int) -> None:
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0]))


def due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def evaluation_due(step: int, last_step: int, c: TrainConfig) -> bool:
    if step == 0:
        return c.init_from is not None
    return step == last_step or due(step, c.eval_interval)


def choose_dtype(c: TrainConfig, manifest: dict[str, Any], info: DistInfo) -> Any:
    """Return the precision of matrix products: a resumed run keeps the one that 'auto' chose when it began."""
    if c.dtype == "auto" and manifest:
        return manifest["options"]["dtype"]
    return info.run_on_rank_0(lambda: hardware.choose_dtype(c.dtype, info.device))


def prepare_missing(dataset: str) -> None:
    """Prepare the embedded corpus, which needs no network; for any other, open_corpus says what to run."""
    if dataset == "pystdlib" and not (data.DATA / dataset / "meta.json").exists():
        print("preparing data/pystdlib from the standard library of this Python", flush=True)
        importlib.import_module("data.pystdlib.prepare").prepare()


def with_vocabulary(c: TrainConfig, *corpora: data.Corpus) -> TrainConfig:
    """Return the options with a vocab_size: the corpus's, padded to a multiple of 128, which makes the head faster."""
    largest = max(corpus.max_token for corpus in corpora)
    padded = -(-corpora[0].vocab_size // 128) * 128
    vocab_size = padded if c.gpt.vocab_size is None else c.gpt.vocab_size
    if largest >= vocab_size:
        raise UserError(f"vocab_size is {vocab_size}, but {c.dataset} holds token {largest}; leave vocab_size out")
    return dataclasses.replace(c, gpt=dataclasses.replace(c.gpt, vocab_size=vocab_size))


def share_step(c: TrainConfig, info: DistInfo) -> tuple[TrainConfig, int]:
    """Return the options with a batch_size for this number of processes, and the micro-steps per step."""
    size = info.world_size
    one_pass = c.batch_size * c.gpt.block_size * size
    wanted = c.tokens_per_step or one_pass
    sequences, rest = divmod(wanted, c.gpt.block_size)
    batch_size = min(c.batch_size, sequences // size) if size > 1 else c.batch_size
    if rest or batch_size == 0 or sequences == 0 or sequences % (batch_size * size):
        raise UserError(
            f"tokens_per_step is {c.tokens_per_step}, wanted a multiple of batch_size x block_size x processes ="
            f" {c.batch_size} x {c.gpt.block_size} x {size} = {one_pass}, for example"
            f" {max(1, round(wanted / one_pass)) * one_pass}"
        )
    return dataclasses.replace(c, batch_size=batch_size), sequences // (batch_size * size)


if __name__ == "__main__":
    with user_errors():
        main(load_config(sys.argv[1:], description=__doc__))
