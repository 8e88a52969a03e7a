"""Fine-tune run folders on the tasks of GLUE, and write the paper's table 5: all weights are trained on each task.

    python -m experiments.lpa.glue out/dense out/lpa --data=GLUE --out=results/glue_cpu.md
    python -m experiments.lpa.glue out/lpa --data=GLUE --tasks CoLA SST-2 --max_examples=8000 --rates 3e-4 1e-3

A linear head reads the state of a text's last token, which is a newline. Padding is at the right, where causal
attention cannot see it, so it never changes a result.

The scores are those of the dev files after the last epoch: no epoch is chosen. Of several --rates, the one is taken
that is best on a tenth of the training examples after training on the rest, with the first seed. A finished
fine-tuning is a line of the .jsonl file beside --out and is not computed again; one that was stopped starts again.

Shapes: B batch, T time, N examples, C n_embd, K classes, or 1 for a score.
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
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from config import UserError, parse, user_errors
from experiments.lpa.glue_tasks import TASKS, Encoded, Task, batches, collate, encode, metrics, read
from experiments.sweep import markdown_table, write_page
from lpa import checkpoint, hardware, optim
from model import GPT

# The paper's table 5, in the order of TASKS: full fine-tuning of its setting 1 at 370M; None where a metric is missing.
PAPER = {
    "paper: Transformer, 369M": (
        *((18.28,), (84.94,), (74.35, None), (86.60, 81.95), (72.47, None), (71.69, 71.81), (80.92,), (52.76,)),
    ),
    "paper: LPA, 319M": (
        *((25.46,), (86.51,), (78.92, None), (87.44, 83.06), (78.77, None), (73.73, 74.20), (83.26,), (53.60,)),
    ),
}
ONE_METRIC = ("MRPC", "STS-B")  # the paper gives the first alone
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
    """Share of the steps in which the learning rate rises; then it falls linearly to 0."""
    max_examples: int | None = None
    """Train on so many random examples of each task, the same for all seeds; None = on all."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products."""

    def __post_init__(self) -> None:
        for name, least in dict(epochs=1, batch_size=1, weight_decay=0, max_examples=10).items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, wanted {least} or more")
        for name in ("dropout", "warmup_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, wanted at least 0 and below 1")


@dataclass(frozen=True)
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders of train.py, or checkpoints in them; each is a row of the table."""
    data: Path | None = None
    """Folder with TASK/train.tsv and dev.tsv as GLUE distributes them; None = from the Hugging Face hub."""
    tasks: tuple[Literal["CoLA", "SST-2", "MRPC", "QQP", "STS-B", "MNLI", "QNLI", "RTE"], ...] = ()
    """None given: all that the data has."""
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


def main(o: Options) -> None:
    metrics()  # an error now, rather than after the first fine-tuning
    device = hardware.choose_device(o.device)
    here = [name for name in TASKS if o.data is None or (o.data / name).is_dir()]
    tasks = [TASKS[name] for name in TASKS if name in (o.tasks or here)]
    if not tasks:
        raise UserError(f"data is {o.data}, wanted a folder with GLUE's tasks, such as {o.data}/CoLA/train.tsv")
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
    try:
        for run in o.runs:
            rows |= {str(run): {task.name: score_task(o, task, run, device) for task in tasks}}
    except KeyboardInterrupt:
        finished = o.out.with_suffix(".jsonl")
        raise UserError(f"stopped; what is finished is in {finished}, and the same command continues") from None
    text = report(o, rows, device)
    write_page(o.out, text)
    print(text)


def score_task(o: Options, task: Task, run: Path, device: torch.device) -> list[dict[str, Any]]:
    """Return one result per seed, at the learning rate that is best on a held-out part of the training examples."""
    model, tokenizer, manifest = checkpoint.load_model(run, device)
    examples = {split: read(task, split, o.data) for split in ("train", *task.dev_splits)}
    chosen = torch.randperm(len(examples["train"]), generator=torch.Generator().manual_seed(0)).tolist()
    examples["train"] = [examples["train"][i] for i in chosen[: o.recipe.max_examples]]
    splits = {split: encode(task, part, tokenizer, model.config.block_size) for split, part in examples.items()}
    inputs = (sorted((name, file["sha256"]) for name, file in manifest["files"].items()), examples)
    digest = hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]  # of checkpoint and data
    name = f"{Path(manifest['options']['out_dir']).name}, step {manifest['step']}"

    def result(seed: int, rate: float, held_out: bool) -> dict[str, Any]:
        of = dict(inputs=digest, task=task.name, seed=seed, learning_rate=rate, held_out=held_out)
        of |= dataclasses.asdict(o.recipe)
        path = o.out.with_suffix(".jsonl")
        known = read_results(path)
        for record in known:
            if record["of"] == of:
                return record
        train, tests = hold_out(task, splits["train"]) if held_out else (splits["train"], splits)
        say = f"{name}, {task.name}, seed {seed}, rate {rate:g}{', to choose the rate' if held_out else ''}"
        start = time.perf_counter()
        scores = fine_tune(model, task, train, tests, o.recipe, rate, seed, say)
        print(f"{say}: {' / '.join(f'{100 * score:.2f}' for score in scores)}", flush=True)
        record = dict(of=of, run=name, params=model.n_params(), scores=scores, majority=majority(task, train, tests))
        record |= dict(seconds=round(time.perf_counter() - start, 1))
        write_page(path, "".join(json.dumps(r) + "\n" for r in [*known, record]))
        return record

    rate = o.rates[0]
    if len(o.rates) > 1:
        rate = max(o.rates, key=lambda rate: statistics.mean(result(1, rate, held_out=True)["scores"]))
    return [result(seed, rate, held_out=False) for seed in range(1, o.seeds + 1)]


def hold_out(task: Task, train: Encoded) -> tuple[Encoded, dict[str, Encoded]]:
    """Return the examples without the first tenth, and that tenth in place of the dev splits."""
    n = max(1, int(HELD_OUT * len(train.ids)))
    held, rest = (Encoded(train.ids[part], train.labels[part]) for part in (slice(n), slice(n, None)))
    return rest, dict.fromkeys(task.dev_splits, held)


def read_results(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no file of results ({error}); move it or give another --out") from None


# --- Fine-tuning ---------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Put a linear head on the state of the last token of a GPT, in place of its lm_head."""

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
    model: GPT, task: Task, train: Encoded, tests: dict[str, Encoded], recipe: Recipe, rate: float, seed: int, say: str
) -> list[float]:
    """Train a copy of the model with all its weights. Return its task.scores on `tests` after the last epoch.

    The loss of a score is its squared error, with the training scores scaled to mean 0 and deviation 1; GLUE's
    correlations do not depend on the scale. Raise UserError where the loss is no longer finite.
    """
    device = model.lm_head.weight.device
    torch.manual_seed(seed)  # for the head's weights and dropout
    classifier = Classifier(copy.deepcopy(model), len(task.labels) or 1, recipe.dropout).to(device)
    groups = optim.parameter_groups(classifier, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
    steps = recipe.epochs * math.ceil(len(train.ids) / recipe.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(share_of_rate, steps, recipe.warmup_share))
    if not task.labels:
        train = train._replace(labels=(train.labels - train.labels.mean()) / train.labels.std().clamp(min=1e-6))
    lengths = torch.tensor([len(row) for row in train.ids])
    for epoch in range(recipe.epochs):
        classifier.train()
        total = torch.zeros((), device=device)
        for batch in batches(lengths, recipe.batch_size, seed, epoch):
            idx, last = collate([train.ids[i] for i in batch.tolist()], device)
            target = train.labels[batch].to(device)  # (B,)
            with hardware.autocast(device, recipe.dtype):
                y = classifier(idx, last)  # (B, K)
            loss = F.cross_entropy(y, target) if task.labels else F.mse_loss(y[:, 0], target)
            loss.backward()
            nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.detach() * len(batch)
        mean = total.item() / len(train.ids)
        if not math.isfinite(mean):
            raise UserError(f"{say}: the loss is not finite in epoch {epoch + 1}; try a lower rate")
        print(f"{say}: epoch {epoch + 1}/{recipe.epochs}, loss {mean:.4f}", flush=True)
    return score(task, tests, {split: predict(classifier, task, tests[split].ids, recipe) for split in task.dev_splits})


def share_of_rate(steps: int, warmup_share: float, step: int) -> float:
    """Return the learning rate of the update after `step` finished ones, as a share of the peak."""
    warmup = max(1, int(warmup_share * steps))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


@torch.no_grad()
def predict(classifier: Classifier, task: Task, ids: list[Tensor], recipe: Recipe) -> np.ndarray:
    """Return the class or the score of each example (N,)."""
    classifier.eval()
    device = classifier.head.weight.device
    order = torch.tensor([len(row) for row in ids]).argsort(stable=True)
    y = torch.empty(len(ids), len(task.labels) or 1)  # (N, K)
    for batch in order.split(64):
        with hardware.autocast(device, recipe.dtype):
            y[batch] = classifier(*collate([ids[i] for i in batch.tolist()], device)).cpu()
    return (y.argmax(-1) if task.labels else y[:, 0]).numpy()


def score(task: Task, tests: dict[str, Encoded], predicted: dict[str, np.ndarray]) -> list[float]:
    return [float(metrics()[metric](tests[split].labels.numpy(), predicted[split])) for metric, split in task.scores]


def majority(task: Task, train: Encoded, tests: dict[str, Encoded]) -> list[float]:
    """Return task.scores of always predicting the most frequent class, or the mean score."""
    constant = train.labels.mode().values if task.labels else train.labels.mean()
    return score(task, tests, {split: np.full(len(tests[split].ids), constant) for split in task.dev_splits})


# --- Table 5 -------------------------------------------------------------------------------------------------------


def report(o: Options, rows: dict[str, dict[str, list[dict[str, Any]]]], device: torch.device) -> str:
    """Return the page in markdown. rows: the results of each run and task, one per seed."""
    recipe = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(o.recipe).items())
    first, *_ = rows.values()
    lines = [["model", "params", *map(heading, TASKS.values()), f"Avg. of {len(first)}"]]
    lines.append(cells("majority class", "", {name: [found[0]["majority"]] for name, found in first.items()}))
    for found in rows.values():
        record = next(iter(found.values()))[0]
        scores = {name: [r["scores"] for r in records] for name, records in found.items()}
        lines.append(cells(record["run"], f"{record['params'] / 1e6:.1f}M", scores))
    for name, paper in PAPER.items():
        scores = {task: [[v and v / 100 for v in values]] for task, values in zip(TASKS, paper)}
        average = cells("", "", {task: scores[task] for task in first})[-1]
        lines.append([*cells(f"*{name}*", "", scores)[:-1], average])
    parts = [
        "# GLUE, in the layout of the paper's table 5\n",
        f"Full fine-tuning, {o.seeds} seeds, torch {torch.__version__}, {hardware.describe(device)},"
        f" {datetime.date.today()}.",
        f"Command: `python -m experiments.lpa.glue {' '.join(sys.argv[1:])}`\n",
        f"Recipe: {recipe}.",
        "Scores times 100 on the dev files after the last epoch, mean and standard deviation over seeds; no epoch and",
        "no learning rate was chosen on the dev files. A correlation counts as 0 where all answers are the same.",
        "The paper's rows are its own figures at its size; it does not say on which files. Avg. is the mean over the",
        "tasks that were run, as in the paper: of the two metrics of MRPC and STS-B only the first counts.\n",
        markdown_table(lines),
    ]
    return "\n".join(parts) + "\n"


def heading(task: Task) -> str:
    short = dict(matthews="Mcc", accuracy="Acc", f1="F1", pearson="Pearson", spearman="Spearman")
    return f"{task.name} {'/'.join(short[metric] for metric in task.metrics)}{'(m/mm)' * (task.name == 'MNLI')}"


def cells(name: str, params: str, scores: dict[str, list[list[float | None]]]) -> list[str]:
    """Return a line of the table: the scores of each seed by task, and their average."""
    by_task = [zip(*scores[task]) if task in scores else [[None]] for task in TASKS]
    seeds = len(next(iter(scores.values())))
    averages = [average({task: values[seed] for task, values in scores.items()}) for seed in range(seeds)]
    return [name, params, *(" / ".join(map(mean_and_std, task)) for task in by_task), mean_and_std(averages)]


def mean_and_std(values: list[float | None]) -> str:
    """Return the mean times 100, with the deviation; a dash where there is no value."""
    percent = [100 * value for value in values if value is not None]
    if len(percent) < len(values):
        return "–"
    return f"{statistics.mean(percent):.2f}" + (f" ± {statistics.stdev(percent):.2f}" if len(values) > 1 else "")


def average(scores: dict[str, list[float]]) -> float:
    """Return the mean over tasks of the mean over metrics, without those that the paper leaves out."""
    return statistics.mean(statistics.mean(v[:1] if task in ONE_METRIC else v) for task, v in scores.items())


if __name__ == "__main__":
    with user_errors():
        main(parse(sys.argv[1:], Options, __doc__))
