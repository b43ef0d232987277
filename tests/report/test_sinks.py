import math

import pytest

from superweights.errors import UsageError
from superweights.report.appearance import INK
from superweights.report.sinks import sinks_chart
from superweights.results.records import MeasurementRecord

CONDITIONS = ("original", "weights removed")


def attention(layer: int | None, condition: str, value: float, **changes: object) -> MeasurementRecord:
    fields: dict[str, object] = {
        "name": "attention_to_first",
        "subject": "" if layer is None else f"layer {layer}",
        "unit": "proportion",
        "standard_error": 0.01,
        "interval": (value - 0.02, value + 0.02),
        "count": 8,
        "dataset": "heldout",
        "dataset_digest": "sha256:0",
        "intervention": {},
    }
    return MeasurementRecord(condition=condition, value=value, **(fields | changes))  # type: ignore[arg-type]


RECORDS = [
    attention(layer, condition, share)
    for condition, share in zip(CONDITIONS, (0.6, 0.5), strict=True)
    for layer in (None, 0, 1, 2)
]


def drawn(records):
    """The rows of the bands, of the first line and of the others."""
    bands, first, others = sinks_chart(records, title="Sinks", model="m").to_dict()["layer"]
    return bands["data"]["values"], *(each["data"]["values"] for each in (first, others))


def test_a_line_for_each_condition_the_original_in_ink():
    bands, first, others = drawn(RECORDS)
    assert [(row["layer"], row["condition"], row["value"]) for row in first] == [(n, "original", 60) for n in range(3)]
    assert [(row["condition"], row["value"]) for row in others] == [("weights removed", 50)] * 3
    assert (bands[0]["low"], bands[0]["high"]) == pytest.approx((58, 62))
    color = sinks_chart(RECORDS, title="").to_dict()["layer"][0]["encoding"]["color"]
    assert (color["scale"]["domain"], color["scale"]["range"][0]) == (list(CONDITIONS), INK)


def test_the_subtitle_has_the_means():
    subtitle = sinks_chart(RECORDS, title="", model="m").to_dict()["title"]["subtitle"]
    assert subtitle == "m · mean: original 60 %, weights removed 50 %"


def test_what_is_not_a_number_is_left_out():
    strange = [attention(3, "original", math.nan), attention(4, "original", 0.1, interval=None, standard_error=None)]
    bands, first, _ = drawn([*RECORDS, *strange])
    assert [row["layer"] for row in first] == [0, 1, 2, 4]
    assert len(bands) == 6


def test_nothing_to_draw():
    with pytest.raises(UsageError, match="hold no attention to the first token"):
        sinks_chart([attention(None, "original", 0.5)], title="")
