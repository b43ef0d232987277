"""The number formats of safetensors: how many bits, which of them are exponent and mantissa, and their values.

Values come out as numpy float32 without torch, which numpy alone cannot do for bfloat16 and the 8-bit floats.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from superweights.errors import QuantizedCheckpointError

FLOAT16_MAX = 65504.0
"""The largest number of float16."""
Specials = Literal["ieee", "nan", "nan_only_negative_zero"]
"""Which codes are not numbers: infinities and NaN; only all ones (NaN); only the code of minus zero (NaN)."""


@dataclass(frozen=True, slots=True)
class StorageType:
    """One dtype of the safetensors format."""

    name: str
    """The name in the header, such as BF16."""
    nbits: int
    """Bits of one value."""
    torch: str | None = None
    """The attribute of the torch module, where torch has this dtype."""
    numpy: str | None = None
    """The numpy dtype of the same values, little-endian, where numpy has it."""
    exponent: int = 0
    """Exponent bits of a floating point value; 0 for integers."""
    mantissa: int = 0
    """Stored mantissa bits."""
    bias: int = 0
    """Exponent bias of an 8-bit float."""
    specials: Specials = "ieee"
    """The codes of an 8-bit float that are no finite number."""

    def value(self, raw: bytes) -> float:
        """The one value in `raw`, not rounded; a complex or packed one is refused like in `floats`."""
        if self.numpy is not None:
            return float(np.frombuffer(raw, dtype=self.numpy)[0])
        return float(self.floats(raw)[0])

    def floats(self, raw: bytes) -> npt.NDArray[np.float32]:
        """The values in `raw` as float32, one-dimensional.

        Raises:
            QuantizedCheckpointError: values share bytes or are complex, so there is no plain number to give.
        """
        if self.numpy is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                return np.frombuffer(raw, dtype=self.numpy).astype(np.float32)
        if self.name == "BF16":
            return (np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
        if self.nbits == 8:
            table: npt.NDArray[np.float32] = _eight_bit_values(self)[np.frombuffer(raw, dtype=np.uint8)]
            return table
        raise QuantizedCheckpointError(
            f"Cannot read values stored as {self.name}: they are packed or complex, not plain real numbers. "
            "Give a checkpoint in F32, F16, BF16 or an 8-bit float."
        )


@cache
def _eight_bit_values(storage: StorageType) -> npt.NDArray[np.float32]:
    return np.array([_eight_bit_value(storage, code) for code in range(256)], dtype=np.float32)


def _eight_bit_value(storage: StorageType, code: int) -> float:
    if storage.mantissa == 0:  # E8M0: a bare power of two
        return math.nan if code == 255 else math.ldexp(1.0, code - storage.bias)
    sign = -1.0 if code >> 7 else 1.0
    top = (1 << storage.exponent) - 1
    exponent = (code >> storage.mantissa) & top
    fraction = code & ((1 << storage.mantissa) - 1)
    if storage.specials == "ieee" and exponent == top:
        return math.nan if fraction else sign * math.inf
    if storage.specials == "nan" and code & 0x7F == 0x7F:
        return math.nan
    if storage.specials == "nan_only_negative_zero" and code == 0x80:
        return math.nan
    whole = fraction if exponent == 0 else fraction + (1 << storage.mantissa)
    return sign * math.ldexp(whole, max(exponent, 1) - storage.bias - storage.mantissa)


_TYPES = (
    StorageType("F64", 64, "float64", "<f8", 11, 52),
    StorageType("F32", 32, "float32", "<f4", 8, 23),
    StorageType("F16", 16, "float16", "<f2", 5, 10),
    StorageType("BF16", 16, "bfloat16", None, 8, 7),
    StorageType("F8_E4M3", 8, "float8_e4m3fn", None, 4, 3, 7, "nan"),
    StorageType("F8_E5M2", 8, "float8_e5m2", None, 5, 2, 15),
    StorageType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", None, 4, 3, 8, "nan_only_negative_zero"),
    StorageType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", None, 5, 2, 16, "nan_only_negative_zero"),
    StorageType("F8_E8M0", 8, "float8_e8m0fnu", None, 8, 0, 127),
    StorageType("F6_E2M3", 6, None, None, 2, 3),
    StorageType("F6_E3M2", 6, None, None, 3, 2),
    StorageType("F4", 4, None, None, 2, 1),
    StorageType("C64", 64, "complex64"),
    StorageType("I64", 64, "int64", "<i8"),
    StorageType("U64", 64, "uint64", "<u8"),
    StorageType("I32", 32, "int32", "<i4"),
    StorageType("U32", 32, "uint32", "<u4"),
    StorageType("I16", 16, "int16", "<i2"),
    StorageType("U16", 16, "uint16", "<u2"),
    StorageType("I8", 8, "int8", "|i1"),
    StorageType("U8", 8, "uint8", "|u1"),
    StorageType("BOOL", 8, "bool", "|u1"),
)
STORAGE_TYPES = {each.name: each for each in _TYPES}
"""Every dtype of the format, by its name in the header."""
