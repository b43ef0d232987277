import math
from xml.etree import ElementTree

import pytest

from superweights.errors import UsageError
from superweights.report.saving import save_chart
from superweights.report.weight_quantization import weight_quantization_chart

from .building import measurement, rows_of, score


def rounded(scheme: str, method: str, kl: float, ratio: float, *, bits: float = 4.25, kind: str = "quantize weights"):
    how = {"intervention": {"kind": kind, "scheme": scheme}}
    condition = f"{scheme}, {method}"
    return [
        measurement("kl_to_original", kl, condition, interval=(0.9 * kl, 1.1 * kl), **how),
        measurement("perplexity_ratio", ratio, condition, interval=(0.99 * ratio, 1.01 * ratio), **how),
        measurement("bits_per_weight", bits, condition, dataset=None, **how),
    ]


SERIES = [
    each
    for size, kl in ((512, 0.3), (8, 0.01), (64, 0.05))
    for method, times in (("rtn", 1.0), ("keep", 0.5))
    for each in rounded(f"int4-block{size}x{size}-minmax", method, times * kl, 1 + times * kl, bits=4 + 32 / size**2)
]
MIXED = [
    *rounded("int4-g64", "rtn", 0.02, 1.02),
    *rounded("int4-g64", "keep", 0.01, 1.01),
    *rounded("int8-row", "rtn", 0.001, 1.001, bits=8.01),
]


def texts_of(chart, path) -> list[str]:
    save_chart(chart, path / "chart.svg")
    return [element.text for element in ElementTree.parse(path / "chart.svg").iter() if element.text]


def scale_types(chart, channel: str) -> list[str]:
    """The type of the scale of each panel, linear where none is named."""
    panels = chart.to_dict()["hconcat"]
    axes = [[layer["encoding"].get(channel, {}) for layer in panel["layer"]] for panel in panels]
    return [next(each["scale"].get("type", "linear") for each in panel if "scale" in each) for panel in axes]


@pytest.fixture(scope="module")
def series():
    return weight_quantization_chart(SERIES, title="Figure 7", model="tiny")


def test_block_sizes_are_an_axis_and_methods_are_lines(series, tmp_path):
    rows = [row for row in rows_of(series, "shared", "method", "place") if row["finite"]]
    by_method = {method: [row for row in rows if row["method"] == method] for method in ("rtn", "keep")}
    assert {row["shared"] for row in by_method["rtn"]} == {64, 4096, 262144}
    assert {(row["shared"], row["value"]) for row in by_method["keep"]} >= {(64, "0.005"), (64, "1.005")}
    texts = texts_of(series, tmp_path)
    assert {"Figure 7", "tiny · heldout · int4 blocks, minmax", "8²", "64²", "512²", "original", "4.5"} <= set(texts)


def test_coinciding_points_lie_in_each_other_and_their_intervals_side_by_side(series):
    panel = series.to_dict()["hconcat"][0]
    rows = next(layer["data"]["values"] for layer in panel["layer"] if "size" in layer["encoding"])
    assert [row["method"] for row in rows] == ["rtn"] * 3 + ["keep"] * 3  # drawn in this order
    assert rows[0]["size"] > rows[-1]["size"] > 0
    asides = {row["method"]: row["aside"] for row in rows if row["shared"] == 64}
    assert asides["rtn"] < 64 < asides["keep"] and asides["rtn"] * asides["keep"] == pytest.approx(64**2)


def test_different_schemes_are_rows_with_their_bits_most_first(tmp_path):
    chart = weight_quantization_chart(MIXED, title="Schemes", model="tiny")
    texts = texts_of(chart, tmp_path)
    assert {"Schemes", "tiny · heldout", "perplexity / original", "original"} <= set(texts)
    labels = [text for text in texts if text.endswith(" bits")]
    assert labels == ["int8-row, 8.01 bits", "int4-g64, 4.25 bits"]


def test_methods_of_a_scheme_with_fewer_are_in_the_middle_of_its_row():
    rows = rows_of(weight_quantization_chart(MIXED, title=""), "name", "method", "slot")
    slots = {(row["name"].partition(",")[0], row["method"]): row["slot"] for row in rows}
    assert slots == {("int4-g64", "rtn"): 0, ("int4-g64", "keep"): 2, ("int8-row", "rtn"): 1}


def test_bits_that_differ_by_method_are_a_range():
    records = [*MIXED, *rounded("int8-row", "budget 9 bits", 0.001, 1.001, bits=8.9)]
    names = {row["name"] for row in rows_of(weight_quantization_chart(records, title=""), "name", "slot")}
    assert names == {"int4-g64, 4.25 bits", "int8-row, 8.01 to 8.9 bits"}


@pytest.mark.parametrize(
    "other",
    [
        rounded("int8-block1024x1024-minmax", "rtn", 0.1, 1.1),
        rounded("int4-block16x4-minmax", "rtn", 0.1, 1.1),
        rounded("torchao", "peer", 0.1, 1.1, kind="load weights"),
    ],
    ids=["bits", "as many weights", "peer"],
)
def test_what_differs_in_more_than_size_makes_rows(other):
    rows = rows_of(weight_quantization_chart([*SERIES, *other], title=""), "place", "method")
    assert rows and all("slot" in row and "shared" not in row for row in rows)


def test_methods_differ_in_colour_and_in_shape():
    methods = ("rtn", "clip", "clip+keep", "keep", "paper", "largest", "peer")
    records = [each for method in methods for each in rounded("int4-g64", method, 0.1, 1.1)]
    layers = weight_quantization_chart(records, title="").to_dict()["hconcat"][0]["layer"]
    encoding = next(each["encoding"] for each in layers if "shape" in each["encoding"])
    colors, shapes = (encoding[channel]["scale"]["range"] for channel in ("color", "shape"))
    assert encoding["color"]["scale"]["domain"] == encoding["shape"]["scale"]["domain"] == list(methods)
    assert len(set(colors[:6])) == len(set(shapes[:6])) == 6
    assert len(set(zip(colors, shapes, strict=True))) == 7


@pytest.mark.parametrize(("records", "channel"), [(SERIES, "y"), (MIXED, "x")], ids=["lines", "rows"])
def test_an_axis_is_in_powers_where_values_are_far_apart(records, channel):
    assert scale_types(weight_quantization_chart(records, title=""), channel) == ["log", "linear"]
    exact = [each.model_copy(update={"value": 0.0}) if each.value == records[0].value else each for each in records]
    assert scale_types(weight_quantization_chart(exact, title=""), channel) == ["linear", "linear"]


@pytest.mark.parametrize("records", [SERIES, MIXED], ids=["lines", "rows"])
def test_a_destroyed_model_is_at_the_end_of_the_axis_and_named(records, tmp_path):
    scheme = "int4-block1024x1024-minmax" if records is SERIES else "int2-row"
    lost = [*rounded(scheme, "rtn", math.inf, math.inf), *rounded(scheme, "keep", math.nan, math.nan)]
    chart = weight_quantization_chart([*records, *lost], title="")
    everything = rows_of(chart, "method", "finite")
    rows = [row for row in everything if not row["finite"]]
    heads = {row["place"] for row in rows if row["method"] == "rtn"} - {None}
    finite = [row["place"] for row in everything if row["finite"]]
    assert len(heads) == 2 and max(heads) > max(finite)  # two panels
    assert any(row["place"] is None for row in rows if row["method"] == "rtn") == (records is SERIES)  # breaks the line
    assert {row["place"] for row in rows if row["method"] == "keep"} == {None}
    assert ({"rtn inf", "keep nan"} if records is SERIES else {"inf", "nan"}) <= set(texts_of(chart, tmp_path))


def test_tasks_are_a_third_panel_with_the_original_as_a_line():
    how = {"intervention": {"kind": "quantize weights", "scheme": "int4-g64"}}
    scores = [score("piqa", 0.8, "int4-g64, rtn", **how), score("wino", 0.6, "int4-g64, rtn", **how)]
    original = [score("piqa", 0.9), score("wino", 0.7), score("sciq", 0.1)]
    chart = weight_quantization_chart([*MIXED, *original, *scores], title="")
    panel = chart.to_dict()["hconcat"][2]
    assert "mean of 2 tasks" in str(panel)
    (row,) = [row for row in rows_of(chart, "method", "place") if row["value"] == "70"]
    margin = 100 * 1.96 * math.hypot(0.03, 0.03) / 2
    assert (row["low"], row["high"]) == pytest.approx((70 - margin, 70 + margin))
    lines = [each["place"] for each in rows_of(chart, "place", "text") if each["text"] == "original"]
    assert lines == [1, pytest.approx(80)]


def test_scores_alone_are_drawn():
    how = {"intervention": {"kind": "quantize weights", "scheme": "int4-g64"}}
    (panel,) = weight_quantization_chart([score("piqa", 0.8, "int4-g64, rtn", **how)], title="").to_dict()["hconcat"]
    assert "mean of 1 task" in str(panel) and "int4-g64" in str(panel)


def test_divergences_that_chose_a_clip_are_no_result():
    how = {"intervention": {"kind": "quantize weights", "scheme": "int4-g64"}, "dataset_digest": "sha256:other"}
    tried = [measurement("kl_to_original", 7.0, f"int4-g64, clip z={z}", **how) for z in (2, 3)]
    rows = rows_of(weight_quantization_chart([*tried, *MIXED], title=""), "method", "place")
    assert {row["method"] for row in rows} == {"rtn", "keep"}


def test_each_data_set_has_its_panels():
    other = [each.model_copy(update={"dataset": "c4"}) for each in MIXED]
    panels = weight_quantization_chart([*MIXED, *other], title="").to_dict()["hconcat"]
    assert ["c4" in str(panel) for panel in panels] == [False, False, True, True]


@pytest.mark.parametrize(
    "records",
    [
        [],
        [measurement("perplexity", 5.0)],
        [measurement("perplexity_ratio", 5.0, "weights, removed", intervention={"kind": "scale", "factor": 0})],
        [score("piqa", 0.8)],
    ],
    ids=["nothing", "the original", "another edit", "scores of the original"],
)
def test_nothing_to_draw_says_what_to_run(records):
    with pytest.raises(UsageError, match="superweights quantize MODEL --compare"):
        weight_quantization_chart(records, title="")
