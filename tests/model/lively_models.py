"""Tiny models whose biases and norms are no longer zeros and ones, so that leaving one out shows."""

from typing import Any

import torch

from superweights.model.architecture import read_architecture
from superweights.testing import tiny_model


def lively_model(family: str, *, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """A tiny model with random biases and norm gains, and one large weight in the down projections of layer 1."""
    model = tiny_model(family, **changes)
    generator = torch.Generator().manual_seed(1)
    named = [*model.named_parameters(), *((name, each) for name, each in model.named_buffers() if "bias" in name)]
    with torch.no_grad():
        for name, value in named:
            if value.ndim == 1 or "bias" in name:
                value += 0.1 * torch.randn(value.shape, generator=generator)
        for projection in read_architecture(model).in_layer(1):
            model.get_parameter(projection.name)[..., 3, 5] = 40.0
    return model.to(dtype)
