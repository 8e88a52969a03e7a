"""The recurrent transformer against the plain one: what it learns, and what a longer text costs.

    python -m experiments.recurrent lengths                  time and memory from 1K to 64K tokens, with a picture
    python -m experiments.recurrent copy_small               minutes on 2 cores; --seeds=3
    python -m experiments.recurrent selective_copy_small
    python -m experiments.recurrent shakespeare              a GPU, as the two that follow
    python -m experiments.recurrent copy
    python -m experiments.recurrent selective_copy

Writes results/recurrent_WHAT.md, or with --only or --flags a file that is named by them too. Runs go below
out/recurrent/; one that is there is not repeated, one that was stopped goes on, one of other options is an error.
`lengths` trains on one sequence at a time: the seconds are those of forward and backward, the memory is what a forward
pass leaves alive for backward; in generation all that is alive between two tokens.
"""

import dataclasses
import datetime
import itertools
import json
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from recurrent import RecurrentConfig, RecurrentGPT, generate, new_model

from config import TrainConfig, UserError, load_config, parse, user_errors
from experiments import lpa_runs, plot
from lpa import checkpoint, decode, hardware
from lpa.planning import LiveStorages
from model import GPT, GPTConfig

FORGET = ["--alpha=0", "--alpha_learned=false"]
SIX = ["--n_layer=6", "--min_lr=1e-4"]
ARMS: dict[str, dict[str, list[str]]] = {
    "copy_small": {
        "recurrent, alpha learned": ["config/copy_small.py"],
        "recurrent, alpha 0": ["config/copy_small.py", *FORGET],
        "plain, 2 layers": ["config/copy_small.py", "--model=gpt", "--n_layer=2"],
    },
    "selective_copy_small": {
        "recurrent, alpha 0.5": ["config/selective_copy_small.py"],
        "plain, 2 layers": ["config/selective_copy_small.py", "--model=gpt", "--n_layer=2"],
    },
    "copy": {"recurrent, alpha learned": ["config/copy.py"], "plain, 2 layers": ["config/copy_gpt.py"]},
    "selective_copy": {
        "recurrent, alpha 0.5": ["config/selective_copy.py"],
        "plain, 2 layers": ["config/selective_copy_gpt.py"],
    },
    "shakespeare": {
        "recurrent, 1 layer": ["config/recurrent_shakespeare.py"],
        "plain, 1 layer": ["config/gpt_shakespeare.py"],
        "plain, 6 layers": ["config/gpt_shakespeare.py", *SIX],
    },
}


@dataclass(frozen=True)
class Options:
    what: tyro.conf.Positional[
        Literal["lengths", "copy_small", "selective_copy_small", "copy", "selective_copy", "shakespeare"]
    ]
    seeds: int = 1
    only: str = ""
    """Train only the models whose name holds this, such as --only=recurrent."""
    flags: str = ""
    """More arguments of train.py for every run, such as --flags="--task.noise=512 --block_size=544"."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
    """Tokens of a sequence."""
    plain_up_to: int = 8192
    """The longest sequence that the plain transformer is given: its time grows as the square."""
    width: int = 64
    window: int = 64
    seconds: float = 1.0
    """To time each case in each round, at least one run."""
    rounds: int = 3
    """The lengths take turns, so that a slow minute of the machine meets all of them; the least time counts."""
    results: Path = Path("results")

    def __post_init__(self) -> None:
        if min(self.seeds, self.rounds) < 1 or not self.lengths or min(self.lengths) < 2 * self.window:
            raise ValueError("wanted a seed and round or more, and lengths of at least two windows")
        if self.what != "lengths" and not any(self.only in name for name in ARMS[self.what]):
            raise ValueError(f"only is {self.only!r}, wanted a part of one of: {'; '.join(ARMS[self.what])}")


def main(o: Options) -> None:
    lines = measure_lengths(o) if o.what == "lengths" else compare(o)
    on = hardware.describe(hardware.choose_device(o.device))
    head = [f"# The recurrent transformer: {o.what.replace('_', ' ')}\n"]
    head.append(f"torch {torch.__version__}, {on}, {datetime.date.today()}.")
    head.append(f"Command: `python -m experiments.recurrent {shlex.join(sys.argv[1:])}`\n")
    text = "\n".join([*head, *lines]) + "\n"
    o.results.mkdir(parents=True, exist_ok=True)
    name = "_".join(["recurrent", o.what, *re.findall(r"\w+", f"{o.only} {o.flags}")])
    (o.results / f"{name}.md").write_text(text)
    print(text)


# --- What is learned -----------------------------------------------------------------------------------------------


def compare(o: Options) -> list[str]:
    """A row for each model: the last evaluation of its runs, the mean over seeds."""
    lines = ["| model | parameters | FLOPs a token, forward | kept for backward, bytes a token | steps | training s |"]
    last = ["best_val_loss"] if o.what == "shakespeare" else ["token_accuracy", "sequence_accuracy"]
    lines[-1] += " val loss |" + (" best val loss |" if o.what == "shakespeare" else " tokens right | all right |")
    lines.append("|---" * lines[-1].count(" |") + "|")
    for name, arguments in ((name, arguments) for name, arguments in ARMS[o.what].items() if o.only in name):
        runs = [trained(o, name, arguments, seed) for seed in range(1, o.seeds + 1)]
        c = load_config([*arguments, *shlex.split(o.flags)])
        model = new_model(c.model, c.gpt, c.recurrent, c.seed)
        kept = kept_for_backward(model, c.gpt.block_size)
        cells = [name, f"{model.n_params():,}", f"{model.flops_per_token():,}", f"{kept:,.0f}", f"{runs[0]['step']}"]
        cells += [f"{statistics.mean(run['seconds'] for run in runs):.0f}"]
        cells += [shown(runs, figure) for figure in ("val_loss", *last)]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, f"\nSeeds: {o.seeds}; of several the mean, and in brackets each."]


def shown(runs: list[dict[str, Any]], name: str) -> str:
    values = [run[name] for run in runs if name in run]
    if not values:
        return "–"
    each = f" ({', '.join(f'{value:.4f}' for value in values)})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{each}"


def trained(o: Options, name: str, arguments: list[str], seed: int) -> dict[str, Any]:
    """The last evaluation of a run and its seconds of training, run by train.py unless it is there.

    Raises UserError where the folder is of other options, such as those that the preset had before, or did not finish.
    """
    words = "_".join(re.findall(r"\w+", f"{name} {o.flags}"))
    out = Path("out/recurrent") / f"{o.what}_{words}_{seed}"
    flags = [*shlex.split(o.flags), f"--seed={seed}", f"--out_dir={out}", f"--device={o.device}", "--resume=auto"]
    c = load_config([*arguments, *flags])
    if changed := other_options(out, c):
        raise UserError(f"{out} is of another run ({'; '.join(changed)}): move it away")
    if last_evaluation(out, c.max_steps) is None:
        script = str(Path(__file__).parent.parent / "train.py")
        subprocess.run([sys.executable, script, *arguments, *flags])
    found = last_evaluation(out, c.max_steps)
    if found is None:
        raise UserError(f"{out} did not finish; the same command goes on")
    return found


def other_options(out: Path, c: TrainConfig) -> list[str]:
    """What the first record of a run's log has otherwise, but for what train.py fills in by itself."""
    if not (out / "log.jsonl").exists():
        return []
    with open(out / "log.jsonl") as log:
        saved = json.loads(log.readline())["options"]
    wanted = dataclasses.asdict(c)
    wanted["dtype"] = saved["dtype"] if c.dtype == "auto" else c.dtype
    wanted["gpt"]["vocab_size"] = c.gpt.vocab_size or saved["gpt"]["vocab_size"]
    return checkpoint.differences(lpa_runs.comparable(saved), lpa_runs.comparable(wanted))


def last_evaluation(out: Path, steps: int) -> dict[str, Any] | None:
    if not (out / "log.jsonl").exists():
        return None
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if line.get("val_loss") is not None]
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    if not evaluations or evaluations[-1]["step"] != steps or not seconds:
        return None
    best = min(line["val_loss"] for line in evaluations)
    return evaluations[-1] | dict(seconds=seconds[-1], best_val_loss=best)


# --- What a longer text costs --------------------------------------------------------------------------------------


@dataclass
class Cost:
    """Of one model at one length T."""

    train_us: float
    """Microseconds of forward and backward, a token."""
    train_bytes: float
    """What a forward pass leaves alive, a token."""
    generate_us: float
    """Microseconds of the next token after T."""
    generate_bytes: int
    """What is alive between two tokens of a text; of a plain model its keys and values alone."""


def measure_lengths(o: Options) -> list[str]:
    device = hardware.choose_device(o.device)
    if device.type == "cpu":
        hardware.keep_freed_memory()  # as train.py does
    longest = max(o.lengths)
    shape = dict(n_layer=1, n_head=4, n_embd=o.width, vocab_size=128, pos="rope", norm="layernorm", mlp="gelu")
    c = GPTConfig(**shape, block_size=longest + o.window)
    with device:
        models: dict[str, GPT] = {
            f"recurrent, alpha {alpha:g}": RecurrentGPT(c, RecurrentConfig(o.window, alpha, False))
            for alpha in (0.5, 0.0)
        }
        models["plain"] = GPT(c)
    costs: dict[str, dict[int, Cost]] = {name: {} for name in models}
    for _, T, name in itertools.product(range(o.rounds), sorted(o.lengths), models):
        if name != "plain" or o.plain_up_to >= T:
            found = cost(models[name], T, o, device)
            costs[name][T] = found if T not in costs[name] else least(found, costs[name][T])
            told = f"{found.train_us:.1f} µs a token in training, {found.generate_us:.0f} in generation"
            print(f"{name}, {T:,} tokens: {told}", flush=True)
    draw(o, costs)
    lines = [f"One layer of width {o.width}, blocks of {o.window} tokens, float32, one sequence.\n"]
    lines += ["| model | tokens | training, µs a token | kept for backward, bytes a token |", "|---|---|---|---|"]
    lines[-2] += " generation, µs a token | held in generation, bytes |"
    lines[-1] += "---|---|"
    for name, by_length in costs.items():
        for T, x in by_length.items():
            numbers = f"{x.train_us:.2f} | {x.train_bytes:,.0f} | {x.generate_us:.0f} | {x.generate_bytes:,}"
            lines.append(f"| {name} | {T:,} | {numbers} |")
    return [*lines, "\n![time and memory against length](recurrent_lengths.png)"]


def cost(model: GPT, T: int, o: Options, device: torch.device) -> Cost:
    idx = torch.randint(128, (1, T), device=device)

    def step() -> None:
        model(idx, idx).backward()
        model.zero_grad(set_to_none=True)

    seconds, kept = hardware.fastest(step, device, o.seconds), kept_for_backward(model, T)
    model.eval()
    following, held = text_of(model, T, o.window), held_in_generation(model, T, o.window)
    each = hardware.fastest(following, device, o.seconds) / o.window
    model.train()
    return Cost(1e6 * seconds / T, kept, 1e6 * each, held)


def least(a: Cost, b: Cost) -> Cost:
    times = dict(train_us=min(a.train_us, b.train_us), generate_us=min(a.generate_us, b.generate_us))
    return dataclasses.replace(a, **times)


def kept_for_backward(model: GPT, T: int) -> float:
    """Bytes a token that a forward pass over one sequence of T tokens leaves alive."""
    idx = torch.zeros(1, T, dtype=torch.long, device=model.lm_head.weight.device)
    with LiveStorages() as storages:
        loss = model(idx, idx)
    kept = storages.bytes()
    del loss
    return kept / T


@torch.inference_mode()
def text_of(model: GPT, T: int, window: int) -> Callable[[], None]:
    """What reads `window` more tokens, one by one, after T tokens."""
    device = model.lm_head.weight.device
    if isinstance(model, RecurrentGPT):
        text = model.new_state(1)
        for part in torch.randint(128, (1, T - T % window), device=device).split(window, dim=1):
            model(part, cache=text, last=True)
    else:
        text = decode.new_cache(model, 1)
        for values in text.held.values():
            values.normal_()  # what they are costs no time

    @torch.inference_mode()
    def following() -> None:
        if not isinstance(model, RecurrentGPT):  # whose text goes on, a block later each time
            text.length = T
        for _ in range(window):
            model(torch.zeros(1, 1, dtype=torch.long, device=device), cache=text, last=True)

    return following


def held_in_generation(model: GPT, T: int, window: int) -> int:
    """Bytes of all that is alive in `recurrent.generate`, whole blocks of T tokens and one block less a token after."""
    if not isinstance(model, RecurrentGPT):
        return sum(values[..., :T, :].nbytes for values in decode.new_cache(model, 1).held.values())
    prompt = torch.zeros(1, T - T % window, dtype=torch.long, device=model.lm_head.weight.device)
    with LiveStorages() as storages:
        text = generate(model, prompt, window, 128)
        for _ in range(window):
            next(text)
        return storages.bytes()


def draw(o: Options, costs: dict[str, dict[int, Cost]]) -> None:
    """Seconds and bytes of a whole sequence against its length, both on logarithmic axes: slope 1 is linear."""
    figure, (axes,) = plot.new_figure(11, 4.6, columns=2)
    for number, (name, by_length) in enumerate(costs.items()):
        T = list(by_length)
        axes[0].plot(T, [x.train_us * t / 1e6 for t, x in by_length.items()], label=name, **plot.style(number))
        axes[1].plot(T, [x.generate_bytes for x in by_length.values()], label=name, **plot.style(number))
    axes[0].set(ylabel="training: s a sequence, forward and backward")
    axes[1].set(ylabel="generation: bytes held between two tokens")
    for ax in axes:
        ax.set(xscale="log", yscale="log", xlabel="tokens")
    plot.add_legend(figure, axes[0])
    plot.save(figure, o.results / "recurrent_lengths")


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
