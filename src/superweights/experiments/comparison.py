"""Comparison: the super weights of two models of one shape, such as a base model and what was tuned or merged from it.

Each model makes its own passes, on its own tokens, so both may be streamed. What one did to the other is read off the matrices:
how much each super weight changed, and how many weights of the same matrix changed less.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch

from superweights.coordinates import Coordinate
from superweights.detection.candidates import DetectionSettings
from superweights.detection.search import default_prompts, find
from superweights.errors import CoordinateError, UsageError
from superweights.experiments.evaluation import Evaluation, evaluate_in_parts, measurement
from superweights.interventions.conditions import ORIGINAL, Condition, removal
from superweights.measurements.intervals import exact, perplexity
from superweights.measurements.scores import Scores
from superweights.measurements.windows import Windows
from superweights.model.loading import LoadedModel
from superweights.model.tracing import Trace, trace
from superweights.progress import NO_PROGRESS, Progress
from superweights.results.records import MeasurementRecord, NoteRecord, Record

ALL_TOGETHER = "all together"
"""The subject of what all weights do, where there are several."""
_ROWS_AT_ONCE = 512
"""Comparing takes memory of its own, so matrices are looked at in pieces."""


def compare(
    first: LoadedModel,
    second: LoadedModel,
    windows_first: Windows,
    windows_second: Windows,
    *,
    weights: Sequence[Coordinate] | None = None,
    settings: DetectionSettings | None = None,
    texts: Sequence[str] = (),
    last_layer: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> Iterator[Record]:
    """Sets the super weights of two models side by side.

    | record | what, for each coordinate (subject) and model (condition) |
    | --- | --- |
    | `weight`, `weight_rank` | its value, and the place of its size in its matrix; the count is the matrix' |
    | `super_activation` | largest |residual| of its row over the default prompts, after any layer but the last |
    | `perplexity_ratio_removed` | perplexity without it over perplexity with it; also "all together" |
    | `weight_change` | |second - first| / |first|; condition "FIRST to SECOND", as the next |
    | `weight_change_quantile` | share of the weights of its matrix that changed less |

    Small weights are easily changed by a large part of themselves, so a large weight with an ordinary change has a low
    quantile; a high one says that the second model was made to change it.

    Args:
        first: a model, such as the base model.
        second: a model of the same hidden size and layers.
        windows_first: the text, as the first model's tokenizer sees it.
        windows_second: the same of the second.
        weights: the coordinates to compare; None searches both models and takes what either has.
        settings: thresholds of that search.
        texts: further prompts, beside the default ones.
        last_layer: last layer that the prompts run to; None for all. Perplexity takes all layers in any case.
        progress: hears about layers and windows.

    Raises:
        UsageError: the models differ in hidden size or layers, or there is no weight to compare.
        CoordinateError: a weight that was asked for is not in both models.
    """
    _refuse_other_shape(first, second)
    names = _names(first, second)
    models = dict(zip(names, (first, second), strict=True))
    prompts = [default_prompts(each, texts) for each in models.values()]
    if weights is None:
        findings = [
            find(model, prompts=own, settings=settings, last_layer=last_layer, progress=progress)
            for model, own in zip(models.values(), prompts, strict=True)
        ]
        traces = [each.traces[0] for each in findings]
        found = {name: [each.coordinate for each in own.candidates] for name, own in zip(names, findings, strict=True)}
        weights = _fitting(models, found)
        yield from _tell_origin(found, weights)
    else:
        weights = tuple(dict.fromkeys(weights))
        _refuse_strange(models, weights)
        traces = [
            trace(model, own, last_layer=last_layer, progress=progress)
            for model, own in zip(models.values(), prompts, strict=True)
        ]
    homes = dict.fromkeys((each.layer, each.expert) for each in weights)
    read = [
        record
        for home in homes
        for record in _read_both(models, [each for each in weights if (each.layer, each.expert) == home])
    ]
    yield from read
    for (name, model), traced, windows in zip(models.items(), traces, (windows_first, windows_second), strict=True):
        yield from _super_activations(name, traced, weights)
        zeros = {each.subject for each in _named(read, "weight") if each.condition == name and each.value == 0}
        yield from _removals(name, model, weights, zeros, windows, progress)


def _refuse_other_shape(first: LoadedModel, second: LoadedModel) -> None:
    shapes = [
        {"hidden size": each.architecture.hidden_size, "decoder layers": each.architecture.layer_count}
        for each in (first, second)
    ]
    differing = [
        f"{name} {shapes[0][name]} and {shapes[1][name]}" for name in shapes[0] if shapes[0][name] != shapes[1][name]
    ]
    if differing:
        raise UsageError(
            f"Comparing {first.name} with {second.name}: they have {', '.join(differing)}. Compare models of one shape, as a "
            "base model and one that was tuned from it."
        )


def _names(first: LoadedModel, second: LoadedModel) -> tuple[str, str]:
    return (first.name, second.name) if first.name != second.name else (f"A: {first.name}", f"B: {second.name}")


def _fits(model: LoadedModel, weight: Coordinate) -> bool:
    try:
        model.architecture.locate(weight)
    except CoordinateError:
        return False
    return True


def _fitting(models: dict[str, LoadedModel], found: dict[str, list[Coordinate]]) -> tuple[Coordinate, ...]:
    """The candidates of either model that both have a place for."""
    union = dict.fromkeys(each for own in found.values() for each in own)
    fitting = tuple(each for each in union if all(_fits(model, each) for model in models.values()))
    if not fitting:
        seen = f"the candidates {', '.join(map(str, union))} do not fit both" if union else "neither has a candidate"
        raise UsageError(f"Comparing {' with '.join(models)}: {seen}. Name the weights to compare.")
    return fitting


def _tell_origin(found: dict[str, list[Coordinate]], weights: Sequence[Coordinate]) -> Iterator[NoteRecord]:
    for name, own in found.items():
        listed = ", ".join(map(str, own)) or "none"
        yield NoteRecord(level="info", text=f"Super weight candidates of {name}: {listed}.")
    dropped = sorted({each for own in found.values() for each in own} - set(weights))
    if dropped:
        text = f"Left out, as they do not fit both models: {', '.join(map(str, dropped))}."
        yield NoteRecord(level="warning", text=text)


def _refuse_strange(models: dict[str, LoadedModel], weights: Sequence[Coordinate]) -> None:
    if not weights:
        raise UsageError(f"Comparing {' with '.join(models)}: no weight is named. Name some, or let both be searched.")
    for name, model in models.items():
        for weight in weights:
            try:
                model.architecture.locate(weight)
            except CoordinateError as error:
                raise CoordinateError(f"Comparing {' with '.join(models)}: in {name}, {error}") from error


@contextmanager
def _matrix(model: LoadedModel, weight: Coordinate) -> Iterator[torch.Tensor]:
    """The matrix that holds a weight, [rows, cols] whatever way it is stored."""
    projection = model.architecture.locate(weight)
    with model.attached(projection) as parameter:
        matrix = parameter if weight.expert is None else parameter[weight.expert]
        yield matrix.t() if projection.transposed else matrix


def _read_both(models: dict[str, LoadedModel], weights: Sequence[Coordinate]) -> Iterator[Record]:
    """Value and place of weights of one matrix in both models, and their change beside that of the matrix."""
    (first, one), (second, other) = models.items()
    with _matrix(one, weights[0]) as before, _matrix(other, weights[0]) as after:
        for weight in weights:
            for name, matrix in ((first, before), (second, after)):
                value = matrix[weight.row, weight.col].item()
                yield _record("weight", value, weight, name)
                yield _record("weight_rank", _rank(matrix, value), weight, name, count=matrix.numel())
            if before.shape == after.shape:
                yield from _change(before, after, weight, f"{first} to {second}")
    if before.shape != after.shape:
        shapes = f"{list(before.shape)} and {list(after.shape)}"
        text = f"The matrices of {weights[0]} have the shapes {shapes}, so a change has nothing to compare with."
        yield NoteRecord(level="warning", text=text)


def _change(before: torch.Tensor, after: torch.Tensor, weight: Coordinate, label: str) -> Iterator[Record]:
    change = relative_change(before[weight.row, weight.col], after[weight.row, weight.col])
    less = sum(
        int((relative_change(*pieces) < change).sum())
        for pieces in zip(torch.split(before, _ROWS_AT_ONCE), torch.split(after, _ROWS_AT_ONCE), strict=True)
    )
    count = before.numel()
    yield _record("weight_change", change.item(), weight, label)
    yield _record("weight_change_quantile", less / count, weight, label, unit="proportion", count=count)


def _rank(matrix: torch.Tensor, value: float) -> int:
    return 1 + sum(int((piece.abs() > abs(value)).sum()) for piece in torch.split(matrix, _ROWS_AT_ONCE))


def relative_change(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """|after - before| / |before| in float32: 0 for what stays, infinite for what was zero and is not.

    Example:
        >>> relative_change(torch.tensor([2.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 3.0])).tolist()
        [0.5, 0.0, inf]
    """
    before, after = before.float(), after.float()
    return ((after - before).abs() / before.abs()).nan_to_num(0.0, posinf=math.inf)


def _super_activations(name: str, traced: Trace, weights: Sequence[Coordinate]) -> Iterator[Record]:
    inner = traced.stream[1 : traced.layers_run + (not traced.complete)].abs()  # [layers, positions, hidden]
    for weight in weights:
        value = inner[:, :, weight.row].max().item() if len(inner) else math.nan
        yield _record("super_activation", value, weight, name, count=len(traced.prompts))


def _removals(
    name: str,
    model: LoadedModel,
    weights: Sequence[Coordinate],
    zeros: Collection[str],
    windows: Windows,
    progress: Progress,
) -> Iterator[Record]:
    """Perplexity of a model, and what removing each weight, and all, does to it; nothing where it is zero already."""
    present = [each for each in weights if str(each) not in zeros]
    removals = {str(each): removal([each], name=f"without {each}") for each in present}
    if len(present) > 1:
        removals[ALL_TOGETHER] = removal(present, name=f"without {ALL_TOGETHER}")
    conditions = (ORIGINAL, *removals.values())
    parts = evaluate_in_parts(model, windows, conditions, compare=False, progress=progress)
    evaluation = Evaluation(conditions, Scores.joined(list(parts), dim=1), windows)
    data = (windows.text_name, windows.digest)
    whole = perplexity(evaluation.nll(ORIGINAL))
    yield measurement("perplexity", whole, unit="1", condition=Condition(name), dataset=data[0], dataset_digest=data[1])
    for weight in weights:
        if weight not in present:
            yield _record("perplexity_ratio_removed", 1.0, weight, name, count=evaluation.count)
    for subject, condition in removals.items():
        yield measurement(
            "perplexity_ratio_removed",
            evaluation.ratio(condition),
            unit="1",
            condition=Condition(name, condition.interventions),
            subject=subject,
            dataset=data[0],
            dataset_digest=data[1],
        )


def _named(records: Sequence[Record], name: str) -> Iterator[MeasurementRecord]:
    return (each for each in records if isinstance(each, MeasurementRecord) and each.name == name)


def _record(
    name: str, value: float, weight: Coordinate, condition: str, *, unit: str = "1", count: int = 1
) -> MeasurementRecord:
    """A number that is exact for these models, so it has no interval."""
    record = measurement(name, exact(value), unit=unit, condition=Condition(condition), subject=str(weight))
    return record.model_copy(update={"count": count})
