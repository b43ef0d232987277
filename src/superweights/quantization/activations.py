"""Activations in few bits: the super activation is replaced before they are rounded, and put back after.

One super activation sets the scale of its token, or of the whole tensor, and rounds everything else to nothing. The paper
replaces it by the median, rounds, and restores it.

Source:
    arXiv 2411.07191, section 4.1: RESTORE(Q^-1(Q(REPLACE(A)))).
"""

from typing import Literal

import torch

Span = Literal["token", "tensor"]
"""What shares a scale, or a median."""


def rounded_activations(
    activations: torch.Tensor,
    *,
    bits: int = 8,
    span: Span = "token",
    places: torch.Tensor | None = None,
    median: Span = "token",
    scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Activations after replacing, quantizing, dequantizing and restoring.

    The grid is symmetric, with 2^(bits-1) - 1 steps to the largest |activation|.

    Args:
        activations: [tokens, channels], any floating dtype; they are only read.
        bits: 2 to 8.
        span: whether each token has its own scale, or all share one.
        places: where the super activations are, int64 [places, 2] as token and channel; None or empty for none.
        median: of what a super activation takes the median meanwhile: of its token, so that it never sets that token's scale,
            or of the whole tensor.
        scales: static scales from a calibration, [] or [tokens, 1]; None takes them from these activations.

    Returns:
        The activations in their own dtype; those at `places` to the bit.

    Example:
        >>> activations = torch.tensor([[900.0, 0.3, -1.27, 0.5]])
        >>> rounded_activations(activations)
        tensor([[900.,   0.,  -0.,   0.]])
        >>> rounded_activations(activations, places=torch.tensor([[0, 0]]))
        tensor([[ 9.0000e+02,  3.0000e-01, -1.2700e+00,  5.0000e-01]])
    """
    places = torch.empty(0, 2, dtype=torch.int64) if places is None else places
    wide = replaced_activations(activations, places, median=median)
    top = (1 << (bits - 1)) - 1
    if scales is None:
        scales = activation_scales(wide, bits=bits, span=span)
    steps = scales.masked_fill(scales == 0, 1)
    found = wide.div_(steps).round_().clamp_(-top, top).mul_(steps).to(activations.dtype)
    tokens, channels = places.unbind(1)
    found[tokens, channels] = activations[tokens, channels]
    return found


def activation_scales(activations: torch.Tensor, *, bits: int = 8, span: Span = "token") -> torch.Tensor:
    """What a step is worth: float32 [tokens, 1], or [] where all tokens share one."""
    top = (1 << (bits - 1)) - 1
    sizes = activations.float().abs()
    return (sizes.amax(1, keepdim=True) if span == "token" else sizes.amax()) / top


def replaced_activations(activations: torch.Tensor, places: torch.Tensor, *, median: Span = "token") -> torch.Tensor:
    """Activations [tokens, channels] in float32 with the median at `places`: what a calibration looks at."""
    wide = activations.to(torch.float32, copy=True)
    tokens, channels = places.unbind(1)
    if len(places):
        wide[tokens, channels] = wide[tokens].median(1).values if median == "token" else wide.median()
    return wide
