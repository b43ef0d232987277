"""The tensors of one module, checked as they are taken, and the words for what is wrong with them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from superweights.checkpoint.checkpoint import Checkpoint
from superweights.checkpoint.dtypes import STORAGE_TYPES
from superweights.errors import MalformedFileError, QuantizedCheckpointError

PLAIN = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights that nobody packed."""
FLOATS = ("F32", "F16", "BF16", "F64")
"""Dtypes of scales."""
FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
"""Dtypes of 8-bit codes that are floats themselves."""
Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class StoredModule:
    """One linear layer in a checkpoint that a quantizer wrote."""

    checkpoint: Checkpoint
    name: str
    """The module."""
    method: str
    """The quantizer, as the config names it."""
    settings: Mapping[str, Any]
    """What the config says about it."""

    def has(self, part: str) -> bool:
        """Whether a tensor of the module is stored, such as "qweight"."""
        return f"{self.name}.{part}" in self.checkpoint.tensors

    def dtype(self, part: str) -> str | None:
        """The dtype of a tensor of the module; None where there is none."""
        entry = self.checkpoint.tensors.get(f"{self.name}.{part}")
        return None if entry is None else entry.dtype

    def packed_as(self, *parts: str) -> bool:
        """Whether the module has the tensors of a packed one.

        Raises:
            MalformedFileError: it has some of them only.
        """
        missing = [part for part in parts if not self.has(part)]
        if missing and len(missing) < len(parts):
            found = [part for part in parts if self.has(part)]
            raise self.malformed(f"it has {', '.join(found)} but no {', '.join(missing)}")
        return not missing

    def plain(self) -> bool:
        """Whether the module's weight is stored plain, or not at all.

        Raises:
            MalformedFileError: it is stored as codes, and what they mean is missing.
        """
        dtype = self.dtype("weight")
        if dtype is not None and dtype not in PLAIN:
            raise self.malformed(f"its weight is stored as {dtype}, without the scales of this format")
        return True

    def tensor(self, part: str, dtypes: tuple[str, ...], shape: Shape | None = None) -> torch.Tensor:
        """A tensor of the module, on the file's own bytes.

        Args:
            part: its name below the module.
            dtypes: those it may have.
            shape: the one it must have; None stands for any length.

        Raises:
            MalformedFileError: it is not there, or of another dtype or shape.
        """
        name = f"{self.name}.{part}"
        entry = self.checkpoint.tensors.get(name)
        if entry is None:
            raise self.malformed(f"it has no {part}")
        fits = shape is None or (
            len(shape) == len(entry.shape) and all(a is None or a == b for a, b in zip(shape, entry.shape, strict=True))
        )
        if entry.dtype not in dtypes or not fits or not entry.numel:
            wanted = f" of shape [{', '.join('any' if each is None else str(each) for each in shape)}]" if shape else ""
            raise self.malformed(
                f"{part} is {entry.dtype} of shape {list(entry.shape)}, where {' or '.join(dtypes)}{wanted} is expected"
            )
        self.checkpoint.fetch((name,), populate=False)
        return self.checkpoint.view(name)

    def float8(self, part: str, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
        """A tensor of 8-bit floats, as codes, and the value of each code.

        Returns:
            uint8 of the tensor's shape, and float32 [256].
        """
        tensor = self.tensor(part, FLOAT8, shape)
        storage = STORAGE_TYPES[str(self.dtype(part))]
        return tensor.view(torch.uint8), torch.from_numpy(storage.floats(bytes(range(256))).copy())

    def setting(self, key: str, known: tuple[Any, ...], default: Any) -> Any:
        """A value of the quantizer's config.

        Raises:
            QuantizedCheckpointError: it is none of the known ones.
        """
        value = self.settings.get(key, default)
        if value not in known:
            raise self.unread(f"its {key} is {value!r}; read: {', '.join(map(repr, known))}")
        return value

    def check_groups(self, cols: int, groups: int) -> None:
        """Checks the number of groups of a row against the config, where it says the same size for all modules.

        Raises:
            MalformedFileError: it is another.
        """
        size = self.settings.get("group_size", self.settings.get("q_group_size"))
        if type(size) is not int or any(self.settings.get(key) for key in ("dynamic", "extra_config")):
            return
        wanted = -(-cols // size) if size > 0 else 1
        if groups != wanted:
            raise self.malformed(f"it has {groups} groups, where rows of {cols} in groups of {size} make {wanted}")

    def malformed(self, fault: str) -> MalformedFileError:
        """The error for files that contradict themselves."""
        return MalformedFileError(
            f"Reading {self.name} of {self.checkpoint.reference}, packed by {self.method}: {fault}. "
            "The files are damaged or not of this format; download or quantize them again."
        )

    def unread(self, fault: str) -> QuantizedCheckpointError:
        """The error for a format that is not read."""
        return QuantizedCheckpointError(
            f"Reading {self.name} of {self.checkpoint.reference}, packed by {self.method}: {fault}. "
            "docs/packed-formats.md lists what is read."
        )
