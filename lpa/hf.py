"""Convert a model to Hugging Face's form and back, for transformers, vLLM, llama.cpp and lm-eval (export.py).

RMSNorm, SwiGLU and RoPE are LlamaForCausalLM; LayerNorm, GELU and learned positions GPT2LMHeadModel. Factors A, B and
blocks become the matrix that they stand for, multiplied in float64 and rounded once. Ids that only pad the vocabulary
to a multiple of 128 are left out, so nothing can draw them.
"""

import copy
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import UserError
from data.tokenizers import END_OF_TEXT, HFTokenizer, Tokenizer, as_hf
from lpa.checkpoint import sync
from lpa.counts import dense_weight
from model import GPT, GPTConfig, Norm

INSTALL = "needs: pip install safetensors tokenizers"


@dataclass(frozen=True)
class Architecture:
    """The name of a class of transformers and what it computes, in our words and in its own."""

    class_name: str
    model_type: str
    options: dict[str, str]
    """Ours -> theirs, of those that may have any value."""
    computes: dict[str, Any]
    """Our options that it cannot have otherwise."""
    constants: dict[str, Any]
    """Its own options that we cannot have otherwise; each is also its default."""
    outside: dict[str, str]
    blocks: str
    """What its layers are called; N follows."""
    inside: dict[str, tuple[str, ...]]
    """Its modules in a layer -> ours, several where it stacks their matrices in one."""
    prefix: str
    """Of all names but the head's; folders of the model without its head lack it."""
    ties: bool
    """Whether its embeddings are tied where config.json does not say."""
    transposed: bool = False
    """Whether matrices inside a layer are (in, out)."""


# Our options that neither class can have otherwise
BOTH = dict(
    norm_order="pre",
    qk_norm=False,
    head_bias=False,
)
LLAMA = Architecture(
    class_name="LlamaForCausalLM",
    model_type="llama",
    options=dict(
        n_layer="num_hidden_layers",
        n_head="num_attention_heads",
        n_kv_head="num_key_value_heads",
        n_embd="hidden_size",
        ffn_dim="intermediate_size",
        block_size="max_position_embeddings",
        norm_eps="rms_norm_eps",
    ),
    computes=BOTH | dict(norm="rmsnorm", mlp="swiglu", pos="rope", rope_dim=None),
    constants=dict(hidden_act="silu"),
    outside={"transformer.wte": "model.embed_tokens", "transformer.norm": "model.norm", "lm_head": "lm_head"},
    blocks="model.layers",
    inside={
        "input_layernorm": ("norm1",),
        "self_attn.q_proj": ("attn.q",),
        "self_attn.k_proj": ("attn.k",),
        "self_attn.v_proj": ("attn.v",),
        "self_attn.o_proj": ("attn.o",),
        "post_attention_layernorm": ("norm2",),
        "mlp.gate_proj": ("mlp.gate",),
        "mlp.up_proj": ("mlp.up",),
        "mlp.down_proj": ("mlp.down",),
    },
    prefix="model.",
    ties=False,
)
GPT2 = Architecture(
    class_name="GPT2LMHeadModel",
    model_type="gpt2",
    options=dict(
        n_layer="n_layer",
        n_head="n_head",
        n_embd="n_embd",
        ffn_dim="n_inner",
        block_size="n_positions",
        norm_eps="layer_norm_epsilon",
    ),
    computes=BOTH | dict(norm="layernorm", mlp="gelu", pos="learned"),
    constants=dict(activation_function="gelu_new", scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    | dict(add_cross_attention=False),
    outside={
        "transformer.wte": "transformer.wte",
        "transformer.wpe": "transformer.wpe",
        "transformer.norm": "transformer.ln_f",
        "lm_head": "lm_head",
    },
    blocks="transformer.h",
    inside={
        "ln_1": ("norm1",),
        "attn.c_attn": ("attn.q", "attn.k", "attn.v"),
        "attn.c_proj": ("attn.o",),
        "ln_2": ("norm2",),
        "mlp.c_fc": ("mlp.up",),
        "mlp.c_proj": ("mlp.down",),
    },
    prefix="transformer.",
    ties=True,
    transposed=True,
)
# Every option of a model is in `options` or `computes` of its class, or here; a new one is refused until it is.
FREE = {"vocab_size", "lowdim", "first_ffn_dense", "factor_init", "zero_init", "dropout"}  # trained weights hold them
APART = {"attn_dim", "n_kv_head", "rope_theta", "rope_dim", "bias", "tie_embeddings"}  # see architecture, config_json
NO_WEIGHTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # tables that older versions saved


def architecture(c: GPTConfig) -> Architecture:
    """Return the class that computes what such a model does. Raise UserError that names what no class can have."""
    known = GPT2 if c.pos == "learned" else LLAMA
    why = [
        f"{name} = {getattr(c, name)!r} (wanted {wanted!r})"
        for name, wanted in known.computes.items()
        if getattr(c, name) != wanted
    ]
    new = {field.name for field in dataclasses.fields(c)} - known.options.keys() - known.computes.keys() - FREE - APART
    why += [f"{name} = {getattr(c, name)!r} (unknown to lpa/hf.py: map it there, or list it)" for name in sorted(new)]
    if known is GPT2 and c.attn_dim != c.n_embd:
        why.append(f"attn_dim = {c.attn_dim} (wanted n_embd = {c.n_embd})")
    if known is GPT2 and c.n_kv_head != c.n_head:
        why.append(f"n_kv_head = {c.n_kv_head} (wanted n_head = {c.n_head})")
    if known is LLAMA and c.n_embd % c.n_head:
        why.append(f"n_embd = {c.n_embd} (wanted a multiple of n_head = {c.n_head})")
    if why:
        raise UserError(f"{known.class_name}, the nearest class of transformers, cannot have {', '.join(why)}")
    return known


def modules(known: Architecture, c: GPTConfig) -> Iterator[tuple[str, list[str]]]:
    """Yield their name of each module that has weights, and ours, several where theirs stacks them."""
    for ours, theirs in known.outside.items():
        if ours != "lm_head" or not c.tie_embeddings:
            yield theirs, [ours]
    for layer in range(c.n_layer):
        for theirs, names in known.inside.items():
            yield f"{known.blocks}.{layer}.{theirs}", [f"transformer.h.{layer}.{name}" for name in names]


def in_layout(known: Architecture, weight: Tensor, name: str) -> Tensor:
    """Return a matrix in their layout from ours (out, in), or back; `name` is ours."""
    return weight.T if known.transposed and (".attn." in name or ".mlp." in name) else weight


# --- To Hugging Face ---------------------------------------------------------------------------------------------


def export(model: GPT, tokenizer: Tokenizer, target: Path, origin: dict[str, Any]) -> None:
    """Write `target` completely or not at all, in place of an earlier export. `origin` goes into export.json.

    Raise UserError where the model or the tokenizer has no equal there, or the disk does not take it.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise UserError(f"export.py {INSTALL}") from None
    known = architecture(model.config)
    refuse_foreign(target)
    if tokenizer.vocab_size > len(model.lm_head.weight):
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {len(model.lm_head.weight)} of them")
    ends = dict(bos_token_id=tokenizer.end_of_text, eos_token_id=tokenizer.end_of_text)
    files = {
        "config.json": config_json(known, model.config, tokenizer.vocab_size) | ends,
        "generation_config.json": ends | dict(do_sample=False),
        "tokenizer_config.json": tokenizer_options(tokenizer, model.config.block_size),
        "tokenizer.json": as_hf(tokenizer),
        "export.json": origin,
    }
    target = target.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{target.name}.", dir=target.parent) as scratch:
            written = Path(scratch) / "new"
            written.mkdir()
            for name, contents in files.items():
                (written / name).write_text(json.dumps(contents, indent=1, ensure_ascii=False), encoding="utf-8")
            named = tensors(known, model, tokenizer.vocab_size)
            save_file(named, written / "model.safetensors", metadata={"format": "pt"})
            shutil.copymode(written / "config.json", written / "model.safetensors")  # else only its owner could read it
            for path in (*written.iterdir(), written):
                sync(path)
            old = Path(scratch) / "old"
            if target.exists():
                target.rename(old)
            try:
                written.rename(target)
            except BaseException:  # the folder of scratch would take the earlier export with it
                if old.exists():
                    old.rename(target)
                raise
    except (OSError, SafetensorError) as error:
        raise UserError(f"could not write {target}: {getattr(error, 'strerror', None) or error}") from None


def twin(c: GPTConfig) -> nn.Module:
    """Return a dense model of this shape in transformers' own class, to compare speed with, attention by SDPA.

    Llama rotates also where pos = 'none', as it has no form without.
    """
    try:
        import transformers
    except ImportError:
        raise UserError("comparing with transformers needs it: pip install 'transformers>=4.56,<6'") from None
    c = dataclasses.replace(c, pos="rope") if c.pos == "none" else c
    if c.dropout:
        raise UserError(f"dropout is {c.dropout}, wanted 0 against transformers")
    options = config_json(architecture(c), c, c.vocab_size or 0) | dict(bos_token_id=None, eos_token_id=None)
    config = transformers.AutoConfig.for_model(str(options.pop("model_type")), **options)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


class Twin(nn.Module):
    """transformers' model of a dense GPT's shape, trained and evaluated by the same code as ours.

    Its own are: a float32 residual stream under autocast, and in decoding its default cache and generate().
    """

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.hf: Any = twin(c)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        logits = self.hf(idx, use_cache=False).logits
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def compile_as(self, mode: str) -> None:
        layers = self.hf.base_model.layers if self.hf.config.model_type == "llama" else self.hf.base_model.h
        for module in {"off": [], "model": [self.hf], "block": layers}[mode]:
            module.compile(dynamic=False)


def refuse_foreign(target: Path) -> None:
    """Raise UserError where writing `target` would destroy what is not an export."""
    if target.exists() and not (target.is_dir() and ((target / "export.json").exists() or not any(target.iterdir()))):
        raise UserError(f"{target} is there and is no export; wanted a new or empty folder, or an earlier export")


def config_json(known: Architecture, c: GPTConfig, vocab_size: int) -> dict[str, Any]:
    values = dataclasses.asdict(c)
    written = dict(architectures=[known.class_name], model_type=known.model_type, torch_dtype="float32")
    written |= dict(vocab_size=vocab_size, tie_word_embeddings=c.tie_embeddings)
    written |= {theirs: values[ours] for ours, theirs in known.options.items()} | known.constants
    if known is LLAMA:
        written |= dict(head_dim=c.head_dim, rope_theta=c.rope_theta, attention_bias=c.bias, mlp_bias=c.bias)
    else:
        written |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return written


def tokenizer_options(tokenizer: Tokenizer, block_size: int) -> dict[str, Any]:
    """Return tokenizer_config.json. As with us, a special token written in a text is ordinary text."""
    written = dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=block_size)
    written |= dict(clean_up_tokenization_spaces=False, split_special_tokens=True)
    written |= dict(model_input_names=["input_ids", "attention_mask"])
    end = tokenizer.end_of_text
    if end is None:
        return written
    token = tokenizer.model.id_to_token(end) if isinstance(tokenizer, HFTokenizer) else END_OF_TEXT
    return written | dict(bos_token=token, eos_token=token)


@torch.no_grad()
def tensors(known: Architecture, model: GPT, vocab_size: int) -> dict[str, Tensor]:
    """Return every weight under its name there. GPT-2 always has biases: where we have none, they are zero."""
    named = {}
    for theirs, ours in modules(known, model.config):
        layers: list[Any] = [model.get_submodule(name) for name in ours]
        weight = torch.cat([merged(layer) for layer in layers])
        if ours[0] in ("transformer.wte", "lm_head"):
            weight = weight[:vocab_size]
        elif getattr(layers[0], "bias", None) is not None:
            named[f"{theirs}.bias"] = torch.cat([layer.bias for layer in layers])
        elif known is GPT2 and ours[0] != "transformer.wpe":
            named[f"{theirs}.bias"] = torch.zeros(len(weight))
        named[f"{theirs}.weight"] = in_layout(known, weight, ours[0]).contiguous()
    return named


def merged(layer: Any) -> Tensor:
    """Return the matrix (out, in) of a projection of any kind, multiplied in float64, or the weight of an embedding."""
    if isinstance(layer, nn.Embedding | Norm):
        return layer.weight
    return dense_weight(copy.deepcopy(layer).double()).float()


# --- From Hugging Face -------------------------------------------------------------------------------------------


def find_folder(source: Path) -> Path:
    """`source` where it is a folder, else where the hub's files of that name are, loaded if need be."""
    if source.is_dir():
        return source
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("a name on the hub needs: pip install huggingface_hub") from None
    wanted = ["config.json", "tokenizer.json", "model*.safetensors", "model.safetensors.index.json"]
    try:
        return Path(huggingface_hub.snapshot_download(source.as_posix(), allow_patterns=wanted))
    except Exception as error:  # a name that none can have, that none has, or no network: each library has its own
        kind = type(error).__name__
        raise UserError(f"no folder {source}, and the Hugging Face hub gave no model of that name ({kind})") from None


def read_config(folder: Path) -> tuple[Architecture, dict[str, Any]]:
    """config.json, and whose it is. Raises UserError where it computes what we do not."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config["model_type"]
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(
            f"{folder} holds no checkpoint of ours, and no config.json of Hugging Face with a model_type"
        ) from None
    known = next((known for known in (LLAMA, GPT2) if known.model_type == kind), None)
    if known is None:
        raise UserError(f"{folder} is a model of type {kind!r}, wanted 'llama' or 'gpt2'")
    wanted = known.constants
    seen = {name: config.get(name, value) for name, value in wanted.items()}
    if known is LLAMA:
        wanted = wanted | dict(rope_type="default", partial_rotary_factor=1.0)
        seen |= dict(rope_type=rope.get("rope_type", rope.get("type", "default")))
        seen |= dict(partial_rotary_factor=rope.get("partial_rotary_factor") or 1.0)
        config["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", GPTConfig.rope_theta))
    wrong = [f"{name} = {seen[name]!r} (wanted {wanted[name]!r})" for name in seen if seen[name] != wanted[name]]
    if wrong:
        raise UserError(f"{folder} has {', '.join(wrong)}, which this model cannot compute")
    return known, config


def read_options(folder: Path, known: Architecture, config: dict[str, Any]) -> GPTConfig:
    """The options of the model in a folder. Raises UserError where config.json lacks one."""
    defaults = dict(num_key_value_heads=None, n_inner=None, rms_norm_eps=1e-6, layer_norm_epsilon=1e-5)
    config: dict[str, Any] = defaults | config
    missing = [name for name in (*known.options.values(), "vocab_size") if name not in config]
    if missing:
        raise UserError(f"{folder / 'config.json'} does not say {', '.join(missing)}")
    options: dict[str, Any] = {ours: config[theirs] for ours, theirs in known.options.items()} | known.computes
    options |= dict(vocab_size=config["vocab_size"], tie_embeddings=config.get("tie_word_embeddings", known.ties))
    try:
        if known is LLAMA:
            options |= dict(rope_theta=float(config["rope_theta"]))
            heads_dim = (config.get("head_dim") or 0) * options["n_head"]
            options |= dict(attn_dim=heads_dim if heads_dim not in (0, options["n_embd"]) else None)
        return GPTConfig(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} is of a model that this one cannot be: {error}") from None


@torch.no_grad()
def read_model(folder: Path, bias: bool = False) -> GPT:
    """The dense model of a folder, in float32. Only safetensors are read, which cannot run code.

    Biases of zero are as good as none: there are some where the folder's are not zero, or where `bias` asks for them.
    Raises UserError where a tensor is missing, of another shape, or one that we do not have.
    """
    known, config = read_config(folder)
    stored = open_tensors(folder, known)
    c = read_options(folder, known, config)
    model = GPT(dataclasses.replace(c, bias=bias or has_bias(stored)), seed=None)
    used = {"lm_head.weight"}
    for theirs, ours in modules(known, c):
        layers = [model.get_submodule(name) for name in ours]
        for part in ("weight", "bias"):
            name = f"{theirs}.{part}"
            used.add(name)
            if getattr(layers[0], part, None) is None:
                continue
            parameters = [getattr(layer, part) for layer in layers]
            shape = (sum(map(len, parameters)), *parameters[0].shape[1:])
            if part == "bias" and name not in stored:
                stored[name] = partial(torch.zeros, shape)
            if name not in stored:
                raise UserError(f"{folder} has no tensor {name}")
            tensor = in_layout(known, stored[name](), ours[0]) if part == "weight" else stored[name]()
            if tensor.shape != shape:
                raise UserError(f"{name} in {folder} is of shape {tuple(tensor.shape)}, wanted {shape}")
            for parameter, piece in zip(parameters, tensor.split([len(p) for p in parameters])):
                parameter.copy_(piece)
    head, embeddings = (stored.get(f"{known.outside[name]}.weight") for name in ("lm_head", "transformer.wte"))
    if c.tie_embeddings and head and embeddings and not head().equal(embeddings()):
        raise UserError(f"{folder} ties the embeddings, but its lm_head.weight is another one")
    if stored.keys() - used:
        raise UserError(
            f"{folder} has tensors that {known.class_name} has not: {', '.join(sorted(stored.keys() - used)[:3])}"
        )
    return model.eval()


def open_tensors(folder: Path, known: Architecture) -> dict[str, Callable[[], Tensor]]:
    """What reads each tensor of a folder's safetensors, by its full name. Raises UserError where there are none."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(f"reading {folder} {INSTALL}") from None
    index = folder / "model.safetensors.index.json"
    try:
        files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else ["model.safetensors"]
        readers = {}
        for file in files:
            opened = safe_open(folder / file, "pt")
            readers |= {name: partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118 (no dict)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        why = f"cannot read the safetensors of {folder}: {error}"
        if any(folder.glob("*.bin")):
            why += "; wanted what save_pretrained of transformers writes today, for a .bin can run code"
        raise UserError(why) from None
    named = {}
    for name, reader in readers.items():
        full = name if name.startswith((known.prefix, "lm_head.")) else known.prefix + name
        if not full.endswith(NO_WEIGHTS):
            named[full] = reader
    return named


def has_bias(stored: dict[str, Callable[[], Tensor]]) -> bool:
    return any(name.endswith(".bias") and bool(read().any()) for name, read in stored.items())


def preset(source: Path) -> str:
    """The options of a folder's model, as a preset for train.py; what is as by default is left out."""
    folder = find_folder(source)
    known, config = read_config(folder)
    c = dataclasses.replace(read_options(folder, known, config), bias=has_bias(open_tensors(folder, known)))
    defaults = vars(GPTConfig())
    lines = [f"# {known.class_name} {source}. Its tokenizer for a corpus: data.own_text.prepare --tokenizer={folder}"]
    lines += [f"{name} = {value!r}" for name, value in vars(c).items() if value != defaults[name]]
    return "\n".join([*lines, f"init_from = {str(source)!r}"])
