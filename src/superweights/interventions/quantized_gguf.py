"""Quantized weights as a GGUF file, which llama.cpp runs: the tensors that hold a super weight at F16, the rest as asked.

The source is a safetensors checkpoint of a family that `checkpoint.gguf_families` has, or a GGUF file of any architecture with
plain values, whose settings are copied. Either is a list of tensors by llama.cpp's names, in its order; from there on it is one
piece of code.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from superweights import __version__
from superweights.checkpoint import Checkpoint, ModelReference
from superweights.checkpoint.gguf_families import (
    GgufRecipe,
    family_metadata,
    family_notes,
    family_of,
    family_tensors,
)
from superweights.checkpoint.gguf_header import MetadataValue, read_gguf_header
from superweights.checkpoint.gguf_tokenizer import gguf_tokenizer
from superweights.checkpoint.gguf_writing import (
    NewGgufTensor,
    block_size,
    check_file_target,
    encode,
    file_type,
    gguf_nbytes,
    write_gguf,
    written_kind,
)
from superweights.checkpoint.packed.gguf import PLAIN, dequantize_blocks
from superweights.checkpoint.stored_projection import model_type_of
from superweights.coordinates import Coordinate
from superweights.errors import (
    CoordinateError,
    NotACheckpointError,
    QuantizedCheckpointError,
    UsageError,
)
from superweights.interventions.weights import locate_stored
from superweights.progress import NO_PROGRESS, Progress

_Values = npt.NDArray[np.float32]
_LEFT_ALONE = re.compile(
    r"_norm\.weight$|ffn_gate_inp|altup|laurel|per_layer_model_proj|^position_embd|^token_types|ssm_conv1d|shortconv\.conv"
    r"|time_mix_(first|w\d|v\d|a\d|g\d|decay_w\d|lerp_fused)|attn_rel_b|\.position_embd"
)
"""Names of matrices that llama.cpp's own quantizer leaves as they are: few weights, or such as choose experts."""
_RECORD = "superweights."
"""Beginning of keys of ours."""


@dataclass(frozen=True, slots=True)
class KeptWeight:
    """A super weight, and what becomes of it."""

    coordinate: Coordinate
    """Where it is in the model."""
    tensor: str
    """The tensor of the GGUF file that holds it."""
    index: tuple[int, ...]
    """Its place there: expert where there are several, row, col."""
    value: float
    """Its value in the source."""
    kind: str
    """The type of its tensor."""
    written: float | None = None
    """What the file holds; None while nothing is written."""
    rounded: float | None = None
    """What the type of the other tensors would make of it; None while nothing is written, or where that cannot hold it."""
    block_error: float | None = None
    """What that does to the other weights of its block: the root of their squared error over their squares."""


@dataclass(frozen=True, slots=True)
class QuantizedGguf:
    """What was written, or will be."""

    architecture: str
    """What llama.cpp calls it."""
    kind: str
    """The type that was asked for."""
    tensors: tuple[NewGgufTensor, ...]
    """All tensors, in order."""
    kept: tuple[KeptWeight, ...]
    """The super weights."""
    unfit: tuple[str, ...]
    """Tensors at F16 because a block does not divide their rows."""
    keeping_nbytes: int
    """Bytes that the file has more because of kept weights."""
    notes: tuple[str, ...] = ()
    """What llama.cpp does otherwise than the model."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(each.nbytes for each in self.tensors)

    @property
    def keeping_share(self) -> float:
        """What keeping adds, as a share of the file without it."""
        return self.keeping_nbytes / (self.nbytes - self.keeping_nbytes)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of all tensors, as llama.cpp counts."""
        return 8 * self.nbytes / sum(each.numel for each in self.tensors)


def quantize_to_gguf(
    source: ModelReference | str | Path,
    to: str | Path,
    kind: str = "q4_0",
    keep: Sequence[Coordinate] = (),
    *,
    kept_kind: str | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> QuantizedGguf:
    """Writes a GGUF file of any size, little more than one tensor in memory at a time.

    Args:
        source: a directory, a Hub name or a URL of safetensors, or a .gguf file; it is only read.
        to: the new file.
        kind: the type of matrices, such as q4_0.
        keep: super weights, whose tensors stay apart.
        kept_kind: the type of those; by default F16 where it holds the values of the super weights exactly, else BF16 or F32.
        overwrite: whether a file that is at `to` already may be replaced.
        threads: pieces of a tensor encoded at once; default: one per core.
        progress: hears about each tensor.

    Raises:
        UsageError: a type cannot be written, or `to` is taken.
        CoordinateError: a kept weight is not in this model.
        UnsupportedArchitectureError: the family is not written.
        QuantizedCheckpointError: the weights are quantized already.
        NonFiniteWeightsError: a weight is NaN or infinite.
        RecordError: the file cannot be written; nothing is left of it.
    """
    target = Path(to).expanduser()
    with _opened(source) as opened:
        plan = _planned(opened, kind, keep, kept_kind)
        check_file_target(target, overwrite=overwrite, but=opened.paths)
        kept: list[KeptWeight] = []

        def make(number: int) -> npt.NDArray[np.uint8]:
            new = plan.tensors[number]
            blocks = opened.blocks(new, threads)
            kept.extend(_read_back(opened, each, blocks, plan.kind) for each in plan.kept if each.tensor == new.name)
            return blocks

        write_gguf(target, opened.architecture, _metadata(opened, plan), plan.tensors, make, progress=progress)
    order = [each.coordinate for each in plan.kept]
    return replace(plan, kept=tuple(sorted(kept, key=lambda each: order.index(each.coordinate))))


def plan_quantized_gguf(
    source: ModelReference | str | Path,
    kind: str = "q4_0",
    keep: Sequence[Coordinate] = (),
    *,
    kept_kind: str | None = None,
) -> QuantizedGguf:
    """What `quantize_to_gguf` would write; of weights it reads the kept ones alone.

    Raises: as `quantize_to_gguf`, but for what only weights and the disk can show.
    """
    with _opened(source) as opened:
        return _planned(opened, kind, keep, kept_kind)


def _planned(source: "_Source", kind: str, keep: Sequence[Coordinate], kept_kind: str | None) -> QuantizedGguf:
    kind = written_kind(kind, [each.layer for each in keep])
    kept_kind = None if kept_kind is None else written_kind(kept_kind)
    located = [(each, *source.locate(each)) for each in dict.fromkeys(keep)]
    kept = [KeptWeight(each, tensor, index, source.value(tensor, index), "") for each, tensor, index in located]
    values: dict[str, list[float]] = {}
    for each in kept:
        values.setdefault(each.tensor, []).append(each.value)
    plain = {name: _kind(source, name, kind) for name in source.shapes}
    chosen = {name: kept_kind or _exact(source.kinds[name], kind, values[name]) for name in values}
    kinds = plain | {name: _fitting(each, source.shapes[name]) for name, each in chosen.items()}
    for name, new in kinds.items():
        if source.kinds[name] not in PLAIN and source.kinds[name] != new:
            raise QuantizedCheckpointError(
                f"{source.reference} is quantized already: {name} is {source.kinds[name]} there and would become {new}, "
                "rounded twice. Give the F16, BF16 or F32 file, or the safetensors checkpoint."
            )
    asked = [name for name in source.shapes if _rounded(source, name)]
    if asked and all(plain[name] != kind for name in asked):
        raise UsageError(
            f"Writing {source.reference} as {kind}: blocks of {block_size(kind)[0]} divide the rows of none of its matrices, "
            f"such as {asked[0]} {list(source.shapes[asked[0]])}, so all would be F16. Take another type, or say f16."
        )
    tensors = tuple(NewGgufTensor(name, kinds[name], shape) for name, shape in source.shapes.items())
    return QuantizedGguf(
        source.architecture,
        kind,
        tensors,
        tuple(replace(each, kind=kinds[each.tensor]) for each in kept),
        tuple(name for name in plain if plain[name] == "F16" != kind and _rounded(source, name)),
        sum(
            gguf_nbytes(kinds[name], source.shapes[name]) - gguf_nbytes(plain[name], source.shapes[name])
            for name in values
        ),
        source.notes,
    )


def _rounded(source: "_Source", name: str) -> bool:
    """Whether a tensor is one of the matrices that get the type that was asked for."""
    return len(source.shapes[name]) > 1 and name.endswith(".weight") and _LEFT_ALONE.search(name) is None


def _kind(source: "_Source", name: str, kind: str) -> str:
    return _fitting(kind, source.shapes[name]) if _rounded(source, name) else source.left_kind(name)


def _fitting(kind: str, shape: Sequence[int]) -> str:
    """F16 where a block does not divide rows, as llama.cpp has it."""
    return "F16" if shape[-1] % block_size(kind)[0] else kind


def _exact(stored: str, kind: str, values: Sequence[float]) -> str:
    """The smallest plain type that holds values as they are: that of the other tensors, else F16, else a wider one."""
    small = np.array(values, dtype=np.float32)
    with np.errstate(over="ignore"):
        fits = {
            "F16": np.array_equal(small.astype(np.float16).astype(np.float32), small),
            "BF16": not np.any(small.view(np.uint32) & 0xFFFF),
            "F32": True,
        }
    order = [kind, "F16", "BF16" if stored == "BF16" else "F32", "F32"]
    return next(each for each in order if fits.get(each, False))


def _read_back(source: "_Source", weight: KeptWeight, blocks: npt.NDArray[np.uint8], kind: str) -> KeptWeight:
    """What the file holds of a weight, and what it would hold at the type of the others."""
    row, col = source.row(weight.tensor, weight.index[:-1]), weight.index[-1]
    written = dequantize_blocks(blocks[weight.index[:-1]], weight.kind, what=weight.tensor)
    found = replace(weight, written=float(written[col]))
    fitting = _fitting(kind, row.shape)
    try:
        encoded = encode(row, fitting, what=weight.tensor, threads=1)
    except UsageError:  # too large for that type, which is why it has another
        return found
    rounded = dequantize_blocks(encoded, fitting, what=weight.tensor)
    size = block_size(fitting)[0]
    others = [each for each in range(col - col % size, col - col % size + size) if each != col]
    scale = float(np.linalg.norm(row[others]))
    block_error = float(np.linalg.norm(rounded[others] - row[others])) / scale if scale else None
    return replace(found, rounded=float(rounded[col]), block_error=block_error)


def _metadata(source: "_Source", plan: QuantizedGguf) -> dict[str, MetadataValue]:
    found = {key: value for key, value in source.metadata.items() if not key.startswith(_RECORD)}
    found["general.file_type"] = MetadataValue(file_type(plan.kind), "UINT32")
    found["general.quantization_version"] = MetadataValue(2, "UINT32")
    found[f"{_RECORD}version"] = MetadataValue(__version__, "STRING")
    kept = [f"{each.coordinate} {each.value!r} in {each.tensor}, {each.kind}" for each in plan.kept]
    found[f"{_RECORD}kept"] = MetadataValue(kept, "ARRAY", "STRING")
    return found


class _Source(ABC):
    """A model as a list of tensors by llama.cpp's names, in its order."""

    reference: ModelReference
    architecture: str
    metadata: Mapping[str, MetadataValue]
    notes: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[int, ...]]
    kinds: Mapping[str, str]
    """The types that the source stores."""
    paths: tuple[Path, ...]

    @abstractmethod
    def locate(self, coordinate: Coordinate) -> tuple[str, tuple[int, ...]]:
        """The tensor that holds a weight, and its place there: expert where there are several, row, col."""

    @abstractmethod
    def values(self, name: str) -> _Values:
        """A tensor in float32."""

    @abstractmethod
    def row(self, name: str, index: tuple[int, ...]) -> _Values:
        """One row in float32."""

    @abstractmethod
    def left_kind(self, name: str) -> str:
        """The type of a tensor that is not rounded."""

    def value(self, name: str, index: tuple[int, ...]) -> float:
        """One weight."""
        return float(self.row(name, index[:-1])[index[-1]])

    def blocks(self, new: NewGgufTensor, threads: int | None) -> npt.NDArray[np.uint8]:
        """A tensor as it is written."""
        return encode(self.values(new.name), new.kind, what=f"{self.reference}, {new.name}", threads=threads)


class _Safetensors(_Source):
    """A checkpoint of a known family."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        from transformers import AutoConfig

        checkpoint.require_plain("writing GGUF")
        self.checkpoint, self.reference = checkpoint, checkpoint.reference
        self.paths = tuple(file.path for file in checkpoint.files.values())
        where = str(checkpoint.reference)
        family = family_of(model_type_of(checkpoint.config), where)
        config: Any = AutoConfig.for_model(**checkpoint.config)
        tokenizer = gguf_tokenizer(checkpoint.directory, config.vocab_size)
        self.architecture = family.architecture
        self.metadata = {
            "general.type": MetadataValue("model", "STRING"),
            "general.name": MetadataValue(
                checkpoint.reference.name.rstrip("/").rpartition("/")[2] or "model", "STRING"
            ),
            **family_metadata(family, config, where),
            **tokenizer.metadata,
        }
        self.notes = (*tokenizer.notes, *family_notes(family, config))
        self.recipes: dict[str, GgufRecipe] = {
            each.name: each for each in family_tensors(family, config, checkpoint.tensors, where)
        }
        self.shapes = {name: each.shape for name, each in self.recipes.items()}
        self.kinds = {name: self._stored_kind(each) for name, each in self.recipes.items()}

    def _stored_kind(self, recipe: GgufRecipe) -> str:
        found = {self.checkpoint.tensors[name].dtype for name in recipe.sources} or {"F32"}
        if strange := found - set(PLAIN.values()):
            raise QuantizedCheckpointError(
                f"{recipe.sources[0]} of {self.reference} is stored as {strange.pop()}. Written as GGUF are "
                f"{', '.join(PLAIN.values())}."
            )
        return found.pop() if len(found) == 1 else "F32"

    def left_kind(self, name: str) -> str:
        return "F32"

    def locate(self, coordinate: Coordinate) -> tuple[str, tuple[int, ...]]:
        tensor, _ = locate_stored(self.checkpoint, coordinate)
        recipe = next(each for each in self.recipes.values() if tensor in each.sources)
        experts = (recipe.sources.index(tensor),) if len(recipe.shape) == 3 else ()
        return recipe.name, (*experts, coordinate.row, coordinate.col)

    def values(self, name: str) -> _Values:
        recipe = self.recipes[name]
        self.checkpoint.fetch(recipe.sources)
        found = recipe.make([self.checkpoint.view(each).float().numpy() for each in recipe.sources])
        values: _Values = np.ascontiguousarray(found, dtype=np.float32)
        self.checkpoint.drop(recipe.sources)
        return values

    def row(self, name: str, index: tuple[int, ...]) -> _Values:
        """Of a down projection, which only Conv1D changes: it stores columns."""
        recipe = self.recipes[name]
        stored = recipe.sources[index[0] if len(index) > 1 else 0]
        if recipe.as_stored:
            self.checkpoint.fetch_rows(stored, [index[-1]])
            return self.checkpoint.read_row(stored, index[-1:])
        row: _Values = self.values(name)[index]
        return row


class _GgufFile(_Source):
    """A GGUF file of any architecture."""

    def __init__(self, reference: ModelReference) -> None:
        self.reference = reference
        header = read_gguf_header(reference.path)
        self.paths, self.architecture = header.paths, header.architecture
        self.metadata = {key: each for key, each in header.metadata.items() if not key.startswith("split.")}
        self.tensors = {each.name: each for each in header.tensors}
        self.shapes = {name: each.shape for name, each in self.tensors.items()}
        self.kinds = {name: each.kind for name, each in self.tensors.items()}

    def left_kind(self, name: str) -> str:
        return self.kinds[name]

    @cached_property
    def _layers(self) -> set[int]:
        return {int(match[1]) for name in self.shapes if (match := re.match(r"blk\.(\d+)\.", name))}

    def locate(self, coordinate: Coordinate) -> tuple[str, tuple[int, ...]]:
        ends = ("ffn_down", "ffn_down_shexp") if coordinate.expert is None else ("ffn_down_exps",)
        names = [f"blk.{coordinate.layer}.{end}.weight" for end in ends]
        found = [name for name in names if name in self.shapes]
        if len(found) != 1:
            layers = f"its layers are 0 to {max(self._layers)}" if self._layers else "it has no layers"
            raise CoordinateError(
                f"Looking for {coordinate} in {self.reference}: it has {len(found) or 'none'} of {' and '.join(names)}; "
                f"{layers}."
            )
        experts = () if coordinate.expert is None else (coordinate.expert,)
        index = (*experts, coordinate.row, coordinate.col)
        shape = self.shapes[found[0]]
        if len(index) != len(shape) or any(place >= length for place, length in zip(index, shape, strict=True)):
            raise CoordinateError(f"{coordinate} is outside {found[0]} of {self.reference}, which is {list(shape)}.")
        return found[0], index

    def values(self, name: str) -> _Values:
        return dequantize_blocks(self.tensors[name].blocks(), self.kinds[name], what=name)

    def row(self, name: str, index: tuple[int, ...]) -> _Values:
        return dequantize_blocks(np.array(self.tensors[name].blocks()[index]), self.kinds[name], what=name)

    def blocks(self, new: NewGgufTensor, threads: int | None) -> npt.NDArray[np.uint8]:
        if new.kind == self.kinds[new.name] and new.kind not in ("F32", "F16", "BF16"):
            return self.tensors[new.name].blocks()
        return super().blocks(new, threads)


@contextmanager
def _opened(source: ModelReference | str | Path) -> Iterator[_Source]:
    reference = ModelReference.parse(source)
    if reference.name.lower().endswith(".gguf"):
        if reference.place != "path" or not reference.path.is_file():
            raise NotACheckpointError(f"There is no file {reference}. Give a .gguf file on this disk.")
        yield _GgufFile(reference)
        return
    with Checkpoint.open(reference) as checkpoint:
        yield _Safetensors(checkpoint)
