import math

import pytest

from superweights.errors import UsageError
from superweights.report.peaks import peaks_chart

from .conftest import LAYERS, activation_peak, candidate


def data_of(chart):
    """Rows of each layer of each panel."""
    return [
        [layer["data"]["values"] for layer in panel["layer"]]
        for panel in chart.to_dict()["vconcat"]
        if "layer" in panel
    ]


def test_two_panels_with_the_largest_peak_of_each_layer(peaks):
    panels = data_of(peaks_chart(peaks, title="Peaks", model="tiny"))
    assert len(panels) == 2
    for _, line, *_ in panels:
        assert [row["layer"] for row in line] == list(range(LAYERS))
        assert [row["signed"] for row in line] == [2, -200, 2, -2]
        assert [row["size"] for row in line] == [2, 200, 2, 2]
        assert {row["prompt"] for row in line} == {1}
        assert line[0]["token"] == r"␣мир\n at 1"


def test_edited_passes_are_left_out(peaks):
    edited = activation_peak(0, "input", 1e6, round=1, edited=True)
    assert data_of(peaks_chart([*peaks, edited], title="")) == data_of(peaks_chart(peaks, title=""))


def test_values_without_a_place_on_a_log_axis_are_left_out(peaks):
    strange = [activation_peak(layer, "input", value) for layer, value in enumerate((math.inf, math.nan, 0.0))]
    assert data_of(peaks_chart([*peaks, *strange], title="")) == data_of(peaks_chart(peaks, title=""))


def test_candidates_are_marked_at_their_own_values(peaks):
    chart = peaks_chart([*peaks, candidate()], title="Peaks", model="tiny")
    (_, _, _, inputs), (_, _, _, outputs) = data_of(chart)
    assert [(row["coordinate"], row["size"], row["signed"]) for row in inputs] == [("1:3:7", 100, 100)]
    assert [(row["coordinate"], row["size"], row["signed"]) for row in outputs] == [("1:3:7", 200, -200)]
    assert [row["text"] for row in chart.to_dict()["vconcat"][0]["data"]["values"]] == ["1:3:7"]
    assert chart.to_dict()["title"]["subtitle"] == "tiny · 2 prompts · 1 candidate"


def test_candidates_of_one_layer_share_a_label(peaks):
    found = [candidate("1:3:7"), candidate("1:4:7"), candidate("2:4:7")]
    strip = peaks_chart([*peaks, *found], title="").to_dict()["vconcat"][0]["data"]["values"]
    assert [row["text"] for row in strip] == ["1:3:7 +1 more", "2:4:7"]
    assert strip[0]["all"] == "1:3:7, 1:4:7"


def test_without_candidates_there_is_no_label_and_the_subtitle_says_so(peaks):
    chart = peaks_chart(peaks, title="Peaks").to_dict()
    assert len(chart["vconcat"]) == 2
    assert chart["title"]["subtitle"] == "2 prompts · 0 candidates"


def test_nothing_to_draw():
    with pytest.raises(UsageError, match="the records hold none"):
        peaks_chart([candidate()], title="Peaks")
