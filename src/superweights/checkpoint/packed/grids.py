"""What a packed matrix is once it is read: values on a grid, and how fine the grid is at each of them.

Values are computed in float32 from the codes and scales as stored. The package that wrote them may round its own once more, to
float16 or bfloat16.
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PackedMatrix:
    """One matrix, read from the codes of a quantizer."""

    module: str
    """Name of the linear layer, such as model.layers.2.mlp.down_proj."""
    format: str
    """What packed it, such as "gptq" or "bitsandbytes nf4"."""
    bits: float
    """Bits of a code."""
    weights: torch.Tensor
    """The dequantized values, float32 [rows, cols]; row = output channel."""
    steps: torch.Tensor
    """Distance to the next value of the grid at each weight, float32, broadcastable to [rows, cols]. Where the grid is uneven
    it is the wider of the two gaps, so that rounding to nearest is never off by more than half a step."""
    at_end: torch.Tensor
    """Bool [rows, cols]: the code is the first or the last of its grid."""
    shared: tuple[int, int]
    """Rows and cols of the block of weights that shares a scale."""
    blocks: torch.Tensor | None = None
    """Number of each weight's block, integers broadcastable to [rows, cols], where a block is not a tile of `shared` (columns
    in another order, blocks that run over the end of a row); None where blocks are tiles, from the top left."""

    def step(self, row: int, col: int) -> float | None:
        """The step at one weight; None where it has no grid of its own."""
        step = float(self.steps.expand(self.weights.shape)[row, col])
        return step if math.isfinite(step) else None

    def block(self, row: int, col: int) -> torch.Tensor:
        """The weights that share a scale with one weight.

        Returns:
            Bool [rows, cols]; the weight itself is among them.
        """
        if self.blocks is not None:
            blocks = self.blocks.expand(self.weights.shape)
            return blocks == blocks[row, col]
        found = torch.zeros(self.weights.shape, dtype=torch.bool)
        (high, wide), (top, left) = self.shared, (row // self.shared[0], col // self.shared[1])
        found[top * high : (top + 1) * high, left * wide : (left + 1) * wide] = True
        return found


@dataclass(frozen=True)
class Scales:
    """What belongs to the blocks of a matrix, spread over its weights."""

    values: torch.Tensor
    """The scale of each weight, float32, broadcastable to [rows, cols]."""
    shared: tuple[int, int]
    """As in `PackedMatrix`."""
    blocks: torch.Tensor | None = None
    """As in `PackedMatrix`."""


def even_grid(
    module: str,
    format: str,
    bits: float,
    codes: torch.Tensor,
    scales: Scales,
    *,
    zeros: torch.Tensor | None = None,
    ends: tuple[int, int],
) -> PackedMatrix:
    """Values scale * (code - zero).

    Args:
        module, format, bits: as in `PackedMatrix`.
        codes: [rows, cols], an integer dtype.
        scales: step of the grid at each weight.
        zeros: the code, whole or not, that stands for 0, broadcastable to [rows, cols].
        ends: the first and the last code.
    """
    weights = codes.float()
    if zeros is not None:
        weights -= zeros
    weights *= scales.values
    at_end = (codes == ends[0]) | (codes == ends[1])
    return PackedMatrix(module, format, bits, weights, scales.values.abs(), at_end, scales.shared, scales.blocks)


def table_grid(
    module: str, format: str, bits: float, codes: torch.Tensor, scales: Scales, *, table: torch.Tensor
) -> PackedMatrix:
    """Values scale * table[code].

    Args:
        module, format, bits: as in `PackedMatrix`.
        codes: [rows, cols], uint8.
        scales: factor of each weight.
        table: float32 [codes], the value that each code stands for; NaN and infinity are no part of the grid.
    """
    at = codes.int()  # an index of one byte would be taken for a mask
    finite = table[table.isfinite()]
    grid = torch.tensor(sorted(set(finite.tolist())))
    gaps = torch.nn.functional.pad(grid.diff(), (1, 1))  # one more at each end, of width 0
    wider = torch.maximum(gaps[:-1], gaps[1:])
    steps = torch.full_like(table, torch.nan)
    steps[table.isfinite()] = wider[torch.searchsorted(grid, finite)]
    ends = (table == grid[0]) | (table == grid[-1])
    return PackedMatrix(
        module, format, bits, table[at] * scales.values, steps[at] * scales.values.abs(), ends[at], scales.shared, scales.blocks
    )  # fmt: skip


def spread(values: torch.Tensor, shape: tuple[int, int], block: tuple[int, int]) -> torch.Tensor:
    """One value per block, for each weight.

    Args:
        values: [rows / high, cols / wide], both rounded up; where an axis has length 1 it stays.
        shape: of the matrix.
        block: high and wide, rows and cols of a block.

    Example:
        >>> spread(torch.tensor([[1.0, 2.0]]), (4, 5), (4, 3))
        tensor([[1., 1., 1., 2., 2.]])
    """
    for axis in (0, 1):
        if values.shape[axis] > 1 and block[axis] > 1:
            values = values.repeat_interleave(block[axis], axis).narrow(axis, 0, shape[axis])
    return values


def tiles(values: torch.Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Scales:
    """Scales of blocks that are tiles; the arguments are those of `spread`, values of any dtype."""
    return Scales(spread(values.float(), shape, block), (min(block[0], shape[0]), min(block[1], shape[1])))


def runs(values: torch.Tensor, shape: tuple[int, int], size: int) -> Scales:
    """Scales of blocks that are so many consecutive weights, row by row.

    Args:
        values: [blocks], any dtype.
        shape: of the matrix.
        size: weights of a block; the last one may be shorter.
    """
    rows, cols = shape
    if cols % size == 0:
        return tiles(values.reshape(rows, -1), shape, (1, size))
    if size % cols == 0:
        return tiles(values.reshape(-1, 1), shape, (size // cols, cols))
    blocks = (torch.arange(rows * cols, dtype=torch.int32) // size).reshape(shape)
    return Scales(values.float()[blocks], (1, size), blocks)


def signed_ends(codes: torch.Tensor, bits: int, *, symmetric: bool) -> tuple[int, int]:
    """First and last code of a signed grid.

    Some quantizers use all 2^bits codes of a symmetric grid, others leave the lowest out so that both sides are alike; a matrix
    without any lowest code is taken for one of the second kind.

    Example:
        >>> signed_ends(torch.tensor([[-7, 3]]), 4, symmetric=True)
        (-7, 7)
    """
    half = 1 << (bits - 1)
    narrow = symmetric and not bool((codes == -half).any())
    return (1 - half if narrow else -half), half - 1
