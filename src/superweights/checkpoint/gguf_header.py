"""What GGUF files say before their tensors' bytes: settings with their types, and where each tensor is.

Nothing of a header is believed before it is checked: lengths and counts against the file, places of tensors against each other.
The package gguf is asked for names and sizes of types alone; its own reader takes arrays longer than the file.
"""

import hashlib
import mmap
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from superweights.checkpoint.packed.gguf import gguf_package
from superweights.errors import MalformedFileError, MissingTensorError

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_VERSIONS = (2, 3)
_MOST_LENGTHS = 4
_ALIGNMENT = 32
"""Bytes of which each tensor's place is a multiple, where a file says no other number."""
_MOST_BYTES = 1 << 26
"""Of one setting: more than any file has, and too few to fill the memory."""
_FORMATS = {
    "UINT8": "B", "INT8": "b", "UINT16": "H", "INT16": "h", "UINT32": "I", "INT32": "i", "UINT64": "Q", "INT64": "q",
    "FLOAT32": "f", "FLOAT64": "d", "BOOL": "?",
}  # fmt: skip
"""GGUF's types of one number, and what `struct` calls them."""


@dataclass(frozen=True, slots=True)
class MetadataValue:
    """One setting."""

    value: Any
    """A number, a text, a boolean or a list."""
    kind: str
    """Its type as GGUF calls it, such as UINT32; ARRAY for a list."""
    of: str | None = None
    """The type of a list's elements."""


Metadata = Mapping[str, MetadataValue]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor as a GGUF file holds it."""

    name: str
    """Its name in llama.cpp."""
    kind: str
    """Its type, such as "Q4_K"."""
    shape: tuple[int, ...]
    """[.., rows, cols]: the reverse of the order that GGUF writes lengths in."""
    path: Path
    """The file."""
    start: int
    """First byte in the file."""
    nbytes: int

    def blocks(self) -> npt.NDArray[np.uint8]:
        """Its bytes on a private map of the file, [.., rows, bytes of a row]."""
        found = np.memmap(self.path, np.uint8, "c", self.start, (self.nbytes,))
        return found.reshape(*self.shape[:-1], -1)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a model's GGUF files say before their tensors' bytes."""

    tensors: tuple[GgufTensor, ...]
    """Of all files."""
    metadata: Metadata
    """Of the first file, by key, such as "general.architecture"."""
    paths: tuple[Path, ...]
    """The files."""
    sizes: tuple[int, ...]
    """Bytes of each."""

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the architecture."""
        return str(self.metadata["general.architecture"].value)

    @property
    def settings(self) -> dict[str, Any]:
        """The architecture's settings, by keys without its name; lists are left out."""
        prefix = f"{self.architecture}."
        return {
            key.removeprefix(prefix): each.value
            for key, each in self.metadata.items()
            if key.startswith(prefix) and each.kind != "ARRAY"
        }

    @property
    def digest(self) -> str:
        """Identity: SHA-256, in hexadecimal, of names, types and shapes of tensors, and of the sizes of files."""
        digest = hashlib.sha256()
        for each in sorted(self.tensors, key=lambda tensor: tensor.name):
            digest.update(repr((each.name, each.kind, each.shape)).encode())
        for size in self.sizes:
            digest.update(repr(size).encode())
        return digest.hexdigest()


def read_gguf_header(path: Path) -> GgufHeader:
    """Reads the headers of a model: of a file, and with one of several parts of all others.

    Raises:
        UsageError: the package gguf is not installed.
        MissingTensorError: a part is not there.
        MalformedFileError: a file is no whole GGUF file of a model, or the parts are not of one model.
    """
    paths = _parts(path)
    files = [_read_file(each) for each in paths]
    for number, (file, each) in enumerate(zip(files, paths, strict=True)):
        _require_part(file.metadata, number, len(files), each)
    tensors = tuple(tensor for file in files for tensor in file.tensors)
    _require_model(files[0].metadata, tensors, path)
    return GgufHeader(tensors, files[0].metadata, tuple(paths), tuple(file.size for file in files))


def _parts(path: Path) -> list[Path]:
    """A file, or all parts where its name says that it is one."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    paths = [path.with_name(f"{match['stem']}-{number:05d}-of-{match['count']}.gguf") for number in range(1, count + 1)]
    if path not in paths:
        raise MalformedFileError(f"{path} is part {match['number']} of {match['count']} by its name. Rename it.")
    absent = [each.name for each in paths if not each.is_file()]
    if absent:
        raise MissingTensorError(
            f"{path} is one of {count} parts, and {absent[0]} is not beside it ({len(absent)} are missing). Download the "
            "missing files."
        )
    return paths


def _require_part(metadata: Metadata, number: int, count: int, path: Path) -> None:
    """Refuses a part that says of itself to be another."""
    said = [metadata[key].value if key in metadata else None for key in ("split.no", "split.count")]
    if said[0] not in (None, number) or said[1] not in (None, count, 0 if count == 1 else None):
        raise MalformedFileError(
            f"{path} is part {number + 1} of {count} by its name, and part {said[0]}, counted from 0, of {said[1]} by what it "
            "holds. Give all parts the names that llama-gguf-split gave them."
        )


def _require_model(metadata: Metadata, tensors: Sequence[GgufTensor], path: Path) -> None:
    names = [each.name for each in tensors]
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    architecture = metadata.get("general.architecture")
    fault = None
    if architecture is None or architecture.kind != "STRING":
        fault = "it does not say its architecture"
    elif not tensors:
        fault = "it holds no tensor"
    elif twice:
        fault = f"it holds {min(twice)} twice"
    if fault:
        raise _malformed(path, fault)


def _malformed(path: Path, fault: str) -> MalformedFileError:
    return MalformedFileError(f"{path} is no whole GGUF file of a model: {fault}. Write or download it again.")


@dataclass(frozen=True, slots=True)
class _File:
    """What one file says."""

    tensors: tuple[GgufTensor, ...]
    metadata: Metadata
    size: int


def _read_file(path: Path) -> _File:
    gguf_package()
    size = path.stat().st_size
    if not size:
        raise _malformed(path, "it is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
        try:
            return _parsed(_Cursor(data), path, size)
        except ValueError as error:
            raise _malformed(path, str(error)) from error


class _Cursor:
    """Reads a file from front to back. Its faults are ValueErrors that say what was wrong."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place = data, 0

    def take(self, nbytes: int, what: str) -> bytes:
        """The next bytes."""
        left = min(len(self.data) - self.place, _MOST_BYTES)
        if nbytes > left:
            raise ValueError(f"{what} at byte {self.place} takes {nbytes} bytes, and at most {left} can be there")
        self.place += nbytes
        return self.data[self.place - nbytes : self.place]

    def number(self, kind: str, what: str) -> Any:
        """One number of a type of GGUF."""
        return self.numbers(kind, 1, what)[0]

    def numbers(self, kind: str, count: int, what: str) -> tuple[Any, ...]:
        """Several numbers of a type of GGUF."""
        letter = _FORMATS[kind]
        raw = self.take(count * struct.calcsize(f"<{letter}"), what)
        return struct.unpack(f"<{count}{letter}", raw)

    def text(self, what: str) -> str:
        """A text with its length in front."""
        raw = self.take(self.number("UINT64", f"the length of {what}"), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is no UTF-8: {error.reason} at byte {error.start} of {raw[:40]!r}") from error


def _parsed(cursor: _Cursor, path: Path, size: int) -> _File:
    if cursor.take(4, "its first word") != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("UINT32", "its version")
    if not version & 0xFFFF:
        raise ValueError("its numbers are big-endian, which is not read; convert it without --bigendian")
    if version not in _VERSIONS:
        raise ValueError(f"its version is {version}, and read are {' and '.join(map(str, _VERSIONS))}")
    tensor_count, key_count = cursor.numbers("UINT64", 2, "its counts")
    metadata: dict[str, MetadataValue] = {}
    for _ in range(key_count):
        key = cursor.text("the name of a setting")
        if key in metadata:
            raise ValueError(f"it says {key} twice")
        metadata[key] = _setting(cursor, key)
    found = [_tensor(cursor, path) for _ in range(tensor_count)]
    alignment = _alignment(metadata)
    start = -(-cursor.place // alignment) * alignment
    tensors = tuple(replace(each, start=start + each.start) for each in found)
    _require_apart(tensors, alignment, size)
    return _File(tensors, metadata, size)


def _setting(cursor: _Cursor, key: str) -> MetadataValue:
    kind = _kind(cursor, key)
    if kind in _FORMATS:
        return MetadataValue(cursor.number(kind, key), kind)
    if kind == "STRING":
        return MetadataValue(cursor.text(key), kind)
    of, count = _kind(cursor, key), cursor.number("UINT64", f"the length of {key}")
    if of in _FORMATS:
        return MetadataValue(list(cursor.numbers(of, count, key)), kind, of)
    if of != "STRING":
        raise ValueError(f"{key} is a list of lists")
    if count > _MOST_BYTES // 8:
        raise ValueError(f"{key} has {count} elements, and at most {_MOST_BYTES // 8} are read")
    return MetadataValue([cursor.text(f"an element of {key}") for _ in range(count)], kind, of)


def _kind(cursor: _Cursor, key: str) -> str:
    number = cursor.number("UINT32", f"the type of {key}")
    try:
        return str(gguf_package().GGUFValueType(number).name)
    except ValueError as error:
        raise ValueError(f"{key} is of type {number}, which GGUF does not have") from error


def _tensor(cursor: _Cursor, path: Path) -> GgufTensor:
    """One tensor, its place counted from the first one's."""
    package = gguf_package()
    name = cursor.text("the name of a tensor")
    count = cursor.number("UINT32", f"the number of lengths of {name}")
    if not 1 <= count <= _MOST_LENGTHS:
        raise ValueError(f"{name} has {count} lengths, and GGUF's tensors have 1 to {_MOST_LENGTHS}")
    shape = tuple(reversed(cursor.numbers("UINT64", count, f"the shape of {name}")))
    number = cursor.number("UINT32", f"the type of {name}")
    try:
        kind = package.GGMLQuantizationType(number)
    except ValueError as error:
        raise ValueError(
            f"{name} is of type {number}, which the package gguf does not know; try a newer one"
        ) from error
    block, nbytes = package.GGML_QUANT_SIZES[kind]
    if 0 in shape or shape[-1] % block:
        raise ValueError(f"{name} has the shape {list(shape)}, in which {kind.name} has no whole blocks of {block}")
    start = cursor.number("UINT64", f"the place of {name}")
    return GgufTensor(name, kind.name, shape, path, start, prod(shape) // block * nbytes)


def _alignment(metadata: Metadata) -> int:
    found = metadata.get("general.alignment", MetadataValue(_ALIGNMENT, "UINT32"))
    if found.kind != "UINT32" or found.value.bit_count() != 1:
        raise ValueError(f"general.alignment is {found.value!r}, which is no power of two")
    return int(found.value)


def _require_apart(tensors: Sequence[GgufTensor], alignment: int, size: int) -> None:
    """Refuses tensors that lie beyond the file, in each other, or where none can be."""
    for each in tensors:
        if each.start + each.nbytes > size:
            raise ValueError(f"{each.name} ends at byte {each.start + each.nbytes}, and the file has {size}")
        if each.start % alignment:
            raise ValueError(f"{each.name} begins at byte {each.start}, which is no multiple of {alignment}")
    for one, other in pairwise(sorted(tensors, key=lambda each: each.start)):
        if one.start + one.nbytes > other.start:
            raise ValueError(f"{one.name} and {other.name} overlap at byte {other.start}")
