"""The training runs of experiments/structured_ffn.py: which there are, training what is missing, tables and pictures.

A run's folder is out/structured_ffn/NAME_HASH, where the hash is that of all its options, so that a part may be stopped
and run again. Attention is dense in all of them, and so is the first block's feed-forward, but for scaling: there it
would be another share of the model at each size.

Shapes: C width, R rank, N points.
"""

import contextlib
import math
import re
import shlex
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from experiments.structured_changes import drawn_by_layer, rates_by_factor, structure_aware, structure_aware_with_rates

import train
from config import TrainConfig, UserError, load_config
from experiments import plot
from experiments.logs import NothingYet, Run, read_run
from model import GPT, LowDim

Kind = Literal["low rank", "block-dense", "block-shuffle"]
NAMES = {2: "63 %", 4: "32 %"}  # as published; of the matrices alone 62.5 % and 31.25 % are left


@dataclass(frozen=True)
class RunOptions:
    preset: str = "config/setting2_cpu.py"
    dataset: str = "pystdlib"
    steps: int = 800
    """train, draws, init: of each run. scaling has as many as give tokens_per_parameter."""
    seeds: int = 1
    kinds: tuple[Kind, ...] = ("low rank", "block-dense", "block-shuffle")
    parts: tuple[int, ...] = (2, 4)
    """R = C over each of these; 2 leaves 63 % of the feed-forward, 4 leaves 32 %. init and draws take the last."""
    rates: tuple[float, ...] = (4e-4, 8e-4, 1.6e-3)
    """init: learning rates; the best of each arm counts."""
    sizes: tuple[int, ...] = (96, 144, 192)
    """scaling: C, with C / 48 layers and as many heads; the rate falls as 1 / C from the preset's."""
    tokens_per_parameter: float = 2.0
    """scaling: of the dense model's blocks; the structured ones of the size see as many. Published: 20."""
    flags: str = ""
    """More arguments of train.py for every run, such as --flags="--dtype=bfloat16 --batch_size=64"."""
    name: str = "train"
    """train: of its results, structured_ffn_NAME, so that one more setting does not replace them."""
    dry_run: bool = False
    """Name the runs and their commands, and which are finished."""

    def __post_init__(self) -> None:
        if min(self.seeds, self.steps, *self.parts, *self.sizes) < 1 or not self.kinds or not self.rates:
            raise ValueError("wanted one seed, step, kind, part, size and rate or more")
        if any(C % 48 for C in self.sizes):
            raise ValueError(f"sizes are {self.sizes}, wanted multiples of 48")


def kind_at(kind: Kind, C: int, part: int) -> int | str:
    """The kind at 1.25 / part of the dense matrices, for a feed-forward of width C and 4 C; block-dense to a row of A.

    With their bias-free matrices C x 4 C and back, R = C / part is low rank's, R = 4 C / (3 part) that of 2 blocks.
    """
    rank = 2 * round(2 * C / (3 * part))
    forms = {"low rank": C // part, "block-dense": f"blockdense:{rank}:2", "block-shuffle": f"blockshuffle:{part}"}
    return forms[kind]


def share(part: int) -> str:
    return NAMES.get(part, f"{125 / part:.0f} %")


# --- Runs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """One run: the arm it counts for, its arguments of train.py, and what it alters in train.py, if anything."""

    arm: str
    arguments: tuple[str, ...]
    change: Callable[[], AbstractContextManager] = contextlib.nullcontext

    @property
    def out(self) -> Path:
        options = replace(load_config(list(self.arguments)), out_dir="")
        words = "_".join(re.findall(r"\w+", self.arm.replace("%", "pc")))
        return Path("out/structured_ffn") / f"{words}_{sha256(repr((self.arm, options)).encode()).hexdigest()[:8]}"


def finished(run: Planned) -> Run | None:
    try:
        log = read_run(run.out)
    except NothingYet:
        return None
    return log if log.finished else None


def trained(run: Planned) -> Run:
    """The log of a run, trained unless it is there. Raises UserError where it was stopped."""
    if finished(run) is None:
        print(f"{run.arm}: {run.out}", flush=True)
        with run.change():
            train.main(load_config([*run.arguments, f"--out_dir={run.out}", "--resume=auto"]))
    log = finished(run)
    if log is None:
        raise UserError(f"{run.out} was stopped; the same command goes on")
    return log


def listing(planned: list[Planned]) -> str:
    lines = []
    for run in planned:
        state = "finished" if finished(run) else "to train"
        altered = "" if run.change is contextlib.nullcontext else f", altered by {run.change.__name__}"
        lines.append(f"{state}  {run.arm}{altered}")
        lines.append(f"          python train.py {shlex.join(run.arguments)} --out_dir={run.out}")
    return "\n".join(lines)


FIRST_DENSE = "--first_ffn_dense=true"


def base(o: RunOptions, steps: int, seed: int) -> list[str]:
    """What the runs have in common. Every step is logged, as a spike of the loss may last a few."""
    flags = [f"--lowdim.{name}=0" for name in "qkvo"] + ["--mlp=gelu"]  # C x 4 C and back, as published
    flags += [f"--dataset={o.dataset}", f"--max_steps={steps}"]
    flags += [f"--seed={seed}", "--eval_interval=0", "--eval_tokens=200000", "--log_interval=1"]
    return [o.preset, *flags, *shlex.split(o.flags)]


def ffn(kind: Kind, C: int, part: int) -> list[str]:
    """Flags that give the feed-forward this kind."""
    return [f"--lowdim.{name}={kind_at(kind, C, part)}" for name in ("up", "down")]


def config(o: RunOptions) -> TrainConfig:
    return load_config(base(o, o.steps, 1))


def setting(o: RunOptions) -> str:
    return f"{o.preset} with dense attention and GELU, {Path(o.dataset).name}, {o.steps} steps, seeds: {o.seeds}"


def seeds(o: RunOptions) -> range:
    return range(1, o.seeds + 1)


def mean(values: list[float], digits: int = 3) -> str:
    """Mean, and over several seeds the standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def by_arm(runs: dict[Planned, Run]) -> dict[str, list[Run]]:
    arms: dict[str, list[Run]] = {}
    for planned, run in runs.items():
        arms.setdefault(planned.arm, []).append(run)
    return arms


def perplexities(runs: list[Run]) -> list[float]:
    return [math.exp(run.evaluations[-1]["val_loss"]) for run in runs]


# --- train: every kind, guided or not ------------------------------------------------------------------------------


def plan_train(o: RunOptions) -> list[Planned]:
    C, arms = config(o).gpt.n_embd, {"dense": []}
    for part in o.parts:
        for kind in o.kinds:
            arms[f"{kind} {share(part)}"] = [*ffn(kind, C, part), FIRST_DENSE]
            arms[f"{kind} {share(part)}, guided"] = [*ffn(kind, C, part), FIRST_DENSE, "--self_guided=0.5"]
    return [Planned(arm, (*base(o, o.steps, s), *flags)) for arm, flags in arms.items() for s in seeds(o)]


def report_train(o: RunOptions, runs: dict[Planned, Run]) -> list[str]:
    lines = [f"{setting(o)}. A spike is a rise, within {3 * window(o)} steps, of"]
    lines += [f"what the training loss, a mean over {window(o)} steps, lies above dense's; the largest of all seeds."]
    lines += ["While it takes part, a guide costs a dense feed-forward more than the FLOPs shown.\n"]
    lines += ["| feed-forward | FLOPs a token, forward | val perplexity | largest spike |", "|---|---|---|---|"]
    arms = by_arm(runs)
    for arm, of_seeds in arms.items():
        spike = max(largest_spike(o, run, dense) for run, dense in zip(of_seeds, arms["dense"]))
        flops = of_seeds[0].flops_per_token // 3
        lines.append(f"| {arm} | {flops:,} | {mean(perplexities(of_seeds))} | {spike:.3f} |")
    draw_train(o, arms)
    return [*lines, "\nOf seed 1, against dense:\n", f"![training loss](structured_ffn_{o.name}.png)"]


def window(o: RunOptions) -> int:
    """Steps over which a curve is smoothed: few, as a wide mean would hide a spike."""
    return max(8, o.steps // 50)


def smoothed(o: RunOptions, run: Run) -> np.ndarray:
    """The running mean of the loss, (steps,)."""
    steps = np.array([record["step"] for record in run.steps], dtype=float)
    return plot.running_mean(steps, np.array([record["loss"] for record in run.steps]), window(o))


def above(o: RunOptions, run: Run, dense: Run) -> np.ndarray:
    """The loss over dense's, (steps,). The two saw the same batches, so what all runs find hard does not show."""
    return smoothed(o, run) - smoothed(o, dense)


def largest_spike(o: RunOptions, run: Run, dense: Run) -> float:
    excess = above(o, run, dense)
    return float(max(excess[i] - excess[max(0, i - 3 * window(o)) : i + 1].min() for i in range(len(excess))))


def draw_train(o: RunOptions, arms: dict[str, list[Run]]) -> None:
    """A panel for each share: every kind with and without its guide, against dense."""
    figure, (axes,) = plot.new_figure(5.2 * len(o.parts), 5.2, columns=len(o.parts), sharey="row")
    for ax, part in zip(axes, o.parts):
        shown = [arm for arm in arms if f" {share(part)}" in arm]
        ax.axhline(0, color="0.5", linewidth=1)
        seen = []
        for number, arm in enumerate(shown):
            losses = above(o, arms[arm][0], arms["dense"][0])
            apart = max(1, len(losses) // 8)  # about eight markers a curve, at other places on each
            look = plot.style(number) | dict(markevery=(number * apart // 3 % apart, apart), linewidth=1.2)
            ax.plot(1 + np.arange(len(losses)), losses, label=arm.replace(f" {share(part)}", ""), **look)
            seen.append(losses[len(losses) // 20 :])
        bottom, top = min(map(np.min, seen)), max(map(np.max, seen))
        ax.set(xlabel="training steps", title=f"{share(part)} of the feed-forward", ylim=(bottom - 0.02, top + 0.02))
    axes[0].set_ylabel(f"training loss above dense's (nats per token)\nmean over {window(o)} steps around each point")
    plot.add_legend(figure, axes[0])
    plot.save(figure, Path(f"results/structured_ffn_{o.name}"))


# --- scaling: loss against training FLOPs --------------------------------------------------------------------------


def plan_scaling(o: RunOptions) -> list[Planned]:
    planned = []
    for C in o.sizes:
        shape = [f"--n_embd={C}", f"--n_layer={C // 48}", f"--n_head={C // 48}"]
        dense = load_config([*base(o, 1, 1), *shape])
        tokens = o.tokens_per_parameter * in_blocks(dense)
        steps = max(1, round(tokens / (dense.tokens_per_step or dense.batch_size * dense.gpt.block_size)))
        rate = config(o).learning_rate * config(o).gpt.n_embd / C
        shape += [f"--learning_rate={rate:.4g}", f"--min_lr={rate / 10:.4g}", f"--warmup_steps={steps // 10}"]
        arms = {"dense": []} | {f"{kind} {share(part)}": ffn(kind, C, part) for kind in o.kinds for part in o.parts}
        for arm, flags in arms.items():
            planned += [Planned(arm, (*base(o, steps, seed), *shape, *flags)) for seed in seeds(o)]
    return planned


def in_blocks(c: TrainConfig) -> int:
    """Parameters of the dense model without embeddings and head."""
    with torch.device("meta"):
        return GPT(replace(c.gpt, vocab_size=1, lowdim=LowDim())).n_params(embeddings=False)


def report_scaling(o: RunOptions, runs: dict[Planned, Run]) -> list[str]:
    lines = [f"{o.preset} with dense attention at C = {', '.join(map(str, o.sizes))}, {Path(o.dataset).name},"]
    lines += [f"seeds: {o.seeds}, {o.tokens_per_parameter:g} tokens a parameter of the dense blocks. The slope s is of"]
    lines += ["the line ln loss = a + s ln FLOPs by least squares over all sizes and seeds, with its error; nothing"]
    lines += ["is taken off the loss. A bend that all lines share makes the error of the difference too large; in"]
    lines += ["brackets the differences of each seed's own lines.\n"]
    lines += ["| feed-forward | val loss by size | training FLOPs by size | slope | slope less dense's |"]
    lines += ["|---" * 5 + "|"]
    arms = by_arm(runs)
    dense, dense_error = slope(*points(arms["dense"]))
    dense_by_seed = slopes_by_seed(o, arms["dense"])
    for arm, of_arm in arms.items():
        flops, losses = points(of_arm)
        at = sorted(set(flops))
        means, shown = (", ".join(x) for x in zip(*((f"{losses[flops == f].mean():.4f}", f"{f:.3g}") for f in at)))
        s, error = slope(flops, losses)
        by_seed = ", ".join(f"{a - b:+.4f}" for a, b in zip(slopes_by_seed(o, of_arm), dense_by_seed))
        less = "" if arm == "dense" else f"{s - dense:+.4f} ± {math.hypot(error, dense_error):.4f} ({by_seed})"
        lines.append(f"| {arm} | {means} | {shown} | {s:.4f} ± {error:.4f} | {less} |")
    lines.append(f"\nDegrees of freedom left for the error of each line: {max(0, len(o.sizes) * o.seeds - 2)}.")
    draw_scaling(arms)
    return [*lines, "\n![loss against training FLOPs](structured_ffn_scaling.png)"]


def slopes_by_seed(o: RunOptions, runs: list[Run]) -> list[float]:
    return [slope(*points([run for run in runs if run.options["seed"] == seed]))[0] for seed in seeds(o)]


def points(runs: list[Run]) -> tuple[np.ndarray, np.ndarray]:
    """Training FLOPs and the last validation loss of each run, (N,) each."""
    last = [run.points("flops", "val_loss") for run in runs]
    return np.array([x[-1] for x, _ in last]), np.array([y[-1] for _, y in last])


def slope(flops: np.ndarray, losses: np.ndarray) -> tuple[float, float]:
    """Of the least-squares line through (ln flops, ln losses), with its standard error; nan where two points leave
    none."""
    x, y = np.log(flops), np.log(losses)
    if len(x) < 3:
        return float(np.polyfit(x, y, 1)[0]) if len(x) == 2 else math.nan, math.nan
    line, covariance = np.polyfit(x, y, 1, cov=True)  # scaled by the residuals over N - 2
    return float(line[0]), float(covariance[0, 0]) ** 0.5


def draw_scaling(arms: dict[str, list[Run]]) -> None:
    figure, axes = plot.new_figure(7.2, 5.0)
    ax = axes[0, 0]
    for number, (arm, runs) in enumerate(arms.items()):
        flops, losses = points(runs)
        look = plot.style(number)
        ax.plot(flops, losses, **look | dict(linestyle=""))
        s, _ = slope(flops, losses)
        ends = np.array([flops.min(), flops.max()])
        line = np.exp(np.log(losses).mean() + s * (np.log(ends) - np.log(flops).mean()))
        ax.plot(ends, line, **look | dict(marker=""))
        ax.plot([], [], label=f"{arm}: slope {s:.4f}", **look)
    ax.set(xscale="log", yscale="log", xlabel=plot.X["flops"], ylabel=plot.Y["val_loss"])
    ax.yaxis.set_minor_formatter("{x:.2g}")
    plot.add_legend(figure, ax)
    plot.save(figure, Path("results/structured_ffn_scaling"))


# --- draws: does a layer draw for itself whether it is guided? -----------------------------------------------------


def plan_draws(o: RunOptions) -> list[Planned]:
    C, planned = config(o).gpt.n_embd, []
    for kind in o.kinds:
        flags = [*ffn(kind, C, o.parts[-1]), FIRST_DENSE, "--self_guided=0.5"]
        for draw, change in (("step", contextlib.nullcontext), ("layer", drawn_by_layer)):
            arm = f"{kind} {share(o.parts[-1])}, guided, a draw a {draw}"
            planned += [Planned(arm, (*base(o, o.steps, seed), *flags), change) for seed in seeds(o)]
    return planned


def report_draws(o: RunOptions, runs: dict[Planned, Run]) -> list[str]:
    lines = [f"{setting(o)}, guided for half of them."]
    lines += ["One draw a step for all layers, as train.py has it, against one for each layer, as published.\n"]
    return [*lines, *table(runs)]


def table(runs: dict[Planned, Run]) -> list[str]:
    lines = ["| arm | val perplexity | val bits per byte |", "|---|---|---|"]
    for arm, of_seeds in by_arm(runs).items():
        bits = [run.evaluations[-1]["val_bits_per_byte"] for run in of_seeds]
        lines.append(f"| {arm} | {mean(perplexities(of_seeds))} | {mean(bits, 4)} |")
    return lines


# --- init: factors that start and learn as Qiu et al. have them ----------------------------------------------------


def plan_init(o: RunOptions) -> list[Planned]:
    """The published start; it with the last projections at zero; with rates of their own; Qiu et al.'s start; both."""
    C, planned = config(o).gpt.n_embd, []
    starts: dict[str, tuple[list[str], Callable[[], AbstractContextManager]]] = {
        "published": ([], contextlib.nullcontext),
        "published, last projections zero": (["--zero_init=true"], contextlib.nullcontext),
        "published, rates by factor": ([], rates_by_factor),
        "structure-aware": (["--zero_init=true"], structure_aware),
        "structure-aware, rates by factor": (["--zero_init=true"], structure_aware_with_rates),
    }
    for kind in o.kinds:
        for start, (more, change) in starts.items():
            for rate in o.rates:
                rates = [f"--learning_rate={rate:g}", f"--min_lr={rate / 10:g}"]
                flags = [*ffn(kind, C, o.parts[-1]), FIRST_DENSE, *more, *rates]
                arm = f"{kind} {share(o.parts[-1])}, {start}"
                planned += [Planned(arm, (*base(o, o.steps, seed), *flags), change) for seed in seeds(o)]
    return planned


def report_init(o: RunOptions, runs: dict[Planned, Run]) -> list[str]:
    rates = ", ".join(f"{rate:g}" for rate in o.rates)
    lines = [f"{setting(o)}; each arm at the best of the rates {rates}.\n"]
    lines += ["| arm | rate | val perplexity |", "|---|---|---|"]
    for arm, of_arm in by_arm(runs).items():
        tried: dict[float, list[Run]] = {}
        for run in of_arm:
            tried.setdefault(run.options["learning_rate"], []).append(run)
        best = min(tried, key=lambda rate: statistics.mean(perplexities(tried[rate])))
        lines.append(f"| {arm} | {best:g} | {mean(perplexities(tried[best]))} |")
    return lines


PARTS = {
    "train": (plan_train, report_train),
    "scaling": (plan_scaling, report_scaling),
    "draws": (plan_draws, report_draws),
    "init": (plan_init, report_init),
}
