import math
import random
from statistics import NormalDist, mean, stdev

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superweights.errors import UsageError
from superweights.measurements.intervals import (
    Interval,
    mean_interval,
    perplexity,
    perplexity_ratio,
    proportion_interval,
    t_quantile,
)

LOSSES = st.lists(st.floats(0, 20), min_size=2, max_size=12)
ANY_FLOATS = st.lists(st.floats(), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (30, 2.042), (10**6, 1.960)],
)
def test_quantiles_of_students_t(freedom, quantile):
    rounding = 5e-4 / quantile
    assert t_quantile(freedom) == pytest.approx(quantile, rel=rounding + (1.2e-3 if freedom < 5 else 1.1e-4))


def test_quantiles_of_students_t_fall_to_the_normal_one():
    quantiles = [t_quantile(freedom) for freedom in range(1, 2000)]
    assert quantiles == sorted(quantiles, reverse=True)
    assert quantiles[-1] > NormalDist().inv_cdf(0.975)


@given(LOSSES)
def test_the_mean_and_its_interval(values):
    found = mean_interval(values)
    error = stdev(values) / math.sqrt(len(values))
    assert found.count == len(values)
    assert found.value == pytest.approx(mean(values), abs=1e-9)
    assert found.standard_error == pytest.approx(error, abs=1e-7)
    assert found.high - found.value == pytest.approx(t_quantile(len(values) - 1) * error, abs=1e-6)
    assert found.value - found.low == pytest.approx(found.high - found.value, abs=1e-9)


@given(LOSSES)
def test_perplexity_is_exp_of_the_mean_loss(losses):
    loss, found = mean_interval(losses), perplexity(torch.tensor(losses, dtype=torch.float64))
    for name in ("value", "low", "high"):
        assert getattr(found, name) == pytest.approx(np.exp(getattr(loss, name)), rel=1e-9, abs=0)
    assert found.standard_error == pytest.approx(found.value * loss.standard_error)


def test_the_standard_error_of_perplexity_is_the_slope_times_that_of_the_loss():
    losses = [2.0, 2.1, 2.2, 1.9]
    error = mean_interval(losses).standard_error
    shift = 1e-6 * error
    slope = (perplexity([each + shift for each in losses]).value - perplexity(losses).value) / shift
    assert perplexity(losses).standard_error == pytest.approx(slope * error, rel=1e-4)


def slow_ratio(edited: list[float], original: list[float], draws: int) -> tuple[float, float, float]:
    """The paired bootstrap as a plain loop: standard error, low, high."""
    chance, found = random.Random(1), []
    for _ in range(draws):
        chosen = chance.choices(range(len(edited)), k=len(edited))
        found.append(math.exp(mean(edited[each] - original[each] for each in chosen)))
    found.sort()
    return stdev(found), found[int(0.025 * draws)], found[draws - 1 - int(0.025 * draws)]


def test_the_ratio_agrees_with_a_plain_loop():
    chance = random.Random(0)
    original = [chance.gauss(3, 0.5) for _ in range(30)]
    edited = [each + chance.gauss(0.4, 0.2) for each in original]
    found = perplexity_ratio(edited, original, draws=4000)
    error, low, high = slow_ratio(edited, original, 4000)
    assert found.value == pytest.approx(perplexity(edited).value / perplexity(original).value)
    assert found.count == 30
    assert found.standard_error == pytest.approx(error, rel=0.05)
    assert found.low == pytest.approx(low, rel=0.01)
    assert found.high == pytest.approx(high, rel=0.01)


def test_the_ratio_is_paired():
    """Windows differ far more from each other than an edit changes any of them."""
    original = np.linspace(1, 6, 40)
    found = perplexity_ratio(original + 0.01, original)
    assert (found.low, found.value, found.high) == pytest.approx((np.exp(0.01),) * 3)


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=20), st.integers(0, 5))
@settings(deadline=None)
def test_an_interval_holds_its_ratio_and_comes_again(differences, seed):
    edited = np.array(differences)
    found = perplexity_ratio(edited, np.zeros(len(edited)), draws=200, seed=seed)
    assert found == perplexity_ratio(edited, np.zeros(len(edited)), draws=200, seed=seed)
    smallest, largest = np.exp(edited.min()) * (1 - 1e-12), np.exp(edited.max()) * (1 + 1e-12)
    assert smallest <= found.low <= found.high <= largest
    assert smallest <= found.value <= largest
    assert found.standard_error >= 0


def test_the_same_windows_twice_are_exactly_one():
    losses = np.random.default_rng(0).normal(3, 1, 25)
    assert perplexity_ratio(losses, losses) == Interval(1.0, 0.0, 1.0, 1.0, 25)


def test_other_seeds_make_other_draws():
    losses = np.random.default_rng(0).normal(3, 1, 25)
    assert perplexity_ratio(losses, 0 * losses, seed=0) != perplexity_ratio(losses, 0 * losses, seed=1)


@pytest.mark.parametrize(("windows", "stated"), [(10, 0.95), (40, 0.95)])
def test_the_interval_covers_as_often_as_its_docstring_says(windows, stated):
    """600 simulations have a standard error of 0.012 at most: three of them are allowed."""
    chance, covered = np.random.default_rng(0), 0
    for seed in range(600):
        found = perplexity_ratio(chance.normal(0.3, 0.2, windows), np.zeros(windows), draws=400, seed=seed)
        covered += found.low <= math.exp(0.3) <= found.high
    assert covered / 600 == pytest.approx(stated, abs=0.036)


def test_students_interval_covers_95_percent():
    chance, covered = np.random.default_rng(0), 0
    for _ in range(2000):
        found = mean_interval(chance.normal(3, 1, 6))
        covered += found.low <= 3 <= found.high
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(
    "measure", [mean_interval, perplexity, lambda losses: perplexity_ratio(losses, [0.0] * len(losses))]
)
def test_one_window_has_no_interval(measure):
    found = measure([0.5])
    assert found.value in (0.5, math.exp(0.5))
    assert found.count == 1
    assert all(map(math.isnan, (found.standard_error, found.low, found.high)))


def test_one_infinite_window_makes_the_ratio_infinite():
    found = perplexity_ratio([math.inf, 1, 1, 1], [1.0] * 4)
    assert (found.value, found.high) == (math.inf, math.inf)
    assert found.low == 1, "a draw may leave the window out"
    everywhere = perplexity_ratio([math.inf] * 4, [1.0] * 4)
    assert (everywhere.value, everywhere.low, everywhere.high) == (math.inf,) * 3


def test_one_window_that_is_not_a_number_makes_everything_nan():
    found = perplexity_ratio([math.nan, 1, 1], [1.0] * 3)
    assert all(map(math.isnan, (found.value, found.standard_error, found.low, found.high)))


def test_a_loss_whose_exponential_overflows_is_infinite():
    assert perplexity([800.0, 900.0]).value == math.inf
    found = perplexity_ratio([500.0, 520.0, 510.0], [1.0, 2.0, 3.0])
    assert found.value == pytest.approx(math.exp(508))
    assert math.isfinite(found.standard_error), "its square would not be"
    assert perplexity_ratio([1500.0, 1520.0], [1.0, 2.0]).value == math.inf


@given(ANY_FLOATS, st.data())
def test_no_float_raises_or_warns(edited, data):
    original = data.draw(st.lists(st.floats(), min_size=len(edited), max_size=len(edited)))
    assert mean_interval(edited).count == len(edited)
    assert perplexity(edited).count == len(edited)
    assert perplexity_ratio(edited, original, draws=50).count == len(edited)


@pytest.mark.parametrize("measure", [mean_interval, perplexity])
@pytest.mark.parametrize("values", [[], [[1.0, 2.0]], 3.0])
def test_other_shapes_are_refused(measure, values):
    with pytest.raises(UsageError, match="needs one dimension with 1 item or more, not the shape"):
        measure(values)


def test_a_ratio_that_is_no_pair_is_refused():
    with pytest.raises(UsageError, match="2 windows edited and 3 original"):
        perplexity_ratio([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(UsageError, match="39 draws; an interval of 95 % needs 40 or more"):
        perplexity_ratio([1.0, 2.0], [1.0, 2.0], draws=39)


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilsons_interval(hits, count, low, high):
    """81 of 263 is Newcombe's example (Statistics in Medicine 17, 1998, table I)."""
    found = proportion_interval(hits, count)
    assert (found.low, found.high) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))
    assert (found.value, found.count) == (hits / count, count)


@given(st.integers(1, 10**6), st.data())
def test_wilsons_interval_solves_its_equation(count, data):
    hits = data.draw(st.integers(0, count))
    found = proportion_interval(hits, count)
    z = NormalDist().inv_cdf(0.975)
    assert 0 <= found.low <= found.value <= found.high <= 1
    for end in (found.low, found.high):
        assert (found.value - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / count, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("hits", "count"), [(0, 0), (-1, 5), (6, 5)])
def test_a_proportion_of_nothing_is_refused(hits, count):
    with pytest.raises(UsageError, match=f"A proportion of {hits} in {count} is none"):
        proportion_interval(hits, count)


def test_an_interval_ends_where_the_mean_can_be_no_more():
    found = mean_interval([0.9, 1.0, 1.0], bounds=(0, 1))
    assert (found.value, found.high) == (pytest.approx(0.9667, abs=1e-4), 1.0)
    assert found.low == mean_interval([0.9, 1.0, 1.0]).low
    assert math.isnan(mean_interval([0.9], bounds=(0, 1)).high)
