"""Weights in 8-bit floats with a scale per block (DeepSeek) or per matrix.

    weight            float8 [rows, cols]
    weight_scale_inv  [rows / high, cols / wide], both rounded up, float or a bare power of two; or one value
    weight_scale      the same under the name of vLLM's older files

"inv" is only a name: values are weight * weight_scale_inv.

Source:
    DeepSeek-V3, inference/kernel.py: weight_dequant_kernel; transformers 5.23, integrations/finegrained_fp8.py.
"""

from superweights.checkpoint.packed.grids import PackedMatrix, table_grid, tiles
from superweights.checkpoint.packed.stored import FLOAT8, FLOATS, StoredModule

_SCALES = (*FLOATS, "F8_E8M0")


def read(stored: StoredModule) -> PackedMatrix | None:
    """Reads a module; None where it is plain."""
    part = "weight_scale" if stored.has("weight_scale") else "weight_scale_inv"
    if stored.dtype("weight") not in FLOAT8 and not stored.has(part):
        stored.plain()
        return None
    stored.packed_as("weight", part)
    if stored.dtype("weight") == "I8":
        raise stored.unread("its weight is I8, two 4-bit floats per byte; read: 8-bit floats")
    codes, table = stored.float8("weight", (None, None))
    rows, cols = codes.shape
    scales = stored.tensor(part, _SCALES)
    if scales.numel() == 1:
        scales, block = scales.reshape(1, 1), (rows, cols)
    else:
        block = _block(stored)
        scales = stored.tensor(part, _SCALES, (-(-rows // block[0]), -(-cols // block[1])))
    return table_grid(stored.name, "fp8", 8, codes, tiles(scales, (rows, cols), block), table=table)


def _block(stored: StoredModule) -> tuple[int, int]:
    size = stored.settings.get("weight_block_size")
    if not isinstance(size, list) or len(size) != 2 or not all(type(each) is int and each > 0 for each in size):
        raise stored.malformed(f"it has a scale per block, but the config has the weight_block_size {size!r}")
    return size[0], size[1]
