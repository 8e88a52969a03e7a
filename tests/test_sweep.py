"""Sweeps of real, tiny runs, and what is built on them: tables of the paper, the report.

    .venv/bin/pytest tests/test_sweep.py        CPU, about 30 s
"""

import csv
import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import start
from test_plot import BITS, write_log

from config import UserError, parse
from experiments import report, sweep
from experiments.lpa import tables

TINY = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--ffn_dim=32", "--batch_size=2"]
TINY += ["--tokens_per_step=32", "--max_steps=4", "--eval_interval=2", "--eval_tokens=64", "--log_interval=1"]
TINY += ["--lowdim.q=4", "--lowdim.k=4", "--lowdim.v=4", "--lowdim.o=4", "--device=cpu"]


class Job:
    """What sweep.start returns, but started as a copy of a process that has imported torch: seconds less."""

    def __init__(self, run: sweep.Run, _: sweep.SweepConfig) -> None:
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        command = ["train.py", *run.arguments, f"--out_dir={run.folder}", "--resume=auto"]
        self.process = start(command, run.folder.with_suffix(".out"))

    def poll(self) -> int | None:
        return self.process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode


@pytest.fixture
def quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "start", Job)


def arguments(corpus: Path, tmp_path: Path, *more: str) -> list[str]:
    places = [f"--dataset={corpus}", f"--out_dir={tmp_path / 'runs'}", f"--out={tmp_path / 'table'}"]
    return ["config/lpa_cpu.py", *TINY, *places, *more]


def rows(tmp_path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))


def losses(tmp_path: Path, arm: str) -> list[float]:
    """The last validation loss of each run of an arm, read from the logs."""
    logs = sorted((tmp_path / "runs").glob(f"{arm}_seed=*/log.jsonl"))
    records = [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]
    return [[r["val_loss"] for r in run if "val_loss" in r][-1] for run in records]


@pytest.mark.usefixtures("quick_start")
def test_a_grid_has_mean_and_spread_and_is_not_run_again(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(corpus, tmp_path, "--grid", "learning_rate=1e-4,1e-3", "--seeds=2", "--extend=false")
    sweep.main(command)
    printed = capsys.readouterr().out
    assert "learning_rate = 1e-3 is the best and lies at the edge of its grid; the next value is 0.01" in printed
    assert "plot: python -m experiments.plot" in printed
    found = {row["arm"]: row for row in rows(tmp_path)}
    for arm in ("learning_rate=1e-4", "learning_rate=1e-3"):
        expected = losses(tmp_path, arm)
        assert len(expected) == 2
        assert float(found[arm]["val_loss"]) == pytest.approx(statistics.mean(expected))
        assert float(found[arm]["val_loss_std"]) == pytest.approx(statistics.stdev(expected))
    assert rows(tmp_path)[0]["arm"] == "learning_rate=1e-3"  # the best first
    before = {log: log.stat().st_mtime_ns for log in (tmp_path / "runs").glob("*/log.jsonl")}
    sweep.main(command)
    assert before == {log: log.stat().st_mtime_ns for log in (tmp_path / "runs").glob("*/log.jsonl")}


@pytest.mark.usefixtures("quick_start")
def test_the_grid_grows_at_its_edge(corpus: Path, tmp_path: Path) -> None:
    sweep.main(arguments(corpus, tmp_path, "--grid", "learning_rate=1e-5,1e-4"))
    tried = sorted(float(row["arm"].removeprefix("learning_rate=")) for row in rows(tmp_path))
    assert tried == pytest.approx([10.0**e for e in range(-5, -5 + len(tried))])
    assert len(tried) > 2


@pytest.mark.parametrize(
    ("values", "best", "further"),
    [
        (["1e-3", "2e-3"], "2e-3", "0.004"),
        (["1e-3", "2e-3"], "1e-3", "0.0005"),
        (["8", "16", "32"], "32", "64"),
        (["8", "16", "32"], "16", None),
        (["adamw", "muon"], "muon", None),
        (["0", "8"], "0", None),
        (["4"], "4", None),
    ],
)
def test_next_value(values: list[str], best: str, further: str | None) -> None:
    assert sweep.next_value(values, best) == further


@pytest.mark.usefixtures("quick_start")
def test_a_failed_run_is_named_and_the_others_continue(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--grid=learning_rate=1e30,1e-3", "--max_steps=30", "--grad_clip=0", "--extend=false"]
    command = arguments(corpus, tmp_path, *options)
    with pytest.raises(UserError, match="1 runs failed; the same command tries them again"):
        sweep.main([*command, "--optimizer=adamw", "--schedule=cosine"])
    assert "learning_rate=1e30 seed=1 ended with code 2: error: 10 steps in a row" in capsys.readouterr().err
    assert [row["arm"] for row in rows(tmp_path)] == ["learning_rate=1e-3"]


def test_a_stopped_sweep_resumes(corpus: Path, tmp_path: Path) -> None:
    run = sweep.make_run("arm", ["config/lpa_cpu.py", *TINY, f"--dataset={corpus}"], tmp_path / "runs")
    with pytest.raises(UserError, match="stopped; finished runs stay, the same command continues"):
        sweep.train_all([run], sweep.SweepConfig(minutes=1e-9))
    assert sweep.result(run) is None
    assert sweep.train_all([run], sweep.SweepConfig()) == []
    assert sweep.result(run, target=100.0)["seconds_to_target"] <= sweep.result(run)["seconds"]
    assert sweep.result(run, target=0.0)["seconds_to_target"] == float("inf")


def test_a_run_that_ends_without_a_finite_loss_is_not_trained_again(corpus: Path, tmp_path: Path) -> None:
    run = sweep.make_run("arm", ["config/lpa_cpu.py", *TINY, f"--dataset={corpus}"], tmp_path / "runs")
    assert sweep.train_all([run], sweep.SweepConfig()) == []
    log = run.folder / "log.jsonl"
    log.write_text(re.sub(r'"val_loss": [^,}]+', '"val_loss": null', log.read_text()))
    found = sweep.result(run, target=2.0)
    assert {found[key] for key in ("val_loss", "bits_per_byte", "seconds_to_target")} == {float("inf")}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--grid", "learning_rate"], "--grid has 'learning_rate', wanted OPTION=VALUE,VALUE"),
        (["--grid", "learning_rat=1,2"], "perhaps you meant --learning_rate"),
        (["--seeds=0"], "seeds is 0, wanted 1 or more"),
    ],
)
def test_bad_input_is_one_line(corpus: Path, tmp_path: Path, more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sweep.main(arguments(corpus, tmp_path, *more))


def test_another_option_or_seed_is_another_run(corpus: Path, tmp_path: Path) -> None:
    base = ["config/lpa_cpu.py", *TINY, f"--dataset={corpus}"]
    changes = ([], ["--weight_decay=0.5"], ["--seed=2"], ["--lowdim.q=2"])
    assert len({sweep.make_run("arm", [*base, *more], tmp_path).folder for more in changes}) == 4
    silent = sweep.make_run("arm", [*base, "--wandb=false", "--resume=auto"], tmp_path)
    assert silent.folder == sweep.make_run("arm", base, tmp_path).folder


@pytest.mark.usefixtures("quick_start")
def test_a_table_of_the_paper_compares(corpus: Path, tmp_path: Path) -> None:
    o = parse(
        ["--table=3", f"--dataset={corpus}", "--max_steps=4", "--seeds=1", "--jobs=2", "--rates", "1e-3",
         f"--out_dir={tmp_path / 'runs'}", f"--results={tmp_path}"],
        tables.Options,
    )  # fmt: skip
    tables.main(o)
    text = (tmp_path / "lpa_table_3_cpu.md").read_text()
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| cpu")]
    assert [line[1] for line in lines] == ["Transformer", "same-param", "LPA"]
    assert lines[2][2] == "q k v o: 16"
    assert all(float(line[7]) > 5 for line in lines)  # the losses of 4 steps
    with pytest.raises(UserError, match="table 4 has no runs at scale cpu"):
        tables.main(parse(["--table=4"], tables.Options))


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            assert not name.startswith("on")
            assert name != "src"
            assert "http" not in (value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_report_shows_runs_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    runs = [write_log(tmp_path / "dense"), write_log(tmp_path / "low<b>", rank=8, learning_rate=5e-4)]
    with open(runs[1] / "log.jsonl", "a") as log:
        log.write(json.dumps(dict(step=30, sample="</pre><script>alert(1)</script>")) + "\n")
    report.main(parse([*map(str, runs), f"--out={tmp_path / 'page.html'}"], report.Options))
    page = Page((tmp_path / "page.html").read_text())
    assert page.tags.count("svg") == 2
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "</pre><script>alert(1)</script>" in page.text
    for shown in ("learning_rate", "0.0005", "gpt.lowdim.q", "30 of 30", f"{3.8 * BITS:.5g}"):
        assert shown in page.text
