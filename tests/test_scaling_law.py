"""The scaling law: known constants come back, closed forms agree with brute force, and no law comes from too little.

.venv/bin/pytest tests/test_scaling_law.py        CPU, about 12 s
"""

import dataclasses
import json
import math
import re
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from test_plot import write_log

from config import UserError, parse
from experiments import sweep
from experiments.scaling import fit as scaling_fit
from experiments.scaling import law as scaling_law
from experiments.scaling import plan as scaling_plan
from experiments.scaling.fit import Fit, Law, Points, best_law, bootstrap, fit, gamma_of_runs, interval, ratios, starts
from model import GPT, LowDim

HOFFMANN = Law(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)


def grid(law: Law, noise: float = 0.0, n: int = 8, seed: int = 0) -> Points:
    N, D = (v.ravel() for v in np.meshgrid(np.geomspace(1e6, 1e9, n), np.geomspace(1e8, 1e11, n)))
    factor = np.exp(noise * np.random.default_rng(seed).standard_normal(n * n))
    return Points("grid", N, D, law.loss(N, D) * factor)


def fit_of(points: Points, law: Law) -> Fit:
    """Return a fit whose resamples all have the same law."""
    return Fit(points, law, Law(*np.tile(astuple(law), (4, 1)).T), [])


@pytest.mark.parametrize("true", [HOFFMANN, Law(1.82, 482.0, 0.3478, 2085.4, 0.3658), Law(0.5, 20.0, 0.6, 900.0, 0.45)])
def test_noise_free_runs_give_all_five_constants_back(true: Law) -> None:
    points = grid(true)
    assert astuple(best_law(points, starts(points))) == pytest.approx(astuple(true), rel=1e-6)


@pytest.mark.parametrize("noise", [0.002, 0.01])
def test_noisy_runs_give_the_exponents_within_their_errors(noise: float) -> None:
    f = fit(grid(HOFFMANN, noise), resamples=60)
    for name in ("alpha", "beta"):
        values = getattr(f.laws, name)
        best, low, high = interval(values)
        assert low < best < high
        assert 0 < values.std() < 0.05
        assert abs(best - getattr(HOFFMANN, name)) < 3 * values.std()


def test_one_run_that_went_wrong_hardly_moves_the_fit() -> None:
    points = grid(HOFFMANN, 0.002)
    points.loss[20] *= 1.2
    assert abs(best_law(points, starts(points)).beta - HOFFMANN.beta) < 0.02


@pytest.mark.parametrize("C", [1e16, 1e19, 3e21])
def test_the_closed_forms_are_the_lowest_of_a_brute_search(C: float) -> None:
    N = np.geomspace(1e3, 1e13, 400_001)
    best = N[HOFFMANN.loss(N, C / 6 / N).argmin()]
    n, d = HOFFMANN.optimum(C)
    assert n == pytest.approx(best, rel=1e-3)
    assert n * d * 6 == pytest.approx(C)
    assert HOFFMANN.size(d) == pytest.approx(n)  # two roads to one frontier


def test_kausiks_interval_prints_as_published() -> None:
    lines = scaling_law.gamma_lines(fit_of(grid(HOFFMANN), HOFFMANN), 1e12)
    assert "0.44 (0.44 to 0.44) and 0.72 (0.72 to 0.72)" in lines[0]
    steep = dataclasses.replace(HOFFMANN, beta=0.6)
    lines = scaling_law.gamma_lines(fit_of(grid(steep), steep), 1e12)
    N0 = re.search(r"from N = (\S+) at", lines[1])[1]
    assert f"has N = {N0} to " in lines[1], "beta above 0.5: the lower end of gamma is 0"


def test_gamma_of_runs_finds_the_exponent_that_was_put_in() -> None:
    """Each length has a size from which on the loss is flat: sizes grow as D^0.6."""
    D, N = (v.ravel() for v in np.meshgrid([1e6, 4e6, 1.6e7, 6.4e7], np.geomspace(1e3, 1e8, 60)))
    need = 10 * D**0.6
    gamma, error, found = gamma_of_runs(Points("x", N, D, 2 + np.maximum(0, np.log(need / N))))
    assert gamma == pytest.approx(0.6, abs=0.02)
    assert error < 0.02
    assert [n for _, n in found] == pytest.approx([10 * d**0.6 for d, _ in found], rel=0.1)
    flat = Points("x", N, D, np.full(len(N), 2.0))
    gamma, _, found = gamma_of_runs(flat)
    assert math.isnan(gamma)
    assert found == [], "even the smallest run is good enough"


def test_what_a_family_saves_is_what_was_put_in() -> None:
    """B times 0.5^beta is half the data for the same loss; A times 0.7^alpha 0.7 of the size; both compute."""
    halved = dataclasses.replace(HOFFMANN, B=HOFFMANN.B * 0.5**HOFFMANN.beta)
    assert ratios(halved, HOFFMANN, 1e19)["data"] == pytest.approx(0.5)
    smaller = dataclasses.replace(HOFFMANN, A=HOFFMANN.A * 0.7**HOFFMANN.alpha)
    assert ratios(smaller, HOFFMANN, 1e19)["size"] == pytest.approx(0.7)
    both = dataclasses.replace(smaller, B=halved.B)
    assert ratios(both, HOFFMANN, 1e19)["compute"] == pytest.approx(0.35)
    assert list(ratios(dataclasses.replace(HOFFMANN, E=3.0), HOFFMANN, 1e19).values()) == [math.inf] * 3
    other = Law(1.7, 200.0, 0.3, 800.0, 0.33)  # the compute by its definition: the same loss at both optima
    need = ratios(other, HOFFMANN, 1e19)["compute"] * 1e19
    assert other.loss(*other.optimum(need)) == pytest.approx(HOFFMANN.loss(*HOFFMANN.optimum(1e19)))
    laws = [fit(grid(law, 0.002, 5, seed), resamples=20).laws for law, seed in ((halved, 0), (HOFFMANN, 1))]
    best, low, high = interval(ratios(*laws, 1e19)["data"])
    assert low <= best <= high
    assert low < 0.5 < high or best == pytest.approx(0.5, abs=0.1)


def test_families_are_compared_only_where_both_have_runs() -> None:
    """Within the grid; not at 1e25 FLOPs, nor with runs a thousand times smaller; a loss nobody had is said."""
    here = fit_of(grid(HOFFMANN, n=3), HOFFMANN)
    lines = scaling_law.comparison(options("a", "--budget=1e19"), here, here)
    assert "| C, at its own optimum | 1 | 1 | 1 |" in "\n".join(lines)
    refused = scaling_law.comparison(options("a", "--budget=1e25"), here, here)
    assert "Not compared" in refused[1]
    assert "C = 1e+25 is more than 10 times outside the runs of grid, 6e+14 to 6e+20" in refused[1]
    p = here.points
    small = dataclasses.replace(here, points=Points("small", p.N / 1e4, p.D / 1e4, HOFFMANN.loss(p.N / 1e4, p.D / 1e4)))
    for pair in ((here, small), (small, here)):
        assert "Not compared" in scaling_law.comparison(options("a"), *pair)[1]
    worse_law = dataclasses.replace(HOFFMANN, E=2.9)
    worse = fit_of(Points("worse", p.N, p.D, worse_law.loss(p.N, p.D)), worse_law)
    text = "\n".join(scaling_law.comparison(options("a"), worse, here))
    assert "is outside the runs of worse" in text
    assert "| never | never | never |" in text


def test_resamples_without_a_law_are_left_out_up_to_5_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 of 40 is left out of the errors and said; of 3 of 40 comes no law."""
    lost = dataclasses.replace(HOFFMANN, alpha=-0.3)
    laws = [dataclasses.replace(HOFFMANN, beta=0.28 + i / 1e4) for i in range(40)]
    monkeypatch.setattr(scaling_fit, "bootstrap", lambda *_: [lost, *laws[:39]])
    found = fit(grid(HOFFMANN, n=4), resamples=40)
    assert np.isnan(found.laws.beta).sum() == 1
    assert "errors leave out 1 of 40 resamples" in found.notes[0]
    monkeypatch.setattr(scaling_fit, "bootstrap", lambda *_: [lost, lost, lost, *laws[:37]])
    with pytest.raises(UserError, match=r"alpha or beta is outside 0.01 to 3 in 3 of 40 resamples"):
        fit(grid(HOFFMANN, n=4), resamples=40)


# --- What is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (grid(HOFFMANN).take(np.array([0, 9, 18, 27, 36])), "5 runs of 5 sizes N and 5 lengths D"),
        (grid(HOFFMANN).take(np.arange(16)), "16 runs of 8 sizes N and 2 lengths D that can be fitted, wanted"),
        (grid(dataclasses.replace(HOFFMANN, alpha=-0.1)), "alpha or beta is outside 0.01 to 3 in the best fit"),
        (grid(dataclasses.replace(HOFFMANN, B=1e-9), 0.01), "alpha or beta is outside 0.01 to 3 in the best fit"),
    ],
)
def test_runs_without_a_law_are_refused(points: Points, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit(points, resamples=40)


def test_an_entropy_that_is_not_determined_is_said() -> None:
    f = fit(grid(Law(1e-6, 8.0, 0.1, 20.0, 0.12), n=4), resamples=5)
    text = "\n".join(scaling_law.report(options("a"), f))
    assert "at its bound of 0" in text
    assert re.search(r"\| E \| \S+ \| undetermined \|", text)
    few = grid(HOFFMANN, n=3)
    assert any("only 9 runs" in note for note in fit(few, resamples=5).notes)


def test_resamples_leave_the_bound_of_the_entropy() -> None:
    at_bound = Law(1e-19, 8.0, 0.1, 20.0, 0.12)
    assert all(law.E > 1 for law in bootstrap(grid(HOFFMANN, n=4), at_bound, resamples=2))


def test_runs_that_stopped_early_are_left_out_and_named(tmp_path: Path) -> None:
    for steps in (10, 20, 30):
        write_log(tmp_path / "family" / f"to_{steps}", steps=steps)
    write_log(tmp_path / "family" / "one_epoch_rank", rank=4)
    points = scaling_law.read((tmp_path / "family",), "total")
    assert points.D.tolist() == [64 * 30, 64 * 30]
    assert points.loss.tolist() == pytest.approx([3 - 0.3 + 0.1 + 1] * 2)
    *left_out, cost = points.notes
    for steps, note in zip((10, 20), left_out, strict=True):
        assert note.endswith(f"to_{steps} ends at step {steps} of 30")
    assert re.fullmatch(r"by the logs a training token costs \S+ to \S+ N FLOPs, not 6 N", cost)
    blocks = scaling_law.read((tmp_path / "family",), "blocks")
    assert (points.N - blocks.N).tolist() == [2 * 256 * 32] * 2  # embedding and head
    with pytest.raises(UserError, match=r"2 runs of 2 sizes N .* left out: .*to_10"):
        fit(points)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(dataset="enwiki"), "dataset is pystdlib in .* and enwiki in"),
        (dict(vocab=512), "gpt.vocab_size is 256 in .* and 512 in"),
        (dict(eval_tokens=64), "eval_tokens is None in .* and 64 in"),
        (dict(bits=2.0), "bits per byte of a nat is 1.44.* and 2.0"),
    ],
)
def test_losses_of_another_kind_are_not_compared(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    """Neither within a family nor between two of them; the same corpus may lie at another path."""
    first = write_log(tmp_path / "a" / "0")
    write_log(tmp_path / "same" / "0", rank=4, dataset="elsewhere/pystdlib")
    write_log(tmp_path / "b" / "0", **changes)
    with pytest.raises(UserError, match=message):
        scaling_law.main(options(first, tmp_path / "b"))
    with pytest.raises(UserError, match=message):
        scaling_law.main(options(tmp_path / "a", "--against", tmp_path / "b"))
    scaling_law.require_same_measure(list(scaling_law.read((first, tmp_path / "same"), "total").runs))


# --- The command ---------------------------------------------------------------------------------------------------


def options(*arguments: str) -> scaling_law.Options:
    return parse([str(a) for a in arguments], scaling_law.Options)


def write_csv(path: Path, points: Points) -> Path:
    rows = [f"{n},{d},{loss}" for n, d, loss in zip(points.N, points.D, points.loss)]
    path.write_text("\n".join(["N,D,loss", *rows]) + "\n")
    return path


def test_the_command_writes_report_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    a = write_csv(tmp_path / "a.csv", grid(dataclasses.replace(HOFFMANN, E=1.6), 0.002, 5))
    b = write_csv(tmp_path / "b.csv", grid(HOFFMANN, 0.002, 5, seed=1))
    out = tmp_path / "results" / "law"
    scaling_law.main(options(a, "--against", b, "--budget=1e23", "--resamples=20", f"--out={out}"))
    text = out.with_suffix(".md").read_text()
    assert text.rstrip() in capsys.readouterr().out
    assert "| alpha | 0.3" in text
    assert "C = 1e+23 is more than 10 times outside the runs of a, 6e+14 to 6e+20: the law is not tested there." in text
    assert "## a against b" in text
    assert out.with_suffix(".svg").exists()
    (tmp_path / "bad.csv").write_text("N,D,loss\n1,2,3\n1,-2,3\n")
    with pytest.raises(UserError, match=r"bad\.csv: line 3: wanted positive numbers"):
        scaling_law.main(options(tmp_path / "bad.csv"))
    with pytest.raises(UserError, match="wanted either runs to read, or --plan"):
        options()
    with pytest.raises(UserError, match="budget is 0"):
        options(a, "--budget=0")


def test_a_preset_that_has_no_other_sizes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "preset.py").write_text("lowdim = dict(up='blockdense:8:2')\n")
    with pytest.raises(UserError, match=r"has lowdim\.up=blockdense:8:2, wanted a number"):
        scaling_plan.make_run(scaling_plan.Grid(), str(tmp_path / "preset.py"), 48, 100)


def test_the_plan_fills_the_hours_and_a_second_start_keeps_it(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling_plan, "seconds_per_token", lambda c: c.gpt.n_embd / 5e6)
    g = scaling_plan.Grid(widths=(16, 32, 48), lengths=3, hours=0.1, dataset=str(corpus), out_dir=tmp_path)
    small = scaling_plan.make_run(g, g.presets[1], 16, 100).config
    assert small.gpt.lowdim == LowDim(q=4, k=4, v=4, o=4)
    assert small.learning_rate == pytest.approx(8e-4 * 192 / 16)
    steps = scaling_plan.planned_lengths(g)
    assert [steps[1] // steps[0], steps[2] // steps[1]] == [2, 2]
    assert steps[2] * 512 <= 200_000  # what the corpus has
    monkeypatch.setattr(scaling_plan, "seconds_per_token", lambda c: 1 / 512)
    assert scaling_plan.planned_lengths(g) == steps
    with pytest.raises(UserError, match="has other options"):
        scaling_plan.planned_lengths(dataclasses.replace(g, hours=1))
    other = dataclasses.replace(g, out_dir=tmp_path / "other")
    with pytest.raises(UserError, match=r"hours is 0\.1 and .*, wanted ") as error:
        scaling_plan.planned_lengths(other)
    wanted = float(re.search(r"wanted ([\d.]+) and", str(error.value))[1])
    assert scaling_plan.planned_lengths(dataclasses.replace(other, hours=wanted))[0] >= scaling_plan.FEWEST_STEPS
    assert json.loads((tmp_path / "plan.json").read_text())["steps"] == steps
    with pytest.raises(UserError, match=r"the presets have steps of .* tokens, wanted the same in all"):
        mixed = dict(presets=("config/setting2_cpu.py", "config/lpa_cpu.py"), out_dir=tmp_path / "mixed")
        scaling_plan.planned_lengths(dataclasses.replace(g, **mixed))
    for bad in (dict(hours=math.nan), dict(eval_tokens=0), dict(presets=())):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}"):
            dataclasses.replace(g, **bad)


def test_a_planned_run_is_one_that_train_py_makes(tmp_path: Path, corpus: Path) -> None:
    g = scaling_plan.Grid(widths=(16, 32, 48), dataset=str(corpus), out_dir=tmp_path, eval_tokens=128)
    run = scaling_plan.make_run(g, "config/setting2_cpu.py", 16, steps=3)
    assert sweep.train_all([run], sweep.SweepConfig()) == []
    points = scaling_law.read((tmp_path / "setting2_cpu",), "total")
    assert points.D.tolist() == [3 * 512]
    assert points.N.tolist() == [GPT(run.config.gpt).n_params()]
    assert 0 < scaling_plan.seconds_per_token(run.config) < 1
