"""SmoothQuant: equation 4 by a plain loop, and that no product changes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superweights.quantization.activations import rounded_activations
from superweights.quantization.smoothing import smoothing_factors

SIZES = st.lists(st.floats(2**-10, 2**13, width=32), min_size=1, max_size=9)


@given(SIZES, SIZES, st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_equation_4(activation_sizes, weight_sizes, alpha):
    """s = max|X|^alpha / max|W|^(1 - alpha), channel by channel; powers of float32 are good to some units in the last place."""
    pairs = list(zip(activation_sizes, weight_sizes, strict=False))
    activations, weights = (torch.tensor(each) for each in zip(*pairs, strict=True))
    found = smoothing_factors(activations, weights, alpha=alpha)
    assert found.dtype == torch.float32
    assert found.tolist() == [pytest.approx(x**alpha / w ** (1 - alpha), rel=1e-5) for x, w in pairs]


def test_the_paper_of_super_weights_takes_0_85():
    found = smoothing_factors(torch.tensor([100.0]), torch.tensor([0.5]))
    assert found.item() == pytest.approx(math.exp(0.85 * math.log(100) - 0.15 * math.log(0.5)), rel=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_no_product_changes(alpha):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(7, 12, generator=generator, dtype=torch.float64)
    inputs[:, 4] *= 300
    matrix = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    factors = smoothing_factors(inputs.abs().amax(0), matrix.abs().amax(0), alpha=alpha)
    assert alpha == 0 or factors.max() / factors.min() > 1.5, "factors of one prove nothing"
    torch.testing.assert_close((inputs / factors) @ (matrix * factors).T, inputs @ matrix.T)


def test_at_one_half_channels_of_both_are_equally_large():
    """Section 4.1 of arXiv 2211.10438: max|X_j| / s_j = max|W_j| s_j = sqrt(max|X_j| max|W_j|)."""
    activations, weights = torch.tensor([9.0, 0.2, 400.0]), torch.tensor([4.0, 5.0, 0.01])
    factors = smoothing_factors(activations, weights, alpha=0.5)
    torch.testing.assert_close(activations / factors, weights * factors)


def test_alpha_one_moves_all_of_the_range():
    activations = torch.tensor([9.0, 0.2, 400.0])
    torch.testing.assert_close(
        activations / smoothing_factors(activations, torch.tensor([4.0, 5.0, 0.01]), alpha=1.0), torch.ones(3)
    )


def test_a_loud_channel_is_rounded_better():
    generator = torch.Generator().manual_seed(1)
    inputs, matrix = torch.randn(20, 64, generator=generator), torch.randn(16, 64, generator=generator)
    inputs[:, 9] *= 100
    factors = smoothing_factors(inputs.abs().amax(0), matrix.abs().amax(0), alpha=0.5)
    exact = inputs @ matrix.T
    plain = rounded_activations(inputs) @ matrix.T - exact
    smooth = rounded_activations(inputs / factors) @ (matrix * factors).T - exact
    assert smooth.norm() < 0.3 * plain.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_channels_without_range_are_left_alone(dtype):
    activations, weights = (
        torch.tensor([0.0, 4.0, 0.0, 4.0], dtype=dtype),
        torch.tensor([4.0, 0.0, 0.0, 1.0], dtype=dtype),
    )
    found = smoothing_factors(activations, weights, alpha=0.5)
    assert found.tolist() == [1, 1, 1, 2]
    assert found.dtype == torch.float32
