"""A GGUF file seen as a checkpoint: tensors by the names they have in transformers, packed ones dequantized when viewed.

The package gguf reads the file; transformers knows which of its own models the file holds, what the tensors are called there
and which of them llama.cpp stores in another order. A tensor that is stored plain and in the same order is a view of the file,
like one of a safetensors file.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from superweights.checkpoint.checkpoint import Checkpoint
from superweights.checkpoint.gguf_config import ROPE_TENSORS, gguf_config
from superweights.checkpoint.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from superweights.checkpoint.header import TensorEntry
from superweights.checkpoint.local import WeightSource, open_directory
from superweights.checkpoint.packed.gguf import PLAIN, dequantize_blocks, read_blocks
from superweights.checkpoint.reference import ModelReference
from superweights.checkpoint.scalars import StoredScalar
from superweights.checkpoint.shards import Shards
from superweights.errors import (
    MalformedFileError,
    QuantizedCheckpointError,
    UnsupportedArchitectureError,
)

if TYPE_CHECKING:
    import torch

    from superweights.checkpoint.packed.grids import PackedMatrix

_EXPERTS = re.compile(r"blk\.\d+\.ffn_(?P<what>gate|up|down)_exps\.weight")
_EXPERT_NAMES = {
    "qwen2_moe": "{layer}.mlp.experts.{expert}.{what}_proj.weight",
    "qwen3_moe": "{layer}.mlp.experts.{expert}.{what}_proj.weight",
}
"""What one expert's matrix is called in checkpoints of a model type."""
_BLOCK = re.compile(r"(?:.*\.)?\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class _Origin:
    """What a tensor of the checkpoint is made of."""

    stored: GgufTensor
    expert: int | None = None
    """Which matrix of a tensor that packs several."""


def open_gguf(reference: ModelReference) -> "GgufCheckpoint":
    """Opens a .gguf file, and with the first of several parts the others.

    Raises:
        UsageError: the package gguf is not installed.
        MalformedFileError, MissingTensorError: the file is damaged, or a part of it is not there.
        UnsupportedArchitectureError: transformers has no such model.
        QuantizedCheckpointError: transformers' model has no place for a tensor.
    """
    header = read_gguf_header(reference.path)
    source = open_directory(reference.path.parent, Shards(tuple(path.name for path in header.paths)))
    try:
        by_name = {each.name: each for each in header.tensors}
        config = gguf_config(header, lambda name: _values(source, _Origin(by_name[name])))
        return GgufCheckpoint(reference, source, header, config=config)
    except BaseException:
        source.close()
        raise


class GgufCheckpoint(Checkpoint):
    """See the module. Made by `open_gguf`.

    Attributes:
        header: what the file says, of all its parts.
    """

    def __init__(
        self,
        reference: ModelReference,
        source: WeightSource,
        header: GgufHeader,
        *,
        config: dict[str, Any],
    ) -> None:
        self.header = header
        self._order = _Order(header.architecture, config)
        stored = {each.name: each for each in header.tensors}
        names, shapes = _transformers_names(config, self._order, stored, str(reference))
        for name, inside in names.items():
            _require_shape(stored[name], inside, shapes[inside], self._order)
        self._origins = dict(_origins(names, stored, str(config["model_type"])))
        self._in_order = {name for name, each in stored.items() if self._order.keeps(each)}
        tensors = {}
        for name, origin in self._origins.items():
            shape = shapes[name] if origin.expert is None else origin.stored.shape[1:]
            tensors[name] = _entry(name, origin, shape, plain=not self.is_packed(name))
        super().__init__(reference, source, config=config, tensors=tensors)

    @property
    def packing(self) -> str | None:
        """The types of its matrices, in words; None where all are stored plain."""
        kinds = sorted({each.stored.kind for each in self._origins.values() if each.stored.kind not in PLAIN})
        return f"gguf {', '.join(kinds)}" if kinds else None

    @property
    def gguf_file(self) -> str:
        """The file, or the first of its parts."""
        return next(iter(self._files))

    @property
    def digest(self) -> str:
        """As for other checkpoints, with the types of GGUF."""
        return self.header.digest

    def require_plain(self, purpose: str) -> None:
        """Refuses: a GGUF file is only read."""
        raise QuantizedCheckpointError(
            f"{purpose[:1].upper()}{purpose[1:]} needs a safetensors checkpoint, and {self.reference} is a GGUF file, which is "
            "only read. Give the checkpoint it was converted from."
        )

    def is_packed(self, name: str) -> bool:
        """Whether a tensor is quantized, or in another order than in transformers."""
        stored = self._origins[name].stored if name in self._origins else None
        return stored is not None and (stored.kind not in PLAIN or stored.name not in self._in_order)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the file holds a tokenizer as well."""
        model = self.header.metadata.get("tokenizer.ggml.model")
        return model is not None and model.value not in ("none", "no_vocab")

    def stored_as(self, name: str) -> str:
        """The GGUF type of a tensor, such as "Q4_K"."""
        return self._origins[name].stored.kind if name in self._origins else super().stored_as(name)

    def view(self, name: str) -> "torch.Tensor":
        """A tensor; one that is quantized or in another order is made anew, in float32."""
        import torch

        if not self.is_packed(name):
            return super().view(name)
        origin = self._origins[name]
        values = _values(self._source, origin)
        try:
            values = self._order.undo(origin.stored.name, values).reshape(self.entry(name).shape)
        except ValueError as error:
            raise MalformedFileError(
                f"{origin.stored.path}: {origin.stored.name} {list(origin.stored.shape)} cannot be put into the order of "
                f"transformers: {error}. Write or download it again."
            ) from error
        return torch.from_numpy(np.ascontiguousarray(values))

    def view_rows(self, name: str, rows: Sequence[int]) -> "torch.Tensor":
        """Some rows of a tensor as float32."""
        import torch

        if not self.is_packed(name) or self._origins[name].stored.name not in self._in_order:
            return super().view_rows(name, rows)
        if not rows:
            return torch.empty(0, *self.entry(name).shape[1:])
        return torch.from_numpy(_values(self._source, self._origins[name], rows))

    def packed_matrix(self, name: str) -> "PackedMatrix | None":
        """What the quantizer left of a matrix, [rows, cols]; None for one that is stored plain."""
        origin = self._origins.get(name)
        if origin is None or origin.stored.kind in PLAIN:
            return None
        order = self._order.rows(origin.stored)
        if order is None:
            raise QuantizedCheckpointError(
                f"{name} of {self.reference} is stored as {origin.stored.kind} in an order whose blocks are not followed."
            )
        found = read_blocks(_blocks(self._source, origin), origin.stored.kind, module=name.removesuffix(".weight"))
        if np.array_equal(order, np.arange(len(order))):
            return found
        steps = found.steps.expand(found.weights.shape)
        return replace(found, weights=found.weights[order], steps=steps[order], at_end=found.at_end[order])

    def read_scalar(self, name: str, index: tuple[int, ...]) -> StoredScalar:
        """One element of a tensor that is stored plain."""
        self._require_bytes(name)
        return super().read_scalar(name, index)

    def read_row(self, name: str, prefix: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """A part of a tensor that is stored plain."""
        self._require_bytes(name)
        return super().read_row(name, prefix)

    def iter_rows(
        self, name: str, *, prefix: tuple[int, ...] = (), rows_per_chunk: int | None = None
    ) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """The rows of a tensor that is stored plain."""
        self._require_bytes(name)
        return super().iter_rows(name, prefix=prefix, rows_per_chunk=rows_per_chunk)

    def _require_bytes(self, name: str) -> None:
        if self.is_packed(name):
            raise QuantizedCheckpointError(
                f"{name} of {self.reference} is stored as {self._origins[name].stored.kind} in llama.cpp's order, so a single "
                "weight has no bytes of its own. `superweights show` and `audit` give the value that it stands for."
            )


def _values(source: WeightSource, origin: _Origin, rows: Sequence[int] | None = None) -> npt.NDArray[np.float32]:
    """Float32 [.., rows, cols] in the order of the file."""
    blocks = _blocks(source, origin)
    chosen = blocks if rows is None else blocks[list(rows)]
    return dequantize_blocks(chosen, origin.stored.kind, what=f"{origin.stored.name} of {origin.stored.path}")


def _blocks(source: WeightSource, origin: _Origin) -> npt.NDArray[np.uint8]:
    """The bytes of a tensor on the file's map, [.., rows, bytes of a row]."""
    stored = origin.stored
    found = np.frombuffer(source.files[stored.path.name].map, np.uint8, stored.nbytes, stored.start)
    shaped = found.reshape(*stored.shape[:-1], -1)
    return shaped if origin.expert is None else shaped[origin.expert]


class _Order:
    """What llama.cpp changed of a model's tensors, as transformers undoes it."""

    def __init__(self, architecture: str, config: Mapping[str, Any]) -> None:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        self.architecture = architecture
        self.processor: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=dict(config))

    def undo(self, name: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A tensor in transformers' order."""
        parsed: dict[str, dict[str, Any]] = {"tensors": {}}
        found = self.processor.process(weights=values, name=name, tensor_key_mapping=None, parsed_parameters=parsed)
        if found.name is None:  # handed over by the side
            (handed,) = parsed["tensors"].values()
            array: npt.NDArray[Any] = handed.numpy()
            return array
        undone: npt.NDArray[Any] = found.weights
        return undone

    def rows(self, stored: GgufTensor) -> npt.NDArray[np.int64] | None:
        """Which row of the file is each output channel, where rows are whole; seen on numbers that stand for rows."""
        probed = self._probed(stored)
        if probed is None or not np.array_equal(np.sort(probed, axis=None), np.arange(stored.shape[0])):
            return None
        return probed.ravel().astype(np.int64)

    def turns(self, stored: GgufTensor) -> bool:
        """Whether rows become columns."""
        probed, lengths = self._probed(stored), _row_numbers(stored).shape
        return probed is not None and probed.shape == lengths[::-1] != lengths

    def keeps(self, stored: GgufTensor) -> bool:
        """Whether nothing was changed."""
        probed = self._probed(stored)
        return probed is not None and np.array_equal(probed, _row_numbers(stored))

    def _probed(self, stored: GgufTensor) -> npt.NDArray[Any] | None:
        with suppress(Exception):  # a rule that needs all columns
            return self.undo(stored.name, _row_numbers(stored))
        return None


def _row_numbers(stored: GgufTensor) -> npt.NDArray[np.float32]:
    """A tensor of one column that holds the number of each row."""
    return np.arange(stored.shape[0], dtype=np.float32).reshape(-1, *(1 for _ in stored.shape[1:]))


def _transformers_names(
    config: Mapping[str, Any], order: _Order, stored: Mapping[str, GgufTensor], where: str
) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """The name in transformers of each tensor of the file, and the shape of each tensor in transformers.

    Raises:
        UnsupportedArchitectureError: the model cannot be built.
        QuantizedCheckpointError: a tensor has no place in it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    model_type = str(config["model_type"])
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        found: dict[str, str] = get_gguf_hf_weights_map(model, order.processor, order.architecture)
    except Exception as error:
        raise UnsupportedArchitectureError(
            f"{where}: transformers cannot build the {model_type} that the file describes: {type(error).__name__}: {error}"
        ) from error
    # Experts that transformers packs as a parameter have no ".weight" in the names it makes.
    names = {name: found.get(name) or found.get(name.removesuffix(".weight"), "") for name in stored}
    strange = [name for name, inside in names.items() if not inside and name not in ROPE_TENSORS]
    if strange:
        first = stored[strange[0]]
        raise QuantizedCheckpointError(
            f"{where} holds {first.name} ({first.kind}, {list(first.shape)}), for which transformers' "
            f"{model_type} has no place ({len(strange)} such tensors): without it the model would be another. Give the "
            "safetensors checkpoint it was converted from."
        )
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return {name: inside for name, inside in names.items() if inside}, shapes


def _require_shape(stored: GgufTensor, inside: str, expected: tuple[int, ...], order: _Order) -> None:
    """Refuses a tensor whose shape is not the one that the settings lead to; lengths of one come and go."""
    match = _EXPERTS.fullmatch(stored.name)
    if match and match["what"] != "down" and len(expected) == 3:  # transformers has both in one
        expected = (expected[0], expected[1] // 2, expected[2])
    shape = stored.shape[::-1] if order.turns(stored) else stored.shape
    if (match and shape != expected) or [each for each in shape if each != 1] != [
        each for each in expected if each != 1
    ]:
        raise MalformedFileError(
            f"{stored.path}: {stored.name} has the shape {list(stored.shape)}, and by the file's metadata {inside} has "
            f"{list(expected)}. Write or download it again."
        )


def _origins(
    names: Mapping[str, str], stored: Mapping[str, GgufTensor], model_type: str
) -> Iterator[tuple[str, _Origin]]:
    """The tensors of the checkpoint and what they are made of; experts by the names that one by one they have."""
    for name, inside in names.items():
        match = _EXPERTS.fullmatch(name)
        if match is None:
            yield inside, _Origin(stored[name])
            continue
        pattern = _EXPERT_NAMES.get(model_type)
        layer = _BLOCK.match(inside)
        if pattern is None or layer is None:
            raise UnsupportedArchitectureError(
                f"{name}: experts of {model_type} are not read from GGUF files; read: {', '.join(_EXPERT_NAMES)}. Give the "
                "safetensors checkpoint it was converted from."
            )
        for expert in range(stored[name].shape[0]):
            yield pattern.format(layer=layer[0], expert=expert, what=match["what"]), _Origin(stored[name], expert)


def _entry(name: str, origin: _Origin, shape: tuple[int, ...], *, plain: bool) -> TensorEntry:
    stored = origin.stored
    size = stored.nbytes if origin.expert is None else stored.nbytes // stored.shape[0]
    start = stored.start + size * (origin.expert or 0)
    return TensorEntry(name, stored.path.name, PLAIN[stored.kind] if plain else "F32", shape, start, start + size)
