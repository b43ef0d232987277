"""What a safetensors checkpoint becomes in a GGUF file: llama.cpp's names, settings and order of tensors, by model type.

Only families stand here for which llama.cpp, given the file, computes the log probabilities of transformers
(studies/gguf_families.py measures that). Tensor names come from the package gguf; the table holds what it does not know: which
settings a family has, which llama.cpp takes for granted, and which tensors it stores in another order.
"""

import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import pi, prod
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from superweights.checkpoint.gguf_header import Metadata, MetadataValue
from superweights.checkpoint.header import TensorEntry
from superweights.checkpoint.packed.gguf import gguf_package
from superweights.errors import MissingTensorError, UnknownNameError, UnsupportedArchitectureError

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
_CONVERTER = (
    "Convert it with llama.cpp's convert_hf_to_gguf.py --outtype f16, and give the .gguf file it writes: its "
    "settings are copied, whatever the architecture"
)


@dataclass(frozen=True, slots=True)
class Change:
    """What llama.cpp's converter does to a tensor."""

    values: Callable[[Array, Any], Array]
    """Makes the values of llama.cpp out of those of transformers and the config."""
    shape: Callable[[Shape], Shape] = lambda shape: shape
    """What that does to the shape."""


@dataclass(frozen=True, slots=True)
class Family:
    """How the checkpoints of one model type become GGUF."""

    architecture: str
    """What llama.cpp calls it."""
    needs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Settings that llama.cpp takes for granted, and their values."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Further settings that are written: key after the architecture, and the config's field, left out where it is None."""
    constants: Mapping[str, float | bool] = field(default_factory=dict)
    """Settings that are the same for the whole family."""
    changes: Mapping[str, Change] = field(default_factory=dict)
    """What is done to tensors, by a pattern of their names in llama.cpp."""
    ropes: tuple[str, ...] = ("default",)
    """Kinds of rotary embedding that llama.cpp computes alike."""
    implied: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    """Settings that llama.cpp makes out of others."""
    check: Callable[[Any], str | None] = lambda config: None
    """Says what else of a config llama.cpp would compute otherwise."""
    context: str | None = None
    """A field that is how far attention looks back, which llama.cpp does not bound in this family."""


@dataclass(frozen=True, slots=True)
class GgufRecipe:
    """A tensor of the GGUF file, and what it is made of."""

    name: str
    """Its name in llama.cpp."""
    shape: Shape
    """[.., rows, cols]."""
    sources: tuple[str, ...]
    """Stored tensors it is made of: several for experts that it packs, none for one that is computed."""
    make: Callable[[Sequence[Array]], Array]
    """Makes it out of the float32 values of those."""
    as_stored: bool = True
    """Whether each source is part of it as it is."""


def family_of(model_type: str, where: str) -> Family:
    """The row of a model type.

    Raises:
        UnsupportedArchitectureError: it has none.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    near = str(UnknownNameError.among("model type", model_type, FAMILIES))
    hint = near if "Did you mean" in near else f"Written are {', '.join(sorted(FAMILIES))}."
    raise UnsupportedArchitectureError(
        f"Writing {where} as GGUF: the model type {model_type!r} is not written, because nobody checked it against llama.cpp. "
        f"{hint} {_CONVERTER}."
    )


def llama_cpp_architecture(model_type: str) -> str:
    """What llama.cpp calls the architecture of a model type; where nothing is known, the same."""
    family = FAMILIES.get(model_type)
    return family.architecture if family else _NOT_WRITTEN.get(model_type, model_type)


def family_metadata(family: Family, config: Any, where: str) -> Metadata:
    """The settings of a model in llama.cpp's words, without its tokenizer.

    Args:
        family: its row.
        config: its config as transformers reads it.
        where: the model, for messages.

    Raises:
        UnsupportedArchitectureError: llama.cpp would compute something else.
    """
    _check(family, config, where)
    arch = family.architecture
    found: dict[str, Any] = {"vocab_size": config.vocab_size}
    for key, names in _COMMON.items():
        found[key] = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
    found["feed_forward_length"] = found["feed_forward_length"] or 4 * config.hidden_size
    found["attention.head_count_kv"] = found["attention.head_count_kv"] or config.num_attention_heads
    found["attention.value_length"] = found["attention.key_length"]
    found |= _rope_metadata(config)
    found |= {key: getattr(config, name, None) for key, name in family.keys.items()}
    found |= family.constants
    written = {f"{arch}.{key}": _value(key, value) for key, value in found.items() if value is not None}
    for key, each in written.items():
        if each.kind == "UINT32" and not 0 <= each.value < 1 << 32:
            raise UnsupportedArchitectureError(
                f"Writing {where} as GGUF: {key} is {each.value}, which GGUF has no place for."
            )
    return written


def family_notes(family: Family, config: Any) -> tuple[str, ...]:
    """What llama.cpp computes otherwise, but only far from what usually runs."""
    window = getattr(config, family.context, None) if family.context else None
    if window is None or window >= config.max_position_embeddings:
        return ()
    return (f"The model attends to the last {window} tokens, llama.cpp to all: they differ in longer texts.",)


def family_tensors(
    family: Family, config: Any, tensors: Mapping[str, TensorEntry], where: str
) -> tuple[GgufRecipe, ...]:
    """The tensors of the GGUF file in an order that llama.cpp's converter would give them.

    Raises:
        UnsupportedArchitectureError: a stored tensor has no name in llama.cpp.
        MissingTensorError: a layer, an expert or the head is not whole.
    """
    package = gguf_package()
    arch = next(key for key, name in package.MODEL_ARCH_NAMES.items() if name == family.architecture)
    names = package.get_tensor_name_map(arch, config.num_hidden_layers)
    stored: dict[str, list[str]] = {}
    for name in sorted(tensors, key=_numbers):
        if _IGNORED.search(name) or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        found = names.get_name(_EXPERT.sub("experts.", name), try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UnsupportedArchitectureError(
                f"Writing {where} as GGUF: llama.cpp's {family.architecture} has no place for {name} "
                f"{list(tensors[name].shape)}. {_CONVERTER}."
            )
        stored.setdefault(found, []).append(name)
    _require_whole(stored, config, where)
    recipes = [_recipe(family, config, name, sources, tensors) for name, sources in stored.items()]
    return tuple(recipes) + tuple(_rope_tensors(config))


def _require_whole(stored: Mapping[str, Sequence[str]], config: Any, where: str) -> None:
    """Refuses to leave out what one layer has and another lacks; llama.cpp takes the embedding for a missing head."""
    parts = {match[1] for name in stored if (match := re.fullmatch(r"blk\.\d+\.(.+)", name))}
    expected = [f"blk.{layer}.{part}" for layer in range(config.num_hidden_layers) for part in sorted(parts)]
    expected += ["token_embd.weight"] + ["output.weight"] * (not config.tie_word_embeddings)
    absent = [name for name in expected if name not in stored]
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0
    for name, sources in stored.items():
        found = {int(match[1]) for source in sources if (match := _EXPERT.search(source))}
        absent += [f"{name}, expert {number}" for number in range(experts) if found and number not in found]
    if absent:
        raise MissingTensorError(
            f"Writing {where} as GGUF: it has nothing for {absent[0]} ({len(absent)} such tensors). Download the model again."
        )


def known_settings(
    architecture: str, config: dict[str, Any], said: Mapping[str, Any], stored: Container[str]
) -> dict[str, Any]:
    """Fields of a config that a GGUF file says or implies, and transformers overlooks: `family_metadata` the other way round.

    Args:
        architecture: what llama.cpp calls it.
        config: what is known of the config; of a model type that is not in the table only what all have is added.
        said: the file's settings, by keys without the architecture.
        stored: names of its tensors.
    """
    found = {name: said[key] for key, names in _COMMON.items() if key in said for name in names if name in config}
    family = FAMILIES.get(str(config["model_type"]))
    if family is None or family.architecture != architecture:
        return found
    found |= {name: said[key] for key, name in family.keys.items() if key in said}
    found |= {
        name: allowed[0] for name, allowed in family.needs.items() if name in config and config[name] not in allowed
    }
    found |= {name: value(SimpleNamespace(**(config | found))) for name, value in family.implied.items()}
    return found | {name: bias in stored for name, bias in _BIASES.items() if name in config}


def _recipe(
    family: Family, config: Any, name: str, sources: Sequence[str], tensors: Mapping[str, TensorEntry]
) -> GgufRecipe:
    changes = [change for pattern, change in family.changes.items() if re.search(pattern, name)]
    shape = tensors[sources[0]].shape
    packs = _EXPERT.search(sources[0]) is not None

    def make(values: Sequence[Array]) -> Array:
        found = np.stack(list(values)) if packs else values[0]
        for change in changes:
            found = change.values(found, config)
        return found

    for change in changes:
        shape = change.shape(shape)
    return GgufRecipe(name, (len(sources), *shape) if packs else shape, tuple(sources), make, not changes)


def _check(family: Family, config: Any, where: str) -> None:
    faults = [
        f"{name} is {getattr(config, name)!r}, and llama.cpp computes only {' or '.join(map(repr, allowed))}"
        for name, allowed in family.needs.items()
        if getattr(config, name, allowed[0]) not in allowed
    ]
    faults += [
        f"{name} is {getattr(config, name)!r}, and llama.cpp takes {expected(config)!r}"
        for name, expected in family.implied.items()
        if getattr(config, name) != expected(config)
    ]
    rope = _rope(config).get("rope_type", "default")
    if rope not in family.ropes:
        faults.append(f"its rotary embedding is {rope!r}, and written are {', '.join(family.ropes)}")
    if rope == "yarn":
        faults += [
            f"{name} of its rotary embedding is {found!r}, and llama.cpp takes {default!r}"
            for name, default in _YARN.items()
            if (found := _rope(config).get(name)) not in (None, default)
        ]
    if (other := family.check(config)) is not None:
        faults.append(other)
    if faults:
        raise UnsupportedArchitectureError(
            f"Writing {where} as GGUF: {faults[0]}. {_CONVERTER}, if it takes the model."
        )


def _rope(config: Any) -> Mapping[str, Any]:
    """The settings of the rotary embedding; those of full attention where there are several."""
    found = getattr(config, "rope_parameters", None) or {}
    nested: Mapping[str, Any] = found.get("full_attention", found)
    return nested


def _rope_metadata(config: Any) -> dict[str, Any]:
    rope = _rope(config)
    if not rope:
        return {}
    found: dict[str, Any] = {
        "rope.dimension_count": int(_head(config) * rope.get("partial_rotary_factor", 1)),
        "rope.freq_base": rope["rope_theta"],
    }
    if rope.get("rope_type") in ("linear", "yarn"):
        found |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope.get("rope_type") == "yarn":
        found["rope.scaling.original_context_length"] = rope.get("original_max_position_embeddings")
    return found


def _rope_tensors(config: Any) -> Iterator[GgufRecipe]:
    """What llama.cpp divides frequencies by, where they are scaled one by one."""
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return
    factors = llama3_factors(rope, rope["rope_theta"], _head(config) // 2)
    yield GgufRecipe("rope_freqs.weight", factors.shape, (), lambda values: factors)


def llama3_factors(rope: Mapping[str, Any], theta: float, count: int) -> npt.NDArray[np.float32]:
    """What llama.cpp divides each frequency by.

    Args:
        rope: settings of Llama 3's rotary embedding.
        theta: its base.
        count: how many frequencies.

    Source:
        transformers' `_compute_llama3_parameters`.
    """
    waves = 2 * pi * theta ** (np.arange(count, dtype=np.float64) / count)
    low, high, old = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    share = np.clip((old / waves - low) / (high - low), 0, 1)
    factors: npt.NDArray[np.float32] = (1 / (share + (1 - share) / rope["factor"])).astype(np.float32)
    return factors


def _head(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _value(key: str, value: Any) -> MetadataValue:
    if isinstance(value, str):
        return MetadataValue(value, "STRING")
    if isinstance(value, bool):
        return MetadataValue(value, "BOOL")
    if _FLOATS.search(key):
        return MetadataValue(float(value), "FLOAT32")
    return MetadataValue(int(value), "UINT32")


def _numbers(name: str) -> list[Any]:
    """Sorts layer 10 after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


_FLOATS = re.compile(r"epsilon|scale$|freq_base|softcapping|clamp|factor")
_EXPERT = re.compile(r"experts\.(\d+)\.")
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|\.attention\.(masked_)?bias$")
"""Buffers of old checkpoints."""
_NOT_WRITTEN = {"gpt_bigcode": "starcoder", "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2"}
"""What llama.cpp calls model types that have no row in the table, where it has another name."""
_YARN = {
    "attention_factor": None,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": None,
    "mscale_all_dim": None,
    "truncate": True,
}
"""Settings of yarn that are not written, and what llama.cpp takes for them."""
_BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_down.bias"}
"""Settings that only a tensor tells of."""
_COMMON = {
    "context_length": ("max_position_embeddings", "n_positions"),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size", "ffn_hidden_size", "n_inner"),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
}
"""What most architectures have, and what configs call it."""


def _interleaved(heads: str) -> Change:
    """Rows of each head in pairs: llama.cpp turns neighbours where transformers turns halves."""

    def values(rows: Array, config: Any) -> Array:
        count = getattr(config, heads, None) or config.num_attention_heads
        split = rows.reshape(count, 2, rows.shape[0] // count // 2, *rows.shape[1:])
        return split.swapaxes(1, 2).reshape(rows.shape)

    return Change(values)


def _apart(rows: Array, config: Any) -> Array:
    """All queries, all keys, all values, where transformers has those of each head together."""
    heads = config.num_attention_heads
    split = rows.reshape(heads, 3, rows.shape[0] // heads // 3, *rows.shape[1:])
    return split.swapaxes(0, 1).reshape(rows.shape)


def _gemma_scale(large: int) -> Mapping[str, Callable[[Any], Any]]:
    """Gemma's scale of attention, which llama.cpp chooses by the number of layers."""

    def scalar(config: Any) -> int:
        is_large = config.num_hidden_layers == large
        return int(config.hidden_size // config.num_attention_heads if is_large else config.head_dim)

    return {"query_pre_attn_scalar": scalar}


def _windows(every: int) -> Callable[[Any], str | None]:
    """Which layers look at a window only, which llama.cpp knows by their number."""

    def check(config: Any) -> str | None:
        full = [number for number, kind in enumerate(config.layer_types, 1) if kind == "full_attention"]
        if full == list(range(every, len(config.layer_types) + 1, every)):
            return None
        return f"its layers {full} have full attention, and llama.cpp takes every {every}th"

    return check


def _gemma3(config: Any) -> str | None:
    sliding = config.rope_parameters["sliding_attention"]
    if (sliding.get("rope_type", "default"), sliding["rope_theta"]) != ("default", 10000):
        return f"layers with a window rotate positions by {sliding}, and llama.cpp takes a base of 10000"
    return _windows(6)(config)


def _all_heads(config: Any) -> str | None:
    if config.num_key_value_heads == config.num_attention_heads:
        return None
    return f"it has {config.num_key_value_heads} heads of keys, and llama.cpp takes as many as of queries"


_PERMUTED = {
    r"\.attn_q\.": _interleaved("num_attention_heads"),
    r"\.attn_k\.": _interleaved("num_key_value_heads"),
}
_PLUS_ONE = {r"norm\.weight$": Change(lambda values, config: values + 1)}
_TRANSPOSED = {
    r"\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight$": Change(
        lambda values, config: values.T, lambda shape: shape[::-1]
    )
}
_SHARED_GATE = {
    r"\.ffn_gate_inp_shexp\.": Change(lambda values, config: values.reshape(-1), lambda shape: (prod(shape),))
}
_SILU: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",)}
_GEMMA = {"hidden_activation": ("gelu_pytorch_tanh", None), "attention_bias": (False,)}
_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_EVERY_LAYER: dict[str, tuple[Any, ...]] = {
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "use_sliding_window": (False,),
}

FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", _SILU, changes=_PERMUTED, ropes=("default", "linear", "llama3", "yarn")),
    "mistral": Family("llama", _SILU, changes=_PERMUTED, ropes=("default", "linear", "yarn"), context="sliding_window"),
    "mixtral": Family(
        "llama",
        _SILU,
        {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
        changes=_PERMUTED,
        context="sliding_window",
    ),
    "qwen2": Family("qwen2", _SILU | {"use_sliding_window": (False,)}, ropes=("default", "yarn")),
    "qwen3": Family(
        "qwen3", _SILU | {"use_sliding_window": (False,), "attention_bias": (False,)}, ropes=("default", "yarn")
    ),
    "qwen2_moe": Family(
        "qwen2moe",
        _SILU | _EVERY_LAYER | {"norm_topk_prob": (False,)},
        _EXPERTS | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        changes=_SHARED_GATE,
    ),
    "qwen3_moe": Family(
        "qwen3moe", _SILU | _EVERY_LAYER | {"norm_topk_prob": (True,), "attention_bias": (False,)}, _EXPERTS
    ),
    "olmo": Family(
        "olmo",
        _SILU | {"attention_bias": (False,)},
        {"attention.clamp_kqv": "clip_qkv"},
        {"attention.layer_norm_epsilon": 1e-5},
        _PERMUTED,
    ),
    "olmo2": Family("olmo2", _SILU | {"attention_bias": (False,)}),
    "olmoe": Family(
        "olmoe",
        _SILU | {"norm_topk_prob": (False,), "clip_qkv": (None,), "attention_bias": (False,)},
        {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"},
        check=_all_heads,
    ),
    "phi": Family("phi2", {"hidden_act": ("gelu_new",), "qk_layernorm": (False,)}),
    "phi3": Family(
        "phi3",
        _SILU,
        {
            "attention.sliding_window": "sliding_window",
            "rope.scaling.original_context_length": "original_max_position_embeddings",
        },
        context="sliding_window",
    ),
    "gemma": Family(
        "gemma", {"hidden_act": ("gelu_pytorch_tanh", "gelu"), "attention_bias": (False,)}, changes=_PLUS_ONE
    ),
    "gemma2": Family(
        "gemma2",
        _GEMMA,
        {
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
            "attention.sliding_window": "sliding_window",
        },
        changes=_PLUS_ONE,
        implied=_gemma_scale(46),
        check=_windows(2),
    ),
    "gemma3_text": Family(
        "gemma3",
        _GEMMA | {"attn_logit_softcapping": (None,), "use_bidirectional_attention": (False, None)},
        {
            "final_logit_softcapping": "final_logit_softcapping",
            "attention.sliding_window": "sliding_window",
        },
        changes=_PLUS_ONE,
        ropes=("default", "linear"),
        implied=_gemma_scale(62),
        check=_gemma3,
    ),
    "gpt2": Family(
        "gpt2",
        {
            "activation_function": ("gelu_new",),
            "scale_attn_by_inverse_layer_idx": (False,),
            "scale_attn_weights": (True,),
            "add_cross_attention": (False,),
        },
        changes=_TRANSPOSED,
    ),
    "gpt_neox": Family(
        "gptneox",
        {"hidden_act": ("gelu",)},
        {"use_parallel_residual": "use_parallel_residual"},
        changes={r"\.attn_qkv\.": Change(_apart)},
    ),
    "granite": Family(
        "granite",
        _SILU,
        {
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        changes=_PERMUTED,
    ),
    "starcoder2": Family("starcoder2", {"hidden_act": ("gelu_pytorch_tanh",), "sliding_window": (None,)}),
    "stablelm": Family(
        "stablelm",
        _SILU | {"qk_layernorm": (False,)},
        {"use_parallel_residual": "use_parallel_residual"},
    ),
    "cohere": Family("command-r", _SILU | {"use_qk_norm": (False,)}, {"logit_scale": "logit_scale"}),
}
"""By transformers' model type."""
