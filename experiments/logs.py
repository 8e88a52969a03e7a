"""Read the logs of runs: their points, what they cost, and what distinguishes one run from another."""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from config import UserError

# Options that change neither what is learned nor what it costs, so that no run is named by them.
SILENT = {"out_dir", "resume", "wandb", "stop_step", "log_interval", "save_interval", "eval_interval"}
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass
class Run:
    """Hold what a log says. `steps` and `evaluations` are its records, each with step, tokens and seconds."""

    path: Path
    options: dict[str, Any]
    """Flat: 'gpt.n_layer', 'gpt.lowdim.q', ..., and the device."""
    flops_per_token: int
    """Of a training step, which takes three times the forward pass."""
    parameters: int
    parameters_in_blocks: int
    """Without embeddings and head."""
    steps: list[dict[str, float]]
    evaluations: list[dict[str, float]]
    start: dict[str, Any]
    """The record of its last start: versions, device, processes, the parameter table in lines."""
    samples: list[dict[str, Any]]
    """Texts that the model wrote, each with step and sample."""

    @property
    def finished(self) -> bool:
        last = min(self.options["max_steps"], self.options["stop_step"] or math.inf)
        return bool(self.evaluations) and self.evaluations[-1]["step"] >= last

    def points(self, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the curve, (N,) each. Raise UserError where the log has no such point."""
        records = self.steps if y == "loss" else self.evaluations
        if not records:
            what = "logged step" if y == "loss" else "evaluation"
            raise UserError(f"{self.path} has no {what} yet: nothing to plot for --y={y}")
        column = {"loss": "loss", "bits_per_byte": "val_bits_per_byte"}.get(y, "val_loss")
        ys = np.array([record[column] for record in records])
        xs = np.array([record["seconds" if x == "seconds" else "tokens"] for record in records], dtype=float)
        return xs * (self.flops_per_token if x == "flops" else 1), np.exp(ys) if y == "perplexity" else ys

    def bits_per_nat(self) -> float | None:
        """Return bits per byte of a loss of one nat per token: equal where tokens stand for the same amount of text."""
        losses = [(e["val_bits_per_byte"], e["val_loss"]) for e in self.evaluations if e["val_loss"]]
        return losses[-1][0] / losses[-1][1] if losses else None

    def ranks(self) -> dict[int, list[str]]:
        """Return each rank with the projections that have it; dense ones are left out."""
        found: dict[int, list[str]] = {}
        for name in PROJECTIONS:
            if rank := self.options.get(f"gpt.lowdim.{name}"):
                found.setdefault(rank, []).append(name)
        return found


def read_run(path: Path) -> Run:
    """Read the log of a run, which may still be written. Raise UserError where it is not one of ours."""
    log = path if path.suffix == ".jsonl" else path / "log.jsonl"
    try:
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        raise UserError(f"no {log}: wanted a run folder that train.py has written") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {log}: {error}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["step"]
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise UserError(f"{log}, line {number}, is not a record of a run: {line.strip()[:60]!r}") from None
        else:
            records.append(record)
    starts = [record for record in records if "options" in record]
    if not starts:
        raise UserError(f"{log} does not begin with the options of a run")
    start = starts[-1]  # where a run was resumed, the last one
    pattern = r"([\d,]+) parameters, ([\d,]+) of them in the blocks, ([\d,]+) FLOPs (?:per|a) token forward"
    counts = re.search(pattern, "".join(start["parameters"][:1]))
    if not counts:
        raise UserError(f"{log} does not give the parameters and FLOPs of its model as lpa.counts.table does")
    parameters, in_blocks, flops = (int(count.replace(",", "")) for count in counts.groups())
    # A loss that was not finite is null in the log.
    steps = [record for record in records if record.get("loss") is not None]
    place = {0: dict(tokens=0, seconds=0.0)} | {record["step"]: record for record in steps}
    evaluations = [
        record | {name: place[record["step"]][name] for name in ("tokens", "seconds")}
        for record in records
        if record.get("val_loss") is not None and record["step"] in place
    ]
    options = flatten(start["options"]) | dict(device=start["device"])
    samples = [record for record in records if isinstance(record.get("sample"), str)]
    return Run(log, options, 3 * flops, parameters, in_blocks, steps, evaluations, start, samples)


def flatten(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in options.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def require_common_axis(runs: list[Run], y: str) -> None:
    """Raise UserError where a nat per token is not the same in all runs."""
    if y == "bits_per_byte":
        return
    advice = "their nats per token cannot be compared; use --y=bits_per_byte"
    first = runs[0]
    for run in runs[1:]:
        a, b = first.bits_per_nat(), run.bits_per_nat()
        if a is not None and b is not None and not math.isclose(a, b, rel_tol=1e-6):
            a, b = a * math.log(2), b * math.log(2)
            raise UserError(f"{first.path} has {a:.3g} tokens per byte, {run.path} {b:.3g}: {advice}")
        sizes = [r.options["gpt.vocab_size"] for r in (first, run)]
        if sizes[0] != sizes[1]:
            raise UserError(f"{first.path} has a vocab_size of {sizes[0]}, {run.path} of {sizes[1]}: {advice}")


def name_runs(options: list[dict[str, Any]], silent: set[str]) -> list[str]:
    """Return for the flat options of each run what distinguishes it: 'dense, seed=2', 'LPA r=48'.

    Where more than half of the runs share a value, only the others show theirs; ranks are always shown.
    """
    names = {name: None for flat in options for name in flat if name not in silent}  # a set that keeps its order
    usual = {name: Counter(str(flat.get(name)) for flat in options).most_common(1)[0] for name in names}
    differing = [name for name in names if usual[name][1] < len(options)]
    parts: list[list[str]] = [[] for _ in options]
    if any("lowdim" in name for name in differing):
        parts = [[describe_ranks(flat)] for flat in options]
    for name in differing:
        for flat, part in zip(options, parts):
            value = flat.get(name)
            if "lowdim" not in name and (str(value) != usual[name][0] or usual[name][1] <= len(options) / 2):
                shown = f"{value:g}" if isinstance(value, float) else value
                part.append(f"{name.rpartition('.')[2]}={shown}")
    return [", ".join(part) for part in parts]


def describe_ranks(flat: dict[str, Any]) -> str:
    """Return 'LPA r=48', 'low k,v r=4', ... or 'dense'."""
    ranks = {name: flat.get(f"gpt.lowdim.{name}") for name in PROJECTIONS}
    parts = []
    for rank in dict.fromkeys(filter(None, ranks.values())):
        which = ",".join(name for name in PROJECTIONS if ranks[name] == rank)
        parts.append(f"{'LPA' if which == 'q,k,v,o' else f'low {which}'} r={rank}")
    return ", ".join(parts) or "dense"
