"""The settings of a GGUF file: keys with typed values."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from superweights.checkpoint.packed.gguf import gguf_package
from superweights.errors import MalformedFileError

_OF_THE_FILE = ("GGUF.", "split.")
"""Beginnings of keys that tell of one file, not of the model."""


@dataclass(frozen=True, slots=True)
class MetadataValue:
    """One value."""

    value: Any
    """A number, a text, a boolean or a list."""
    kind: str
    """Its type as GGUF calls it, such as UINT32; ARRAY for a list."""
    of: str | None = None
    """The type of a list's elements."""


Metadata = Mapping[str, MetadataValue]


@contextmanager
def reading(path: Path) -> Iterator[Any]:
    """The package's reader of a file, whose faults become one error."""
    package = gguf_package()
    try:
        with np.errstate(all="ignore"):
            yield package.GGUFReader(path)
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        MemoryError,
        ArithmeticError,
    ) as error:
        raise MalformedFileError(
            f"{path} is no whole GGUF file of a model: {error or type(error).__name__}. Write or download it again."
        ) from error


def read_metadata(path: Path) -> dict[str, MetadataValue]:
    """All settings of a model, but for those that tell of the file.

    Raises:
        UsageError: the package gguf is not installed.
        MalformedFileError: it is no whole GGUF file.
    """
    with reading(path) as reader:
        found = {
            key: MetadataValue(
                each.contents(), each.types[0].name, each.types[-1].name if len(each.types) > 1 else None
            )
            for key, each in reader.fields.items()
            if not key.startswith(_OF_THE_FILE)
        }
        if "general.architecture" not in found:
            raise ValueError("it names no architecture")
        return found


def add_metadata(writer: Any, metadata: Metadata) -> None:
    """Hands settings to the package's writer; empty lists are left out, which it cannot write."""
    kinds = gguf_package().GGUFValueType
    for key, each in metadata.items():
        if each.kind == "ARRAY" and not each.value:
            continue
        writer.add_key_value(key, each.value, kinds[each.kind], kinds[each.of] if each.of else None)
