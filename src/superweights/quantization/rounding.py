"""Round to nearest: weights to codes on a grid of their own per group, and back.

The one idea: any way to share scales is a matrix of groups [groups, size] over the same weights. It is worked through in
pieces that stay in cache, on one thread; whoever has several cores takes several matrices at once.

What differs from the paper's code: it works in place in the weights' own dtype (float16), here all arithmetic is in float32
and rounded once at the end; it divides by zero where the weights of a block are equal, here they keep their value; and it
stretches NormalFloat from the least to the largest weight, here -1 and 1 stand for the largest |weight|.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial

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
    """What a step of a code is worth, in the dtype in which it is stored; of minmax, which no file stores, float32."""
    offsets: torch.Tensor | None = None
    """asym: the code of zero, int16. minmax: the value of code zero, float32. None for sym and signed."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix as codes and grids."""

    scheme: Scheme
    shape: tuple[int, int]
    """Rows and cols."""
    codes: torch.Tensor
    """int16 [groups, size] for 8 bits with an offset, else int8. sym and signed: steps with a sign; asym and minmax: 0 to
    2^bits - 1; nf: place in `normal_float(bits)`."""
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
        UsageError: groups or tiles do not divide the matrix, or a scale does not fit in `scale_dtype`.
        NonFiniteWeightsError: a weight is NaN or infinite.

    Example:
        >>> matrix = torch.tensor([[0.1, -0.7, 0.2, 0.32]])
        >>> quantize(matrix, Scheme.parse("int4-row")).codes.tolist()
        [[1, -7, 2, 3]]
    """
    rows, cols = matrix.shape
    groups, scale_dtype = to_groups(matrix.detach(), scheme), scale_dtype or matrix.dtype
    codes = torch.empty(groups.shape, dtype=_code_dtype(scheme))
    error = partial(_squared_error, scheme=scheme, scale_dtype=scale_dtype)
    bounds = None if clip is None else torch.stack(thresholds(groups, clip, error))  # [below and above, groups]
    together = max(1, _PIECE // groups.shape[1])
    grids = []
    for first in range(0, len(groups), together):
        here = slice(first, first + together)
        cut = None if bounds is None else bounds[:, here]
        grids.append(_quantize_groups(groups[here], codes[here], scheme, cut, scale_dtype))
    scales = torch.cat([each.scales for each in grids])
    if not bool(scales.float().isfinite().all()):
        raise _no_scale(matrix, scales.dtype)
    offsets = [each.offsets for each in grids if each.offsets is not None]
    return Quantized(scheme, (rows, cols), codes, Grids(scales, torch.cat(offsets) if offsets else None))


def _no_scale(matrix: torch.Tensor, scale_dtype: torch.dtype) -> NonFiniteWeightsError | UsageError:
    """Why a scale is not finite."""
    doing = f"Quantizing a matrix of {matrix.shape[0]} x {matrix.shape[1]}"
    count = int((~matrix.float().isfinite()).sum())
    if count:
        return NonFiniteWeightsError(
            f"{doing}: {count} {'weight is' if count == 1 else 'weights are'} NaN or infinite. "
            "The checkpoint is damaged: get it again, or leave this matrix out."
        )
    return UsageError(
        f"{doing}: weights of up to {float(matrix.float().abs().amax()):g} need a scale that does not fit in {scale_dtype}. "
        "Store scales in a wider dtype, or leave this matrix out."
    )


def _quantize_groups(
    groups: torch.Tensor, codes: torch.Tensor, scheme: Scheme, cut: torch.Tensor | None, scale_dtype: torch.dtype
) -> Grids:
    """Writes the codes of a few groups, or of one that is larger than a piece, and gives their grids."""
    first, *rest = torch.split(groups, _PIECE, 1)
    wide = first.to(torch.float32, copy=True)  # torch reduces float32 several times faster than 16 bits
    low, high = wide.amin(1), wide.amax(1)
    for part in rest:
        low, high = torch.minimum(low, part.float().amin(1)), torch.maximum(high, part.float().amax(1))
    if cut is not None:  # an infinite weight must not be cut off: it would pass unseen
        low, high = low.clamp(*cut).where(low.isfinite(), low), high.clamp(*cut).where(high.isfinite(), high)
    grids = _grids(low, high, scheme, scale_dtype)
    for number, (part, codes_of_part) in enumerate(zip([first, *rest], torch.split(codes, _PIECE, 1), strict=True)):
        weights = wide if number == 0 else part.to(torch.float32, copy=True)
        if cut is not None:
            weights.clamp_(low[:, None], high[:, None])
        _round(weights, grids, scheme, codes_of_part)
    return grids


def _squared_error(
    groups: torch.Tensor, cut: torch.Tensor, *, scheme: Scheme, scale_dtype: torch.dtype
) -> torch.Tensor:
    """Of rounding float32 groups whose |weights| are cut off at [groups]: float32 [groups]."""
    weights = groups.clamp(-cut[:, None], cut[:, None])
    grids = _grids(weights.amin(1), weights.amax(1), scheme, scale_dtype)
    codes = torch.empty(groups.shape, dtype=_code_dtype(scheme))
    _round(weights, grids, scheme, codes)
    return _values(codes, grids, scheme).sub_(groups).square_().sum(1)


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
    """The matrix of `to_groups` again, contiguous."""
    rows, cols = shape
    if scheme.sharing == "tile":
        high, wide = scheme.size
        tiles = groups.reshape(rows // high, cols // wide, high, wide).transpose(1, 2)
        return tiles.reshape(rows, cols).contiguous()  # of tiles as high as the matrix, reshape gives a view
    return groups.reshape(rows, cols)


@cache
def normal_float(bits: int) -> torch.Tensor:
    """The values of NormalFloat, ascending, float32 [2^bits], from -1 to 1 with 0 among them.

    Source:
        Dettmers et al., arXiv 2305.14314, appendix E: quantiles of the normal distribution, half of them (and one more) above
        zero, half below, each half evenly spaced in probability up to 1 - (1/(2^bits - 1) + 1/2^bits) / 4. With the digits
        that bitsandbytes takes for 4 bits, the tables are the published ones to the bit.
    """
    half, end = 1 << (bits - 1), {3: 209 / 224, 4: 0.9677083}[bits]

    def quantiles(count: int) -> torch.Tensor:
        found: torch.Tensor = torch.special.ndtri(torch.linspace(end, 0.5, count + 1)[:-1].double())
        return found.float()

    values = torch.cat([-quantiles(half - 1), torch.zeros(1), quantiles(half)]).sort().values
    return values / values.max()


def _code_dtype(scheme: Scheme) -> torch.dtype:
    return torch.int16 if scheme.bits == 8 and scheme.offset in ("asym", "minmax") else torch.int8


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
    if scheme.offset == "signed":
        extreme = torch.where(-low > high, low, high)
        return Grids((extreme / -(1 << (scheme.bits - 1))).to(scale_dtype))
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
        weights.div_(scales)
        codes.zero_()
        for middle in ((table[1:] + table[:-1]) / 2).tolist():  # twice as fast as torch.bucketize
            codes.add_(weights > middle)
        return
    steps = (1 << scheme.bits) - 1
    if grids.offsets is None:
        top = steps // 2
        bottom = -top if scheme.offset == "sym" else -top - 1
        codes.copy_(weights.div_(scales).round_().clamp_(bottom, top))
    elif scheme.offset == "asym":
        codes.copy_(weights.div_(scales).round_().add_(grids.offsets[:, None]).clamp_(0, steps))
    else:
        codes.copy_(weights.sub_(grids.offsets[:, None]).div_(scales).round_().clamp_(0, steps))


def _values(codes: torch.Tensor, grids: Grids, scheme: Scheme) -> torch.Tensor:
    """What codes [groups, size] stand for, float32."""
    scales = grids.scales.float()[:, None]
    if scheme.kind == "nf":
        return normal_float(scheme.bits).index_select(0, codes.int().flatten()).view(codes.shape).mul_(scales)
    if grids.offsets is None:
        return codes.float().mul_(scales)
    if scheme.offset == "asym":
        return (codes - grids.offsets[:, None]).float().mul_(scales)
    return codes.float().mul_(scales).add_(grids.offsets[:, None])
