"""torchao, as transformers 5 saves it: the parts of a tensor under names of their own, and what it is in the file's metadata.

    Int8Tensor, IntxUnpackedToInt8Tensor  _weight_qdata int8 [rows, cols], _weight_scale, _weight_zero_point
    Float8Tensor                          _weight_qdata float8 [rows, cols], _weight_scale
    Int4Tensor                            _weight_qdata int8 [rows, cols / 2], the lower half first;
                                          _weight_scale and _weight_zero_point float [groups, rows], scale * code + zero_point

Source:
    torchao 0.18, prototype/safetensors and quantization/quantize_/workflows; for Int4Tensor the int4_row_quantize_zp of fbgemm.
"""

import json
from typing import Any

import torch

from superweights.checkpoint.header import LENGTH_BYTES, load_json
from superweights.checkpoint.packed.codes import bit_string
from superweights.checkpoint.packed.grids import PackedMatrix, Scales, even_grid, signed_ends, spread, table_grid, tiles
from superweights.checkpoint.packed.stored import FLOATS, StoredModule

TYPES = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor", "Int4Tensor")
"""The kinds of tensors that are read."""
_CODES, _SCALE, _ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"


def read(stored: StoredModule) -> PackedMatrix | None:
    """Reads a module; None where it is plain."""
    if not stored.has(_CODES):
        if stored.has(_SCALE):
            raise stored.malformed(f"it has {_SCALE} but no {_CODES}")
        stored.plain()
        return None
    kind, about, parts = _metadata(stored)
    if kind not in TYPES:
        raise stored.unread(f"its weight is a {kind}; read: {', '.join(TYPES)}")
    stored.packed_as(*(f"_weight_{part}" for part in parts))
    if stored.has("_weight_act_pre_scale"):
        raise stored.unread("its columns are rescaled when it runs (act_pre_scale)")
    if kind == "Int4Tensor":
        return _read_int4(stored, _block(stored, about, None))
    if kind == "Float8Tensor":
        codes, table = stored.float8(_CODES, (None, None))
        scales, _ = _scales(stored, about, (codes.shape[0], codes.shape[1]))
        return table_grid(stored.name, "torchao float8", 8, codes, scales, table=table)
    codes = stored.tensor(_CODES, ("I8",), (None, None))
    scales, zeros = _scales(stored, about, (codes.shape[0], codes.shape[1]))
    bits = _bits(stored, about) if kind != "Int8Tensor" else 7 if about.get("reduce_range") else 8
    symmetric = zeros is None or not bool(zeros.any())
    ends = signed_ends(codes, bits, symmetric=symmetric)
    return even_grid(stored.name, f"torchao int{bits}", bits, codes, scales, zeros=zeros, ends=ends)


def _read_int4(stored: StoredModule, block: tuple[int, int]) -> PackedMatrix:
    packed = stored.tensor(_CODES, ("I8", "U8"), (None, None))
    rows, cols = packed.shape[0], packed.shape[1] * 2
    grid = (-(-cols // block[1]), rows)
    scales = tiles(stored.tensor(_SCALE, FLOATS, grid).t(), (rows, cols), block)
    offsets = spread(stored.tensor(_ZERO, FLOATS, grid).t().float(), (rows, cols), block)
    signed = bit_string(packed, 4, cols).to(torch.int8)
    signed = torch.where(signed > 7, signed - 16, signed)
    found = even_grid(stored.name, "torchao int4", 4, signed, scales, ends=(-8, 7))
    found.weights.add_(offsets)
    return found


def _scales(stored: StoredModule, about: dict[str, Any], shape: tuple[int, int]) -> tuple[Scales, torch.Tensor | None]:
    """The scales, and the codes that stand for 0."""
    block = _block(stored, about, shape)
    grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    scales = tiles(_grid_of(stored, _SCALE, FLOATS, grid), shape, block)
    if not stored.has(_ZERO):
        return scales, None
    zeros = _grid_of(stored, _ZERO, ("I8", "I16", "I32", "I64", *FLOATS), grid)
    return scales, spread(zeros.float(), shape, block)


def _grid_of(stored: StoredModule, part: str, dtypes: tuple[str, ...], grid: tuple[int, int]) -> torch.Tensor:
    if grid == (1, 1):  # a scale for all of the matrix has any number of dimensions
        single = stored.tensor(part, dtypes)
        if single.numel() == 1:
            return single.reshape(1, 1)
    return stored.tensor(part, dtypes, grid)


def _block(stored: StoredModule, about: dict[str, Any], shape: tuple[int, int] | None) -> tuple[int, int]:
    size = about.get("block_size")
    if size == [] and shape is not None:
        return shape
    if not isinstance(size, list) or len(size) != 2 or not all(type(each) is int and each > 0 for each in size):
        raise stored.malformed(f"its metadata has the block_size {size!r}")
    return size[0], size[1]


def _bits(stored: StoredModule, about: dict[str, Any]) -> int:
    target = about.get("target_dtype")
    name = str(target.get("_data") if isinstance(target, dict) else target)
    if name not in {f"int{bits}" for bits in range(1, 9)}:
        raise stored.malformed(f"its metadata has the target_dtype {target!r}")
    return int(name.removeprefix("int"))


def _metadata(stored: StoredModule) -> tuple[str, dict[str, Any], list[str]]:
    """The kind of tensor, what the file says about it, and its parts."""
    name = f"{stored.name}.weight"
    for file in dict.fromkeys((stored.checkpoint.entry(f"{stored.name}.{_CODES}").file, *stored.checkpoint.files)):
        read = stored.checkpoint.files[file].read
        length = int.from_bytes(read(0, LENGTH_BYTES), "little")
        header = load_json(read(LENGTH_BYTES, LENGTH_BYTES + length), file=f"The header of {file}")
        text = header.get("__metadata__", {}).get(name)
        if text is not None:
            found = _parsed(stored, text)
            return str(found.get("_type")), found["_data"], list(found.get("_tensor_data_names") or ["qdata", "scale"])
    raise stored.malformed("no file says in its metadata what its weight is")


def _parsed(stored: StoredModule, text: object) -> dict[str, Any]:
    try:
        found = json.loads(str(text))
    except ValueError as error:
        raise stored.malformed(f"its metadata is not JSON ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("_data"), dict):
        raise stored.malformed(f"its metadata is {text!r:.80}")
    return found
