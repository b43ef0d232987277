"""The config of a model in a GGUF file: what transformers reads of its metadata, and what it leaves out.

transformers 5 reads the sizes of a model and takes other numbers from its config classes, which are those of one checkpoint.
Here the file's own are put in their place: epsilons, widths of experts, how positions are rotated.
"""

from collections.abc import Callable, Mapping
from math import pi
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from superweights.checkpoint.gguf_families import known_settings
from superweights.checkpoint.gguf_header import GgufHeader
from superweights.errors import UnsupportedArchitectureError

ReadTensor = Callable[[str], npt.NDArray[np.float32]]
"""Gives the values of a tensor by its name in llama.cpp."""

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are part of the config."""
_KEYS = {
    "context_length": ("max_position_embeddings", "n_positions"),
    "feed_forward_length": ("intermediate_size", "ffn_hidden_size", "n_inner"),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
}
"""What configs of transformers call what stands in the metadata of any architecture."""
_REPEATS_EMBEDDING = ("falcon", "bloom")
"""Architectures whose files hold a tied output as well."""
_LLAMA3_LENGTH, _LLAMA3_LOW, _LLAMA3_HIGH = 8192, 1.0, 4.0
"""How all Llama 3.1 to 3.3 stretch positions, but for the factor; files hold what comes out for each frequency."""


def gguf_config(path: Path, header: GgufHeader, read: ReadTensor) -> dict[str, Any]:
    """The config of a model, as config.json would hold it.

    Args:
        path: the file, or the first of its parts.
        header: of all parts.
        read: gives tensors.

    Raises:
        UnsupportedArchitectureError: transformers has no such model, or cannot rotate positions as the file says.
    """
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        config: dict[str, Any] = found.to_dict()
    except Exception as error:
        raise UnsupportedArchitectureError(
            f"{path} is a model of llama.cpp's architecture {header.architecture!r}, of which the installed transformers makes "
            f"none of its own: {type(error).__name__}: {error}. Give the safetensors checkpoint it was converted from."
        ) from error
    prefix = f"{header.architecture}."
    said = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    config |= {name: said[key] for key, names in _KEYS.items() if key in said for name in names if name in config}
    rows = {each.name: each.shape[0] for each in header.tensors}
    if "token_embd.weight" in rows:
        config["vocab_size"] = rows["token_embd.weight"]  # many files do not say it
    if (config.get("pad_token_id") or 0) >= config["vocab_size"]:
        config["pad_token_id"] = None  # a default of the config's class
    if "position_embd.weight" in rows:
        config |= {
            name: rows["position_embd.weight"] for name in ("n_positions", "max_position_embeddings") if name in config
        }
    if header.architecture not in _REPEATS_EMBEDDING:
        config["tie_word_embeddings"] = "output.weight" not in rows  # transformers looks at the first part only
    config |= known_settings(header.architecture, config, said, rows)
    if isinstance(config.get("rope_parameters"), dict):
        config["rope_parameters"] = _rope(path, config, said, rows, read)
    return config


def _rope(
    path: Path, config: Mapping[str, Any], said: Mapping[str, Any], rows: Mapping[str, int], read: ReadTensor
) -> dict[str, Any]:
    """How positions are rotated."""
    rope: dict[str, Any] = dict(config["rope_parameters"])
    if "full_attention" in rope:  # one for each kind of layer, as transformers reads them
        return rope
    if "rope.freq_base" in said:
        rope["rope_theta"] = said["rope.freq_base"]
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if "partial_rotary_factor" in rope and "rope.dimension_count" in said:
        rope["partial_rotary_factor"] = said["rope.dimension_count"] / head
    kind, factor = said.get("rope.scaling.type", "none"), said.get("rope.scaling.factor")
    stretched = said.get("rope.scaling.original_context_length")
    if ROPE_TENSORS[0] in rows:
        return rope | _llama3(path, rope["rope_theta"], read(ROPE_TENSORS[0]))
    if ROPE_TENSORS[1] in rows:
        factors = {"long_factor": read(ROPE_TENSORS[1]).tolist(), "short_factor": read(ROPE_TENSORS[2]).tolist()}
        attention = said.get("rope.scaling.attn_factor")
        known = {"attention_factor": attention, "original_max_position_embeddings": stretched}
        return rope | {"rope_type": "longrope", **factors, **{key: value for key, value in known.items() if value}}
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return rope | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": stretched}
    if kind == "none" or not factor or factor == 1:
        return rope
    raise UnsupportedArchitectureError(
        f"{path} stretches positions by {kind!r}, which is not read. Give the safetensors checkpoint it was converted from."
    )


def _llama3(path: Path, base: float, factors: npt.NDArray[np.float32]) -> dict[str, Any]:
    """The settings of Llama 3 that make these factors."""
    factor = float(factors.max())
    wavelengths = 2 * pi * base ** (np.arange(len(factors)) / len(factors))  # in tokens
    smooth = (_LLAMA3_LENGTH / wavelengths - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
    expected = 1 / ((1 - smooth) / factor + smooth)
    expected[wavelengths < _LLAMA3_LENGTH / _LLAMA3_HIGH] = 1
    expected[wavelengths > _LLAMA3_LENGTH / _LLAMA3_LOW] = factor
    if not np.allclose(factors, expected, rtol=1e-3):
        raise UnsupportedArchitectureError(
            f"{path} stretches positions by frequencies of its own (rope_freqs), and not as Llama 3 does. Give the safetensors "
            "checkpoint it was converted from."
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_LENGTH,
    }
