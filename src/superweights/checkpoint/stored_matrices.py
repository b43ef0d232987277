"""The matrices of linear layers among the stored tensors of the decoder layers, which are what quantizers round.

From names, shapes and the model type, without torch: norms, biases, routers and convolutions are no such matrices.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from superweights.checkpoint.checkpoint import Checkpoint
from superweights.checkpoint.stored_projection import (
    CONV1D_TYPES,
    TRANSPOSED_EXPERT_TYPES,
    Shapes,
    layer_tensors,
    model_type_of,
)
from superweights.errors import QuantizedCheckpointError

_PLAIN = ("F32", "F16", "BF16")
_ROUTER = re.compile(r"(?:^|\.)(?:gate|router|router\.layer|shared_expert_gate|wg|gate_logit)\.(?:weight|wg\.weight)$")
"""Names of what chooses experts: a few thousand weights on which every token's way depends, left alone by all quantizers."""
_PACKED = re.compile(r"experts|\.(?:input|output)_linear\.weight$")
"""Names of tensors that pack the matrices of all experts; the second form is that of granitemoe and jetmoe."""


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """One matrix, or a pack of as many as there are experts."""

    tensor: str
    """Name of the stored tensor."""
    rows: int
    """Output channels."""
    cols: int
    """Input channels."""
    transposed: bool
    """Whether the tensor is stored [.., cols, rows]."""
    experts: int | None = None
    """How many matrices the tensor packs on its first axis; None for one."""

    @property
    def module(self) -> str:
        """The module that holds the matrix."""
        return self.tensor.rpartition(".")[0]

    @property
    def numel(self) -> int:
        """How many weights there are."""
        return self.rows * self.cols * (self.experts or 1)


def checkpoint_matrices(checkpoint: Checkpoint) -> tuple[StoredMatrix, ...]:
    """The matrices of linear layers of a checkpoint's decoder layers, in F32, F16 or BF16.

    Raises:
        QuantizedCheckpointError: there is none.
        UnsupportedArchitectureError: the names do not say which tensors make up the decoder layers.
    """
    shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    names = [name for names in layer_tensors(shapes, checkpoint.config) for name in names]
    dtypes = {name: checkpoint.tensors[name].dtype for name in names}
    found = stored_matrices([name for name in names if dtypes[name] in _PLAIN], shapes, checkpoint.config)
    if not found:
        raise QuantizedCheckpointError(
            f"Looking for matrices of {checkpoint.reference}: its decoder layers hold none in F32, F16 or BF16 (they hold "
            f"{', '.join(sorted(set(dtypes.values())))}). Give a checkpoint with plain weights."
        )
    return found


def stored_matrices(names: Iterable[str], shapes: Shapes, config: Mapping[str, Any]) -> tuple[StoredMatrix, ...]:
    """The matrices of linear layers among the tensors of decoder layers.

    Args:
        names: the tensors of the decoder layers that hold plain numbers.
        shapes: their shapes.
        config: the model's config.json.

    Example:
        >>> shapes = {"layers.0.mlp.up.weight": (24, 8), "layers.0.mlp.gate.weight": (4, 8), "layers.0.norm.weight": (8,)}
        >>> [each.tensor for each in stored_matrices(shapes, shapes, {"model_type": "llama"})]
        ['layers.0.mlp.up.weight']
    """
    model_type = model_type_of(config)
    return tuple(found for name in names if (found := _matrix(name, shapes[name], model_type)) is not None)


def _matrix(name: str, shape: tuple[int, ...], model_type: str) -> StoredMatrix | None:
    packed = len(shape) == 3 and _PACKED.search(name) is not None and not name.endswith("bias")
    if not (packed or (len(shape) == 2 and name.endswith("weight"))) or min(shape[-2:]) < 2 or _ROUTER.search(name):
        return None
    transposed = model_type in (TRANSPOSED_EXPERT_TYPES if packed else CONV1D_TYPES)
    rows, cols = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
    return StoredMatrix(name, rows, cols, transposed, shape[0] if packed else None)
