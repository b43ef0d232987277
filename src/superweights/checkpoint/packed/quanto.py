"""optimum-quanto's own checkpoints; transformers cannot save them, and their config.json does not say that they are packed.

    weight._data                 int8 or float8 [rows, cols], weight._scale [rows, 1] or one value
    weight._data._data           uint8: the matrix as [groups, size], its second half above the first in each byte (4 bits)
    weight._scale, weight._shift [groups, 1]: scale * code - shift

A packed matrix does not say how many rows it has; the hidden size does.

Source:
    optimum-quanto 0.2.7, tensor/packed.py, tensor/grouped.py, tensor/qbits.py and nn/qmodule.py.
"""

from superweights.checkpoint.packed.codes import stacked
from superweights.checkpoint.packed.grids import PackedMatrix, even_grid, runs, signed_ends, table_grid, tiles
from superweights.checkpoint.packed.stored import FLOAT8, FLOATS, StoredModule

_TO_HIDDEN = ("down_proj", "o_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "fc2", "fc_out", "w2", "wo")
"""Last parts of the names of layers whose output, not input, has the hidden size."""


def read(stored: StoredModule) -> PackedMatrix | None:
    """Reads a module; None where it is plain."""
    if stored.has("weight._data._data"):
        return _read_packed(stored)
    if not stored.packed_as("weight._data", "weight._scale"):
        stored.plain()
        return None
    if stored.dtype("weight._data") in FLOAT8:
        codes, table = stored.float8("weight._data", (None, None))
    else:
        codes, table = stored.tensor("weight._data", ("I8",), (None, None)), None
    shape = (codes.shape[0], codes.shape[1])
    whole = stored.tensor("weight._scale", FLOATS)
    block = shape if whole.numel() == 1 else (1, shape[1])
    scale = whole.reshape(1, 1) if whole.numel() == 1 else stored.tensor("weight._scale", FLOATS, (shape[0], 1))
    scales = tiles(scale, shape, block)
    if table is not None:
        return table_grid(stored.name, "quanto float8", 8, codes, scales, table=table)
    ends = signed_ends(codes, 8, symmetric=True)
    return even_grid(stored.name, "quanto int8", 8, codes, scales, ends=ends)


def _read_packed(stored: StoredModule) -> PackedMatrix:
    stored.packed_as("weight._data._data", "weight._scale", "weight._shift")
    packed = stored.tensor("weight._data._data", ("U8",), (None, None))
    scales = stored.tensor("weight._scale", FLOATS, (None, 1))
    groups, size = len(scales), packed.shape[1]
    bits = next((each for each in (4, 2) if -(-groups // (8 // each)) == len(packed)), None)
    if bits is None:
        raise stored.malformed(f"it has {len(packed)} rows of bytes for {groups} groups, which is neither 4 nor 2 bits")
    shape = _shape(stored, groups * size)
    codes = stacked(packed, bits, lowest_first=True)[:groups].reshape(shape)
    shift = stored.tensor("weight._shift", (*FLOATS, "I8", "U8"), (groups, 1))
    # Older files hold the code that stands for 0 instead of what that code is worth.
    floating = shift.dtype.is_floating_point
    spread_scales, spread_shift = (runs(each.flatten(), shape, size) for each in (scales, shift))
    found = even_grid(
        stored.name,
        f"quanto int{bits}",
        bits,
        codes,
        spread_scales,
        zeros=None if floating else spread_shift.values,
        ends=(0, 2**bits - 1),
    )
    if floating:
        found.weights.sub_(spread_shift.values)
    return found


def _shape(stored: StoredModule, numel: int) -> tuple[int, int]:
    text = stored.checkpoint.config.get("text_config")
    hidden = {**stored.checkpoint.config, **(text if isinstance(text, dict) else {})}.get("hidden_size")
    if type(hidden) is not int or hidden < 1 or numel % hidden:
        raise stored.malformed(f"it has {numel} weights, which are no rows or cols of the hidden size {hidden!r}")
    other = numel // hidden
    return (hidden, other) if stored.name.rpartition(".")[2] in _TO_HIDDEN else (other, hidden)
