import math
from xml.etree import ElementTree

import pytest

from superweights.errors import UsageError
from superweights.report.ablation import ablation_chart
from superweights.report.saving import save_chart

from .building import measurement, rows_of, score

PRUNED = "prune super weights"


@pytest.fixture
def perplexities():
    return [
        measurement("perplexity", 5.67, interval=(5.5, 5.9)),
        measurement("perplexity", 1211.1, PRUNED, interval=(1100.0, 1300.0)),
    ]


def test_a_row_for_each_condition_with_value_and_interval(perplexities):
    chart = ablation_chart(perplexities, title="Ablation", model="tiny")
    rows = rows_of(chart, "name", "text", "place")
    assert [(row["name"], row["text"]) for row in rows] == [("original", "5.67"), (PRUNED, "1,211")]
    assert [(row["low"], row["place"], row["high"]) for row in rows] == [(5.5, 5.67, 5.9), (1100, 1211.1, 1300)]
    assert chart.to_dict()["title"]["subtitle"] == "tiny · heldout"


def test_what_is_not_finite_is_not_dropped(perplexities):
    strange = [
        measurement("perplexity", math.inf, "a", interval=(30.0, math.inf)),
        measurement("perplexity", math.nan, "b", interval=(math.nan, math.nan)),
    ]
    rows = {row["name"]: row for row in rows_of(ablation_chart([*perplexities, *strange], title=""), "text", "place")}
    assert (rows["a"]["text"], rows["a"]["low"]) == ("inf", 30)
    assert rows["a"]["place"] == rows["a"]["high"] == pytest.approx(1300 * 1.3)
    assert (rows["b"]["text"], rows["b"]["place"], rows["b"]["low"]) == ("nan", None, None)


def test_several_data_sets_have_a_line_each(perplexities, tmp_path):
    other = [each.model_copy(update={"dataset": "c4", "value": 9.0}) for each in perplexities]
    save_chart(ablation_chart([*perplexities, *other], title="A title"), tmp_path / "chart.svg")
    texts = {element.text for element in ElementTree.parse(tmp_path / "chart.svg").iter() if element.text}
    assert {"A title", "heldout", "c4", "original", PRUNED, "1,211", "perplexity"} <= texts


def test_accuracy_is_the_mean_over_the_tasks_that_all_conditions_have(perplexities):
    scores = [score("piqa", 0.8), score("wino", 0.6), score("piqa", 0.5, PRUNED), score("wino", 0.5, PRUNED)]
    chart = ablation_chart([*perplexities, *scores, score("sciq", 0.9)], title="")
    assert len(chart.to_dict()["hconcat"]) == 2
    means = [row for row in rows_of(chart, "what") if row["low"] is not None and row["count"] == 2]
    assert [(row["name"], row["text"]) for row in means] == [("original", "70.0"), (PRUNED, "50.0")]
    margin = 100 * 1.96 * math.hypot(0.03, 0.03) / 2
    assert means[0]["high"] == pytest.approx(70 + margin)
    tasks = {(row["name"], row["task"]): row["place"] for row in rows_of(chart, "task")}
    assert tasks["original", "sciq acc"] == pytest.approx(90)


def test_scores_alone_are_drawn_and_other_proportions_are_none():
    agreement = measurement("top1_agreement", 0.4, "a", unit="proportion")
    chart = ablation_chart([score("piqa", 0.0), score("piqa", 0.5, PRUNED), agreement], title="").to_dict()
    (panel,) = chart["hconcat"]
    assert "mean of 1 task" in str(panel)
    assert "top1" not in str(panel)


def test_nothing_to_draw():
    with pytest.raises(UsageError, match="superweights ablate"):
        ablation_chart([measurement("top1_agreement", 0.4, unit="proportion")], title="Ablation")
