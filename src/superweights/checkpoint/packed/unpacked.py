"""A quantized checkpoint seen as a plain one: packed matrices are dequantized when they are viewed.

So whatever reads a checkpoint reads a quantized one: a forward pass, `find`, `verify`, an audit. Writing refuses it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType

import torch

from superweights.checkpoint.checkpoint import Checkpoint
from superweights.checkpoint.header import TensorEntry
from superweights.checkpoint.packed.grids import PackedMatrix
from superweights.checkpoint.packed.reading import packed_format, read_packed_matrix
from superweights.checkpoint.packed.stored import PLAIN
from superweights.checkpoint.quantized import SETTINGS_KEYS
from superweights.checkpoint.scalars import StoredScalar
from superweights.errors import MalformedFileError, QuantizedCheckpointError

_PARTS = (
    "qweight", "qzeros", "scales", "g_idx", "weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point",
    "weight_g_idx", "weight_scale_inv", "weight_global_scale", "SCB", "weight_format", "weight.absmax", "weight.quant_map",
    "weight.nested_absmax", "weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4", "_weight_qdata", "_weight_scale", "_weight_zero_point", "_weight_act_pre_scale",
    "weight._data", "weight._scale", "weight._shift", "weight._data._data", "input_scale", "output_scale", "activation_scale",
    "W_q", "meta", "scale", "zero", "nbits", "group_size", "axis", "shape", "channel_wise", "compute_dtype",
    "encoded_state_dict", "offload_meta", "optimize", "packing", "quant_scale", "quant_zero", "round_zero",
    "stores_quant_config", "unpack_view_dtype", "view_as_float",
)  # fmt: skip
"""Last parts of the names of what one packed matrix is made of, in any format that is read."""


@dataclass(frozen=True, slots=True)
class _Module:
    """A packed matrix: its shape, and the stored tensors it is made of."""

    rows: int
    cols: int
    parts: tuple[str, ...]


def _packed_modules(checkpoint: Checkpoint) -> dict[str, _Module]:
    """All packed matrices. Modules whose parts are alike have matrices of one shape, so one of each kind is read."""
    parts: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        for mark in _PARTS:
            if name.endswith(f".{mark}"):
                parts.setdefault(name.removesuffix(f".{mark}"), []).append(name)
                break
    shapes: dict[tuple[object, ...], tuple[int, int] | None] = {}
    found = {}
    for module, names in parts.items():
        if all(checkpoint.tensors[name].dtype in PLAIN for name in names) and names == [f"{module}.weight"]:
            continue
        entries = [checkpoint.tensors[name] for name in sorted(names)]
        kind = (
            re.sub(r"\d+", "", module),
            *((each.name.rpartition(".")[2], each.dtype, each.shape) for each in entries),
        )
        if kind not in shapes:
            matrix = read_packed_matrix(checkpoint, module)
            shapes[kind] = None if matrix is None else (matrix.weights.shape[0], matrix.weights.shape[1])
        shape = shapes[kind]
        if shape is not None:
            found[module] = _Module(*shape, tuple(names))
    return found


class UnpackedCheckpoint(Checkpoint):
    """Made by `open_dequantized`. Its matrices have no bytes of their own: `read_scalar` and the like are for plain tensors.

    Attributes:
        packed: the quantized checkpoint, which stays open behind this one.

    Raises:
        QuantizedCheckpointError: the format, or a version of it, is not read.
        MalformedFileError: parts of a packed matrix are missing, or do not fit together, or none is packed.
    """

    def __init__(self, packed: Checkpoint) -> None:
        vars(self).update(vars(packed))  # the same open files
        self.packed = packed
        modules = _packed_modules(packed)
        if not modules:
            raise MalformedFileError(
                f"config.json of {packed.reference} says that its weights are quantized ({packed_format(packed)}), and none of "
                "its tensors is packed. Download the model again; where the weights are plain, take quantization_config out."
            )
        self.config = {key: value for key, value in packed.config.items() if key not in SETTINGS_KEYS}
        self._parts = {f"{module}.weight": each.parts for module, each in modules.items()}
        hidden = {part for parts in self._parts.values() for part in parts}
        tensors = {name: entry for name, entry in packed.tensors.items() if name not in hidden}
        for module, each in modules.items():
            name, file = f"{module}.weight", packed.tensors[each.parts[0]].file
            tensors[name] = TensorEntry(name, file, "F32", (each.rows, each.cols), 0, 4 * each.rows * each.cols)
        self.tensors = MappingProxyType(tensors)

    @property
    def packing(self) -> str:
        """What packed it, in words."""
        return packed_format(self.packed) or "packed"

    @property
    def digest(self) -> str:
        """That of the quantized checkpoint."""
        return self.packed.digest

    def is_packed(self, name: str) -> bool:
        """Whether a tensor stands for a packed matrix."""
        return name in self._parts

    def stored_as(self, name: str) -> str:
        """What packed a tensor, or its number format."""
        return self.packing if name in self._parts else super().stored_as(name)

    def require_plain(self, purpose: str) -> None:
        """Refuses: what needs plain weights needs the checkpoint that this one was made from."""
        self.packed.require_plain(purpose)

    def view(self, name: str) -> torch.Tensor:
        """A tensor; a packed matrix is dequantized anew, float32 [rows, cols]."""
        found = self.packed_matrix(name)
        return super().view(name) if found is None else found.weights

    def packed_matrix(self, name: str) -> PackedMatrix | None:
        """What is packed under the name of a matrix; None for a tensor that is stored plain."""
        return read_packed_matrix(self.packed, name.removesuffix(".weight")) if name in self._parts else None

    def fetch(self, names: Iterable[str], *, populate: bool = True) -> None:
        """Brings tensors, or the parts of packed ones, into memory."""
        self.packed.fetch(self._stored(names), populate=populate)

    def drop(self, names: Iterable[str]) -> None:
        """Gives the memory of tensors, or of the parts of packed ones, back."""
        self.packed.drop(self._stored(names))

    def read_scalar(self, name: str, index: tuple[int, ...]) -> StoredScalar:
        """One element of a plain tensor.

        Raises:
            QuantizedCheckpointError: the matrix is packed.
        """
        if name in self._parts:
            raise QuantizedCheckpointError(
                f"{name} of {self.reference} is packed, so a single weight has no bytes of its own. `superweights audit` gives "
                "the value that it stands for."
            )
        return super().read_scalar(name, index)

    def _stored(self, names: Iterable[str]) -> list[str]:
        return [part for name in names for part in self._parts.get(name, (name,))]
