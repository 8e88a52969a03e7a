"""List what the tables of the LPA paper (arXiv 2411.02063) compare, at three scales, with the figures it prints.

    paper   the paper's own models, data, lengths and learning rates (tables 9 and 10)
    gpu     its setting 2 at 130M, 63M tokens: an H200 takes minutes per run
    cpu     6 layers of width 64, 0.3M parameters outside the embeddings, 20 tokens per parameter

Where the paper gives no shape, `note` says how it was chosen. Its parameter count agrees with the printed one.
"""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Arm:
    """Describe one row of a table: a preset, and what changes in it. The function arms adds the last four."""

    changes: dict[str, Any] = field(default_factory=dict)
    printed: str = ""
    """Parameters that the paper prints; empty where the model is not in the paper."""
    perplexity: float | None = None
    """Test perplexity in the paper."""
    note: str = ""
    setting: str = ""
    name: str = ""
    preset: str = ""
    paper: str = "-"
    """Its test perplexity in the paper, with the parameters; at the scale cpu that of the model with the same role."""


@dataclass(frozen=True)
class Scale:
    """Hold what all runs of a scale share."""

    changes: dict[str, Any]
    rates: tuple[float, ...] = ()
    """Learning rates to try; none = that of the preset."""
    tune_share: float = 0.1
    """Length of a run that tries a learning rate, as a share of the full length."""
    tokens: int | None = None
    """Tokens per run, of which the warmup takes 5 %; None = both as in the preset."""


SCALES = {
    "paper": Scale(
        changes=dict(vocab_size=32000, factor_init="torch"),  # the init of the authors' code
    ),
    "gpu": Scale(
        changes=dict(
            # python -m data.own_text.prepare --path=FOLDER_WITH_BOTH --name=books_wiki --tokenizer=gpt2
            dataset="books_wiki", vocab_size=50304, eval_interval=0, save_interval=10_000, eval_tokens=None,
            batch_size=160, tokens_per_step=160 * 256,  # half the paper's batch: 63M tokens are few steps
        ),
        rates=(5e-4, 1e-3, 2e-3),
        tokens=63_000_000,
    ),
    "cpu": Scale(
        changes=dict(
            # A BPE of 1,024 gives embeddings of 0.13M beside 0.30M in the blocks. GPT-2's 50,257 would give 6.4M
            # and hide the low-dimensional part. With bytes, 128 tokens would be 22 words instead of 53.
            dataset="enwiki_1k", vocab_size=1024, min_lr=0.0, eval_tokens=250_000, dtype="float32",
            n_layer=6, n_head=4, n_embd=64, ffn_dim=176,  # 301,888 parameters outside the embeddings
            block_size=128, batch_size=16, tokens_per_step=16 * 128,
        ),
        rates=(1e-3, 2e-3, 4e-3, 8e-3),
        tune_share=0.3,  # a tenth, 295 steps, still depends on luck
        tokens=20 * 302_000,
    ),
}  # fmt: skip


def low(attention: int = 0, ffn: int = 0, only: str = "qkvo", gate: bool = True) -> dict[str, Any]:
    """Return the ranks of all seven projections, which replace those of a preset. An FFN with ReLU has no gate."""
    ranks = {name: attention if name in only else 0 for name in "qkvo"}
    return dict(lowdim=ranks | dict(gate=ffn if gate else 0, up=ffn, down=ffn))


HEADS = "the heads keep the width of the others'; the paper does not give their number"
OURS = "ranks by us, the paper gives none"
COUNTED = "318.6M with the biases, 318.4M without; the paper prints 318M"

# Setting -> model -> changes, printed parameters, printed test perplexity (tables 1, 3, 4, 6, 7 and 8)
MODELS = {
    "S1 130M": {
        "Transformer": Arm({}, "135M", 14.61),
        "same-param": Arm(dict(n_layer=11), "128M", 14.69),
        "LPA": Arm({}, "125M", 14.66),
        "low FFN": Arm(low(ffn=512, gate=False), "125M", 15.25),
        "low all": Arm(low(320, 576, gate=False), "126M", 15.00, OURS),
        "Attn Dim.": Arm(dict(attn_dim=1536, n_head=16), "135M", 14.32, HEADS),
        "FFN Dim.": Arm(dict(ffn_dim=3584), "135M", 14.38),
        "Layer Num.": Arm(dict(n_layer=14), "138M", 14.39),
    },
    "S1 370M": {
        "Transformer": Arm({}, "369M", 13.65),
        "same-param": Arm(dict(n_layer=20), "319M", 13.75),
        "LPA": Arm({}, "319M", 12.89),
        "LPA r=128": Arm(low(128), "293M", 13.03),
        "LPA r=64": Arm(low(64), "281M", 13.19),
        "LPA r=32": Arm(low(32), "274M", 13.82, "274.6M with the biases, 274.3M without; the paper prints 274M"),
        "LPA K,V": Arm(low(256, only="kv"), "344M", 13.29),
        "LPA Q,K,V": Arm(low(256, only="qkv"), "331M", 12.94),
        "low FFN": Arm(low(ffn=640, gate=False), "325M", 14.12),
        "low all": Arm(low(320, 768, gate=False), "318M", 13.14, COUNTED),
        "Attn Dim.": Arm(dict(attn_dim=3072, n_head=24), "369M", 12.85, HEADS),
        "FFN Dim.": Arm(dict(ffn_dim=5120), "369M", 13.02),
        "Layer Num.": Arm(dict(n_layer=29), "371M", 13.04),
    },
    "S2 130M": {
        "Transformer": Arm({}, "134M", 18.84),
        "same-param": Arm(dict(ffn_dim=1392), "116M", 19.47, "a narrower FFN by us; no number of layers gives 116M"),
        "LPA": Arm({}, "115M", 18.95),
        "low FFN": Arm(low(ffn=384), "116M", 20.43),
        "low all": Arm(low(256, 480), "117M", 20.64, OURS),
    },
    "S2 370M": {
        "Transformer": Arm({}, "368M", 12.10),
        "same-param": Arm(dict(n_layer=20), "318M", 12.33),
        "LPA": Arm({}, "318M", 11.68),
        "LPA K,V": Arm(low(256, only="kv"), "343M", 11.73),
        "LPA Q,K,V": Arm(low(256, only="qkv"), "330M", 11.80),
        "low FFN": Arm(low(ffn=560), "318M", 12.77),
        "low all": Arm(low(384, 640), "314M", 12.68, OURS),
    },
    "3B": {
        "Transformer": Arm({}, "3.23B", 6.45),
        "same-param": Arm(dict(n_layer=12), "2.49B", 6.69),
        "LPA": Arm({}, "2.43B", 6.11, "the count of table 10's shape is 2.424B, the paper prints 2.43B"),
    },
    # Ranks are the paper's share of the width, d/4, d/8 and d/16; the rest is chosen by count, as the paper does.
    "cpu": {
        "Transformer": Arm(),
        "same-param": Arm(dict(n_layer=5)),
        "LPA": Arm(low(16)),
        "LPA r=8": Arm(low(8)),
        "LPA r=4": Arm(low(4)),
        "LPA K,V": Arm(low(16, only="kv")),
        "LPA Q,K,V": Arm(low(16, only="qkv")),
        "low FFN": Arm(low(ffn=36)),
        "low all": Arm(low(24, 41)),
        "Attn Dim.": Arm(low(16) | dict(attn_dim=192, n_head=12), note=HEADS),
        "FFN Dim.": Arm(low(16) | dict(ffn_dim=216)),
        "Layer Num.": Arm(low(16) | dict(n_layer=7)),
    },
}
# Setting 2 at 130M, with models that the paper does not have at this size
MODELS["gpu"] = MODELS["S2 130M"] | {
    "LPA r=256": Arm(low(256)),
    "LPA r=64": Arm(low(64)),
    "LPA r=32": Arm(low(32)),
    "LPA K,V": Arm(low(128, only="kv")),
    "LPA Q,K,V": Arm(low(128, only="qkv")),
    "Attn Dim.": Arm(dict(attn_dim=3840, n_head=60), note=HEADS),
    "FFN Dim.": Arm(dict(ffn_dim=2728)),
    "Layer Num.": Arm(dict(n_layer=15)),
}
AT_370M = dict(batch_size=60, tokens_per_step=60 * 512)
MODELS["gpu 370M"] = {name: replace(MODELS["S2 370M"][name], changes=AT_370M) for name in ("Transformer", "LPA")}

PRESETS = {
    "S1 130M": "130m_s1", "S1 370M": "370m_s1", "S2 130M": "130m", "S2 370M": "370m", "3B": "3b",
    "gpu": "130m", "gpu 370M": "370m", "cpu": "130m",
}  # fmt: skip

DENSE = ("Transformer", "same-param")  # they start from the dense preset, with its learning rate
BASELINES = (*DENSE, "LPA")
POSITIONS = ("Transformer", "LPA", "low FFN", "low all")
SUBLAYERS = ("Transformer", "LPA", "LPA K,V", "LPA Q,K,V")
SURPLUS = ("Transformer", "LPA", "Attn Dim.", "FFN Dim.", "Layer Num.")

# Table -> setting -> models. The settings that begin with gpu or cpu belong to these scales, the others to paper.
TABLES = {
    "1": dict.fromkeys(("S1 130M", "S1 370M", "S2 130M", "S2 370M", "gpu", "cpu"), POSITIONS),
    "3": dict.fromkeys(("S1 130M", "S1 370M", "S2 130M", "S2 370M", "gpu", "cpu"), BASELINES)
    | {"gpu 370M": ("Transformer", "LPA")},
    "4": {"3B": BASELINES},
    "6": {
        "S1 370M": ("Transformer", "LPA", "LPA r=128", "LPA r=64", "LPA r=32"),
        "gpu": ("Transformer", "LPA r=256", "LPA", "LPA r=64", "LPA r=32"),
        "cpu": (*BASELINES, "LPA r=8", "LPA r=4", "low FFN", "low all"),  # all that this project has measured
    },
    "7": dict.fromkeys(("S1 370M", "S2 370M", "gpu", "cpu"), SUBLAYERS),
    "8": dict.fromkeys(("S1 130M", "S1 370M", "gpu", "cpu"), SURPLUS),
}

# Layers, heads, width, FFN. LPA has r = width / 4 at each, so only the size changes from row to row.
SIZES = {
    "paper": [(12, 12, 768, 2048), (16, 14, 896, 2400), (20, 15, 960, 2560), (24, 16, 1024, 2736)],
    "gpu": [(12, 12, 768, 2048), (16, 14, 896, 2400), (24, 16, 1024, 2736)],
    "cpu": [(4, 4, 48, 128), (6, 4, 64, 176), (7, 4, 80, 224)],
}


def arms(table: str, scale: str) -> list[Arm]:
    """Return the rows of a table ('1' ... '8', 'size'); none if the scale has no run for it."""
    if table == "size":
        return [arm for shape in SIZES[scale] for arm in pair(shape, scale)]
    found = []
    for setting, names in TABLES[table].items():
        place = setting.partition(" ")[0]
        if scale == (place if place in SCALES else "paper"):
            for name in names:
                preset = f"config/{'dense' if name in DENSE else 'lpa'}_{PRESETS[setting]}.py"
                arm = MODELS[setting][name]
                found.append(replace(arm, setting=setting, name=name, preset=preset, paper=printed(arm, setting, name)))
    return found


def printed(arm: Arm, setting: str, name: str) -> str:
    """Return what the paper prints; for a cpu row, of the model with the same role at S1 370M."""
    role, where = name, ""
    if setting == "cpu":
        role, where = {"LPA r=8": "LPA r=128", "LPA r=4": "LPA r=64"}.get(name, name), ", S1 370M"
        arm = MODELS["S1 370M"][role]
    figures = f"{role}, {arm.printed}{where}" if where else arm.printed
    return "-" if arm.perplexity is None else f"{arm.perplexity:.2f} ({figures})"


def pair(shape: tuple[int, int, int, int], scale: str) -> list[Arm]:
    """Return a dense model and its LPA twin."""
    n_layer, n_head, n_embd, ffn_dim = shape
    changes = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, ffn_dim=ffn_dim)
    if scale == "gpu":
        changes |= AT_370M
    dense = Arm(
        changes,
        setting=f"{n_layer} x {n_embd}",
        name="Transformer",
        preset=f"config/dense_{'130m' if scale == 'cpu' else '370m'}.py",
    )
    return [dense, replace(dense, name="LPA", changes=changes | low(n_embd // 4))]
