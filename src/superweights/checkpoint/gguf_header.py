"""What a GGUF file says before its tensors' bytes, checked, as the package gguf reads it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from superweights.checkpoint.packed.gguf import gguf_package
from superweights.errors import MalformedFileError


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor as a GGUF file holds it."""

    name: str
    """Its name in llama.cpp."""
    kind: str
    """Its type, such as "Q4_K"."""
    shape: tuple[int, ...]
    """[.., rows, cols]: the reverse of the order that GGUF writes lengths in."""
    file: str
    start: int
    """First byte in the file."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says before its tensors' bytes."""

    tensors: tuple[GgufTensor, ...]
    metadata: Mapping[str, Any]
    """By key, such as "general.architecture"; arrays are left out."""

    @property
    def architecture(self) -> str:
        """What llama.cpp calls the architecture."""
        return str(self.metadata["general.architecture"])


def read_gguf_header(path: Path) -> GgufHeader:
    """Reads the header of one file.

    Raises:
        UsageError: the package gguf is not installed.
        MalformedFileError: it is no whole GGUF file of a model.
    """
    with reading(path) as reader:
        array = gguf_package().GGUFValueType.ARRAY
        metadata = {key: field.contents() for key, field in reader.fields.items() if array not in field.types}
        tensors = tuple(_tensor(each, path.name) for each in reader.tensors)
        part = int(metadata.get("split.no", 0))  # only the first of several parts says what the model is
        if ("general.architecture" not in metadata and not part) or (not tensors and "split.count" not in metadata):
            raise ValueError("it holds no tensor" if not tensors else "it does not say its architecture")
    return GgufHeader(tensors, metadata)


@contextmanager
def reading(path: Path) -> Iterator[Any]:
    """The package's reader of a file; faults of the file become one error.

    Raises:
        UsageError: the package gguf is not installed.
        MalformedFileError: it is no whole GGUF file of a model.
    """
    package = gguf_package()
    try:
        with np.errstate(all="ignore"):
            reader = package.GGUFReader(path)
        yield reader
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise MalformedFileError(
            f"{path} is no whole GGUF file of a model: {error or type(error).__name__}. Write or download it again."
        ) from error


def _tensor(found: Any, file: str) -> GgufTensor:
    shape = tuple(int(length) for length in reversed(found.shape))
    return GgufTensor(found.name, found.tensor_type.name, shape, file, int(found.data_offset), int(found.n_bytes))


def gguf_digest(header: GgufHeader, sizes: Sequence[int]) -> str:
    """Identity of headers: SHA-256, in hexadecimal, of names, types and shapes of tensors, and of the sizes of files."""
    digest = hashlib.sha256()
    for each in sorted(header.tensors, key=lambda tensor: tensor.name):
        digest.update(repr((each.name, each.kind, each.shape)).encode())
    for size in sizes:
        digest.update(repr(size).encode())
    return digest.hexdigest()
