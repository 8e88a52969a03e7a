"""Pretrain a GPT on shards of tokens. Importing this does nothing; main(config) is the story.

    python train.py config/lpa_cpu.py                                       one process, CPU or one GPU
    torchrun --nproc_per_node=8 train.py config/lpa_370m.py                 many GPUs of one machine
    torchrun --nproc_per_node=8 train.py config/lpa_3b.py --shard           the model spread over them (FSDP)
    torchrun --nproc_per_node=2 train.py config/lpa_cpu.py --device=cpu     the same on a CPU, over gloo
    python train.py config/lpa_cpu.py --max_steps=5000 --resume             go on where the last checkpoint is
    python train.py config/lpa_cpu.py --init_from=out/dense_cpu             begin with that model's weights, truncated
    python train.py config/mine.py --init_from=gpt2                         or a Hugging Face model's; see export.py

A run writes out/RUN/config.json, log.jsonl (a line per logged step and evaluation) and ckpt/ (see checkpoint.py).
SIGTERM, Ctrl-C and max_hours save, write out/RUN/stopped.json and exit with code 0.
"""

import dataclasses
import datetime
import hashlib
import importlib
import itertools
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import data
import recurrent
from config import TrainConfig, UserError, as_command, load_config, user_errors
from data import copying
from data.copying import Copying
from data.tokenizers import Tokenizer, load_tokenizer
from lpa import checkpoint, decode, distributed, hardware, init_from, optim, structured
from lpa.distributed import Watch, World
from lpa.guard import Guard
from lpa.log import Log
from model import GPT, LowDim
from recurrent import RecurrentGPT, new_model

SAMPLE_TOKENS = 200


def main(c: TrainConfig) -> None:
    world = distributed.join_world(c.device, c.hang_timeout)
    with distributed.roll_call(world, c.hang_timeout):
        pretrain(c, world)
        world.leave()


def pretrain(c: TrainConfig, world: World) -> None:
    hardware.prepare(world.device, c.deterministic)
    watch = Watch(world, c.max_hours)
    automatic = c.dtype == "auto"
    c = dataclasses.replace(c, dtype=world.from_rank_0(lambda: hardware.choose_dtype(c.dtype, world.device)))

    # Data
    world.from_rank_0(lambda: prepare_missing(c.dataset))
    stage = copying.first_stage(c.task) if c.dataset in copying.TASKS else None
    train_data, val_data = open_data(c, stage)
    c = with_vocabulary(c, train_data, val_data)
    tokenizer = load_tokenizer(train_data.folder, train_data.meta["tokenizer"])
    asked = as_command(c)
    c, micro_steps = share_step(c, world)
    tokens_per_step = c.batch_size * c.gpt.block_size * world.size * micro_steps
    windows = data.eval_windows(val_data, c.gpt.block_size, c.eval_tokens)
    c, guided_steps, new_steps = plan_guide(c)

    # Model and optimizer: new, or as the last checkpoint has them
    run = Path(c.out_dir)
    order = dict(data=train_data.fingerprint, seed=c.seed, tokens_per_step=tokens_per_step, optimizer=c.optimizer)
    if guided_steps:
        order |= dict(guided_steps=guided_steps, new_steps=new_steps)
    state: dict[str, Any] = dict(step=0, tokens=0, seconds=0.0, best_val_loss=None, wandb_id=None)
    state |= dict(stage=stage, guard=None, scaler=None)
    saved_state = tuple(state)
    state |= dict(order=order, options=dataclasses.asdict(c))
    folder, manifest = world.from_rank_0(lambda: prepare_run(run, c, state))
    if folder is not None:
        state |= {name: manifest.get(name) for name in saved_state}
        if state["tokens"] is None:  # a checkpoint of before they were counted
            state["tokens"] = state["step"] * tokens_per_step
        if automatic:  # as the run began, whatever this machine would choose today
            c = dataclasses.replace(c, dtype=manifest["options"]["dtype"])
            state["options"]["dtype"] = c.dtype
    guiding = state["step"] < guided_steps
    model, spread, optimizers, energy = build(c, folder, guiding, world, train_data.meta["tokenizer"])
    scaler = torch.amp.GradScaler(world.device.type, enabled=c.dtype == "float16")
    scaler.load_state_dict(state["scaler"] or scaler.state_dict())
    guard = Guard(world.device, c.skip_spikes, state["guard"])

    last_step = c.max_steps if c.stop_step is None else min(c.max_steps, c.stop_step)
    log = Log(run, c, state, model, tokens_per_step, last_step, world, resumed=folder is not None)
    log.say(f"{model}\n{optim.describe(optimizers)}\noptions: {asked}")
    if warning := optim.late_warm_up(c):
        log.warn(warning)
    if stage is None:
        epochs = new_steps * tokens_per_step / train_data.tokens
        log.say(
            f"data: {train_data.tokens:,} training tokens of {c.dataset}, {val_data.tokens:,} to validate;"
            f" {new_steps:,} steps are {epochs:.3g} epochs"
        )
        log.say(f"tokenizer: {train_data.meta['tokenizer'].get('name', train_data.meta['tokenizer']['kind'])}")
    else:
        log.say(f"data: {c.dataset}, {c.task.keep} tokens to keep among {c.task.noise} of noise, made as they are read")
    log.say(
        f"a step: {tokens_per_step:,} tokens = {c.batch_size} sequences x {c.gpt.block_size} tokens"
        f" x {world.size} ranks x {micro_steps} micro-steps"
    )
    if guided_steps:
        ratio = f"{guided_steps / new_steps:.3f} of the {new_steps:,} over new batches"
        log.say(f"self-guided: {guided_steps:,} steps, {ratio}; {c.max_steps:,} in all")
    done = f": no step is left of {last_step:,}" if state["step"] >= last_step else ""
    log.say(f"going on from {folder}{done}" if folder else f"writing to {run}")
    if folder is None and c.init_from is not None:
        log.say(f"weights of {c.init_from}; {init_from.energy_table(energy)}")
        log.write(dict(step=0, energy_kept=energy))

    saver = checkpoint.Saver(run, tokenizer, world, c.shard and world.size > 1, c.hang_timeout)
    first_step, saved_step = state["step"], state["step"] if folder else None

    def save() -> int:
        state.update(seconds=log.seconds, wandb_id=log.wandb_id, guard=guard.state(), scaler=scaler.state_dict())
        parts = dict(model=model.state_dict(), optimizer=checkpoint.optimizer_tensors(model, optimizers))
        if trouble := saver.save(parts, state):
            log.warn(trouble)  # of the save before; this one has another chance
        log.start_clock(state["step"])
        return state["step"]

    # Training. `step` counts finished updates. The log's clock stands still while we evaluate and save. What has its
    # turn after a step is saved before it is evaluated, so that a run which ends in between takes it up again.
    while True:
        step = state["step"]
        if guiding and step == guided_steps:  # as a resume from here would, the run goes on without the guides
            del spread, model, optimizers
            folder, guiding = world.from_rank_0(saver.newest), False
            model, spread, optimizers, _ = build(c, folder, guiding, world)
            log.start_clock(step)
        if evaluation_due(step, last_step, c, state["stage"], log.evaluated - {first_step}):
            val_loss = evaluate(model, open_data(c, state["stage"])[1], windows, c, world, watch)
            comparable = step > 0 and (step == last_step or not state["stage"])  # stages have losses of their own
            if comparable and val_loss < (state["best_val_loss"] or math.inf):
                saved_step = saved_step if saved_step == step else save()
                state["best_val_loss"] = val_loss
                saver.mark_best(step, val_loss)
            if not watch.agreed:  # else a signal may have cut it short
                report_evaluation(step, val_loss, model, c, world, state, log)
            log.start_clock(step)
        if step and due(step, c.sample_interval) and step not in log.sampled:
            log.sample(step, write_sample(model, tokenizer, c, world))
            log.start_clock(step)
        if saver.failure() and c.save_errors == "stop":
            watch.caught.append("a save that failed")
        reason = watch.stop()
        if step >= last_step or reason:
            break

        if state["stage"]:
            train_data = open_data(c, state["stage"])[0]
            log.length_share = train_data.tokens / c.gpt.block_size
        rate = optim.set_learning_rate(optimizers, step, at_stage(c, state["stage"]))
        seed_dropout(c.seed, step, world.rank)
        if guiding:
            structured.set_guides(model, step, guided_steps, c.seed)
        batches = micro_batches(train_data, c, step % new_steps, micro_steps, world)
        loss, norm = train_step(spread, batches, micro_steps, optimizers, scaler, guard, c, world)
        state["step"] = step = step + 1
        state["tokens"] += round(tokens_per_step * log.length_share)

        unguided_from_here = guiding and step == guided_steps
        saving = step == last_step or unguided_from_here or due(step, c.save_interval)
        if log.first or saving or any(due(step, n) for n in (c.log_interval, c.eval_interval, c.sample_interval)):
            log.step(step, state["tokens"], loss.item(), norm.item(), rate, guard.counts())  # here alone the host waits
            guard.stop_if_lost(step)
        if unguided_from_here:
            structured.drop_guides(model, optimizers)
        if saving:
            saved_step = save()

    if reason and reason not in distributed.LOST and saved_step != step:
        if step > first_step and step != log.clock_step:
            log.step(step, state["tokens"], loss.item(), norm.item(), rate, guard.counts())
        saved_step = save()
    saver.wait()
    world.from_rank_0(saver.close)  # here a save that failed becomes an error
    if reason in distributed.LOST:
        raise UserError(f"{reason}: stopped at step {step} without saving; --resume goes on from step {saved_step}")
    if reason:
        world.from_rank_0(lambda: note_stop(run, reason, step))
        log.say(f"{reason}: saved step {step} in {run}; the same command with --resume goes on from there")
    log.close(state["best_val_loss"])
    watch.close()


def plan_guide(c: TrainConfig) -> tuple[TrainConfig, int, int]:
    """The options, of more steps with self_guided = 'flops'; the guided steps; the steps until the data begins anew."""
    ratio, new_steps = c.self_guided, c.max_steps
    if ratio == "flops":
        with torch.device("meta"):
            low, dense = GPT(c.gpt), GPT(dataclasses.replace(c.gpt, lowdim=LowDim()))
        flops = [dense.flops_per_token(), low.flops_per_token(), structured.guide_flops(low)]
        ratio = structured.fixed_flop_ratio(*flops)
        if not 0 < ratio <= 1:
            raise UserError(f"self_guided is flops, but would be {ratio:.2f} of the steps, wanted above 0, at most 1")
    guided_steps = round(ratio * new_steps)
    if ratio and not guided_steps:
        raise UserError(f"self_guided is {c.self_guided} of {new_steps} steps, less than one: wanted more of either")
    if c.self_guided == "flops":
        more = dict(max_steps=new_steps + guided_steps, warmup_steps=round((1 + ratio) * c.warmup_steps))
        c = dataclasses.replace(c, **more)
    return c, guided_steps, new_steps


def build(
    c: TrainConfig, folder: Path | None, guided: bool, world: World, tokenizer: dict[str, Any] | None = None
) -> tuple[GPT, nn.Module, list[torch.optim.Optimizer], dict[str, float]]:
    """The model, its form on all ranks, and the optimizers: new, or as the checkpoint in `folder`, guided or not.

    A new one may begin with another run's weights, for which `tokenizer` is wanted; the energy they keep comes last.
    """
    energy: dict[str, float] = {}
    with torch.device(world.device if world.device.type == "cuda" else "cpu"):
        model = new_model(c.model, c.gpt, c.recurrent, c.seed if folder is None else None)
    model.to(world.device)
    if folder is None and c.init_from is not None:
        energy = init_from.start_from(Path(c.init_from), model, tokenizer)
    if guided:
        structured.add_guides(model)
    spread = distributed.spread(model, c, world)
    optimizers = optim.make_optimizers(model, c)
    if folder is not None:
        checkpoint.restore(folder, model, optimizers)
    return model, spread, optimizers, energy


def train_step(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    micro_steps: int,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    guard: Guard,
    c: TrainConfig,
    world: World,
) -> tuple[Tensor, Tensor]:
    """One update from all micro-batches of all ranks -> their mean loss and the gradient norm, on the device.

    Every sequence has the same length, so the mean of the micro-batches' means is the mean over tokens. Where the loss
    or the gradient is not finite, the optimizers leave weights and moments as they are.
    """
    total = torch.zeros((), device=world.device)
    for micro_step, (x, y) in enumerate(batches):
        with distributed.communicating(model, micro_step == micro_steps - 1):
            with hardware.autocast(world.device, c.dtype):
                loss = model(x, y) / micro_steps
            scaler.scale(loss).backward()
        total += loss.detach()
    total = world.mean(total)
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    largest = c.grad_clip or math.inf
    norm = distributed.whole(nn.utils.clip_grad_norm_(model.parameters(), largest))
    skip = guard.judge(total, norm)
    guard.clipped += norm * (1 - skip) > largest
    for optimizer in optimizers:
        optimizer.found_inf = skip  # pyrefly: ignore  (torch's optimizers look for it, and declare it nowhere)
        optimizer.step()  # not scaler.step, which would put its own verdict in the place of ours
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return total, norm


@torch.no_grad()
def evaluate(
    model: GPT,
    corpus: data.Corpus | Copying,
    windows: Any,
    c: TrainConfig,
    world: World,
    watch: Watch | None = None,
) -> float:
    """Mean loss over the same windows every time, shared by all ranks: summed, then divided; nan if told to stop."""
    model.eval()
    mine = windows[world.rank :: world.size]
    total = torch.zeros((), device=world.device)
    if watch is not None:
        watch.restart()
    for start in range(0, -(-len(windows) // world.size), c.batch_size):  # as often on every rank
        if watch is not None and watch.stop():
            total.fill_(math.nan)
            break
        chunk = mine[start : start + c.batch_size]
        weight = len(chunk)
        chunk = chunk if weight else windows[:1]  # a rank without any computes all the same: its shards are needed
        x, y = (t.to(world.device) for t in data.eval_batch(corpus, c.gpt.block_size, chunk))
        # A last, smaller batch is not worth another compilation.
        stance = torch.compiler.set_stance("default" if len(chunk) == c.batch_size else "force_eager")
        with stance, hardware.autocast(world.device, c.dtype):
            total += model(x, y) * weight
    model.train()
    if watch is not None:
        watch.restart()
    return (world.mean(total) * world.size / len(windows)).item()


def evaluation_due(
    step: int, last_step: int, c: TrainConfig, stage: dict[str, float] | None, evaluated: set[int]
) -> bool:
    """`evaluated` are the steps with whose evaluation an earlier start of the run was done."""
    if step == 0:
        return c.init_from is not None and step not in evaluated
    if stage and step < last_step:  # again after a resume, but where it has decided the next stage
        return due(step, c.eval_interval) and stage.get("decided") != step
    return step not in evaluated and (step == last_step or due(step, c.eval_interval))


def report_evaluation(
    step: int, loss: float, model: GPT, c: TrainConfig, world: World, state: dict[str, Any], log: Log
) -> None:
    """Tell a loss of the val split. On a generated task, measure what else there is, and take the next stage."""
    stage = state["stage"]
    val_data = open_data(c, stage)[1]
    extra = copy_report(model, val_data, c, world, stage) if stage and isinstance(val_data, Copying) else {}
    log.evaluation(step, loss, loss * val_data.tokens / val_data.bytes / math.log(2), extra)
    if stage and step < log.last_step and math.isfinite(loss):
        state["stage"] = copying.next_stage(c.task, stage, loss) | dict(decided=step)


def write_sample(model: GPT, tokenizer: Tokenizer, c: TrainConfig, world: World) -> str:
    """A text that begins as the corpus's do, on rank 0; always from the same random numbers."""
    if world.rank > 0:
        return ""
    start = 0 if tokenizer.end_of_text is None else tokenizer.end_of_text
    generator = torch.Generator(world.device).manual_seed(c.seed)
    generate: Any = recurrent.generate if isinstance(model, RecurrentGPT) else decode.generate
    model.eval()
    with torch.compiler.set_stance("force_eager"), hardware.autocast(world.device, c.dtype):
        idx = torch.tensor([[start]], device=world.device)
        drawn = generate(model, idx, SAMPLE_TOKENS, tokenizer.vocab_size, 0.8, None, None, generator, beyond="stop")
        ids = [int(token) for token in drawn]
    model.train()
    return b"".join(map(tokenizer.decode_bytes, ids)).decode(errors="replace")


def open_data(c: TrainConfig, stage: dict[str, float] | None) -> tuple[data.Corpus | Copying, data.Corpus | Copying]:
    """What to train on, and what to validate with: splits of a corpus, or a generated task at its stage."""
    if stage is None:
        return data.open_corpus(c.dataset, "train"), data.open_corpus(c.dataset, "val")
    noise = int(stage["noise"])
    return copying.open_task(c, "train", noise), copying.open_task(c, "val", noise)


def at_stage(c: TrainConfig, stage: dict[str, float] | None) -> TrainConfig:
    """The options with the learning rate of a stage of the curriculum."""
    if stage is None:
        return c
    return dataclasses.replace(c, learning_rate=c.learning_rate * stage["rate"], min_lr=c.min_lr * stage["rate"])


def copy_report(
    model: GPT, val_data: Copying, c: TrainConfig, world: World, stage: dict[str, float]
) -> dict[str, float | None]:
    """What an evaluation of a generated task tells besides the loss."""
    model.eval()
    with torch.compiler.set_stance("force_eager"), hardware.autocast(world.device, c.dtype):
        report = copying.accuracy(model, val_data, c.batch_size, world.device)
    model.train()
    alpha = model.alpha_now() if isinstance(model, RecurrentGPT) else None
    alpha = alpha.item() if isinstance(alpha, Tensor) else alpha
    return report | dict(noise=stage["noise"], rate_share=stage["rate"], alpha=alpha)


def micro_batches(
    corpus: data.Corpus | Copying, c: TrainConfig, step: int, n: int, world: World
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's n batches of a step, on the device.

    No thread reads them ahead: a batch of lpa_cpu takes under 1 % of its step (python -m timeit -s "import data; c =
    data.open_corpus('pystdlib', 'train')" "data.batch(c, 256, 8, 1, 0)"), and a GPU's host runs ahead of its device.
    """
    for micro_step in range(n):
        place = (c.seed, step, micro_step, n, world.rank, world.size)
        batch = data.batch(corpus, c.gpt.block_size, c.batch_size, *place)
        if world.device.type == "cuda":  # pinned memory lets the copy run while the device computes
            batch = tuple(t.pin_memory() for t in batch)
        x, y = (t.to(world.device, non_blocking=True) for t in batch)
        yield x, y


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Dropout masks are a function of (seed, step, rank), so that a resume has no generator to restore."""
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(digest))


def due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def prepare_missing(dataset: str) -> None:
    """The embedded corpus needs no network, so it prepares itself; for any other, open_corpus says what to run."""
    if dataset == "pystdlib" and not (data.DATA / dataset / "meta.json").exists():
        print("preparing data/pystdlib from the standard library of this Python", flush=True)
        importlib.import_module("data.pystdlib.prepare").prepare()


def with_vocabulary(c: TrainConfig, *corpora: data.Corpus | Copying) -> TrainConfig:
    """The options with a vocab_size: the corpus's, padded to a multiple of 128 for the sake of the head's matrix."""
    largest = max(corpus.max_token for corpus in corpora)
    padded = -(-corpora[0].vocab_size // 128) * 128
    vocab_size = padded if c.gpt.vocab_size is None else c.gpt.vocab_size
    if largest >= vocab_size:
        raise UserError(f"vocab_size is {vocab_size}, but {c.dataset} holds token {largest}; leave vocab_size out")
    return dataclasses.replace(c, gpt=dataclasses.replace(c.gpt, vocab_size=vocab_size))


def share_step(c: TrainConfig, world: World) -> tuple[TrainConfig, int]:
    """The options with a batch_size that suits so many ranks, and the micro-steps that make up tokens_per_step."""
    a_pass = c.batch_size * c.gpt.block_size * world.size
    wanted = c.tokens_per_step or a_pass
    sequences, rest = divmod(wanted, c.gpt.block_size)
    batch_size = min(c.batch_size, sequences // world.size) if world.size > 1 else c.batch_size
    if rest or batch_size == 0 or sequences == 0 or sequences % (batch_size * world.size):
        raise UserError(
            f"tokens_per_step is {c.tokens_per_step}, wanted a multiple of batch_size x block_size x ranks ="
            f" {c.batch_size} x {c.gpt.block_size} x {world.size} = {a_pass}, for example"
            f" {max(1, round(wanted / a_pass)) * a_pass}"
        )
    return dataclasses.replace(c, batch_size=batch_size), sequences // (batch_size * world.size)


def prepare_run(run: Path, c: TrainConfig, state: dict[str, Any]) -> tuple[Path | None, dict[str, Any]]:
    """Make the run's folder -> the checkpoint to go on from and its manifest, or None for a new run.

    Never overwrites an earlier run: that one is moved aside. Raises UserError where there is nothing to resume, or the
    checkpoint is of another model, other data, another seed or optimizer.
    """
    resume, broken = c.resume, []
    if run.resolve() == Path.cwd().resolve():
        raise UserError(f"out_dir is {str(run)!r}, wanted a folder of its own, such as out/run")
    folder, manifest, complaints = checkpoint.newest(run) if resume != "never" else (None, {}, [])
    if folder is None and (resume == "must" or (resume == "auto" and complaints)):
        raise UserError("; ".join(complaints) or f"nothing to resume: {run} holds no checkpoint; leave --resume out")
    if resume != "never" and folder is not None:
        for complaint in complaints:
            print(f"warning: {complaint}; passed over")
        broken = checkpoint.steps(run)[: len(complaints)]
        before, now = map(checkpoint.model_options, (manifest["options"], state["options"]))
        changed = checkpoint.differences(before, now)
        kept = {name: value for name, value in manifest["order"].items() if name != "data" or not c.new_data}
        changed += checkpoint.differences(kept, {n: v for n, v in state["order"].items() if n != "data" or n in kept})
        if changed:
            raise UserError(f"{folder} is of another run. " + "; ".join(changed))
    try:
        if resume == "never" and ((run / "log.jsonl").exists() or (run / "ckpt").exists()):
            number = next(n for n in itertools.count(1) if not Path(f"{run}.{n}").exists())
            run.rename(f"{run}.{number}")
            print(f"an earlier run in {run} was moved to {run}.{number}")
        run.mkdir(parents=True, exist_ok=True)
        checkpoint.clear_leftovers(run)
        for passed_over in broken:  # or they would count among those that are kept
            checkpoint.set_aside(passed_over)
        (run / "stopped.json").unlink(missing_ok=True)
        (run / "config.json").write_text(json.dumps(state["options"], indent=1))
    except OSError as error:
        raise UserError(f"cannot write to out_dir {run}: {error.strerror}") from None
    return folder, manifest


def note_stop(run: Path, reason: str, step: int) -> None:
    """For people and job scripts: this run was asked to stop, and did. torchrun does not start again what exits 0."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    checkpoint.write_whole(run / "stopped.json", json.dumps(dict(reason=reason, step=step, time=now)) + "\n")


if __name__ == "__main__":
    with user_errors():
        main(load_config(sys.argv[1:], description=__doc__))
