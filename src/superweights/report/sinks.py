"""How much of the attention goes to the first token, by layer, before and after edits."""

import math
from collections.abc import Iterable
from typing import Any

import altair as alt

from superweights.errors import UsageError
from superweights.report.appearance import (
    ACCENT,
    COLORS,
    INK,
    WIDTH,
    describe_source,
    dress,
    layer_axis,
    measured,
    point_size,
    shorten,
    show_number,
    told_apart,
    values_of,
)
from superweights.results.records import MeasurementRecord, Record

_HEIGHT = 300  # pixels


def sinks_chart(records: Iterable[Record], *, title: str, model: str = "") -> alt.TopLevelMixin:
    """Attention to the first token over the decoder layers, one line for each condition with its interval as a band.

    The subtitle has the means over the layers. What is not a number is left out.

    Args:
        records: needs attention to the first token of single layers.
        title: the chart's title.
        model: named in the subtitle.

    Raises:
        UsageError: there is no attention to draw.
    """
    known = list(records)
    found = [each for each in measured(known, "attention_to_first") if math.isfinite(each.value)]
    rows = [_row(each) for each in found if each.subject]
    if not rows:
        raise UsageError(
            "Cannot draw attention sinks: the records hold no attention to the first token. `superweights sinks` records it."
        )
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    layers = sorted({row["layer"] for row in rows})
    small = point_size(layers)
    marks = told_apart("condition", conditions, colors=(INK, ACCENT, *COLORS[1:]))
    marks |= {"x": layer_axis(layers), "y": _share_axis()}
    first, others = ([row for row in rows if (row["condition"] == conditions[0]) == own] for own in (True, False))
    # The first is wider and below the others, so that it shows where they hide it.
    parts = (
        _bands(rows, marks),
        _line(first, marks, width=5, size=3 * small),
        _line(others, marks, width=2, size=small),
    )
    chart = alt.layer(*parts).properties(width=WIDTH, height=_HEIGHT)
    means = (f"{each.condition} {show_number(100 * each.value)} %" for each in found if not each.subject)
    more = shorten(f"mean: {', '.join(means)}", length=110)
    return dress(chart, title=title, subtitle=describe_source(known, model=model, more=more))


def _bands(rows: list[dict[str, Any]], marks: dict[str, Any]) -> alt.Chart:
    known = alt.Chart(values_of([row for row in rows if "low" in row])).mark_area(opacity=0.15)
    return known.encode(x=marks["x"], y="low:Q", y2="high:Q", color=marks["color"])


def _line(rows: list[dict[str, Any]], marks: dict[str, Any], *, width: int, size: int) -> alt.LayerChart:
    drawn = alt.Chart(values_of(rows)).encode(x=marks["x"], y=marks["y"], color=marks["color"])
    points = drawn.mark_point(filled=True, opacity=1, size=size).encode(shape=marks["shape"], tooltip=_tooltip())
    return alt.layer(drawn.mark_line(strokeWidth=width), points)


def _share_axis() -> alt.Y:
    return alt.Y(
        "value:Q", title="attention to the first token, %", scale=alt.Scale(zero=True), axis=alt.Axis(tickCount=6)
    )


def _row(each: MeasurementRecord) -> dict[str, Any]:
    ends = {} if each.interval is None else dict(zip(("low", "high"), each.interval, strict=True))
    return {
        "layer": int(each.subject.removeprefix("layer ")),
        "condition": each.condition,
        "value": 100 * each.value,
        **{name: 100 * end for name, end in ends.items() if math.isfinite(end)},
        "count": each.count,
    }


def _tooltip() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("condition:N"),
        alt.Tooltip("layer:Q"),
        alt.Tooltip("value:Q", title="%", format=".4~g"),
        alt.Tooltip("low:Q", title="from", format=".4~g"),
        alt.Tooltip("high:Q", title="to", format=".4~g"),
        alt.Tooltip("count:Q", title="windows", format=","),
    ]
