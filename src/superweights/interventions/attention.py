"""Rounds what goes into the two products of attention: queries, keys, probabilities, values."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from superweights.errors import UnsupportedArchitectureError
from superweights.model.attention import attention_implementation
from superweights.model.loading import LoadedModel
from superweights.quantization.activations import rounded_activations


@contextmanager
def attention_rounded(model: LoadedModel, *, bits: int) -> Iterator[None]:
    """Rounds queries, keys, probabilities and values in every pass until the context ends, each head and token by itself.

    Raises:
        UnsupportedArchitectureError: the model's attention is not called through transformers' registry, which a pass finds
            out, or adds terms of its own to the products.
    """
    name = f"superweights_int{bits}"
    called: list[int] = []
    AttentionInterface.register(name, partial(_rounded_attention, bits, called, model.name))
    AttentionMaskInterface.register(name, eager_mask)

    def check(*_: object) -> None:
        if not called:
            raise UnsupportedArchitectureError(
                f"Rounding the attention of {model.name}: {type(model.model).__name__} computes it by itself, where it cannot "
                "be rounded. Leave the attention products out."
            )

    handle = model.decoder.register_forward_hook(check)
    try:
        with attention_implementation(model, name):
            yield
    finally:
        handle.remove()


def _rounded_attention(
    bits: int,
    called: list[int],
    model: str,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention [sequences, heads, tokens, channels] with rounded factors; what transformers' own eager function computes."""
    called[:] = [1]
    if more.get("s_aux") is not None:
        raise UnsupportedArchitectureError(
            f"Rounding the attention of {model}: its layers have learned sinks, which are no product. Leave attention out."
        )
    query, key, value = (_rounded(each, bits) for each in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    logits = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if attention_mask is not None:
        logits = logits + attention_mask
    probabilities = _rounded(logits.float().softmax(-1).to(query.dtype), bits)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


def _rounded(factor: torch.Tensor, bits: int) -> torch.Tensor:
    return rounded_activations(factor.reshape(-1, factor.shape[-1]), bits=bits).view(factor.shape)
