"""What goes into the linear layers of a model: how large each channel gets, and where a super activation sits.

One pass over a few sequences finds both. Nothing is known of names: which norm feeds a layer shows when its very output
comes in, and the output projection of an attention is the last linear layer that runs in it.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from superweights.errors import UnsupportedArchitectureError
from superweights.model.loading import LoadedModel

MASSIVE_RATIO = 20.0
"""Largest |value| over the median |value| of its token, from which a value counts as a super activation of an input: in 8 bits
half of the token's values then have 6 steps or fewer."""
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass(frozen=True)
class LinearInput:
    """The input of one linear layer, over all tokens that were looked at."""

    module: str
    """Name of the linear layer."""
    sizes: torch.Tensor
    """Largest |value| of each channel, float32 [channels]."""
    largest_but_one: float
    """Largest |value| when the largest of each sequence is left out."""
    weight_sizes: torch.Tensor
    """Largest |weight| of each input channel, float32 [channels]."""
    norm: str | None
    """The module whose output it is, where that is a norm."""
    norm_has_weight: bool
    """Whether that norm multiplies channels by a weight of their own."""
    attention_output: bool
    """Whether the layer is the output projection of an attention; the paper does not round what goes into those."""
    channel: int | None
    """Channel of the super activation: that of the largest |value| in every sequence, where it is massive; else None."""
    ratio: float
    """Largest |value| over the median |value| of its token; the median over sequences."""


@dataclass
class _Seen:
    sizes: torch.Tensor
    weight_sizes: torch.Tensor
    norm: str | None
    largest_but_one: float = 0.0
    channels: list[int] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)


def linear_inputs(
    model: LoadedModel, input_ids: torch.Tensor, *, massive_ratio: float = MASSIVE_RATIO
) -> tuple[LinearInput, ...]:
    """Looks at the inputs of all linear layers of the decoder layers, in the order in which they run.

    Args:
        model: the model; edits that are in force count.
        input_ids: token ids [sequences, tokens]; at least one sequence.
        massive_ratio: what counts as a super activation.

    Raises:
        UnsupportedArchitectureError: no linear layer ran, as where all weights are in packed experts.
    """
    seen: dict[str, _Seen] = {}
    norms: dict[int, str] = {}
    kept: list[torch.Tensor] = []  # an id is only good while its tensor lives

    def norm_hook(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                kept.append(output)
                norms[id(output)] = name

        return hook

    def linear_hook(name: str) -> Any:
        def hook(module: Any, inputs: tuple[Any, ...]) -> None:
            values = inputs[0]
            by_sequence = values.detach().float().abs().reshape(len(input_ids), -1, values.shape[-1])
            sizes = by_sequence.amax((0, 1))
            if name not in seen:
                over_outputs = 1 if isinstance(module, Conv1D) else 0
                weight_sizes = module.weight.detach().abs().amax(over_outputs).float()
                seen[name] = _Seen(torch.zeros_like(sizes), weight_sizes, norms.get(id(values)))
            here = seen[name]
            torch.maximum(here.sizes, sizes, out=here.sizes)
            for sequence in by_sequence:
                token, channel = divmod(int(sequence.argmax()), sequence.shape[1])
                median = sequence[token].median().clamp(min=torch.finfo(torch.float32).tiny)
                here.channels.append(channel)
                here.ratios.append(float(sequence[token, channel] / median))
                here.largest_but_one = max(here.largest_but_one, float(sequence.flatten().topk(2).values[-1]))

        return hook

    def forget(*_: object) -> None:
        norms.clear()
        kept.clear()

    with ExitStack() as stack:
        for name, module in _modules(model):
            if isinstance(module, nn.Linear | Conv1D):
                stack.enter_context(_hook(module.register_forward_pre_hook(linear_hook(name))))
            elif "norm" in type(module).__name__.lower():
                stack.enter_context(_hook(module.register_forward_hook(norm_hook(name))))
        for layer in range(model.architecture.layer_count):
            stack.enter_context(_hook(model.layer(layer).register_forward_hook(forget)))
        model.run(input_ids)
    if not seen:
        raise UnsupportedArchitectureError(
            f"Looking at the inputs of the linear layers of {model.name}: none ran in the decoder layers of "
            f"{type(model.model).__name__}. Inputs of packed experts cannot be rounded."
        )
    last = {name.rpartition(".")[0]: name for name in seen}
    return tuple(
        LinearInput(
            name,
            each.sizes,
            each.largest_but_one,
            each.weight_sizes,
            each.norm,
            each.norm is not None and getattr(model.model.get_submodule(each.norm), "weight", None) is not None,
            bool(_ATTENTION.search(name.rpartition(".")[0])) and last[name.rpartition(".")[0]] == name,
            each.channels[0] if len(set(each.channels)) == 1 and _median(each.ratios) >= massive_ratio else None,
            _median(each.ratios),
        )
        for name, each in seen.items()
    )


def _modules(model: LoadedModel) -> Iterator[tuple[str, nn.Module]]:
    prefix = f"{model.architecture.layers}."
    return ((name, module) for name, module in model.model.named_modules() if name.startswith(prefix))


@contextmanager
def _hook(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _median(values: list[float]) -> float:
    return float(torch.tensor(values).median())
