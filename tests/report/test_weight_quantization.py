import math
from xml.etree import ElementTree

import pytest

from superweights.errors import UsageError
from superweights.report.saving import save_chart
from superweights.report.weight_quantization import weight_quantization_chart

from .building import measurement, rows_of, score


def rounded(scheme: str, method: str, kl: float, ratio: float):
    how = {"intervention": {"kind": "quantize weights", "scheme": scheme}}
    condition = f"{scheme}, {method}"
    return [
        measurement("kl_to_original", kl, condition, interval=(0.9 * kl, 1.1 * kl), **how),
        measurement("perplexity_ratio", ratio, condition, interval=(0.99 * ratio, 1.01 * ratio), **how),
        measurement("bits_per_weight", 4.25, condition, **how),
    ]


SERIES = [
    each
    for size, kl in ((8, 0.01), (64, 0.05), (512, 0.3))
    for method, times in (("rtn", 1.0), ("keep", 0.5))
    for each in rounded(f"int4-block{size}x{size}-minmax", method, times * kl, 1 + times * kl)
]
MIXED = [*rounded("int4-g32", "rtn", 0.02, 1.02), *rounded("int8-row", "rtn", 0.001, 1.001)]


def test_block_sizes_are_an_axis_and_methods_are_lines() -> None:
    rows = rows_of(weight_quantization_chart(SERIES, title="Figure 7"), "shared", "method", "place")
    assert [(row["shared"], row["method"]) for row in rows[:3]] == [(64, "rtn"), (64, "keep"), (4096, "rtn")]
    assert len([row for row in rows if row["value"] == "0.3"]) == 1


def test_different_schemes_are_rows_with_their_bits(tmp_path) -> None:
    chart = weight_quantization_chart(MIXED, title="Schemes", model="tiny")
    names = {row["name"] for row in rows_of(chart, "method", "place")}
    assert names == {"int4-g32, 4.25 bits", "int8-row, 4.25 bits"}
    save_chart(chart, tmp_path / "chart.svg")
    texts = {element.text for element in ElementTree.parse(tmp_path / "chart.svg").iter() if element.text}
    assert {"Schemes", "tiny · heldout", "int8-row, 4.25 bits", "perplexity / original"} <= texts


@pytest.mark.parametrize("records", [SERIES, MIXED])
def test_a_destroyed_model_is_at_the_end_of_the_axis(records) -> None:
    scheme = "int4-block1024x1024-minmax" if records is SERIES else "int2-row"
    chart = weight_quantization_chart([*records, *rounded(scheme, "rtn", math.inf, math.inf)], title="")
    lost = [row for row in rows_of(chart, "method", "finite") if not row["finite"]]
    assert {row["value"] for row in lost} == {"inf"} and all(row["place"] is not None for row in lost)


def test_tasks_are_a_third_panel() -> None:
    how = {"intervention": {"kind": "quantize weights", "scheme": "int4-g32"}}
    scores = [score("piqa", 0.8, "int4-g32, rtn", **how), score("wino", 0.6, "int4-g32, rtn", **how)]
    chart = weight_quantization_chart([*MIXED, *scores], title="")
    assert len(chart.to_dict()["hconcat"]) == 3
    assert [row for row in rows_of(chart, "method", "place") if row["value"] == "70"]


def test_nothing_to_draw_says_what_to_run() -> None:
    with pytest.raises(UsageError, match="--compare"):
        weight_quantization_chart([measurement("perplexity", 5.0)], title="")
