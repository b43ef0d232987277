"""The same weights in several models: their values, the super activations and what removing them does, side by side."""

from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from superweights.errors import UsageError
from superweights.report.appearance import (
    MUTED,
    Interval,
    counted,
    describe_source,
    dot_row,
    dress,
    dumbbells,
    ends_of,
    linear_domain,
    log_axis,
    log_domain,
    measured,
    number_axis,
    row_axis,
    show_number,
    told_apart,
    value_column,
)
from superweights.results.records import MeasurementRecord, Record

_PANEL, _ROW = 220, 30  # pixels: width of a panel, height of a row
_RATIO = "perplexity_ratio_removed"
_PANELS = {"weight": "weight", "super_activation": "super activation", _RATIO: "perplexity, removed / original"}


def comparison_chart(records: Iterable[Record], *, title: str, model: str = "") -> alt.TopLevelMixin:
    """One row for each coordinate, one panel for each number, one mark for each model; rows join the models.

    An infinite value is an arrow head at the edge, one that is not a number has its value in words only.

    Args:
        records: needs measurements of "weight", "super_activation" or "perplexity_ratio_removed" whose subject is a coordinate
            and whose condition is a model.
        title: the chart's title.
        model: named in the subtitle.

    Raises:
        UsageError: there is nothing to compare.
    """
    known = list(records)
    found = measured(known, *_PANELS)
    if not found:
        raise UsageError("Cannot draw a comparison: the records hold none. `superweights compare` records it.")
    models = list(dict.fromkeys(each.condition for each in found))
    coordinates = list(dict.fromkeys(each.subject for each in found))
    panels: list[alt.LayerChart] = []
    for name in _PANELS:
        if own := [each for each in found if each.name == name]:
            panels.append(_panel(own, coordinates, models, labelled=not panels))
    weights = {each.subject for each in found if each.name == "weight"} or set(coordinates)
    source = describe_source(known, model=model, more=counted(len(weights), "weight"))
    return dress(alt.hconcat(*panels, spacing=24), title=title, subtitle=source)


def _panel(
    measurements: Sequence[MeasurementRecord], coordinates: Sequence[str], models: Sequence[str], *, labelled: bool
) -> alt.LayerChart:
    name = measurements[0].name
    ends = [end for each in measurements for end in ends_of(each.value, each.interval)]
    domain = log_domain([1.0, *ends]) if name == _RATIO else linear_domain(ends)
    if name == _RATIO:
        x = log_axis(domain, field="place", title=_PANELS[name], channel=alt.X)
    else:
        x = number_axis(domain, title=_PANELS[name])
    by_model = sorted(measurements, key=lambda each: models.index(each.condition))
    y = row_axis(coordinates, labelled=labelled)
    return alt.layer(
        *dumbbells(
            [_row(each, domain) for each in by_model],
            series="model",
            tooltip=_tooltip(),
            x=x,
            y=y,
            **told_apart("model", models, keep_end=True),
        ),
        value_column(_texts(by_model, models), width=_PANEL, y=y, color=alt.value(MUTED)),
    ).properties(width=_PANEL, height=_ROW * len(coordinates))


def _texts(measurements: Sequence[MeasurementRecord], models: Sequence[str]) -> list[dict[str, str]]:
    """The values of each coordinate in a line, in the order of the models."""
    found = {(each.subject, each.condition): show_number(each.value) for each in measurements}
    names = dict.fromkeys(each.subject for each in measurements)
    return [{"name": name, "text": " → ".join(found.get((name, each), "none") for each in models)} for name in names]


def _row(each: MeasurementRecord, domain: Interval) -> dict[str, Any]:
    return {
        **dot_row(domain, each.value, each.interval),
        "name": each.subject,
        "model": each.condition,
    }


def _tooltip() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("name:N", title="weight"),
        alt.Tooltip("model:N"),
        alt.Tooltip("value:N"),
        alt.Tooltip("interval:N", title="95 % interval"),
    ]
