"""AWQ in the layout "gemm" of AutoAWQ, which gptqmodel, auto-round and others write too; 4 bits.

    qweight  int32 [cols, rows / 8]    eight output channels of a word, in the order 0 2 4 6 1 3 5 7 from the lowest bits up
    qzeros   int32 [groups, rows / 8]  the same order
    scales   float [groups, rows]

AWQ also multiplies columns by factors that it takes out of the layer before; the files do not tell them apart.

Source:
    AutoAWQ, awq/modules/linear/gemm.py; gptqmodel 7.6, quantization/awq/utils/packing_utils.py.
"""

import torch

from superweights.checkpoint.packed.codes import bit_string
from superweights.checkpoint.packed.grids import PackedMatrix, even_grid, spread, tiles
from superweights.checkpoint.packed.stored import FLOATS, StoredModule

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word each of eight channels is."""


def read(stored: StoredModule) -> PackedMatrix | None:
    """Reads a module; None where it is plain."""
    if not stored.packed_as("qweight", "qzeros", "scales"):
        stored.plain()
        return None
    key = "version" if "version" in stored.settings else "checkpoint_format"
    stored.setting(key, ("gemm", "GEMM"), "gemm")
    return read_layout(stored, "awq")


def read_layout(stored: StoredModule, format: str) -> PackedMatrix:
    """Reads the tensors of a module; `format` is in words."""
    scales = stored.tensor("scales", FLOATS, (None, None))  # [groups, rows]
    groups, rows = scales.shape
    if rows % 8:
        raise stored.malformed(f"it has {rows} rows, which do not fill words of 8")
    qweight = stored.tensor("qweight", ("I32",), (None, rows // 8))
    qzeros = stored.tensor("qzeros", ("I32",), (groups, rows // 8))
    shape = (rows, len(qweight))
    stored.check_groups(shape[1], groups)
    block = (1, -(-len(qweight) // groups))
    return even_grid(
        stored.name,
        format,
        4,
        _channels(qweight, rows),
        tiles(scales.t(), shape, block),
        zeros=spread(_channels(qzeros, rows).float(), shape, block),
        ends=(0, 15),
    )


def _channels(packed: torch.Tensor, rows: int) -> torch.Tensor:
    """uint8 [rows, length] from int32 [length, rows / 8]."""
    codes = bit_string(packed, 4, rows).reshape(len(packed), -1, 8)
    return codes[:, :, list(_PLACES)].reshape(len(packed), rows).t().contiguous()
