"""Attention sinks: how much of the attention goes to the first token.

The weights of attention exist only where the model computes them itself ("eager"). Those of one layer are looked at while it
runs, reduced to a number for each sequence and dropped.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from superweights.errors import UnsupportedArchitectureError
from superweights.model.attention import attention_implementation
from superweights.model.loading import LoadedModel


def attention_to_first(model: LoadedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean probability that the queries in the second half of each sequence give to its first token, over all heads.

    A layer whose sliding window is too short to reach the first token gives 0 by construction.

    Args:
        model: the model; edits that are in force count.
        input_ids: token ids [sequences, tokens].

    Returns:
        [layers, sequences], float64; nan for layers without attention weights.

    Raises:
        UnsupportedArchitectureError: no layer gives its attention weights.

    Source:
        Xiao et al., arXiv 2309.17453, for the sinks; arXiv 2411.07191, appendix, for the question whether they survive.
    """
    sequences, tokens = input_ids.shape
    found = torch.full((model.architecture.layer_count, sequences), math.nan, dtype=torch.float64)
    seen: set[int] = set()

    def reduce(layer: int) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            weights = _attention_weights(output, sequences, tokens)
            if weights is not None:
                seen.add(layer)
                found[layer] = weights[:, :, tokens // 2 :, 0].double().mean(dim=(1, 2)).cpu()

        return hook

    with _eager_attention(model):
        handles = [
            module.register_forward_hook(reduce(layer))
            for layer in range(model.architecture.layer_count)
            for module in model.layer(layer).modules()
        ]
        try:
            model.run(input_ids)
        finally:
            for handle in handles:
                handle.remove()
    if not seen:
        raise UnsupportedArchitectureError(
            f"Measuring the attention of {model.name}: no module in the decoder layers of {type(model.model).__name__} gives "
            f"attention weights of the shape [{sequences}, heads, {tokens}, {tokens}]. Its attention sinks cannot be measured."
        )
    return found


def _attention_weights(output: Any, sequences: int, tokens: int) -> torch.Tensor | None:
    """The attention weights in what a module returns, told from keys and values by their shape and by causality."""
    for each in output if isinstance(output, tuple | list) else ():
        if (
            isinstance(each, torch.Tensor)
            and each.ndim == 4
            and (each.shape[0], *each.shape[2:]) == (sequences, tokens, tokens)
            and not bool((each < 0).any() or (each.triu(1) > 0).any())  # a destroyed model gives nan, which is neither
        ):
            return each
    return None


@contextmanager
def _eager_attention(model: LoadedModel) -> Iterator[None]:
    """Lets the model compute its attention weights itself, and its layers give them, until the context ends."""
    layers = [model.layer(layer) for layer in range(model.architecture.layer_count)]
    handles = [
        each.register_forward_pre_hook(_ask_for_attention, with_kwargs=True)
        for each in layers
        if "output_attentions" in inspect.signature(type(each).forward).parameters
    ]
    try:
        with attention_implementation(model, "eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _ask_for_attention(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)  # some decoders give it by position
    bound.arguments["output_attentions"] = True
    return bound.args[1:], bound.kwargs
