"""One weight of a checkpoint and what stands around it, from the file's bytes."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from superweights.checkpoint import Checkpoint, StoredScalar
from superweights.checkpoint.stored_projection import StoredProjection
from superweights.coordinates import Coordinate

_REACH = 3
"""Neighbours on each side."""


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight, its place in the file, and its size among the weights of its matrix."""

    coordinate: Coordinate
    """Where it is in the model."""
    projection: StoredProjection
    """The tensor that holds it."""
    index: tuple[int, ...]
    """Where it is in the tensor as stored."""
    value: float
    """Its value; for a packed one, what its code and scales stand for."""
    scalar: StoredScalar | None
    """Its bits and their place in the file; None for one that is packed."""
    packed: "PackedPlace | None"
    """Where it is on its grid; None for one that is stored plain."""
    rank: int | None
    """1 + the number of weights in the matrix that are larger in absolute value; None for NaN."""
    count: int
    """Weights in the matrix."""
    non_finite: int
    """NaN and infinite weights in the matrix; the numbers below are over the others."""
    largest: float
    """Largest absolute value in the matrix."""
    z_score: float | None
    """Distance of the value from the matrix's mean, in standard deviations; None where they are zero."""
    row_neighbours: dict[int, float]
    """The same row: value by col, itself included."""
    col_neighbours: dict[int, float]
    """The same column: value by row, itself included."""


@dataclass(frozen=True, slots=True)
class PackedPlace:
    """One weight of a packed matrix on its grid."""

    format: str
    """What packed it, such as "gptq"; a plain number format where only the order of the file is another."""
    step: float | None = None
    """Distance to the next value; None where a weight has no grid of its own."""
    at_end: bool | None = None
    """Whether it is the first or the last value of its grid."""
    shared: int | None = None
    """How many weights share its scale, itself included."""


def read_stored_weight(checkpoint: Checkpoint, projection: StoredProjection, coordinate: Coordinate) -> StoredWeight:
    """Reads a weight and its whole matrix, a few rows at a time where it is stored plain.

    Raises:
        CoordinateError: row or col is outside; the message gives the valid range.
    """
    if checkpoint.is_packed(projection.tensor):
        return _read_packed(checkpoint, projection, coordinate)
    index = projection.index(coordinate)
    scalar = checkpoint.read_scalar(projection.tensor, index)
    chunks = (rows for _, rows in checkpoint.iter_rows(projection.tensor, prefix=index[:-2]))

    def at(row: int, col: int) -> float:
        there = Coordinate(coordinate.layer, coordinate.expert, row, col)
        return checkpoint.read_scalar(projection.tensor, projection.index(there)).value

    return _described(coordinate, projection, scalar, None, chunks, at)


def _read_packed(checkpoint: Checkpoint, projection: StoredProjection, coordinate: Coordinate) -> StoredWeight:
    projection.index(coordinate)  # refuses what is outside
    matrix, place = _dequantized(checkpoint, projection, coordinate)
    return _described(coordinate, projection, None, place, [matrix], lambda row, col: float(matrix[row, col]))


def _dequantized(
    checkpoint: Checkpoint, projection: StoredProjection, coordinate: Coordinate
) -> tuple[npt.NDArray[np.float32], PackedPlace]:
    """The matrix that holds a weight, [rows, cols], and where the weight is on its grid."""
    row, col = coordinate.row, coordinate.col
    found = checkpoint.packed_matrix(projection.tensor)
    if found is None:
        values = checkpoint.view(projection.tensor)
        matrix: npt.NDArray[np.float32] = (values.t() if projection.transposed else values).float().numpy()
        return matrix, PackedPlace(checkpoint.stored_as(projection.tensor))
    step = found.step(row, col)
    at_end = None if step is None else bool(found.at_end[row, col])
    place = PackedPlace(found.format, step, at_end, int(found.block(row, col).sum()))
    return found.weights.numpy(), place


def _described(
    coordinate: Coordinate,
    projection: StoredProjection,
    scalar: StoredScalar | None,
    packed: PackedPlace | None,
    chunks: Iterable[npt.NDArray[np.float32]],
    at: Callable[[int, int], float],
) -> StoredWeight:
    row, col = coordinate.row, coordinate.col
    value = at(row, col)
    sizes = _sizes(chunks, value)
    return StoredWeight(
        coordinate=coordinate,
        projection=projection,
        index=projection.index(coordinate),
        value=value,
        scalar=scalar,
        packed=packed,
        rank=None if math.isnan(value) else 1 + sizes.larger,
        count=projection.rows * projection.cols,
        non_finite=sizes.non_finite,
        largest=sizes.largest,
        z_score=(value - sizes.mean) / sizes.std if sizes.std > 0 and math.isfinite(value) else None,
        row_neighbours={each: at(row, each) for each in _around(col, projection.cols)},
        col_neighbours={each: at(each, col) for each in _around(row, projection.rows)},
    )


@dataclass(frozen=True, slots=True)
class _Sizes:
    larger: int
    non_finite: int
    largest: float
    mean: float
    std: float


def _sizes(chunks: Iterable[npt.NDArray[np.float32]], value: float) -> _Sizes:
    larger = finite = non_finite = 0
    largest = total = squares = 0.0
    for rows in chunks:
        numbers = rows[np.isfinite(rows)]  # [finite weights of the chunk]
        larger += int(np.count_nonzero(np.abs(rows) > abs(np.float32(value))))
        finite += numbers.size
        non_finite += rows.size - numbers.size
        largest = max(largest, float(np.abs(numbers).max(initial=0.0)))
        total += float(numbers.sum(dtype=np.float64))
        squares += float(np.square(numbers, dtype=np.float64).sum())
    mean = total / max(finite, 1)
    return _Sizes(larger, non_finite, largest, mean, math.sqrt(max(squares / max(finite, 1) - mean * mean, 0.0)))


def _around(position: int, length: int) -> range:
    return range(max(position - _REACH, 0), min(position + _REACH + 1, length))
