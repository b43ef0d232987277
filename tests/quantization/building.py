"""Schemes of every kind that fit one small matrix, matrices of every dtype, and which weights share a scale by a plain rule."""

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from superweights.quantization.scheme import Scheme

ROWS, COLS = 4, 8
SHARINGS = ["tensor", "row", "g2", "g8", "block16", "block2x4", "block3x5", "tile2x4", "tile4x1", "tile4x8"]
"""block3x5 does not divide 4 x 8: one scale for all of it."""
OFFSETS = ["", "-signed", "-asym", "-minmax"]
SCHEMES = [
    *[f"int4-{sharing}{offset}" for sharing in SHARINGS for offset in OFFSETS],
    *[f"int{bits}-row{offset}" for bits in (2, 3, 5, 6, 7, 8) for offset in OFFSETS],
    *[f"nf4-{sharing}" for sharing in SHARINGS],
    *["nf3-row", "nf3-tile2x4", "int2-g2", "int8-tile4x1", "int8-block16-asym", "int8-tensor-minmax"],
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLIPS = ["z=1", "signed-z=1", "block-fraction=0.3", "tensor-fraction=0.1", "iqr=0.5", "mse"]


def matrices(rows: int = ROWS, cols: int = COLS) -> st.SearchStrategy[torch.Tensor]:
    """Ties, zeros, equal weights and large spreads; what is nearly a float16 zero is zero."""
    elements = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 0.5, -3.5, 7.0]), st.floats(-1000, 1000, width=32))
    found = arrays(np.float32, (rows, cols), elements=elements.map(lambda each: each if abs(each) > 1e-3 else 0.0))
    return st.builds(lambda array, dtype: torch.from_numpy(array).to(dtype), found, st.sampled_from(DTYPES))


def normal(rows: int = ROWS, cols: int = COLS, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)


def group_of(row: int, col: int, scheme: Scheme, rows: int, cols: int) -> int:
    """The number of the group in which a weight lies."""
    high, wide = scheme.size
    if scheme.sharing == "tensor":
        return 0
    if scheme.sharing == "row":
        return row
    if scheme.sharing == "group":
        return row * (cols // wide) + col // wide
    if scheme.sharing == "tile":
        return (row // high) * (cols // wide) + col // wide
    return (row * cols + col) // (high * wide) if rows * cols % (high * wide) == 0 else 0


def groups_of(matrix: torch.Tensor, scheme: Scheme) -> list[list[float]]:
    """The weights of each group, in the order of the rows."""
    rows, cols = matrix.shape
    found: dict[int, list[float]] = {}
    for row in range(rows):
        for col in range(cols):
            found.setdefault(group_of(row, col, scheme, rows, cols), []).append(matrix[row, col].item())
    return [found[number] for number in sorted(found)]


def same_bits(one: Any, other: Any) -> bool:
    """Whether two tensors are equal to the bit, signs of zeros and NaN among them."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    )
