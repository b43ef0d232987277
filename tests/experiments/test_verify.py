import math

import pytest
import torch

import superweights as sw
from superweights.coordinates import Coordinate
from superweights.errors import CoordinateError, UsageError
from superweights.experiments import verify as module
from superweights.experiments.verify import VerifySettings, verify
from superweights.interventions.conditions import Condition
from superweights.measurements.scores import Scores
from superweights.measurements.windows import Windows

OTHER = Coordinate(3, None, 5, 5)
KEYS = [Coordinate(1, None, 2, each) for each in range(4)]


@pytest.mark.parametrize("residency", ["resident", "streamed"])
def test_a_model_that_needs_one_weight_says_so(residency, own_text):
    with sw.load(own_text.directory, residency=residency) as model:
        found = verify(model, [own_text.weight, OTHER], own_text.windows)
    needed, other, together = found.verdicts
    assert (needed.label, other.label, together.label) == ("critical alone", "inert", "critical jointly")
    assert needed.interval[0] > 50 * needed.null_maximum
    assert needed.without == pytest.approx(other.ratio)
    assert other.without == pytest.approx(needed.ratio)
    assert found.weights == (own_text.weight,)
    assert "every interval decides" in found.notes[0]
    assert found.evaluation.count == needed.count < len(own_text.windows.ids)


def test_the_same_seed_gives_the_same_numbers(own_text):
    with sw.load(own_text.directory) as model:
        settings = VerifySettings(null=3)
        runs = [verify(model, [own_text.weight], own_text.windows, settings=settings) for _ in range(2)]
    assert runs[0].verdicts == runs[1].verdicts
    (verdict,) = runs[0].verdicts
    assert (verdict.null_count, verdict.without, verdict.kind) == (3, None, "single")


def test_the_null_is_drawn_from_the_largest_weights_of_the_same_matrices(own_text):
    with sw.load(own_text.directory) as model:
        found = verify(model, [own_text.weight, OTHER], own_text.windows, settings=VerifySettings(null=8, null_top=5))
        null = [each for each in found.evaluation.conditions if each.name.startswith("null")]
        for condition in null:
            for weight in condition.interventions[0].weights:
                assert weight not in (own_text.weight, OTHER)
                matrix = model.model.get_submodule(f"model.layers.{weight.layer}.mlp.down_proj").weight
                larger = int((matrix.abs() > matrix[weight.row, weight.col].abs()).sum())
                assert larger < 5 + 2
        sets = [each for each in null if each.name.startswith("null set")]
        assert all([each.layer for each in condition.interventions[0].weights] == [2, 3] for condition in sets)


def windows_of(count: int) -> Windows:
    return Windows(torch.zeros(count, 4, dtype=torch.long), "none", "sha256:0", 4, False)


def fake_losses(monkeypatch, needed: list[set[Coordinate]], *, noise: float = 0.005) -> None:
    """A model whose loss is 3 nats higher as soon as all weights of one of the sets are gone."""

    def evaluate(model, windows, conditions: list[Condition], **_):
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(len(windows.ids), generator=generator)
        rows = []
        for condition in conditions:
            gone = {weight for each in condition.interventions for weight in each.weights}
            harm = 3.0 if any(each <= gone for each in needed) else 0.0
            rows.append(base + harm + noise * torch.randn(len(windows.ids), generator=generator) * bool(gone))
        nll = torch.stack(rows).double()
        yield Scores(nll, nll * math.nan, nll * math.nan)

    monkeypatch.setattr(module, "evaluate_in_parts", evaluate)


def labels(found: module.Verification) -> dict[str, str]:
    return {each.weights[0]: each.label for each in found.verdicts if each.kind == "single"}


def test_weights_that_only_matter_together_are_critical_jointly(monkeypatch, planted_checkpoint):
    fake_losses(monkeypatch, [{KEYS[0], KEYS[2]}])
    with sw.load(planted_checkpoint) as model:
        found = verify(model, KEYS, windows_of(16))
    assert found.verdicts[-1].kind == "minimal set"
    assert found.verdicts[-1].weights == (str(KEYS[0]), str(KEYS[2]))
    assert labels(found)[str(KEYS[0])] == labels(found)[str(KEYS[2])] == "critical jointly"
    assert {labels(found)[str(KEYS[1])], labels(found)[str(KEYS[3])]} <= {"inert", "contributing"}
    assert found.weights == (KEYS[0], KEYS[2])


def test_where_one_is_enough_no_set_is_looked_for(monkeypatch, planted_checkpoint):
    fake_losses(monkeypatch, [{KEYS[1]}])
    with sw.load(planted_checkpoint) as model:
        found = verify(model, KEYS, windows_of(16))
    assert labels(found)[str(KEYS[1])] == "critical alone"
    assert [each.kind for each in found.verdicts] == ["single"] * 4 + ["all"]


def test_a_structure_without_function_is_inert(monkeypatch, planted_checkpoint):
    fake_losses(monkeypatch, [])
    with sw.load(planted_checkpoint) as model:
        found = verify(model, KEYS[:1], windows_of(16))
    assert labels(found)[str(KEYS[0])] in {"inert", "contributing"}
    assert found.weights == ()


def test_wide_intervals_are_undecided(monkeypatch, planted_checkpoint):
    fake_losses(monkeypatch, [], noise=4.0)
    with sw.load(planted_checkpoint) as model:
        found = verify(model, KEYS[:1], windows_of(9))
    assert labels(found)[str(KEYS[0])] == "undecided"
    assert "more windows" in found.verdicts[0].reason


def test_a_spent_budget_stops_and_says_so(own_text):
    with sw.load(own_text.directory) as model:
        found = verify(model, [OTHER], own_text.windows, settings=VerifySettings(null=400, minutes=1e-9))
    assert "minutes are spent" in found.notes[0]
    assert found.evaluation.count < len(own_text.windows.ids)


def test_a_destroyed_model_is_a_result():
    ratio = module.Interval(math.inf, math.nan, math.nan, math.nan, 9)
    assert module._label("single", ratio, 1.0, VerifySettings())[0] == "critical alone"


@pytest.mark.parametrize(
    ("ends", "null", "label", "reason"),
    [
        ((1.0, 1.008), 1.001, "inert", "no loss"),
        ((1.002, 1.004), 1.001, "contributing", "largest is 1.001"),
        ((0.95, 1.5), 1.001, "undecided", "more windows"),
        ((0.98, 1.5), 0.97, "undecided", "more windows"),
        ((1.5, 2.5), 1.001, "undecided", "bar of 2"),
        ((3.0, 4.0), 3.5, "undecided", "other large weights cost about as much"),
        ((3.0, 4.0), 1.001, "critical alone", "largest is 1.001"),
    ],
)
def test_labels_follow_from_the_whole_interval(ends, null, label, reason):
    found = module._label("single", module.Interval(sum(ends) / 2, 0.1, *ends, 9), null, VerifySettings())
    assert found[0] == label
    assert reason in found[1]


def test_a_model_that_is_broken_already_is_no_evidence(monkeypatch, planted_checkpoint):
    def evaluate(model, windows, conditions, **_):
        nll = torch.full((len(conditions), len(windows.ids)), math.nan)
        yield Scores(nll, nll, nll)

    monkeypatch.setattr(module, "evaluate_in_parts", evaluate)
    with sw.load(planted_checkpoint) as model, pytest.raises(UsageError, match="not finite as it is"):
        verify(model, KEYS[:1], windows_of(9))


def test_a_null_that_destroys_the_model_is_the_largest(monkeypatch):
    ratios = iter([math.nan, 2.0])
    evaluation = type("Scored", (), {"ratio": lambda *_: module.Interval(next(ratios), 0, 0, 0, 9)})()
    assert module._null_maximum(evaluation, [Condition("null 1"), Condition("null 2")]) == math.inf


def test_bad_input_is_refused(own_text):
    with sw.load(own_text.directory) as model:
        with pytest.raises(UsageError, match="no weight"):
            verify(model, [], own_text.windows)
        with pytest.raises(CoordinateError, match="layers are 0 to 5"):
            verify(model, [Coordinate(9, None, 1, 1)], own_text.windows)
        with pytest.raises(UsageError, match="null 0"):
            VerifySettings(null=0)
        with pytest.raises(UsageError, match="minutes 0"):
            VerifySettings(minutes=0)
