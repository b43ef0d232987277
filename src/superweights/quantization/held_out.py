"""Weights that are held out of rounding: they set no range, and come back to the bit.

Rounding to nearest does two different harms around a super weight. It may lose the weight itself, where clipping cuts it off;
and, because the weight stretches its group's range, it loses the weight's neighbours. Holding the weight out undoes both.
"""

from collections.abc import Sequence
from typing import Literal

import torch

from superweights.errors import CoordinateError
from superweights.quantization.clipping import Clip
from superweights.quantization.rounding import Quantized, quantize
from superweights.quantization.scheme import Scheme

Keep = Literal["hold-out", "restore"]
"""hold-out: kept weights are 0 while the group's range is taken. restore: they take part, as in the paper."""


def quantize_held_out(
    matrix: torch.Tensor,
    scheme: Scheme,
    held: Sequence[int],
    *,
    clip: Clip | None = None,
    scale_dtype: torch.dtype | None = None,
) -> Quantized:
    """Rounds a matrix as if some weights were 0; whoever uses the result puts them back.

    Args:
        matrix: [rows, cols], any floating dtype; it is only read.
        scheme: how.
        held: flat indices, row by row, of the weights that are held out.
        clip: what is cut off before the range of a group is taken.
        scale_dtype: see `quantize`.

    Raises:
        CoordinateError: a flat index is outside.
        UsageError, NonFiniteWeightsError: see `quantize`; a held weight may be anything.

    Example:
        >>> matrix = torch.tensor([[0.1, -9.0, 0.2, 0.7]])
        >>> quantize_held_out(matrix, Scheme.parse("int4-row"), [1]).codes.tolist()
        [[1, 0, 2, 7]]
    """
    _check_inside(matrix, held)
    if held:
        matrix = matrix.detach().clone(memory_format=torch.contiguous_format)
        matrix.view(-1)[list(held)] = 0
    return quantize(matrix, scheme, clip=clip, scale_dtype=scale_dtype)


def rounded(
    matrix: torch.Tensor,
    scheme: Scheme,
    *,
    clip: Clip | None = None,
    kept: Sequence[int] = (),
    keep: Keep = "hold-out",
    scale_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A matrix as it is after quantizing, dequantizing and putting kept weights back, in its own dtype.

    Args:
        matrix: [rows, cols], any floating dtype; it is only read.
        scheme: how.
        clip: what is cut off before the range of a group is taken.
        kept: flat indices, row by row, of the weights that keep their value to the bit.
        keep: whether kept weights take part in the ranges.
        scale_dtype: see `quantize`.

    Raises:
        CoordinateError, UsageError, NonFiniteWeightsError: see `quantize_held_out`.

    Source:
        arXiv 2411.07191, section 4.2: RESTORE(Q^-1(Q(CLIP_z(W)))).

    Example:
        >>> rounded(torch.tensor([[0.1, -9.0, 0.22, 0.7]]), Scheme.parse("int4-row"), kept=[1])
        tensor([[ 0.1000, -9.0000,  0.2000,  0.7000]])
    """
    _check_inside(matrix, kept)
    held = kept if keep == "hold-out" else ()
    found = quantize_held_out(matrix, scheme, held, clip=clip, scale_dtype=scale_dtype).dequantized(matrix.dtype)
    if kept:
        places = list(kept)
        found.view(-1)[places] = matrix.detach().reshape(-1)[places]
    return found


def _check_inside(matrix: torch.Tensor, places: Sequence[int]) -> None:
    outside = [each for each in places if not 0 <= each < matrix.numel()]
    if outside:
        raise CoordinateError(f"Flat index {outside[0]} is outside a matrix of {matrix.numel()} weights.")
