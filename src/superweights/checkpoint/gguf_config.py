"""The config of a model in a GGUF file: what transformers reads of its metadata, and what it leaves out.

transformers 5 reads the sizes of a model and takes other numbers from its config classes, which are those of one checkpoint.
Here the file's own are put in their place: epsilons, widths of experts, how positions are rotated.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from superweights.checkpoint.gguf_families import known_settings, llama3_factors
from superweights.checkpoint.gguf_header import GgufHeader
from superweights.errors import MalformedFileError, UnsupportedArchitectureError

ReadTensor = Callable[[str], npt.NDArray[np.float32]]
"""Gives the values of a tensor by its name in llama.cpp."""

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are part of the config."""
_READ = (
    "llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "falcon", "phi3", "bloom", "stablelm", "gpt2", "starcoder2", "nemotron",
    "gemma2", "gemma3",
)  # fmt: skip
"""Architectures whose files were compared with the checkpoints they were written from; of others settings may get lost."""
_REPEATS_EMBEDDING = ("falcon", "bloom")
"""Architectures whose files hold a tied output as well."""
_LLAMA3 = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
"""How all Llama 3.1 to 3.3 stretch positions, but for the factor; files hold what comes out for each frequency."""
_SCALING = {"finetuned", "original_context_length", "yarn_beta_fast", "yarn_beta_slow"}
"""Settings of stretched positions that are read, beside type and factor."""


def gguf_config(header: GgufHeader, read: ReadTensor) -> dict[str, Any]:
    """The config of a model, as config.json would hold it.

    Args:
        header: of all parts.
        read: gives tensors.

    Raises:
        MalformedFileError: the settings contradict each other or the tensors.
        UnsupportedArchitectureError: transformers has no such model, or cannot rotate positions as the file says.
    """
    said, rows = header.settings, {each.name: each.shape[0] for each in header.tensors}
    if header.architecture not in _READ:
        raise UnsupportedArchitectureError(
            f"{header.paths[0]} is a model of llama.cpp's architecture {header.architecture!r}; read are {', '.join(_READ)}. "
            "Give the safetensors checkpoint it was converted from."
        )
    _require_layers(header, said)
    config = _as_transformers_reads(header)
    try:
        config |= _sizes(header.architecture, config, rows)
        config |= known_settings(header.architecture, config, said, rows)
        if isinstance(config.get("rope_parameters"), dict):
            config["rope_parameters"] = _rope(header, config, said, rows, read)
    except (TypeError, ValueError, KeyError, ZeroDivisionError, OverflowError) as error:
        raise MalformedFileError(
            f"{header.paths[0]}: its settings make no config of a {config.get('model_type')}: {type(error).__name__}: {error}. "
            "Write or download it again."
        ) from error
    return config


def _require_layers(header: GgufHeader, said: Mapping[str, Any]) -> None:
    """Refuses more layers than there are, before any is made."""
    numbers = [int(match[1]) for each in header.tensors if (match := re.match(r"blk\.(\d+)\.", each.name))]
    stored, count = len(set(numbers)), said.get("block_count", 0)
    if not isinstance(count, int) or count > stored:
        raise MalformedFileError(
            f"{header.paths[0]} says that it has {count!r} layers, and holds {stored}. Write or download it again."
        )


def _as_transformers_reads(header: GgufHeader) -> dict[str, Any]:
    from transformers import AutoConfig

    path = header.paths[0]
    try:
        found: dict[str, Any] = AutoConfig.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True
        ).to_dict()
    except Exception as error:
        raise UnsupportedArchitectureError(
            f"{path}: transformers refuses the settings of this {header.architecture}: {type(error).__name__}: {error}. Give "
            "the safetensors checkpoint it was converted from."
        ) from error
    return found


def _sizes(architecture: str, config: Mapping[str, Any], rows: Mapping[str, int]) -> dict[str, Any]:
    """What the tensors themselves show."""
    found: dict[str, Any] = {"vocab_size": rows.get("token_embd.weight", config["vocab_size"])}  # few files say it
    if (config.get("pad_token_id") or 0) >= found["vocab_size"]:
        found["pad_token_id"] = None  # a default of the config's class
    if "position_embd.weight" in rows:
        names = ("n_positions", "max_position_embeddings")
        found |= {name: rows["position_embd.weight"] for name in names if name in config}
    if architecture not in _REPEATS_EMBEDDING:
        found["tie_word_embeddings"] = "output.weight" not in rows  # transformers looks at the first part only
    return found


def _rope(
    header: GgufHeader, config: Mapping[str, Any], said: Mapping[str, Any], rows: Mapping[str, int], read: ReadTensor
) -> dict[str, Any]:
    """How positions are rotated."""
    rope: dict[str, Any] = dict(config["rope_parameters"])
    if "full_attention" in rope:  # layers with a window are never stretched
        if "rope.freq_base_swa" in said:
            rope["sliding_attention"] = rope["sliding_attention"] | {"rope_theta": said["rope.freq_base_swa"]}
        inner = dict(config) | {"rope_parameters": rope["full_attention"]}
        return rope | {"full_attention": _rope(header, inner, said, rows, read)}
    if "rope.freq_base" in said:
        rope["rope_theta"] = said["rope.freq_base"]
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if "partial_rotary_factor" in rope and "rope.dimension_count" in said:
        rope["partial_rotary_factor"] = said["rope.dimension_count"] / head
    if ROPE_TENSORS[0] in rows:
        return rope | _llama3(header, rope["rope_theta"], read(ROPE_TENSORS[0]))
    if ROPE_TENSORS[1] in rows or ROPE_TENSORS[2] in rows:
        return rope | _longrope(said, read)
    return rope | _stretched(header, said)


def _stretched(header: GgufHeader, said: Mapping[str, Any]) -> dict[str, Any]:
    """How all positions are stretched alike, or by a rule; llama.cpp takes a factor without a type for a linear one."""
    beginning = "rope.scaling."
    scaling = {key.removeprefix(beginning): value for key, value in said.items() if key.startswith(beginning)}
    factor = scaling.pop("factor", said.get("rope.scale_linear"))
    kind = scaling.pop("type", "linear")
    if kind == "none" or not factor or factor == 1:
        return {}
    strange = ", ".join(sorted(scaling.keys() - _SCALING))
    if kind not in ("linear", "yarn") or strange:
        raise UnsupportedArchitectureError(
            f"{header.paths[0]} stretches positions by {kind!r}{strange and ' with ' + strange}, which is not read. Give the "
            "safetensors checkpoint it was converted from."
        )
    known = {
        "original_max_position_embeddings": scaling.get("original_context_length"),
        "beta_fast": scaling.get("yarn_beta_fast"),
        "beta_slow": scaling.get("yarn_beta_slow"),
    }
    return {"rope_type": kind, "factor": factor, **{key: value for key, value in known.items() if value}}


def _longrope(said: Mapping[str, Any], read: ReadTensor) -> dict[str, Any]:
    factors = {"long_factor": read(ROPE_TENSORS[1]).tolist(), "short_factor": read(ROPE_TENSORS[2]).tolist()}
    known = {
        "attention_factor": said.get("rope.scaling.attn_factor"),
        "original_max_position_embeddings": said.get("rope.scaling.original_context_length"),
    }
    return {"rope_type": "longrope", **factors, **{key: value for key, value in known.items() if value}}


def _llama3(header: GgufHeader, base: float, factors: npt.NDArray[np.float32]) -> dict[str, Any]:
    """The settings of Llama 3 that make these factors."""
    found = _LLAMA3 | {"factor": float(factors.max())}
    if factors.min() <= 0 or not np.allclose(factors, llama3_factors(found, base, len(factors)), rtol=1e-3):
        raise UnsupportedArchitectureError(
            f"{header.paths[0]} stretches positions by frequencies of its own (rope_freqs), and not as Llama 3 does. Give the "
            "safetensors checkpoint it was converted from."
        )
    return found
