"""The header of a safetensors file: which tensor lies where. Nothing in it is believed before it is checked.

A file is 8 bytes (little-endian length of the header), the header (JSON), then the tensors' bytes.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

from superweights.checkpoint.dtypes import STORAGE_TYPES, StorageType
from superweights.errors import MalformedFileError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit; a longer header is taken for damage."""
_LARGEST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor in a safetensors file."""

    name: str
    """The tensor's name in the checkpoint."""
    file: str
    """The shard that holds it, relative to the checkpoint."""
    dtype: str
    """The name of its number format in safetensors, such as BF16."""
    shape: tuple[int, ...]
    """Its shape as stored."""
    start: int
    """First byte in the file."""
    end: int
    """One past its last byte in the file."""

    @property
    def nbytes(self) -> int:
        """Its size in the file, bytes."""
        return self.end - self.start

    @property
    def numel(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def storage(self) -> StorageType:
        """Its number format."""
        return STORAGE_TYPES[self.dtype]

    @property
    def itemsize(self) -> int:
        """Bytes of one value; 0 for formats whose values share bytes."""
        return self.storage.nbits // 8


def read_header(read: Callable[[int, int], bytes], *, file: str, size: int) -> dict[str, TensorEntry]:
    """Reads and checks the header of one file.

    Args:
        read: gives the bytes from a start to an end of the file.
        file: the shard's name, for entries and messages.
        size: the file's size in bytes.

    Returns:
        The tensors by name, in the order of the header.

    Raises:
        MalformedFileError: the file is truncated, or the header contradicts itself or the file.
    """
    if size < LENGTH_BYTES:
        raise MalformedFileError(f"{file} has {size} bytes, fewer than the 8 that start a safetensors file.")
    length = int.from_bytes(read(0, LENGTH_BYTES), "little")
    start = LENGTH_BYTES + length
    if length > MAX_HEADER_BYTES:
        raise MalformedFileError(
            f"{file} claims a header of {length} bytes; the format allows {MAX_HEADER_BYTES}. "
            "The file is damaged or is not a safetensors file."
        )
    if start > size:
        raise MalformedFileError(
            f"{file} claims a header of {length} bytes but has only {size} bytes. "
            "The file is truncated or is not a safetensors file; download it again."
        )
    header = load_json(read(LENGTH_BYTES, start), file=f"The header of {file}")
    return _checked(header, file=file, data_start=start, size=size)


def load_json(text: bytes, *, file: str) -> dict[str, Any]:
    """Parses a JSON object strictly: UTF-8, no repeated key.

    Raises:
        MalformedFileError: the text is something else.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(items)
        if len(parsed) < len(items):
            names = [name for name, _ in items]
            twice = next(name for name in names if names.count(name) > 1)
            raise MalformedFileError(f"{file} names {_shown(twice)} twice. Download or write it again.")
        return parsed

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError, JSONDecodeError and too long numbers
        raise MalformedFileError(f"{file} is not JSON in UTF-8: {error}. Download or write it again.") from error
    if not isinstance(parsed, dict):
        raise MalformedFileError(f"{file} holds a JSON {type(parsed).__name__} where an object is expected.")
    return parsed


def _checked(header: dict[str, Any], *, file: str, data_start: int, size: int) -> dict[str, TensorEntry]:
    if not isinstance(header.pop("__metadata__", {}), dict):
        raise MalformedFileError(f"The header of {file} has a __metadata__ that is not an object.")
    entries = {name: _entry(name, fields, file, data_start) for name, fields in header.items()}
    by_start = sorted((entry for entry in entries.values() if entry.nbytes), key=lambda entry: entry.start)
    for before, after in pairwise(by_start):
        if after.start < before.end:
            raise MalformedFileError(
                f"{file}: tensors {_shown(before.name)} (bytes {before.start} to {before.end}) and "
                f"{_shown(after.name)} (bytes {after.start} to {after.end}) overlap."
            )
    last = max(entries.values(), key=lambda entry: entry.end, default=None)
    if last is not None and last.end > size:
        raise MalformedFileError(
            f"{file} is truncated: tensor {_shown(last.name)} ends at byte {last.end}, but the file has {size} bytes. "
            "Download it again."
        )
    return entries


def _entry(name: str, fields: object, file: str, data_start: int) -> TensorEntry:
    where = f"{file}: tensor {_shown(name)}"
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise MalformedFileError(f"{where} has a name that is not valid Unicode.")
    if not isinstance(fields, dict):
        raise MalformedFileError(f"{where} is described by a {type(fields).__name__}, not by an object.")
    storage = _storage(fields.get("dtype"), where)
    shape = _naturals(fields.get("shape"))
    if shape is None:
        raise MalformedFileError(
            f"{where} has the shape {_shown(fields.get('shape'))}; expected a list of integers from 0 to 2**63 - 1."
        )
    offsets = _naturals(fields.get("data_offsets"))
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise MalformedFileError(
            f"{where} has the data_offsets {_shown(fields.get('data_offsets'))}; "
            "expected a start and an end that is not before it."
        )
    start, end = offsets
    bits = _bits(shape, storage)
    if bits != 8 * (end - start):
        raise MalformedFileError(
            f"{where} is {storage.name} of shape {_shown(list(shape))}, which needs {_bytes_text(bits)} bytes, "
            f"but its range has {end - start}."
        )
    return TensorEntry(name, file, storage.name, shape, data_start + start, data_start + end)


def _storage(dtype: object, where: str) -> StorageType:
    if isinstance(dtype, str) and dtype in STORAGE_TYPES:
        return STORAGE_TYPES[dtype]
    near = get_close_matches(dtype.upper(), STORAGE_TYPES, n=3) if isinstance(dtype, str) else []
    hint = f" Near: {', '.join(near)}." if near else ""
    raise MalformedFileError(
        f"{where} has the dtype {_shown(dtype)}, which the safetensors format does not know.{hint}"
    )


def _naturals(values: object) -> tuple[int, ...] | None:
    """The values as a tuple where they are a list of integers that fit 63 bits, else None."""
    if not isinstance(values, list) or not all(type(each) is int and 0 <= each <= _LARGEST for each in values):
        return None
    return tuple(values)


def _bits(shape: tuple[int, ...], storage: StorageType) -> int:
    if 0 in shape:
        return 0
    bits = storage.nbits
    for length in shape:
        bits *= length
        if bits > _LARGEST * 8:  # enough to contradict any range; a longer product only costs time
            break
    return bits


def _bytes_text(bits: int) -> str:
    return "more than 2**63" if bits > _LARGEST * 8 else f"{bits / 8:g}" if bits % 8 else str(bits // 8)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
