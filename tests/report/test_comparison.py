import math

import pytest

from superweights.errors import UsageError
from superweights.report.comparison import comparison_chart
from superweights.report.saving import save_chart

from .building import measurement, rows_of

BASE, TUNED = "models/base", "models/tuned"


@pytest.fixture
def records():
    values = {BASE: (-0.27, 1313.0, 1430.0), TUNED: (-0.26, -980.5, 1.3)}
    names = ("weight", "super_activation", "perplexity_ratio_removed")
    return [
        measurement(name, value, model, subject="2:3:4")
        for model, own in values.items()
        for name, value in zip(names, own, strict=True)
    ]


def panels_of(chart):
    return chart.to_dict()["hconcat"]


def test_a_panel_for_each_number_with_both_models(records):
    chart = comparison_chart(records, title="Comparison")
    assert len(panels_of(chart)) == 3
    assert [row["text"] for row in rows_of(chart, "text")] == ["-0.27 → -0.26", "1,313 → -980.5", "1,430 → 1.3"]
    assert [row["model"] for row in rows_of(chart, "model")] == [BASE, TUNED] * 3
    assert chart.to_dict()["title"]["subtitle"] == "1 weight"


def test_only_what_was_measured_has_a_panel(records):
    weights = [each for each in records if each.name == "weight"]
    assert len(panels_of(comparison_chart(weights, title=""))) == 1


def test_what_one_model_lacks_and_what_is_not_finite_is_told(records):
    more = [
        measurement("weight", 2.0, TUNED, subject="2:5:4"),
        measurement("perplexity_ratio_removed", math.inf, BASE, subject="all together"),
        measurement("perplexity_ratio_removed", math.nan, TUNED, subject="all together"),
    ]
    chart = comparison_chart([*records, *more], title="")
    texts = {(row["name"], row["text"]) for row in rows_of(chart, "text")}
    assert {("2:5:4", "none → 2"), ("all together", "inf → nan")} <= texts
    assert chart.to_dict()["title"]["subtitle"] == "2 weights"


def test_long_names_of_models_keep_their_ends(tmp_path):
    models = ["/a/path/that/is/too/long/for/a/legend/step-" + step for step in ("1000", "2000")]
    records = [measurement("weight", number, model, subject="2:3:4") for number, model in enumerate(models)]
    save_chart(comparison_chart(records, title="A title"), tmp_path / "chart.svg")
    drawn = (tmp_path / "chart.svg").read_text()
    assert all(text in drawn for text in ("A title", "2:3:4", "legend/step-1000", "legend/step-2000"))


def test_nothing_to_draw():
    with pytest.raises(UsageError, match="superweights compare"):
        comparison_chart([measurement("weight_change", 1.0, subject="2:3:4")], title="Comparison")
