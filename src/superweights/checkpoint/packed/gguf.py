"""GGUF: blocks of consecutive weights of a row, each with its own scale, in some thirty types that can be mixed in one file.

The package gguf turns blocks into values. The one idea here: it gives the grid as well. A block whose codes are all set to one
code dequantizes to what that code stands for at each place, scales of scales and minima included, so no layout of scales has to
be known here, only which bytes of a block are codes.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from superweights.checkpoint.packed.grids import PackedMatrix
from superweights.errors import QuantizedCheckpointError, UsageError

_PIECE_BYTES = 1 << 20
"""Bytes of blocks that one thread dequantizes at a time."""
PLAIN = {"F32": "F32", "F16": "F16", "BF16": "BF16", "F64": "F64"}
"""GGUF types whose values are stored one by one, and their names in safetensors."""


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Which bytes of a block are codes, and what they can be."""

    spans: tuple[tuple[int, int], ...]
    """First byte and end of each run of codes."""
    bits: float
    """Bits of a code."""
    shared: int
    """Consecutive weights that share a scale."""
    fills: tuple[int, ...]
    """Bytes that set all codes of a block to one code. Two: the first and the last code of an even grid."""
    codes: int = 0
    """How many codes an even grid has."""


_NIBBLES = tuple(17 * code for code in range(16))
_ALL = (0x00, 0xFF)
_TYPES = {
    "Q4_0": _Blocks(((2, 18),), 4, 32, _ALL, 16),
    "Q4_1": _Blocks(((4, 20),), 4, 32, _ALL, 16),
    "Q5_0": _Blocks(((2, 22),), 5, 32, _ALL, 32),
    "Q5_1": _Blocks(((4, 24),), 5, 32, _ALL, 32),
    "Q8_0": _Blocks(((2, 34),), 8, 32, (0x81, 0x7F), 255),  # writers leave -128 out
    "Q2_K": _Blocks(((16, 80),), 2, 16, _ALL, 4),
    "Q3_K": _Blocks(((0, 96),), 3, 16, _ALL, 8),
    "Q4_K": _Blocks(((16, 144),), 4, 32, _ALL, 16),
    "Q5_K": _Blocks(((16, 176),), 5, 32, _ALL, 32),
    "Q6_K": _Blocks(((0, 192),), 6, 16, _ALL, 64),
    "IQ4_NL": _Blocks(((2, 18),), 4, 32, _NIBBLES),
    "IQ4_XS": _Blocks(((8, 136),), 4, 32, _NIBBLES),
    "MXFP4": _Blocks(((1, 17),), 4, 32, _NIBBLES),
    "NVFP4": _Blocks(((4, 36),), 4, 16, _NIBBLES),
    "TQ1_0": _Blocks(((0, 52),), 1.6875, 256, (0x00, 0xFF), 3),
    "TQ2_0": _Blocks(((0, 64),), 2, 256, (0x00, 0xAA), 3),
}
"""Types whose codes stand for one weight each."""
_CODEBOOKS = {
    "IQ1_S": (1.5625, 32), "IQ1_M": (1.75, 16), "IQ2_XXS": (2.0625, 32), "IQ2_XS": (2.3125, 16), "IQ2_S": (2.5625, 16),
    "IQ3_XXS": (3.0625, 32), "IQ3_S": (3.4375, 32),
}  # fmt: skip
"""Types whose codes stand for several weights together, so that a single one has no grid: bits, and weights of a scale."""


def gguf_package() -> Any:
    """The package that reads and writes GGUF files.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return import_module("gguf")
    except ModuleNotFoundError as error:
        raise UsageError(
            "GGUF files need the package gguf, which is not installed: `pip install superweights[gguf]`."
        ) from error


def dequantize_blocks(blocks: npt.NDArray[Any], kind: str, *, what: str) -> npt.NDArray[np.float32]:
    """The values of some rows.

    Args:
        blocks: [.., bytes of a row], uint8; values themselves for F32 and F16.
        kind: the type, such as "Q4_K".
        what: the tensor, for messages.

    Returns:
        Float32 [.., cols].

    Raises:
        QuantizedCheckpointError: the package cannot dequantize this type.
    """
    rows = blocks.reshape(-1, blocks.shape[-1])
    step = max(1, _PIECE_BYTES // rows.shape[1])
    pieces = [rows[first : first + step] for first in range(0, len(rows), step)]
    threads = min(torch.get_num_threads(), len(pieces))
    if threads <= 1:
        return _dequantized(blocks, kind, what)
    with ThreadPoolExecutor(threads) as pool:  # numpy works on a piece without holding the interpreter's lock
        found = list(pool.map(lambda piece: _dequantized(piece, kind, what), pieces))
    return np.concatenate(found).reshape(*blocks.shape[:-1], -1)


def _dequantized(blocks: npt.NDArray[Any], kind: str, what: str) -> npt.NDArray[np.float32]:
    package = gguf_package()
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            found = package.dequantize(blocks, package.GGMLQuantizationType[kind])
    except NotImplementedError as error:
        raise QuantizedCheckpointError(
            f"Reading {what}, of the GGUF type {kind}: the package gguf does not dequantize it. Try a newer one."
        ) from error
    values: npt.NDArray[np.float32] = np.asarray(found, dtype=np.float32)
    return values


def read_blocks(blocks: npt.NDArray[np.uint8], kind: str, *, module: str) -> PackedMatrix:
    """A matrix and its grid.

    Args:
        blocks: [rows, bytes of a row].
        kind: the type, such as "Q4_K".
        module: the linear layer, such as model.layers.2.mlp.down_proj.

    Raises:
        QuantizedCheckpointError: the type is not read.
    """
    weights = dequantize_blocks(blocks, kind, what=module)
    if kind in _CODEBOOKS:
        bits, shared = _CODEBOOKS[kind]
        none = torch.zeros(weights.shape, dtype=torch.bool)
        unknown = torch.full((1, 1), torch.nan)
        return PackedMatrix(module, f"gguf {kind}", bits, torch.from_numpy(weights), unknown, none, (1, shared))
    if kind not in _TYPES:
        raise QuantizedCheckpointError(
            f"Reading {module}, of the GGUF type {kind}: read are {', '.join([*PLAIN, *_TYPES, *_CODEBOOKS])}. "
            "docs/packed-formats.md says more."
        )
    layout = _TYPES[kind]
    grid = [_filled(blocks, kind, layout, fill, module) for fill in layout.fills]
    with np.errstate(invalid="ignore", over="ignore"):  # a scale that is no number
        steps = np.abs(grid[1] - grid[0]) / (layout.codes - 1) if layout.codes else _wider_gaps(weights, grid)
    at_end = (weights == np.minimum.reduce(grid)) | (weights == np.maximum.reduce(grid))
    return PackedMatrix(
        module,
        f"gguf {kind}",
        layout.bits,
        torch.from_numpy(weights),
        torch.from_numpy(steps),
        torch.from_numpy(at_end),
        (1, layout.shared),
    )


def _filled(
    blocks: npt.NDArray[np.uint8], kind: str, layout: _Blocks, fill: int, module: str
) -> npt.NDArray[np.float32]:
    """What one code stands for at each place."""
    size = gguf_package().GGML_QUANT_SIZES[gguf_package().GGMLQuantizationType[kind]][1]
    changed = blocks.reshape(-1, size).copy()
    for start, end in layout.spans:
        changed[:, start:end] = fill
    return dequantize_blocks(changed.reshape(blocks.shape), kind, what=module)


def _wider_gaps(weights: npt.NDArray[np.float32], grid: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    """The wider of the gaps to the two neighbours on an uneven grid."""
    below = np.full_like(weights, -np.inf)
    above = np.full_like(weights, np.inf)
    for values in grid:
        np.maximum(below, np.where(values < weights, values, -np.inf), out=below)
        np.minimum(above, np.where(values > weights, values, np.inf), out=above)
    gaps = np.stack([weights - below, above - weights])
    gaps[~np.isfinite(gaps)] = 0
    wider: npt.NDArray[np.float32] = gaps.max(0)
    return wider
