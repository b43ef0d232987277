"""Rounds what goes into linear layers while a model runs: the paper's REPLACE, quantize, dequantize, RESTORE."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from superweights.errors import UsageError
from superweights.interventions.attention import attention_rounded
from superweights.interventions.conditions import QuantizeActivations, RoundedInput
from superweights.interventions.replacing import replaced_forward
from superweights.model.loading import LoadedModel
from superweights.quantization.activations import rounded_activations


@contextmanager
def activations_rounded(model: LoadedModel, how: QuantizeActivations) -> Iterator[None]:
    """Rounds the inputs of linear layers in every pass until the context ends.

    Raises:
        UsageError: there is no such module, or a channel is outside.
    """
    with ExitStack() as stack:
        for each in how.inputs:
            module: Any = _module(model, each)
            forward = partial(_rounded_forward, model, how, each, module.forward)
            stack.enter_context(replaced_forward(module, forward))
        if how.attention:
            stack.enter_context(attention_rounded(model, bits=how.bits))
        yield


def _module(model: LoadedModel, rounded: RoundedInput) -> Any:
    try:
        return model.model.get_submodule(rounded.module)
    except AttributeError as error:
        raise UsageError(f"Rounding activations of {model.name}: it has no module {rounded.module}.") from error


def _rounded_forward(
    model: LoadedModel,
    how: QuantizeActivations,
    rounded: RoundedInput,
    forward: Callable[[torch.Tensor], torch.Tensor],
    inputs: torch.Tensor,
) -> torch.Tensor:
    channels = inputs.shape[-1]
    if rounded.channel is not None and not 0 <= rounded.channel < channels:
        raise UsageError(
            f"Rounding the input of {rounded.module}: channel {rounded.channel} is not in 0 to {channels - 1}."
        )
    factors = how.factors.get(rounded.module)
    smoothed = inputs if factors is None else inputs / factors
    by_sequence = smoothed.reshape(-1, model.pass_tokens, channels)
    scales = None if rounded.scale is None else torch.tensor(rounded.scale)
    found = [
        rounded_activations(
            sequence,
            bits=how.bits,
            span=how.span,
            places=None if rounded.channel is None else _largest(sequence, rounded.channel),
            median=how.median,
            scales=scales,
        )
        for sequence in by_sequence
    ]
    return forward(torch.stack(found).view(inputs.shape))


def _largest(sequence: torch.Tensor, channel: int) -> torch.Tensor:
    """Where |activation| of a channel is largest, [1, 2] as token and channel."""
    return torch.tensor([[int(sequence[:, channel].abs().argmax()), channel]])
