"""Convert a model to Hugging Face's format and back: export.py and train.py --init_from.

RMSNorm, SwiGLU and RoPE become LlamaForCausalLM; LayerNorm, GELU and learned positions become GPT2LMHeadModel. A
factored projection becomes one dense matrix, multiplied in float64 and rounded once. An export has no token ids that
only pad the vocabulary to a multiple of 128, so nothing can draw them.
"""

import copy
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import UserError
from data.tokenizers import END_OF_TEXT, HFTokenizer, Tokenizer, as_hf
from lpa.counts import dense_weight
from model import GPT, GPTConfig, Norm

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
    | dict(
        norm="rmsnorm",
        mlp="swiglu",
        pos="rope",
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
    defaults=dict(num_key_value_heads=None, head_dim=None, rms_norm_eps=1e-6, tie_word_embeddings=False)
    | dict(rope_theta=10000.0, attention_bias=False),
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
    | dict(
        norm="layernorm",
        mlp="gelu",
        pos="learned",
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
    constants=dict(activation_function="gelu_new", scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False),
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
    for name, value in vars(c).items():
        rule = known.fields.get(name)
        wanted = rule(c) if callable(rule) else rule
        if name not in known.fields:
            why.append(f"{name} = {value!r} (unknown to lpa/hf.py: give it a rule there)")
        elif rule is not FREE and not isinstance(rule, tuple) and value != wanted:
            why.append(f"{name} = {value!r} (wanted {wanted!r})")
    if known is LLAMA and c.n_embd % c.n_head:
        why.append(f"n_embd = {c.n_embd} (wanted a multiple of n_head = {c.n_head})")
    if why:
        raise UserError(f"{known.class_name}, the nearest class of transformers, cannot have {', '.join(why)}")
    return known


def modules(known: Architecture, c: GPTConfig) -> Iterator[tuple[str, list[str]]]:
    """Yield the name there of each module that has weights, and our names: several if it stacks their matrices."""
    for ours, theirs in known.outside.items():
        yield theirs, [ours]
    for layer in range(c.n_layer):
        for theirs, names in known.inside.items():
            yield f"{known.blocks}.{layer}.{theirs}", [f"transformer.h.{layer}.{name}" for name in names]


def in_layout(known: Architecture, tensor: Tensor, name: str) -> Tensor:
    """Transpose a matrix (out, in) of a GPT-2 block to (in, out), as the class stores it, or back. `name` is theirs."""
    return tensor.T if known is GPT2 and name.startswith(known.blocks) and tensor.ndim == 2 else tensor


def import_safetensors() -> Any:
    """Return the library. Raise UserError if it is not installed."""
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("Hugging Face's format needs: pip install safetensors tokenizers") from None
    return safetensors


# --- To Hugging Face ---------------------------------------------------------------------------------------------


def export(model: GPT, tokenizer: Tokenizer, target: Path, origin: dict[str, Any]) -> None:
    """Write the folder `target`, completely or not at all, or replace an earlier export. origin: for export.json.

    Raise UserError if the class or the tokenizer has no equal there, if `target` holds anything else, or if the disk
    fails.
    """
    library = import_safetensors()
    known = architecture(model.config)
    target = target.resolve()
    if target.exists() and not (target / "export.json").exists() and (target.is_file() or any(target.iterdir())):
        raise UserError(f"{target} exists and is no export; wanted a new or empty folder, or an earlier export")
    if tokenizer.vocab_size > len(model.lm_head.weight):
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids, the model only {len(model.lm_head.weight)}")
    ends = dict(bos_token_id=tokenizer.end_of_text, eos_token_id=tokenizer.end_of_text)
    files = {
        "config.json": config_json(known, model.config, tokenizer.vocab_size) | ends,
        "generation_config.json": ends | dict(do_sample=False),
        "tokenizer_config.json": tokenizer_options(tokenizer, model.config.block_size),
        "tokenizer.json": as_hf(tokenizer),
        "export.json": origin,
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{target.name}.", dir=target.parent) as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            for name, contents in files.items():
                (new / name).write_text(json.dumps(contents, indent=1, ensure_ascii=False), encoding="utf-8")
            weights = tensors(known, model, tokenizer.vocab_size)
            library.torch.save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
            shutil.copymode(new / "config.json", new / "model.safetensors")  # otherwise only its owner could read it
            if target.exists():
                target.rename(Path(scratch) / "old")
            new.rename(target)
    except (OSError, library.SafetensorError) as error:
        raise UserError(f"could not write {target}: {error}") from None


def config_json(known: Architecture, c: GPTConfig, vocab_size: int) -> dict[str, Any]:
    values = asdict(c) | dict(vocab_size=vocab_size, attn_dim=c.head_dim)
    written = dict(architectures=[known.class_name], model_type=known.model_type, torch_dtype="float32")
    for ours, names in known.fields.items():
        if isinstance(names, tuple):
            written |= dict.fromkeys(names, values[ours])
    if known is GPT2:  # its default is 0.1
        written |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return written | known.constants


def tokenizer_options(tokenizer: Tokenizer, block_size: int) -> dict[str, Any]:
    """Return tokenizer_config.json. As in our tokenizers, the text of a special token is ordinary text."""
    options = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        model_max_length=block_size,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        model_input_names=["input_ids", "attention_mask"],
    )
    end = tokenizer.end_of_text
    if end is not None:
        token = tokenizer.model.id_to_token(end) if isinstance(tokenizer, HFTokenizer) else END_OF_TEXT
        options |= dict(bos_token=token, eos_token=token)
    return options


@torch.no_grad()
def tensors(known: Architecture, model: GPT, vocab_size: int) -> dict[str, Tensor]:
    """Return every weight under its name there."""
    named = {}
    for theirs, ours in modules(known, model.config):
        layers: list[Any] = [model.get_submodule(name) for name in ours]
        weight = torch.cat([merged(layer) for layer in layers])
        if ours[0] in ("transformer.wte", "lm_head"):
            weight = weight[:vocab_size]
        elif ours[0] != "transformer.wpe" and layers[0].bias is not None:
            named[f"{theirs}.bias"] = torch.cat([layer.bias for layer in layers])
        elif ours[0] != "transformer.wpe" and known is GPT2:
            named[f"{theirs}.bias"] = torch.zeros(len(weight))
        named[f"{theirs}.weight"] = in_layout(known, weight, theirs).contiguous()
    if model.config.tie_embeddings:
        del named["lm_head.weight"]
    return named


def merged(layer: nn.Module) -> Tensor:
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

        wanted = ["config.json", "tokenizer.json", "model.safetensors", "model-*-of-*.safetensors"]
        return Path(huggingface_hub.snapshot_download(source.as_posix(), allow_patterns=wanted))
    except Exception as error:  # a bad or unknown name, no network, no library: the hub's libraries differ in errors
        why = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"no folder {source}, and no model of that name from the Hugging Face hub ({why})") from None


def read_config(folder: Path) -> tuple[Architecture, GPTConfig]:
    """Return the class and the options of a folder's model. Raise UserError if our model cannot compute it."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config["model_type"]
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"{folder} holds no checkpoint, and no config.json of Hugging Face with a model_type") from None
    known = next((known for known in (LLAMA, GPT2) if known.model_type == kind), None)
    if known is None:
        raise UserError(f"{folder} is a model of type {kind!r}, wanted 'llama' or 'gpt2'")
    wanted = known.constants
    if known is LLAMA:
        wanted = wanted | dict(rope_type="default", partial_rotary_factor=1.0)
        config |= dict(rope_type=rope.get("type")) | rope  # older versions wrote `type`
    wrong = [
        f"{name} = {config[name]!r} (wanted {value!r})"
        for name, value in wanted.items()
        if config.get(name) not in (None, value)
    ]
    if wrong:
        raise UserError(f"{folder} has {', '.join(wrong)}, which this model cannot compute")
    config = known.defaults | config
    options = {}
    try:
        for ours, rule in known.fields.items():
            if isinstance(rule, tuple):
                options[ours] = config[rule[0]]
            elif rule is not FREE and not callable(rule):
                options[ours] = rule
        if known is LLAMA:
            options["rope_theta"] = float(options["rope_theta"])
            options["attn_dim"] = (options["attn_dim"] or 0) * options["n_head"] or None
        return known, GPTConfig(**options)
    except KeyError as error:
        raise UserError(f"{folder / 'config.json'} has no {error}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} describes a model that ours cannot be: {error}") from None


def read_model(folder: Path, bias: bool = False) -> GPT:
    """Return the dense model of a folder, in float32; `bias` as in read_folder. Raise UserError for a wrong tensor."""
    known, c, stored = read_folder(folder, bias)
    model = GPT(c, seed=None)
    embeddings = f"{known.outside['transformer.wte']}.weight"
    if c.tie_embeddings and embeddings in stored:
        head = stored.setdefault("lm_head.weight", stored[embeddings])
        if not head.equal(stored[embeddings]):
            raise UserError(f"{folder} ties the embeddings, but its lm_head.weight differs from them")
    state = {name: torch.zeros_like(p) for name, p in model.named_parameters() if name.endswith(".bias")}
    for theirs, ours in modules(known, c):
        for part in ("weight", "bias"):
            if f"{theirs}.{part}" in stored:
                tensor = in_layout(known, stored.pop(f"{theirs}.{part}"), theirs)
                state |= {f"{name}.{part}": piece for name, piece in zip(ours, tensor.chunk(len(ours)))}
    try:
        model.load_state_dict(state | stored)  # whatever is still in `stored` is unknown
    except RuntimeError as error:
        raise UserError(f"the tensors of {folder} do not fit its config.json: {str(error)[:400]}") from None
    return model.eval()


def read_folder(folder: Path, bias: bool = False) -> tuple[Architecture, GPTConfig, dict[str, Tensor]]:
    """Return the class, the options and the tensors of a folder by their full names, without biases of zero.

    The options have biases if `bias`, or if any bias is not zero. Only safetensors are read: they cannot run code.
    """
    library = import_safetensors()
    known, c = read_config(folder)
    prefix = known.blocks.partition(".")[0] + "."  # a folder without the head, such as gpt2, leaves it out
    stored = {}
    try:
        for file in sorted(folder.glob("model-*-of-*.safetensors")) or [folder / "model.safetensors"]:
            for name, tensor in library.torch.load_file(file).items():
                full = name if name.startswith((prefix, "lm_head.")) else prefix + name
                if not full.endswith(NO_WEIGHTS) and (not full.endswith(".bias") or tensor.any()):
                    stored[full] = tensor
    except (OSError, library.SafetensorError) as error:
        why = f"cannot read the safetensors of {folder}: {error}"
        if any(folder.glob("*.bin")):
            why += "; wanted the format that save_pretrained writes today, because a .bin can run code"
        raise UserError(why) from None
    bias = bias or any(name.endswith(".bias") for name in stored)
    return known, replace(c, bias=bias), stored


def preset(source: Path) -> str:
    """Return the options of a folder's model as a preset for train.py, without those at their defaults."""
    folder = find_folder(source)
    known, c, _ = read_folder(folder)
    defaults = vars(GPTConfig())
    lines = [f"# {known.class_name} {source}. To use its tokenizer: data.own_text.prepare --tokenizer={folder}"]
    lines += [f"{name} = {value!r}" for name, value in vars(c).items() if value != defaults[name]]
    return "\n".join([*lines, f"init_from = {str(source)!r}"])
