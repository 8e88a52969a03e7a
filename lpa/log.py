"""Write the log of a run: to the terminal, to out/RUN/log.jsonl, and to wandb if asked; only process 0 does."""

import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from config import TrainConfig, UserError
from data import Corpus
from lpa import counts, cpu, hardware, optim
from lpa.distributed import DistInfo
from model import GPT


class Log:
    def __init__(
        self,
        run: Path,
        c: TrainConfig,
        state: dict[str, Any],
        model: GPT,
        tokens_per_step: int,
        last_step: int,
        info: DistInfo,
        resumed: bool,
    ) -> None:
        self.silent, self.full = info.rank != 0, False
        self.first, self.seconds, self.wandb_id = True, state["seconds"], state["wandb_id"]
        self.wandb: Any = None
        self.run, self.processes, self.device = run, info.world_size, info.device
        self.max_steps, self.last_step, self.tokens_per_step = c.max_steps, last_step, tokens_per_step
        rate = hardware.matmul_rate(info.device, c.dtype)  # on all processes at once: they may share a machine
        self.matmul_rate = info.world_size * info.mean(torch.tensor(rate, device=info.device)).item()
        self.flops_per_token = 3 * model.flops_per_token()  # backward takes twice the forward pass
        self.evaluated, self.sampled = info.run_on_rank_0(lambda: self.open(run, state["step"], resumed))
        if not self.silent:
            setting = self.log_setting(state, model, info)
            if c.wandb:
                self.open_wandb(run, setting)
        self.start_clock(state["step"])

    def open(self, run: Path, step: int, resumed: bool) -> tuple[set[int], set[int]]:
        """Open log.jsonl. On a resume, drop what a crashed run wrote after its checkpoint.

        Return the steps that have an evaluation in it, and those that have a sample.
        """
        path, kept = run / "log.jsonl", []
        try:
            if resumed and path.exists():
                lines = path.read_text(errors="replace").splitlines(keepends=True)
                kept = [line for line in lines if logged_by(line, step)]
            path.with_suffix(".tmp").write_text("".join(kept))
            path.with_suffix(".tmp").replace(path)
            self.file = open(path, "ab", buffering=0)  # noqa: SIM115 (stays open; each line reaches the disk at once)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        records = [json.loads(line) for line in kept]
        evaluated, sampled = ({r["step"] for r in records if name in r} for name in ("val_loss", "sample"))
        return evaluated, sampled

    def log_setting(self, state: dict[str, Any], model: GPT, info: DistInfo) -> dict[str, Any]:
        """Write and return the first record of this start."""
        versions = dict(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda)
        on, dtype = hardware.describe(info.device), state["options"]["dtype"]
        setting: dict[str, Any] = dict(step=state["step"], versions=versions, device=on, processes=info.world_size)
        setting |= dict(matmul_flops=self.matmul_rate, options=state["options"])
        setting |= dict(parameters=counts.table(model).splitlines())
        self.write(setting)
        self.say("\n".join(setting["parameters"]))
        rate = f"{self.matmul_rate / 1e12:.3g} TFLOP/s in large {dtype} products"
        self.say(f"torch {torch.__version__} on {on}: {rate}\n")
        return setting

    def open_wandb(self, run: Path, setting: dict[str, Any]) -> None:
        """Start wandb with the options, the parameter table, the versions and the number of processes as its config."""
        try:
            import wandb
        except ImportError:
            raise UserError("--wandb needs its package: pip install 'wandb>=0.19,<1'") from None
        config = setting["options"] | {name: setting[name] for name in ("parameters", "versions", "processes")}
        options: dict[str, Any] = dict(project="lpa", name=run.name, id=self.wandb_id, resume="allow", dir=run)
        try:
            self.wandb = wandb.init(**options, config=config)
        except wandb.Error as error:  # no account, no network
            raise UserError(f"wandb did not start; WANDB_MODE=offline needs no account: {error}") from None
        self.wandb.define_metric("*", step_metric="step")
        self.wandb_id = self.wandb.id

    def start(
        self,
        c: TrainConfig,
        asked: str,
        optimizers: list[torch.optim.Optimizer],
        train_data: Corpus,
        val_data: Corpus,
        micro_steps: int,
        folder: Path | None,
    ) -> None:
        """Print what will be trained, how, and on what. folder: the checkpoint it continues from."""
        self.say(f"{optim.describe(optimizers)}\noptions: {asked}")
        if warning := optim.late_warm_up(c):
            self.warn(warning)
        epochs = c.max_steps * self.tokens_per_step / train_data.tokens
        self.say(
            f"data: {train_data.tokens:,} training tokens of {c.dataset}, {val_data.tokens:,} to validate;"
            f" {c.max_steps:,} steps are {epochs:.3g} epochs"
        )
        self.say(f"tokenizer: {train_data.meta['tokenizer'].get('name', train_data.meta['tokenizer']['kind'])}")
        self.say(
            f"a step: {self.tokens_per_step:,} tokens = {c.batch_size} sequences x {c.gpt.block_size} tokens"
            f" x {self.processes} processes x {micro_steps} micro-steps"
        )
        if self.device.type == "cpu":
            self.say(cpu.install(c))  # what parallelize has installed
        step = self.clock_step
        done = f": no step is left of {self.last_step:,}" if step >= self.last_step else ""
        self.say(f"continuing from {folder}{done}" if folder else f"writing to {self.run}")

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
            try:
                self.file.write(json.dumps(record).encode() + b"\n")
            except OSError as error:  # a full disk is no reason to lose the run
                if not self.full:
                    self.warn(f"cannot write log.jsonl: {error.strerror}; the run continues")
                self.full = True
        if self.wandb:
            self.wandb.log(record)

    def step(
        self, step: int, tokens: int, loss: float, norm: float, learning_rate: float, counts: dict[str, int]
    ) -> None:
        """Log the steps since the clock started; loss and norm are those of the last of them.

        tokens: what all steps so far have read. counts: how many of all steps were skipped, and clipped.
        """
        now, self.first = time.perf_counter(), False
        self.seconds += now - self.clock
        if self.silent:
            return
        speed = (step - self.clock_step) * self.tokens_per_step / (now - self.clock)
        self.matmul_rate = max(self.matmul_rate, speed * self.flops_per_token)  # a busy start measures too low a rate
        mfu = speed * self.flops_per_token / self.matmul_rate
        minutes, seconds = divmod(int((self.last_step - step) * self.tokens_per_step / speed), 60)
        skipped = f" | {counts['skipped']} skipped" if counts["skipped"] else ""
        self.say(
            f"step {step}/{self.max_steps} | loss {loss:.4f} | lr {learning_rate:.2e} | norm {norm:.2f}"
            f" | {speed:,.0f} tok/s | mfu {mfu:.1%} | {minutes // 60}h{minutes % 60:02}m{seconds:02}s left{skipped}"
        )
        self.write(
            dict(step=step, tokens=tokens, loss=loss, lr=learning_rate, grad_norm=norm)
            | dict(tokens_per_second=speed, mfu=mfu, seconds=self.seconds)
            | counts
        )
        self.start_clock(step)

    def evaluation(self, step: int, val_loss: float, bits_per_byte: float, extra: dict[str, Any] | None = None) -> None:
        """Log an evaluation, unless an earlier start of this run did. extra: what else was measured, by name."""
        if step in self.evaluated:
            return
        extra = extra or {}
        also = "".join(f", {name} {value:.4g}" for name, value in extra.items() if value is not None)
        self.say(f"step {step}: val loss {val_loss:.4f}, {bits_per_byte:.4f} bits per byte{also}")
        self.write(dict(step=step, val_loss=val_loss, val_bits_per_byte=bits_per_byte) | extra)

    def sample(self, step: int, text: str) -> None:
        self.say(f"step {step} writes: {text!r}")
        self.write(dict(step=step, sample=text))

    def warn(self, text: str) -> None:
        if not self.silent:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def close(self, best_val_loss: float | None) -> None:
        best = f"best val loss {best_val_loss:.4f}, " if best_val_loss is not None else ""
        self.say(f"{best}{self.seconds:.0f} s of training")
        if not self.silent:
            self.file.close()
        if self.wandb:
            self.wandb.finish()


def logged_by(line: str, step: int) -> bool:
    """Say whether a line of log.jsonl is whole and not later than this step."""
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False
