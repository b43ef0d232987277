"""Keeping is tried on a model that one weight holds up, where rounding and clipping do what the paper says they do."""

import math

import pytest
import torch

import superweights as sw
from superweights.coordinates import Coordinate
from superweights.errors import UnknownNameError, UsageError
from superweights.experiments.weight_quantization import (
    METHODS,
    Comparison,
    compare_weight_quantization,
    conditions_of,
    rounding_error,
    tuned_clip,
)
from superweights.quantization.clipping import Clip
from superweights.quantization.scheme import Scheme
from superweights.results.records import MeasurementRecord, NoteRecord

from .conftest import OwnText


def measured(records, name):
    return {
        (each.condition, each.subject): each.value
        for each in records
        if isinstance(each, MeasurementRecord) and each.name == name
    }


@pytest.fixture(scope="module")
def compared(own_text: OwnText):
    comparison = Comparison(
        (Scheme.parse("int8-tensor"), Scheme.parse("int8-row")), tuple(METHODS), clip=Clip("z", 4.0)
    )
    with sw.load(own_text.directory) as model:
        return list(compare_weight_quantization(model, own_text.windows, [own_text.weight], comparison))


def test_clipping_loses_the_weight_and_keeping_saves_it(compared) -> None:
    ratio = measured(compared, "perplexity_ratio")
    assert ratio["int8-tensor, clip", ""] > 10
    assert ratio["int8-tensor, clip+keep", ""] < 2
    assert ratio["int8-tensor, paper", ""] < 2


def test_a_weight_that_sets_the_scale_of_all_others_is_better_held_out(compared) -> None:
    """The planted weight is hundreds of times the others, so with one scale for all they are rounded to zero."""
    kl = measured(compared, "kl_to_original")
    assert kl["int8-tensor, keep", ""] < 0.5 * kl["int8-tensor, rtn", ""]


def test_what_plain_rounding_does_around_the_weight(compared, own_text: OwnText) -> None:
    weight = str(own_text.weight)
    assert measured(compared, "weight_error")["int8-tensor, rtn", weight] == 0  # the largest of a symmetric grid
    assert measured(compared, "neighbour_error_ratio")["int8-tensor, rtn", weight] < 0.5


def test_bits_count_scales_and_kept_weights(compared, own_text: OwnText) -> None:
    bits = measured(compared, "bits_per_weight")
    with sw.load(own_text.directory) as model:
        shapes = [(each.rows, each.cols) for each in model.architecture.down_projections]
    assert 8 < bits["int8-tensor, rtn", ""] < 8.1
    assert bits["int8-tensor, rtn", ""] < bits["int8-tensor, keep", ""] < bits["int8-tensor, largest", ""]
    assert bits["int8-row, rtn", ""] == pytest.approx(8 + 32 / 64, abs=0.3), shapes


def test_a_no_op_is_said(own_text: OwnText) -> None:
    """By rows, with the weight in the range, it is on the grid already: restoring it changes no bit."""
    comparison = Comparison((Scheme.parse("int8-row"),), ("clip", "paper"), clip=Clip("z", 1000.0))
    with sw.load(own_text.directory) as model:
        found = list(compare_weight_quantization(model, own_text.windows, [own_text.weight], comparison))
    notes = [each.text for each in found if isinstance(each, NoteRecord)]
    assert notes == ["int8-row, paper is a no-op: every window is predicted as with int8-row, clip."]


def test_without_super_weights_nothing_is_kept() -> None:
    made = conditions_of(Comparison((Scheme.parse("int4-row"),)), [])
    assert [each.name for each in made] == ["original", "int4-row, rtn", "int4-row, clip", "int4-row, largest"]


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'keep'"):
        conditions_of(Comparison((Scheme.parse("int4-row"),), ("kep",)), [])


def test_the_best_clip_is_that_with_the_least_measured(own_text: OwnText) -> None:
    scheme = Scheme.parse("int3-tensor")
    with sw.load(own_text.directory) as model:
        clip, tried = tuned_clip(model, scheme, [own_text.weight])
        by_text, on_text = tuned_clip(model, scheme, [own_text.weight], windows=own_text.windows, grid=(2.0, 5.0))
    errors = {each.condition: each.value for each in tried}
    assert errors[f"int3-tensor, clip {clip}"] == min(errors.values()) < max(errors.values())
    assert {each.name for each in on_text} == {"kl_to_original"}
    assert by_text in (Clip("z", 2.0), Clip("z", 5.0))


def test_the_error_of_neighbours_is_that_of_a_plain_loop(own_text: OwnText) -> None:
    scheme = Scheme.parse("int4-g16")
    with sw.load(own_text.directory) as model:
        found = rounding_error(model.checkpoint, own_text.weight, scheme)
        weights = model.checkpoint.view(f"model.layers.{own_text.weight.layer}.mlp.down_proj.weight").float()
    start = own_text.weight.col // 16 * 16
    group = weights[own_text.weight.row, start : start + 16].tolist()
    place = own_text.weight.col - start
    others = [value for number, value in enumerate(group) if number != place]

    def error(largest: float) -> float:
        step = largest / 7
        return math.sqrt(sum((round(value / step) * step - value) ** 2 for value in others))

    assert found.neighbours == pytest.approx(error(max(map(abs, others))) / error(abs(group[place])), rel=1e-3)
    assert (found.weight, found.shared) == (0, 16)


def test_a_model_in_memory_has_no_files_to_count_bits_of(own_text: OwnText) -> None:
    from superweights.testing import tiny_model

    with (
        sw.load(tiny_model("llama")) as model,
        pytest.raises(UsageError, match="Load it from its checkpoint"),
    ):
        tuned_clip(model, Scheme.parse("int4-row"), [Coordinate(0, None, 0, 0)])


def test_amplifying_is_part_of_the_condition(own_text: OwnText) -> None:
    made = conditions_of(Comparison((Scheme.parse("int4-row"),), ("rtn", "keep"), amplify=1.5), [own_text.weight])
    assert [each.describe().get("amplify") for each in made] == [None, None, 1.5]
    with sw.load(own_text.directory) as model, sw.applied(model, made[2]), torch.no_grad():
        projection = model.architecture.locate(own_text.weight)
        edited = model.model.get_parameter(projection.name)[projection.index(own_text.weight)].item()
        stored = model.checkpoint.read_scalar(projection.name, projection.index(own_text.weight)).value
    assert edited == pytest.approx(1.5 * stored, rel=1e-6)
