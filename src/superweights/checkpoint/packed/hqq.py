"""HQQ, as transformers 4 saves it (transformers 5 does not): every property of a layer is a tensor.

    W_q           the matrix cut into groups and laid out as [groups, size] (axis 1) or [size, groups] (axis 0), whose first
                  rows share words with later ones, the first in the highest bits
    scale, zero   float [groups, 1] or [1, groups]
    nbits, group_size, axis, shape, packing, view_as_float

Source:
    hqq 0.2.8, core/quantize.py and core/bitpack.py.
"""

import torch

from superweights.checkpoint.packed.codes import stacked
from superweights.checkpoint.packed.grids import PackedMatrix, Scales, even_grid, runs, tiles
from superweights.checkpoint.packed.stored import FLOATS, StoredModule

_BITS = {"8bit_u8": 8, "4bit_u8": 4, "3bit_32": 3, "2bit_u8": 2, "1bit_u8": 1}
"""Bits that a code takes, by the name of the packing."""


def read(stored: StoredModule) -> PackedMatrix | None:
    """Reads a module; None where it is plain."""
    if not stored.packed_as("W_q", "scale", "zero", "nbits", "axis", "shape", "packing"):
        stored.plain()
        return None
    for part in ("quant_scale", "quant_zero"):
        if stored.has(part) and int(stored.tensor(part, ("U8",), ())):
            raise stored.unread(f"its scales are quantized themselves ({part})")
    rows, cols = (int(each) for each in stored.tensor("shape", ("I64", "I32"), (2,)).tolist())
    bits, axis = float(stored.tensor("nbits", ("I32", "F32"), ())), int(stored.tensor("axis", ("I32",), ()))
    size = int(stored.tensor("group_size", ("I32",), ())) if stored.has("group_size") else (rows, cols)[axis == 1]
    if axis not in (0, 1) or min(rows, cols, size) < 1 or rows * cols % size:
        raise stored.malformed(f"its {rows} x {cols} weights are no groups of {size} along axis {axis}")
    groups = rows * cols // size
    codes = _codes(stored, (size, groups) if axis == 0 else (groups, size)).reshape(rows, cols)
    wanted = (1, groups) if axis == 0 else (groups, 1)
    scales, zeros = (stored.tensor(part, FLOATS, wanted).flatten() for part in ("scale", "zero"))
    spread_scales, spread_zeros = (_spread(each, (rows, cols), size, axis) for each in (scales, zeros))
    return even_grid(
        stored.name, "hqq", bits, codes, spread_scales, zeros=spread_zeros.values, ends=(0, round(2**bits) - 1)
    )


def _codes(stored: StoredModule, shape: tuple[int, int]) -> torch.Tensor:
    """uint8 of the shape in which groups are laid out."""
    letters = stored.tensor("packing", ("U8",), (None,)).tolist()
    packing = bytes(letters).decode("ascii", "replace")
    if packing not in _BITS:
        raise stored.unread(f"its packing is {packing!r}; read: {', '.join(_BITS)}")
    wide = packing == "3bit_32"
    packed = stored.tensor("W_q", ("I32", "F32") if wide else ("U8", "F32", "F16", "BF16"), (None, None))
    packed = packed.view(torch.int32 if wide else torch.uint8)
    codes = stacked(packed, _BITS[packing], lowest_first=False)
    if codes.shape[1] != shape[1] or not shape[0] <= len(codes) < shape[0] + 10:
        raise stored.malformed(
            f"W_q holds {len(codes)} x {codes.shape[1]} codes, where {shape[0]} x {shape[1]} are expected"
        )
    return codes[: shape[0]]


def _spread(values: torch.Tensor, shape: tuple[int, int], size: int, axis: int) -> Scales:
    if axis == 1:
        return runs(values, shape, size)
    rows, cols = shape
    if len(values) == cols:
        return tiles(values.reshape(1, -1), shape, (rows, 1))
    blocks = (torch.arange(rows * cols, dtype=torch.int32) % len(values)).reshape(shape)
    return Scales(values.float()[blocks], (size, 1), blocks)
