"""Which function a model's attention layers call."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig

from superweights.model.loading import LoadedModel


@contextmanager
def attention_implementation(model: LoadedModel, name: str) -> Iterator[None]:
    """Lets attention layers call the function of that name in transformers' registry until the context ends."""
    configs = _configs(model)
    before = [each._attn_implementation for each in configs]
    # Not set_attn_implementation: it refuses models that read the config in a way of their own, such as falcon.
    for config in configs:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


def _configs(model: LoadedModel) -> list[Any]:
    """All configs that modules of the model read, outer ones before their parts, each once."""
    read: list[Any] = [getattr(each, "config", None) for each in model.model.modules()]
    held = [each for each in read if isinstance(each, PreTrainedConfig)]
    parts = [getattr(each, name, None) for each in held for name in each.sub_configs]
    return list({id(each): each for each in (*held, *parts) if each is not None}.values())
