"""The paper's tables: what they compare, and runs that are recognised, refused, stopped and continued.

.venv/bin/pytest tests/test_lpa_tables.py        CPU, about 70 s
"""

import dataclasses
import json
import math
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import run_here
from experiments.lpa_models import SCALES, TABLES, arms
from experiments.lpa_runs import Options

from config import UserError, as_arguments, load_config
from experiments import lpa_models, lpa_runs, lpa_tables
from model import GPT


def counted(arm: lpa_models.Arm, scale: str, inside: bool = False) -> int:
    c = load_config([arm.preset, *as_arguments(SCALES[scale].changes | arm.changes)])
    with torch.device("meta"):
        return GPT(c.gpt).n_params(embeddings=not inside)


def test_parameters_are_those_that_the_paper_prints() -> None:
    checked = {}
    for table in TABLES:
        for arm in arms(table, "paper"):
            unit, digits = (1e9, 2) if arm.printed.endswith("B") else (1e6, 0)
            checked[arm.setting, arm.model] = (counted(arm, "paper") / unit, float(arm.printed[:-1]), 0.5 * 10**-digits)
    wrong = {key for key, (count, printed, half) in checked.items() if abs(count - printed) > half}
    assert len(checked) == 36
    assert wrong == {("S1 370M", "low all"), ("S1 370M", "LPA r=32"), ("3B", "LPA")}  # their notes say so
    for key in wrong:
        count, printed, half = checked[key]
        assert abs(count - printed) < 1.4 * half


@pytest.mark.parametrize(("scale", "setting"), [("cpu", "cpu"), ("gpu", "S2 130M"), ("paper", "S2 370M")])
def test_same_param_models_match(scale: str, setting: str) -> None:
    inside = {arm.model: counted(arm, scale, inside=True) for arm in arms("3", scale) if arm.setting == setting}
    saved = inside["Transformer"] - inside["LPA"]
    assert inside["LPA"] / inside["Transformer"] < 0.85
    assert abs(inside["same-param"] - inside["LPA"]) < 0.05 * saved
    for arm in arms("1", scale):
        if arm.setting == setting and arm.model != "Transformer":
            assert abs(counted(arm, scale, inside=True) - inside["LPA"]) < 0.1 * saved


def test_surplus_models_have_what_dense_has() -> None:
    inside = {arm.model: counted(arm, "cpu", inside=True) for arm in arms("8", "cpu")}
    for name in ("Attn Dim.", "FFN Dim.", "Layer Num."):
        assert inside[name] == pytest.approx(inside["Transformer"], rel=0.025)


def options(corpus: Path, out: Path, **more: object) -> Options:
    small = dict(table="3", seeds=1, rates=(1e-3,), dataset=str(corpus), max_steps=3)
    return Options(**small | dict(out_dir=out / "runs", results=out / "results", jobs=3) | more)


@pytest.fixture(scope="module")
def done(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """Table 3, trained for three steps."""
    o = options(corpus, tmp_path_factory.mktemp("tables"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lpa_runs, "start", start_here)
        lpa_tables.main(o)
    return o


def start_here(_: Options, run: lpa_runs.Run) -> subprocess.Popen:
    """In this process, which saves the seconds of a start."""
    run_here(["train.py", *run.arguments, f"--out_dir={run.folder}", "--resume=auto"])
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended


def runs_of(o: Options) -> list[lpa_runs.Run]:
    return [lpa_runs.make_run(o, row, 1e-3, seed=1) for row in lpa_runs.table_rows(o)]


def no_start(*_: object) -> None:
    raise AssertionError("a run was started")


def test_the_table_has_the_papers_column(done: Options) -> None:
    lines = (done.results / "lpa_table_3_cpu.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    rows = [dict(zip(table[0], row)) for row in table[2:]]
    assert [row["model"] for row in rows] == ["Transformer", "same-param", "LPA"]
    assert [row["paper: test perplexity"].split()[0] for row in rows] == ["13.65", "13.75", "12.89"]
    assert [row["init"] for row in rows] == ["-", "-", "spectral"]
    for run, row in zip(runs_of(done), rows):
        last = json.loads((run.folder / "log.jsonl").read_text().splitlines()[-1])
        assert row["val loss"] == f"{last['val_loss']:.4f}"
        assert row["bits per byte"] == f"{last['val_bits_per_byte']:.4f}"
        assert row["val perplexity"] == f"{math.exp(last['val_loss']):.2f}"


def test_a_finished_run_is_not_repeated(done: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor in another table that holds the same model."""
    monkeypatch.setattr(lpa_runs, "start", no_start)
    lpa_tables.main(done)
    shared = [run.folder.exists() for run in runs_of(dataclasses.replace(done, table="1"))]
    assert shared == [True, True, False, False]


@pytest.mark.parametrize("change", [dict(max_steps=4), dict(dropouts=(0.1,))])
def test_another_option_is_another_run(done: Options, change: dict) -> None:
    assert not any(run.folder.exists() for run in runs_of(dataclasses.replace(done, **change)))


def test_other_data_is_another_run(done: Options, corpus: Path, tmp_path: Path) -> None:
    """Under the same name, too."""
    run = runs_of(done)[0]
    other = dataclasses.replace(run, fingerprints=("0123456789abcdef", run.fingerprints[1]))
    assert other.folder != run.folder
    shutil.copytree(run.folder, other.folder)
    with pytest.raises(UserError, match=r"is of another run .*data: the checkpoint has"):
        lpa_runs.finished(other)
    shutil.rmtree(other.folder)


def test_a_folder_of_another_model_is_refused(done: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lpa_runs, "start", no_start)
    shutil.copytree(done.out_dir, tmp_path / "runs")
    o = dataclasses.replace(done, out_dir=tmp_path / "runs", results=tmp_path)
    path = runs_of(o)[0].folder / "config.json"
    saved = json.loads(path.read_text())
    saved["gpt"]["n_layer"] = 5
    path.write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"is of another run .*n_layer: the checkpoint has 5, this run 6") as error:
        lpa_tables.main(o)
    assert "\n" not in str(error.value)
    assert json.loads(path.read_text()) == saved  # nothing was touched


def test_dry_run_runs_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(lpa_runs, "start", no_start)
    lpa_tables.main(options(corpus, tmp_path, dry_run=True))
    assert "301,888" in capsys.readouterr().out
    lpa_tables.main(Options("8", "paper", dry_run=True, out_dir=tmp_path / "runs", results=tmp_path / "results"))
    shown = capsys.readouterr().out
    assert "--attn_dim=3072" in shown and "hours" in shown
    assert list(tmp_path.iterdir()) == []


def test_an_absent_corpus_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no corpus nowhere.*--tokenizer=bpe:1024"):
        lpa_tables.main(options(Path("nowhere"), tmp_path))


def test_a_table_without_runs_at_a_scale_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="table 4 has no runs at scale cpu"):
        lpa_tables.main(Options("4", "cpu", dry_run=True))


def test_an_interrupted_run_goes_on(corpus: Path, tmp_path: Path) -> None:
    o = options(corpus, tmp_path, max_steps=60)
    run = runs_of(o)[2]
    job = lpa_runs.start(o, run)
    log = run.folder / "log.jsonl"
    while job.poll() is None and not (log.exists() and '"loss"' in log.read_text()):
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait() == 0
    stopped_at = int((run.folder / "ckpt" / "last").read_text().removeprefix("step_"))
    assert 0 < stopped_at < 60
    assert not lpa_runs.finished(run)
    lpa_runs.train_all(o, [run], math.inf)
    assert lpa_runs.finished(run)
    assert f"continuing from {run.folder}/ckpt/step_{stopped_at}" in run.folder.with_suffix(".out").read_text()


def test_a_second_interrupt_leaves_no_job() -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(); time.sleep(60)"
    job = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE)
    job.stdout.readline()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of pytest-xdist ignore it
    threading.Timer(0.3, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
    lpa_runs.stop([job])
    signal.signal(signal.SIGINT, before)
    assert job.returncode == -signal.SIGKILL


def test_a_deadline_stops_all_jobs(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, start = [], lpa_runs.start
    monkeypatch.setattr(lpa_runs, "start", lambda o, run: jobs.append(start(o, run)) or jobs[-1])
    o = options(corpus, tmp_path, max_steps=5000)
    with pytest.raises(UserError, match="the same command goes on"):
        lpa_runs.train_all(o, runs_of(o)[:2], time.monotonic())
    assert len(jobs) == 2
    assert all(job.returncode is not None for job in jobs)


def test_a_failed_run_is_one_line(corpus: Path, tmp_path: Path) -> None:
    o = options(corpus, tmp_path)
    run = dataclasses.replace(runs_of(o)[0], arguments=["config/absent.py"])
    with pytest.raises(UserError, match=r"ended with code 2: error: no preset file config/absent\.py") as error:
        lpa_runs.train_all(o, [run], math.inf)
    assert "\n" not in str(error.value)


def test_the_best_rate_is_taken(corpus: Path, tmp_path: Path) -> None:
    """From logs as train.py writes them; a lost run is the worst of all."""
    o = options(corpus, tmp_path, rates=(1e-3, 2e-3, 4e-3))
    row = next(lpa_runs.table_rows(o))
    for run, loss in zip(lpa_runs.tuning_runs(o, row), (3.0, 2.5, None)):
        run.folder.mkdir(parents=True)
        lines = [dict(step=0, options={}), dict(step=run.config.max_steps, loss=3.0, seconds=1.0)]
        lines += [dict(step=run.config.max_steps, val_loss=loss, val_bits_per_byte=loss)]
        (run.folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert lpa_runs.best_rate(o, row) == 2e-3


def test_the_crossing_lies_between_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gaps of +0.02, +0.01 and -0.01 at three sizes: half-way between the last two in log parameters."""
    o = Options("size", "cpu", dataset="unused", out_dir=tmp_path)
    rows = list(lpa_runs.table_rows(o))
    losses = [3.0, 3.02, 2.9, 2.91, 2.8, 2.79]
    monkeypatch.setattr(lpa_tables, "read_result", lambda loss: dict(val_loss=loss))
    text = lpa_tables.crossing(rows, [[loss] for loss in losses])
    sizes = [lpa_runs.count(row.config.gpt)[0] for row in rows[::2]]
    assert f"overtakes at about {statistics.geometric_mean(sizes[1:]) / 1e6:.3g}M" in text
    assert "Nowhere" in lpa_tables.crossing(rows, [[loss] for loss in sorted(losses)])


def test_a_rate_tried_at_the_whole_length_is_the_first_seeds_run(corpus: Path, tmp_path: Path) -> None:
    o = options(corpus, tmp_path, max_steps=60, rates=(1e-3, 2e-3), tune_share=1.0)
    row = next(lpa_runs.table_rows(o))
    tried = {run.folder for run in lpa_runs.tuning_runs(o, row)}
    assert tried == {lpa_runs.make_run(o, row, rate, seed=1).folder for rate in o.rates}


def test_the_table_stands_in_the_verdict_and_small_logs_beside_it(tmp_path: Path) -> None:
    o = lpa_runs.Options(table="6", results=tmp_path)
    (tmp_path / "lpa.md").write_text("before\n<!-- table 6 cpu -->\nold\n<!-- table 6 cpu -->\nafter\n")
    lpa_tables.write(o, "# title\n\n| a |\n|---|\n")
    assert (tmp_path / "lpa.md").read_text() == (
        "before\n<!-- table 6 cpu -->\n| a |\n|---|\n<!-- table 6 cpu -->\nafter\n"
    )
    lines = ['{"versions": 1}\n', *(f'{{"step": {i}, "loss": 1}}\n' for i in range(1000)), '{"val_loss": 2}\n']
    small = lpa_tables.thinned(lines)
    assert small[:2] == lines[:2]
    assert small[-2:] == lines[-2:]
    assert len(small) == 62
