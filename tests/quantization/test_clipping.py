"""Where groups are cut off: every method against a plain loop, and what must hold for any weights."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superweights.errors import UnknownNameError, UsageError
from superweights.quantization.clipping import Clip, thresholds
from superweights.quantization.rounding import quantize, to_groups
from superweights.quantization.scheme import Scheme

from .building import CLIPS, COLS, DTYPES, ROWS, SCHEMES, matrices, normal

NO_ERROR = torch.zeros_like  # only mse asks what rounding costs


def loop_bounds(groups: list[list[float]], clip: Clip) -> list[tuple[float, float]]:
    everything = sorted((abs(each) for group in groups for each in group), reverse=True)
    found = []
    for group in groups:
        sizes, count = [abs(each) for each in group], len(group)
        if clip.method == "z":
            mean = sum(sizes) / count
            top = mean + clip.amount * math.sqrt(sum((each - mean) ** 2 for each in sizes) / (count - 1))
        elif clip.method == "signed-z":
            mean = sum(group) / count
            reach = clip.amount * math.sqrt(sum((each - mean) ** 2 for each in group) / (count - 1))
            found.append((mean - reach, mean + reach))
            continue
        elif clip.method == "iqr":
            lower, upper = np.quantile(sizes, [0.25, 0.75])
            top = upper + clip.amount * (upper - lower)
        elif clip.method == "block-fraction":
            top = sorted(sizes, reverse=True)[int(clip.amount * count)]
        else:
            top = everything[int(clip.amount * len(everything))]
        found.append((-top, top))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "clip", ["z=0.5", "z=9", "signed-z=0.1", "signed-z=3", "iqr=0.1", "iqr=1.5", "block-fraction=0.05", "block-fraction=0.1",
             "block-fraction=0.99", "tensor-fraction=0.001", "tensor-fraction=0.03", "tensor-fraction=0.999"],
)  # fmt: skip
@pytest.mark.parametrize("size", [2, 3, 17])
def test_bounds_agree_with_a_plain_loop(size, clip, dtype):
    groups = normal(5, size, dtype=dtype) ** 3
    low, high = thresholds(groups, Clip.parse(clip), NO_ERROR)
    expected = loop_bounds(groups.tolist(), Clip.parse(clip))
    assert (low.dtype, high.dtype, low.shape, high.shape) == (torch.float32, torch.float32, (5,), (5,))
    # Means and deviations are sums of float32; their relative error is a few of 2^-24.
    np.testing.assert_allclose(torch.stack([low, high], 1), expected, rtol=2e-6, atol=2e-6 * float(groups.abs().max()))


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_share_is_cut_off_down_to_the_largest_weight_that_stays(share):
    groups = torch.tensor([[1.0, -2.0, 3.0, -4.0]])
    for method in ("block-fraction", "tensor-fraction"):
        low, high = thresholds(groups, Clip(method, share), NO_ERROR)
        assert (low.item(), high.item()) == (-4 + 4 * share, 4 - 4 * share)


def test_a_share_of_less_than_one_weight_cuts_nothing():
    groups = normal(3, 10)
    low, high = thresholds(groups, Clip("block-fraction", 0.09), NO_ERROR)
    assert torch.equal(high, groups.abs().amax(1))
    assert torch.equal(low, -high)


@given(matrices(), st.floats(0.01, 20), st.floats(0.01, 20))
@settings(deadline=None, max_examples=40)
def test_a_larger_amount_never_cuts_more(groups, one, other):
    for method in ("z", "signed-z", "iqr"):
        low, high = thresholds(groups, Clip(method, min(one, other)), NO_ERROR)
        wider_low, wider_high = thresholds(groups, Clip(method, max(one, other)), NO_ERROR)
        assert (wider_low <= low).all()
        assert (wider_high >= high).all()


@given(matrices(), st.sampled_from(SCHEMES), st.sampled_from(CLIPS))
@settings(deadline=None, max_examples=40)
def test_a_cut_leaves_something_of_every_group(matrix, scheme, clip):
    """Whose range and cut always meet. A share of the whole tensor may be a whole group, which then takes one value."""
    groups = to_groups(matrix, Scheme.parse(scheme)).float()
    low, high = thresholds(groups, Clip.parse(clip), lambda groups, cut: groups.abs().sum(1))
    assert (low <= high).all()
    slack = 1e-6 * groups.abs().amax(1)  # the mean of equal weights may be off by a rounding
    met = (low <= groups.amax(1) + slack) & (high >= groups.amin(1) - slack)
    assert met.all() or clip.startswith("tensor-fraction")


@pytest.mark.parametrize("scheme", ["int4-row", "int4-row-asym", "int4-row-minmax", "nf4-row"])
def test_a_group_beyond_the_cut_takes_its_value(scheme):
    matrix = torch.cat(
        [torch.full((1, 16), 0.5), torch.linspace(5, 6, 16)[None], torch.linspace(-1, 1, 32).view(2, 16)]
    )
    found = quantize(matrix, Scheme.parse(scheme), clip=Clip("tensor-fraction", 0.25)).dequantized()
    torch.testing.assert_close(found[1], torch.ones(16))


@pytest.mark.parametrize("scheme", ["int4-row", "int4-row-asym", "int4-row-minmax", "nf4-row"])
@pytest.mark.parametrize("clip", ["z=1", "signed-z=1", "block-fraction=0.2", "tensor-fraction=0.1", "iqr=0.5"])
def test_rounding_with_a_clip_is_rounding_of_clamped_weights(clip, scheme):
    matrix, scheme = normal(3, 16, seed=1) ** 3, Scheme.parse(scheme)
    low, high = thresholds(matrix, Clip.parse(clip), NO_ERROR)
    clamped = matrix.clamp(low[:, None], high[:, None])
    assert not torch.equal(clamped, matrix), "a clip that does not show proves nothing"
    found, expected = quantize(matrix, scheme, clip=Clip.parse(clip)), quantize(clamped, scheme)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.dequantized(), expected.dequantized())


def test_a_cut_beyond_every_weight_changes_nothing():
    matrix = normal()
    for clip in ("z=99", "signed-z=99", "iqr=99", "tensor-fraction=1e-6"):
        assert torch.equal(
            quantize(matrix, Scheme.parse("int4-g8"), clip=Clip.parse(clip)).dequantized(),
            quantize(matrix, Scheme.parse("int4-g8")).dequantized(),
        )


def squared_error(groups: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return (values.double() - groups.double()).square().sum(1)


@given(matrices(), st.sampled_from(SCHEMES), st.sampled_from([None, torch.float32, torch.bfloat16]))
@settings(deadline=None, max_examples=40)
def test_mse_is_never_worse_than_no_clip(matrix, scheme, scale_dtype):
    scheme, groups = Scheme.parse(scheme), to_groups(matrix, Scheme.parse(scheme))
    clipped = quantize(matrix, scheme, clip=Clip("mse"), scale_dtype=scale_dtype).dequantized()
    plain = quantize(matrix, scheme, scale_dtype=scale_dtype).dequantized()
    found, bound = (squared_error(groups, to_groups(each, scheme)) for each in (clipped, plain))
    # Errors are compared as sums of float32; where all are as good as exact, roundings decide.
    assert (found <= bound * (1 + 1e-5) + (1e-6 * groups.double().abs().amax(1)) ** 2).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_is_the_best_of_what_a_loop_tries(bits):
    group = normal(1, 300, seed=5)[0].tolist()
    largest, top = max(map(abs, group)), 2 ** (bits - 1) - 1
    errors = []
    for step in range(40):
        scale = largest * (1 - 0.02 * step) / top
        errors.append(sum((max(-top, min(top, round(each / scale))) * scale - each) ** 2 for each in group))
    assert min(errors) < errors[0] * 0.9, "a cut that does not help proves nothing"
    matrix = torch.tensor([group])
    found = quantize(matrix, Scheme("int", bits, "row"), clip=Clip("mse")).dequantized()
    assert squared_error(matrix, found).item() == pytest.approx(min(errors), rel=1e-5)


@pytest.mark.parametrize("scheme", ["int4-g64", "int4-g64-asym", "int4-g64-minmax", "int3-g64", "nf3-g64", "nf4-g64"])
def test_mse_helps_every_scheme(scheme):
    matrix, scheme = normal(16, 128, seed=2), Scheme.parse(scheme)
    clipped = quantize(matrix, scheme, clip=Clip("mse")).dequantized()
    assert (clipped - matrix).square().sum() < 0.97 * (quantize(matrix, scheme).dequantized() - matrix).square().sum()


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 2)])
def test_one_or_two_weights(shape, clip):
    matrix = torch.full(shape, -2.0)
    found = quantize(matrix, Scheme.parse("int4-row"), clip=Clip.parse(clip)).dequantized()
    torch.testing.assert_close(found, matrix)


@pytest.mark.parametrize("clip", CLIPS)
def test_zeros_stay_zeros(clip):
    matrix = torch.zeros(ROWS, COLS)
    assert torch.equal(quantize(matrix, Scheme.parse("int4-row"), clip=Clip.parse(clip)).dequantized(), matrix)


@given(st.sampled_from(["z", "signed-z", "iqr"]), st.floats(0, 1e6, exclude_min=True))
def test_a_clip_comes_back_from_its_text(method, amount):
    clip = Clip(method, amount)
    assert Clip.parse(str(clip)) == clip


@given(st.sampled_from(["block-fraction", "tensor-fraction"]), st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_a_share_comes_back_from_its_text(method, amount):
    assert Clip.parse(str(Clip(method, amount))) == Clip(method, amount)


@pytest.mark.parametrize("text", ["mse", "z=9", "z=2.5", "tensor-fraction=1e-06", "iqr=1.5"])
def test_text_that_stays_as_it_is(text):
    assert str(Clip.parse(f" {text} ")) == text


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("sined-z=9", "signed-z"), ("block_fraction=0.1", "block-fraction"), ("iqrr=1", "iqr"), ("msee", "mse")],
)
def test_near_matches_of_a_typo(typo, meant):
    with pytest.raises(UnknownNameError, match=f"There is no way to clip .* Did you mean .*'{meant}'.* Write z=Z"):
        Clip.parse(typo)


@pytest.mark.parametrize(
    "text",
    [
        "z",
        "z=0",
        "z=-1",
        "z=nan",
        "z=inf",
        "iqr=-2",
        "mse=3",
        "block-fraction=0",
        "block-fraction=1",
        "tensor-fraction=1.5",
    ],
)
def test_an_amount_out_of_range(text):
    with pytest.raises(UsageError, match=r"the amount is out of range. Write z=Z"):
        Clip.parse(text)


@pytest.mark.parametrize("text", ["z=nine", "z=9=9", "iqr=1,5"])
def test_an_amount_that_is_no_number(text):
    with pytest.raises(UsageError, match=f"Clipping by {text}: .* is no number"):
        Clip.parse(text)
