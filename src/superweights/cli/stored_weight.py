"""One weight of a checkpoint and what stands around it, from the file's bytes."""

import math
from dataclasses import dataclass

import numpy as np

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
    scalar: StoredScalar
    """Its value, its bits and its place in the file."""
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


def read_stored_weight(checkpoint: Checkpoint, projection: StoredProjection, coordinate: Coordinate) -> StoredWeight:
    """Reads a weight and its whole matrix, a few rows at a time.

    Raises:
        CoordinateError: row or col is outside; the message gives the valid range.
    """
    index = projection.index(coordinate)
    scalar = checkpoint.read_scalar(projection.tensor, index)
    sizes = _read_sizes(checkpoint, projection.tensor, prefix=index[:-2], value=scalar.value)
    return StoredWeight(
        coordinate=coordinate,
        projection=projection,
        index=index,
        scalar=scalar,
        rank=None if math.isnan(scalar.value) else 1 + sizes.larger,
        count=projection.rows * projection.cols,
        non_finite=sizes.non_finite,
        largest=sizes.largest,
        z_score=(scalar.value - sizes.mean) / sizes.std if sizes.std > 0 and math.isfinite(scalar.value) else None,
        row_neighbours={
            col: _read_at(checkpoint, projection, coordinate, row=coordinate.row, col=col)
            for col in _around(coordinate.col, projection.cols)
        },
        col_neighbours={
            row: _read_at(checkpoint, projection, coordinate, row=row, col=coordinate.col)
            for row in _around(coordinate.row, projection.rows)
        },
    )


@dataclass(frozen=True, slots=True)
class _Sizes:
    larger: int
    non_finite: int
    largest: float
    mean: float
    std: float


def _read_sizes(checkpoint: Checkpoint, tensor: str, *, prefix: tuple[int, ...], value: float) -> _Sizes:
    larger = finite = non_finite = 0
    largest = total = squares = 0.0
    for _, rows in checkpoint.iter_rows(tensor, prefix=prefix):
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


def _read_at(
    checkpoint: Checkpoint, projection: StoredProjection, coordinate: Coordinate, *, row: int, col: int
) -> float:
    place = Coordinate(coordinate.layer, coordinate.expert, row, col)
    return checkpoint.read_scalar(projection.tensor, projection.index(place)).value
