"""GLUE (arXiv 1804.07461): its tasks, their rows and metrics, and batches of tokens for a causal model.

The files are FOLDER/TASK/train.tsv and dev.tsv (MNLI: dev_matched.tsv and dev_mismatched.tsv). A row is a line, its
fields are parted by tabs, and a quotation mark is a character like any other. The labels of the test files are not
public, so they are not read. Without the files, the rows come from the Hugging Face hub.

Shapes: B batch, T time, N examples.
"""

import difflib
import math
from collections.abc import Callable, Iterator
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
POOL = 50  # batches of which the examples are sorted by length together


class Example(NamedTuple):
    texts: tuple[str, ...]
    """A sentence, or a pair of them."""
    label: float
    """Number of the class, or a score."""


@dataclass(frozen=True)
class Task:
    name: str
    """Also the folder's."""
    scores: tuple[tuple[str, str], ...]
    """The official metrics, by their names in metrics(), each with the file that it is taken on."""
    labels: tuple[str, ...]
    """How the files spell class 0, 1, ...; () = a score from 0 to 5."""
    text_columns: tuple[str, ...]
    label_column: str
    header: tuple[str, ...] | None = None
    """Names of the columns, where the files do not begin with them."""

    @property
    def dev_splits(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(split for _, split in self.scores))


def dev(*metrics: str) -> tuple[tuple[str, str], ...]:
    return tuple((metric, "dev") for metric in metrics)


COLA_HEADER = ("source", "label", "mark", "sentence")
MNLI_SCORES = (("accuracy", "dev_matched"), ("accuracy", "dev_mismatched"))
PAIR = ("sentence1", "sentence2")
BINARY, ENTAILED = ("0", "1"), ("entailment", "not_entailment")
TASKS = {
    task.name: task
    for task in (
        Task("CoLA", dev("matthews"), BINARY, ("sentence",), "label", COLA_HEADER),
        Task("SST-2", dev("accuracy"), BINARY, ("sentence",), "label"),
        Task("MRPC", dev("accuracy", "f1"), BINARY, ("#1 String", "#2 String"), "Quality"),
        Task("QQP", dev("accuracy", "f1"), BINARY, ("question1", "question2"), "is_duplicate"),
        Task("STS-B", dev("pearson", "spearman"), (), PAIR, "score"),
        Task("MNLI", MNLI_SCORES, ("entailment", "neutral", "contradiction"), PAIR, "gold_label"),
        Task("QNLI", dev("accuracy"), ENTAILED, ("question", "sentence"), "label"),
        Task("RTE", dev("accuracy"), ENTAILED, PAIR, "label"),
    )
}


def find_tasks(names: tuple[str, ...], folder: Path | None) -> list[Task]:
    """The tasks of these names in table 5's order; without names, those that the folder has, or all on the hub.

    Raises UserError for a name that is not one, with the nearest that is, and where the folder has no task.
    """
    spelled = {name.lower().replace("-", ""): name for name in TASKS}
    for name in names:
        if name not in TASKS:
            plain = name.lower().replace("-", "")
            near = difflib.get_close_matches(plain, spelled, n=1, cutoff=0)[0]
            raise UserError(f"no GLUE task {name!r}, perhaps you meant {spelled[near]}; there are {', '.join(TASKS)}")
    if folder is not None and not folder.is_dir():
        raise UserError(f"data is {folder}, wanted a folder with GLUE's tasks, such as {folder / 'CoLA' / 'train.tsv'}")
    here = [task for task in TASKS.values() if folder is None or (folder / task.name).is_dir()]
    if not names and not here:
        raise UserError(f"{folder} has none of the folders {', '.join(TASKS)}")
    return [TASKS[name] for name in TASKS if name in names] if names else here


def read(task: Task, split: str, folder: Path | None) -> list[Example]:
    """All examples of train, or of one of task.dev_splits. Raises UserError naming the file and line of a bad row."""
    rows = hub_rows(task, split) if folder is None else file_rows(task, folder / task.name / f"{split}.tsv")
    examples = list(rows)
    if not examples:
        raise UserError(f"{task.name} has no rows in {split}")
    return examples


def file_rows(task: Task, path: Path) -> Iterator[Example]:
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not lines[-1]:  # what follows the last newline
        del lines[-1]
    header, first = task.header, 1
    if header is None:
        header, first = tuple(lines[0].decode("utf-8", "replace").rstrip("\r").split("\t")) if lines else (), 2
    missing = {*task.text_columns, task.label_column} - set(header)
    if missing:
        raise UserError(f"{path}, line 1 has no column {', '.join(sorted(missing))}; it has {', '.join(header)}")
    for number, line in enumerate(lines[first - 1 :], start=first):
        try:
            yield parse_row(task, header, line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}; mend or delete it") from None


def parse_row(task: Task, header: tuple[str, ...], line: bytes) -> Example:
    """Raises ValueError that says what is wrong with the row."""
    try:
        fields = line.decode().rstrip("\r").split("\t")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    if len(fields) != len(header):
        raise ValueError(f"{len(fields)} fields, wanted {len(header)} parted by tabs")
    row = dict(zip(header, fields))
    texts = tuple(row[column].strip() for column in task.text_columns)
    if not any(texts):
        raise ValueError(f"no text in {', '.join(task.text_columns)}")
    return Example(texts, parse_label(task, row[task.label_column]))


def parse_label(task: Task, label: str) -> float:
    if task.labels:
        if label not in task.labels:
            raise ValueError(f"label {label!r}, wanted {' or '.join(task.labels)}")
        return task.labels.index(label)
    try:
        score = float(label)
    except ValueError:
        score = math.nan
    if not 0 <= score <= 5:
        raise ValueError(f"score {label!r}, wanted a number from 0 to 5")
    return score


def hub_rows(task: Task, split: str) -> Iterator[Example]:
    """The hub numbers the classes as Task.labels does, and calls every column that is no text label or idx."""
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
    for row in rows:
        yield Example(tuple(row[column].strip() for column in columns), row["label"])


# --- Metrics ---------------------------------------------------------------------------------------------------------


def metrics() -> dict[str, Callable[[np.ndarray, np.ndarray], float]]:
    """GLUE's metrics, each a function of truth (N,) and prediction (N,), by scikit-learn and SciPy."""
    try:
        import scipy.stats
        import sklearn.metrics
    except ImportError:
        raise UserError("GLUE's metrics need: pip install 'scikit-learn>=1.4,<2' 'scipy>=1.11,<2'") from None

    def correlation(measure: Callable, truth: np.ndarray, predicted: np.ndarray) -> float:
        """0 where one answer is given every time, as the Matthews correlation has it."""
        constant = np.ptp(truth) == 0 or np.ptp(predicted) == 0
        return 0.0 if constant else float(measure(truth, predicted).statistic)

    return dict(
        accuracy=lambda truth, predicted: float(sklearn.metrics.accuracy_score(truth, predicted)),
        f1=lambda truth, predicted: float(sklearn.metrics.f1_score(truth, predicted, zero_division=0)),
        matthews=lambda truth, predicted: float(sklearn.metrics.matthews_corrcoef(truth, predicted)),
        pearson=partial(correlation, scipy.stats.pearsonr),
        spearman=partial(correlation, scipy.stats.spearmanr),
    )


# --- Texts as tokens -----------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    ids: list[Tensor]
    """Of each example (T,)."""
    labels: Tensor
    """(N,), int64 classes or float32 scores."""
    truncated: int
    """Examples that did not fit into block_size."""


def encode(task: Task, examples: list[Example], tokenizer: Tokenizer, block_size: int) -> Encoded:
    """A newline after each text: no GLUE text holds one, and unlike the end of text it occurs in every corpus.

    Raises UserError where block_size has no room for a token of each text.
    """
    newline, ids, truncated = tokenizer.encode("\n"), [], 0
    for texts, _ in examples:
        parts = [tokenizer.encode(text) for text in texts]
        lengths = [len(part) for part in parts]
        kept = shorten(lengths, block_size - len(parts) * len(newline))
        truncated += kept != lengths
        ids.append(torch.tensor([token for part, n in zip(parts, kept) for token in (*part[:n], *newline)]))
    labels = torch.tensor([label for _, label in examples], dtype=torch.int64 if task.labels else torch.float32)
    return Encoded(ids, labels, truncated)


def shorten(lengths: list[int], room: int) -> list[int]:
    """Lengths whose sum is at most room, made so by taking from the longest, and the first of equals."""
    if room < len(lengths):
        raise UserError(f"block_size leaves room for {room} tokens, wanted {len(lengths)} or more")
    lengths = list(lengths)
    while sum(lengths) > room:
        lengths[lengths.index(max(lengths))] -= 1
    return lengths


def batches(lengths: Tensor, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """The examples of an epoch in random order, those of a batch alike in length (N,): indices (B,) of each batch."""
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    pools = torch.randperm(len(lengths), generator=generator).split(POOL * batch_size)
    found = [batch for pool in pools for batch in pool[lengths[pool].argsort(stable=True)].split(batch_size)]
    return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]


def collate(ids: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids of unequal length -> padded at the right (B, T), and the place of each last token (B,)."""
    last = torch.tensor([len(row) - 1 for row in ids])
    return pad_sequence(ids, batch_first=True).to(device), last.to(device)
