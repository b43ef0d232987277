"""One stored number: its value, its bits and where in which file they are."""

from dataclasses import dataclass

from superweights.checkpoint.dtypes import STORAGE_TYPES
from superweights.checkpoint.header import TensorEntry
from superweights.errors import CoordinateError, QuantizedCheckpointError


@dataclass(frozen=True, slots=True)
class StoredScalar:
    """One element of a tensor as the file holds it."""

    value: float
    """Its value; exact for every floating point format."""
    bits: int
    """Its bits as an unsigned integer."""
    dtype: str
    """Its number format, by its safetensors name."""
    nbits: int
    """How many bits it has."""
    file: str
    """The shard that holds it."""
    offset: int
    """Its first byte in that file."""

    @property
    def bits_text(self) -> str:
        """The bits with the parts of a float kept apart: sign, exponent, mantissa.

        Example:
            >>> StoredScalar(1.5, 0x3FC0, "BF16", 16, "model.safetensors", 96).bits_text
            '0 01111111 1000000'
        """
        storage = STORAGE_TYPES[self.dtype]
        text = f"{self.bits:0{self.nbits}b}"
        mantissa_at = self.nbits - storage.mantissa
        exponent_at = mantissa_at - storage.exponent
        return " ".join(filter(None, (text[:exponent_at], text[exponent_at:mantissa_at], text[mantissa_at:])))


def decode_scalar(entry: TensorEntry, offset: int, raw: bytes) -> StoredScalar:
    """Makes a scalar of its bytes.

    Args:
        entry: the tensor that holds it.
        offset: its first byte in the file.
        raw: its bytes.
    """
    return StoredScalar(
        entry.storage.value(raw), int.from_bytes(raw, "little"), entry.dtype, entry.storage.nbits, entry.file, offset
    )


def block_span(entry: TensorEntry, prefix: tuple[int, ...]) -> tuple[int, int]:
    """The bytes of the part of a tensor that leading indices select: a scalar, a row, a matrix.

    Raises:
        CoordinateError: more indices than dimensions, or one outside the shape.
        QuantizedCheckpointError: values share bytes.
    """
    if len(prefix) > len(entry.shape):
        raise CoordinateError(
            f"{list(prefix)} has {len(prefix)} indices, but tensor {entry.name!r} has the shape {list(entry.shape)}."
        )
    if not entry.itemsize:
        raise QuantizedCheckpointError(
            f"Tensor {entry.name!r} is stored as {entry.dtype}, whose values share bytes; single values cannot be read."
        )
    size, first = entry.nbytes, entry.start
    for axis, (index, length) in enumerate(zip(prefix, entry.shape, strict=False)):
        if not 0 <= index < length:
            valid = f"valid are 0 to {length - 1}" if length else "that axis is empty"
            raise CoordinateError(
                f"Index {index} on axis {axis} is outside tensor {entry.name!r} of shape {list(entry.shape)}; {valid}."
            )
        size //= length
        first += index * size
    return first, first + size
