"""Define the training options, and read them from presets and the command line, which comes last.

A preset is a Python file of plain assignments. `load_config(["config/lpa_370m.py", "--max_steps=100"])` reads the
presets from left to right, puts what they assign in front of the user's own arguments, and lets one parser check both.
"""

import contextlib
import dataclasses
import difflib
import io
import math
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import tyro

from model import GPTConfig

T = TypeVar("T")
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class UserError(Exception):
    """An error that the user can correct, in one line. Scripts print it without a traceback and exit with code 2."""

    def __str__(self) -> str:
        return " ".join(super().__str__().split("\n"))  # a value in it, or another error's text, may have several


@dataclass(frozen=True)
class TrainConfig:
    """The options of train.py. The model's options (GPTConfig) are flags of the same command line."""

    gpt: Annotated[GPTConfig, tyro.conf.arg(name="")]

    # Data. A step sees tokens_per_step tokens for any number of processes; gradient accumulation follows from it.
    dataset: str = "pystdlib"
    """A corpus below data/, a folder with meta.json and shards, or token files of llm.c, modded-nanogpt or nanoGPT
    (taken for GPT-2's)."""
    batch_size: int = 8
    """Sequences per process and micro-step; fewer if tokens_per_step does not give each process so many."""
    tokens_per_step: int | None = None
    """Tokens per optimizer step over all processes; None = one micro-step on each."""

    # Schedule
    max_steps: int = 1000
    """Optimizer steps of the whole schedule."""
    stop_step: int | None = None
    """Stop early after this step, under an unchanged schedule."""
    learning_rate: float = 1e-3
    """The peak, reached after warmup_steps."""
    min_lr: float = 0.0
    """Where the schedule ends."""
    warmup_steps: int = 0
    schedule: Literal["cosine", "wsd"] = "cosine"
    """cosine, or warm-up, stable, decay: constant, then linear to min_lr over the last decay_share."""
    decay_share: float = 0.2
    """Share of max_steps in which 'wsd' decays."""

    # Optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: for the matrices inside the blocks, with adamw for the rest."""
    weight_decay: float = 0.0
    """Decoupled decay of the matrices; factors take half of it each, so that their product decays like a matrix."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0
    """Largest gradient norm; 0 = no clipping."""

    # Machine
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Dtype = "float32"
    """Of matrix products, under autocast; weights and optimizer state are float32. auto = bfloat16 where this machine
    multiplies it faster."""
    compile: Literal["auto", "off", "model", "block"] = "auto"
    """torch.compile of the whole model or of one block; auto = see hardware.choose_compile."""
    recompute: Literal["none", "elementwise", "latents", "block"] = "none"
    """What backward computes again to save memory (lpa/recompute.py). elementwise: all but matrix products and
    attention; latents: also the products with B; block: whole blocks, a third slower."""
    shard: bool = False
    """Shard weights, gradients and optimizer state over the processes (FSDP)."""
    hang_timeout: float = 1800.0
    """Seconds that a process waits for the others; then all end, and the missing one is named."""

    # Run
    out_dir: str = "out/run"
    init_from: str | None = None
    """Start from the weights of this run, or of a Llama or GPT-2, a Hugging Face folder or a name on the hub; where a
    matrix is dense there and low-rank here, from its truncated SVD."""
    seed: int = 1
    eval_interval: int = 250
    """Steps between evaluations; 0 = only at the end."""
    eval_tokens: int | None = None
    """Validation tokens an evaluation reads, always the same ones; None = the whole split."""
    log_interval: int = 10
    save_interval: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    resume: Literal["never", "auto", "must"] = "never"
    """auto = resume if out_dir holds a checkpoint; --resume without a value means must."""
    max_hours: float | None = None
    """Save and stop after this time, as after a SIGTERM."""
    sample_interval: int = 0
    """Steps between samples of text, written to log.jsonl; 0 = none."""
    wandb: bool = False

    def __post_init__(self) -> None:
        positive = ("batch_size", "max_steps", "learning_rate", "eps", "log_interval", "save_interval", "hang_timeout")
        for name in (*positive, "tokens_per_step", "stop_step", "eval_tokens", "max_hours"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:  # nan is neither
                raise ValueError(f"{name} is {value}, wanted above 0")
        zero_or_more = ("min_lr", "warmup_steps", "weight_decay", "grad_clip", "eval_interval", "seed")
        for name in (*zero_or_more, "sample_interval"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted 0 or more")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted at least 0 and below 1")
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr is {self.min_lr}, wanted at most learning_rate = {self.learning_rate}")
        if self.init_from is not None and Path(self.init_from).resolve() == Path(self.out_dir).resolve():
            raise ValueError(f"init_from is {self.init_from}, wanted another folder than out_dir")
        if self.shard:
            if self.sample_interval:
                raise ValueError(f"sample_interval is {self.sample_interval}, wanted 0 with shard")
            if self.dtype == "float16":
                raise ValueError("dtype is float16, wanted bfloat16 or float32 with shard")
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"decay_share is {self.decay_share}, wanted above 0 and at most 1")


def load_config(arguments: list[str], options: type[T] = TrainConfig, description: str | None = None) -> T:
    """Return the options of preset files and `--key=value` arguments. Raise UserError where they are wrong."""
    settings: dict[str, Any] = {}
    while arguments and arguments[0].endswith(".py"):
        settings |= read_preset(arguments[0])
        arguments = arguments[1:]
    return parse([*as_arguments(settings), *arguments], options, description)


def read_preset(path: str) -> dict[str, Any]:
    """Return what a preset assigns, by name; modules and functions that it imports are not options."""
    if not Path(path).is_file():
        presets = ", ".join(sorted(p.stem for p in Path(__file__).parent.glob("[a-z]*.py")))
        raise UserError(f"no preset file {path}; config/ has {presets}")
    try:
        assigned = runpy.run_path(path)
    except (Exception, SystemExit) as error:  # its Python may raise anything
        raise UserError(f"preset {path} fails with {type(error).__name__}: {error}") from None
    return {k: v for k, v in assigned.items() if k[0] != "_" and not isinstance(v, ModuleType) and not callable(v)}


def as_arguments(settings: dict[str, Any], prefix: str = "") -> list[str]:
    """Turn {'n_layer': 2, 'lowdim': {'q': 8}} into ['--n_layer=2', '--lowdim.q=8']."""
    arguments = []
    for name, value in settings.items():
        nested = isinstance(value, dict)
        arguments += as_arguments(value, f"{prefix}{name}.") if nested else [f"--{prefix}{name}={value}"]
    return arguments


def as_command(c: TrainConfig) -> str:
    """Return the options that differ from the defaults, as a command line from which load_config makes c."""

    def flat(c: TrainConfig) -> list[str]:
        options = dataclasses.asdict(c)
        derived = dataclasses.replace(c.gpt, attn_dim=None, n_kv_head=None, ffn_dim=None)
        gpt = options.pop("gpt")
        for name in ("attn_dim", "n_kv_head", "ffn_dim"):  # left out where they follow from the others
            if gpt[name] == getattr(derived, name):
                del gpt[name]
        return as_arguments(gpt | options)

    defaults = flat(TrainConfig(GPTConfig()))
    return shlex.join(argument for argument in flat(c) if argument not in defaults)


def parse(arguments: list[str], options: type[T], description: str | None = None) -> T:
    """Parse with tyro, and accept bare flags (--wandb, --resume) and lower-case booleans. Errors are one line."""
    named = kinds(options)
    flags = {name for name, kind in named.items() if kind is bool}
    bare = {**dict.fromkeys(flags, "True"), "resume": "must"}
    written = []
    for argument, following in zip(arguments, [*arguments[1:], "--"]):
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name in bare and not equals and following.startswith("--"):
            argument = f"--{name}={bare[name]}"
        elif name in flags and value in ("true", "false"):
            argument = f"--{name}={value.title()}"
        written.append(argument)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            style = (tyro.conf.FlagConversionOff,)
            return tyro.cli(options, args=written, description=description, use_underscores=True, config=style)
    except ValueError as error:  # from the __post_init__ of a nested dataclass
        raise UserError(str(error)) from None
    except SystemExit as stop:
        if stop.code == 0:  # --help
            raise
        raise UserError(in_one_line(complaint.getvalue(), named)) from None


def kinds(options: type, prefix: str = "") -> dict[str, Any]:
    """Return the type of each option, nested ones too: {'n_layer': int, 'lowdim.q': int | str, ...}."""
    found: dict[str, Any] = {}
    for option in dataclasses.fields(options):
        kind, *marks = get_args(option.type) if get_origin(option.type) is Annotated else (option.type,)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            flat = any(getattr(mark, "name", None) == "" for mark in marks)
            found |= kinds(kind, prefix if flat else f"{prefix}{option.name}.")
        elif tyro.conf.Positional not in marks:
            found[prefix + option.name] = kind
    return found


def in_one_line(box: str, named: Iterable[str]) -> str:
    """Return the message inside the box that tyro draws, with the names that it or we suggest."""
    lines = [line.strip("│╭╮╰╯─|+ ") for line in box.splitlines()[1:]]
    lines = [line for line in lines if line.strip("-")]
    ends = [i for i, line in enumerate(lines) if line.startswith(("Perhaps", "Argument", "For full"))]
    start = ends[0] if ends else len(lines)
    message = " ".join(lines[:start])
    message = re.sub(r"^Error parsing (?!--)\w+: ", "", message)
    names = [line.split()[0] for line in lines[start:] if line.startswith("--")]
    if ends and lines[start].startswith("Argument helptext"):
        names = []
    if not names and (unknown := re.match(r"Unrecognized options: --([\w.]+)", message)):
        names = [f"--{name}" for name in difflib.get_close_matches(unknown[1], named)]
    if names:
        message += f"; perhaps you meant {' or '.join(names[:3])}"
    return message


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Print a UserError in one line, once per machine, and exit with code 2. Goes around a script's main."""
    try:
        yield
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # each machine may have its own
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
