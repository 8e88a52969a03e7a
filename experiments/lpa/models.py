"""List what the tables of the LPA paper (arXiv 2411.02063) compare, at three scales, with the figures it prints.

    paper   the paper's own models, data, lengths and rates (tables 9 and 10)
    gpu     its setting 2 at 130M, and a pair at 370M, one epoch of 63M tokens: an H200 takes minutes a run
    cpu     6 layers of width 64, 0.3M parameters outside the embeddings, 20 tokens for each of them

Where the paper gives no shape, `note` says which one stands here; its count then meets the printed one.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Arm:
    """One row of a table: a preset and what changes in it."""

    setting: str
    model: str
    preset: str
    changes: dict[str, Any]
    printed: str = ""
    """The parameters that the paper prints for this model; empty where it is not in the paper."""
    paper: str = "-"
    """The paper's test perplexity, with the parameters and the setting where they are not this row's."""
    note: str = ""


@dataclass(frozen=True)
class Scale:
    """What all runs of a scale share."""

    changes: dict[str, Any]
    rates: tuple[float, ...]
    """Learning rates to try; none = those of the presets."""
    tune_share: float
    """Length of a run that tries a learning rate, as a share of the whole."""
    init: str
    prepare: str
    """The command that makes the corpus."""
    flops_per_second: dict[str, float]
    """What one job sustains, by dtype, to estimate hours."""
    warmup_share: float | None = None
    """Of the steps; None = as in the preset."""
    tokens: int | None = None
    """Of a run; None = as in the preset."""


SCALES = {
    "paper": Scale(
        changes=dict(vocab_size=32000),
        rates=(),
        tune_share=0.1,
        init="torch",  # as in the authors' code
        prepare="python -m data.wikitext103.prepare (setting 1), or the command in the preset (setting 2 and 3B)",
        flops_per_second=dict(float32=0.4 * 19.5e12, bfloat16=0.4 * 312e12),  # 40 % of an A100, by arithmetic
    ),
    "gpu": Scale(
        changes=dict(dataset="books_wiki", vocab_size=50304, eval_interval=0, save_interval=10_000, eval_tokens=None),
        rates=(5e-4, 1e-3, 2e-3),
        tune_share=0.1,
        init="spectral",
        prepare="python -m data.own_text.prepare --path=FOLDER_WITH_BOTH --name=books_wiki --tokenizer=gpt2",
        flops_per_second=dict(bfloat16=0.3 * 989e12),  # 30 % of an H200's datasheet, a guess; not measured here
        warmup_share=0.05,
        tokens=63_000_000,
    ),
    # A BPE of 1,024: the embeddings are 0.13M beside 0.30M in the blocks. GPT-2's 50,257 would take 6.4M, so that the
    # low-dimensional part could not be seen; bytes would take less, but 128 of them are 22 words, and these are 53.
    "cpu": Scale(
        changes=dict(dataset="enwiki_1k", vocab_size=1024, min_lr=0.0, eval_tokens=250_000),
        rates=(1e-3, 2e-3, 4e-3, 8e-3),
        tune_share=0.3,  # a tenth, 295 steps, still depends on luck
        init="spectral",
        prepare="python -m data.own_text.prepare --path=ENWIKI_EXTRACT --name=enwiki_1k --tokenizer=bpe:1024",
        flops_per_second=dict(float32=40e9),  # one of two jobs on an idle 2-core EPYC: 16,000 tokens/s, dense
        warmup_share=0.05,
        tokens=20 * 302_000,
    ),
}


def low(attention: int = 0, ffn: int = 0, only: str = "qkvo", gate: bool = True) -> dict[str, Any]:
    """Return the ranks of all seven projections, which replace those of a preset."""
    ranks = {name: attention if name in only else 0 for name in "qkvo"}
    return dict(lowdim=ranks | dict(gate=ffn if gate else 0, up=ffn, down=ffn))


def low_relu(attention: int = 0, ffn: int = 0) -> dict[str, Any]:
    return low(attention, ffn, gate=False)


@dataclass(frozen=True)
class Model:
    changes: dict[str, Any] = field(default_factory=dict)
    printed: str = ""
    perplexity: float | None = None
    note: str = ""


HEADS = "the heads keep the width of the others'; the paper does not give their number"
OURS = "ranks by us, the paper gives none"
COUNTED = "318.6M with the biases, 318.4M without; the paper prints 318M"

# Setting -> model -> shape, printed parameters, printed test perplexity (tables 1, 3, 4, 6, 7 and 8).
# "Transformer" and "same-param" start from the dense preset with its rate, all others from the LPA preset.
MODELS = {
    "S1 130M": {
        "Transformer": Model({}, "135M", 14.61),
        "same-param": Model(dict(n_layer=11), "128M", 14.69),
        "LPA": Model({}, "125M", 14.66),
        "low FFN": Model(low_relu(ffn=512), "125M", 15.25),
        "low all": Model(low_relu(320, 576), "126M", 15.00, OURS),
        "Attn Dim.": Model(dict(attn_dim=1536, n_head=16), "135M", 14.32, HEADS),
        "FFN Dim.": Model(dict(ffn_dim=3584), "135M", 14.38),
        "Layer Num.": Model(dict(n_layer=14), "138M", 14.39),
    },
    "S1 370M": {
        "Transformer": Model({}, "369M", 13.65),
        "same-param": Model(dict(n_layer=20), "319M", 13.75),
        "LPA": Model({}, "319M", 12.89),
        "LPA r=128": Model(low_relu(128), "293M", 13.03),
        "LPA r=64": Model(low_relu(64), "281M", 13.19),
        "LPA r=32": Model(low_relu(32), "274M", 13.82, "274.6M with the biases, 274.3M without; the paper prints 274M"),
        "LPA K,V": Model(low(256, only="kv"), "344M", 13.29),
        "LPA Q,K,V": Model(low(256, only="qkv"), "331M", 12.94),
        "low FFN": Model(low_relu(ffn=640), "325M", 14.12),
        "low all": Model(low_relu(320, 768), "318M", 13.14, COUNTED),
        "Attn Dim.": Model(dict(attn_dim=3072, n_head=24), "369M", 12.85, HEADS),
        "FFN Dim.": Model(dict(ffn_dim=5120), "369M", 13.02),
        "Layer Num.": Model(dict(n_layer=29), "371M", 13.04),
    },
    "S2 130M": {
        "Transformer": Model({}, "134M", 18.84),
        "same-param": Model(dict(ffn_dim=1392), "116M", 19.47, "a narrower FFN by us; no number of layers gives 116M"),
        "LPA": Model({}, "115M", 18.95),
        "low FFN": Model(low(ffn=384), "116M", 20.43),
        "low all": Model(low(256, 480), "117M", 20.64, OURS),
        # Not in the paper at this size, for the gpu scale
        "LPA r=256": Model(low(256)),
        "LPA r=64": Model(low(64)),
        "LPA r=32": Model(low(32)),
        "LPA K,V": Model(low(128, only="kv")),
        "LPA Q,K,V": Model(low(128, only="qkv")),
        "Attn Dim.": Model(dict(attn_dim=3840, n_head=60), note=HEADS),
        "FFN Dim.": Model(dict(ffn_dim=2728)),
        "Layer Num.": Model(dict(n_layer=15)),
    },
    "S2 370M": {
        "Transformer": Model({}, "368M", 12.10),
        "same-param": Model(dict(n_layer=20), "318M", 12.33),
        "LPA": Model({}, "318M", 11.68),
        "LPA K,V": Model(low(256, only="kv"), "343M", 11.73),
        "LPA Q,K,V": Model(low(256, only="qkv"), "330M", 11.80),
        "low FFN": Model(low(ffn=560), "318M", 12.77),
        "low all": Model(low(384, 640), "314M", 12.68, OURS),
    },
    "3B": {
        "Transformer": Model({}, "3.23B", 6.45),
        "same-param": Model(dict(n_layer=12), "2.49B", 6.69),
        "LPA": Model({}, "2.43B", 6.11, "the count of table 10's shape is 2.424B, the paper prints 2.43B"),
    },
    # Ranks are the paper's share of the width, d/4, d/8 and d/16; the rest is chosen by count, as the paper does.
    "cpu": {
        "Transformer": Model(),
        "same-param": Model(dict(n_layer=5)),
        "LPA": Model(low(16)),
        "LPA r=8": Model(low(8)),
        "LPA r=4": Model(low(4)),
        "LPA K,V": Model(low(16, only="kv")),
        "LPA Q,K,V": Model(low(16, only="qkv")),
        "low FFN": Model(low(ffn=36)),
        "low all": Model(low(24, 41)),
        "Attn Dim.": Model(low(16) | dict(attn_dim=192, n_head=12), note=HEADS),
        "FFN Dim.": Model(low(16) | dict(ffn_dim=216)),
        "Layer Num.": Model(low(16) | dict(n_layer=7)),
    },
}

PRESETS = {"S1 130M": "130m_s1", "S1 370M": "370m_s1", "S2 130M": "130m", "S2 370M": "370m", "3B": "3b", "cpu": "130m"}

# What a setting changes in its preset at every scale but paper.
SHAPES = {
    "cpu": dict(
        n_layer=6, n_head=4, n_embd=64, ffn_dim=176,  # 301,888 parameters outside the embeddings
        block_size=128, batch_size=16, tokens_per_step=16 * 128, dtype="float32",
    ),
    "S2 130M": dict(batch_size=160, tokens_per_step=160 * 256),  # half the paper's batch: 63M tokens are few steps
    "S2 370M": dict(batch_size=60, tokens_per_step=60 * 512),
}

DENSE = ("Transformer", "same-param")
POSITIONS = ("Transformer", "LPA", "low FFN", "low all")
SUBLAYERS = ("Transformer", "LPA", "LPA K,V", "LPA Q,K,V")
SURPLUS = ("Transformer", "LPA", "Attn Dim.", "FFN Dim.", "Layer Num.")
BASELINES = (*DENSE, "LPA")
CPU_RANKS = (*BASELINES, "LPA r=8", "LPA r=4", "low FFN", "low all")  # the core of this project's evidence, in a table

# Table -> scale -> (setting, models). Scales that are missing have no run that fits the machine.
TABLES = {
    "1": dict(
        paper=[(s, POSITIONS) for s in ("S1 130M", "S1 370M", "S2 130M", "S2 370M")],
        gpu=[("S2 130M", POSITIONS)],
        cpu=[("cpu", POSITIONS)],
    ),
    "3": dict(
        paper=[(s, BASELINES) for s in ("S1 130M", "S1 370M", "S2 130M", "S2 370M")],
        gpu=[("S2 130M", BASELINES), ("S2 370M", ("Transformer", "LPA"))],
        cpu=[("cpu", BASELINES)],
    ),
    "4": dict(paper=[("3B", BASELINES)]),
    "6": dict(
        paper=[("S1 370M", ("Transformer", "LPA", "LPA r=128", "LPA r=64", "LPA r=32"))],
        gpu=[("S2 130M", ("Transformer", "LPA r=256", "LPA", "LPA r=64", "LPA r=32"))],
        cpu=[("cpu", CPU_RANKS)],
    ),
    "7": dict(
        paper=[(s, SUBLAYERS) for s in ("S1 370M", "S2 370M")], gpu=[("S2 130M", SUBLAYERS)], cpu=[("cpu", SUBLAYERS)]
    ),
    "8": dict(paper=[(s, SURPLUS) for s in ("S1 130M", "S1 370M")], gpu=[("S2 130M", SURPLUS)], cpu=[("cpu", SURPLUS)]),
}

# A cpu row stands beside the paper's model of the same role at S1 370M, where it has all of them.
PAPER_ROLE = {"LPA r=8": "LPA r=128", "LPA r=4": "LPA r=64"}

# layers, heads, width, FFN; LPA has r = width / 4 at each, so that only the size changes from row to row
SIZES = {
    "paper": [(12, 12, 768, 2048), (16, 14, 896, 2400), (20, 15, 960, 2560), (24, 16, 1024, 2736)],
    "gpu": [(12, 12, 768, 2048), (16, 14, 896, 2400), (24, 16, 1024, 2736)],
    "cpu": [(4, 4, 48, 128), (6, 4, 64, 176), (7, 4, 80, 224)],
}


def arms(table: str, scale: str) -> list[Arm]:
    """Return the rows of a table ('1' ... '8', 'size'); none if the scale has no run for it."""
    if table == "size":
        return [row for shape in SIZES[scale] for row in pair(shape, scale)]
    return [arm(setting, name, scale) for setting, names in TABLES[table].get(scale, []) for name in names]


def arm(setting: str, name: str, scale: str) -> Arm:
    model = MODELS[setting][name]
    preset = f"config/{'dense' if name in DENSE else 'lpa'}_{PRESETS[setting]}.py"
    shape = {} if scale == "paper" else SHAPES[setting]
    return Arm(setting, name, preset, shape | model.changes, model.printed, paper_cell(setting, name), model.note)


def paper_cell(setting: str, name: str) -> str:
    model, role = MODELS[setting][name], PAPER_ROLE.get(name, name)
    if setting == "cpu":
        model = MODELS["S1 370M"][role]
        return f"{model.perplexity:.2f} ({role}, {model.printed}, S1 370M)"
    return "-" if model.perplexity is None else f"{model.perplexity:.2f} ({model.printed})"


def pair(shape: tuple[int, int, int, int], scale: str) -> list[Arm]:
    """Return a dense model and its LPA twin."""
    n_layer, n_head, n_embd, ffn_dim = shape
    others = {"gpu": SHAPES["S2 370M"], "cpu": SHAPES["cpu"], "paper": {}}[scale]
    changes = others | dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, ffn_dim=ffn_dim)
    preset = f"config/dense_{'130m' if scale == 'cpu' else '370m'}.py"
    setting = f"{n_layer} x {n_embd}"
    twins = [("Transformer", {}), ("LPA", low(n_embd // 4))]
    return [Arm(setting, name, preset, changes | ranks) for name, ranks in twins]
