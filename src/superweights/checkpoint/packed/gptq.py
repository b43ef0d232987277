"""GPTQ: AutoGPTQ, gptqmodel, and auto-round where it writes their layout.

    qweight  int32 [cols * bits / 32, rows]   the codes of an output channel are a string of bits down its column
    qzeros   int32 [groups, rows * bits / 32] the code that stands for 0, less one in the first version of the format
    scales   float [groups, rows]
    g_idx    int32 [cols]                     which group a column belongs to; with desc_act they are mixed

Source:
    gptqmodel 7.6, nn_modules/qlinear/torch.py and utils/model.py.
"""

import torch

from superweights.checkpoint.packed.codes import bit_string
from superweights.checkpoint.packed.grids import PackedMatrix, Scales, even_grid, spread
from superweights.checkpoint.packed.stored import FLOATS, StoredModule

BITS = (2, 3, 4, 8)


def read(stored: StoredModule) -> PackedMatrix | None:
    """Reads a module; None where it is plain."""
    if not stored.packed_as("qweight", "qzeros", "scales"):
        stored.plain()
        return None
    key = "checkpoint_format" if "checkpoint_format" in stored.settings else "format"
    version = stored.setting(key, ("gptq", "gptq_v2"), "gptq")
    stored.setting("is_marlin_format", (False, None), False)
    stored.setting("pack_dtype", ("int32", None), "int32")
    return read_layout(stored, version, less_one=version == "gptq")


def read_layout(stored: StoredModule, format: str, *, less_one: bool) -> PackedMatrix:
    """Reads the tensors of a module.

    Args:
        stored: the module.
        format: in words.
        less_one: whether zeros are stored less one.
    """
    scales = stored.tensor("scales", FLOATS, (None, None))  # [groups, rows]
    groups, rows = scales.shape
    qzeros = stored.tensor("qzeros", ("I32",), (groups, None))
    bits = next((each for each in BITS if qzeros.shape[1] * 32 == rows * each), None)
    if bits is None:
        raise stored.malformed(
            f"qzeros has {qzeros.shape[1]} words for {rows} rows, which is none of {', '.join(map(str, BITS))} bits"
        )
    qweight = stored.tensor("qweight", ("I32",), (None, rows))
    cols = qweight.shape[0] * 32 // bits
    group = -(-cols // groups)
    stored.check_groups(cols, groups)
    of_col = _groups(stored, cols, groups, group)
    zeros = _zeros(qzeros, bits, rows, less_one=less_one)  # [groups, rows]
    blocks = None
    if of_col is None:
        steps, zeros = (spread(each.t(), (rows, cols), (1, group)) for each in (scales.float(), zeros))
    else:
        steps, zeros = (each[of_col].t().contiguous() for each in (scales.float(), zeros))
        blocks = of_col.int() + groups * torch.arange(rows, dtype=torch.int32)[:, None]
    codes = bit_string(qweight.t(), bits, cols)  # [rows, cols]
    shared = Scales(steps, (1, group), blocks)
    return even_grid(stored.name, format, bits, codes, shared, zeros=zeros, ends=(0, 2**bits - 1))


def _groups(stored: StoredModule, cols: int, groups: int, group: int) -> torch.Tensor | None:
    """The group of each column; None where they follow each other."""
    if not stored.has("g_idx"):
        if stored.settings.get("desc_act"):
            raise stored.malformed("its columns are in another order (desc_act), but g_idx, which tells it, is missing")
        return None
    found = stored.tensor("g_idx", ("I32", "I64"), (cols,)).long()
    if int(found.min()) < 0 or int(found.max()) >= groups:
        raise stored.malformed(f"g_idx names groups {int(found.min())} to {int(found.max())} of {groups}")
    return None if torch.equal(found, torch.arange(cols) // group) else found


def _zeros(qzeros: torch.Tensor, bits: int, rows: int, *, less_one: bool) -> torch.Tensor:
    """float32 [groups, rows]."""
    if less_one and bits != 3:
        # Whole words, as gptqmodel does it: a zero of 0 was stored by borrowing from the next code.
        qzeros = qzeros + sum(1 << shift for shift in range(0, 31, bits))
        less_one = False
    codes = bit_string(qzeros, bits, rows)
    return ((codes + 1) & (2**bits - 1) if less_one else codes).float()
