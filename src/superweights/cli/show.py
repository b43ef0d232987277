"""The verb `show`: single weights, read from the file's bytes alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from cyclopts import Parameter

from superweights.checkpoint import Checkpoint
from superweights.checkpoint.opening import open_dequantized
from superweights.checkpoint.stored_projection import StoredProjection, find_stored_projection, named_stored_projection
from superweights.cli.output import DEFAULT_OUTPUT, OutputSettings, write_rows, write_table, write_text
from superweights.cli.stored_weight import PackedPlace, StoredWeight, read_stored_weight
from superweights.coordinates import Coordinate
from superweights.detection.published import PublishedWeight, published_name, published_weights
from superweights.errors import UnknownNameError, UsageError


@Parameter(name="*", negative=())
@dataclass(frozen=True, slots=True)
class ShowSettings:
    """Where `show` looks."""

    tensor: str | None = None
    """Look in this tensor, for a model whose down projections are not recognised."""
    transposed: bool = False
    """The tensor named by --tensor is stored [cols, rows]."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""


_DEFAULT_SETTINGS = ShowSettings()


def show(
    model: str,
    /,
    *coordinates: str,
    settings: ShowSettings = _DEFAULT_SETTINGS,
    output: OutputSettings = DEFAULT_OUTPUT,
) -> int:
    """Shows single weights of down projections from the file's bytes, without loading the model.

    For each: value, dtype, bits (sign, exponent, mantissa), rank by absolute value in its matrix, neighbours in its row
    and column, and the tensor, file and byte where it lies; for a quantized weight the value that code and scales stand for,
    and where it is on its grid. It also says what was published about the coordinate.

    Args:
        model: A directory, a .gguf file, a Hub name or a URL.
        coordinates: LAYER:ROW:COL, or LAYER/EXPERT:ROW:COL for a routed expert; row = output channel, col = input channel.
    """
    if not coordinates:
        raise UsageError("Give at least one coordinate, as in: superweights show ./model 2:3968:7003")
    if settings.transposed and settings.tensor is None:
        raise UsageError("--transposed describes the tensor named by --tensor; give both or neither.")
    wanted = [Coordinate.parse(text) for text in coordinates]
    with open_dequantized(model, revision=settings.revision) as checkpoint:
        weights = [read_stored_weight(checkpoint, _locate(checkpoint, each, settings), each) for each in wanted]
        known = _published(checkpoint)
    if output.format != "table":
        write_rows([_row(weight, known) for weight in weights], format=output.format)
        return 0
    for place, weight in enumerate(weights):
        write_text("\n" if place else "")
        lines = _lines(weight, known)
        write_table([{"name": name, "text": text} for name, text in lines.items()], headers=False)
    return 0


def _locate(checkpoint: Checkpoint, coordinate: Coordinate, settings: ShowSettings) -> StoredProjection:
    if settings.tensor is None:
        shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
        return find_stored_projection(shapes, checkpoint.config, coordinate=coordinate)
    shape = checkpoint.entry(settings.tensor).shape
    return named_stored_projection(settings.tensor, shape, transposed=settings.transposed, coordinate=coordinate)


def _published(checkpoint: Checkpoint) -> dict[str, list[PublishedWeight]]:
    """What was published about the model, by coordinate as text; the model is known by its name or its config's."""
    reference = checkpoint.reference.name
    for name in (reference, PurePath(reference).name, str(checkpoint.config.get("_name_or_path"))):
        try:
            entries = published_weights(published_name(name))
        except UnknownNameError:
            continue
        return {text: [each for each in entries if each.coordinate_text == text] for text in _texts(entries)}
    return {}


def _texts(entries: Sequence[PublishedWeight]) -> set[str]:
    return {entry.coordinate_text for entry in entries}


def _said(entry: PublishedWeight) -> str:
    note = f" ({entry.note})" if entry.note else ""
    return f"{entry.status} for {entry.model}{note}: {entry.source}"


def _row(weight: StoredWeight, known: Mapping[str, Sequence[PublishedWeight]]) -> dict[str, Any]:
    scalar, packed, coordinate = weight.scalar, weight.packed, weight.coordinate
    return {
        "coordinate": str(coordinate),
        "value": weight.value,
        "dtype": scalar and scalar.dtype,
        "bits": scalar and scalar.bits_text,
        "rank": weight.rank,
        "count": weight.count,
        "non_finite": weight.non_finite,
        "largest": weight.largest,
        "z_score": weight.z_score,
        "row_neighbours": weight.row_neighbours,
        "col_neighbours": weight.col_neighbours,
        "tensor": weight.projection.tensor,
        "index": list(weight.index),
        "transposed": weight.projection.transposed,
        "file": scalar and scalar.file,
        "offset": scalar and scalar.offset,
        "format": packed and packed.format,
        "step": packed and packed.step,
        "at_end": packed and packed.at_end,
        "sharing": packed and packed.shared,
        "published": [_said(entry) for entry in known.get(str(coordinate), ())],
    }


def _lines(weight: StoredWeight, known: Mapping[str, Sequence[PublishedWeight]]) -> dict[str, str]:
    scalar, coordinate, projection = weight.scalar, weight.coordinate, weight.projection
    order = "cols, rows" if projection.transposed else "rows, cols"
    lines = {"weight": str(coordinate), "value": f"{weight.value:.9g}"}
    if scalar is not None:
        lines["bits"] = f"{scalar.bits_text} ({scalar.dtype}, {scalar.bits:#0{2 + scalar.nbits // 4}x})"
    if weight.packed is not None:
        lines["packed"] = _grid(weight.packed)
    lines |= {
        "rank": f"{weight.rank or 'none'} of {weight.count} by absolute value",
        "size": _size(weight),
        f"row {coordinate.row}": _neighbours("col", weight.row_neighbours, coordinate.col),
        f"col {coordinate.col}": _neighbours("row", weight.col_neighbours, coordinate.row),
        "tensor": f"{projection.tensor}, {projection.rows} rows, {projection.cols} cols, stored [{order}]",
    }
    if scalar is not None:
        lines["place"] = f"{scalar.file}, byte {scalar.offset}"
    if weight.non_finite:
        lines["warning"] = f"{weight.non_finite} weights of the matrix are NaN or infinite"
    said = [_said(entry) for entry in known.get(str(coordinate), ())]
    return {**lines, **{f"published {place}": text for place, text in enumerate(said, start=1)}}


def _grid(packed: PackedPlace) -> str:
    if packed.shared is None:
        return f"{packed.format}, in another order than the model's"
    if packed.step is None:
        return f"{packed.format}, several weights to a code; {packed.shared} weights share a scale"
    end = ", at the end of its grid" if packed.at_end else ""
    return f"{packed.format}, in steps of {packed.step:.6g}{end}; {packed.shared} weights share its scale"


def _size(weight: StoredWeight) -> str:
    share = f"{abs(weight.value) / weight.largest:.3g} of" if weight.largest else "like"
    spread = "" if weight.z_score is None else f", {weight.z_score:+.3g} standard deviations from the mean"
    return f"{share} the largest absolute value, {weight.largest:.6g}{spread}"


def _neighbours(axis: str, values: Mapping[int, float], own: int) -> str:
    numbers = "  ".join(f"[{value:.4g}]" if place == own else f"{value:.4g}" for place, value in values.items())
    return f"{axis}s {min(values)} to {max(values)}: {numbers}"
