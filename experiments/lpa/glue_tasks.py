"""Read the tasks of GLUE (arXiv 1804.07461), compute their metrics, and batch their texts for a causal model.

The files are FOLDER/TASK/train.tsv and dev.tsv (MNLI: dev_matched.tsv and dev_mismatched.tsv), with a row per line,
tabs between the fields, and no quoting. The labels of the test files are not public, so they are not read. Without the
files, the rows come from the Hugging Face hub.

Shapes: B batch, T time, N examples.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from config import UserError
from data.tokenizers import Tokenizer

HUB = "nyu-mll/glue"
POOL = 50  # examples of this many batches are sorted by length together


class Example(NamedTuple):
    texts: tuple[str, ...]
    """A sentence, or a pair of them."""
    label: float
    """The number of the class, or a score."""


@dataclass(frozen=True)
class Task:
    name: str
    """Also the name of the folder."""
    metrics: tuple[str, ...]
    labels: tuple[str, ...]
    """The names of class 0, 1, ... in the files; () = a score from 0 to 5."""
    text_columns: tuple[str, ...]
    label_column: str
    header: tuple[str, ...] | None = None
    """The names of the columns, if they are not the first line of the files."""
    dev_splits: tuple[str, ...] = ("dev",)

    @property
    def scores(self) -> list[tuple[str, str]]:
        """Return the official scores: each metric on each dev file."""
        return [(metric, split) for metric in self.metrics for split in self.dev_splits]


PAIR = ("sentence1", "sentence2")
BINARY, ENTAILED = ("0", "1"), ("entailment", "not_entailment")
ENTAILMENTS, MNLI_FILES = ("entailment", "neutral", "contradiction"), ("dev_matched", "dev_mismatched")
TASKS = {
    task.name: task
    for task in (
        Task("CoLA", ("matthews",), BINARY, ("sentence",), "label", ("source", "label", "mark", "sentence")),
        Task("SST-2", ("accuracy",), BINARY, ("sentence",), "label"),
        Task("MRPC", ("accuracy", "f1"), BINARY, ("#1 String", "#2 String"), "Quality"),
        Task("QQP", ("accuracy", "f1"), BINARY, ("question1", "question2"), "is_duplicate"),
        Task("STS-B", ("pearson", "spearman"), (), PAIR, "score"),
        Task("MNLI", ("accuracy",), ENTAILMENTS, PAIR, "gold_label", dev_splits=MNLI_FILES),
        Task("QNLI", ("accuracy",), ENTAILED, ("question", "sentence"), "label"),
        Task("RTE", ("accuracy",), ENTAILED, PAIR, "label"),
    )
}


def read(task: Task, split: str, folder: Path | None) -> list[Example]:
    """Return the examples of train, or of one of task.dev_splits. Raise UserError for a bad row, with its line."""
    examples = hub_rows(task, split) if folder is None else file_rows(task, folder / task.name / f"{split}.tsv")
    if not examples:
        raise UserError(f"{task.name} has no rows in {split}")
    return examples


def file_rows(task: Task, path: Path) -> list[Example]:
    examples, number = [], 0
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            rows = csv.DictReader(file, task.header, restkey="beyond the last", delimiter="\t", quoting=csv.QUOTE_NONE)
            missing = {*task.text_columns, task.label_column} - set(rows.fieldnames or ())
            if missing:
                raise UserError(f"{path} has no column {', '.join(sorted(missing))} in its first line")
            for row in rows:
                number = rows.line_num
                if len(row) != len(rows.fieldnames or ()) or None in row.values():
                    raise ValueError(f"wanted {len(rows.fieldnames or ())} fields with tabs between them")
                examples.append(make_example(task, row))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, csv.Error) as error:  # among them UnicodeDecodeError, of a line after the last one read
        raise UserError(f"{path}, at or after line {number}: {error}; correct or delete it") from None
    return examples


def make_example(task: Task, row: dict[str, str]) -> Example:
    """Raise ValueError that says what is wrong with the row."""
    texts, label = tuple(row[column].strip() for column in task.text_columns), row[task.label_column]
    if not any(texts):
        raise ValueError(f"no text in {', '.join(task.text_columns)}")
    if task.labels:
        if label not in task.labels:
            raise ValueError(f"label {label!r}, wanted {' or '.join(task.labels)}")
        return Example(texts, task.labels.index(label))
    if not 0 <= float(label) <= 5:
        raise ValueError(f"score {label!r}, wanted a number from 0 to 5")
    return Example(texts, float(label))


def hub_rows(task: Task, split: str) -> list[Example]:
    """Download a split. The hub numbers the classes as Task.labels does; all columns but label and idx are texts."""
    try:
        import datasets
    except ImportError:
        raise UserError("downloading GLUE needs: pip install datasets; or give local files: --data=FOLDER") from None
    try:
        subset = task.name.lower().replace("-", "")
        rows: Any = datasets.load_dataset(HUB, subset, split=split.replace("dev", "validation"))
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot download {HUB} ({type(error).__name__}); give local files: --data=FOLDER") from None
    columns = [name for name in rows.column_names if name not in ("label", "idx")]
    return [Example(tuple(row[column].strip() for column in columns), row["label"]) for row in rows]


# --- Metrics ---------------------------------------------------------------------------------------------------------


def metrics() -> dict[str, Callable[..., Any]]:
    """Return GLUE's metrics, each a function of truth (N,) and prediction (N,)."""
    try:
        import scipy.stats
        import sklearn.metrics
    except ImportError:
        raise UserError("GLUE's metrics need: pip install 'scikit-learn>=1.4,<2' 'scipy>=1.11,<2'") from None

    def correlation(measure: Callable, truth: np.ndarray, predicted: np.ndarray) -> float:
        constant = np.ptp(truth) == 0 or np.ptp(predicted) == 0  # undefined; 0, as for the Matthews correlation
        return 0.0 if constant else float(measure(truth, predicted).statistic)

    return dict(
        accuracy=sklearn.metrics.accuracy_score,
        f1=partial(sklearn.metrics.f1_score, zero_division=0),
        matthews=sklearn.metrics.matthews_corrcoef,
        pearson=partial(correlation, scipy.stats.pearsonr),
        spearman=partial(correlation, scipy.stats.spearmanr),
    )


# --- Texts as tokens -----------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    ids: list[Tensor]
    """The tokens (T,) of each example."""
    labels: Tensor
    """(N,), int64 classes or float32 scores."""


def encode(task: Task, examples: list[Example], tokenizer: Tokenizer, block_size: int) -> Encoded:
    """Encode each text with a newline after it: no text of GLUE holds one, and every corpus does.

    Where the texts of an example are longer than block_size, drop tokens from the end of the longer one.
    """
    newline, ids = tokenizer.encode("\n"), []
    for texts, _ in examples:
        parts = [tokenizer.encode(text) for text in texts]
        while sum(map(len, parts)) > block_size - len(parts) * len(newline):
            longest = max(parts, key=len)
            if len(longest) == 1:
                raise UserError(f"block_size is {block_size}, too small for a token of each text of {task.name}")
            longest.pop()
        ids.append(torch.tensor([token for part in parts for token in (*part, *newline)]))
    labels = torch.tensor([label for _, label in examples], dtype=torch.int64 if task.labels else torch.float32)
    return Encoded(ids, labels)


def batches(lengths: Tensor, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """Return the indices (B,) of each batch of an epoch, in random order; lengths (N,) in a batch are similar."""
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    pools = torch.randperm(len(lengths), generator=generator).split(POOL * batch_size)
    found = [batch for pool in pools for batch in pool[lengths[pool].argsort(stable=True)].split(batch_size)]
    return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]


def collate(ids: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad token ids at the right: return (B, T), and the position (B,) of each last token."""
    last = torch.tensor([len(row) - 1 for row in ids])
    return pad_sequence(ids, batch_first=True).to(device), last.to(device)
