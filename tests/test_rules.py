"""The rules that keep the project readable: what is read is what runs. Each is also seen to fail on a violation.

    .venv/bin/pytest tests/test_rules.py        CPU, seconds
"""

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn

import model
from lpa import decode
from model import GPT, GPTConfig, LowDim, LowRank

FILES = sorted(p for p in ROOT.rglob("*.py") if not {".venv", "tests", "out"} & set(p.relative_to(ROOT).parts))
LIBRARIES = {"torch", "numpy", "tyro", "tqdm", "tiktoken"}  # what requirements.txt installs
LAYERS = ["model", "config", "data", "lpa", "commands", "experiments"]  # each imports what is before it, and itself
COMMANDS = {"train", "sample", "bench", "eval", "export"}
MODEL_MAY_IMPORT = {"lpa.checks", "lpa.init", "lpa.structured", "lpa.loss"}


# --- Size and imports --------------------------------------------------------------------------------------------


def lines_of_functions(source: str) -> dict[str, int]:
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    return {node.name: node.end_lineno - node.lineno + 1 for node in functions}


def test_the_files_that_people_read_stay_short() -> None:
    lines = {path.name: len(path.read_text().splitlines()) for path in ROOT.glob("*.py")}
    assert set(lines) <= {"model.py", "train.py", "sample.py", "bench.py", "eval.py", "export.py"}
    limits = {"model.py": 350, "train.py": 320, "sample.py": 100, "bench.py": 300}
    assert {name: lines[name] for name, limit in limits.items() if lines[name] > limit} == {}
    assert sum(lines.values()) <= 1400
    assert sum(len(path.read_text().splitlines()) for path in FILES) <= 11_400  # to fall to 9,500, never to rise
    functions = lines_of_functions((ROOT / "train.py").read_text())
    assert functions["pretrain"] <= 120
    assert functions["main"] <= 120


def imports(source: str, package: str = "") -> Iterator[tuple[str, bool]]:
    """Yield the name of each imported module or member, and whether the import stands inside a function."""
    tree = ast.parse(source)
    nested = {inner for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for inner in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in nested) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", node in nested) for alias in node.names)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


OURS = {module_of(path): path.read_text() for path in FILES}


def our_module(name: str) -> str | None:
    """Return the module of this project that an imported name is, or is a member of."""
    return next((module for module in (name, name.rpartition(".")[0]) if module in OURS), None)


def layer(module: str) -> int:
    top = module.partition(".")[0]
    if module in MODEL_MAY_IMPORT:
        return LAYERS.index("model")  # the parts of the model that a reader may skip
    return LAYERS.index("commands" if top in COMMANDS else top)


def wrong_imports(module: str, source: str) -> list[str]:
    """Return the imports of a module that point the wrong way, or stand in a function without need."""
    found = []
    for name, nested in imports(source):
        target = our_module(name)
        if target is None:
            wrong = nested and name.partition(".")[0] in LIBRARIES | sys.stdlib_module_names
        else:
            wrong = nested and target != "lpa.lm_eval"  # which needs a package of its own
            wrong |= layer(target) > layer(module) or (module == "model" and target not in MODEL_MAY_IMPORT)
        found += [name] if wrong else []
    return found


def circles(sources: dict[str, str]) -> list[list[str]]:
    edges = {m: {t for n, _ in imports(s) if (t := our_module(n)) and t != m} for m, s in sources.items()}
    found: list[list[str]] = []

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for target in edges.get(module, ()):
                visit(target, [*path, module])
            done.add(module)

    done: set[str] = set()
    for module in sources:
        visit(module, [])
    return found


def test_imports_point_one_way() -> None:
    assert {m: wrong for m, source in OURS.items() if (wrong := wrong_imports(m, source))} == {}
    assert circles(OURS) == []
    known = {"dataclasses", "typing", "torch", *MODEL_MAY_IMPORT}
    assert {n for n, _ in imports(OURS["model"]) if not any(n == k or n.startswith(f"{k}.") for k in known)} == set()
    papers = ("recurrent", "guide", "self_guided", "premerge", "copy task", "curriculum")
    for name in ("model", "train", "config"):
        assert not [word for word in papers if word in OURS[name]], name


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("model", "from lpa.decode import KVCache"),
        ("model", "import lpa.hardware"),
        ("lpa.optim", "import train"),
        ("config", "from lpa import decode"),
        ("train", "from experiments.sweep import main"),
        ("lpa.hardware", "def f():\n    from config import UserError"),
        ("lpa.hardware", "def f():\n    import numpy"),
    ],
)
def test_a_wrong_import_is_seen(module: str, source: str) -> None:
    assert wrong_imports(module, source)


def test_a_circle_is_seen() -> None:
    assert circles(OURS | {"lpa.init": "from lpa import decode"})


# --- What is edited changes what runs ----------------------------------------------------------------------------

CONFIGS = {
    "dense": dict(),
    "lpa": dict(lowdim=LowDim(q=8, k=6, v=5, o=7)),
    "latent keys": dict(lowdim=LowDim(q=8, k=6, v=5, o=7), rope_dim=4, n_kv_head=2),
    "all low-rank": dict(lowdim=LowDim(8, 6, 5, 7, 9, 10, 11), pos="learned", norm="layernorm"),
}


def small(options: dict) -> GPT:
    net = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=96, **options)).double().eval()
    generator = torch.Generator().manual_seed(1)
    for p in net.parameters():
        p.data.normal_(0, 0.3, generator=generator)
    return net


IDX = torch.randint(96, (2, 17), generator=torch.Generator().manual_seed(2))


def training_loss(net: GPT) -> float:
    return net(IDX[:, :-1], IDX[:, 1:]).item()


@torch.inference_mode()
def cached_and_uncached(net: GPT) -> tuple[Tensor, Tensor]:
    """Return the logits of each position, computed token by token with a cache and all at once without."""
    cache = decode.new_cache(net, 2)
    steps = [net(part, cache=cache) for part in IDX[:, :-1].split([5, 1, 3, 1, 6], dim=1)]
    return torch.cat(steps, dim=1), net(IDX[:, :-1])


def follows(net: GPT, change: Callable[[], None]) -> bool:
    """Say whether a change reaches the training loss, and cached and uncached logits alike."""
    loss, (_, before) = training_loss(net), cached_and_uncached(net)
    change()
    cached, uncached = cached_and_uncached(net)
    moved = abs(training_loss(net) - loss) > 1e-6 and (uncached - before).abs().max() > 1e-6
    return bool(moved and (cached - uncached).abs().max() < 1e-9)


def used_classes() -> list[type]:
    return [kind for kind in vars(model).values() if isinstance(kind, type) and kind.__module__ == "model"
            and issubclass(kind, nn.Module)]  # fmt: skip


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", used_classes(), ids=lambda kind: kind.__name__)
def test_a_changed_forward_changes_training_and_both_kinds_of_decoding(
    kind: type, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = small(options)
    if not any(type(module) is kind for module in net.modules()):
        pytest.skip(f"this model has no {kind.__name__}")
    original = kind.forward
    # Of GPT with targets the result is a loss; else scale and bend it, so that no norm can undo the change.
    changed = lambda self, *a, **k: (lambda y: 1.1 * y + 0.1 * y.sin())(original(self, *a, **k))  # noqa: E731
    assert follows(net, lambda: monkeypatch.setattr(kind, "forward", changed))


@pytest.mark.parametrize("name", ["latent", "queries_and_keys", "split_heads", "apply_rope", "attention_mask"])
@pytest.mark.parametrize("options", [CONFIGS["lpa"], CONFIGS["latent keys"]], ids=["lpa", "latent keys"])
def test_a_changed_part_of_attention_does_so_too(name: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = {"latent": LowRank, "apply_rope": model, "attention_mask": GPT}.get(name, model.Attention)
    original = getattr(owner, name)
    changes = {
        "latent": lambda self, x: torch.nn.functional.silu(original(self, x)),  # CoLA
        "queries_and_keys": lambda self, *a: tuple(1.1 * y for y in original(self, *a)),
        "split_heads": lambda self, x: original(self, x).sin(),
        "apply_rope": lambda x, rope: original(x, 1.1 * rope),
        "attention_mask": lambda self, T, S: torch.ones(T, S, dtype=torch.bool).tril(S - T).triu(S - T - 3),  # a window
    }
    net = small(options)
    assert follows(net, lambda: monkeypatch.setattr(owner, name, changes[name]))


def test_a_change_that_training_bypasses_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a layer whose forward nothing calls, and one that decoding alone bypasses."""
    net = small(CONFIGS["lpa"])
    for block in net.transformer.h:
        block.mlp.forward = block.mlp.forward  # what an optimisation inside the model would do
    assert not follows(net, lambda: monkeypatch.setattr(model.MLP, "forward", lambda self, x: x))
    net = small(CONFIGS["lpa"])
    monkeypatch.setattr(decode, "latents_are_exact", lambda *_: True)
    bent = lambda self, x: torch.nn.functional.linear(self.latent(x).sin(), self.B)  # noqa: E731
    assert not follows(net, lambda: monkeypatch.setattr(LowRank, "forward", bent))


def silent_projections(net: GPT) -> list[str]:
    """Return the projections whose forward hook does not fire in a training step."""
    fired = set()
    names = [name for name, m in net.named_modules() if isinstance(m, nn.Linear | LowRank)]
    for name in names:
        net.get_submodule(name).register_forward_hook(lambda *_, name=name: fired.add(name))
    net.train()
    net(IDX[:, :-1], IDX[:, 1:]).backward()
    return [name for name in names if name not in fired]


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_forward_hooks_fire_on_every_projection(options: dict) -> None:
    assert silent_projections(small(options)) == []


def test_a_projection_that_is_not_called_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    bypass = lambda self, x: torch.nn.functional.linear(torch.nn.functional.silu(self.gate(x)) * self.up(x),  # noqa: E731
                                                        self.down.weight)  # fmt: skip
    monkeypatch.setattr(model.MLP, "forward", bypass)
    assert silent_projections(small(CONFIGS["lpa"])) == ["transformer.h.0.mlp.down", "transformer.h.1.mlp.down"]
