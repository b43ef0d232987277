"""What a quantizer did to super weights: the stored values, and what their errors do to the model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from superweights.checkpoint import Checkpoint
from superweights.checkpoint.dtypes import STORAGE_TYPES
from superweights.checkpoint.gguf_families import llama_cpp_architecture
from superweights.checkpoint.packed.grids import PackedMatrix
from superweights.checkpoint.stored_projection import StoredProjection, layer_places, model_type_of, text_config
from superweights.coordinates import Coordinate
from superweights.errors import NonFiniteWeightsError, UsageError
from superweights.experiments.evaluation import evaluate
from superweights.interventions.conditions import ORIGINAL, AddToWeights, Condition, LoadWeights
from superweights.interventions.rescaled_columns import column_factor, is_unrelated
from superweights.interventions.weights import projection_of
from superweights.measurements.windows import Windows
from superweights.model.loading import LoadedModel
from superweights.progress import NO_PROGRESS, Progress
from superweights.results.records import AuditRecord, MeasurementRecord, NoteRecord

KEPT_WITHIN, LOST_BEYOND = 0.05, 0.5
"""Relative errors up to which a weight is kept, and from which it is lost: in the paper's figure 6 a factor of 0.8 costs
nothing that shows and 0.5 one point of accuracy, while 0.2 costs six and more."""


@dataclass(frozen=True)
class _Stored:
    """One matrix of the quantized checkpoint, packed or plain, as [rows, cols]."""

    format: str
    bits: float
    weights: torch.Tensor
    packed: PackedMatrix | None


def audit_weights(
    quantized: Checkpoint,
    weights: Sequence[Coordinate],
    *,
    original: Checkpoint | None = None,
    values: Mapping[Coordinate, float] | None = None,
) -> Iterator[AuditRecord]:
    """What the quantized files hold for each weight, against the original.

    Args:
        quantized: the model to look at, as `open_dequantized` gives it.
        weights: which weights.
        original: the model before; gives values, and the error of neighbours.
        values: values before, where they are known without it.

    Raises:
        CoordinateError: a weight is not in this model.
        QuantizedCheckpointError, MalformedFileError: the packed files cannot be read.
        NonFiniteWeightsError: the matrix of a weight holds NaN or infinity.
        UsageError: the two are not the same model.
    """
    if original is not None:
        require_same_model(quantized, original)
    for coordinate in dict.fromkeys(weights):
        projection = projection_of(quantized, coordinate)
        projection.index(coordinate)
        packed = quantized.packed_matrix(projection.tensor)
        stored = packed.weights if packed else _matrix(quantized, projection, coordinate)
        _require_finite(stored, f"{projection.tensor} of {quantized.reference}")
        before = None if original is None else _matrix(original, projection_of(original, coordinate), coordinate)
        if original is not None and before is not None:
            fault = None
            if before.shape != stored.shape:
                fault = f"{projection.tensor} is {list(stored.shape)} there and {list(before.shape)} in {original.reference}"
            elif is_unrelated(before[:, coordinate.col], stored[:, coordinate.col]):
                fault = (
                    f"col {coordinate.col} of {projection.tensor} has nothing to do with that in {original.reference}: its "
                    "weights are rotated, or of another model"
                )
            if fault:
                raise UsageError(f"Auditing {quantized.reference}: {fault}. Give the model it was made from.")
        if packed is None:
            storage = STORAGE_TYPES[quantized.stored_as(projection.tensor)]
            found = _Stored("plain", float(storage.nbits), stored, None)
        else:
            found = _Stored(packed.format, packed.bits, stored, packed)
        yield _audit(coordinate, projection.tensor, found, before, (values or {}).get(coordinate))


def require_same_model(quantized: Checkpoint, original: Checkpoint) -> None:
    """Refuses an original of another model type or size.

    Raises:
        UsageError: it is another.
    """
    types = [model_type_of(each.config) for each in (quantized, original)]
    if quantized.gguf_file is not None:  # llama.cpp has one name for several
        types = [llama_cpp_architecture(each) for each in types]
    if types[0] != types[1]:
        raise UsageError(
            f"Auditing {quantized.reference}: it is a {types[0]}, and {original.reference} is a {types[1]}. Give the model it "
            "was made from."
        )
    for size in ("num_hidden_layers", "hidden_size", "intermediate_size"):
        here, there = (text_config(each.config).get(size) for each in (quantized, original))
        if here != there and None not in (here, there):
            raise UsageError(
                f"Auditing {quantized.reference}: its {size} is {here}, and that of {original.reference} is {there}. Give the "
                "model it was made from."
            )


def _require_finite(values: torch.Tensor, what: str) -> None:
    bad = values.numel() - int(values.isfinite().sum())
    if bad:
        raise NonFiniteWeightsError(
            f"Auditing {what}: {bad} of its weights, or the scales that make them, are NaN or infinite. Download or quantize "
            "the model again."
        )


def _matrix(checkpoint: Checkpoint, projection: StoredProjection, coordinate: Coordinate) -> torch.Tensor:
    """The matrix that holds a weight, float32 [rows, cols]."""
    checkpoint.fetch((projection.tensor,), populate=False)
    found = checkpoint.view(projection.tensor)
    matrix = found if projection.experts is None or coordinate.expert is None else found[coordinate.expert]
    return (matrix.t() if projection.transposed else matrix).float()


def _audit(
    coordinate: Coordinate, tensor: str, stored: _Stored, before: torch.Tensor | None, known: float | None
) -> AuditRecord:
    row, col = coordinate.row, coordinate.col
    value = float(stored.weights[row, col])
    original = float(before[row, col]) if before is not None else known
    scale = 1.0 if before is None else column_factor(before[:, col], stored.weights[:, col])
    expected = None if original is None else scale * original
    packed = stored.packed
    block = None if packed is None else packed.block(row, col)
    error = None if expected is None or expected == 0 else value / expected - 1
    step = None if packed is None else packed.step(row, col)
    clipped = None
    if expected is not None:
        clipped = (
            packed is not None and bool(packed.at_end[row, col]) and abs(value) < abs(expected) - 0.5 * (step or 0)
        )
    verdict: Literal["kept", "bent", "lost", "unknown"] = "unknown"
    if error is not None:
        verdict = "kept" if abs(error) <= KEPT_WITHIN else "bent" if abs(error) < LOST_BEYOND else "lost"
    return AuditRecord(
        coordinate=str(coordinate),
        tensor=tensor,
        format=stored.format,
        bits=stored.bits,
        original=original,
        stored=value,
        column_scale=scale,
        error=error,
        error_steps=None if step is None or expected is None or step == 0 else (value - expected) / step,
        clipped=clipped,
        block_error=None
        if before is None or block is None
        else _block_error(stored.weights, before, block, (row, col)),
        block_size=1 if block is None else int(block.sum()),
        verdict=verdict,
        reason=_reason(coordinate, stored, value, original, scale, error, clipped),
    )


def _block_error(
    stored: torch.Tensor, before: torch.Tensor, block: torch.Tensor, place: tuple[int, int]
) -> float | None:
    """Of the weights that share a scale but one; columns that were rescaled are compared by their own scales."""
    others = block.clone()
    others[place] = False
    cols = others.any(0).nonzero().flatten()
    scales = torch.ones(before.shape[1])
    for col in cols.tolist():
        scales[col] = column_factor(before[:, col], stored[:, col])
    expected = (before * scales)[others]
    total = float(expected.square().sum())
    return (float((stored[others] - expected).square().sum()) / total) ** 0.5 if total > 0 else None


def _reason(
    coordinate: Coordinate,
    stored: _Stored,
    value: float,
    original: float | None,
    scale: float,
    error: float | None,
    clipped: bool | None,
) -> str:
    where = "unpacked" if stored.packed is None else f"packed as {stored.format}"
    if original is None or error is None:
        return f"{coordinate} is {where} with the value {value:.6g}; what it was is not known (--original tells)."
    rescaled = f", its column being multiplied by {scale:.3g}" if scale != 1 else ""
    cut = "cut off at the end of its grid" if clipped else "rounded" if error else "exact"
    return f"{coordinate} is {where}: {original:.6g} became {value:.6g}{rescaled}, {cut} ({100 * error:+.3g} %)."


def measure_audit(
    model: LoadedModel,
    quantized: Checkpoint,
    audited: Sequence[AuditRecord],
    windows: Windows,
    *,
    progress: Progress = NO_PROGRESS,
) -> Iterator[MeasurementRecord | NoteRecord]:
    """What the stored values do: those of super weights alone, those of all matrices, and all but the super weights.

    Args:
        model: the original, from a checkpoint.
        quantized: the quantized checkpoint, as `open_dequantized` gives it.
        audited: what `audit_weights` found; rescaled columns are not put back.
        windows: the text.
        progress: hears about windows.
    """
    assert model.checkpoint is not None
    there, here = _places(quantized), _places(model.checkpoint)
    missing = [name for place, name in here.items() if place not in there]
    if missing:  # the original's would stand in, and what is measured would be another model
        what = f"{missing[0]} ({len(missing)} tensors of decoder layers are missing)"
        yield NoteRecord(level="warning", text=f"Not measured: {quantized.reference} has no {what}.")
        return
    names = {name: there[place] for place, name in here.items()}

    def read(name: str) -> torch.Tensor:
        quantized.fetch((names[name],), populate=False)
        values = quantized.view(names[name])
        _require_finite(values, f"{names[name]} of {quantized.reference}")
        return values

    changed = {
        Coordinate.parse(each.coordinate): each.stored - each.original
        for each in audited
        if each.original is not None and each.stored != each.original and each.column_scale == 1
    }
    load = LoadWeights(str(quantized.reference), read)
    conditions = [ORIGINAL, Condition("quantized", (load,))]
    if changed:
        shifts = AddToWeights(tuple(changed), tuple(changed.values()))
        conditions.insert(1, Condition("errors of the super weights alone", (shifts,)))
        restored = LoadWeights(load.source, load.read, keep=tuple(changed))
        conditions.append(Condition("quantized, super weights put back", (restored,)))
    yield from evaluate(model, windows, conditions, progress=progress).records()


def _places(checkpoint: Checkpoint) -> dict[tuple[int, str], str]:
    shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    return layer_places(shapes, checkpoint.config)
