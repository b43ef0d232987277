"""Activations that are replaced, rounded and restored, against a plain loop."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superweights.quantization.activations import activation_scales, replaced_activations, rounded_activations

from .building import DTYPES, matrices, normal, same_bits

F = np.float32
SPANS = ["token", "tensor"]


def lower_median(values: list[float]) -> float:
    """Of an even count the lower of the two in the middle, as torch takes it."""
    return sorted(values)[(len(values) - 1) // 2]


def loop_replaced(rows: list[list[float]], places: list[list[int]], median: str) -> list[list[float]]:
    found = [list(row) for row in rows]
    for token, channel in places:
        found[token][channel] = lower_median(
            rows[token] if median == "token" else [each for row in rows for each in row]
        )
    return found


def loop_rounded(
    rows: list[list[float]], bits: int, span: str, places: list[list[int]], median: str
) -> list[list[set[float]]]:
    """What each activation may become: two values where it lies within 1e-4 steps of their middle."""
    replaced, top = loop_replaced(rows, places, median), 2 ** (bits - 1) - 1
    largest = [max(map(abs, row)) for row in replaced]
    if span == "tensor":
        largest = [max(largest)] * len(rows)
    scales = [F(each) / F(top) for each in largest]
    found = [
        [{float(F(round(each / float(scale or 1) + side)) * scale) for side in (-1e-4, 1e-4)} for each in row]
        for row, scale in zip(replaced, scales, strict=True)
    ]
    for token, channel in places:
        found[token][channel] = {rows[token][channel]}
    return found


@given(
    matrices(),
    st.integers(2, 8),
    st.sampled_from(SPANS),
    st.sampled_from(SPANS),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 7)), max_size=4, unique=True),
)
@settings(deadline=None, max_examples=40)
def test_any_activations_agree_with_a_plain_loop(activations, bits, span, median, places):
    before = activations.clone()
    at = torch.tensor(places, dtype=torch.int64).reshape(-1, 2)
    found = rounded_activations(activations, bits=bits, span=span, places=at, median=median)
    assert (found.dtype, found.shape) == (activations.dtype, activations.shape)
    expected = loop_rounded(activations.tolist(), bits, span, places, median)
    for row, allowed in zip(found.tolist(), expected, strict=True):
        for value, either in zip(row, allowed, strict=True):
            assert value in torch.tensor(sorted(either)).to(activations.dtype).tolist()
    tokens, channels = at.unbind(1)
    assert same_bits(found[tokens, channels], activations[tokens, channels])
    assert same_bits(activations, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("span", SPANS)
def test_nothing_moves_by_more_than_half_a_step(span, dtype):
    activations = normal(6, 40, dtype=dtype)
    found, scales = rounded_activations(activations, span=span), activation_scales(activations, span=span)
    assert scales.shape == ((6, 1) if span == "token" else ())
    assert scales.dtype == torch.float32
    rounding = torch.finfo(dtype).eps / 2 * activations.abs().float()
    assert ((found.float() - activations.float()).abs() <= 0.5001 * scales + rounding * 1.01).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_token_has_as_many_values_as_its_bits_allow(bits):
    found = rounded_activations(torch.linspace(-1, 1, 4000).repeat(2, 1), bits=bits)
    assert [len(row.unique()) for row in found] == [2**bits - 1] * 2


@given(
    matrices(4, 9), st.floats(1, 3e4), st.booleans(), st.lists(st.integers(0, 8), min_size=1, max_size=4, unique=True)
)
@settings(deadline=None, max_examples=40)
def test_what_is_replaced_never_sets_the_scale_of_its_token(activations, size, negative, channels):
    """Up to four of nine: the median is one of the others, or between them."""
    plain = activations.clone()
    activations[2, channels] = -size if negative else size
    places = torch.tensor([[2, each] for each in channels])
    others = [each for each in range(9) if each not in channels]
    scales = activation_scales(replaced_activations(activations, places))
    assert scales[2] <= activation_scales(activations[2:3, others])[0]
    for token in (0, 1, 3):
        assert scales[token] == activation_scales(plain)[token]


def test_a_super_activation_rounds_its_token_to_nothing_unless_it_is_replaced():
    activations = normal(8, 64)
    activations[3, 5] = 1500
    places = torch.tensor([[3, 5]])
    others = [each for each in range(64) if each != 5]
    plain = rounded_activations(activations)
    assert not plain[3, others].any()
    replaced = rounded_activations(activations, places=places)
    assert replaced[3, 5] == 1500
    assert (replaced - activations)[3, others].abs().max() <= 0.51 * activations[3, others].abs().max() / 127
    assert same_bits(replaced[:3], plain[:3])
    together = rounded_activations(activations, span="tensor")
    assert not together[:3].any()
    assert (rounded_activations(activations, span="tensor", places=places) - activations).abs().max() < 0.02


def test_the_median_of_a_token_or_of_all():
    activations = torch.tensor([[900.0, 1.0, 2.0, 3.0], [10.0, 20.0, 30.0, 40.0], [50.0, 60.0, 70.0, 80.0]])
    places = torch.tensor([[0, 0]])
    assert replaced_activations(activations, places)[0].tolist() == [2, 1, 2, 3]
    assert replaced_activations(activations, places, median="tensor")[0].tolist() == [30, 1, 2, 3]
    assert activations[0, 0] == 900


def test_replacing_nothing_is_a_copy():
    activations = normal()
    found = replaced_activations(activations, torch.empty(0, 2, dtype=torch.int64))
    assert same_bits(found, activations)
    assert found.data_ptr() != activations.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_static_scales(dtype):
    """Steps from a calibration; what is beyond their reach is cut off, the super activation is not."""
    activations = torch.tensor([[0.26, -0.74, 5.0, -900.0], [0.1, 0.0, 63.5, -70.0]])
    places = torch.tensor([[0, 3]])
    one = rounded_activations(activations, places=places, scales=torch.tensor(0.5, dtype=dtype))
    assert one.tolist() == [[0.5, -0.5, 5.0, -900.0], [0.0, 0.0, 63.5, -63.5]]
    each = rounded_activations(activations, places=places, scales=torch.tensor([[0.25], [1.0]], dtype=dtype))
    assert each.tolist() == [[0.25, -0.75, 5.0, -900.0], [0.0, 0.0, 64.0, -70.0]]


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_a_calibration_on_the_same_activations_change_nothing(dtype, span):
    activations, places = normal(5, 20, dtype=dtype), torch.tensor([[1, 2]])
    activations[1, 2] = 300
    scales = activation_scales(replaced_activations(activations, places), span=span)
    found = rounded_activations(activations, places=places, scales=scales)
    assert same_bits(found, rounded_activations(activations, places=places, span=span))


@pytest.mark.parametrize("places", [None, torch.empty(0, 2, dtype=torch.int64)])
def test_no_place_is_plain_rounding(places):
    assert same_bits(rounded_activations(normal(), places=places), rounded_activations(normal()))


@pytest.mark.parametrize("span", SPANS)
def test_zeros_and_the_largest_float16(span):
    assert not rounded_activations(torch.zeros(3, 4), span=span).any()
    activations = torch.tensor([[65504.0, -65504.0], [1.0, 0.0]], dtype=torch.float16)
    assert rounded_activations(activations, span=span)[0].tolist() == [65504, -65504]
