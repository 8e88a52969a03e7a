"""Table 5: what is a pre-trained model worth on GLUE? Full fine-tuning of each run folder on each task.

    python -m experiments.lpa.glue out/dense out/lpa --data=GLUE --out=results/glue_cpu.md
    python -m experiments.lpa.glue out/lpa --data=GLUE --tasks CoLA SST-2 --max_examples=8000 --rates 3e-4 1e-3

A linear head reads the state of a text's last token. Each text is followed by a newline, which so parts the two of a
pair and is where the head reads; where they are longer than block_size, tokens go from the end of the longer one.
Padding is at the right, where causal attention cannot see it, so it never changes a result.

The scores are those of the dev files after the last epoch: no epoch is chosen. Of several --rates, the one is taken
that does best on a tenth of the training examples after training on the rest, with the first seed. A finished result
is a line of the .jsonl file beside --out and is not computed again; a fine-tuning that was stopped starts anew.

Shapes: B batch, T time, C n_embd, K classes, or 1 for a score.
"""

import copy
import dataclasses
import datetime
import hashlib
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from config import UserError, parse, user_errors
from data.tokenizers import Tokenizer
from experiments.lpa import glue_tasks as glue
from experiments.lpa.glue_tasks import Encoded, Task, batches, collate, metrics
from lpa import checkpoint, hardware, optim
from model import GPT

# The paper's table 5: full fine-tuning of its setting 1 at 370M; None where it does not give one of GLUE's metrics.
PAPER = {
    "paper: Transformer, 369M": {
        "CoLA": (18.28,),
        "SST-2": (84.94,),
        "MRPC": (74.35, None),
        "QQP": (86.60, 81.95),
        "STS-B": (72.47, None),
        "MNLI": (71.69, 71.81),
        "QNLI": (80.92,),
        "RTE": (52.76,),
    },
    "paper: LPA, 319M": {
        "CoLA": (25.46,),
        "SST-2": (86.51,),
        "MRPC": (78.92, None),
        "QQP": (87.44, 83.06),
        "STS-B": (78.77, None),
        "MNLI": (73.73, 74.20),
        "QNLI": (83.26,),
        "RTE": (53.60,),
    },
}
HEADINGS = dict(matthews="Mcc", accuracy="Acc", f1="F1", pearson="Pearson", spearman="Spearman")
HELD_OUT = 0.1  # share of the training examples on which a learning rate is chosen


@dataclass(frozen=True)
class Recipe:
    """What a result depends on, besides checkpoint, data, seed and learning rate."""

    epochs: int = 3
    batch_size: int = 16
    dropout: float = 0.1
    weight_decay: float = 0.1
    """Of the matrices; see optim.parameter_groups."""
    warmup_share: float = 0.1
    """Share of the steps in which the learning rate rises; then it falls to 0 in a straight line."""
    max_examples: int | None = None
    """Train on so many examples of each task, drawn at random and the same for all seeds; None = on all."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products."""

    def __post_init__(self) -> None:
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay is {self.weight_decay}, wanted 0 or more")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted 1 or more")
        if self.max_examples is not None and self.max_examples < 10:
            raise ValueError(f"max_examples is {self.max_examples}, wanted 10 or more")
        for name in ("dropout", "warmup_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted at least 0 and below 1")


@dataclass(frozen=True)
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders of train.py, or checkpoints in them; a row of the table each."""
    data: Path | None = None
    """Folder with TASK/train.tsv and dev.tsv as GLUE distributes them; None = from the Hugging Face hub."""
    tasks: tuple[str, ...] = ()
    """Such as CoLA SST-2; none = all that the data has."""
    seeds: int = 3
    rates: tuple[float, ...] = (3e-4,)
    """Peak learning rates to choose from."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    out: Path = Path("results/glue.md")

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("no run folder is given, wanted one or more, such as out/lpa_cpu")
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}, wanted 1 or more")
        if not self.rates or not all(0 < rate < math.inf for rate in self.rates):
            raise ValueError(f"rates is {self.rates}, wanted one or more above 0")


class Subject(NamedTuple):
    """A checkpoint to fine-tune, on the device."""

    name: str
    weights: str
    """The start of a sha256 over those of its files, which tells checkpoints apart."""
    model: GPT
    tokenizer: Tokenizer


def main(o: Options) -> None:
    metrics()  # an error now, rather than after the first fine-tuning
    device = hardware.choose_device(o.device)
    tasks = glue.find_tasks(o.tasks, o.data)
    results = Results(o.out.with_suffix(".jsonl"))
    rows = []
    try:
        for run in o.runs:
            subject = load(run, device)
            found = {task.name: score_task(o, task, subject, results) for task in tasks}
            rows.append(Row(subject.name, subject.model.n_params(), found))
    except KeyboardInterrupt:
        raise UserError(f"stopped; what is finished is in {results.path}, and the same command goes on") from None
    text = report(o, tasks, rows, device)
    write(o.out, text)
    print(text)


def load(run: Path, device: torch.device) -> Subject:
    model, tokenizer, manifest = checkpoint.load_model(run, device)
    name = f"{Path(manifest['options']['out_dir']).name}, step {manifest['step']}"
    of_files = hashlib.sha256(json.dumps(manifest["files"], sort_keys=True).encode()).hexdigest()
    return Subject(name, of_files[:16], model, tokenizer)


def score_task(o: Options, task: Task, subject: Subject, results: "Results") -> list[dict[str, Any]]:
    """The results of one checkpoint on one task, one a seed, at the learning rate that does best on a part of train."""
    examples = {split: glue.read(task, split, o.data) for split in ("train", *task.dev_splits)}
    chosen = torch.randperm(len(examples["train"]), generator=torch.Generator().manual_seed(0)).tolist()
    examples["train"] = [examples["train"][i] for i in chosen[: o.recipe.max_examples]]
    digest = hashlib.sha256(repr(examples).encode()).hexdigest()[:16]
    block_size = subject.model.config.block_size
    splits = {split: glue.encode(task, part, subject.tokenizer, block_size) for split, part in examples.items()}

    def result(seed: int, rate: float, held_out: bool) -> dict[str, Any]:
        of = dict(checkpoint=subject.weights, task=task.name, data=digest, seed=seed, learning_rate=rate)
        of |= dict(held_out=held_out) | dataclasses.asdict(o.recipe)
        known = results.find(of)
        return known or results.add(dict(of=of) | measure(task, subject, splits, o.recipe, rate, seed, held_out))

    rate = o.rates[0]
    if len(o.rates) > 1:
        rate = max(o.rates, key=lambda rate: statistics.mean(result(1, rate, held_out=True)["scores"]))
    return [result(seed, rate, held_out=False) for seed in range(1, o.seeds + 1)]


def measure(
    task: Task, subject: Subject, splits: dict[str, Encoded], recipe: Recipe, rate: float, seed: int, held_out: bool
) -> dict[str, Any]:
    """One fine-tuning, as a record of what came of it."""
    say = f"{subject.name}, {task.name}, seed {seed}, rate {rate:g}{', to choose the rate' if held_out else ''}"
    train, tests = hold_out(task, splits["train"]) if held_out else (splits["train"], splits)
    start = time.perf_counter()
    scores = fine_tune(subject.model, task, train, tests, recipe, rate, seed, say)
    print(f"{say}: {' / '.join(f'{100 * score:.2f}' for score in scores)}", flush=True)
    return dict(
        run=subject.name,
        scores=scores,
        majority=majority(task, train, tests),
        truncated=sum(part.truncated for part in splits.values()),
        texts=sum(len(part.ids) for part in splits.values()),
        seconds=round(time.perf_counter() - start, 1),
    )


def hold_out(task: Task, train: Encoded) -> tuple[Encoded, dict[str, Encoded]]:
    """Train, which is in random order, without its first tenth; and that tenth in place of the dev splits."""
    n = max(1, int(HELD_OUT * len(train.ids)))
    held, rest = (Encoded(train.ids[part], train.labels[part], 0) for part in (slice(n), slice(n, None)))
    return rest, dict.fromkeys(task.dev_splits, held)


class Results:
    """Finished fine-tunings, a JSON line each, found by all that they depend on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path} is no file of results ({error}); move it or give another --out") from None

    def find(self, of: dict[str, Any]) -> dict[str, Any] | None:
        return next((record for record in self.read() if record["of"] == of), None)

    def add(self, record: dict[str, Any]) -> dict[str, Any]:
        write(self.path, "".join(json.dumps(r) + "\n" for r in [*self.read(), record]))
        return record


def write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_whole(path, text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


# --- Fine-tuning ---------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A GPT with a linear head on the state of the last token, in place of the one that predicts tokens."""

    def __init__(self, body: GPT, outputs: int, dropout: float) -> None:
        super().__init__()
        self.body = body
        self.body.set_submodule("lm_head", nn.Identity())  # nothing reads it
        self.head = nn.Linear(body.config.n_embd, outputs)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        for module in self.body.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout

    def forward(self, idx: Tensor, last: Tensor) -> Tensor:
        """idx (B, T), padded at the right; last (B,), where each text ends -> logits or a score (B, K), float32."""
        state = self.body.hidden(idx)[torch.arange(len(idx), device=idx.device), last]  # (B, C)
        with torch.autocast(idx.device.type, enabled=False):
            return self.head(state.float())


def fine_tune(
    model: GPT,
    task: Task,
    train: Encoded,
    tests: dict[str, Encoded],
    recipe: Recipe,
    rate: float,
    seed: int,
    say: str,
) -> list[float]:
    """Train a copy of the model with all its weights -> task.scores of it on `tests`, after the last epoch.

    A score is learned by its squared error, in units in which those of train have mean 0 and deviation 1: GLUE's
    correlations do not see the units. Raises UserError where the loss is no longer finite.
    """
    device = model.lm_head.weight.device
    torch.manual_seed(seed)  # of the head's weights and of dropout
    classifier = Classifier(copy.deepcopy(model), len(task.labels) or 1, recipe.dropout).to(device)
    groups = optim.parameter_groups(classifier, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
    steps = recipe.epochs * math.ceil(len(train.ids) / recipe.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(share_of_rate, steps, recipe.warmup_share))
    if not task.labels:
        train = train._replace(labels=(train.labels - train.labels.mean()) / train.labels.std().clamp(min=1e-6))
    lengths = torch.tensor([len(row) for row in train.ids])
    for epoch in range(recipe.epochs):
        start = time.perf_counter()
        order = batches(lengths, recipe.batch_size, seed, epoch)
        loss = train_epoch(classifier, task, train, order, optimizer, schedule, recipe.dtype)
        if not math.isfinite(loss):
            raise UserError(f"{say}: the loss is not finite in epoch {epoch + 1}; try a lower rate")
        seconds = time.perf_counter() - start
        print(f"{say}: epoch {epoch + 1}/{recipe.epochs}, loss {loss:.4f}, {seconds:.0f} s", flush=True)
    predicted = {split: predict(classifier, task, tests[split].ids, recipe.dtype) for split in task.dev_splits}
    return [metrics()[metric](tests[split].labels.numpy(), predicted[split]) for metric, split in task.scores]


def train_epoch(
    classifier: Classifier,
    task: Task,
    train: Encoded,
    order: list[Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    dtype: str,
) -> float:
    """The mean loss of an epoch's updates; order holds the examples (B,) of each."""
    classifier.train()
    device = classifier.head.weight.device
    total = torch.zeros((), device=device)
    for batch in order:
        idx, last = collate([train.ids[i] for i in batch.tolist()], device)
        target = train.labels[batch].to(device)  # (B,)
        with hardware.autocast(device, dtype):
            y = classifier(idx, last)  # (B, K)
        loss = F.cross_entropy(y, target) if task.labels else F.mse_loss(y[:, 0], target)
        loss.backward()
        nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.detach() * len(batch)
    return total.item() / len(train.ids)


def share_of_rate(steps: int, warmup_share: float, step: int) -> float:
    """The learning rate of the update after `step` finished ones, as a share of the peak."""
    warmup = max(1, int(warmup_share * steps))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


@torch.no_grad()
def predict(classifier: Classifier, task: Task, ids: list[Tensor], dtype: str) -> np.ndarray:
    """The class or the score of each example (N,)."""
    classifier.eval()
    device = classifier.head.weight.device
    order = torch.tensor([len(row) for row in ids]).argsort(stable=True)
    y = torch.empty(len(ids), len(task.labels) or 1)  # (N, K)
    for batch in order.split(64):
        with hardware.autocast(device, dtype):
            y[batch] = classifier(*collate([ids[i] for i in batch.tolist()], device)).cpu()
    return (y.argmax(-1) if task.labels else y[:, 0]).numpy()


def majority(task: Task, train: Encoded, tests: dict[str, Encoded]) -> list[float]:
    """task.scores of answering with train's most frequent class, or its mean score, every time."""
    constant = train.labels.mode().values if task.labels else train.labels.mean()
    truth = {split: tests[split].labels.numpy() for split in task.dev_splits}
    return [metrics()[metric](truth[split], np.full_like(truth[split], constant)) for metric, split in task.scores]


# --- Table 5 -------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    name: str
    params: int
    found: dict[str, list[dict[str, Any]]]
    """Results of each task, one a seed."""


def report(o: Options, tasks: list[Task], rows: list[Row], device: torch.device) -> str:
    recipe = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(o.recipe).items())
    minutes = sum(record["seconds"] for row in rows for found in row.found.values() for record in found) / 60
    lines = [
        "# GLUE, in the layout of the paper's table 5\n",
        f"Full fine-tuning, {o.seeds} seeds, torch {torch.__version__}, {hardware.describe(device)},",
        f"{datetime.date.today()}, {minutes:.0f} minutes for all that the table shows.",
        f"Command: `python -m experiments.lpa.glue {' '.join(sys.argv[1:])}`\n",
        f"Recipe: {recipe}.",
        "Scores times 100 on the dev files after the last epoch, mean and standard deviation over seeds; no epoch and",
        "no learning rate was chosen on the dev files. A correlation counts as 0 where one answer is given every time.",
        "The paper's rows are its own figures at its size; it does not say on which files. Avg. is the mean over the",
        "tasks that were run, as the paper takes it: of the two metrics of MRPC and STS-B only the first counts.",
        "Truncated are texts of train and dev that are longer than block_size.\n",
        *table(tasks, rows),
        "",
        *verdicts(tasks, rows),
    ]
    return "\n".join(lines) + "\n"


def table(tasks: list[Task], rows: list[Row]) -> list[str]:
    """Lines of markdown; every column of the paper's table, with a dash where a task was not run."""
    names = [task.name for task in tasks]
    lines = ["| model | params | " + " | ".join(heading(task) for task in glue.TASKS.values())]
    lines[0] += f" | Avg. of {len(tasks)} |"
    lines.append("|---" * (len(glue.TASKS) + 3) + "|")
    chance = {name: rows[0].found[name][0]["majority"] for name in names}
    lines.append(line("majority class", "", {name: [scores] for name, scores in chance.items()}, names))
    for row in rows:
        scores = {name: [record["scores"] for record in found] for name, found in row.found.items()}
        lines.append(line(row.name, f"{row.params / 1e6:.1f}M", scores, names))
    for name, scores in PAPER.items():
        parts = {task: [[None if v is None else v / 100 for v in values]] for task, values in scores.items()}
        lines.append(line(f"*{name}*", "", parts, names))
    return lines


def heading(task: Task) -> str:
    if len(task.dev_splits) > 1:
        return f"{task.name} Acc(m/mm)"
    return f"{task.name} {'/'.join(HEADINGS[metric] for metric, _ in task.scores)}"


def line(name: str, params: str, scores: dict[str, list[list[float | None]]], averaged: list[str]) -> str:
    """scores holds the values of each seed by task; averaged names the tasks that Avg. is of."""
    cells = []
    for task in glue.TASKS:
        by_metric = zip(*scores[task]) if task in scores else [[None]]
        cells.append(" / ".join(mean_and_deviation(values) for values in by_metric))
    seeds = len(scores[averaged[0]])
    averages = [average({task: scores[task][seed] for task in averaged}) for seed in range(seeds)]
    return f"| {name} | {params} | {' | '.join(cells)} | {mean_and_deviation(averages)} |"


def mean_and_deviation(values: list[float | None]) -> str:
    """Times 100; a dash where there is no value."""
    percent = [100 * value for value in values if value is not None]
    if len(percent) < len(values):
        return "–"
    spread = f" ± {statistics.stdev(percent):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(percent):.2f}{spread}"


def average(scores: dict[str, list[float]]) -> float:
    """The mean over tasks of the mean of those of its metrics that the paper has, which gives the paper's Avg."""
    known = {task: [v for v, p in zip(values, PAPER["paper: LPA, 319M"][task]) if p] for task, values in scores.items()}
    return statistics.mean(statistics.mean(values) for values in known.values())


def verdicts(tasks: list[Task], rows: list[Row]) -> list[str]:
    """Lines of markdown: does a checkpoint beat the majority class by more than its spread over seeds?"""
    lines = ["| model | task | first metric less one deviation | majority | above | learning rate | truncated |"]
    lines.append("|---" * 7 + "|")
    for row in rows:
        for task in tasks:
            records = row.found[task.name]
            known = records[0]  # what is the same for all seeds
            rate, majority = known["of"]["learning_rate"], known["majority"][0]
            low, above = "–", "one seed"
            if len(records) > 1:
                scores = [record["scores"][0] for record in records]
                least = statistics.mean(scores) - statistics.stdev(scores)
                low, above = f"{100 * least:.2f}", "yes" if least > majority else "no"
            truncated = f"{known['truncated']} of {known['texts']}"
            cells = (row.name, task.name, low, f"{100 * majority:.2f}", above, f"{rate:g}", truncated)
            lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
