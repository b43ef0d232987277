import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import superweights as sw
from superweights.coordinates import Coordinate
from superweights.errors import CoordinateError, UsageError
from superweights.experiments.scaling import ScalingSettings, best_factor, held_out_gain, scale
from superweights.measurements.windows import Windows
from superweights.results.records import MeasurementRecord, NoteRecord


def measured(records) -> dict[tuple[str, str], MeasurementRecord]:
    return {(each.name, each.condition): each for each in records if isinstance(each, MeasurementRecord)}


def notes(records) -> list[str]:
    return [each.text for each in records if isinstance(each, NoteRecord)]


def fewer(windows: Windows, count: int) -> Windows:
    return Windows(windows.ids[:count], windows.text_name, windows.digest, windows.length, windows.bos)


def loss_with_parameter(directory, weight: Coordinate, factor: float, ids: torch.Tensor) -> float:
    """The plain way: the parameter itself, and cross entropy."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        model.model.layers[weight.layer].mlp.down_proj.weight[weight.row, weight.col] *= factor
        logits = model(ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten()).item()


@pytest.mark.parametrize("residency", ["resident", "streamed"])
def test_perplexities_are_those_of_a_model_with_the_parameter_scaled(residency, own_text):
    with sw.load(own_text.directory, residency=residency) as model:
        settings = ScalingSettings((0.0, 0.5, 2.0))
        found = measured(scale(model, [own_text.weight], own_text.windows, settings=settings))
    losses = {
        factor: loss_with_parameter(own_text.directory, own_text.weight, factor, own_text.windows.ids)
        for factor in (0.0, 0.5, 1.0, 2.0)
    }
    for factor, loss in losses.items():
        name = "original" if factor == 1 else f"scale {factor:g}"
        assert found["perplexity", name].value == pytest.approx(math.exp(loss), rel=1e-4)
        if factor != 1:
            ratio = found["perplexity_ratio", name]
            assert ratio.value == pytest.approx(math.exp(loss - losses[1.0]), rel=1e-4)
            assert ratio.interval[0] < ratio.value < ratio.interval[1]
            assert ratio.intervention == {"kind": "scale", "factor": factor, "weights": ["2:49:7"]}
    assert ("perplexity_ratio", "original") not in found


def test_a_model_that_wrote_the_text_is_best_as_it_is(own_text):
    with sw.load(own_text.directory) as model:
        records = list(scale(model, [own_text.weight], own_text.windows))
    found = measured(records)
    best, gain = found["best_factor", "original"], found["best_factor_gain", "original"]
    assert (best.value, best.unit, best.count) == (1.0, "1", 24)
    assert best.interval[0] <= 1 <= best.interval[1]
    assert gain.interval[1] >= 1
    (note,) = notes(records)
    assert note.startswith("There is no ")


def test_a_weight_that_was_made_a_tenth_has_a_real_gain(own_text):
    with sw.load(own_text.directory) as model, model.edited({own_text.weight: 0.1}):
        settings = ScalingSettings((0.5, 1.0, 10.0))
        records = list(scale(model, [own_text.weight, own_text.weight], own_text.windows, settings=settings))
    found = measured(records)
    gain, ratio = found["best_factor_gain", "scale 10"], found["perplexity_ratio", "scale 10"]
    assert found["best_factor", "scale 10"].interval == (10, 10)
    assert (gain.value, gain.interval) == (ratio.value, ratio.interval)  # both halves chose the same
    assert gain.interval[1] < 1
    assert notes(records)[0].startswith("The gain is real: at a factor chosen on other windows (10) ")


def test_factors_are_sorted_and_hold_the_original(own_text):
    with sw.load(own_text.directory) as model:
        settings = ScalingSettings((2.0, -1.0, 2.0))
        records = list(scale(model, [own_text.weight], own_text.windows, settings=settings))
    conditions = [
        each.condition for each in records if isinstance(each, MeasurementRecord) and each.name == "perplexity"
    ]
    assert conditions == ["original", "scale -1", "scale 2"]


def random_losses(seed: int, *, windows: int = 24, factors: int = 11, spread: float = 0.05) -> np.ndarray:
    """Losses of factors that all do nothing on average; the last is the original."""
    draw = np.random.default_rng(seed)
    return 3 + draw.normal(0, 0.3, windows) + draw.normal(0, spread, (factors, windows))


def test_the_gain_of_nothing_is_none_though_the_best_of_many_looks_good():
    factors = [*map(float, range(2, 12)), 1.0]
    tried = [random_losses(seed) for seed in range(200)]
    gains = [held_out_gain(each, factors, seed=number)[1] for number, each in enumerate(tried)]
    naive = [math.exp(each.mean(axis=1).min() - each[-1].mean()) for each in tried]
    assert np.mean(naive) < 0.985
    assert abs(np.mean([math.log(each.value) for each in gains])) < 0.003
    assert sum(each.high < 1 for each in gains) <= 16  # 2.5 % are expected, a little more with 24 windows


def test_the_gain_by_hand():
    losses = random_losses(5, windows=7, factors=3)
    factors = [0.5, 2.0, 1.0]
    order = list(np.random.default_rng(3).permutation(7))
    halves = [order[:4], order[4:]]
    best = [min(range(3), key=lambda row: sum(losses[row][each] for each in half)) for half in halves]
    differences = [losses[best[1]][each] - losses[2][each] for each in halves[0]]
    differences += [losses[best[0]][each] - losses[2][each] for each in halves[1]]
    chosen, gain = held_out_gain(losses, factors, seed=3)
    assert chosen == (factors[best[0]], factors[best[1]])
    assert gain.value == pytest.approx(math.exp(sum(differences) / 7))
    assert gain.count == 7


def test_the_best_factor_by_hand():
    losses, factors = random_losses(0, windows=6, factors=4), [0.0, 0.5, 1.0, 2.0]
    found = best_factor(losses, factors, seed=1)
    drawn = []
    for chosen in np.random.default_rng(1).integers(6, size=(2000, 6)):
        means = [sum(losses[row][each] for each in chosen) for row in range(4)]
        drawn.append(factors[means.index(min(means))])
    drawn.sort()
    assert found.value == factors[int(losses.mean(axis=1).argmin())]
    assert (found.low, found.high) == (drawn[50], drawn[1949])
    assert found.standard_error == pytest.approx(np.std(drawn, ddof=1))


def test_losses_that_are_no_numbers_are_never_best():
    losses = np.array([[math.nan, 1.0], [math.inf, math.inf], [2.0, 2.1]])
    factors = [0.0, 1.0, 2.0]
    assert best_factor(losses, factors) == best_factor(losses[2:], [2.0])
    assert math.isnan(best_factor(losses[:2], factors[:2]).value)
    chosen, gain = held_out_gain(losses, factors)
    assert 1.0 not in chosen
    assert gain.value == 0 or math.isnan(gain.value)  # the original is infinite


def test_a_factor_that_overflows_is_survived(own_text):
    with sw.load(own_text.directory) as model:
        settings = ScalingSettings((1e38, 0.0))
        records = list(scale(model, [own_text.weight], own_text.windows, settings=settings))
    found = measured(records)
    assert not math.isfinite(found["perplexity", "scale 1e+38"].value)
    assert found["best_factor", "original"].value == 1


def test_a_model_without_a_finite_loss_has_no_best_factor(own_text):
    with sw.load(own_text.directory) as model:
        model.logits(model.states(own_text.windows.ids[:1]))  # the head is there from now on
        model.model.lm_head.weight.data[0] = math.nan
        records = list(scale(model, [own_text.weight], own_text.windows))
    assert {name for name, _ in measured(records)} >= {"perplexity", "perplexity_ratio"}
    assert not [name for name, _ in measured(records) if name.startswith("best")]
    assert notes(records) == ["No factor gives a finite loss, so none is best."]


def test_few_windows_are_told(own_text):
    with sw.load(own_text.directory) as model:
        records = list(scale(model, [own_text.weight], fewer(own_text.windows, 2)))
        assert "2 windows are few" in notes(records)[-1]
        with pytest.raises(UsageError, match=r"takes 2 windows or more.*own text gives 1"):
            list(scale(model, [own_text.weight], fewer(own_text.windows, 1)))


def test_what_cannot_be_scaled_is_said(own_text):
    with sw.load(own_text.directory) as model:
        with pytest.raises(UsageError, match=r"no weight of .* to scale"):
            list(scale(model, [], own_text.windows))
        with pytest.raises(CoordinateError, match="the layers are 0 to 5"):
            list(scale(model, [Coordinate(31, None, 3968, 7003)], own_text.windows))
        with model.edited({own_text.weight: 0.0}), pytest.raises(UsageError, match="changes nothing"):
            list(scale(model, [own_text.weight], own_text.windows))


@pytest.mark.parametrize("factors", [(), (1.0,), (0.0, math.nan), (math.inf,)])
def test_factors_out_of_range(factors):
    with pytest.raises(UsageError, match="Give finite numbers, at least one other than 1"):
        ScalingSettings(factors)
