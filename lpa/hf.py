"""Convert a model to Hugging Face's format and back: export.py and train.py --init_from.

RMSNorm, SwiGLU and RoPE become LlamaForCausalLM; LayerNorm, GELU and learned positions become GPT2LMHeadModel. A
factored projection becomes one dense matrix, multiplied in float64 and rounded once. An export has no token ids that
only pad the vocabulary to a multiple of 128, so nothing can draw them.
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
from torch import Tensor, nn

from config import UserError
from data.tokenizers import END_OF_TEXT, HFTokenizer, Tokenizer, as_hf
from lpa.checkpoint import sync
from lpa.counts import dense_weight
from model import GPT, GPTConfig, Norm

INSTALL = "needs: pip install safetensors tokenizers"

# --- The two classes ---------------------------------------------------------------------------------------------


FREE = object()  # the rule of an option that changes only the weights or the training: it may have any value


@dataclass(frozen=True)
class Architecture:
    """Describe a class of transformers: how its options and modules correspond to ours."""

    class_name: str
    model_type: str
    fields: dict[str, Any]
    """The rule of each field of GPTConfig: a tuple of its names in config.json, FREE, or the only value that it may
    have (or a function that computes it from all options). Export refuses a field without a rule."""
    defaults: dict[str, Any]
    """What a config.json may leave out."""
    constants: dict[str, Any]
    """Options of the class for which our model has only this value, which is also the default there."""
    outside: dict[str, str]
    """Our name of each module outside the blocks, and the name there."""
    blocks: str
    """The name of the list of blocks."""
    inside: dict[str, tuple[str, ...]]
    """The name there of each module in a block, and our names: several if it stacks their matrices."""


BOTH = dict(norm_order="pre", qk_norm=False, head_bias=False, rope_dim=None)
BOTH |= dict(vocab_size=("vocab_size",), tie_embeddings=("tie_word_embeddings",))
BOTH |= dict.fromkeys(("lowdim", "first_ffn_dense", "factor_init", "zero_init", "dropout"), FREE)
LLAMA = Architecture(
    class_name="LlamaForCausalLM",
    model_type="llama",
    fields=BOTH
    | dict(norm="rmsnorm", mlp="swiglu", pos="rope")
    | dict(
        n_layer=("num_hidden_layers",),
        n_head=("num_attention_heads",),
        n_kv_head=("num_key_value_heads",),
        n_embd=("hidden_size",),
        attn_dim=("head_dim",),  # there the width of one head
        ffn_dim=("intermediate_size",),
        block_size=("max_position_embeddings",),
        norm_eps=("rms_norm_eps",),
        rope_theta=("rope_theta",),
        bias=("attention_bias", "mlp_bias"),
    ),
    defaults=dict(num_key_value_heads=None, head_dim=None, rms_norm_eps=1e-6, tie_word_embeddings=False),
    constants=dict(hidden_act="silu"),
    outside={"transformer.wte": "model.embed_tokens", "transformer.norm": "model.norm", "lm_head": "lm_head"},
    blocks="model.layers",
    inside=dict[str, tuple[str, ...]](input_layernorm=("norm1",), post_attention_layernorm=("norm2",))
    | {f"self_attn.{name}_proj": (f"attn.{name}",) for name in "qkvo"}
    | {f"mlp.{name}_proj": (f"mlp.{name}",) for name in ("gate", "up", "down")},
)
GPT2 = Architecture(
    class_name="GPT2LMHeadModel",
    model_type="gpt2",
    fields=BOTH
    | dict(norm="layernorm", mlp="gelu", pos="learned")
    | dict(
        n_layer=("n_layer",),
        n_head=("n_head",),
        n_kv_head=lambda c: c.n_head,
        n_embd=("n_embd",),
        attn_dim=lambda c: c.n_embd,
        ffn_dim=("n_inner",),
        block_size=("n_positions",),
        norm_eps=("layer_norm_epsilon",),
        rope_theta=FREE,
        bias=FREE,  # the class always has biases: zeros if ours has none
    ),
    defaults=dict(n_inner=None, layer_norm_epsilon=1e-5, tie_word_embeddings=True),
    constants=dict(activation_function="gelu_new", scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    | dict(add_cross_attention=False),
    outside={"transformer.wte": "transformer.wte", "transformer.wpe": "transformer.wpe"}
    | {"transformer.norm": "transformer.ln_f", "lm_head": "lm_head"},
    blocks="transformer.h",
    inside={
        "ln_1": ("norm1",),
        "attn.c_attn": ("attn.q", "attn.k", "attn.v"),
        "attn.c_proj": ("attn.o",),
        "ln_2": ("norm2",),
        "mlp.c_fc": ("mlp.up",),
        "mlp.c_proj": ("mlp.down",),
    },
)
NO_WEIGHTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # tables that older versions saved


def architecture(c: GPTConfig) -> Architecture:
    """Return the class that computes such a model. Raise UserError that names the options which prevent it."""
    known = GPT2 if c.pos == "learned" else LLAMA
    why = []
    for name in (field.name for field in dataclasses.fields(c)):
        value, rule = getattr(c, name), known.fields.get(name)
        if name not in known.fields:
            why.append(f"{name} = {value!r} (unknown to lpa/hf.py: give it a rule there)")
        elif rule is not FREE and not isinstance(rule, tuple):
            wanted = rule(c) if callable(rule) else rule
            why += [f"{name} = {value!r} (wanted {wanted!r})"] if value != wanted else []
    if known is LLAMA and c.n_embd % c.n_head:
        why.append(f"n_embd = {c.n_embd} (wanted a multiple of n_head = {c.n_head})")
    if why:
        raise UserError(f"{known.class_name}, the nearest class of transformers, cannot have {', '.join(why)}")
    return known


def modules(known: Architecture, c: GPTConfig) -> Iterator[tuple[str, list[str]]]:
    """Yield the name there of each module that has weights, and our names: several if it stacks their matrices."""
    for ours, theirs in known.outside.items():
        if ours != "lm_head" or not c.tie_embeddings:
            yield theirs, [ours]
    for layer in range(c.n_layer):
        for theirs, names in known.inside.items():
            yield f"{known.blocks}.{layer}.{theirs}", [f"transformer.h.{layer}.{name}" for name in names]


def in_layout(known: Architecture, weight: Tensor, name: str) -> Tensor:
    """Return a matrix in their layout from ours (out, in), or back: GPT-2's layers have (in, out). `name` is ours."""
    return weight.T if known is GPT2 and (".attn." in name or ".mlp." in name) else weight


# --- To Hugging Face ---------------------------------------------------------------------------------------------


def export(model: GPT, tokenizer: Tokenizer, target: Path, origin: dict[str, Any]) -> None:
    """Write the folder `target`, completely or not at all, or replace an earlier export. origin: for export.json.

    Raise UserError if the class or the tokenizer has no equal there, or if the disk fails.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise UserError(f"export.py {INSTALL}") from None
    known = architecture(model.config)
    check_target(target)
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
            new, old = Path(scratch) / "new", Path(scratch) / "old"
            new.mkdir()
            for name, contents in files.items():
                (new / name).write_text(json.dumps(contents, indent=1, ensure_ascii=False), encoding="utf-8")
            weights = tensors(known, model, tokenizer.vocab_size)
            save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
            shutil.copymode(new / "config.json", new / "model.safetensors")  # otherwise only its owner could read it
            for path in (*new.iterdir(), new):
                sync(path)
            if target.exists():
                target.rename(old)
            try:
                new.rename(target)
            except BaseException:  # otherwise the earlier export would be deleted with the scratch folder
                if old.exists():
                    old.rename(target)
                raise
    except (OSError, SafetensorError) as error:
        raise UserError(f"could not write {target}: {getattr(error, 'strerror', None) or error}") from None


def check_target(target: Path) -> None:
    """Raise UserError if writing `target` would destroy something that is not an export."""
    if target.exists() and not (target.is_dir() and ((target / "export.json").exists() or not any(target.iterdir()))):
        raise UserError(f"{target} exists and is no export; wanted a new or empty folder, or an earlier export")


def config_json(known: Architecture, c: GPTConfig, vocab_size: int) -> dict[str, Any]:
    values = dataclasses.asdict(c) | dict(vocab_size=vocab_size, attn_dim=c.head_dim)
    written = dict(architectures=[known.class_name], model_type=known.model_type, torch_dtype="float32")
    for ours, names in known.fields.items():
        if isinstance(names, tuple):
            written |= dict.fromkeys(names, values[ours])
    if known is GPT2:  # whose default is 0.1
        written |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return written | known.constants


def tokenizer_options(tokenizer: Tokenizer, block_size: int) -> dict[str, Any]:
    """Return tokenizer_config.json. As in our tokenizers, the text of a special token is ordinary text."""
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
    """Return every weight under its name there."""
    named = {}
    for theirs, ours in modules(known, model.config):
        layers = [model.get_submodule(name) for name in ours]
        weight = torch.cat([merged(layer) for layer in layers])
        named_here = [pair for layer in layers for pair in layer.named_parameters(recurse=False)]
        biases: list[Tensor] = [p for name, p in named_here if name == "bias"]
        if biases:
            named[f"{theirs}.bias"] = torch.cat(biases)
        elif known is GPT2 and ours[0] not in ("transformer.wte", "transformer.wpe", "lm_head"):
            named[f"{theirs}.bias"] = torch.zeros(len(weight))
        if ours[0] in ("transformer.wte", "lm_head"):
            weight = weight[:vocab_size]
        named[f"{theirs}.weight"] = in_layout(known, weight, ours[0]).contiguous()
    return named


def merged(layer: Any) -> Tensor:
    """Return the matrix (out, in) of a projection of any kind, or the weight of an embedding or a norm."""
    if isinstance(layer, nn.Embedding | Norm):
        return layer.weight
    return dense_weight(copy.deepcopy(layer).double()).float()


# --- From Hugging Face -------------------------------------------------------------------------------------------


def find_folder(source: Path) -> Path:
    """Return `source` if it is a folder, otherwise the folder of the hub's model of that name, downloaded if needed."""
    if source.is_dir():
        return source
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("a name on the hub needs: pip install huggingface_hub") from None
    wanted = ["config.json", "tokenizer.json", "model*.safetensors", "model.safetensors.index.json"]
    try:
        return Path(huggingface_hub.snapshot_download(source.as_posix(), allow_patterns=wanted))
    except Exception as error:  # an impossible name, an unknown one, no network: the hub's libraries differ in errors
        kind = type(error).__name__
        raise UserError(f"no folder {source}, and the Hugging Face hub gave no model of that name ({kind})") from None


def read_config(folder: Path) -> tuple[Architecture, dict[str, Any]]:
    """Return the class and the config.json of a folder. Raise UserError if our model cannot compute it."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config["model_type"]
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    except (OSError, ValueError, TypeError, KeyError):
        missing = "no checkpoint of ours, and no config.json of Hugging Face with a model_type"
        raise UserError(f"{folder} holds {missing}") from None
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
    return known, known.defaults | config


def read_options(folder: Path, known: Architecture, config: dict[str, Any]) -> GPTConfig:
    """Return the options of a folder's model. Raise UserError if config.json lacks one, or has an impossible one."""
    names = {ours: rule[0] for ours, rule in known.fields.items() if isinstance(rule, tuple) and ours != "bias"}
    missing = [theirs for theirs in names.values() if theirs not in config]
    if missing:
        raise UserError(f"{folder / 'config.json'} does not say {', '.join(missing)}")
    options = {name: known.fields[name] for name in ("norm", "mlp", "pos")}
    options |= {ours: config[theirs] for ours, theirs in names.items()}
    try:
        if known is LLAMA:
            options["rope_theta"] = float(options["rope_theta"])
            options["attn_dim"] = (options["attn_dim"] or 0) * options["n_head"] or None
        return GPTConfig(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} is of a model that this one cannot be: {error}") from None


@torch.no_grad()
def read_model(folder: Path, bias: bool = False) -> GPT:
    """Return the dense model of a folder, in float32. Only safetensors are read, which cannot run code.

    The model has biases if `bias`, or if any bias of the folder is not zero. Raise UserError if a tensor is missing, of
    another shape, or unknown.
    """
    known, config = read_config(folder)
    stored = open_tensors(folder, known)
    c = read_options(folder, known, config)
    model = GPT(dataclasses.replace(c, bias=bias or has_bias(stored)), seed=None)
    used = {"lm_head.weight"}
    for theirs, ours in modules(known, c):
        layers = [model.get_submodule(name) for name in ours]
        used |= {f"{theirs}.weight", f"{theirs}.bias"}
        for part, _ in layers[0].named_parameters(recurse=False):
            name, parameters = f"{theirs}.{part}", [layer.get_parameter(part) for layer in layers]
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
    if unknown := sorted(stored.keys() - used):
        raise UserError(f"{folder} has tensors that {known.class_name} has not: {', '.join(unknown[:3])}")
    return model.eval()


def open_tensors(folder: Path, known: Architecture) -> dict[str, Callable[[], Tensor]]:
    """Return a function that reads each tensor of a folder, by its full name. Raise UserError without safetensors."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(f"reading {folder} {INSTALL}") from None
    index, readers = folder / "model.safetensors.index.json", {}
    prefix = known.blocks.partition(".")[0] + "."  # a folder of the model without its head lacks it
    try:
        files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else ["model.safetensors"]
        for file in files:
            opened = safe_open(folder / file, "pt")
            for name in opened.keys():  # noqa: SIM118 (no dict)
                full = name if name.startswith((prefix, "lm_head.")) else prefix + name
                if not full.endswith(NO_WEIGHTS):
                    readers[full] = partial(opened.get_tensor, name)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        why = f"cannot read the safetensors of {folder}: {error}"
        if any(folder.glob("*.bin")):
            why += "; wanted what save_pretrained of transformers writes today, for a .bin can run code"
        raise UserError(why) from None
    return readers


def has_bias(stored: dict[str, Callable[[], Tensor]]) -> bool:
    return any(name.endswith(".bias") and bool(read().any()) for name, read in stored.items())


def preset(source: Path) -> str:
    """Return the options of a folder's model as a preset for train.py, without those at their defaults."""
    folder = find_folder(source)
    known, config = read_config(folder)
    c = dataclasses.replace(read_options(folder, known, config), bias=has_bias(open_tensors(folder, known)))
    defaults = vars(GPTConfig())
    lines = [f"# {known.class_name} {source}. Its tokenizer for a corpus: data.own_text.prepare --tokenizer={folder}"]
    lines += [f"{name} = {value!r}" for name, value in vars(c).items() if value != defaults[name]]
    return "\n".join([*lines, f"init_from = {str(source)!r}"])
