import math

import pytest

from superweights.errors import UsageError
from superweights.report.saving import save_chart
from superweights.report.scaling import scaling_chart

from .building import measurement, rows_of, score

RATIOS = {0.0: 181.0, 0.5: 1.2, 0.8: 1.01, 1.5: 0.993, 2.0: 1.002}


def scaled(factor):
    return {"kind": "scale", "factor": factor, "weights": ["2:3968:7003"]}


def ratio(factor, value, **changes):
    fields = {"interval": (value * 0.99, value * 1.01), "intervention": scaled(factor)}
    return measurement("perplexity_ratio", value, f"scale {factor:g}", **(fields | changes))


@pytest.fixture
def ratios():
    return [ratio(factor, value) for factor, value in reversed(RATIOS.items())]


def panels_of(chart):
    return chart.to_dict()["vconcat"]


def test_the_line_runs_by_factor_through_1_at_1(ratios):
    rows = rows_of(scaling_chart(ratios, title="Scaling"), "factor", "place")
    assert [(row["factor"], row["place"]) for row in rows] == sorted({**RATIOS, 1.0: 1.0}.items())


def test_a_wide_range_is_drawn_in_powers_and_once_more_near_1(ratios):
    whole, near = (panel["layer"] for panel in panels_of(scaling_chart(ratios, title="")))
    scales = [layers[0]["encoding"]["y"] for layers in (whole, near)]
    assert "low" in scales[0]["field"]
    lines = [layers[2]["encoding"]["y"]["scale"] for layers in (whole, near)]
    assert lines[0]["type"] == "log"
    assert "type" not in lines[1]
    assert 0.9 < lines[1]["domain"][0] < 0.993 * 0.99
    assert lines[1]["domain"][1] < 1.11


def test_a_narrow_range_needs_one_panel():
    assert len(panels_of(scaling_chart([ratio(0.0, 1.003), ratio(2.0, 0.99)], title=""))) == 1


@pytest.mark.parametrize(
    ("values", "name"), [({0.5: 2.0, 1.5: 0.9931}, "best at 1.5: 0.9931"), ({0.0: 3.0}, "no factor is better")]
)
def test_the_best_factor_is_named(values, name):
    *_, ring, text = panels_of(scaling_chart([ratio(*each) for each in values.items()], title=""))[-1]["layer"]
    assert [row["best"] for row in ring["data"]["values"]] == [name]
    assert text["encoding"]["text"]["field"] == "best"


def test_what_is_not_finite_breaks_the_line_and_is_named(ratios):
    strange = [ratio(0.1, math.inf, interval=(30.0, math.inf)), ratio(0.9, math.nan, interval=None)]
    chart = scaling_chart([*ratios, *strange], title="")
    rows = {row["factor"]: row for row in rows_of(chart, "factor")}
    assert [(rows[each]["value"], rows[each]["place"]) for each in (0.1, 0.9)] == [("inf", None), ("nan", None)]
    lost = panels_of(chart)[0]["layer"][4]["data"]["values"]
    assert [row["value"] for row in lost] == ["inf", "nan"]


def test_each_data_set_has_its_panels(ratios):
    other = [each.model_copy(update={"dataset": "c4"}) for each in ratios]
    assert len(panels_of(scaling_chart([*ratios, *other], title=""))) == 4


def test_accuracy_has_a_panel_and_its_best_is_the_highest(ratios):
    scores = [score("piqa", 0.7), score("piqa", 0.5, "scale 0", intervention=scaled(0.0))]
    scores += [score("piqa", 0.8, "scale 2", intervention=scaled(2.0))]
    panel = panels_of(scaling_chart([*ratios, *scores], title=""))[-1]
    assert [row["best"] for row in panel["layer"][-1]["data"]["values"]] == ["best at 2: 80"]


def test_the_subtitle_has_the_gain_on_other_windows(ratios):
    gain = measurement("best_factor_gain", 0.9987, "scale 1.5", interval=(0.991, 1.006))
    subtitle = scaling_chart([*ratios, gain], title="", model="tiny").to_dict()["title"]["subtitle"]
    assert subtitle == "tiny · best factor, on windows that did not choose it: 0.9987 (0.991 to 1.006), no real gain"


def test_it_is_drawn(ratios, tmp_path):
    save_chart(scaling_chart(ratios, title="A title"), tmp_path / "chart.svg")
    assert "best at 1.5: 0.993" in (tmp_path / "chart.svg").read_text()


@pytest.mark.parametrize(
    "records",
    [[], [ratio(0.5, math.inf)], [ratio(0.5, 2.0, intervention={"kind": "prune largest", "amount": 1, "keep": []})]],
)
def test_nothing_to_draw(records):
    with pytest.raises(UsageError, match="superweights scale"):
        scaling_chart(records, title="Scaling")
