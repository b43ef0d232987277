import math

import numpy as np
import pytest
import torch

import superweights as sw
from superweights.coordinates import Coordinate
from superweights.errors import CoordinateError, UsageError
from superweights.experiments.repair import RepairSettings, minimise, recovered, repair
from superweights.interventions.conditions import ORIGINAL, AddToWeights, Condition, ScaleWeights
from superweights.interventions.rows import applied, condition_states
from superweights.measurements.windows import Windows
from superweights.results.records import MeasurementRecord, NoteRecord
from superweights.testing import save_tiny_checkpoint

FAR = RepairSettings(reach=3000)
"""The planted weight is some 800 times the largest other of its matrix."""
DESTROYED, REDERIVED, PATCHED = "destroyed", "scalar re-derived", "column patch fitted on activations"


def measured(records) -> dict[tuple[str, str, str], MeasurementRecord]:
    found = [each for each in records if isinstance(each, MeasurementRecord)]
    return {(each.name, each.subject, each.condition): each for each in found}


def notes(records) -> list[str]:
    return [each.text for each in records if isinstance(each, NoteRecord)]


def fewer(windows: Windows, count: int) -> Windows:
    return Windows(windows.ids[:count], windows.text_name, windows.digest, windows.length, windows.bos)


@pytest.mark.parametrize("residency", ["resident", "streamed"])
def test_a_destroyed_model_comes_back(residency, own_text):
    with sw.load(own_text.directory, residency=residency) as model:
        before = model.states(own_text.windows.ids)
        records = list(repair(model, [own_text.weight, own_text.weight], own_text.windows, settings=FAR))
        assert torch.equal(model.states(own_text.windows.ids), before)
    found = measured(records)
    ratios = {name: found["perplexity_ratio", "", name] for name in (DESTROYED, REDERIVED, PATCHED)}
    assert ratios[DESTROYED].value > 2
    assert ratios[REDERIVED].value < 1.1
    assert ratios[PATCHED].value == pytest.approx(1, abs=1e-4)
    scalar, patch = (found["recovered", "", name] for name in (REDERIVED, PATCHED))
    assert scalar.value > 0.9 and scalar.interval[0] <= scalar.value <= scalar.interval[1]
    assert patch.value == pytest.approx(1, abs=1e-4)
    assert (scalar.unit, scalar.count) == ("proportion", 24 - 4)
    true, again = (
        found["true_value", "2:49:7", "original"].value,
        found["rederived_value", "2:49:7", REDERIVED].value,
    )
    assert true == pytest.approx(-64.08, abs=0.01)
    assert 0.5 < again / true < 2
    assert notes(records) == []


def test_recovery_is_a_share_of_the_log_perplexity(own_text):
    with sw.load(own_text.directory) as model:
        found = measured(repair(model, [own_text.weight], own_text.windows, settings=FAR))
    whole, destroyed, repaired = (
        math.log(found["perplexity", "", name].value) for name in ("original", DESTROYED, REDERIVED)
    )
    assert found["recovered", "", REDERIVED].value == pytest.approx((destroyed - repaired) / (destroyed - whole))


def test_the_search_knows_nothing_of_the_original_value(own_text):
    """Whatever stood there, the model without it is the same, and so is what is found again."""
    values = []
    for factor in (1.5, -0.2):
        with sw.load(own_text.directory) as model, model.edited({own_text.weight: factor}):
            found = measured(repair(model, [own_text.weight], own_text.windows, settings=FAR))
            values.append([found[name, "2:49:7", state].value for name, state in
                           (("true_value", "original"), ("rederived_value", REDERIVED))])  # fmt: skip
    assert values[0][0] != values[1][0]
    assert values[0][1] == values[1][1]


def test_other_damage_than_removal(own_text):
    with sw.load(own_text.directory) as model:
        settings = RepairSettings(damage=-1.0, reach=3, patch=False)  # the range comes from what stands there
        records = list(repair(model, [own_text.weight], own_text.windows, settings=settings))
    found = measured(records)
    assert found["perplexity_ratio", "", DESTROYED].intervention["factor"] == -1
    assert found["recovered", "", REDERIVED].value > 0.8
    assert ("perplexity", "", PATCHED) not in found


def test_patches_give_back_the_values_of_several_weights(own_text):
    weights = [own_text.weight, Coordinate(2, None, 5, 7), Coordinate(2, None, 49, 9), Coordinate(4, None, 3, 6)]
    with sw.load(own_text.directory) as model:
        found = measured(repair(model, weights, own_text.windows, settings=RepairSettings(sweeps=1)))
    assert found["recovered", "", PATCHED].value == pytest.approx(1, abs=1e-3)
    steps = found["perplexity", "", PATCHED].intervention["steps"]
    added = {place: value for step in steps[1:] for place, value in zip(step["weights"], step["values"], strict=True)}
    for weight in weights:
        assert added[str(weight)] == pytest.approx(
            found["true_value", str(weight), "original"].value, rel=1e-2
        )  # beside -64


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "llama4_text"])
def test_patches_of_other_layouts(family, tmp_path):
    save_tiny_checkpoint(family, tmp_path)
    windows = Windows(torch.randint(4, 100, (6, 16)), "noise", "x", 16, False)
    with sw.load(tmp_path) as model:
        routed = any(each.experts for each in model.architecture.in_layer(3))
        weights = [Coordinate(3, 1 if routed else None, 3, 5), Coordinate(3, 2 if routed else None, 4, 6)]
        factors = dict.fromkeys(weights, 300.0)
        with model.edited(factors):
            found = measured(repair(model, weights, windows))
    steps = found["perplexity", "", PATCHED].intervention["steps"]
    added = {place: value for step in steps[1:] for place, value in zip(step["weights"], step["values"], strict=True)}
    for weight in weights:
        assert added[str(weight)] == pytest.approx(found["true_value", str(weight), "original"].value, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("residency", ["resident", "streamed"])
def test_adding_to_weights_is_what_it_says(residency, family, tmp_path):
    save_tiny_checkpoint(family, tmp_path)
    ids = torch.tensor([[5, 9, 3, 17, 2, 8, 11], [1, 2, 3, 4, 5, 6, 7]])
    weights = [Coordinate(2, 1 if family == "mixtral" else None, row, 5) for row in (3, 4)]
    with sw.load(tmp_path) as model:
        for weight, value in zip(weights, (7.0, -9.0), strict=True):
            projection = model.architecture.locate(weight)
            model.model.get_parameter(projection.name).data[projection.index(weight)] += value
        expected = model.states(ids)
    with sw.load(tmp_path, residency=residency) as model:
        added = Condition("added", (AddToWeights(tuple(weights), (7.0, -10.0)), AddToWeights((weights[1],), (1.0,))))
        both = Condition("both", (ScaleWeights((weights[0],), 0.0), *added.interventions))
        rows = condition_states(model, ids, [ORIGINAL, added, both])
        with applied(model, added):
            alone = model.states(ids)
        torch.testing.assert_close(rows[0], model.states(ids), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows[1], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(rows[1], rows[2])


def test_a_weight_that_the_model_does_not_need(planted_checkpoint):
    windows = Windows(torch.randint(4, 100, (6, 16)), "noise", "x", 16, False)
    with sw.load(planted_checkpoint) as model:
        records = list(repair(model, [Coordinate(4, None, 3, 5)], windows))
    shares = [each for (name, *_), each in measured(records).items() if name == "recovered"]
    assert len(shares) == 2 and all(math.isnan(each.value) for each in shares)
    assert "There is no loss to recover: the model does not need them." in notes(records)[0]


def test_a_search_that_ends_too_early_says_so(own_text):
    with sw.load(own_text.directory) as model:
        records = list(repair(model, [own_text.weight], own_text.windows, settings=RepairSettings(patch=False)))
    assert notes(records) == ["The value found for 2:49:7 is at the end of the search. Give more reach."]


def test_a_loss_that_is_not_finite_has_no_share(own_text):
    with sw.load(own_text.directory) as model:
        model.logits(model.states(own_text.windows.ids[:1]))  # the head is there from now on
        model.model.lm_head.weight.data[0] = math.nan
        records = list(repair(model, [own_text.weight], own_text.windows))
    found = measured(records)
    assert math.isnan(found["perplexity", "", DESTROYED].value)
    assert found["rederived_value", "2:49:7", REDERIVED].value == 0  # nothing is better than the damaged value
    assert "Of such a loss no share is known." in notes(records)[0]


def test_minimising_keeps_the_start_unless_something_is_better():
    seen: list[float] = []

    def flat(values):
        seen.extend(values)
        return [math.nan if value < 0 else 1.0 for value in values]

    assert minimise(flat, start=0.5, grid=[-1.0, 0.0, 1.0]) == 0.5
    assert len(seen) == len(set(seen))
    assert minimise(
        lambda values: [abs(each - 3.3) for each in values], start=0.0, grid=[-8, -4, 4, 8]
    ) == pytest.approx(3.3, abs=0.1)


def test_recovered_by_hand():
    draw = np.random.default_rng(0)
    original = draw.normal(2, 0.1, 12)
    destroyed, repaired = original + draw.normal(2, 0.3, 12), original + draw.normal(0.5, 0.3, 12)
    found = recovered(repaired, destroyed, original, seed=4)
    shares = []
    for chosen in np.random.default_rng(4).integers(12, size=(2000, 12)):
        gain = sum(destroyed[each] - repaired[each] for each in chosen)
        shares.append(gain / sum(destroyed[each] - original[each] for each in chosen))
    assert found.value == pytest.approx((destroyed.mean() - repaired.mean()) / (destroyed.mean() - original.mean()))
    assert (found.low, found.high) == pytest.approx(np.quantile(shares, [0.025, 0.975]))
    assert found.count == 12
    assert math.isnan(recovered([1.0, 1.0], [math.inf, 2.0], [0.5, 0.5]).value)


def test_what_cannot_be_repaired_is_said(own_text):
    with sw.load(own_text.directory) as model:
        with pytest.raises(UsageError, match=r"no weight of .* to repair"):
            list(repair(model, [], own_text.windows))
        with pytest.raises(CoordinateError, match="rows are 0 to 63"):
            list(repair(model, [Coordinate(2, None, 3968, 7003)], own_text.windows))
        with pytest.raises(
            UsageError, match="takes 6 windows or more, 4 to fit on and 2 to measure it on; own text gives 5"
        ):
            list(repair(model, [own_text.weight], fewer(own_text.windows, 5)))
        with model.edited({own_text.weight: 0.0}), pytest.raises(UsageError, match="changes nothing"):
            list(repair(model, [own_text.weight], own_text.windows))
        with pytest.raises(UsageError, match=r"makes a weight of .* infinite"):
            list(repair(model, [own_text.weight], own_text.windows, settings=RepairSettings(damage=1e38)))
        nothing = Condition("nothing", (AddToWeights((own_text.weight,), (0.0,)),))
        with pytest.raises(UsageError, match="Adding 0 to 2:49:7"):
            condition_states(model, own_text.windows.ids, [ORIGINAL, nothing])


@pytest.mark.parametrize("settings", [{"damage": 1.0}, {"damage": math.nan}, {"fit_windows": 0}, {"sweeps": 0},
                                      {"reach": 0.0}, {"reach": math.inf}])  # fmt: skip
def test_settings_out_of_range(settings):
    with pytest.raises(UsageError, match="must be"):
        RepairSettings(**settings)
