"""Tells columns that a quantizer multiplied, or mixed with others, from columns that it rounded.

AWQ and SmoothQuant multiply columns and divide what comes in; rotations leave no column alike. Rounding, clipping and what GPTQ
shifts from column to column leave a factor of 1, as long as large weights, which are clipped or held out, do not count. A grid
so coarse that little is left of the column tells nothing.
"""

import math
from typing import NamedTuple

import torch

_SAME_FACTOR, _SAME_FACTOR_COARSE = 0.03, 0.3
"""How far rounding and clipping alone move the slope of a column's small weights, to 4 bits and to fewer."""
_LARGE = 16
"""In medians of what small weights became: far beyond what rounding makes of them."""


def column_factor(before: torch.Tensor, after: torch.Tensor) -> float:
    """What a column was multiplied by; 1 where that could be rounding.

    Args:
        before: the column of the original, [rows].
        after: the same column of the quantized model.

    Returns:
        The slope of its small weights, quantized over original, where it is further from 1 than 3 % (30 % on coarse grids) and
        than eight standard errors.
    """
    found = _compared(before, after)
    if found is None or found.alike <= 0.8:
        return 1.0
    noise = math.sqrt(max(0.0, 1 - found.alike**2) / len(found.old))
    allowed = max(8 * noise, _SAME_FACTOR if found.alike > 0.97 else _SAME_FACTOR_COARSE)
    factor = float(found.old @ found.new / (found.old @ found.old))
    return factor if abs(factor - 1) > allowed else 1.0


def is_unrelated(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether a column has nothing to do with that of the original, as where weights are rotated; arguments as above."""
    found = _compared(before, after)
    if found is None:
        return False
    signs = (found.old * found.new).sign()
    agreeing = float(signs.sum() / signs.abs().sum())  # 1 for all, 0 for as many as not
    as_large = 0.5 < float(found.new.norm() / found.old.norm()) < 2
    return bool(found.alike < 0.5 and agreeing < 0.4 and as_large and signs.count_nonzero() >= 32)


class _Compared(NamedTuple):
    old: torch.Tensor
    new: torch.Tensor
    alike: float
    """Cosine of the angle between them."""


def _compared(before: torch.Tensor, after: torch.Tensor) -> _Compared | None:
    """The small weights of both, float64; None where nothing is left of them, or they are no numbers."""
    sizes = before.abs()
    small = sizes <= 2 * sizes.median()
    usual = after[small].abs().median()
    if usual > 0:  # a super weight of another model's counts no more than one of this
        small &= after.abs() <= _LARGE * usual
    old, new = before[small].double(), after[small].double()
    both = float(old.norm() * new.norm())
    if both == 0 or not math.isfinite(both) or len(set(new.tolist())) <= 3:
        return None
    return _Compared(old, new, float(old @ new) / both)
