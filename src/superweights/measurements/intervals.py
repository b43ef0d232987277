"""Numbers with their 95 % intervals: means, perplexities, ratios of perplexities and proportions.

Pure functions on arrays of one dimension, without torch. A loss is in nats per predicted token, one number per window: all
windows have as many tokens, so the mean over windows is the mean over tokens. Tokens of one window depend on each other and
windows hardly do, so the window is the unit that intervals count.

Nothing here raises or warns for a loss that is infinite, not a number or huge: an edit may destroy a model, and then "inf" or
"nan" is the answer. One value says nothing about its spread: its standard error and interval are nan.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from superweights.errors import UsageError

_TAIL = 0.025
_Z = NormalDist().inv_cdf(1 - _TAIL)
_FEWEST_DRAWS = 40


@dataclass(frozen=True, slots=True)
class Interval:
    """A number and how sure it is."""

    value: float
    """The number."""
    standard_error: float
    """Its standard error; nan where there is one item."""
    low: float
    """Low end of the 95 % interval; nan where there is one item."""
    high: float
    """High end."""
    count: int
    """Independent items behind the number."""


def exact(value: float) -> Interval:
    """A number that is counted or computed, not sampled: one item, and no spread.

    Example:
        >>> exact(4.125).value
        4.125
    """
    return Interval(value, math.nan, math.nan, math.nan, 1)


def mean_interval(values: ArrayLike, *, bounds: tuple[float, float] = (-math.inf, math.inf)) -> Interval:
    """The mean, with Student's t interval.

    Args:
        values: the items, in any unit [items].
        bounds: least and greatest mean there can be; the interval is cut there.

    Raises:
        UsageError: there is no item.
    """
    items = _items(values, "A mean")
    count = len(items)
    with np.errstate(all="ignore"):
        mean = items.mean()
        error = items.std(ddof=1) / math.sqrt(count) if count > 1 else np.float64(math.nan)
        margin = t_quantile(max(count - 1, 1)) * error
        low, high = np.clip([mean - margin, mean + margin], *bounds).tolist()
        return Interval(float(mean), float(error), low, high, count)


def perplexity(nll_nats: ArrayLike) -> Interval:
    """Perplexity: exp of the mean loss, and of the ends of its interval; the standard error by the delta method.

    Args:
        nll_nats: negative log likelihood per predicted token of each window [windows].

    Raises:
        UsageError: there is no window.

    Example:
        >>> round(perplexity([2.0, 2.2, 2.4]).value, 3)
        9.025
    """
    loss = mean_interval(nll_nats)
    with np.errstate(all="ignore"):
        value, low, high = (float(np.exp(each)) for each in (loss.value, loss.low, loss.high))
    return Interval(value, value * loss.standard_error, low, high, loss.count)


def perplexity_ratio(edited: ArrayLike, original: ArrayLike, *, draws: int = 2000, seed: int = 0) -> Interval:
    """How many times an edit raises the perplexity: exp of the mean difference of the losses of the same windows.

    The interval is the expanded percentile bootstrap over windows, paired: a draw takes both losses of a window. On normal
    differences it holds the truth in 94 % of the cases with 5 windows and 95 % from 8 on; on exponential ones, which are
    skewed, in 87 % with 5, 90 % with 20 and 94 % with 40. All calls with one seed and one number of windows make the same
    draws, so that edits compare.

    Args:
        edited: negative log likelihood in nats per predicted token of each window, after the edit [windows].
        original: the same before the edit [windows].
        draws: bootstrap samples, at least 40.
        seed: seed of the draws.

    Returns:
        The ratio. Where a window of `edited` is infinite, so are the ratio and the high end, and the low end too if nearly
        every draw takes such a window. Where a difference is nan, everything is.

    Raises:
        UsageError: there is no window, the numbers of windows differ, or there are too few draws.

    Source:
        T. Hesterberg, The American Statistician 69, 2015, section 5.3: expanded percentile intervals.
    """
    after, before = _items(edited, "A perplexity ratio"), _items(original, "A perplexity ratio")
    count = len(after)
    if len(before) != count:
        raise UsageError(
            f"A perplexity ratio is paired, but there are {count} windows edited and {len(before)} original."
        )
    if draws < _FEWEST_DRAWS:
        raise UsageError(f"The bootstrap has {draws} draws; an interval of 95 % needs {_FEWEST_DRAWS} or more.")
    with np.errstate(all="ignore"):
        differences = after - before
        ratio = float(np.exp(differences.mean()))
        if count == 1 or np.isnan(differences).any():
            return Interval(ratio, math.nan, math.nan, math.nan, count)
        chosen = np.random.default_rng(seed).integers(count, size=(draws, count), dtype=np.int32)
        means = np.sort(differences[chosen].mean(axis=1))  # [draws]
        # Relative to the ratio, or squares of large ratios would overflow.
        error = ratio * float(np.exp(means - differences.mean()).std(ddof=1))
        # Expanded percentile interval: a plain one is too narrow where windows are few.
        tail = NormalDist().cdf(-t_quantile(count - 1) * math.sqrt(count / (count - 1)))
        outside = int(tail * draws)  # draws beyond each end; an order statistic, since inf cannot be interpolated
        low, high = (float(np.exp(means[each])) for each in (outside, draws - 1 - outside))
    return Interval(ratio, error, low, high, count)


def bootstrap(
    items: ArrayLike, statistic: Callable[[NDArray[np.float64]], float], *, draws: int = 2000, seed: int = 0
) -> Interval:
    """Any statistic of items, with the percentile bootstrap over items.

    Args:
        items: what belongs together in a row [items, columns].
        statistic: gives a number of as many rows.
        draws: bootstrap samples.
        seed: seed of the draws.

    Returns:
        The number; its interval is nan with one item, and infinite or nan where draws are.

    Example:
        >>> found = bootstrap([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]], lambda rows: float(rows[:, 1].sum() / rows[:, 0].sum()))
        >>> found.value, found.low, found.high
        (2.0, 2.0, 2.0)
    """
    rows = np.asarray(items, dtype=np.float64)
    count = len(rows)
    with np.errstate(all="ignore"):
        value = statistic(rows)
        if count < 2:
            return Interval(value, math.nan, math.nan, math.nan, count)
        chosen = np.random.default_rng(seed).integers(count, size=(draws, count), dtype=np.int32)
        drawn = np.sort([statistic(rows[each]) for each in chosen])
        outside = int(_TAIL * draws)
        low, high = float(drawn[outside]), float(drawn[draws - 1 - outside])
        return Interval(value, float(drawn.std(ddof=1)), low, high, count)


def proportion_interval(hits: int, count: int) -> Interval:
    """A proportion, with Wilson's interval.

    Args:
        hits: successes.
        count: trials, at least one.

    Raises:
        UsageError: there is no trial, or there are more hits than trials.

    Source:
        E. B. Wilson, Journal of the American Statistical Association 22, 1927.
    """
    if not 0 <= hits <= count or count < 1:
        raise UsageError(f"A proportion of {hits} in {count} is none: it takes 1 trial or more and 0 to as many hits.")
    value = hits / count
    shrink = 1 + _Z**2 / count
    center = (value + _Z**2 / (2 * count)) / shrink
    margin = _Z * math.sqrt(value * (1 - value) / count + (_Z / (2 * count)) ** 2) / shrink
    error = math.sqrt(value * (1 - value) / count)
    # Rounding may leave the value just outside where it is 0 or 1.
    return Interval(value, error, min(value, max(0.0, center - margin)), max(value, min(1.0, center + margin)), count)


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: exact for 1 and 2 degrees of freedom, from 3 on within 0.12 %.

    Source:
        Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    if freedom == 1:
        return math.tan(math.pi * (0.5 - _TAIL))
    if freedom == 2:
        return (1 - 2 * _TAIL) / math.sqrt(2 * _TAIL * (1 - _TAIL))
    terms = (
        _Z,
        (_Z**3 + _Z) / 4,
        (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / 96,
        (3 * _Z**7 + 19 * _Z**5 + 17 * _Z**3 - 15 * _Z) / 384,
        (79 * _Z**9 + 776 * _Z**7 + 1482 * _Z**5 - 1920 * _Z**3 - 945 * _Z) / 92160,
    )
    return math.fsum(term / freedom**power for power, term in enumerate(terms))


def _items(values: ArrayLike, what: str) -> NDArray[np.float64]:
    items = np.asarray(values, dtype=np.float64)
    if items.ndim != 1 or not items.size:
        raise UsageError(f"{what} needs one dimension with 1 item or more, not the shape {list(items.shape)}.")
    return items
