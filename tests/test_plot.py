"""Pictures from logs: what is drawn against the log's own numbers, names, a log being written, bad input.

    .venv/bin/pytest tests/test_plot.py        CPU, about 5 s
"""

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from config import TrainConfig, UserError, parse
from experiments import logs, plot
from lpa import counts
from model import GPT, GPTConfig, LowDim

pytest.importorskip("matplotlib", reason="pictures need matplotlib")

BITS = 1.0 / math.log(2)  # a byte is a token


def shape(rank: int, vocab_size: int = 256) -> GPTConfig:
    lowdim = LowDim(**dict.fromkeys("qkvo", rank))
    return GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, lowdim=lowdim, vocab_size=vocab_size)


def write_log(
    folder: Path, rank: int = 0, steps: int = 30, bits: float = BITS, tail: str = "", **options: object
) -> Path:
    """A run of so many steps: loss 3 - step / 100 + seed / 10, evaluated every 10 steps."""
    gpt = shape(rank, options.pop("vocab", 256))
    c = TrainConfig(gpt=gpt, max_steps=30, out_dir=str(folder), **options)
    table = counts.table(GPT(gpt, seed=None)).splitlines()
    records = [dict(step=0, versions=dict(torch="2.13"), device="cpu", options=dataclasses.asdict(c), parameters=table)]
    for step in range(1, steps + 1):
        loss = 3 - step / 100 + c.seed / 10
        records.append(dict(step=step, tokens=64 * step, loss=loss, seconds=step * (1 + c.seed / 10)))
        if step % 10 == 0:
            records.append(dict(step=step, val_loss=loss + 1, val_bits_per_byte=(loss + 1) * bits))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n" + tail)
    return folder


def options(*arguments: str) -> plot.Options:
    return parse([str(a) for a in arguments], plot.Options)


def curves(*arguments: str) -> list[plot.Curve]:
    o = options(*arguments)
    return plot.make_curves(o, [logs.read_run(path) for path in o.runs])[0]


def test_the_points_are_the_log_s(tmp_path: Path) -> None:
    run = write_log(tmp_path / "a", rank=8)
    model = GPT(shape(8))
    (loss,) = curves(run, "--smooth=0")
    np.testing.assert_allclose(loss.x, 64 * np.arange(1, 31))
    np.testing.assert_allclose(loss.y, 3.1 - np.arange(1, 31) / 100)
    (perplexity,) = curves(run, "--x=flops", "--y=perplexity")
    np.testing.assert_allclose(perplexity.x, 3 * model.flops_per_token() * 64 * np.array([10, 20, 30]))
    np.testing.assert_allclose(perplexity.y, np.exp(np.array([4.0, 3.9, 3.8])))
    (bits,) = curves(run, "--x=seconds", "--y=bits_per_byte")
    np.testing.assert_allclose(bits.x, [11, 22, 33])
    np.testing.assert_allclose(bits.y, np.array([4.0, 3.9, 3.8]) / math.log(2))


def test_seeds_become_one_curve_at_the_steps_they_share(tmp_path: Path) -> None:
    runs = [write_log(tmp_path / f"{rank}_{seed}", rank, seed=seed) for rank in (0, 8) for seed in (1, 3)]
    write_log(runs[3], 8, steps=20, seed=3)  # shorter than the others
    dense, low = curves(*runs, "--x=seconds", "--y=val_loss")
    np.testing.assert_allclose(dense.x, [12, 24, 36])  # between 11 and 13 a ten steps
    np.testing.assert_allclose(dense.y, [4.1, 4.0, 3.9])
    np.testing.assert_allclose([dense.low, dense.high], [[4.0, 3.9, 3.8], [4.2, 4.1, 4.0]])
    np.testing.assert_allclose(low.y, [4.1, 4.0])
    names = [curve.name for curve in curves(*runs, "--each_seed")]
    assert [name.split(", ")[0] for name in names] == ["dense", "dense", "LPA r=8", "LPA r=8"]
    assert len(set(names)) == 4


def test_the_running_mean_is_that_of_a_plain_loop() -> None:
    generator = np.random.default_rng(1)
    x, y = np.cumsum(generator.uniform(0.5, 2, 50)), generator.normal(size=50)
    for width in (0.0, 7.0, 1000.0):
        wanted = []
        for here in x:
            half = min(width / 2, here - x[0])
            wanted.append(np.mean([b for a, b in zip(x, y) if here - half <= a <= here + half]))
        np.testing.assert_allclose(plot.running_mean(x, y, width), wanted)


def test_runs_are_named_by_what_sets_them_apart() -> None:
    same = dict(out_dir="x", n_layer=2, learning_rate=1e-3) | {f"gpt.lowdim.{name}": 0 for name in "qkvo"}
    low = same | dict.fromkeys((f"gpt.lowdim.{name}" for name in "qkvo"), 16)
    keys_only = same | {"gpt.lowdim.k": 4, "gpt.lowdim.v": 4, "out_dir": "y"}
    assert logs.name_runs([same, low, keys_only], {"out_dir"}) == ["dense", "LPA r=16", "low k,v r=4"]
    assert logs.name_runs([same, same | dict(n_layer=3)], set()) == ["n_layer=2", "n_layer=3"]
    assert logs.name_runs([same, same | dict(learning_rate=5e-4)], set())[1] == "learning_rate=0.0005"
    assert logs.name_runs([same, same, same | dict(n_layer=3)], set()) == ["", "", "n_layer=3"]


def test_perplexity_against_rank(tmp_path: Path) -> None:
    runs = [write_log(tmp_path / f"{rank}_{seed}", rank, seed=seed) for rank in (8, 4, 0) for seed in (1, 2)]
    o = options(*runs, "--x=rank", "--y=perplexity")
    series = plot.by_rank(o, [logs.read_run(path) for path in o.runs])
    assert {name: [rank for rank, _ in points] for name, points in series.items()} == {"LPA": [4, 8], "dense": [0]}
    for y in (y for points in series.values() for _, y in points):
        np.testing.assert_allclose(y, np.exp([3.8, 3.9]))
    plot.main(options(*runs, "--x=rank", "--y=perplexity", f"--out={tmp_path}/rank"))
    assert b"mean and standard deviation over seeds" in (tmp_path / "rank.svg").read_bytes()
    with pytest.raises(UserError, match="no run has a low-rank projection"):
        plot.main(options(runs[4], runs[5], "--x=rank", "--y=perplexity"))
    with pytest.raises(UserError, match="y is loss, wanted val_loss, perplexity or bits_per_byte"):
        options(runs[0], "--x=rank")


def test_both_pictures_are_written_and_say_the_units(tmp_path: Path) -> None:
    runs = [write_log(tmp_path / f"r{rank}", rank) for rank in (0, 4)]
    plot.main(options(*runs, f"--out={tmp_path}/new/curves.v2.png"))
    assert (tmp_path / "new" / "curves.v2.png").read_bytes().startswith(b"\x89PNG")
    first = (tmp_path / "new" / "curves.v2.svg").read_bytes()
    labels = (b"training loss (nats per token)", b"mean over 384 tokens around each point", b"training tokens")
    assert all(text in first for text in (*labels, b"dense, ", b"LPA r=4, "))
    plot.main(options(*runs, f"--out={tmp_path}/new/curves.v2.svg"))
    assert (tmp_path / "new" / "curves.v2.svg").read_bytes() == first
    with pytest.raises(UserError, match="cannot write"):
        plot.main(options(*runs, f"--out={runs[0]}/log.jsonl/curves"))


@pytest.mark.parametrize("tail", ['{"step": 31, "lo', '{"step": 31, "lo\n', "[]\n", "\x00\x00"])
def test_a_last_line_that_is_being_written_is_ignored(tmp_path: Path, tail: str) -> None:
    run = logs.read_run(write_log(tmp_path / "a", tail=tail))
    assert (len(run.steps), len(run.evaluations), run.finished) == (30, 3, True)


def test_a_record_without_a_finite_loss_is_left_out(tmp_path: Path) -> None:
    bad = '{"step": 31, "tokens": 1984, "loss": null, "seconds": 40}\n{"step": 30, "val_loss": null}\n'
    run = logs.read_run(write_log(tmp_path / "a", tail=bad))
    assert (len(run.steps), len(run.evaluations)) == (30, 3)


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    good = write_log(tmp_path / "good")
    other = write_log(tmp_path / "other", bits=BITS / 4, vocab=1024)
    unevaluated = write_log(tmp_path / "unevaluated", steps=5, vocab=512)
    broken = write_log(tmp_path / "broken", tail='{"step": 31, "lo\n{"step": 32}\n')
    old = write_log(tmp_path / "old")
    text = (old / "log.jsonl").read_text()
    (old / "log.jsonl").write_text(text.replace("FLOPs per token", "operations a token"))
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text('{"step": 1, "loss": 2.0}\n')
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for arguments, message in (
        ([tmp_path / "nothing"], "no .*nothing/log.jsonl: wanted a run folder"),
        ([empty], "empty.jsonl does not begin with the options of a run"),
        ([good, other], "has 1 tokens per byte, .*other/log.jsonl 0.25: .*use --y=bits_per_byte"),
        ([good, unevaluated], "a vocab_size of 256, .* of 512: .*use --y=bits_per_byte"),
        ([unevaluated, "--y=val_loss"], "unevaluated/log.jsonl has no evaluation yet"),
        ([broken], "line 35, is not a record of a run"),
        ([old], "does not give the parameters and FLOPs"),
        ([foreign], "does not begin with the options of a run"),
    ):
        with pytest.raises(UserError, match=message) as error:
            plot.main(options(*arguments, f"--out={tmp_path}/curves"))
        assert "\n" not in str(error.value)
    plot.main(options(good, other, "--y=bits_per_byte", f"--out={tmp_path}/curves"))


def test_without_matplotlib_the_message_names_the_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_log(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install 'matplotlib"):
        plot.main(options(run, f"--out={tmp_path}/curves"))


def test_curves_as_text_stand_in_columns() -> None:
    x = np.linspace(0.0, 700.0, 50)
    long, short = (plot.Curve(name, xs, xs / 100, xs, xs) for name, xs in (("long", x), ("short one", x[:26])))
    lines = plot.as_text(plot.Options(runs=(Path("a"), Path("b"))), [long, short]).splitlines()
    assert lines[0].split() == ["tokens", "long", "short", "one"]
    assert [line.split() for line in lines[1:]] == [
        [str(100 * i), f"{i:.4f}", f"{i:.4f}" if i < 4 else "-"] for i in range(8)
    ]
