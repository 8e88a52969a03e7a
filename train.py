"""Pretrain a GPT on shards of tokens. Importing this does nothing; main(config) is the story.

    python train.py config/lpa_cpu.py                                       one process, CPU or one GPU
    torchrun --nproc_per_node=8 train.py config/lpa_370m.py                 many GPUs of one machine
    torchrun --nproc_per_node=2 train.py config/lpa_cpu.py --device=cpu     the same on a CPU, over gloo
    python train.py config/lpa_cpu.py --max_steps=2000 --resume             go on where the last checkpoint is
    python train.py config/lpa_cpu.py --init_from=out/dense_cpu             begin with that model's weights, truncated
    python train.py config/mine.py --init_from=gpt2                         or a Hugging Face model's; see export.py

A run writes out/RUN/config.json, log.jsonl (a line per logged step and evaluation) and ckpt/ (see checkpoint.py).
SIGTERM and Ctrl-C save at the next step and exit with code 0.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import itertools
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import checkpoint
import data
import hardware
import optim
import structured
from config import TrainConfig, UserError, load_config, user_errors
from data import copying
from data.copying import Copying
from data.tokenizers import load_tokenizer
from hardware import World
from model import GPT, LowDim
from recurrent import RecurrentGPT, new_model

MAX_BAD_STEPS = 10  # non-finite steps in a row that end a run


def main(c: TrainConfig) -> None:
    world = hardware.join_world(c.device)
    if world.device.type == "cpu":
        hardware.keep_freed_memory()
    stop_signal = hardware.catch_signals()
    automatic = c.dtype == "auto"
    c = dataclasses.replace(c, dtype=world.from_rank_0(lambda: hardware.choose_dtype(c.dtype, world.device)))

    # Data
    world.from_rank_0(lambda: prepare_missing(c.dataset))
    stage = copying.first_stage(c.task) if c.dataset in copying.TASKS else None
    train_data, val_data = open_data(c, stage)
    c = with_vocabulary(c, train_data, val_data)
    tokenizer = load_tokenizer(train_data.folder, train_data.meta["tokenizer"])
    c, micro_steps = share_step(c, world)
    tokens_per_step = c.batch_size * c.gpt.block_size * world.size * micro_steps
    windows = data.eval_windows(val_data, c.gpt.block_size, c.eval_tokens)
    c, guided_steps, new_steps = plan_guide(c)
    bits_per_byte = val_data.tokens / val_data.bytes / math.log(2)  # of a loss of one nat per token

    # Model and optimizer: new, or as the last checkpoint has them
    run = Path(c.out_dir)
    order = dict(data=train_data.fingerprint, seed=c.seed, tokens_per_step=tokens_per_step, optimizer=c.optimizer)
    if guided_steps:
        order |= dict(guided_steps=guided_steps, new_steps=new_steps)
    state = dict(step=0, seconds=0.0, best_val_loss=None, wandb_id=None, stage=stage)
    state |= dict(order=order, options=dataclasses.asdict(c))
    folder, manifest = world.from_rank_0(lambda: prepare_run(run, c.resume, state))
    if folder is not None:
        state |= {name: manifest.get(name) for name in ("step", "seconds", "best_val_loss", "wandb_id", "stage")}
        if automatic:  # as the run began, whatever this machine would choose today
            c = dataclasses.replace(c, dtype=manifest["options"]["dtype"])
            state["options"]["dtype"] = c.dtype
    guiding = state["step"] < guided_steps
    model, optimizers, scaler, energy = build(c, folder, guiding, world, train_data.meta["tokenizer"])
    parallel = compile_and_wrap(model, c, world)
    guard = Guard(world.device)

    last_step = c.max_steps if c.stop_step is None else min(c.max_steps, c.stop_step)
    log = Log(run, c, state, model, tokens_per_step, last_step, world)
    log.say(f"{model}\n{optim.describe(optimizers)}")
    if stage is None:
        log.say(f"data: {train_data.tokens:,} training tokens of {c.dataset}, {val_data.tokens:,} to validate")
    else:
        log.say(f"data: {c.dataset}, {c.task.keep} tokens to keep among {c.task.noise} of noise, made as they are read")
    log.say(
        f"a step: {tokens_per_step:,} tokens = {c.batch_size} sequences x {c.gpt.block_size} tokens"
        f" x {world.size} ranks x {micro_steps} micro-steps"
    )
    if guided_steps:
        log.say(f"self-guided: {guided_steps:,} steps; {c.max_steps:,} in all, {new_steps:,} of them over new batches")
    log.say(f"going on from {folder}" if folder else f"writing to {run}")

    if folder is None and c.init_from is not None:
        log.say(f"weights of {c.init_from}; {checkpoint.energy_table(energy)}")
        log.write(dict(step=0, energy_kept=energy))
        start_loss = evaluate(model, val_data, windows, c, world, stop_signal)
        log.evaluation(0, start_loss, start_loss * bits_per_byte)
        log.start_clock(0)

    def save() -> None:
        if world.rank == 0:
            state.update(seconds=log.seconds, wandb_id=log.wandb_id)
            tensors = dict(model=model.state_dict(), scaler=scaler.state_dict())
            tensors["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            checkpoint.save(run, tensors, state, tokenizer)

    # Training. `step` counts finished updates. The log's clock stands still while we evaluate and save.
    while (step := state["step"]) < last_step:
        if state["stage"]:
            if step and due(step, c.eval_interval):  # after saving, so that a resume judges again, and alike
                judge(model, windows, c, world, state, log)
            train_data, val_data = open_data(c, state["stage"])
            log.length_share = train_data.tokens / c.gpt.block_size
        rate = optim.set_learning_rate(optimizers, step, at_stage(c, state["stage"]))
        seed_dropout(c.seed, step, world.rank)
        if guiding:
            structured.set_guides(model, step, guided_steps, c.seed)
        batches = micro_batches(train_data, c, step % new_steps, micro_steps, world)
        loss, norm = train_step(parallel, batches, micro_steps, optimizers, scaler, guard, c, world)
        state["step"] = step = step + 1

        asked = world.any_signal(stop_signal)
        ending = step == last_step or asked is not None
        evaluating = asked is None and (step == last_step or (due(step, c.eval_interval) and not state["stage"]))
        unguided_from_here = step == guided_steps
        saving = ending or unguided_from_here or due(step, c.save_interval)
        if log.first or evaluating or saving or due(step, c.log_interval):
            log.step(step, loss.item(), norm.item(), rate, guard)  # here, and only here, the host waits for the device
            guard.stop_if_lost(step)
        if unguided_from_here:
            structured.drop_guides(model, optimizers)
        if saving:  # before the evaluation, which may take long and be cut short
            save()
        if evaluating:
            val_loss = evaluate(model, val_data, windows, c, world, stop_signal)  # nan where a signal cut it short
            asked = world.any_signal(stop_signal)
            better = val_loss < (state["best_val_loss"] or math.inf)
            if asked is None:
                extra = copy_report(model, val_data, c, world, state["stage"]) if state["stage"] else {}
                log.evaluation(step, val_loss, val_loss * bits_per_byte, extra)
            if (better or asked is not None) and not saving:
                save()
            if better:
                state["best_val_loss"] = val_loss
                if world.rank == 0:
                    checkpoint.mark_best(run, step, val_loss)
        if unguided_from_here and not ending:  # as a resume from here would
            del parallel, model, optimizers
            folder, guiding = world.from_rank_0(lambda: checkpoint.newest(run)[0]), False
            model, optimizers, scaler, _ = build(c, folder, guiding, world)
            parallel = compile_and_wrap(model, c, world)
        if evaluating or saving:
            log.start_clock(step)
        if asked is not None:
            log.say(f"{asked}: saved step {step} in {run}; the same command with --resume goes on from there")
            break
    log.close(state["best_val_loss"])
    world.leave()


def plan_guide(c: TrainConfig) -> tuple[TrainConfig, int, int]:
    """The options, of more steps with self_guided = 'flops'; the guided steps; the steps until the data begins anew."""
    if c.self_guided != "flops":
        return c, round(c.self_guided * c.max_steps), c.max_steps
    with torch.device("meta"):
        low, dense = GPT(c.gpt), GPT(dataclasses.replace(c.gpt, lowdim=LowDim()))
    flops = [dense.flops_per_token(), low.flops_per_token(), structured.guide_flops(low)]
    ratio = structured.fixed_flop_ratio(*flops)
    if not 0 < ratio <= 1:
        raise UserError(f"self_guided is flops, but would be {ratio:.2f} of the steps, wanted above 0, at most 1")
    guided_steps = round(ratio * c.max_steps)
    return dataclasses.replace(c, max_steps=c.max_steps + guided_steps), guided_steps, c.max_steps


def build(
    c: TrainConfig, folder: Path | None, guided: bool, world: World, tokenizer: dict[str, Any] | None = None
) -> tuple[GPT, list[torch.optim.Optimizer], torch.amp.GradScaler, dict[str, float]]:
    """Model, optimizers and scaler: new, or as the checkpoint in `folder` has them, guided or not.

    A new one may begin with another run's weights, for which `tokenizer` is wanted; the energy they keep comes last.
    """
    energy: dict[str, float] = {}
    with torch.device(world.device if world.device.type == "cuda" else "cpu"):
        model = new_model(c.model, c.gpt, c.recurrent, c.seed if folder is None else None)
    model.to(world.device)
    if folder is None and c.init_from is not None:
        energy = checkpoint.start_from(Path(c.init_from), model, tokenizer)
    if guided:
        structured.add_guides(model)
    optimizers = optim.make_optimizers(model, c)
    scaler = torch.amp.GradScaler(world.device.type, enabled=c.dtype == "float16")
    if folder is not None:
        restore(folder, model, optimizers, scaler)
    return model, optimizers, scaler, energy


class Guard:
    """Counts the steps with a loss or gradient that is not finite. The counters live on the device."""

    def __init__(self, device: torch.device) -> None:
        self.skipped, self.in_a_row, self.longest = torch.zeros(3, dtype=torch.int32, device=device)

    def count(self, bad: Tensor) -> Tensor:
        """bad is a boolean on the device -> 1.0 where the optimizer is to skip this step, else 0.0."""
        self.skipped += bad
        self.in_a_row.add_(1).mul_(bad)
        torch.maximum(self.longest, self.in_a_row, out=self.longest)
        return bad.float()

    def stop_if_lost(self, step: int) -> None:
        if self.longest >= MAX_BAD_STEPS:
            raise UserError(
                f"{self.longest.item()} steps in a row, seen at step {step}, had a loss or gradient that is not finite;"
                " none of them reached the weights. Try a lower learning_rate, or --resume from the last checkpoint"
            )


def train_step(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
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
        # DDP decides in forward whether this backward will communicate: only the last one needs to.
        silent = world.size > 1 and micro_step < micro_steps - 1
        with model.no_sync() if silent else contextlib.nullcontext():
            with hardware.autocast(world.device, c.dtype):
                loss = model(x, y) / micro_steps
            scaler.scale(loss).backward()
        total += loss.detach()
    total = world.mean(total)
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip or math.inf)
    bad = guard.count(~(total.isfinite() & norm.isfinite()))
    for optimizer in optimizers:
        optimizer.found_inf = bad
        optimizer.step()  # not scaler.step, which would put its own verdict in the place of ours
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return total, norm


@torch.no_grad()
def evaluate(
    model: GPT, corpus: data.Corpus, windows: Any, c: TrainConfig, world: World, stop_signal: list[str]
) -> float:
    """Mean loss over the same windows every time, shared by all ranks: summed, then divided; nan after a signal."""
    model.eval()
    mine = windows[world.rank :: world.size]
    total = torch.zeros((), device=world.device)
    for start in range(0, -(-len(windows) // world.size), c.batch_size):  # as often on every rank
        if world.any_signal(stop_signal):
            model.train()
            return math.nan
        chunk = mine[start : start + c.batch_size]
        if len(chunk) == 0:
            continue
        x, y = (t.to(world.device) for t in data.eval_batch(corpus, c.gpt.block_size, chunk))
        # A last, smaller batch is not worth another compilation.
        stance = torch.compiler.set_stance("default" if len(chunk) == c.batch_size else "force_eager")
        with stance, hardware.autocast(world.device, c.dtype):
            total += model(x, y) * len(chunk)
    model.train()
    return (world.mean(total) * world.size / len(windows)).item()


def open_data(c: TrainConfig, stage: dict[str, float] | None) -> tuple[data.Corpus | Copying, data.Corpus | Copying]:
    """What to train on, and what to validate with: splits of a corpus, or a generated task at its stage."""
    if stage is None:
        return data.open_corpus(c.dataset, "train"), data.open_corpus(c.dataset, "val")
    return copying.open_task(c, "train", stage["noise"]), copying.open_task(c, "val", stage["noise"])


def at_stage(c: TrainConfig, stage: dict[str, float] | None) -> TrainConfig:
    """The options with the learning rate of a stage of the curriculum."""
    if stage is None:
        return c
    return dataclasses.replace(c, learning_rate=c.learning_rate * stage["rate"], min_lr=c.min_lr * stage["rate"])


def judge(model: GPT, windows: Any, c: TrainConfig, world: World, state: dict[str, Any], log: "Log") -> None:
    """Evaluate a generated task, and put its next stage in the state. No signal cuts this short: it decides."""
    val_data = open_data(c, state["stage"])[1]
    loss = evaluate(model, val_data, windows, c, world, [])
    log.evaluation(state["step"], loss, loss / math.log(2), copy_report(model, val_data, c, world, state["stage"]))
    state["stage"] = copying.next_stage(c.task, state["stage"], loss)
    log.start_clock(state["step"])


def copy_report(
    model: GPT, val_data: Copying, c: TrainConfig, world: World, stage: dict[str, float]
) -> dict[str, float]:
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
        yield tuple(t.to(world.device, non_blocking=True) for t in batch)


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


def with_vocabulary(c: TrainConfig, *corpora: data.Corpus) -> TrainConfig:
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
    sequences, rest = divmod(c.tokens_per_step or a_pass, c.gpt.block_size)
    batch_size = min(c.batch_size, sequences // world.size) if world.size > 1 else c.batch_size
    if rest or batch_size == 0 or sequences == 0 or sequences % (batch_size * world.size):
        raise UserError(
            f"tokens_per_step is {c.tokens_per_step}, wanted a multiple of batch_size x block_size x ranks ="
            f" {c.batch_size} x {c.gpt.block_size} x {world.size} = {a_pass}, for example"
            f" {max(1, round(c.tokens_per_step / a_pass)) * a_pass}"
        )
    return dataclasses.replace(c, batch_size=batch_size), sequences // (batch_size * world.size)


def prepare_run(run: Path, resume: str, state: dict[str, Any]) -> tuple[Path | None, dict[str, Any]]:
    """Make the run's folder -> the checkpoint to go on from and its manifest, or None for a new run.

    Never overwrites an earlier run: that one is moved aside. Raises UserError where there is nothing to resume, or the
    checkpoint is of another model, other data, another seed or optimizer.
    """
    if run.resolve() == Path.cwd().resolve():
        raise UserError(f"out_dir is {str(run)!r}, wanted a folder of its own, such as out/run")
    folder, manifest, complaints = checkpoint.newest(run)
    if folder is None and (resume == "must" or (resume == "auto" and complaints)):
        raise UserError("; ".join(complaints) or f"nothing to resume: {run} holds no checkpoint; leave --resume out")
    if resume != "never" and folder is not None:
        for complaint in complaints:
            print(f"warning: {complaint}; passed over")
        changed = checkpoint.differences(*map(checkpoint.model_options, (manifest["options"], state["options"])))
        changed += checkpoint.differences(manifest["order"], state["order"])
        if changed:
            raise UserError(f"{folder} is of another run. " + "; ".join(changed))
    try:
        if resume == "never" and ((run / "log.jsonl").exists() or (run / "ckpt").exists()):
            number = next(n for n in itertools.count(1) if not Path(f"{run}.{n}").exists())
            run.rename(f"{run}.{number}")
            print(f"an earlier run in {run} was moved to {run}.{number}")
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.json").write_text(json.dumps(state["options"], indent=1))
    except OSError as error:
        raise UserError(f"cannot write to out_dir {run}: {error.strerror}") from None
    return (None, {}) if resume == "never" else (folder, manifest)


def restore(folder: Path, model: GPT, optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler) -> None:
    """Weights and moments as they were; decay, betas and the like as this run's options have them."""
    model.load_state_dict(checkpoint.load_tensors(folder, "model"))
    for optimizer, saved in zip(optimizers, checkpoint.load_tensors(folder, "optimizers"), strict=True):
        options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(saved)
        for group, wanted in zip(optimizer.param_groups, options):
            group.update(wanted)
    scaler.load_state_dict(checkpoint.load_tensors(folder, "scaler"))


def compile_and_wrap(model: GPT, c: TrainConfig, world: World) -> nn.Module:
    """Recompute and compile in place, so that parameters keep their names, then DDP where there are several ranks."""
    for block in model.transformer.h:
        block.recompute = c.recompute
    mode = hardware.choose_compile(c.compile, world.device)
    for module in {"off": [], "model": [model], "block": model.transformer.h}[mode]:
        module.compile(dynamic=False)
    if world.size == 1:
        return model
    guided = any(isinstance(module, structured.Guided) for module in model.modules())  # and not in every step
    devices = [world.device] if world.device.type == "cuda" else None
    return DDP(model, device_ids=devices, gradient_as_bucket_view=True, find_unused_parameters=guided)


class Log:
    """What a run tells: lines on the terminal, log.jsonl, and wandb when asked. Ranks other than 0 are silent."""

    def __init__(
        self,
        run: Path,
        c: TrainConfig,
        state: dict[str, Any],
        model: GPT,
        tokens_per_step: int,
        last_step: int,
        world: World,
    ) -> None:
        self.silent = world.rank != 0
        self.first, self.seconds, self.wandb_id, self.wandb = True, state["seconds"], state["wandb_id"], None
        self.max_steps, self.last_step, self.tokens_per_step = c.max_steps, last_step, tokens_per_step
        self.length_share = 1.0  # of block_size: how long the sequences of this stage of a generated task are
        rate = hardware.matmul_rate(world.device, c.dtype)  # on all ranks at once: they may share a machine
        self.matmul_rate = world.size * world.mean(torch.tensor(rate, device=world.device)).item()
        if not self.silent:
            self.flops_per_token = 3 * model.flops_per_token()  # backward takes twice the forward pass
            try:
                self.open(run, state, model, world)
            except OSError as error:
                raise UserError(f"cannot write {run / 'log.jsonl'}: {error.strerror}") from None
            if c.wandb:
                self.open_wandb(run, state)
        self.start_clock(state["step"])

    def open(self, run: Path, state: dict[str, Any], model: GPT, world: World) -> None:
        """Start log.jsonl, or on a resume drop what a crashed run wrote after its checkpoint, and tell the setting."""
        path, kept = run / "log.jsonl", []
        if state["step"] > 0 and path.exists():
            kept = [line for line in path.read_text().splitlines(keepends=True) if logged_by(line, state["step"])]
        path.with_suffix(".tmp").write_text("".join(kept))
        path.with_suffix(".tmp").replace(path)
        self.file = open(path, "a", buffering=1)  # noqa: SIM115 (stays open; a line at a time reaches the disk)
        versions = dict(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda)
        on, dtype = hardware.describe(world.device), state["options"]["dtype"]
        self.write(
            dict(step=state["step"], versions=versions, device=on, ranks=world.size, matmul_flops=self.matmul_rate)
            | dict(options=state["options"], parameters=str(model).splitlines())
        )
        rate = f"{self.matmul_rate / 1e12:.3g} TFLOP/s in large {dtype} products"
        self.say(f"torch {torch.__version__} on {on}: {rate}\n")

    def open_wandb(self, run: Path, state: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("--wandb needs its package: pip install 'wandb>=0.19,<1'") from None
        self.wandb = wandb.init(
            project="lpa", name=run.name, id=self.wandb_id, resume="allow", dir=run, config=state["options"]
        )
        self.wandb.define_metric("*", step_metric="step")
        self.wandb_id = self.wandb.id

    def start_clock(self, step: int) -> None:
        self.clock, self.clock_step = time.perf_counter(), step

    def say(self, text: str) -> None:
        if not self.silent:
            print(text, flush=True)

    def write(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                record[name] = None  # JSON has no nan
        if not self.silent:
            self.file.write(json.dumps(record) + "\n")
        if self.wandb:
            self.wandb.log(record)

    def step(self, step: int, loss: float, norm: float, learning_rate: float, guard: Guard) -> None:
        """The steps since the clock started, as a line; loss and norm are those of the last of them."""
        now, self.first = time.perf_counter(), False
        self.seconds += now - self.clock
        if self.silent:
            return
        tokens_per_step = self.tokens_per_step * self.length_share
        speed = (step - self.clock_step) * tokens_per_step / (now - self.clock)
        mfu = speed * self.flops_per_token / self.matmul_rate
        minutes, seconds = divmod(int((self.last_step - step) * tokens_per_step / speed), 60)
        skipped = f" | {guard.skipped.item()} skipped" if guard.skipped else ""
        self.say(
            f"step {step}/{self.max_steps} | loss {loss:.4f} | lr {learning_rate:.2e} | norm {norm:.2f}"
            f" | {speed:,.0f} tok/s | mfu {mfu:.1%} | {minutes // 60}h{minutes % 60:02}m{seconds:02}s left{skipped}"
        )
        self.write(
            dict(step=step, tokens=step * self.tokens_per_step, loss=loss, lr=learning_rate, grad_norm=norm)
            | dict(tokens_per_second=speed, mfu=mfu, seconds=self.seconds, skipped=guard.skipped.item())
        )
        self.start_clock(step)

    def evaluation(
        self, step: int, val_loss: float, bits_per_byte: float, extra: dict[str, float | None] | None = None
    ) -> None:
        """extra: what else was measured, by name."""
        told = "".join(f", {name} {value:.4g}" for name, value in (extra or {}).items() if value is not None)
        self.say(f"step {step}: val loss {val_loss:.4f}, {bits_per_byte:.4f} bits per byte{told}")
        self.write(dict(step=step, val_loss=val_loss, val_bits_per_byte=bits_per_byte) | (extra or {}))

    def close(self, best_val_loss: float | None) -> None:
        best = f"best val loss {best_val_loss:.4f}, " if best_val_loss is not None else ""
        self.say(f"{best}{self.seconds:.0f} s of training")
        if self.wandb:
            self.wandb.finish()


def logged_by(line: str, step: int) -> bool:
    """Whether a line of log.jsonl is whole and not later than this step."""
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


if __name__ == "__main__":
    with user_errors():
        main(load_config(sys.argv[1:], description=__doc__))
