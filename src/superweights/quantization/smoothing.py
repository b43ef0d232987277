"""SmoothQuant: part of the range of each input channel moves from activations into weights, and no product changes.

Source:
    Xiao et al., arXiv 2211.10438, equations 3 and 4.
"""

import torch


def smoothing_factors(
    activation_sizes: torch.Tensor, weight_sizes: torch.Tensor, *, alpha: float = 0.85
) -> torch.Tensor:
    """What each input channel is divided by, and its weights multiplied by.

    Args:
        activation_sizes: largest |activation| of each channel in a calibration, [channels].
        weight_sizes: largest |weight| of each channel over all matrices that the activations meet, [channels].
        alpha: how much of the range moves, 0 to 1. The paper of super weights takes 0.85.

    Returns:
        float32 [channels]; 1 where a channel has no activation or no weight.

    Example:
        >>> smoothing_factors(torch.tensor([16.0, 1.0]), torch.tensor([1.0, 1.0]), alpha=0.5)
        tensor([4., 1.])
    """
    factors = activation_sizes.float().pow(alpha) / weight_sizes.float().pow(1 - alpha)
    return torch.where((activation_sizes > 0) & (weight_sizes > 0), factors, 1.0)
