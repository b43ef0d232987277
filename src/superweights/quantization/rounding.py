"""Round to nearest: weights to codes on a grid of their own per group, and back.

The one idea: any way to share scales is a matrix of groups [groups, size] over the same weights. It is worked through in
pieces that stay in cache, on one thread; whoever has several cores takes several matrices at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch

from superweights.errors import NonFiniteWeightsError, UsageError
from superweights.quantization.clipping import Clip, thresholds
from superweights.quantization.scheme import Scheme

_PIECE = 1 << 18
"""Weights that are worked on together: 1 MB in float32 stays in cache, and fewer would not pay for the calls."""


@dataclass(frozen=True, slots=True)
class Grids:
    """The values that each group of weights can take, [groups] each."""

    scales: torch.Tensor
    """What a step of a code is worth, in the dtype in which it is stored."""
    offsets: torch.Tensor | None = None
    """asym: the code of zero, int16. minmax: the value of code zero, float32. None for symmetric grids."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix as codes and grids."""

    scheme: Scheme
    shape: tuple[int, int]
    """Rows and cols."""
    codes: torch.Tensor
    """int16 [groups, size] for 8 bits with an offset, else int8. sym: signed steps; asym, minmax: 0 to 2^bits - 1; nf: place
    in `normal_float(bits)`."""
    grids: Grids

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights that the codes stand for, [rows, cols]: computed in float32 and rounded once to `dtype`."""
        values = torch.empty(self.codes.shape, dtype=dtype)
        for here in _pieces(self.codes):
            values[here] = _values(self.codes[here], _at(self.grids, here[0]), self.scheme)
        return from_groups(values, self.shape, self.scheme)


def quantize(
    matrix: torch.Tensor, scheme: Scheme, *, clip: Clip | None = None, scale_dtype: torch.dtype | None = None
) -> Quantized:
    """Rounds each weight to the nearest value of its group's grid.

    Args:
        matrix: [rows, cols], any floating dtype; it is only read.
        scheme: which values, and which weights share them.
        clip: what is cut off before the range of a group is taken; clipped weights land on the end of the grid.
        scale_dtype: the dtype in which scales will be stored; codes are for scales rounded to it. Default: the matrix's own.

    Raises:
        UsageError: groups or tiles do not divide the matrix.
        NonFiniteWeightsError: a weight is NaN or infinite.

    Example:
        >>> matrix = torch.tensor([[0.1, -0.7, 0.2, 0.32]])
        >>> quantize(matrix, Scheme.parse("int4-row")).codes.tolist()
        [[1, -7, 2, 3]]
    """
    rows, cols = matrix.shape
    groups = to_groups(matrix, scheme)
    codes = torch.empty(groups.shape, dtype=torch.int16 if _is_wide(scheme) else torch.int8)
    bounds = None if clip is None else torch.stack(thresholds(groups, clip, scheme.bits))  # [below and above, groups]
    together = max(1, _PIECE // groups.shape[1])
    grids = []
    for first in range(0, len(groups), together):
        here = slice(first, first + together)
        cut = None if bounds is None else bounds[:, here]
        grids.append(_quantize_groups(groups[here], codes[here], scheme, cut, scale_dtype or matrix.dtype))
    scales = torch.cat([each.scales for each in grids])
    if not bool(scales.isfinite().all()):
        count = int((~matrix.isfinite()).sum())
        raise NonFiniteWeightsError(
            f"Quantizing a matrix of {rows} x {cols}: {count} {'weight is' if count == 1 else 'weights are'} NaN or infinite. "
            "The checkpoint is damaged: get it again, or leave this matrix out."
        )
    offsets = [each.offsets for each in grids if each.offsets is not None]
    return Quantized(scheme, (rows, cols), codes, Grids(scales, torch.cat(offsets) if offsets else None))


def _quantize_groups(
    groups: torch.Tensor, codes: torch.Tensor, scheme: Scheme, cut: torch.Tensor | None, scale_dtype: torch.dtype
) -> Grids:
    """Writes the codes of a few groups, or of one that is larger than a piece, and gives their grids."""
    first, *rest = torch.split(groups, _PIECE, 1)
    wide = first.to(torch.float32, copy=True)  # torch reduces float32 several times faster than 16 bits
    low, high = wide.amin(1), wide.amax(1)
    for part in rest:
        low, high = torch.minimum(low, part.float().amin(1)), torch.maximum(high, part.float().amax(1))
    if cut is not None:
        low, high = low.clamp(*cut), high.clamp(*cut)
    grids = _grids(low, high, scheme, scale_dtype)
    for number, (part, codes_of_part) in enumerate(zip([first, *rest], torch.split(codes, _PIECE, 1), strict=True)):
        weights = wide if number == 0 else part.to(torch.float32, copy=True)
        if cut is not None:
            weights.clamp_(low[:, None], high[:, None])
        _round(weights, grids, scheme, codes_of_part)
    return grids


def to_groups(matrix: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The weights by what shares a scale, [groups, size]; a view unless tiles make it a copy.

    Raises:
        UsageError: groups or tiles do not divide the matrix.
    """
    rows, cols = matrix.shape
    fault = scheme.fault(rows, cols)
    if fault:
        raise UsageError(f"Quantizing a matrix of {rows} x {cols} by {scheme}: {fault}.")
    if scheme.sharing == "tile":
        high, wide = scheme.size
        tiles = matrix.reshape(rows // high, high, cols // wide, wide).transpose(1, 2)
        return tiles.reshape(-1, high * wide)
    return matrix.reshape(-1, scheme.weights_per_scale(rows, cols))


def from_groups(groups: torch.Tensor, shape: tuple[int, int], scheme: Scheme) -> torch.Tensor:
    """The matrix of `to_groups` again."""
    rows, cols = shape
    if scheme.sharing == "tile":
        high, wide = scheme.size
        tiles = groups.reshape(rows // high, cols // wide, high, wide).transpose(1, 2)
        return tiles.reshape(rows, cols)
    return groups.reshape(rows, cols)


@cache
def normal_float(bits: int) -> torch.Tensor:
    """The values of NormalFloat, ascending, float32 [2^bits], from -1 to 1 with 0 among them.

    Source:
        Dettmers et al., arXiv 2305.14314, appendix E: quantiles of the normal distribution, half of them (and one more) above
        zero, half below, each half evenly spaced in probability up to 0.9677083.
    """
    half = 1 << (bits - 1)
    above = torch.special.ndtri(torch.linspace(0.9677083, 0.5, half + 1, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(0.9677083, 0.5, half, dtype=torch.float64)[:-1])
    values = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return (values / values.max()).float()


def _is_wide(scheme: Scheme) -> bool:
    """Whether codes do not fit in int8."""
    return scheme.bits == 8 and scheme.offset != "sym"


def _pieces(groups: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Cuts [groups, size] into pieces that stay in cache: several groups, or parts of one."""
    count, size = groups.shape
    together, part = max(1, _PIECE // size), max(1, min(size, _PIECE))
    for first in range(0, count, together):
        for start in range(0, size, part):
            yield slice(first, first + together), slice(start, start + part)


def _at(grids: Grids, groups: slice) -> Grids:
    return Grids(grids.scales[groups], None if grids.offsets is None else grids.offsets[groups])


def _grids(low: torch.Tensor, high: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Grids:
    steps = (1 << scheme.bits) - 1
    if scheme.offset == "sym":
        largest = torch.maximum(-low, high)
        top = 1 if scheme.kind == "nf" else (1 << (scheme.bits - 1)) - 1
        return Grids((largest / top).to(scale_dtype))
    if scheme.offset == "minmax":
        return Grids((high - low) / steps, low)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scales = ((high - low) / steps).to(scale_dtype)
    return Grids(scales, (-low / _divisor(scales)).round_().clamp_(0, steps).to(torch.int16))


def _divisor(scales: torch.Tensor) -> torch.Tensor:
    """Scales in float32, and 1 where there is none: a group of equal weights has no step."""
    wide = scales.float()
    return wide.masked_fill(wide == 0, 1)


def _round(weights: torch.Tensor, grids: Grids, scheme: Scheme, codes: torch.Tensor) -> None:
    """Writes codes of float32 weights [groups, size], which it uses up."""
    scales = _divisor(grids.scales)[:, None]
    if scheme.kind == "nf":
        table = normal_float(scheme.bits)
        codes.copy_(torch.bucketize(weights.div_(scales), (table[1:] + table[:-1]) / 2))
        return
    steps = (1 << scheme.bits) - 1
    if grids.offsets is None:
        top = steps // 2
        codes.copy_(weights.div_(scales).round_().clamp_(-top, top))
    elif scheme.offset == "asym":
        codes.copy_(weights.div_(scales).round_().add_(grids.offsets[:, None]).clamp_(0, steps))
    else:
        codes.copy_(weights.sub_(grids.offsets[:, None]).div_(scales).round_().clamp_(0, steps))


def _values(codes: torch.Tensor, grids: Grids, scheme: Scheme) -> torch.Tensor:
    """What codes [groups, size] stand for, float32."""
    scales = grids.scales.float()[:, None]
    if scheme.kind == "nf":
        return normal_float(scheme.bits)[codes.long()] * scales
    if grids.offsets is None:
        return codes.float().mul_(scales)
    if scheme.offset == "asym":
        return (codes - grids.offsets[:, None]).float().mul_(scales)
    return codes.float().mul_(scales).add_(grids.offsets[:, None])
