"""The released function of the paper as a plain loop, and ours beside it.

Source:
    arXiv 2411.07191 and its code: blocks of consecutive weights, row by row; a threshold per block; clamp; min-max rounding
    with scale (2^n - 1) / (max - min); dequantize; put kept weights back. What does not divide into blocks is one block.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superweights.quantization.clipping import Clip
from superweights.quantization.held_out import rounded
from superweights.quantization.scheme import Scheme

from .building import normal

PAPERS_NAMES = {
    "z": "zscore",
    "block-fraction": "block_percentage",
    "tensor-fraction": "tensor_percentage",
    "iqr": "iqr",
}


def paper_threshold(block: list[float], everything: list[float], method: str, amount: float, whole: bool) -> float:
    sizes = [abs(each) for each in block]
    if method == "zscore":
        mean = sum(sizes) / len(sizes)
        return mean + amount * math.sqrt(sum((each - mean) ** 2 for each in sizes) / (len(sizes) - 1))
    if method == "iqr":
        lower, upper = (float(each) for each in np.quantile(sizes, [0.25, 0.75]))
        return upper + amount * (upper - lower)
    if method == "block_percentage" and not whole:
        return sorted(sizes, reverse=True)[max(int(len(sizes) * amount + 1), 1) - 1]
    # The k-th largest, so that k - 1 weights are cut; in blocks above, k are.
    return sorted(map(abs, everything), reverse=True)[max(int(len(everything) * amount), 1) - 1]


def paper_loop(
    values: list[float], bits: int, together: int, clip: tuple[str, float] | None, kept: list[int]
) -> tuple[list[float], list[float], list[bool]]:
    """What the weights become, the step of each, and whether the quotient lies within 1e-4 of the middle of two codes.

    Where a block's weights are all equal the paper's code gives NaN; here the expected value is the weight.
    """
    whole = len(values) % together != 0
    together = len(values) if whole else together
    found, steps, ties = [], [], []
    for start in range(0, len(values), together):
        block = values[start : start + together]
        if clip is not None:
            top = paper_threshold(block, values, *clip, whole)
            block = [min(max(each, -top), top) for each in block]
        low, high = min(block), max(block)
        for each in block:
            if low == high:
                found.append(each)
                steps.append(0.0)
                ties.append(False)
                continue
            scale = (2**bits - 1) / (high - low)
            place = (each - low) * scale
            found.append(round(place) / scale + low)
            steps.append(1 / scale)
            ties.append(abs(place % 1 - 0.5) < 1e-4)
    for place in kept:
        found[place], steps[place], ties[place] = values[place], 0.0, False
    return found, steps, ties


def check(matrix: torch.Tensor, text: str, together: int, clip: Clip | None = None, kept: tuple[int, ...] = ()) -> None:
    """Equal but for float32: thresholds and ends are off by some 2^-24 of the range of a block, and so are values on the grid.

    Within 1e-4 steps of the middle of two codes that may decide for the other one. Narrow dtypes round the result once more.
    """
    scheme = Scheme.parse(text)
    found = rounded(matrix, scheme, clip=clip, kept=kept, keep="restore")
    method = None if clip is None else (PAPERS_NAMES[clip.method], clip.amount)
    expected, steps, ties = paper_loop(matrix.flatten().tolist(), scheme.bits, together, method, list(kept))
    assert found.dtype == matrix.dtype
    assert sum(ties) < len(ties) / 2, "where every quotient is a tie, nothing is compared"
    narrow = torch.finfo(matrix.dtype).eps if matrix.dtype != torch.float32 else 0.0
    for place, value in enumerate(found.flatten().tolist()):
        if place in kept or steps[place] == 0:
            if clip is None or place in kept:
                assert value == expected[place]
            continue
        reach = steps[place] * (2**scheme.bits - 1)
        allowed = (
            2e-6 * (reach + abs(expected[place])) + narrow * abs(expected[place]) + ties[place] * steps[place] * 1.001
        )
        assert abs(value - expected[place]) <= allowed


CLIPS = [
    None,
    Clip("z", 0.5),
    Clip("z", 3.0),
    Clip("z", 9.0),
    Clip("z", 20.0),
    Clip("block-fraction", 0.07),
    Clip("iqr", 1.5),
]


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("block", [(4, 8), (2, 16), (8, 16), (16, 1), (48, 8)])
def test_blocks(block, bits, clip):
    """The last block is the whole tensor."""
    matrix = normal(24, 16) ** 3
    matrix[3, 5], matrix[20, 1] = -40.0, 9.0
    check(matrix, f"int{bits}-block{block[0]}x{block[1]}-minmax", block[0] * block[1], clip, (3 * 16 + 5, 20 * 16 + 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clip", CLIPS)
def test_weights_of_16_bits(clip, dtype):
    """The paper works in place in float16; ours is what it would be in float32, rounded once."""
    matrix = (normal(24, 16, seed=1) ** 3).to(dtype)
    matrix[3, 5] = -40.0
    check(matrix, "int4-block8x8-minmax", 64, clip, (3 * 16 + 5,))


@pytest.mark.parametrize("clip", [None, Clip("z", 3.0), Clip("iqr", 1.5)])
@pytest.mark.parametrize("shape", [(7, 11), (24, 17), (1, 2), (3, 1)])
def test_a_matrix_that_blocks_do_not_divide_is_one_block(shape, clip):
    matrix = normal(*shape, seed=2)
    check(matrix, "int4-block64x64-minmax", 64 * 64, clip, (1,))
    assert torch.equal(
        rounded(matrix, Scheme.parse("int4-block64x64-minmax"), clip=clip),
        rounded(matrix, Scheme.parse("int4-tensor-minmax"), clip=clip),
    )


def test_a_block_is_consecutive_weights_and_no_tile():
    """512 x 512 is 262144 weights row by row, whatever the shape of the matrix."""
    matrix = normal(16, 32)
    block, row = Scheme.parse("int4-block8x8-minmax"), Scheme.parse("int4-block64-minmax")
    assert torch.equal(rounded(matrix, block), rounded(matrix, row))
    assert torch.equal(rounded(matrix.view(4, 128), block).view(16, 32), rounded(matrix, block))
    assert not torch.equal(rounded(matrix, Scheme.parse("int4-tile8x8-minmax")), rounded(matrix, block))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e-6])
def test_a_block_of_equal_weights_keeps_its_value(value, dtype):
    """The paper's code divides zero by zero there."""
    matrix = normal(8, 8, dtype=dtype)
    matrix[2:4] = value
    found = rounded(matrix, Scheme.parse("int4-block2x8-minmax"))
    assert torch.equal(found[2:4], matrix[2:4])
    assert found.isfinite().all()


@pytest.mark.parametrize("block", ["block8x8", "block9x9"])
@pytest.mark.parametrize("count", [1, 3, 40])
def test_the_papers_tensor_percentage_cuts_one_weight_less(count, block):
    """Its threshold is the k-th largest of k = share * weights, and its block percentage takes the one after."""
    matrix = normal(16, 24, seed=3) ** 3
    together = 64 if block == "block8x8" else 81
    scheme = Scheme.parse(f"int4-{block}-minmax")
    found = rounded(matrix, scheme, clip=Clip("tensor-fraction", (count + 0.5) / 384))
    expected, steps, ties = paper_loop(
        matrix.flatten().tolist(), 4, together, ("tensor_percentage", (count + 1.5) / 384), []
    )
    for value, wanted, step, tie in zip(found.flatten().tolist(), expected, steps, ties, strict=True):
        assert abs(value - wanted) <= 3e-5 * step + 1e-6 * abs(wanted) + tie * step
    sizes = matrix.abs().flatten().sort(descending=True).values
    assert found.abs().max().item() == pytest.approx(sizes[count].item(), rel=1e-6)


def test_the_published_share_of_a_small_matrix_cuts_nothing():
    """1e-6 of 384 weights is none, there and here."""
    matrix = normal(16, 24)
    scheme = Scheme.parse("int4-block8x8-minmax")
    assert torch.equal(rounded(matrix, scheme, clip=Clip("tensor-fraction", 1e-6)), rounded(matrix, scheme))


@given(
    st.integers(0, 10**6),
    st.sampled_from([2, 3, 4, 6]),
    st.sampled_from(CLIPS),
    st.sampled_from([2, 8, 16, 32, 64, 100]),
)
@settings(deadline=None, max_examples=40)
def test_any_weights(seed, bits, clip, together):
    matrix = normal(8, 8, seed=seed) * 10.0 ** (seed % 9 - 4)
    if together != 100 or clip is None or clip.method != "block-fraction":
        check(matrix, f"int{bits}-block{together}-minmax", together, clip, (seed % 64,))
