"""bitsandbytes: nf4 and fp4, with or without quantized scales, and int8.

    weight                     4-bit codes, two per byte, the upper half first, in any dtype
    weight.absmax              float [blocks], or uint8 codes of it with nested_absmax and nested_quant_map
    weight.quant_map           float [16], the value of each code
    weight.quant_state.*       JSON as bytes: shape, weights per block, what the scales were less

    weight, SCB                int8 [rows, cols] and float [rows], the largest |weight| of each row

Source:
    bitsandbytes 0.50, functional.py: QuantState, dequantize_4bit, int8_vectorwise_dequant.
"""

from typing import Any

import torch

from superweights.checkpoint.header import load_json
from superweights.checkpoint.packed.codes import high_half_first
from superweights.checkpoint.packed.grids import PackedMatrix, even_grid, runs, table_grid, tiles
from superweights.checkpoint.packed.stored import FLOATS, StoredModule

_STATE = "weight.quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")


def read(stored: StoredModule) -> PackedMatrix | None:
    """Reads a module; None where it is plain."""
    if stored.has("SCB"):
        return _read_int8(stored)
    kind = next((each for each in _KINDS if stored.has(_STATE + each)), None)
    if stored.packed_as("weight.absmax", "weight.quant_map", _STATE + (kind or "nf4")):
        return _read_4bit(stored, str(kind))
    stored.plain()
    return None


def _read_int8(stored: StoredModule) -> PackedMatrix:
    if stored.has("weight_format"):
        layout = int(stored.tensor("weight_format", ("U8",), ()))
        if layout != 0:
            raise stored.unread(f"its weight_format is {layout}, the order of one GPU; read: 0, row by row")
    codes = stored.tensor("weight", ("I8",), (None, None))
    rows, cols = codes.shape
    largest = stored.tensor("SCB", FLOATS, (rows,))
    scales = tiles(largest.float()[:, None] / 127, (rows, cols), (1, cols))
    return even_grid(stored.name, "bitsandbytes int8", 8, codes, scales, ends=(-127, 127))


def _read_4bit(stored: StoredModule, kind: str) -> PackedMatrix:
    state = load_json(
        bytes(stored.tensor(_STATE + kind, ("U8",), (None,)).tolist()), file=f"{stored.name}.{_STATE}{kind}"
    )
    shape, size = state.get("shape"), _number(stored, state, "blocksize")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(each) is int and each > 0 for each in shape):
        raise stored.malformed(f"its quant_state says the shape {shape!r}, which is no matrix")
    rows, cols = shape
    packed = high_half_first(stored.tensor("weight", ("U8", "F32", "F16", "BF16", "I8")))
    if not 0 <= len(packed) - rows * cols <= 8:  # one code of padding, and up to three bytes where a word holds more
        raise stored.malformed(f"its weight has {len(packed)} codes for {rows} rows of {cols}")
    absmax = _absmax(stored, state, -(-rows * cols // size))
    table = stored.tensor("weight.quant_map", ("F32",), (16,)).clone()
    codes = packed[: rows * cols].reshape(rows, cols)
    return table_grid(stored.name, f"bitsandbytes {kind}", 4, codes, runs(absmax, (rows, cols), size), table=table)


def _absmax(stored: StoredModule, state: dict[str, Any], blocks: int) -> torch.Tensor:
    """The largest |weight| of each block, float32 [blocks]."""
    if not stored.has("weight.nested_absmax"):
        return stored.tensor("weight.absmax", ("F32",), (blocks,)).float()
    size, offset = _number(stored, state, "nested_blocksize"), state.get("nested_offset")
    if not isinstance(offset, float | int) or isinstance(offset, bool):
        raise stored.malformed(f"its quant_state has the nested_offset {offset!r}")
    codes = stored.tensor("weight.absmax", ("U8",), (blocks,))
    table = stored.tensor("weight.nested_quant_map", ("F32",), (256,))
    nested = stored.tensor("weight.nested_absmax", ("F32",), (-(-blocks // size),))
    return table[codes.int()] * nested.repeat_interleave(size)[:blocks] + offset


def _number(stored: StoredModule, state: dict[str, Any], key: str) -> int:
    value = state.get(key)
    if type(value) is not int or value < 1:
        raise stored.malformed(f"its quant_state has the {key} {value!r}")
    return value
