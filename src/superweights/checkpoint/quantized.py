"""What a model's config, or the names of its tensors, say about packed weights."""

from collections.abc import Iterable, Iterator
from typing import Any

SETTINGS_KEYS = ("quantization_config", "compression_config")
"""Where a config keeps what a quantizer has to say."""
QUANTO_MARKS = ("weight._data", "weight._data._data", "weight._scale")
"""Tensors that only quanto has, whose configs say nothing."""


def quantization_of(config: dict[str, Any]) -> str | None:
    """Names the quantizer of a config and its bits, or None for plain weights.

    Example:
        >>> quantization_of({"quantization_config": {"quant_method": "gptq", "bits": 4}})
        'gptq, 4 bits'
        >>> quantization_of({"model_type": "llama"}) is None
        True
    """
    settings = next((found for _, found in stored_settings(config) if isinstance(found, dict)), None)
    if settings is None:
        return None
    method = settings.get("quant_method")
    if not isinstance(method, str):
        method = "bitsandbytes" if "load_in_4bit" in settings or "load_in_8bit" in settings else "an unnamed quantizer"
    bits = _bits(settings)
    return method if bits is None else f"{method}, {bits} bits"


def packing_of(config: dict[str, Any], tensors: Iterable[str]) -> str | None:
    """What packed a model's weights, in words such as "gptq, 4 bits"; None where they are plain.

    Args:
        config: its config.json.
        tensors: the names of its tensors.
    """
    named = quantization_of(config)
    return "quanto" if named is None and any(name.endswith(QUANTO_MARKS) for name in tensors) else named


def stored_settings(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a config, or its part for the language model, says under the keys of quantizers, with the key; nothing empty."""
    nested = config.get("text_config")
    for place in (config, nested if isinstance(nested, dict) else {}):
        yield from ((key, place[key]) for key in SETTINGS_KEYS if place.get(key))


def _bits(settings: dict[str, Any]) -> int | None:
    if settings.get("load_in_4bit"):
        return 4
    if settings.get("load_in_8bit"):
        return 8
    for key in ("bits", "w_bit", "wbits", "weight_bits", "nbits"):
        if isinstance(settings.get(key), int):
            return int(settings[key])
    return next(_group_bits(settings), None)


def _group_bits(settings: dict[str, Any]) -> Iterator[int]:
    """The bits of compressed-tensors, which keeps them per group of modules."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and isinstance(weights.get("num_bits"), int):
            yield weights["num_bits"]
