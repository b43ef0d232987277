"""Repair: how much of a model comes back, without training, after its super weights were destroyed and their values lost.

Two ways. A scalar is searched for on a short text: the value with which the damaged model predicts it best. Or, where somebody
kept activations of the original, a patch of the whole column is fitted to them by least squares. Both are measured on other
windows than they were fitted on. The search runs on the damaged model, where the original values are not to be had.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from superweights.coordinates import Coordinate
from superweights.errors import UsageError
from superweights.experiments.column_patch import fit_column_patches
from superweights.experiments.evaluation import Evaluation, evaluate, evaluate_in_parts, measurement
from superweights.interventions.conditions import ORIGINAL, AddToWeights, Condition, ScaleWeights
from superweights.interventions.rows import applied
from superweights.measurements.intervals import Interval, exact
from superweights.measurements.scores import Scores
from superweights.measurements.windows import Windows
from superweights.model.loading import LoadedModel
from superweights.progress import NO_PROGRESS, Progress
from superweights.results.records import NoteRecord, Record

DESTROYED, REDERIVED, PATCHED = "destroyed", "scalar re-derived", "column patch fitted on activations"
_FEWEST_WINDOWS = 2
_REFINEMENTS, _POINTS = 2, 9
_SMALLEST = 1 / 8
"""The first grid ends at this share of the largest |W| of the matrix."""
_DRAWS = 2000


@dataclass(frozen=True)
class RepairSettings:
    """What is destroyed, and how it is repaired.

    Raises:
        UsageError: a value is out of its range.
    """

    damage: float = 0.0
    """What the super weights are multiplied by before the repair; 0 removes them."""
    fit_windows: int = 4
    """The first windows of the text, which the repair is fitted on; it is measured on all others."""
    reach: float = 8.0
    """The search goes to so many times the largest |W| that is left in the weight's matrix, with both signs."""
    sweeps: int = 2
    """How often several weights are searched, one after the other."""
    patch: bool = True
    """Also fit column patches on the original's activations of the fit windows, as if somebody had kept them."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.damage) or self.damage == 1:
            raise UsageError(f"The damage is {self.damage:g}; it must be a finite factor other than 1, such as 0.")
        if self.fit_windows < 1 or self.sweeps < 1 or not (math.isfinite(self.reach) and self.reach > 0):
            raise UsageError(
                f"Repairing with fit_windows {self.fit_windows}, sweeps {self.sweeps} and reach {self.reach:g}: the first two "
                "must be 1 or more, reach above 0 and finite."
            )


def repair(
    model: LoadedModel,
    weights: Sequence[Coordinate],
    windows: Windows,
    *,
    settings: RepairSettings | None = None,
    progress: Progress = NO_PROGRESS,
) -> Iterator[Record]:
    """Destroys super weights and repairs the model without training and without their values.

    | record | what |
    | --- | --- |
    | `perplexity`, `perplexity_ratio` | of the original, and of the model destroyed and repaired in both ways |
    | `true_value`, `rederived_value` | of each weight: in the original, and as found again |
    | `recovered` | (log perplexity destroyed - repaired) / (destroyed - original); nan where destroying costs nothing |

    The scalar is found by coordinate descent: a grid of values with both signs, whose range comes from the largest |W| that
    is left in the matrix, then twice a finer one around the best. `column_patch` says how columns are patched.

    Args:
        model: the intact model; it is intact again in the end.
        weights: its super weights.
        windows: the text: `fit_windows` to fit on, and 2 or more to measure on.
        settings: the damage and the repair.
        progress: hears about windows.

    Raises:
        UsageError: no weight, one that is zero already or that the damage makes infinite, or too few windows.
        CoordinateError: a weight is not in this model.
    """
    settings = settings or RepairSettings()
    weights = tuple(dict.fromkeys(weights))
    if not weights:
        raise UsageError(f"There is no weight of {model.name} to repair. Name some, or let find look for candidates.")
    fit, rest = _split(windows, settings.fit_windows)
    damage = ScaleWeights(weights, settings.damage)
    values = {weight: _read(model, weight)[0] for weight in weights}
    with applied(model, Condition(DESTROYED, (damage,))):
        damaged = {weight: _read(model, weight) for weight in weights}
        if not all(math.isfinite(value) for value, _ in damaged.values()):
            raise UsageError(
                f"The damage {settings.damage:g} makes a weight of {model.name} infinite. Give a smaller factor."
            )
        found = _search(model, damaged, fit, settings, progress)
    conditions = [ORIGINAL, Condition(DESTROYED, (damage,)), Condition(REDERIVED, (damage, *_changes(found, damaged)))]
    if settings.patch:
        conditions.append(Condition(PATCHED, (damage, *fit_column_patches(model, damage, fit, progress=progress))))
    evaluation = evaluate(model, rest, conditions, progress=progress)
    yield from evaluation.records()
    for weight in weights:
        yield _exact("true_value", values[weight], ORIGINAL, weight)
        yield _exact("rederived_value", found[weight], conditions[2], weight)
    yield from _shares(evaluation)
    for weight, (_, largest) in damaged.items():
        if abs(found[weight]) > 0.9 * settings.reach * largest:
            text = f"The value found for {weight} is at the end of the search. Give more reach."
            yield NoteRecord(level="warning", text=text)


def _split(windows: Windows, count: int) -> tuple[Windows, Windows]:
    """Windows to fit on, and those to measure on."""
    if len(windows.ids) < count + _FEWEST_WINDOWS:
        raise UsageError(
            f"Repairing takes {count + _FEWEST_WINDOWS} windows or more, {count} to fit on and {_FEWEST_WINDOWS} to measure "
            f"it on; {windows.text_name} gives {len(windows.ids)}. Ask for more windows, use a longer text or shorter "
            "windows, or fit on fewer."
        )
    return replace(windows, ids=windows.ids[:count]), replace(windows, ids=windows.ids[count:])


def _read(model: LoadedModel, weight: Coordinate) -> tuple[float, float]:
    """The weight, and the largest |W| of its matrix, edits included."""
    projection = model.architecture.locate(weight)
    with model.attached(projection) as parameter:
        matrix = parameter if weight.expert is None else parameter[weight.expert]
        return parameter[projection.index(weight)].item(), matrix.abs().max().item()


def _search(
    model: LoadedModel,
    damaged: Mapping[Coordinate, tuple[float, float]],
    fit: Windows,
    settings: RepairSettings,
    progress: Progress,
) -> dict[Coordinate, float]:
    """The values with which the damaged model predicts the fit windows best."""
    values = {weight: value for weight, (value, _) in damaged.items()}
    for _ in range(settings.sweeps if len(values) > 1 else 1):
        for weight, (_, largest) in damaged.items():

            def losses(candidates: Sequence[float], weight: Coordinate = weight) -> list[float]:
                changed = ({**values, weight: each} for each in candidates)
                conditions = [
                    Condition(f"value {number}", tuple(_changes(each, damaged))) for number, each in enumerate(changed)
                ]
                parts = evaluate_in_parts(model, fit, [ORIGINAL, *conditions], compare=False, progress=progress)
                means: list[float] = Scores.joined(list(parts), dim=1).nll_nats.mean(dim=1).tolist()
                return means[1:]  # the first is the damaged model

            values[weight] = minimise(losses, start=values[weight], grid=_grid(largest, settings.reach))
    return values


def _changes(
    values: Mapping[Coordinate, float], damaged: Mapping[Coordinate, tuple[float, float]]
) -> Iterator[AddToWeights]:
    """What makes these values of the damaged ones."""
    added = {weight: value - damaged[weight][0] for weight, value in values.items() if value != damaged[weight][0]}
    if added:
        yield AddToWeights(tuple(added), tuple(added.values()))


def _grid(largest: float, reach: float) -> list[float]:
    """Zero, and powers of 2 down from the end of the range, with both signs."""
    count = max(1, 1 + math.ceil(math.log2(reach / _SMALLEST)))
    sizes = [largest * reach / 2**each for each in range(count)]
    return sorted({0.0, *sizes, *(-each for each in sizes)})


def minimise(losses: Callable[[Sequence[float]], Sequence[float]], *, start: float, grid: Iterable[float]) -> float:
    """The best of a grid, of a finer one between its neighbours, and of a still finer one.

    Args:
        losses: gives the loss of each value; one that is not a number counts as infinite.
        start: stays unless another value is better.
        grid: values to begin with.

    Example:
        >>> round(minimise(lambda values: [(each - 3) ** 2 for each in values], start=0, grid=[-8, -4, 4, 8]), 2)
        3.04
    """
    known: dict[float, float] = {}
    best, points = start, [start, *grid]
    for _ in range(1 + _REFINEMENTS):
        new = [each for each in dict.fromkeys(points) if each not in known]
        for value, loss in zip(new, losses(new), strict=True):
            known[value] = math.inf if math.isnan(loss) else loss
        best = min(known, key=lambda value: known[value])  # the first of equal ones
        tried = sorted(known)
        place = tried.index(best)
        low, high = tried[max(place - 1, 0)], tried[min(place + 1, len(tried) - 1)]
        points = np.linspace(low, high, _POINTS + 2)[1:-1].tolist()
    return best


def _shares(evaluation: Evaluation) -> Iterator[Record]:
    """What each repair recovered of the loss, and a note where there was none to recover."""
    original, destroyed, *repaired = evaluation.conditions
    ratio = evaluation.ratio(destroyed)
    needed = math.isfinite(ratio.value) and ratio.low > 1
    for condition in repaired:
        nll = (evaluation.nll(each) for each in (condition, destroyed, original))
        share = recovered(*nll) if needed else Interval(math.nan, math.nan, math.nan, math.nan, evaluation.count)
        yield measurement(
            "recovered",
            share,
            unit="proportion",
            condition=condition,
            dataset=evaluation.windows.text_name,
            dataset_digest=evaluation.windows.digest,
        )
    if not needed:
        lost = "There is no loss to recover: the model does not need them."
        if not math.isfinite(ratio.value):
            lost = "Of such a loss no share is known."
        cost = f"{ratio.value:.5g} ({ratio.low:.5g} to {ratio.high:.5g})"
        text = f"Destroying the weights multiplies the perplexity by {cost}. {lost}"
        yield NoteRecord(level="warning", text=text)


def recovered(repaired: ArrayLike, destroyed: ArrayLike, original: ArrayLike, *, seed: int = 0) -> Interval:
    """Which part of the loss that destroying adds a repair takes away; 1 is all, below 0 is worse than destroyed.

    The interval is the percentile bootstrap over windows; a draw takes all three losses of a window.

    Args:
        repaired: nats per token of each window [windows].
        destroyed: the same, of the destroyed model.
        original: the same, of the original.
        seed: seed of the draws.

    Example:
        >>> recovered([2.5, 2.5], [4.0, 4.0], [2.0, 2.0])
        Interval(value=0.75, standard_error=0.0, low=0.75, high=0.75, count=2)
    """
    losses = np.array([repaired, destroyed, original], dtype=np.float64)
    count = losses.shape[1]
    chosen = np.random.default_rng(seed).integers(count, size=(_DRAWS, count))
    with np.errstate(all="ignore"):  # an infinite loss gives nan
        gain, cost = losses[1] - losses[0], losses[1] - losses[2]
        shares = gain[chosen].mean(axis=1) / cost[chosen].mean(axis=1)
        value = float(gain.mean() / cost.mean())
        low, high = np.quantile(shares, [0.025, 0.975])
        return Interval(value, float(shares.std(ddof=1)), float(low), float(high), count)


def _exact(name: str, value: float, condition: Condition, weight: Coordinate) -> Record:
    return measurement(name, exact(value), unit="1", condition=condition, subject=str(weight))
