"""GLUE: the files, the metrics, padding, the last token's state, results that are kept.

.venv/bin/pytest tests/test_glue.py        CPU, about 10 s
"""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from config import UserError
from data.tokenizers import ByteTokenizer
from experiments.lpa import glue
from experiments.lpa import glue_tasks as glue_data
from experiments.lpa.glue_tasks import TASKS, Example
from lpa import checkpoint
from model import GPT, GPTConfig, LowDim

CPU = torch.device("cpu")
SHARED = ROOT.parent / "shared" / "data" / "glue"
SMALL = dict(n_layer=2, n_head=2, n_embd=32, block_size=48, vocab_size=256, lowdim=LowDim(q=8, k=8, v=8, o=8))

# A file in each task's format (invented sentences), and what it says.
FORMATS = {
    "CoLA": ("", 'ab01\t1\t\tA "quoted sheep sleeps.\nab01\t0\t*\tSheep a the.\n'),
    "SST-2": ("sentence\tlabel\n", "a fine film \t1\ndull \t0\n"),
    "MRPC": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n",
        '1\t7\t8\tHe " left .\tHe went .\n0\t7\t8\tA .\tB .\n',
    ),
    "QQP": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n",
        "0\t1\t2\tWhy?\tHow so?\t1\n1\t3\t4\tWho?\tWhen?\t0\n",
    ),
    "STS-B": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n",
        "0\tg\tf\ty\t1\tnone\tnone\tA cat.\tA cat sits.\t3.750\n1\tg\tf\ty\t1\tnone\tnone\tA cat.\tA war.\t0\n",
    ),
    "MNLI": (
        "index\tpairID\tsentence1_parse\tsentence1\tsentence2\tlabel1\tgold_label\n",
        "0\t5\t(A)\tIt rains.\tIt is dry.\tneutral\tcontradiction\n"
        "1\t5\t(A)\tIt rains.\tIt is wet.\tneutral\tentailment\n",
    ),
    "QNLI": (
        "index\tquestion\tsentence\tlabel\n",
        "0\tWho?\tAnn did.\tentailment\n1\tWho?\tIt did.\tnot_entailment\n",
    ),
    "RTE": ("index\tsentence1\tsentence2\tlabel\n", "0\tA.\tB.\tnot_entailment\n1\tA.\tA.\tentailment\n"),
}
READ = {
    "CoLA": [(('A "quoted sheep sleeps.',), 1), (("Sheep a the.",), 0)],
    "SST-2": [(("a fine film",), 1), (("dull",), 0)],
    "MRPC": [(('He " left .', "He went ."), 1), (("A .", "B ."), 0)],
    "QQP": [(("Why?", "How so?"), 1), (("Who?", "When?"), 0)],
    "STS-B": [(("A cat.", "A cat sits."), 3.75), (("A cat.", "A war."), 0)],
    "MNLI": [(("It rains.", "It is dry."), 2), (("It rains.", "It is wet."), 0)],
    "QNLI": [(("Who?", "Ann did."), 0), (("Who?", "It did."), 1)],
    "RTE": [(("A.", "B."), 1), (("A.", "A."), 0)],
}


def write_task(folder: Path, name: str, rows: int = 1) -> None:
    """The two rows of FORMATS as train and dev files, `rows` times over."""
    header, body = FORMATS[name]
    (folder / name).mkdir(parents=True, exist_ok=True)
    for split in ("train", *TASKS[name].dev_splits):
        (folder / name / f"{split}.tsv").write_text(header + body * rows)


def randomised(**options: object) -> GPT:
    model = GPT(GPTConfig(**SMALL | options)).eval()
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data.normal_(0, 0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as train.py writes it, of a model that has seen nothing."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    options = dict(SMALL, lowdim=dict(q=8, k=8, v=8, o=8))
    state = dict(step=5, options=dict(out_dir="out/tiny", gpt=options))
    checkpoint.save(folder, dict(model=GPT(GPTConfig(**SMALL)).state_dict()), state, ByteTokenizer())
    return folder


# --- The files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_a_file_in_each_tasks_format(name: str, tmp_path: Path) -> None:
    write_task(tmp_path, name)
    for split in ("train", *TASKS[name].dev_splits):
        assert glue_data.read(TASKS[name], split, tmp_path) == [Example(*row) for row in READ[name]]


@pytest.mark.parametrize(
    ("name", "row", "complaint"),
    [
        ("SST-2", b"no tab here", "line 4: wanted 2 fields with tabs between them"),
        ("SST-2", b"fine\tgood", "line 4: label 'good', wanted 0 or 1"),
        ("SST-2", b" \t1", "line 4: no text in sentence"),
        ("CoLA", b"ab01\t1\t\t\xffish", "line 0: 'utf-8' codec can't decode byte 0xff in position 62"),
        ("STS-B", b"0\tg\tf\ty\t1\tn\tn\tA\tB\t5.5", "line 4: score '5.5', wanted a number from 0 to 5"),
        ("STS-B", b"0\tg\tf\ty\t1\tn\tn\tA\tB\tnan", "line 4: score 'nan', wanted a number from 0 to 5"),
        ("STS-B", b"0\tg\tf\ty\t1\tn\tn\tA\tB\tx", "line 4: could not convert string to float: 'x'"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(name: str, row: bytes, complaint: str, tmp_path: Path) -> None:
    write_task(tmp_path, name)
    path = tmp_path / name / "train.tsv"
    path.write_bytes(path.read_bytes() + row + b"\n")
    with pytest.raises(UserError) as error:
        glue_data.read(TASKS[name], "train", tmp_path)
    assert str(error.value).startswith(f"{path}, at or after {complaint}")
    assert str(error.value).endswith("; correct or delete it")


def test_windows_line_ends_and_a_last_line_without_one(tmp_path: Path) -> None:
    write_task(tmp_path, "SST-2")
    path = tmp_path / "SST-2" / "dev.tsv"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n").removesuffix(b"\r\n"))
    assert glue_data.read(TASKS["SST-2"], "dev", tmp_path) == [Example(*row) for row in READ["SST-2"]]


def test_a_file_without_the_columns_or_without_rows(tmp_path: Path) -> None:
    write_task(tmp_path, "RTE")
    path = tmp_path / "RTE" / "dev.tsv"
    path.write_text("index\tsentence1\tsentence2\n0\tA\tB\n")
    with pytest.raises(UserError, match=r"dev.tsv has no column label in its first line"):
        glue_data.read(TASKS["RTE"], "dev", tmp_path)
    path.write_text("index\tsentence1\tsentence2\tlabel\n")
    with pytest.raises(UserError, match="RTE has no rows in dev"):
        glue_data.read(TASKS["RTE"], "dev", tmp_path)


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package datasets: the hub itself needs a network."""
    asked = []

    class Rows(list):
        column_names = ("premise", "hypothesis", "label", "idx")

    def load_dataset(*where: str, split: str) -> Rows:
        asked.append((*where, split))
        return Rows([dict(premise="It rains. ", hypothesis="It is dry.", label=2, idx=0)])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    rows = glue_data.read(TASKS["MNLI"], "dev_matched", None)
    assert rows == [Example(("It rains.", "It is dry."), 2)]
    assert asked == [("nyu-mll/glue", "mnli", "validation_matched")]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets; or give local files"):
        glue_data.read(TASKS["MNLI"], "train", None)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data/glue")
@pytest.mark.parametrize(
    ("name", "train", "dev", "chance"),
    [("CoLA", 8551, 1043, 0.691), ("SST-2", 67349, 872, 0.509), ("MRPC", 3668, 408, 0.684), ("RTE", 2490, 277, 0.527)],
)
def test_the_real_files(name: str, train: int, dev: int, chance: float) -> None:
    examples = {split: glue_data.read(TASKS[name], split, SHARED) for split in ("train", "dev")}
    assert [len(part) for part in examples.values()] == [train, dev]
    ones = sum(label for _, label in examples["dev"]) / dev
    assert max(ones, 1 - ones) == pytest.approx(chance, abs=5e-4)


# --- Metrics -------------------------------------------------------------------------------------------------------


def test_metrics_on_values_worked_out_by_hand() -> None:
    truth, predicted = torch.tensor([1, 1, 1, 0, 0, 1]).numpy(), torch.tensor([1, 1, 0, 0, 1, 1]).numpy()
    tp, tn, fp, fn = 3, 1, 1, 1
    metrics = glue_data.metrics()
    assert metrics["accuracy"](truth, predicted) == pytest.approx(4 / 6)
    assert metrics["f1"](truth, predicted) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    assert metrics["matthews"](truth, predicted) == pytest.approx((tp * tn - fp * fn) / product**0.5)
    scores, guesses = torch.tensor([0.0, 1.0, 2.0, 5.0]).numpy(), torch.tensor([0.0, 1.0, 4.0, 3.0]).numpy()
    # Deviations (-2, -1, 0, 3) and (-2, -1, 2, 1): 8 / sqrt(14 x 10). Ranks differ by (0, 0, 1, 1): 1 - 6 x 2 / 60.
    assert metrics["pearson"](scores, guesses) == pytest.approx(8 / math.sqrt(140))
    assert metrics["spearman"](scores, guesses) == pytest.approx(0.8)


def test_one_answer_every_time_scores_zero_where_it_would_be_undefined() -> None:
    truth, same = torch.tensor([0.0, 1.0, 1.0]).numpy(), torch.tensor([1.0, 1.0, 1.0]).numpy()
    scores = {name: metric(truth, same) for name, metric in glue_data.metrics().items()}
    assert scores == pytest.approx(dict(accuracy=2 / 3, f1=0.8, matthews=0, pearson=0, spearman=0))


def test_without_the_metrics_library_the_install_line_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(UserError, match=r"metrics need: pip install 'scikit-learn>=1\.4,<2' 'scipy>=1\.11,<2'"):
        glue_data.metrics()


def test_averages_of_the_paper() -> None:
    averages = [glue.average(dict(zip(TASKS, scores))) for scores in glue.PAPER.values()]
    assert averages == pytest.approx([67.47, 70.72], abs=0.006)


# --- Tokens, padding, the last state -------------------------------------------------------------------------------


def texts(n: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 40, (n,), generator=generator).tolist()
    return [torch.randint(256, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(norm_order="post", pos="learned", norm="layernorm", bias=True, tie_embeddings=True),
        dict(rope_dim=8, n_kv_head=1),
    ],
    ids=["setting 2", "setting 1", "decoupled RoPE"],
)
@torch.no_grad()
def test_neither_padding_nor_the_rest_of_a_batch_changes_a_result(options: dict) -> None:
    model = randomised(**options)
    rows = texts(24)
    # One text at a time, without padding, through a head applied by hand to the state that the model's head reads
    states = torch.cat([model.hidden(row[None])[:, -1] for row in rows])
    classifier = glue.Classifier(model, 3, dropout=0.1).eval()
    alone = states @ classifier.head.weight.T + classifier.head.bias
    for size in (24, 5):
        for order in (torch.arange(24), torch.randperm(24, generator=torch.Generator().manual_seed(size))):
            y = torch.empty(24, 3)
            for batch in order.split(size):
                y[batch] = classifier(*glue_data.collate([rows[i] for i in batch.tolist()], CPU))
            torch.testing.assert_close(y, alone, rtol=0, atol=1e-6)
    idx, last = glue_data.collate(rows, CPU)
    wider = torch.cat([idx, torch.full((24, 7), 99)], dim=1)
    torch.testing.assert_close(classifier(wider, last), alone, rtol=0, atol=1e-6)
    # The control: a head that reads the last column instead sees padding.
    assert (classifier(idx, torch.full_like(last, idx.size(1) - 1)) - alone).abs().max() > 0.01


@torch.no_grad()
def test_hidden_is_what_the_head_reads() -> None:
    for options in ({}, dict(norm_order="post")):
        model, idx = randomised(**options), torch.randint(256, (3, 20))
        torch.testing.assert_close(model.lm_head(model.hidden(idx)), model(idx))
        torch.testing.assert_close(model(idx, last=True), model(idx)[:, -1:])


def test_the_longer_of_two_texts_is_cut() -> None:
    examples = [Example(("a" * 30, "bcd"), 0), Example(("a", "b"), 1)]
    encoded = glue_data.encode(TASKS["MRPC"], examples, ByteTokenizer(), block_size=12)
    assert [bytes(row.tolist()) for row in encoded.ids] == [b"aaaaaaa\nbcd\n", b"a\nb\n"]
    with pytest.raises(UserError, match="block_size is 3, too small for a token of each text of MRPC"):
        glue_data.encode(TASKS["MRPC"], examples, ByteTokenizer(), block_size=3)


def test_batches_hold_each_example_once_and_alike_in_length() -> None:
    lengths = torch.randint(1, 100, (1000,), generator=torch.Generator().manual_seed(1))
    first = glue_data.batches(lengths, 16, seed=1, epoch=0)
    assert torch.equal(torch.cat(first).sort().values, torch.arange(1000))
    assert all(torch.equal(a, b) for a, b in zip(first, glue_data.batches(lengths, 16, seed=1, epoch=0), strict=True))
    assert not torch.equal(torch.cat(first), torch.cat(glue_data.batches(lengths, 16, seed=1, epoch=1)))
    assert not torch.equal(torch.cat(first), torch.cat(glue_data.batches(lengths, 16, seed=2, epoch=0)))
    padding = sum(int((lengths[batch].max() - lengths[batch]).sum()) for batch in first)
    assert padding < 0.1 * lengths.sum()


def test_the_learning_rate_rises_and_falls() -> None:
    shares = [glue.share_of_rate(20, 0.1, step) for step in range(20)]
    assert shares[:3] == [0.5, 1.0, 1.0]
    assert shares[-1] == pytest.approx(1 / 18)
    assert glue.share_of_rate(1, 0.1, 0) == 1.0


# --- Fine-tuning ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CoLA", "STS-B"])
def test_fine_tuning_learns_what_can_be_learned(name: str) -> None:
    """Texts of two kinds, told apart by one early byte; and the checkpoint's own weights stay as they are."""
    task, model = TASKS[name], GPT(GPTConfig(**SMALL))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [(f"{'xy'[i % 2]} {'z' * (i % 7)}",) for i in range(96)]
    examples = [
        Example(text * len(task.text_columns), i % 2 * (1 if task.labels else 4)) for i, text in enumerate(kinds)
    ]
    encoded = glue_data.encode(task, examples, ByteTokenizer(), 48)
    recipe = glue.Recipe(epochs=5, batch_size=8, dropout=0.0)
    scores = glue.fine_tune(model, task, encoded, {"dev": encoded}, recipe, 5e-3, 1, "test")
    assert min(scores) > 0.8
    assert scores == glue.fine_tune(model, task, encoded, {"dev": encoded}, recipe, 5e-3, 1, "test")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def options(run_folder: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [str(run_folder), f"--data={data}", f"--out={out}", "--device=cpu", "--epochs=1", *more]


@pytest.mark.filterwarnings("ignore:A single label was found")  # one example is held out here
def test_finished_results_are_kept_and_an_interrupted_table_goes_on(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CoLA", "MNLI", "STS-B"):
        write_task(tmp_path, name, rows=8)
    started, fine_tune = [], glue.fine_tune

    def counted(model: GPT, task: object, *rest: object) -> list[float]:
        started.append(task.name)
        if len(started) == 3:
            raise KeyboardInterrupt
        return fine_tune(model, task, *rest)

    monkeypatch.setattr(glue, "fine_tune", counted)
    arguments = options(run_folder, tmp_path, tmp_path / "glue.md", "--seeds=2")
    with pytest.raises(UserError, match=r"finished is in .*glue.jsonl, and the same command continues"):
        glue.main(glue.parse(arguments, glue.Options))
    assert len((tmp_path / "glue.jsonl").read_text().splitlines()) == 2
    glue.main(glue.parse(arguments, glue.Options))
    assert started == ["CoLA", "CoLA", "STS-B", "STS-B", "STS-B", "MNLI", "MNLI"]
    lines = [json.loads(line) for line in (tmp_path / "glue.jsonl").read_text().splitlines()]
    assert [len(line["scores"]) for line in lines] == [1, 1, 2, 2, 2, 2]
    first = (tmp_path / "glue.md").read_text()
    glue.main(glue.parse(arguments, glue.Options))
    assert len(started) == 7
    assert (tmp_path / "glue.md").read_text() == first
    glue.main(glue.parse([*arguments, "--tasks", "CoLA", "--rates", "1e-3", "1e-2"], glue.Options))
    assert started[7:] == ["CoLA"] * 4  # two rates on what is held out, then two seeds
    write_task(tmp_path, "CoLA", rows=9)  # other data is another result
    glue.main(glue.parse([*arguments, "--tasks", "CoLA"], glue.Options))
    assert len(started) == 13

    table = [line for line in first.splitlines() if line.startswith("|")]
    first_metric = torch.tensor([100 * line["scores"][0] for line in lines[2:4]], dtype=torch.float64)
    cells = dict(zip(*([cell.strip() for cell in row.split("|")] for row in (table[0], table[3]))))
    assert cells["model"] == "tiny, step 5"
    assert cells["STS-B Pearson/Spearman"].startswith(f"{first_metric.mean():.2f} ± {first_metric.std():.2f} / ")
    assert cells["RTE Acc"] == "–"
    assert "| *paper: LPA, 319M* |  | 25.46 | 86.51 | 78.92 / – | 87.44 / 83.06 |" in first


def test_bad_input(run_folder: Path, tmp_path: Path) -> None:
    write_task(tmp_path, "SST-2")
    arguments = options(run_folder, tmp_path, tmp_path / "glue.md")
    with pytest.raises(UserError, match="holds no checkpoint: train first"):
        glue.main(glue.parse(options(tmp_path, tmp_path, tmp_path / "glue.md"), glue.Options))
    with pytest.raises(UserError, match="no run folder is given"):
        glue.parse([f"--data={tmp_path}"], glue.Options)
    with pytest.raises(UserError, match=r"'sst2'.*CoLA"):
        glue.parse([*arguments, "--tasks", "sst2"], glue.Options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="wanted a folder with GLUE's tasks"):
        glue.main(glue.parse(options(run_folder, tmp_path / "empty", tmp_path / "glue.md"), glue.Options))
    (tmp_path / "glue.jsonl").write_text("{\n")
    with pytest.raises(UserError, match="is no file of results"):
        glue.main(glue.parse(arguments, glue.Options))
