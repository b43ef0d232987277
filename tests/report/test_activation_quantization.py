import math
from xml.etree import ElementTree

import pytest

from superweights.errors import UsageError
from superweights.report.activation_quantization import activation_quantization_chart
from superweights.report.saving import save_chart

from .building import measurement, rows_of, score

WEIGHTS = {"kind": "quantize weights", "scheme": "int8-tensor"}
ONLY = {"intervention": WEIGHTS}
BOTH = {"intervention": {"kind": "several", "steps": [WEIGHTS, {"kind": "quantize activations", "bits": 8}]}}
RECORDS = [
    measurement("perplexity", 5.0),
    measurement("perplexity_ratio", 1.001, "weights only", interval=(0.999, 1.003), **ONLY),
    measurement("kl_to_original", 0.0004, "weights only", interval=(0.0003, 0.0005), **ONLY),
    measurement("perplexity", 5.1, "naive W8A8", **BOTH),
    measurement("perplexity_ratio", 1.02, "naive W8A8", interval=(1.01, 1.03), **BOTH),
    measurement("kl_to_original", 0.01, "naive W8A8", interval=(0.009, 0.011), **BOTH),
    measurement("perplexity_ratio", 1.01, "super activation kept", interval=(1.0, 1.02), **BOTH),
    measurement("kl_to_original", 0.004, "super activation kept", interval=(0.003, 0.005), **BOTH),
    measurement("kl_over_naive", 0.4, "super activation kept", interval=(0.35, 0.45), **BOTH),
]


def words_of(chart) -> list[dict[str, str]]:
    """The words beside each panel, by row."""
    panels = chart.to_dict()["hconcat"]
    found = []
    for panel in panels:
        data = [layer["data"]["values"] for layer in panel["layer"] if layer["mark"]["type"] == "text"]
        found.append({row["name"]: row["text"] for rows in data for row in rows if "name" in row})
    return found


def changed(name: str, condition: str, value: float):
    """The records with another value of one measurement."""
    return [
        each.model_copy(update={"value": value, "interval": None})
        if (each.name, each.condition) == (name, condition)
        else each
        for each in RECORDS
    ]


def test_a_row_for_each_condition_with_ratio_and_divergence(tmp_path):
    chart = activation_quantization_chart(RECORDS, title="W8A8", model="tiny")
    rows = rows_of(chart, "name", "place")
    assert {(row["name"], row["value"], row["interval"]) for row in rows} == {
        ("original", "1", "no interval"),
        ("weights only", "1.001", "0.999 to 1.003"),
        ("naive W8A8", "1.02", "1.01 to 1.03"),
        ("super activation kept", "1.01", "1 to 1.02"),
        ("original", "0", "no interval"),
        ("weights only", "0.0004", "0.0003 to 0.0005"),
        ("naive W8A8", "0.01", "0.009 to 0.011"),
        ("super activation kept", "0.004", "0.003 to 0.005"),
    }
    save_chart(chart, tmp_path / "chart.svg")
    texts = [element.text for element in ElementTree.parse(tmp_path / "chart.svg").iter() if element.text]
    assert {"W8A8", "tiny · heldout", "KL to the original, nats per token", "perplexity / original"} <= set(texts)
    names = ["original", "weights only", "naive W8A8", "super activation kept"]
    assert [text for text in texts if text in names] == names


def test_words_are_the_perplexity_and_the_divergence_over_that_of_naive_rounding():
    ratio, divergence = words_of(activation_quantization_chart(RECORDS, title=""))
    assert ratio == {"original": "5", "naive W8A8": "5.1"}
    assert divergence == {"super activation kept": "0.4 × naive (0.35 to 0.45)"}


def test_what_is_not_finite_is_at_the_end_of_the_axis_or_in_words():
    infinite = activation_quantization_chart(changed("kl_to_original", "naive W8A8", math.inf), title="")
    (lost,) = [row for row in rows_of(infinite, "name", "finite") if not row["finite"]]
    assert (lost["name"], lost["value"]) == ("naive W8A8", "inf") and lost["place"] > 0.005
    assert words_of(infinite)[1]["naive W8A8"] == "inf"
    nothing = activation_quantization_chart(changed("kl_to_original", "super activation kept", math.nan), title="")
    assert words_of(nothing)[1] == {"super activation kept": "nan"}


def test_an_exploded_model_leaves_the_others_apart():
    chart = activation_quantization_chart(changed("kl_to_original", "naive W8A8", 7.0), title="")
    places = {row["name"]: row["place"] for row in rows_of(chart, "name", "place") if row["value"] in ("7", "0.004")}
    assert places == {"naive W8A8": 7.0, "super activation kept": 0.004}
    assert "'type': 'log'" in str(chart.to_dict()["hconcat"][1])
    assert words_of(chart)[1]["original"] == "0"  # which has no place on such an axis


def test_without_the_perplexity_of_the_original_its_line_is_named():
    chart = activation_quantization_chart(RECORDS[1:], title="")
    assert "original" not in {row["name"] for row in rows_of(chart, "name", "place")}
    named = [
        layer for panel in chart.to_dict()["hconcat"] for layer in panel["layer"] if layer["mark"]["type"] == "text"
    ]
    assert sum("original" in str(layer["data"]) for layer in named) == 2


def test_weights_that_were_compared_in_the_same_file_are_another_chart():
    others = [measurement("perplexity_ratio", 9.0, "int4-g64, rtn", **ONLY)]
    rows = rows_of(activation_quantization_chart([*others, *RECORDS], title=""), "name", "place")
    assert "int4-g64, rtn" not in {row["name"] for row in rows}


def test_tasks_are_a_third_panel():
    scores = [score("piqa", 0.8), score("wino", 0.6), score("piqa", 0.7, "naive W8A8", **BOTH)]
    chart = activation_quantization_chart([*RECORDS, *scores], title="")
    assert "mean of 1 task" in str(chart.to_dict()["hconcat"][2])
    assert words_of(chart)[2] == {"original": "80.0", "naive W8A8": "70.0"}


@pytest.mark.parametrize(
    "records",
    [
        RECORDS[:1],
        RECORDS[:3],
        [measurement("perplexity_ratio", 1.1, "int4-g64, rtn", **ONLY)],
        [measurement("perplexity_ratio", 1.1, "weights removed", intervention={"kind": "scale", "factor": 0})],
    ],
    ids=["the original", "weights only", "weights by scheme", "another edit"],
)
def test_nothing_to_draw_says_what_to_run(records):
    with pytest.raises(UsageError, match="superweights quantize MODEL --activations"):
        activation_quantization_chart(records, title="")
