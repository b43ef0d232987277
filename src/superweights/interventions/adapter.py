"""What a quantizer took from super weights, as a LoRA that any engine adds on top of the quantized model.

`y[row] += delta * x[col]`, with delta = original - quantized, is a LoRA of rank one: A is 1 at col, B is delta at row, and
alpha equals the rank, so that nothing scales it. Several weights of one matrix are as many ranks. The matrix itself stays
packed; the adapter has a few kilobytes.

Two forms: PEFT's (adapter_config.json and adapter_model.safetensors) and llama.cpp's (adapter.gguf). The quantized model is a
checkpoint of any packed format that `superweights.checkpoint.packed` reads, or a GGUF file. `superweights.json` beside the
adapter says what it was made for, since it restores the value on that model alone.
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from superweights import __version__
from superweights.checkpoint import Checkpoint, ModelReference
from superweights.checkpoint.copying import new_folder, sync_folder, write_file
from superweights.checkpoint.gguf_families import llama_cpp_architecture
from superweights.checkpoint.gguf_header import read_gguf_header
from superweights.checkpoint.header import load_json
from superweights.checkpoint.packed.gguf import PLAIN, dequantize_blocks, gguf_package
from superweights.checkpoint.packed.reading import read_packed_matrix
from superweights.checkpoint.stored_projection import layer_tensors, model_type_of, text_config
from superweights.coordinates import Coordinate
from superweights.errors import (
    MalformedFileError,
    MissingTensorError,
    NonFiniteWeightsError,
    NotACheckpointError,
    RecordError,
    UnsupportedArchitectureError,
    UsageError,
)
from superweights.interventions.rescaled_columns import column_factor, is_unrelated
from superweights.interventions.weights import locate_stored
from superweights.model.architecture import DownProjection
from superweights.model.loading import LoadedModel

Form = Literal["peft", "gguf"]
"""How an adapter is written: as PEFT writes LoRA, or as llama.cpp reads it."""
RunningDtype = Literal["auto", "float32", "bfloat16", "float16"]
"""What the engine rounds unpacked weights to; auto: the dtype that the model's config names, float32 for a GGUF file."""

_RECORD = "superweights.json"
_FILES: dict[Form, str] = {"peft": "adapter_model.safetensors", "gguf": "adapter.gguf"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which model something was made of, or for."""

    name: str
    """A directory, a file, a Hub name or a URL."""
    revision: str | None
    """The commit, for a model of the Hub."""
    digest: str
    """Identity of its headers, see `Checkpoint.digest`."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One weight, before and after."""

    coordinate: Coordinate
    """Where it is."""
    original: float
    """Its value in the original."""
    quantized: float
    """Its value in the quantized model, as the engine unpacks it."""

    @property
    def delta(self) -> float:
        """What the adapter adds: original - quantized, rounded once to float32."""
        with np.errstate(over="ignore"):
            return float(np.float32(self.original - self.quantized))


@dataclass(frozen=True, slots=True)
class AdaptedMatrix:
    """A down projection and what is added to it."""

    module: str
    """Name of its module in the model, as in `model.get_submodule`."""
    stored: str
    """Name under which the quantized model stores it: of the module in a checkpoint, of the tensor in a GGUF file."""
    plain: bool
    """Whether it is stored as plain numbers."""
    rows: int
    """Output channels."""
    cols: int
    """Input channels."""
    transposed: bool
    """Whether the module keeps its weight as [cols, rows]."""
    weights: tuple[Difference, ...]
    """Its weights; none of them twice."""

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The LoRA: W + B A is W with the weights restored.

        Args:
            rank: at least as many as there are weights; what is over is zeros.

        Returns:
            A [rank, cols] and B [rows, rank], float32.

        Example:
            >>> weight = Difference(Coordinate.parse("0:1:2"), original=3.0, quantized=2.5)
            >>> lora_a, lora_b = AdaptedMatrix("down", "down", False, 2, 4, False, (weight,)).factors(1)
            >>> (lora_b @ lora_a).tolist()
            [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.0]]
        """
        lora_a, lora_b = torch.zeros(rank, self.cols), torch.zeros(self.rows, rank)
        for number, each in enumerate(self.weights):
            lora_a[number, each.coordinate.col] = 1.0
            lora_b[each.coordinate.row, number] = each.delta
        return lora_a, lora_b


_MATRIX_FIELDS = [each.name for each in fields(AdaptedMatrix) if each.name != "weights"]


@dataclass(frozen=True)
class Adapter:
    """What restores super weights on top of a quantized model."""

    form: Form
    """How it is written."""
    original: ModelIdentity
    """Where the values come from."""
    quantized: ModelIdentity
    """What it belongs on."""
    architecture: str
    """What llama.cpp calls the architecture, or the model type of transformers: as the form wants it."""
    dtype: str
    """What the engine rounds unpacked weights to, such as bfloat16."""
    matrices: tuple[AdaptedMatrix, ...]
    """The matrices it changes."""
    unchanged: tuple[AdaptedMatrix, ...] = ()
    """Weights that were asked for and are equal in both models; nothing is added there."""

    @property
    def weights(self) -> tuple[Difference, ...]:
        """The weights it restores."""
        return tuple(weight for each in self.matrices for weight in each.weights)

    @property
    def rank(self) -> int:
        """The most weights of one matrix. All matrices get it, as engines know one rank and one alpha."""
        return max((len(each.weights) for each in self.matrices), default=0)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the adapter's file, float32, by the names of its form."""
        found = {}
        for each in self.matrices:
            lora_a, lora_b = each.factors(self.rank)
            if self.form == "peft":
                found[f"base_model.model.{each.module}.lora_A.weight"] = lora_a
                found[f"base_model.model.{each.module}.lora_B.weight"] = lora_b
            else:
                name = _gguf_name(self.architecture, each.module)
                found[f"{name}.lora_a"], found[f"{name}.lora_b"] = lora_a, lora_b
        return found


def plan_adapter(
    original: LoadedModel,
    quantized: "QuantizedFiles",
    weights: Sequence[Coordinate],
    *,
    form: Form = "peft",
    dtype: RunningDtype = "auto",
) -> Adapter:
    """Measures what quantization did to weights.

    Args:
        original: the model with the exact values.
        quantized: the same model after quantization; see `open_quantized`.
        weights: which weights to restore; none for no more than the checks.
        form: how the adapter is to be written.
        dtype: what the engine rounds unpacked weights to.

    Raises:
        UsageError: the models do not fit each other, or a weight is of a routed expert.
        CoordinateError: a weight is not in the model.
        NonFiniteWeightsError: a value is NaN or infinite in one of the models.
        QuantizedCheckpointError: the original is quantized itself, or the format of the quantized model is not read.
        MissingTensorError, MalformedFileError: the quantized model lacks the matrix, or parts of it.
        UnsupportedArchitectureError: llama.cpp has no such architecture.
    """
    if original.checkpoint is None:
        raise UsageError(
            f"Making an adapter: {original.name} is in memory only, so nothing says later what was restored."
        )
    original.checkpoint.require_plain("restoring exact values")
    quantized.require_fit(original)
    architecture = model_type_of(original.checkpoint.config)
    if form == "gguf":
        architecture = quantized.architecture or _gguf_architecture(architecture)
    grouped: defaultdict[DownProjection, list[Coordinate]] = defaultdict(list)
    for each in dict.fromkeys(weights):
        projection = original.architecture.locate(each)
        if each.expert is not None:
            raise UsageError(
                f"{each} is of a routed expert, and all experts of a layer are one parameter of {projection.module}, on which "
                "engines load no LoRA in one common form. Leave it out, or keep that matrix unrounded with `quantize`."
            )
        grouped[projection].append(each)
    running = quantized.dtype if dtype == "auto" else dtype
    found = [_difference(original, quantized, *each, running) for each in grouped.items()]
    changed = [_part(each, restored=True) for each in found]
    same = [_part(each, restored=False) for each in found]
    if form == "gguf":
        for matrix in changed:
            _gguf_name(architecture, matrix.module)
    return Adapter(
        form,
        ModelIdentity(original.name, original.checkpoint.revision, original.checkpoint.digest),
        quantized.identity,
        architecture,
        running,
        tuple(each for each in changed if each.weights),
        tuple(each for each in same if each.weights),
    )


def _difference(
    original: LoadedModel,
    quantized: "QuantizedFiles",
    projection: DownProjection,
    weights: Sequence[Coordinate],
    dtype: str,
) -> AdaptedMatrix:
    stored = quantized.find(_names(original, projection, weights[0]))
    matrix = quantized.matrix(stored, transposed=projection.transposed)
    if matrix.shape != (projection.rows, projection.cols):
        raise UsageError(
            f"{quantized.identity.name} is not {original.name} quantized: {stored} is {_times(matrix.shape)} there, and "
            f"{_times((projection.rows, projection.cols))} in the original."
        )
    with original.attached(projection) as parameter:
        before = (parameter.t() if projection.transposed else parameter).detach().cpu()  # [rows, cols]
        for each in weights:
            fault = _fault(before[:, each.col].float(), matrix.column(each.col))
            if fault:
                raise UsageError(
                    f"Restoring {each} on {quantized.identity.name}: col {each.col} of {stored} {fault}, so the value of the "
                    "original is not what belongs there. Leave it out, or quantize without such a step."
                )
        differences = tuple(
            Difference(each, float(before[each.row, each.col]), matrix.value(each, dtype)) for each in weights
        )
    for difference in differences:
        if not math.isfinite(difference.delta):
            raise NonFiniteWeightsError(
                f"Restoring {difference.coordinate}: it is {difference.original:g} in {original.name} and "
                f"{difference.quantized:g} in "
                f"{quantized.identity.name}, and no finite number turns one into the other. Leave it out."
            )
    return AdaptedMatrix(
        projection.module,
        stored,
        matrix.plain,
        projection.rows,
        projection.cols,
        projection.transposed,
        differences,
    )


def _fault(before: torch.Tensor, after: torch.Tensor) -> str | None:
    """What makes a column of the quantized model anything else than that of the original, rounded; float32 [rows] both."""
    if is_unrelated(before, after):
        return "has nothing to do with that of the original, as where weights are rotated"
    factor = column_factor(before, after)
    return None if factor == 1 else f"is multiplied by about {factor:.3g}, as AWQ and SmoothQuant do"


def _names(original: LoadedModel, projection: DownProjection, weight: Coordinate) -> list[str]:
    """The modules under whose names a checkpoint may store a matrix: the model's own, and the original checkpoint's."""
    names = [projection.module]
    assert original.checkpoint is not None
    with suppress(UnsupportedArchitectureError):  # only a second chance
        names.append(locate_stored(original.checkpoint, weight)[0].rpartition(".")[0])
    return list(dict.fromkeys(names))


def _part(matrix: AdaptedMatrix, *, restored: bool) -> AdaptedMatrix:
    """The matrix with those of its weights that differ, or those that do not."""
    chosen = tuple(each for each in matrix.weights if (each.delta != 0) == restored)
    return replace(matrix, weights=chosen)


def _times(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"


# The quantized model: a checkpoint, or a GGUF file.


@dataclass(frozen=True)
class _Matrix:
    """A matrix as the quantized model holds it, [rows, cols]."""

    values: torch.Tensor
    plain: bool
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.values.shape
        return (cols, rows) if self.transposed else (rows, cols)

    def column(self, col: int) -> torch.Tensor:
        """One input channel, float32 [rows]."""
        return (self.values[col] if self.transposed else self.values[:, col]).float()

    def value(self, weight: Coordinate, dtype: str) -> float:
        place = (weight.col, weight.row) if self.transposed else (weight.row, weight.col)
        return float(self.values[place].to(_DTYPES[dtype])) + 0.0  # a code of zero may be minus zero


class QuantizedFiles:
    """A quantized checkpoint, as far as an adapter needs it."""

    architecture: str | None = None
    """What the files themselves say llama.cpp calls the architecture."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @property
    def dtype(self) -> str:
        """The dtype in which its config says that it runs; engines round unpacked weights to it."""
        configs = (self.checkpoint.config, text_config(self.checkpoint.config))
        named = [str(config[key]) for config in configs for key in ("dtype", "torch_dtype") if config.get(key)]
        name = named[0].removeprefix("torch.") if named else "float32"
        return name if name in _DTYPES else "float32"

    @cached_property
    def identity(self) -> ModelIdentity:
        """Which model it is."""
        return ModelIdentity(self.checkpoint.reference.name, self.checkpoint.revision, self.checkpoint.digest)

    def require_fit(self, original: LoadedModel) -> None:
        """Refuses what cannot be the original quantized.

        Raises:
            UsageError: the model types or the numbers of layers differ.
        """
        assert original.checkpoint is not None
        types = [model_type_of(each.config) for each in (self.checkpoint, original.checkpoint)]
        shapes = {name: entry.shape for name, entry in self.checkpoint.tensors.items()}
        layers = len(layer_tensors(shapes, self.checkpoint.config)), original.architecture.layer_count
        if types[0] != types[1] or layers[0] != layers[1]:
            raise UsageError(
                f"{self.identity.name} is not {original.name} quantized: it is a {types[0]} of {layers[0]} layers, and the "
                f"original is a {types[1]} of {layers[1]}."
            )

    def find(self, modules: Sequence[str]) -> str:
        """The first of some modules that it stores.

        Raises:
            MissingTensorError: it stores none of them.
        """
        for module in modules:
            if any(name.rpartition(".")[0] == module for name in self.checkpoint.tensors):
                return module
        raise MissingTensorError(
            f"{self.identity.name} has no matrix {' or '.join(modules)}. Give the model that was quantized from the original."
        )

    def matrix(self, stored: str, *, transposed: bool) -> _Matrix:
        """A matrix by the name of its module.

        Raises:
            QuantizedCheckpointError: its packed format is not read.
            MalformedFileError, MissingTensorError: parts of it are missing, or do not fit together.
        """
        packed = read_packed_matrix(self.checkpoint, stored)
        if packed is not None:
            return _Matrix(packed.weights, plain=False)
        name = f"{stored}.weight"
        self.checkpoint.fetch((name,))
        return _Matrix(self.checkpoint.view(name), plain=True, transposed=transposed)


class _GgufFile(QuantizedFiles):
    """A quantized model as a GGUF file."""

    dtype = "float32"

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise NotACheckpointError(
                f"There is no such file: {path}. Give a .gguf file, or a directory with a quantized model."
            )
        header = read_gguf_header(path)
        self.architecture = header.architecture
        self.layers = header.settings.get("block_count", 0)
        self.path, self.header = path, header
        self.tensors = {each.name: each for each in header.tensors}

    @cached_property
    def identity(self) -> ModelIdentity:
        return ModelIdentity(str(self.path), None, self.header.digest)

    def require_fit(self, original: LoadedModel) -> None:
        assert original.checkpoint is not None
        model_type = model_type_of(original.checkpoint.config)
        expected = llama_cpp_architecture(model_type)
        known = expected in gguf_package().MODEL_ARCH_NAMES.values()
        layers = original.architecture.layer_count
        if (known and expected != self.architecture) or self.layers != layers:
            raise UsageError(
                f"{self.path} is not {original.name} quantized: it is a {self.architecture} of {self.layers} layers, and the "
                f"original is a {model_type} of {layers}."
            )

    def find(self, modules: Sequence[str]) -> str:
        assert self.architecture is not None
        name = _gguf_name(self.architecture, modules[0])
        if name not in self.tensors:
            raise MissingTensorError(
                f"{self.path} has no tensor {name}, which {modules[0]} becomes in GGUF. Give the model that was quantized from "
                "the original."
            )
        return name

    def matrix(self, stored: str, *, transposed: bool) -> _Matrix:
        tensor = self.tensors[stored]  # [rows, cols] in any case: the converters transpose
        values = dequantize_blocks(tensor.blocks(), tensor.kind, what=f"{stored} of {self.path}")
        return _Matrix(torch.from_numpy(values), plain=tensor.kind in PLAIN)


@contextmanager
def open_quantized(name: str | Path, *, revision: str | None = None) -> Iterator[QuantizedFiles]:
    """Opens a quantized model: a directory, a Hub name or a URL, or a .gguf file.

    Raises:
        CheckpointError: its files cannot be used.
        UsageError: a GGUF file needs `superweights[gguf]`, which is not installed.
    """
    if str(name).lower().endswith(".gguf"):
        yield _GgufFile(Path(name))
        return
    with Checkpoint.open(ModelReference.parse(name, revision=revision)) as checkpoint:
        yield QuantizedFiles(checkpoint)


# Writing and reading back.


def write_adapter(adapter: Adapter, to: str | Path) -> int:
    """Writes an adapter's folder: whole, or not at all.

    Returns:
        Bytes of the adapter's tensors file.

    Raises:
        UsageError: there is nothing to restore, `to` is taken, or `superweights[gguf]` is not installed.
        RecordError: the folder cannot be written; nothing is left of it.
    """
    if not adapter.matrices:
        raise UsageError(f"Writing an adapter for {adapter.quantized.name}: there is nothing to restore.")
    target = Path(to).expanduser().resolve()
    require_free(target)
    try:
        with new_folder(target) as folder:
            write_adapter_files(adapter, folder)
        sync_folder(target.parent)
        return (target / _FILES[adapter.form]).stat().st_size
    except OSError as error:
        raise RecordError(
            f"Cannot write an adapter to {to}: {error.strerror}. Nothing was changed there. Give a folder that you can write."
        ) from error


def write_adapter_files(adapter: Adapter, folder: Path) -> None:
    """Writes the files of an adapter into a folder that is new itself.

    Raises:
        UsageError: `superweights[gguf]` is not installed.
        OSError: they cannot be written.
    """
    folder.mkdir(exist_ok=True)
    _write_tensors(adapter, folder / _FILES[adapter.form])
    texts = {_RECORD: _record(adapter)}
    if adapter.form == "peft":
        texts["adapter_config.json"] = _peft_config(adapter)
    for name, content in texts.items():
        write_file(folder / name, [json.dumps(content, indent=2).encode(), b"\n"])


def require_free(to: str | Path) -> None:
    """Refuses a folder that is taken.

    Raises:
        UsageError: it is a file, or not empty.
    """
    target = Path(to).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        what = "the folder is not empty" if target.is_dir() else "that is a file"
        raise UsageError(f"Writing an adapter to {to}: {what}. Give a new folder.")


def check_adapter(folder: str | Path, quantized: QuantizedFiles | Checkpoint) -> Adapter:
    """Reads an adapter back and refuses it for any other model than the one it was made for.

    The headers of the model must be those of then, and each weight must have the value that delta was taken from: two
    checkpoints of one scheme have equal headers.

    Args:
        folder: what `write_adapter` wrote.
        quantized: the model it is to be used with.

    Raises:
        UsageError: it was made for another model.
        NotACheckpointError: there is no adapter of superweights.
        MalformedFileError: its files contradict each other.
        QuantizedCheckpointError, MissingTensorError: as `plan_adapter`.
    """
    files = QuantizedFiles(quantized) if isinstance(quantized, Checkpoint) else quantized
    path = Path(folder) / _RECORD
    if not path.is_file():
        raise NotACheckpointError(
            f"There is no adapter of superweights in {folder}: it has no {_RECORD}. Give its folder."
        )
    adapter = _parsed(load_json(path.read_bytes(), file=str(path)), file=str(path))
    wrong = f"The adapter in {folder} was made for {adapter.quantized.name}, and {files.identity.name} is another model"
    if adapter.quantized.digest != files.identity.digest:
        raise UsageError(f"{wrong}: its tensors differ. Make one for it with `superweights adapter`.")
    for matrix in adapter.matrices:
        values = files.matrix(matrix.stored, transposed=matrix.transposed)
        for each in matrix.weights:
            value = values.value(each.coordinate, adapter.dtype)
            if value != each.quantized:
                raise UsageError(
                    f"{wrong}: {each.coordinate} is {value:g} there, not {each.quantized:g}. Make one for it with "
                    "`superweights adapter`."
                )
    _require_tensors(adapter, Path(folder) / _FILES[adapter.form])
    return adapter


def _require_tensors(adapter: Adapter, file: Path) -> None:
    """Refuses a file that does not hold the tensors that the record describes."""
    try:
        found = _read_gguf(file) if adapter.form == "gguf" else load_file(file)
    except (SafetensorError, ValueError, IndexError, OSError) as error:
        raise MalformedFileError(f"{file} cannot be read: {error}. Make the adapter again.") from error
    expected = adapter.tensors()
    if found.keys() != expected.keys() or any(not torch.equal(found[name], expected[name]) for name in expected):
        raise MalformedFileError(f"{file} does not hold what {_RECORD} beside it says. Make the adapter again.")


def _write_tensors(adapter: Adapter, file: Path) -> None:
    tensors = adapter.tensors()
    if adapter.form == "peft":
        write_file(file, [save(tensors, metadata={"format": "pt"})])
        return
    gguf = gguf_package()
    writer = gguf.GGUFWriter(file, adapter.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.rank))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with file.open("rb+") as written:
        os.fsync(written.fileno())


def _read_gguf(file: Path) -> dict[str, torch.Tensor]:
    return {
        each.name: torch.from_numpy(dequantize_blocks(each.blocks(), each.kind, what=each.name).copy())
        for each in read_gguf_header(file).tensors
    }


def _peft_config(adapter: Adapter) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.quantized.name,
        "revision": adapter.quantized.revision,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.rank,
        "lora_dropout": 0.0,
        "target_modules": [each.module for each in adapter.matrices],
        "fan_in_fan_out": any(each.transposed for each in adapter.matrices),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def _record(adapter: Adapter) -> dict[str, Any]:
    """The adapter as data."""
    return {
        "made_by": f"superweights {__version__}",
        "form": adapter.form,
        "original": asdict(adapter.original),
        "quantized": asdict(adapter.quantized),
        "architecture": adapter.architecture,
        "dtype": adapter.dtype,
        "matrices": [
            {
                **{name: getattr(each, name) for name in _MATRIX_FIELDS},
                "weights": [
                    {
                        "coordinate": str(weight.coordinate),
                        "original": weight.original,
                        "quantized": weight.quantized,
                        "delta": weight.delta,
                    }
                    for weight in each.weights
                ],
            }
            for each in adapter.matrices
        ],
    }


def _parsed(record: Mapping[str, Any], *, file: str) -> Adapter:
    try:
        form: Form = record["form"]
        matrices = tuple(
            AdaptedMatrix(
                **{name: each[name] for name in _MATRIX_FIELDS},
                weights=tuple(
                    Difference(Coordinate.parse(weight["coordinate"]), weight["original"], weight["quantized"])
                    for weight in each["weights"]
                ),
            )
            for each in record["matrices"]
        )
        adapter = Adapter(
            form,
            ModelIdentity(**record["original"]),
            ModelIdentity(**record["quantized"]),
            record["architecture"],
            record["dtype"],
            matrices,
        )
        sound = (
            form in _FILES
            and adapter.dtype in _DTYPES
            and all(
                each.coordinate.row < matrix.rows and each.coordinate.col < matrix.cols
                for matrix in matrices
                for each in matrix.weights
            )
        )
    except (KeyError, TypeError, UsageError) as error:
        raise MalformedFileError(f"{file} is no record of an adapter: {error}. Make the adapter again.") from error
    if not sound:
        raise MalformedFileError(f"{file} contradicts itself. Make the adapter again.")
    return adapter


# llama.cpp's names.


def _gguf_architecture(model_type: str) -> str:
    name = llama_cpp_architecture(model_type)
    if name not in gguf_package().MODEL_ARCH_NAMES.values():
        raise UnsupportedArchitectureError(
            f"llama.cpp is not known to have an architecture for the model type {model_type}. Give the quantized model as a "
            ".gguf file, which names it, or write the form peft."
        )
    return name


def _gguf_name(architecture: str, module: str) -> str:
    """What the weight of a module is called in GGUF."""
    gguf = gguf_package()
    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in architectures:
        raise UnsupportedArchitectureError(f"The package gguf knows no architecture {architecture}. Try a newer one.")
    layers = 1 + max((int(part) for part in module.split(".") if part.isdecimal()), default=0)
    name = gguf.get_tensor_name_map(architectures[architecture], layers).get_name(module)
    if name is None:
        raise UnsupportedArchitectureError(
            f"llama.cpp has no name for {module} in its architecture {architecture}. Write the form peft."
        )
    return f"{name}.weight"
