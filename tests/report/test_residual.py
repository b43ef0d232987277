import math

import pytest

from superweights.errors import UsageError
from superweights.report.appearance import INK
from superweights.report.residual import residual_chart

from .conftest import LAYERS, candidate, residual_peak


def layers_of(chart):
    return chart.to_dict()["layer"]


def test_one_line_per_edit_with_the_unedited_model_first(residuals):
    _, _, lines, *_ = layers_of(residual_chart(residuals, title="Residual"))
    assert lines["encoding"]["color"]["scale"]["domain"] == ["", "scale=0 on 1:3:7"]
    assert lines["encoding"]["color"]["scale"]["range"][0] == INK
    original = [row for row in lines["data"]["values"] if row["name"] == "original"]
    assert [row["layer"] for row in original] == list(range(-1, LAYERS))
    assert {(row["size"], row["signed"]) for row in original} == {(500, -500)}


def test_the_largest_prompt_is_drawn(residuals):
    _, _, lines, *_ = layers_of(residual_chart([*residuals, residual_peak(2, 900, prompt=5)], title=""))
    (row,) = [row for row in lines["data"]["values"] if row["layer"] == 2 and not row["edit"]]
    assert (row["size"], row["prompt"]) == (900, 5)


def test_lines_are_named_at_their_ends(residuals):
    *_, labels = layers_of(residual_chart(residuals, title=""))
    names = [each["data"]["values"][0]["name"] for each in labels["layer"]]
    assert names == ["original", "scale=0 on 1:3:7", "median |residual|"]


def test_values_without_a_place_on_a_log_axis_are_left_out(residuals):
    strange = [residual_peak(1, math.inf), residual_peak(1, math.nan), residual_peak(9, 1, median=0.0)]
    _, medians, lines, *_ = layers_of(residual_chart([*residuals, *strange], title=""))
    assert max(row["size"] for row in lines["data"]["values"]) == 500
    assert [row["layer"] for row in medians["data"]["values"]] == list(range(-1, LAYERS))


def test_candidates_mark_their_layer(residuals):
    rules, *_ = layers_of(residual_chart([*residuals, candidate("1:3:7"), candidate("1:4:7")], title=""))
    assert rules["data"]["values"] == [{"layer": 1}]


def test_nothing_to_draw():
    with pytest.raises(UsageError, match="the records hold no peak"):
        residual_chart([], title="Residual")
