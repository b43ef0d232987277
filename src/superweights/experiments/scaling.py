"""Scaling: what multiplying the super weights does to a model, and whether any factor makes it better.

The best of many factors looks good on the windows it was chosen on, whatever the truth: here it is chosen on one half of them
and measured on the other.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from superweights.coordinates import Coordinate
from superweights.errors import UsageError
from superweights.experiments.evaluation import evaluate, measurement
from superweights.interventions.conditions import ORIGINAL, Condition, ScaleWeights
from superweights.measurements.intervals import Interval, perplexity_ratio
from superweights.measurements.windows import Windows
from superweights.model.loading import LoadedModel
from superweights.progress import NO_PROGRESS, Progress
from superweights.results.records import NoteRecord, Record

_DRAWS = 2000
_FEW_WINDOWS = 8
"""Below this, intervals are too narrow, and halves hardly tell factors apart."""


@dataclass(frozen=True)
class ScalingSettings:
    """Which factors `scale` tries.

    Raises:
        UsageError: a factor is not finite, or none differs from 1.
    """

    factors: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.2, 1.5, 2.0, 3.0)
    """What all weights are multiplied by; 1 is the original, and always among them."""
    seed: int = 0
    """Seed of the halves and of the bootstrap."""

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, self.factors)) or set(self.factors) <= {1.0}:
            listed = ", ".join(f"{each:g}" for each in self.factors) or "none"
            raise UsageError(f"The factors to scale by are {listed}. Give finite numbers, at least one other than 1.")


def scale(
    model: LoadedModel,
    weights: Sequence[Coordinate],
    windows: Windows,
    *,
    settings: ScalingSettings | None = None,
    progress: Progress = NO_PROGRESS,
) -> Iterator[Record]:
    """Multiplies all weights by one factor after the other, and says which is best and whether that is real.

    | record | what |
    | --- | --- |
    | `perplexity`, `perplexity_ratio` | of every factor, as `evaluate` gives them; condition "scale 0.5", 1 is "original" |
    | `best_factor` | the factor with the lowest mean loss; its interval holds 95 % of the best factors of bootstrap samples |
    | `best_factor_gain` | perplexity ratio at a factor that was chosen on other windows |
    | a note | whether the gain is real: its interval is below 1 |

    For the gain, the windows are split at random into two halves. Each half is measured at the factor that is best for the
    other one, so no window had a say in its own factor; the interval is the paired bootstrap over all windows.

    Args:
        model: the model.
        weights: the super weights; all get the same factor.
        windows: the text, 2 windows or more.
        settings: the factors.
        progress: hears about windows.

    Raises:
        UsageError: no weight, one that is zero, or a single window.
        CoordinateError: a weight is not in this model.

    Source:
        arXiv 2411.07191, figure 6.
    """
    settings = settings or ScalingSettings()
    weights = tuple(dict.fromkeys(weights))
    if not weights:
        raise UsageError(f"There is no weight of {model.name} to scale. Name some, or let find look for candidates.")
    if len(windows.ids) < 2:
        raise UsageError(
            f"Scaling weights of {model.name} takes 2 windows or more, half of them to choose the best factor on and half to "
            f"measure it; {windows.text_name} gives {len(windows.ids)}. Ask for more windows, or use a longer text or "
            "shorter windows."
        )
    conditions = {each: _condition(weights, each) for each in sorted({1.0, *settings.factors})}
    others = [each for each in conditions.values() if each != ORIGINAL]
    evaluation = evaluate(model, windows, [ORIGINAL, *others], progress=progress)
    yield from evaluation.records()
    losses = np.array([evaluation.nll(each) for each in conditions.values()])  # [factors, windows]
    yield from _judge(losses, list(conditions), list(conditions.values()), windows, settings.seed)


def _condition(weights: tuple[Coordinate, ...], factor: float) -> Condition:
    return ORIGINAL if factor == 1 else Condition(f"scale {factor:g}", (ScaleWeights(weights, factor),))


def _judge(
    losses: NDArray[np.float64],
    factors: Sequence[float],
    conditions: Sequence[Condition],
    windows: Windows,
    seed: int,
) -> Iterator[Record]:
    """The best factor, its gain, and what they mean."""
    best = best_factor(losses, factors, seed=seed)
    if math.isnan(best.value):
        yield NoteRecord(level="warning", text="No factor gives a finite loss, so none is best.")
        return
    chosen, gain = held_out_gain(losses, factors, seed=seed)
    condition = conditions[factors.index(best.value)]
    data = (condition, windows.text_name, windows.digest)
    for name, value in (("best_factor", best), ("best_factor_gain", gain)):
        yield measurement(name, value, unit="1", condition=data[0], dataset=data[1], dataset_digest=data[2])
    yield NoteRecord(level="info", text=_verdict(chosen, gain))
    if best.count < _FEW_WINDOWS:
        text = f"{best.count} windows are few: the intervals are too narrow. Give a longer text or shorter windows."
        yield NoteRecord(level="warning", text=text)


def best_factor(losses: NDArray[np.float64], factors: Sequence[float], *, seed: int = 0) -> Interval:
    """The factor with the lowest mean loss, and where 95 % of the best factors of bootstrap samples over windows lie.

    Args:
        losses: nats per token [factors, windows]; a factor with a loss that is not finite is never best.
        factors: of the rows.
        seed: seed of the draws.

    Returns:
        nan where no factor has a finite mean.

    Example:
        >>> best_factor(np.array([[3.0, 3.0], [2.0, 2.1]]), [0.0, 1.0])
        Interval(value=1.0, standard_error=0.0, low=1.0, high=1.0, count=2)
    """
    count = losses.shape[1]
    known = np.where(np.isfinite(losses).all(axis=1, keepdims=True), losses, math.inf)  # [factors, windows]
    if np.isinf(known).all():
        return Interval(math.nan, math.nan, math.nan, math.nan, count)
    chosen = np.random.default_rng(seed).integers(count, size=(_DRAWS, count))
    drawn = np.stack([each[chosen].mean(axis=1) for each in known])  # [factors, draws]
    best = np.asarray(factors)[drawn.argmin(axis=0)]
    low, high = np.quantile(best, [0.025, 0.975], method="closest_observation")
    value = factors[int(known.mean(axis=1).argmin())]
    return Interval(value, float(best.std(ddof=1)), float(low), float(high), count)


def held_out_gain(
    losses: NDArray[np.float64], factors: Sequence[float], *, seed: int = 0
) -> tuple[tuple[float, float], Interval]:
    """The factors that two random halves of the windows choose, and the perplexity ratio of each half at the other's.

    Args:
        losses: nats per token [factors, windows], 2 windows or more.
        factors: of the rows; 1 must be among them.
        seed: seed of the halves and of the bootstrap.
    """
    known = np.nan_to_num(losses, nan=math.inf, posinf=math.inf)
    halves = np.array_split(np.random.default_rng(seed).permutation(losses.shape[1]), 2)
    best = [int(known[:, half].mean(axis=1).argmin()) for half in halves]
    measured = np.empty(losses.shape[1])
    for half, other in zip(halves, reversed(best), strict=True):
        measured[half] = losses[other, half]
    gain = perplexity_ratio(measured, losses[factors.index(1.0)], draws=_DRAWS, seed=seed)
    return (factors[best[0]], factors[best[1]]), gain


def _verdict(chosen: tuple[float, float], gain: Interval) -> str:
    if set(chosen) == {1.0}:
        return "There is no gain: on either half of the windows, no factor is better than the original."
    halves = " and ".join(f"{each:g}" for each in dict.fromkeys(chosen))
    start = "The gain is real" if gain.high < 1 else "There is no real gain"
    ratio = f"{gain.value:.5g} ({gain.low:.5g} to {gain.high:.5g})"
    return f"{start}: at a factor chosen on other windows ({halves}) the perplexity is {ratio} of the original's."
