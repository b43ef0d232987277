"""Rounding to nearest: plain-loop oracles for every kind of grid, and what must hold for any weights."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from superweights.errors import NonFiniteWeightsError, UsageError
from superweights.quantization import rounding
from superweights.quantization.clipping import Clip
from superweights.quantization.rounding import Quantized, from_groups, normal_float, quantize, to_groups
from superweights.quantization.scheme import Scheme

from .building import CLIPS, COLS, DTYPES, ROWS, SCHEMES, group_of, groups_of, matrices, normal, same_bits

F = np.float32
TIE = 1e-4
"""A quotient this near to the middle of two codes may fall either way: float32 division is good to 255 * 2^-24 of a step."""
# Dettmers et al., arXiv 2305.14314, appendix E, and create_normal_map of bitsandbytes.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
# The code of arXiv 2411.07191, outliers/functional/quantization.py.
NF3 = [
    -1.0,
    -0.5350227355957031,
    -0.2469314038753510,
    0.0,
    0.1833375245332718,
    0.3819939494132996,
    0.6229856610298157,
    1.0,
]


def stored(scale: F, dtype: torch.dtype) -> F:
    return F(torch.tensor(scale).to(dtype).item())


def steps_of(scheme: Scheme) -> int:
    return 2**scheme.bits - 1


def top_of(scheme: Scheme) -> int:
    """Steps from 0 to the end of a symmetric grid."""
    return 1 if scheme.kind == "nf" else 2 ** (scheme.bits - 1) - 1


def loop_grid(group: list[float], scheme: Scheme, dtype: torch.dtype) -> tuple[F, F | None]:
    """Scale and offset of one group, float32 scalars step by step."""
    low, high = F(min(group)), F(max(group))
    if scheme.offset == "sym":
        return stored(max(-low, high) / F(top_of(scheme)), dtype), None
    if scheme.offset == "signed":
        return stored((low if -low > high else high) / F(-top_of(scheme) - 1), dtype), None
    if scheme.offset == "minmax":
        return (high - low) / F(steps_of(scheme)), low
    low, high = min(low, F(0)), max(high, F(0))
    scale = stored((high - low) / F(steps_of(scheme)), dtype)
    return scale, F(min(steps_of(scheme), round(float(-low) / float(scale or 1))))


def loop_values(weight: float, scale: F, offset: F | None, scheme: Scheme) -> set[float]:
    """What a weight may become: one value, or two where it lies in the middle of them."""
    step = float(scale or 1)
    if scheme.kind == "nf":
        table = NF4 if scheme.bits == 4 else NF3
        distances = [abs(each - weight / step) for each in table]
        codes = [code for code, each in enumerate(distances) if each <= min(distances) + TIE]
        return {float(F(table[code]) * scale) for code in codes}
    place = (weight - float(offset)) / step if scheme.offset == "minmax" else weight / step
    codes = [F(round(place - TIE)), F(round(place + TIE))]
    if scheme.offset == "sym":
        return {float(np.clip(code, -top_of(scheme), top_of(scheme)) * scale) for code in codes}
    if scheme.offset == "signed":
        return {float(np.clip(code, -top_of(scheme) - 1, top_of(scheme)) * scale) for code in codes}
    if scheme.offset == "asym":
        return {float((np.clip(code + offset, 0, steps_of(scheme)) - offset) * scale) for code in codes}
    return {float(np.clip(code, 0, steps_of(scheme)) * scale + offset) for code in codes}


def check_against_loop(matrix: torch.Tensor, scheme: Scheme, found: Quantized, dtype: torch.dtype) -> None:
    values, groups = found.dequantized(), groups_of(matrix, scheme)
    grids = [loop_grid(group, scheme, dtype) for group in groups]
    assert found.grids.scales.tolist() == [scale for scale, _ in grids]
    if scheme.offset == "asym":  # a zero in the middle of two codes may take either
        for (scale, zero), taken, group in zip(grids, found.grids.offsets.tolist(), groups, strict=True):
            exact = -min(*group, 0) / float(scale or 1)
            assert taken == zero or (abs(taken - zero) == 1 and abs(exact % 1 - 0.5) < TIE)
        grids = [(scale, F(taken)) for (scale, _), taken in zip(grids, found.grids.offsets.tolist(), strict=True)]
    for row in range(matrix.shape[0]):
        for col in range(matrix.shape[1]):
            scale, offset = grids[group_of(row, col, scheme, *matrix.shape)]
            assert values[row, col].item() in loop_values(matrix[row, col].item(), scale, offset, scheme)


@pytest.mark.parametrize("text", SCHEMES)
def test_values_are_those_of_a_plain_loop(text):
    for seed, dtype in enumerate(DTYPES):
        matrix, scheme = normal(seed=seed, dtype=dtype), Scheme.parse(text)
        check_against_loop(matrix, scheme, quantize(matrix, scheme), dtype)


@given(matrices(), st.sampled_from(SCHEMES), st.sampled_from([*DTYPES, None]))
@settings(deadline=None, max_examples=40)
def test_any_weights_agree_with_a_plain_loop(matrix, text, scale_dtype):
    scheme = Scheme.parse(text)
    check_against_loop(matrix, scheme, quantize(matrix, scheme, scale_dtype=scale_dtype), scale_dtype or matrix.dtype)


def widest_gap(scheme: Scheme) -> float:
    """Between two neighbours on the grid, in steps."""
    return float(normal_float(scheme.bits).diff().max()) if scheme.kind == "nf" else 1.0


@given(matrices(), st.sampled_from(SCHEMES), st.sampled_from([*DTYPES, None]))
@settings(deadline=None, max_examples=40)
def test_no_weight_moves_by_more_than_half_a_step(matrix, text, scale_dtype):
    scheme = Scheme.parse(text)
    found = quantize(matrix, scheme, scale_dtype=scale_dtype)
    groups, values = to_groups(matrix, scheme).double(), to_groups(found.dequantized(), scheme).double()
    scales = found.grids.scales.double()
    low, high = groups.amin(1), groups.amax(1)
    if scheme.offset == "asym":
        low, high = low.clamp(max=0), high.clamp(min=0)
    steps = {"sym": top_of(scheme), "signed": top_of(scheme) + 1}.get(scheme.offset, steps_of(scheme))
    exact = (torch.maximum(-low, high) if scheme.offset in ("sym", "signed") else high - low) / steps
    scales = scales.abs()
    gap = widest_gap(scheme) * (2 if scheme.offset == "signed" else 1)  # its upper end lies a step below the largest
    # All codes together move by what the scale lost when it was stored; then some roundings of float32.
    bound = gap / 2 * scales + steps * (scales - exact).abs() + 1e-6 * groups.abs().amax(1)
    assert ((values - groups).abs() <= bound[:, None]).all()


@given(matrices(), st.sampled_from(SCHEMES))
@settings(deadline=None, max_examples=40)
def test_codes_fit_in_their_bits(matrix, text):
    scheme = Scheme.parse(text)
    codes = quantize(matrix, scheme).codes
    wide = scheme.bits == 8 and scheme.offset in ("asym", "minmax")
    assert codes.dtype == (torch.int16 if wide else torch.int8)
    ends = {"sym": (-top_of(scheme), top_of(scheme)), "signed": (-top_of(scheme) - 1, top_of(scheme))}
    least, most = ends.get(scheme.offset if scheme.kind == "int" else "", (0, steps_of(scheme)))
    assert least <= codes.min()
    assert codes.max() <= most


@pytest.mark.parametrize("text", SCHEMES)
def test_the_ends_of_the_grid_are_used(text):
    """No bit is wasted: the largest weight lies on the last value."""
    scheme = Scheme.parse(text)
    for group in quantize(normal(seed=3), scheme).codes.tolist():
        if scheme.kind == "nf":
            assert 0 in group or steps_of(scheme) in group
        elif scheme.offset == "sym":
            assert max(map(abs, group)) == top_of(scheme)
        elif scheme.offset == "signed":
            assert min(group) == -top_of(scheme) - 1
        elif scheme.offset == "minmax":
            assert (min(group), max(group)) == (0, steps_of(scheme))


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("seed", range(3))
def test_rounding_twice_is_rounding_once(seed, text):
    """Scales are taken anew from rounded ends: a few units in the last place of float32."""
    scheme = Scheme.parse(text)
    once = quantize(normal(seed=seed), scheme)
    twice = quantize(once.dequantized(), scheme)
    reach = to_groups(once.dequantized(), scheme).abs().amax(1, keepdim=True)
    moved = to_groups(twice.dequantized() - once.dequantized(), scheme).abs()
    assert (moved <= 2e-6 * reach).all()
    assert torch.equal(once.codes, twice.codes) or scheme.offset == "asym"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", [each for each in SCHEMES if not each.startswith(("int8", "int7", "int6"))])
def test_rounding_twice_in_16_bits(text, dtype):
    """The values themselves are rounded to the dtype, which moves ends and so the scale; with few steps no code changes."""
    scheme = Scheme.parse(text)
    once = quantize(normal(dtype=dtype), scheme, scale_dtype=torch.float32)
    twice = quantize(once.dequantized(dtype), scheme, scale_dtype=torch.float32)
    assert torch.equal(once.codes, twice.codes)
    moved = to_groups(twice.dequantized() - once.dequantized(), scheme).abs()
    reach = to_groups(once.dequantized(), scheme).abs().amax(1, keepdim=True)
    assert (moved <= 2 * torch.finfo(dtype).eps * reach).all()


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_matrix_is_only_read(dtype, text):
    matrix = normal(dtype=dtype)
    before = matrix.clone()
    for clip in (None, Clip("z", 1.0), Clip("iqr", 0.5)):
        quantize(matrix, Scheme.parse(text), clip=clip)
    assert same_bits(matrix, before)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("piece", [1 << 18, 10])
def test_no_clip_writes_into_the_matrix(piece, clip, monkeypatch):
    monkeypatch.setattr(rounding, "_PIECE", piece)
    matrix = normal()
    for text in ("int4-row", "nf4-tensor", "int4-g2-minmax"):
        quantize(matrix, Scheme.parse(text), clip=Clip.parse(clip))
    assert same_bits(matrix, normal())


@pytest.mark.parametrize("piece", [1, 20])
@pytest.mark.parametrize("text", SCHEMES)
def test_the_size_of_a_piece_changes_nothing(text, piece, monkeypatch):
    matrix, scheme = normal(dtype=torch.bfloat16) ** 3, Scheme.parse(text)
    for clip in (None, Clip("z", 1.0)):
        monkeypatch.undo()
        whole = quantize(matrix, scheme, clip=clip)
        values = whole.dequantized()
        monkeypatch.setattr(rounding, "_PIECE", piece)
        cut = quantize(matrix, scheme, clip=clip)
        assert same_bits(cut.codes, whole.codes)
        assert same_bits(cut.grids.scales, whole.grids.scales)
        assert (whole.grids.offsets is None) == (scheme.offset in ("sym", "signed"))
        assert whole.grids.offsets is None or same_bits(cut.grids.offsets, whole.grids.offsets)
        assert same_bits(cut.dequantized(), values)


@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from(["group", "block", "tile"]),
)
@settings(deadline=None, max_examples=40)
def test_groups_and_back(down, across, high, wide, sharing):
    assume(high * wide > 1 and (sharing != "group" or wide > 1))
    scheme = Scheme("int", 4, sharing, (1, wide) if sharing == "group" else (high, wide))
    matrix = torch.arange(float(down * high * across * wide)).reshape(down * high, across * wide)
    groups = to_groups(matrix, scheme)
    assert groups.tolist() == groups_of(matrix, scheme)
    assert torch.equal(from_groups(groups, tuple(matrix.shape), scheme), matrix)


@pytest.mark.parametrize("text", ["int4-row", "int4-tensor", "int4-block4x9"])
def test_groups_and_back_of_any_shape(text):
    matrix, scheme = torch.arange(21.0).reshape(3, 7), Scheme.parse(text)
    assert to_groups(matrix, scheme).tolist() == groups_of(matrix, scheme)
    assert torch.equal(from_groups(to_groups(matrix, scheme), (3, 7), scheme), matrix)


@pytest.mark.parametrize("text", ["int4-row", "int4-g8-asym", "int4-tile2x4", "int4-block2x4-minmax", "nf4-row"])
def test_a_matrix_that_lies_across(text):
    matrix, scheme = normal(COLS, ROWS).t(), Scheme.parse(text)
    assert torch.equal(quantize(matrix, scheme).dequantized(), quantize(matrix.contiguous(), scheme).dequantized())


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_symmetric_grid_keeps_the_largest_weight_of_a_row(bits):
    """To one unit in the last place: x / 7 * 7 in float32 is not always x. Rounded to bfloat16, it is."""
    matrix = normal(2000, 4, seed=bits)
    largest = matrix.abs().amax(1)
    found = quantize(matrix, Scheme("int", bits, "row")).dequantized().abs().amax(1)
    assert ((found - largest).abs() <= torch.from_numpy(np.spacing(largest.numpy()))).all()
    narrow = matrix.bfloat16()
    found = quantize(narrow, Scheme("int", bits, "row"), scale_dtype=torch.float32).dequantized(torch.bfloat16)
    places = narrow.abs().argmax(1, keepdim=True)
    assert same_bits(found.gather(1, places), narrow.gather(1, places))


def test_normal_float_of_4_bits_is_the_published_table():
    assert same_bits(normal_float(4), torch.tensor(NF4))


def test_normal_float_of_3_bits_is_that_of_the_papers_code():
    assert same_bits(normal_float(3), torch.tensor(NF3))


@pytest.mark.parametrize("bits", [3, 4])
def test_normal_float_keeps_its_own_values(bits):
    """The largest |weight| and zero come back to the bit, whatever it is."""
    table = normal_float(bits)
    matrix = torch.stack([table * 3.7, -table * 0.011])
    found = quantize(matrix, Scheme("nf", bits, "row"))
    assert found.codes[0].tolist() == list(range(2**bits))
    assert torch.equal(found.dequantized()[0], matrix[0])
    assert found.dequantized()[1, 0] == matrix[1, 0]
    assert found.dequantized()[1, 2 ** (bits - 1) - 1] == 0


@pytest.mark.parametrize("text", ["int4-row", "int4-g8-asym", "int8-tensor", "nf4-g8"])
@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_are_stored_as_asked(dtype, scale_dtype, text):
    matrix, scheme = normal(dtype=dtype), Scheme.parse(text)
    assert quantize(matrix, scheme).grids.scales.dtype == dtype
    assert quantize(matrix, scheme, scale_dtype=scale_dtype).grids.scales.dtype == scale_dtype


def test_scales_of_minmax_are_float32():
    grids = quantize(normal(), Scheme.parse("int4-row-minmax"), scale_dtype=torch.float16).grids
    assert grids.offsets is not None
    assert (grids.scales.dtype, grids.offsets.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("text", SCHEMES)
def test_values_are_rounded_once_to_another_dtype(text):
    found = quantize(normal(), Scheme.parse(text))
    for dtype in DTYPES:
        assert same_bits(found.dequantized(dtype), found.dequantized().to(dtype))


ONE_SIDED = [[0.0, 0.0], [0.0, 3.0], [-3.0, 0.0], [-2.0, -2.0], [5.0, 5.0]]
ANY_SCHEME = ["int4-row", "int4-row-asym", "int4-row-minmax", "nf4-row", "nf3-tensor", "int2-g2"]


@pytest.mark.parametrize(
    ("text", "values"),
    [(text, values) for text in ANY_SCHEME for values in ONE_SIDED]
    + [(text, [2.0, -1.0]) for text in ("int4-row-asym", "int4-row-minmax", "int2-tensor-asym")],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_weights_on_the_grid(dtype, text, values):
    """Zero and the ends are; what a scale of few digits loses is allowed."""
    matrix = torch.tensor([values], dtype=dtype)
    found = quantize(matrix, Scheme.parse(text)).dequantized()
    torch.testing.assert_close(found, matrix.float(), rtol=torch.finfo(dtype).eps, atol=0)


@given(matrices(), st.sampled_from([each for each in SCHEMES if "minmax" not in each]))
@settings(deadline=None, max_examples=40)
def test_zero_stays_zero(matrix, text):
    matrix[1, 3] = 0
    assert quantize(matrix, Scheme.parse(text)).dequantized()[1, 3] == 0


@pytest.mark.parametrize("text", SCHEMES)
def test_a_matrix_of_zeros(text):
    found = quantize(torch.zeros(ROWS, COLS), Scheme.parse(text))
    assert not found.dequantized().any()
    assert not found.grids.scales.any()


@pytest.mark.parametrize("clip", [None, *CLIPS])
@pytest.mark.parametrize("text", ["int4-row", "int4-g2-asym", "int8-tensor-minmax", "int4-tile2x4", "nf4-block3x5"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_are_refused_and_counted(bad, text, clip):
    matrix, scheme = normal(), Scheme.parse(text)
    matrix[2, 5] = bad
    clip = None if clip is None else Clip.parse(clip)
    with pytest.raises(
        NonFiniteWeightsError, match=r"Quantizing a matrix of 4 x 8: 1 weight is NaN or infinite. The checkpoint"
    ):
        quantize(matrix, scheme, clip=clip)
    matrix[0] = bad
    with pytest.raises(NonFiniteWeightsError, match="9 weights are NaN or infinite"):
        quantize(matrix, scheme, clip=clip)


def test_an_infinite_weight_beyond_the_first_piece_is_seen(monkeypatch):
    monkeypatch.setattr(rounding, "_PIECE", 5)
    matrix = normal()
    matrix[3, 7] = torch.inf
    with pytest.raises(NonFiniteWeightsError, match="1 weight is"):
        quantize(matrix, Scheme.parse("int4-tensor"), clip=Clip("tensor-fraction", 0.1))


def test_scales_among_the_least_numbers_of_float16():
    """Rounded to them, a scale may be a third too small, and codes end where the grid does; or nothing, and so are codes."""
    unit = 2.0**-24
    matrix = torch.tensor([[10.0, -10.0, 2.0, -1.0], [1.0, -1.0, 0.0, 1.0]], dtype=torch.float64).mul(unit).half()
    found = quantize(matrix, Scheme.parse("int4-row"))
    assert (found.grids.scales / unit).tolist() == [1, 0]
    assert found.codes.tolist() == [[7, -7, 2, -1], [0, 0, 0, 0]]
    for text in ("int4-row-asym", "nf4-row"):
        assert quantize(matrix, Scheme.parse(text)).dequantized().abs().max() <= 16 * unit


def test_a_scale_that_does_not_fit_is_no_damage():
    with pytest.raises(
        UsageError, match=r"weights of up to 1e.06 need a scale that does not fit in torch.float16. Store scales"
    ):
        quantize(torch.tensor([[1e6, 1.0]]), Scheme.parse("int4-row"), scale_dtype=torch.float16)
    with pytest.raises(UsageError, match=r"weights of up to 2e.38 need a scale that does not fit in torch.float32"):
        quantize(torch.tensor([[2e38, -2e38]]), Scheme.parse("int4-row-asym"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "int4-g3",
            "Quantizing a matrix of 4 x 8 by int4-g3: groups of 3 do not divide rows of 8; shorter ones do: 2.",
        ),
        ("int4-g128", "groups of 128 do not divide rows of 8; shorter ones do: 8, 4, 2."),
        ("int4-tile3x8", "tiles of 3 x 8 do not divide 4 x 8; these sizes do: 2 rows, 8, 4, 2 cols."),
    ],
)
def test_groups_and_tiles_that_do_not_divide(text, message):
    with pytest.raises(UsageError, match=message):
        quantize(normal(), Scheme.parse(text))


def test_a_parameter_gives_numbers_without_a_gradient():
    found = quantize(torch.nn.Parameter(normal()), Scheme.parse("int4-row-minmax"), clip=Clip("z", 1.0))
    assert not found.dequantized().requires_grad
    assert not found.grids.scales.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_wider_and_narrower_weights(dtype):
    matrix, scheme = normal().to(dtype), Scheme.parse("int4-g8")
    found = quantize(matrix, scheme, scale_dtype=torch.float32)
    assert same_bits(found.dequantized(), quantize(matrix.float(), scheme).dequantized())
    assert quantize(matrix, scheme).dequantized(dtype).dtype == dtype
