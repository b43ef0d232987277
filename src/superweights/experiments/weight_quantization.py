"""Does rounding weights break a model, and does keeping its super weights help: the paper's figure 7.

Every scheme is measured with several methods, among them the two halves of the paper's: clipping, and keeping the super
weight. Keeping as many of the largest other weights instead is the control.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from superweights.checkpoint import Checkpoint
from superweights.checkpoint.stored_matrices import checkpoint_matrices
from superweights.coordinates import Coordinate
from superweights.errors import UnknownNameError, UsageError
from superweights.experiments.evaluation import Evaluation, evaluate, measurement
from superweights.interventions.conditions import ORIGINAL, Condition, QuantizeWeights
from superweights.interventions.weights import locate_stored
from superweights.measurements.intervals import exact
from superweights.measurements.windows import Windows
from superweights.model.loading import LoadedModel
from superweights.progress import NO_PROGRESS, Progress
from superweights.quantization.clipping import Clip
from superweights.quantization.held_out import rounded
from superweights.quantization.rounding import to_groups
from superweights.quantization.scheme import Scheme
from superweights.results.records import MeasurementRecord, NoteRecord

METHODS = {
    "rtn": "round to nearest, and nothing else",
    "clip": "clip, then round",
    "clip+keep": "clip and round with the super weights held out, then put them back",
    "keep": "round with the super weights held out, then put them back",
    "paper": "clip and round with the super weights among the others, then put them back",
    "largest": "round with the largest weights of every matrix held out instead, then put them back",
}
"""What is compared, by name."""
_KEEPING = ("keep", "clip+keep", "paper")
"""Methods that keep super weights."""
DEFAULT_CLIP = Clip("z", 9.0)
"""The default of the paper's code."""
_PLACE_BITS = 64
"""Bits that say where a kept weight is."""
Z_GRID = (2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 15.0, 20.0, 30.0)
"""The z-scores that `tuned_clip` tries; the paper's scripts have 9, 11, 12 and 20."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare_weight_quantization` compares."""

    schemes: tuple[Scheme, ...]
    """Each with all methods."""
    methods: tuple[str, ...] = ("rtn", "clip", "clip+keep", "keep", "largest")
    """Names in `METHODS`."""
    clip: Clip = DEFAULT_CLIP
    """How methods with clip in their name, and paper, clip."""
    largest: int = 0
    """How many weights of every matrix `largest` keeps; 0 for as many as there are super weights, and at least one."""
    amplify: float = 1.0
    """What kept super weights are multiplied by (the paper's appendix)."""


def conditions_of(comparison: Comparison, weights: Sequence[Coordinate]) -> tuple[Condition, ...]:
    """The original, and every scheme with every method; methods that keep super weights only where there are any.

    Raises:
        UnknownNameError: there is no such method.
    """
    for method in comparison.methods:
        if method not in METHODS:
            raise UnknownNameError.among("method", method, METHODS)
    methods = [each for each in comparison.methods if weights or each not in _KEEPING]
    made = [
        _condition(scheme, method, comparison, tuple(weights)) for scheme in comparison.schemes for method in methods
    ]
    return (ORIGINAL, *made)


def _condition(scheme: Scheme, method: str, comparison: Comparison, weights: tuple[Coordinate, ...]) -> Condition:
    keep = weights if method in _KEEPING else ()
    how = QuantizeWeights(
        scheme,
        clip=comparison.clip if method in ("clip", "clip+keep", "paper") else None,
        keep=keep,
        keep_by="restore" if method == "paper" else "hold-out",
        largest=(comparison.largest or max(1, len(weights))) if method == "largest" else 0,
        amplify=comparison.amplify if keep else 1.0,
    )
    return Condition(f"{scheme}, {method}", (how,))


def compare_weight_quantization(
    model: LoadedModel,
    windows: Windows,
    weights: Sequence[Coordinate],
    comparison: Comparison,
    *,
    progress: Progress = NO_PROGRESS,
) -> Iterator[MeasurementRecord | NoteRecord]:
    """Perplexity, KL, agreement and bits per weight of every scheme with every method.

    For each super weight also what plain rounding moves it by ("weight_error", of its value; 0 where it is on the grid by
    itself, as the largest weight of a symmetric one is), and how holding it out changes the error of the weights that share
    its scale ("neighbour_error_ratio"). Notes say where keeping changes no prediction.

    Weights are rounded and dequantized to the dtype they are stored in, which is what a packed checkpoint computes with.

    Args:
        model: the model.
        windows: the text.
        weights: the super weights; none leaves the methods out that keep them.
        comparison: what to compare.
        progress: hears about windows.

    Raises:
        UnknownNameError: there is no such method.
        UsageError: a scheme does not fit a matrix.

    Source:
        arXiv 2411.07191, figure 7.
    """
    conditions = conditions_of(comparison, weights)
    found = evaluate(model, windows, conditions, progress=progress)
    yield from found.records()
    for condition in conditions[1:]:
        yield bits_record(model, condition)
    for scheme in comparison.schemes if "rtn" in comparison.methods else ():
        yield from _around(checkpoint_of(model), scheme, weights)
    yield from _notes(found)


def bits_record(model: LoadedModel, condition: Condition) -> MeasurementRecord:
    """Stored bits per weight of the matrices of the decoder layers, scales and kept weights included."""
    checkpoint = checkpoint_of(model)
    bits = weights = 0.0
    how = [each for each in condition.interventions if isinstance(each, QuantizeWeights)]
    for matrix in checkpoint_matrices(checkpoint):
        stored = checkpoint.tensors[matrix.tensor].storage.nbits
        here = [each for each in how if each.only is None or matrix.tensor in each.only]
        per_weight = here[-1].scheme.bits_per_weight(matrix.rows, matrix.cols, scale_bits=stored) if here else stored
        kept = sum(each.largest * (matrix.experts or 1) for each in here)
        bits += per_weight * matrix.numel + kept * (stored + _PLACE_BITS)
        weights += matrix.numel
    bits += sum(len(each.keep) for each in how) * (16 + _PLACE_BITS)
    return measurement("bits_per_weight", exact(bits / weights), unit="bits", condition=condition)


def _notes(found: Evaluation) -> Iterator[NoteRecord]:
    """Where keeping changes nothing."""
    by_name = {each.name: each for each in found.conditions}
    for name, condition in by_name.items():
        scheme, _, method = name.partition(", ")
        without = by_name.get(f"{scheme}, {'rtn' if method == 'keep' else 'clip'}")
        if method in _KEEPING and without is not None and found.nll(condition) == found.nll(without):
            yield NoteRecord(level="info", text=f"{name} is a no-op: every window is predicted as with {without.name}.")


def _around(checkpoint: Checkpoint, scheme: Scheme, weights: Sequence[Coordinate]) -> Iterator[MeasurementRecord]:
    """What plain rounding does to each super weight, and what holding it out does for those that share its scale."""
    condition = Condition(f"{scheme}, rtn", (QuantizeWeights(scheme),))
    for coordinate in weights:
        error = rounding_error(checkpoint, coordinate, scheme)
        values = {"weight_error": (error.weight, "proportion"), "neighbour_error_ratio": (error.neighbours, "1")}
        for name, (value, unit) in values.items():
            yield measurement(name, exact(value), unit=unit, condition=condition, subject=str(coordinate))


@dataclass(frozen=True, slots=True)
class RoundingError:
    """What rounding does around one weight."""

    weight: float
    """|rounded - original| / |original| of the weight itself."""
    neighbours: float
    """Root mean square error of the weights that share its scale, with the weight held out over without."""
    shared: int
    """How many weights share the scale."""


def rounding_error(checkpoint: Checkpoint, coordinate: Coordinate, scheme: Scheme) -> RoundingError:
    """What a scheme does to a weight and to those that share its scale.

    Raises:
        CoordinateError: the weight is not in this model.
        UsageError: the scheme does not fit.
    """
    tensor, index = locate_stored(checkpoint, coordinate)
    matrix = next(each for each in checkpoint_matrices(checkpoint) if each.tensor == tensor)
    checkpoint.fetch((tensor,), populate=False)
    stored = checkpoint.view(tensor)
    weights = stored[index[0]] if len(index) == 3 else stored
    weights = weights.t() if matrix.transposed else weights
    marked = torch.zeros(weights.shape, dtype=torch.bool)
    marked[coordinate.row, coordinate.col] = True
    group, place = to_groups(marked, scheme).nonzero()[0].tolist()
    shared = to_groups(weights, scheme)[group][None]  # [1, weights that share its scale]
    alone = replace(scheme, sharing="row", size=(0, 0))
    found = [rounded(shared, alone, kept=kept)[0].float() - shared[0].float() for kept in ((), (place,))]
    moved = float((found[0][place] / shared[0, place]).abs())
    plain, held = (float(each.square().sum() - each[place].square()) for each in found)
    checkpoint.drop((tensor,))
    return RoundingError(moved, (held / plain) ** 0.5 if plain > 0 else 1.0, shared.shape[1])


def tuned_clip(
    model: LoadedModel,
    scheme: Scheme,
    weights: Sequence[Coordinate] = (),
    *,
    windows: Windows | None = None,
    grid: Sequence[float] = Z_GRID,
    progress: Progress = NO_PROGRESS,
) -> tuple[Clip, tuple[MeasurementRecord, ...]]:
    """The z-score that clips best: by the error of all weights, which needs no text, or by KL on a text.

    Args:
        model: the model.
        scheme: how weights are rounded.
        weights: super weights, which are held out.
        windows: a text to measure on, not that of the final numbers; None for the error of the weights.
        grid: the z-scores that are tried.
        progress: hears about matrices or windows.

    Returns:
        The best, and what was measured for each: "weight_error" (squared error over squared weights) or "kl_to_original".
    """
    clips = [Clip("z", each) for each in grid]
    conditions = [
        Condition(f"{scheme}, clip {clip}", (QuantizeWeights(scheme, clip=clip, keep=tuple(weights)),))
        for clip in clips
    ]
    if windows is None:
        errors = _weight_errors(model, scheme, weights, clips, progress)
        values = [exact(each) for each in errors]
        name, unit = "weight_error", "proportion"
    else:
        found = evaluate(model, windows, [ORIGINAL, *conditions], progress=progress)
        values = [found.kl(each) for each in conditions]
        name, unit = "kl_to_original", "nats per token"
    text, digest = (windows.text_name, windows.digest) if windows else (None, None)
    records = tuple(
        measurement(name, value, unit=unit, condition=condition, dataset=text, dataset_digest=digest)
        for condition, value in zip(conditions, values, strict=True)
    )
    best = min(range(len(clips)), key=lambda each: values[each].value)
    return clips[best], records


def _weight_errors(
    model: LoadedModel, scheme: Scheme, weights: Sequence[Coordinate], clips: Sequence[Clip], progress: Progress
) -> list[float]:
    """Squared error over squared weights, kept ones left out, of all matrices for each clip."""
    checkpoint = checkpoint_of(model)
    matrices = checkpoint_matrices(checkpoint)
    kept: dict[tuple[str, int | None], list[int]] = {}
    cols = {each.tensor: each.cols for each in matrices}
    for coordinate in weights:
        tensor, index = locate_stored(checkpoint, coordinate)
        part = index[0] if len(index) == 3 else None
        kept.setdefault((tensor, part), []).append(coordinate.row * cols[tensor] + coordinate.col)
    sums, total = [0.0] * len(clips), 0.0
    progress.start("tuning the clip", total=len(matrices), unit="matrices")
    try:
        for matrix in matrices:
            checkpoint.fetch((matrix.tensor,), populate=False)
            stored = checkpoint.view(matrix.tensor)
            for part in range(matrix.experts) if matrix.experts else (None,):
                here = stored if part is None else stored[part]
                here = here.t().contiguous() if matrix.transposed else here
                places = kept.get((matrix.tensor, part), [])
                wide = here.float()
                total += float(wide.square().sum()) - sum(float(wide.flatten()[place]) ** 2 for place in places)
                for number, clip in enumerate(clips):
                    found = rounded(here, scheme, clip=clip, kept=places)
                    sums[number] += float((found.float() - wide).square().sum())
            checkpoint.drop((matrix.tensor,))
            progress.advance()
    finally:
        progress.finish()
    return [each / total for each in sums]


def checkpoint_of(model: LoadedModel) -> Checkpoint:
    """The files of a model.

    Raises:
        UsageError: it was in memory already.
    """
    if model.checkpoint is None:
        raise UsageError(f"Quantizing {model.name}: it was in memory already. Load it from its checkpoint.")
    return model.checkpoint
