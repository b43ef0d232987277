import pytest
import torch

import superweights as sw
from superweights.experiments import sinks as module
from superweights.experiments.sinks import sinks
from superweights.interventions.conditions import with_and_without
from superweights.interventions.rows import applied
from superweights.measurements.attention_sinks import attention_to_first
from superweights.measurements.intervals import mean_interval
from superweights.measurements.windows import Windows
from superweights.testing import tiny_model

NAMES = ["original", "weights removed", "removed, super activation restored"]


@pytest.mark.parametrize(("residency", "at_once"), [("resident", 1), ("streamed", 1 << 26)])
def test_every_layer_under_every_condition(residency, at_once, own_text, monkeypatch):
    monkeypatch.setattr(module, "_ATTENTION_AT_ONCE", at_once)
    with sw.load(own_text.directory, residency=residency) as model:
        records = list(sinks(model, [own_text.weight], own_text.windows))
        expected = []
        for condition in with_and_without([own_text.weight]):
            with applied(model, condition):
                expected.append(attention_to_first(model, own_text.windows.ids))
    subjects = ["", *(f"layer {layer}" for layer in range(6))]
    assert [(each.condition, each.subject) for each in records] == [(name, each) for name in NAMES for each in subjects]
    for record in records:
        found = expected[NAMES.index(record.condition)]
        values = found[int(record.subject[6:])] if record.subject else found.mean(dim=0)
        interval = mean_interval(values)
        assert record.value == pytest.approx(interval.value, rel=1e-4)
        assert record.interval == pytest.approx((interval.low, interval.high), rel=1e-4)
        assert (record.name, record.unit, record.count) == ("attention_to_first", "proportion", 24)
        assert (record.dataset, record.dataset_digest) == ("own text", "sha256:0")


def test_layers_before_the_edit_stay_and_later_ones_change(own_text):
    with sw.load(own_text.directory) as model:
        records = list(sinks(model, [own_text.weight], own_text.windows))
    by_layer = {name: [each.value for each in records if each.condition == name and each.subject] for name in NAMES}
    original, removed, _ = by_layer.values()
    assert removed[:3] == original[:3]
    assert all(abs(mine - before) > 1e-4 for mine, before in zip(removed[3:], original[3:], strict=True))


def test_without_weights_the_original_alone(own_text):
    with sw.load(own_text.directory) as model:
        assert {each.condition for each in sinks(model, [], own_text.windows)} == {"original"}


def test_layers_without_attention_are_left_out():
    windows = Windows(torch.arange(24).view(2, 12), "ids", "sha256:0", 12, False)
    with sw.load(tiny_model("recurrent_gemma")) as model:
        records = list(sinks(model, [], windows))
    assert [each.subject for each in records] == ["", "layer 2", "layer 5"]
    mean, *layers = [each.value for each in records]
    assert mean == pytest.approx(sum(layers) / 2)


def test_a_single_window_has_no_interval(own_text):
    one = Windows(own_text.windows.ids[:1], "one", "sha256:1", own_text.windows.length, False)
    with sw.load(own_text.directory) as model:
        assert {(each.count, each.interval) for each in sinks(model, [], one)} == {(1, None)}
