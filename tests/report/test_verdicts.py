import math

import pytest

from superweights.errors import UsageError
from superweights.report.appearance import ACCENT
from superweights.report.saving import save_chart
from superweights.report.verdicts import verdicts_chart

from .building import measurement, rows_of, verdict


def verdict_rows(*verdicts):
    return rows_of(verdicts_chart(verdicts, title="Verdicts"), "name", "label")


def test_a_row_for_each_set_of_weights():
    rows = verdict_rows(
        verdict("2:3:4"),
        verdict("2:3:4", "2:5:4", kind="all", label="critical jointly"),
        verdict("2:5:4", kind="minimal set", label="critical jointly", ratio=90.0, null_maximum=None),
    )
    assert [row["name"] for row in rows] == ["2:3:4", "all 2 candidates", "smallest critical set: 2:5:4"]
    assert [row["text"] for row in rows] == ["100 · critical alone", "100 · critical jointly", "90 · critical jointly"]
    assert [row["null"] for row in rows] == [1.1, 1.1, None]
    assert rows[0]["random"] == "1.1 in 20 draws"


def test_one_and_the_bar_of_critical_are_always_on_the_axis():
    chart = verdicts_chart([verdict("2:3:4", label="inert", ratio=1.001, interval=(1.0, 1.002))], title="").to_dict()
    low, high = chart["layer"][0]["encoding"]["x"]["scale"]["domain"]
    assert low < 1
    assert high > 2
    assert [layer["data"]["values"] for layer in chart["layer"][:2]] == [[{"place": 1}], [{"place": 2}]]


def test_what_is_not_finite_is_not_dropped():
    rows = verdict_rows(
        verdict("2:3:4", ratio=math.inf, interval=(50.0, math.inf), null_maximum=math.inf),
        verdict("2:5:4", ratio=math.nan, interval=(math.nan, math.nan), null_maximum=math.nan, label="undecided"),
    )
    assert [row["text"] for row in rows] == ["inf · critical alone", "nan · undecided"]
    assert rows[0]["place"] == rows[0]["high"] == rows[0]["null"] == pytest.approx(50 * 1.3)
    assert [rows[1][field] for field in ("place", "low", "null")] == [None] * 3


def test_several_data_sets_are_told_apart():
    rows = verdict_rows(verdict("2:3:4"), verdict("2:3:4", dataset="c4"))
    assert [row["name"] for row in rows] == ["2:3:4, heldout", "2:3:4, c4"]


def test_critical_alone_has_the_accent(tmp_path):
    chart = verdicts_chart([verdict("2:3:4")], title="A title", model="tiny")
    assert chart.to_dict()["title"]["subtitle"] == "tiny · heldout"
    save_chart(chart, tmp_path / "chart.svg")
    drawn = (tmp_path / "chart.svg").read_text()
    assert all(text in drawn for text in ("A title", "100 · critical alone", ACCENT))


def test_nothing_to_draw():
    with pytest.raises(UsageError, match="superweights verify"):
        verdicts_chart([measurement("perplexity_ratio", 2.0)], title="Verdicts")
