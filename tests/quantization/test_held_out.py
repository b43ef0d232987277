"""Weights that are held out or restored: exact to the bit, and what they do to their neighbours."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superweights.errors import CoordinateError, NonFiniteWeightsError
from superweights.quantization.clipping import Clip
from superweights.quantization.held_out import quantize_held_out, rounded
from superweights.quantization.rounding import quantize
from superweights.quantization.scheme import Scheme

from .building import CLIPS, COLS, DTYPES, ROWS, SCHEMES, matrices, normal, same_bits

WITH_CLIPS = [
    *[(text, None) for text in SCHEMES],
    *[(text, clip) for text in ("int4-g2", "nf4-tile2x4") for clip in CLIPS],
]
PLACES = st.lists(st.integers(0, ROWS * COLS - 1), max_size=5)


@given(
    matrices(),
    st.sampled_from(SCHEMES),
    PLACES,
    st.sampled_from([None, *CLIPS]),
    st.sampled_from(["hold-out", "restore"]),
)
@settings(deadline=None, max_examples=40)
def test_kept_weights_come_back_to_the_bit(matrix, text, kept, clip, keep):
    before = matrix.clone()
    found = rounded(matrix, Scheme.parse(text), clip=None if clip is None else Clip.parse(clip), kept=kept, keep=keep)
    assert (found.dtype, found.shape) == (matrix.dtype, matrix.shape)
    assert same_bits(found.flatten()[kept], matrix.flatten()[kept])
    assert same_bits(matrix, before)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("text", ["int4-row", "int8-g4-asym", "int4-tile4x2-minmax", "int4-tile4x1", "nf4-block3x5"])
def test_a_weight_of_any_bits_comes_back(text, dtype):
    """The last bit of a fraction, a negative zero and the largest number; what is held out may even be no number."""
    matrix = normal(dtype=dtype)
    strange = torch.tensor([torch.pi, -0.0, torch.finfo(dtype).max, torch.nan, -torch.inf, torch.finfo(dtype).tiny]).to(
        dtype
    )
    matrix.view(-1)[:6] = strange
    assert same_bits(rounded(matrix, Scheme.parse(text), kept=range(6)).flatten()[:6], strange)


@pytest.mark.parametrize(("text", "clip"), WITH_CLIPS)
def test_held_out_is_rounding_with_zeros(text, clip):
    matrix, held, scheme = normal(), [3, 17, 18], Scheme.parse(text)
    clip = None if clip is None else Clip.parse(clip)
    zeroed = matrix.clone()
    zeroed.view(-1)[held] = 0
    expected = quantize(zeroed, scheme, clip=clip)
    found = quantize_held_out(matrix, scheme, held, clip=clip)
    assert same_bits(found.codes, expected.codes)
    assert same_bits(found.grids.scales, expected.grids.scales)
    values = expected.dequantized()
    values.view(-1)[held] = matrix.view(-1)[held]
    assert same_bits(rounded(matrix, scheme, kept=held, clip=clip), values)


@pytest.mark.parametrize(("text", "clip"), WITH_CLIPS)
def test_restored_is_rounding_with_all_weights(text, clip):
    matrix, kept, scheme = normal(), [3, 17, 18], Scheme.parse(text)
    clip = None if clip is None else Clip.parse(clip)
    values = quantize(matrix, scheme, clip=clip).dequantized()
    values.view(-1)[kept] = matrix.view(-1)[kept]
    assert same_bits(rounded(matrix, scheme, kept=kept, keep="restore", clip=clip), values)


@given(st.floats(width=32), st.sampled_from(SCHEMES), st.sampled_from([None, *CLIPS]))
@settings(deadline=None, max_examples=40)
def test_a_weight_that_is_held_out_sets_no_range(value, text, clip):
    """Its neighbours are the same whatever it is, even no number."""
    matrix, other = normal(), normal()
    matrix[2, 3], other[2, 3] = value, 0.25
    clip = None if clip is None else Clip.parse(clip)
    found = [rounded(each, Scheme.parse(text), kept=[2 * COLS + 3], clip=clip) for each in (matrix, other)]
    found[1][2, 3] = value
    assert same_bits(*found)


def test_both_harms_around_a_super_weight():
    """Rounding alone loses its neighbours, and a clip loses it; held out, or clipped and restored, nothing is lost."""
    matrix, scheme = normal(1, 128, seed=4) * 0.01, Scheme.parse("int4-g128")
    matrix[0, 7] = -2
    others = [place for place in range(128) if place != 7]
    rounding_alone = rounded(matrix, scheme)
    assert not rounding_alone[0, others].any()
    assert rounding_alone[0, 7] == pytest.approx(-2)
    clipped = rounded(matrix, scheme, clip=Clip("z", 1.0))
    assert abs(clipped[0, 7]) < 0.3
    for kept in (
        rounded(matrix, scheme, kept=[7]),
        rounded(matrix, scheme, kept=[7], keep="restore", clip=Clip("tensor-fraction", 0.01)),
    ):
        assert kept[0, 7] == -2
        assert (kept - matrix).norm() < 0.2 * matrix[0, others].norm()


def test_nothing_kept_is_plain_rounding():
    matrix, scheme = normal(dtype=torch.bfloat16), Scheme.parse("int4-g8")
    expected = quantize(matrix, scheme).dequantized(torch.bfloat16)
    assert same_bits(rounded(matrix, scheme), expected)
    assert same_bits(rounded(matrix, scheme, keep="restore"), expected)


@pytest.mark.parametrize("keep", ["hold-out", "restore"])
def test_a_matrix_that_lies_across(keep):
    matrix, scheme = normal(COLS, ROWS).t(), Scheme.parse("int4-tile4x1")
    before = matrix.clone()
    found = rounded(matrix, scheme, kept=[1, 9], keep=keep)
    assert same_bits(found, rounded(matrix.contiguous(), scheme, kept=[1, 9], keep=keep))
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("keep", ["hold-out", "restore"])
@pytest.mark.parametrize("place", [-1, 32, 10**9])
def test_a_place_outside(place, keep):
    with pytest.raises(CoordinateError, match=f"Flat index {place} is outside a matrix of 32 weights"):
        rounded(normal(), Scheme.parse("int4-row"), kept=[0, place], keep=keep)


def test_what_is_restored_must_be_a_number():
    matrix = normal()
    matrix[0, 1] = torch.nan
    assert rounded(matrix, Scheme.parse("int4-row"), kept=[1])[0, 1].isnan()
    with pytest.raises(NonFiniteWeightsError, match="1 weight is NaN"):
        rounded(matrix, Scheme.parse("int4-row"), kept=[1], keep="restore")


@pytest.mark.parametrize("keep", ["hold-out", "restore"])
def test_a_parameter_gives_numbers_without_a_gradient(keep):
    parameter = torch.nn.Parameter(normal())
    found = rounded(parameter, Scheme.parse("int4-row"), kept=[1], keep=keep)
    assert not found.requires_grad
    assert torch.equal(parameter, normal())


@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_the_dtype_of_scales_is_passed_on(scale_dtype):
    found = quantize_held_out(normal(), Scheme.parse("int4-row"), [1], scale_dtype=scale_dtype)
    assert found.grids.scales.dtype == scale_dtype
    values = rounded(normal(), Scheme.parse("int4-row"), scale_dtype=scale_dtype)
    assert same_bits(values, quantize(normal(), Scheme.parse("int4-row"), scale_dtype=scale_dtype).dequantized())
