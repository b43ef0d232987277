"""The settings of a GGUF file: keys with typed values."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from superweights.checkpoint.gguf_header import reading
from superweights.checkpoint.packed.gguf import gguf_package

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
