"""Whatever a user or a disk may put before the scripts ends in one clear line or in a correct result, never otherwise.

    .venv/bin/pytest tests/faults/test_bad_input.py                60 cases
    .venv/bin/pytest -m slow tests/faults/test_bad_input.py        2,000 cases, 400 of each kind
"""

import contextlib
import io
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from conftest import read_log, run_here
from hypothesis import HealthCheck, Phase, given, settings
from test_train import arguments, losses, same, tensors

import sample
from config import UserError, load_config
from lpa import checkpoint, hardware

FAST, SLOW = 12, 400
ODD = ("-1", "0", "1", "2", "3", "5", "8", "16", "33", "0.5", "1e-3", "1e30", "nan", "inf", "", "None", "true", "é\n")
NUMBERS = (
    "n_layer", "n_head", "n_kv_head", "n_embd", "attn_dim", "ffn_dim", "rope_dim", "block_size", "vocab_size",
    "batch_size", "tokens_per_step", "max_steps", "stop_step", "warmup_steps", "seed", "learning_rate", "min_lr",
    "weight_decay", "beta1", "eps", "grad_clip", "dropout", "norm_eps", "window", "eval_interval", "eval_tokens",
    "save_interval", "sample_interval", "max_hours", "lowdim", "n_layerr",
)  # fmt: skip
OPTIONS = {
    **dict.fromkeys(NUMBERS, ()),
    **dict.fromkeys(("lowdim.q", "lowdim.v", "lowdim.up"), ("blockdense:4:2", "blockshuffle:2", "blockdense:9", "x:1")),
    "norm": ("layernorm", "rmsnorm"),
    "norm_order": ("pre", "post"),
    "mlp": ("relu", "relu2", "gelu", "swiglu"),
    "pos": ("learned", "rope", "none"),
    "optimizer": ("adamw", "muon"),
    "schedule": ("cosine", "wsd"),
    "dtype": ("float32", "bfloat16"),
    "shard": ("true",),
    "recompute": ("none", "latents", "block"),
    "factor_init": ("spectral", "matched", "torch"),
    "dataset": ("nowhere", "/", "."),
    "resume": ("auto", "must"),
    "init_from": ("nowhere", "."),
}


@pytest.fixture(scope="module")
def base(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, saved at two and at four."""
    out = tmp_path_factory.mktemp("base") / "run"
    run_here(arguments(corpus, out, "--max_steps=4", "--save_interval=2"))
    return out


@pytest.fixture(scope="module", autouse=True)
def quickly() -> Iterator[None]:
    """Without the half second in which a run measures the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "matmul_rate", lambda *_, **__: 1e11)
        yield


def cases(number: int) -> Callable:
    checks = (HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large)
    phases = (Phase.explicit, Phase.generate)
    return settings(max_examples=number, deadline=None, derandomize=True, suppress_health_check=checks, phases=phases)


def both(test: Callable) -> Callable:
    """The test with few cases, and as a slow one with many."""
    many = [pytest.param(SLOW, marks=pytest.mark.slow), FAST]
    return pytest.mark.parametrize("number", many)(test)


def one_clear_line(action: Callable[[], Any]) -> bool:
    """Whether it went well. An error must be the user's, in one line; any other escapes."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            action()
    except UserError as error:
        assert str(error).strip()
        assert "\n" not in str(error).strip()
        return False
    return True


@both
def test_options(number: int, corpus: Path, tmp_path: Path) -> None:
    drawn = st.dictionaries(st.sampled_from(sorted(OPTIONS)), st.integers(0, 99), max_size=5)

    @cases(number)
    @given(drawn)
    def check(choices: dict[str, int]) -> None:
        values = {}
        for name, i in choices.items():  # its own values as often as the odd ones
            possible = (*OPTIONS[name] * 9, *ODD)
            values[name] = possible[i % len(possible)]
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        small = [] if "max_steps" in values else ["--max_steps=1"]
        command = arguments(corpus, tmp_path / "run", *small, *(f"--{name}={value}" for name, value in values.items()))
        if one_clear_line(lambda: run_here(command)):
            c = load_config(command[1:])
            assert read_log(tmp_path / "run")[-1]["step"] == min(c.max_steps, c.stop_step or c.max_steps)

    check()


@both
def test_meta_json(number: int, corpus: Path, tmp_path: Path) -> None:
    meta = json.loads((corpus / "meta.json").read_text())

    @cases(number)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        folder = copy_of(corpus, tmp_path / "corpus")
        (folder / "meta.json").write_text(damaged(json.dumps(meta), data))
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        if one_clear_line(lambda: run_here(arguments(folder, tmp_path / "run", "--max_steps=1"))):
            assert math.isfinite(losses(tmp_path / "run")[0])

    check()


@both
def test_shards(number: int, corpus: Path, tmp_path: Path) -> None:
    run_here(arguments(corpus, tmp_path / "whole", "--max_steps=2"))

    @cases(number)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        folder = copy_of(corpus, tmp_path / "corpus")
        file = data.draw(st.sampled_from(sorted(folder.glob("*.bin"))))
        file.write_bytes(broken(file.read_bytes(), data))
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        # A changed token is not looked for at each start: reading the whole corpus would take minutes. A changed
        # header, length or a token beyond the vocabulary is an error.
        if one_clear_line(lambda: run_here(arguments(folder, tmp_path / "run", "--max_steps=2"))):
            assert all(math.isfinite(loss) for loss in losses(tmp_path / "run"))

    check()


@both
def test_checkpoints(number: int, corpus: Path, tmp_path: Path, base: Path) -> None:
    whole = tensors(base, 4)

    @cases(number)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        out = copy_of(base, tmp_path / "run")
        files = [file for file in sorted(out.rglob("*")) if file.is_file()]
        for file in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=3, unique=True)):
            what = data.draw(st.sampled_from(("broken", "gone", "json")))
            if what == "gone":
                file.unlink()
            elif what == "json" and file.suffix == ".json":
                file.write_text(damaged(file.read_text(), data))
            else:
                file.write_bytes(broken(file.read_bytes(), data))
        loaded: list = []
        if one_clear_line(lambda: loaded.extend(checkpoint.load_model(out, torch.device("cpu")))):
            model, _, manifest = loaded
            wanted = checkpoint.load_tensors(base / "ckpt" / f"step_{manifest['step']}", "model")
            assert same(dict(model.state_dict()), wanted)
        if one_clear_line(lambda: run_here(arguments(corpus, out, "--max_steps=4", "--save_interval=2", "--resume"))):
            assert same(tensors(out, 4), whole)

    check()


@both
def test_prompts(number: int, base: Path) -> None:
    text = st.text(max_size=60) | st.sampled_from(("", "\x00", "\ud800", "a" * 200, "é\u202e\n\r\t", "<|endoftext|>"))
    knobs = st.fixed_dictionaries(
        {},
        optional=dict(
            temperature=st.sampled_from((0.0, 1e-9, 0.7, 100.0, -1.0, math.nan, math.inf)),
            top_k=st.sampled_from((0, 1, 300)),
            top_p=st.sampled_from((0.0, 1e-9, 0.5, 1.0, math.nan)),
            max_new_tokens=st.sampled_from((0, 1, 40)),
            num_samples=st.sampled_from((0, 1, 2)),
            beyond=st.sampled_from(("window", "stop")),
        ),
    )

    @cases(number)
    @given(text, knobs)
    def check(prompt: str, options: dict[str, Any]) -> None:
        try:
            c = sample.SampleConfig(base, prompt=prompt, **dict(max_new_tokens=5) | options)
        except ValueError:  # from the options' own check; the parser turns it into one line
            return
        one_clear_line(lambda: sample.main(c))

    check()


def copy_of(folder: Path, place: Path) -> Path:
    shutil.rmtree(place, ignore_errors=True)
    return Path(shutil.copytree(folder, place))


def broken(contents: bytes, data: st.DataObject) -> bytes:
    """Cut, emptied, made longer, or a byte flipped."""
    place = data.draw(st.integers(0, max(0, len(contents) - 1)))
    how = data.draw(st.sampled_from(("cut", "empty", "longer", "flip", "zeros")))
    if how == "flip" and contents:
        return contents[:place] + bytes([contents[place] ^ (1 << data.draw(st.integers(0, 7)))]) + contents[place + 1 :]
    if how == "zeros":
        return contents[:place] + bytes(len(contents) - place)
    return {"cut": contents[:place], "empty": b"", "longer": contents + b"?"}.get(how, b"")


def damaged(text: str, data: st.DataObject) -> str:
    """A JSON text with a value gone, or of another kind, or cut short."""
    value = json.loads(text)
    if not isinstance(value, dict) or (data.draw(st.booleans()) and data.draw(st.booleans())):
        return text[: data.draw(st.integers(0, len(text)))]
    place: Any = value
    while isinstance(place, dict | list) and place:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    if data.draw(st.booleans()):
        del place[key]
    else:
        place[key] = data.draw(st.sampled_from((None, -1, 0, 1.5, 10**12, "x", "../x", [], {}, True, [[]], {"a": 1})))
    return json.dumps(value)
