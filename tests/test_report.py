"""The page about runs, read by html.parser: what it names, what it must not hold, its size, its figures.

    .venv/bin/pytest tests/test_report.py                  CPU, about 20 s
    .venv/bin/pytest -m slow tests/test_report.py          a look through Chromium, where it is installed
"""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_here
from test_plot import BITS, write_log
from test_spectrum import LPA, RUN, SHAPE

from config import UserError, parse
from experiments import logs, plot, report
from lpa import checkpoint

pytest.importorskip("matplotlib", reason="pictures need matplotlib")

VOID = {"meta", "br"}
NASTY = "</pre><script>alert('x')</script> & <b>bold</b> https://example.com"


class Page(HTMLParser):
    """Tags, attributes, and tables as {row: cells}; a tag that is closed out of turn fails."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.rows: dict[str, list[str]] = {}
        self.feed(self.html)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells: list[str] = []
        if tag in ("th", "td"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "tr":
            self.rows[self.cells[0]] = self.cells[1:]

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.open and self.open[-1] in ("th", "td"):
            self.cells[-1] += data


def page_of(tmp_path: Path, *arguments: object) -> Page:
    report.main(parse([*map(str, arguments), f"--out={tmp_path}/new/report.html"], report.Options))
    return Page(tmp_path / "new" / "report.html")


def require_alone(page: Page) -> None:
    """Nothing that runs, and nothing that is fetched."""
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on") and name != "src" and "http" not in (value or "")
        assert not name.endswith("href") or (value or "").startswith("#")
    assert "@import" not in page.html


def test_every_run_and_every_differing_option_is_told(tmp_path: Path) -> None:
    runs = [
        write_log(tmp_path / "dense", log_interval=5),
        write_log(tmp_path / "low<b>", rank=8, steps=20, learning_rate=5e-4),
    ]
    with open(runs[1] / "log.jsonl", "a") as log:
        log.writelines(json.dumps(dict(step=step, sample=f"{step:02}: {NASTY}")) + "\n" for step in range(1, 21))
    page = page_of(tmp_path, *runs)
    require_alone(page)
    text = "".join(page.text)
    assert page.rows["folder"] == [str(run) for run in runs]
    first, second = ({**logs.read_run(run).options} for run in runs)
    differing = {name for name in first if first[name] != second[name]} - {"out_dir"}
    assert differing == {*(f"gpt.lowdim.{x}" for x in "qkvo"), "learning_rate", "log_interval"}
    for name in differing:
        assert page.rows[name] == [f"{first[name]:g}", f"{second[name]:g}"]
    assert page.rows["step"] == ["30 of 30", "20 of 30, not finished"]
    assert page.rows["training tokens"] == ["1,920", "1,280"]
    assert page.rows["last validation loss (nats a token)"] == ["3.8000", "3.9000"]
    assert page.rows["seed"] == ["1"]  # among what is shared
    assert page.tags.count("svg") == 2
    told = [number for number in range(1, 21) if f"{number:02}: {NASTY}" in text]
    assert told[0] == 1 and told[-1] == 20 and len(told) == report.SAMPLES


def test_eight_long_runs_are_a_small_page(tmp_path: Path) -> None:
    line = dict(loss=3.0, lr=1e-3, grad_norm=1.0, tokens_per_second=1e5, mfu=0.3, seconds=1.0)
    generator = np.random.default_rng(1)
    runs = []
    for seed in range(8):
        run = write_log(tmp_path / f"run{seed}", steps=10, seed=seed)
        with open(run / "log.jsonl", "a") as log:
            for step, loss in enumerate(generator.normal(3, 0.1, 10_000), start=11):
                log.write(json.dumps(line | dict(step=step, tokens=64 * step, loss=loss)) + "\n")
                if step % 100 == 0:
                    log.write(json.dumps(dict(step=step, val_loss=loss, val_bits_per_byte=loss)) + "\n")
        runs.append(run)
    page = page_of(tmp_path, *runs)
    require_alone(page)
    assert 50_000 < len(page.html.encode()) < 3_000_000
    assert "of up to 10,010 points, 500 are drawn" in "".join(page.text)
    assert page.rows["seed"] == [str(seed) for seed in range(8)]


def test_a_thinned_curve_keeps_its_ends() -> None:
    x = np.arange(10_000.0)
    thin = report.thinned(plot.Curve("a", x, x**2, x - 1, x + 1))
    assert len(thin.x) == report.POINTS and thin.x[0] == 0 and thin.x[-1] == 9999
    np.testing.assert_array_equal(thin.y, thin.x**2)
    assert np.ptp(np.diff(thin.x)) <= 1
    short = report.thinned(plot.Curve("b", x[:7], x[:7], x[:7], x[:7]))
    np.testing.assert_array_equal(short.x, x[:7])


def test_runs_of_other_tokens_are_compared_in_bits(tmp_path: Path) -> None:
    page = page_of(tmp_path, write_log(tmp_path / "a"), write_log(tmp_path / "b", bits=0.3, vocab=1024))
    assert page.tags.count("svg") == 1 and "only their bits a byte can be compared" in "".join(page.text)


def test_singular_values_and_bench_figures(corpus: Path, tmp_path: Path) -> None:
    runs = [tmp_path / "dense", tmp_path / "low"]
    for out, options in zip(runs, ([], LPA)):
        run_here(["train.py", *SHAPE, *options, *RUN, f"--dataset={corpus}", f"--out_dir={out}"])
    figures = dict(params=12345, ms_median=1.25, mfu=None, ratio_to_dense=dict(ms=0.5))
    (runs[1] / "bench.json").write_text(json.dumps(dict(model=figures, dense=dict(params=23456, ms_median=2.5))))
    page = page_of(tmp_path, *runs)
    require_alone(page)
    model = checkpoint.load_model(runs[0], torch.device("cpu"))[0]
    wanted = []
    for block in model.transformer.h:
        p = np.linalg.svd(block.attn.q.weight.detach().double().numpy(), compute_uv=False)
        p /= p.sum()
        wanted.append(np.exp(-(p * np.log(p)).sum()))
    assert page.rows["q"][0] == f"{np.mean(wanted):.1f} of 32" and page.rows["q"][1].endswith(" of 8")
    assert page.rows["params"] == ["12,345", "23,456"] and page.rows["ratio_to_dense.ms"] == ["0.5", "–"]
    assert page.rows["torch"] == [torch.__version__] * 2
    without = page_of(tmp_path, *runs, "--singular_values=false")
    assert "q" not in without.rows and without.tags.count("svg") == page.tags.count("svg") - 1


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    run = write_log(tmp_path / "a")
    (tmp_path / "list.json").write_text("[1]")
    for arguments, message in (
        ([tmp_path / "nothing"], "no .*nothing/log.jsonl: wanted a run folder"),
        ([run, f"--bench={tmp_path}/none.json"], "cannot read .*none.json: No such file"),
        ([run, f"--bench={tmp_path}/list.json"], "list.json is not what bench.py --json prints"),
        ([run, f"--out={run}/log.jsonl/report.html"], "cannot write"),
        ([], "no run is named"),
    ):
        with pytest.raises(UserError, match=message) as error:
            report.main(parse([str(a) for a in arguments], report.Options))
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_eight_runs_of_ten_thousand_logged_steps_make_a_page_below_3_mb(tmp_path: Path) -> None:
    """With noise, evaluations and samples, as runs have them."""
    noise = np.random.default_rng(1)
    folders = []
    for number in range(8):
        folder = write_log(tmp_path / f"run_{number}", rank=8 * (number % 4), steps=10_000, seed=number)
        first, *records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for record in records:
            loss = 2 + 3 * math.exp(-record["step"] / 3000) + noise.normal(0, 0.1)
            record |= dict(val_loss=loss, val_bits_per_byte=BITS * loss) if "val_loss" in record else dict(loss=loss)
        records += [dict(step=step, sample=NASTY * 5) for step in range(0, 10_001, 1000)]
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, [first, *records])) + "\n")
        folders.append(str(folder))
    out = tmp_path / "report.html"
    report.main(parse([*folders, f"--out={out}"], report.Options))
    assert out.stat().st_size < 3_000_000
    page = Page(out)
    drawn = [path for path in re.findall(r'<path d="([^"]*)"', page.html) if path.count("L") > 100]
    assert len(drawn) == 2 * 8  # a training and a validation curve of each run


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium, from: apt-get install chromium")
def test_chromium_shows_it(tmp_path: Path) -> None:
    from matplotlib.image import imread

    page_of(tmp_path, write_log(tmp_path / "dense"), write_log(tmp_path / "low", rank=8))
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    for width in (400, 1000):  # a phone, a screen
        shot = tmp_path / f"{width}.png"
        places = [f"--user-data-dir={tmp_path}/profile", f"--screenshot={shot}", f"--window-size={width},2000"]
        address = (tmp_path / "new" / "report.html").as_uri()
        subprocess.run(["chromium", *quiet, *places, address], check=True, capture_output=True, timeout=120)
        grey = imread(shot)[..., :3].mean(-1)  # (2000, width), 1 = white
        assert 0.01 < (grey < 0.5).mean() < 0.5  # letters and lines
        inked = (grey < 0.5).any(1)
        assert all(inked[start : start + 250].any() for start in range(0, 1250, 250))  # from top to bottom
