"""Read the logs of runs: the points of a curve, the costs, and the options in which runs differ."""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from config import UserError

# Options that change neither what is learned nor what it costs. No run is named by them.
SILENT = {"out_dir", "resume", "wandb", "stop_step", "log_interval", "save_interval", "eval_interval"}


class NothingYet(UserError):
    """A log is missing or has no points, which may still come: plot.py --watch waits for them."""


@dataclass
class Run:
    """What a log holds. Steps, evaluations and samples are its records, in order."""

    path: Path
    start: dict[str, Any]
    """The record of the last start: versions, device, options, the table of parameters."""
    options: dict[str, Any]
    """Flat: 'gpt.n_layer', 'gpt.lowdim.q', ..., and the device."""
    parameters: int
    parameters_in_blocks: int
    """Without embeddings and head."""
    flops_per_token: int
    """Of training, which costs three times the forward pass."""
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    """Each with the tokens and seconds of training before it."""
    samples: list[dict[str, Any]]

    @property
    def finished(self) -> bool:
        last = min(self.options["max_steps"], self.options["stop_step"] or math.inf)
        return bool(self.evaluations) and self.evaluations[-1]["step"] >= last

    def points(self, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the curve, (N,) each. Raise NothingYet where the log has no such point."""
        records = self.steps if y == "loss" else self.evaluations
        if not records:
            what = "logged step" if y == "loss" else "evaluation"
            raise NothingYet(f"{self.path} has no {what} yet: nothing to plot for --y={y}")
        column = {"loss": "loss", "bits_per_byte": "val_bits_per_byte"}.get(y, "val_loss")
        ys = np.array([record[column] for record in records])
        xs = np.array([record["seconds" if x == "seconds" else "tokens"] for record in records], dtype=float)
        return xs * (self.flops_per_token if x == "flops" else 1), np.exp(ys) if y == "perplexity" else ys

    def bits_per_nat(self) -> float | None:
        """Return the bits per byte of one nat per token: equal in runs whose tokens hold equally much text."""
        ratios = [e["val_bits_per_byte"] / e["val_loss"] for e in self.evaluations if e["val_loss"]]
        return ratios[-1] if ratios else None


def log_of(path: Path) -> Path:
    return path if path.suffix == ".jsonl" else path / "log.jsonl"


def read_run(path: Path) -> Run:
    """Read the log of a run folder, or a log.jsonl of any name. Raise UserError where it is none of train.py's."""
    log, records = log_of(path), []
    try:
        lines = log.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise NothingYet(f"no {log}: wanted a run folder that train.py has written") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {log}: {error}") from None
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records.append(record | {"step": record["step"]})
        except (ValueError, TypeError, KeyError):
            if number < len(lines):  # the last line may be half written
                raise UserError(f"{log}, line {number}, is not a record of a run: {line.strip()[:60]!r}") from None
    if not records:
        raise NothingYet(f"{log} is empty")
    starts = [record for record in records if "options" in record]
    if not starts:
        raise UserError(f"{log} does not begin with the options of a run")
    start = starts[-1]  # a resumed run has several
    pattern = r"([\d,]+) parameters, ([\d,]+) of them in the blocks, ([\d,]+) FLOPs (?:per|a) token forward"
    counts = re.search(pattern, start["parameters"][0])
    if not counts:
        raise UserError(f"{log} has no line with parameters and FLOPs, as lpa/counts.py writes it")
    parameters, in_blocks, flops = (int(count.replace(",", "")) for count in counts.groups())
    steps = [record for record in records if record.get("loss") is not None]  # null: not finite
    place = {0: dict(tokens=0, seconds=0.0)} | {record["step"]: record for record in steps}
    evaluations = [
        record | {name: place[record["step"]][name] for name in ("tokens", "seconds")}
        for record in records
        if record.get("val_loss") is not None and record["step"] in place
    ]
    samples = [record for record in records if isinstance(record.get("sample"), str)]
    options = flatten(start["options"]) | dict(device=start["device"])
    return Run(log, start, options, parameters, in_blocks, 3 * flops, steps, evaluations, samples)


def flatten(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in options.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def require_common_axis(runs: list[Run], y: str) -> None:
    """Raise UserError where a nat per token means different things in the runs."""
    for run in runs[1:] if y != "bits_per_byte" else []:
        bits = [r.bits_per_nat() for r in (runs[0], run)]
        sizes = [r.options["gpt.vocab_size"] for r in (runs[0], run)]
        if sizes[0] != sizes[1] or (None not in bits and not math.isclose(*bits, rel_tol=1e-6)):
            advice = "their losses per token cannot be compared; use --y=bits_per_byte"
            raise UserError(f"{runs[0].path} and {run.path} have other tokens or another text: {advice}")


# --- Names -------------------------------------------------------------------------------------------------------


def name_runs(options: list[dict[str, Any]], silent: set[str]) -> list[str]:
    """Return the options in which each run differs from the others: 'dense, seed=2', 'LPA r=48'.

    A value that more than half of the runs share is left out of their names; ranks are always named.
    """
    parts: list[list[str]] = [[] for _ in options]
    by_rank = False
    for name in dict.fromkeys(name for flat in options for name in flat if name not in silent):
        values = [flat.get(name) for flat in options]
        usual, count = Counter(map(str, values)).most_common(1)[0]
        if "lowdim" in name:
            by_rank |= count < len(values)
            continue
        for value, part in zip(values, parts):
            if count < len(values) and (str(value) != usual or count <= len(values) / 2):
                shown = f"{value:g}" if isinstance(value, float) else value
                part.append(f"{name.rpartition('.')[2]}={shown}")
    return [", ".join([describe_ranks(flat)] * by_rank + part) for flat, part in zip(options, parts)]


def ranks(flat: dict[str, Any]) -> dict[Any, list[str]]:
    """Return the projections of each rank; dense ones are left out."""
    found: dict[Any, list[str]] = {}
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        if rank := flat.get(f"gpt.lowdim.{name}"):
            found.setdefault(rank, []).append(name)
    return found


def describe_ranks(flat: dict[str, Any]) -> str:
    return ", ".join(f"{describe(names)} r={rank}" for rank, names in ranks(flat).items()) or "dense"


def describe(projections: list[str]) -> str:
    return "LPA" if projections == ["q", "k", "v", "o"] else f"low {','.join(projections)}"
