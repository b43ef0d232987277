"""What all charts share: sizes, colours, fonts, axes, dots with intervals, and how text is made fit to be shown."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import altair as alt

from superweights.results.records import (
    ActivationPeakRecord,
    CandidateRecord,
    MeasurementRecord,
    PromptRecord,
    Record,
    ResidualPeakRecord,
)

WIDTH = 720
"""Width of a panel, in pixels."""
ACCENT = "#d9480f"
"""The colour of candidates, and of nothing else that is not about them."""
INK = "#1f3a5f"
"""The colour of the unedited model."""
QUIET = "#9aa5b1"
"""The colour of what is there for scale."""
MUTED = "#5b6875"
"""The colour of text that explains."""
COLORS = (INK, "#2a7f74", "#7b559c", "#a8730f", "#3f7fbf")
"""Colours of what is told apart by name; they repeat with another shape when there is more."""
NUMBER = ",~g"
"""How a legend writes numbers: 0.1, 10, 1,000."""

_POWER = f"format(datum.value, datum.value < 1e6 ? '{NUMBER}' : '~e')"
"""How a log axis writes numbers: 0.1, 10, 1,000, 1e+6."""
_FONT = "Inter, 'Helvetica Neue', Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
_TEXT, _GRID = "#222b36", "#e6eaee"
_TICKS = ((0.5, (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)), (2, (1, 2, 5)), (4, (1, 3)), (math.inf, (1,)))
"""The digits named on a log axis that spans fewer than so many powers of ten."""
_NAME = 36  # characters of a name in a legend that is cut at its start
_SHAPES = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down")
_SCORES = ("acc", "exact_match")
"""What the names of task scores hold, of all proportions."""
_Z = 1.96  # a standard error times this is half a 95 % interval

Interval = tuple[float, float]
Key = TypeVar("Key", str, float)
Peak = TypeVar("Peak", ActivationPeakRecord, ResidualPeakRecord)


def dress(chart: alt.TopLevelMixin, *, title: str, subtitle: str) -> alt.TopLevelMixin:
    """The chart with its title, subtitle, fonts and grid."""
    heading = alt.TitleParams(title, subtitle=subtitle, anchor="start", frame="group", offset=14)
    return chart.properties(title=heading, padding=16, background="white").configure(
        font=_FONT,
        view=alt.ViewConfig(stroke=None),
        title=alt.TitleConfig(
            fontSize=17, fontWeight=600, color=_TEXT, subtitleFontSize=12, subtitleColor=MUTED, subtitlePadding=5
        ),
        axis=alt.AxisConfig(
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
            labelColor=MUTED,
            titleColor=_TEXT,
            gridColor=_GRID,
            domainColor="#c3cbd3",
            tickColor="#c3cbd3",
        ),
        legend=alt.LegendConfig(
            labelFontSize=12, titleFontSize=12, titleFontWeight="normal", labelColor=MUTED, titleColor=_TEXT
        ),
    )


def describe_source(records: Iterable[Record], *, model: str, more: str = "") -> str:
    """The subtitle: which model, how many prompts if any, and what else there is to say."""
    prompts = {each.index if isinstance(each, PromptRecord) else getattr(each, "prompt", None) for each in records}
    count = len(prompts - {None})
    return " · ".join(part for part in (model, counted(count, "prompt") if count else "", more) if part)


def layer_axis(layers: Sequence[int], *, field: str = "layer", labelled: bool = True) -> alt.X:
    """The x axis over decoder layers, with half a layer of room at both ends; layer -1 is named "emb"."""
    return alt.X(
        f"{field}:Q",
        title="decoder layer" if labelled else None,
        scale=alt.Scale(domain=layer_domain(layers), nice=False, zero=False),
        axis=alt.Axis(
            values=layer_ticks(layers),
            labelExpr="datum.value < 0 ? 'emb' : format(datum.value, 'd')",
            labelOverlap=False,
            grid=False,
            labels=labelled,
            ticks=labelled,
        ),
    )


def layer_domain(layers: Sequence[int]) -> list[float]:
    """The first and last layer, with half a layer of room."""
    return [min(layers) - 0.5, max(layers) + 0.5]


def layer_ticks(layers: Sequence[int]) -> list[int]:
    """The layers to name on an axis: all of a few, every 2nd, 5th or 10th of many, and the embedding where it is.

    Example:
        >>> layer_ticks(range(-1, 32))[:4]
        [-1, 0, 2, 4]
    """
    low, high = min(layers), max(layers)
    step = next((step for step in (1, 2, 5) if high - low < 24 * step), 10)
    ticks = [layer for layer in range(max(low, 0), high + 1) if layer % step == 0]
    # The name of the embedding is wide: where layers stand close, the number 0 makes room for it.
    return ticks if low >= 0 else [-1, *(tick for tick in ticks if tick > 0 or step < 5)]


def point_size(layers: Sequence[int]) -> int:
    """Area of a point, in square pixels, smaller where many stand side by side."""
    return 36 if max(layers) - min(layers) < 48 else 16


def log_axis(domain: Interval, *, field: str, title: str, channel: Callable[..., alt.Y] = alt.Y) -> alt.Y:
    """An axis in powers, alt.Y or alt.X, with as many lines as help the eye."""
    return channel(
        f"{field}:Q",
        title=title,
        scale=alt.Scale(type="log", domain=list(domain), nice=False),
        axis=alt.Axis(labelExpr=_POWER, values=log_ticks(domain), labelOverlap=True, labelSeparation=6),
    )


def log_domain(values: Iterable[float]) -> tuple[float, float]:
    """Bounds of a log axis around the positive values, with a little room; any bounds where there are none."""
    known = [each for each in values if each > 0] or [1.0]
    return min(known) / 1.3, max(known) * 1.3


def log_ticks(domain: tuple[float, float]) -> list[float]:
    """Round numbers inside the bounds: powers of ten, with 2 and 5 or with 3 between them where there is room.

    Example:
        >>> log_ticks((0.7, 30.0))
        [1.0, 2.0, 5.0, 10.0, 20.0]
    """
    low, high = (math.log10(bound) for bound in domain)
    steps = next(steps for decades, steps in _TICKS if high - low < decades)
    ticks = (float(f"{step}e{power}") for power in range(math.floor(low), math.ceil(high)) for step in steps)
    return [tick for tick in ticks if domain[0] <= tick <= domain[1]]


def largest_by_layer(peaks: Iterable[Peak]) -> list[Peak]:
    """The peak with the largest |value| of each layer, by layer."""
    largest: dict[int, Peak] = {}
    for peak in peaks:
        if peak.layer not in largest or abs(peak.value) > abs(largest[peak.layer].value):
            largest[peak.layer] = peak
    return [peak for _, peak in sorted(largest.items())]


def drawable(value: float) -> bool:
    """Whether a value has a place on a log axis: finite and not zero."""
    return math.isfinite(value) and value != 0


def show_token(text: str) -> str:
    r"""A token's text with its white space made visible.

    Example:
        >>> print(show_token(" the\n"))
        ␣the\n
    """
    seen = text.replace(" ", "␣")
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in seen)


def show_place(token_text: str, token: int) -> str:
    """A token and its position, for a tooltip."""
    return f"{show_token(token_text)} at {token}"


def shorten(text: str, *, length: int) -> str:
    """At most `length` characters, with the cut marked."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def values_of(rows: list[dict[str, Any]]) -> alt.Data:
    """Rows as the data of a chart."""
    return alt.Data(values=rows)


def counted(count: int, noun: str) -> str:
    """A count with its noun: "1 prompt", "2 prompts"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def candidate_rules(candidates: Iterable[CandidateRecord], x: alt.X) -> alt.Chart:
    """One vertical line at each layer that has a candidate."""
    rows = [{"layer": layer} for layer in sorted({each.layer for each in candidates})]
    return alt.Chart(values_of(rows)).mark_rule(color=ACCENT, strokeDash=[3, 3], opacity=0.6).encode(x=x)


def row_axis(names: Sequence[str], *, labelled: bool = True) -> alt.Y:
    """The y axis of a chart with one row for each name, in this order; the field is "name"."""
    looks = {"labelLimit": 300, "labelPadding": 10, "labelColor": _TEXT, "ticks": False, "domain": False}
    # Many fonts lack the sign for a space, and then the whole label is drawn in another font.
    axis = alt.Axis(labels=labelled, labelExpr="replace(datum.label, /␣/g, '·')", **looks)
    scale = alt.Scale(type="band", domain=list(names), paddingInner=0.25, paddingOuter=0.125)
    return alt.Y("name:N", title=None, scale=scale, axis=axis)


def number_axis(domain: Interval, *, title: str, channel: Callable[..., alt.X] = alt.X) -> alt.X:
    """A linear axis, alt.X or alt.Y; the field is "place"."""
    scale = alt.Scale(domain=list(domain), nice=False, zero=False)
    axis = alt.Axis(format=",.6~g", tickCount=5, labelFlush=False)
    return channel("place:Q", title=title, scale=scale, axis=axis)


def measured_axis(
    found: Sequence[MeasurementRecord],
    *,
    title: str,
    channel: Callable[..., Any] = alt.X,
    hold: Sequence[float] = (),
    wide: float = 4,
) -> tuple[Interval, Any]:
    """Bounds and axis, alt.X or alt.Y, of values with their intervals; the field is "place".

    The axis is in powers where all values are positive and the largest is over `wide` times the smallest. Then ends of
    intervals far below the smallest value are cut, and what of `hold` is not positive has no place.

    Args:
        found: what is drawn.
        title: the axis's title.
        channel: alt.X or alt.Y.
        hold: other values that the axis must reach.
        wide: largest over smallest value from which it is in powers.
    """
    values = [each.value for each in found if math.isfinite(each.value)]
    ends = [end for each in found for end in ends_of(each.value, each.interval)]
    if not values or min(values) <= 0 or max(values) <= wide * min(values):
        domain = linear_domain([*ends, *hold] or [0.0, 1.0])
        return domain, number_axis(domain, title=title, channel=channel)
    domain = log_domain([*(max(end, min(values) / wide) for end in ends), *hold])
    return domain, log_axis(domain, field="place", title=title, channel=channel)


def original_rule(
    value: float, *, x: alt.X | None = None, y: alt.Y | None = None, width: int = 0, named: bool = True
) -> list[alt.Chart]:
    """A dashed line at the value of the original, named at its end; on an x axis, or on the y axis of a panel of this width."""
    data = alt.Chart(values_of([{"place": value, "text": "original"}]))
    across = {"x": x} if x is not None else {"y": y}
    name = {"align": "center", "baseline": "bottom"} if x is not None else {"align": "left", "baseline": "middle"}
    end = {"y": alt.value(-4)} if x is not None else {"x": alt.value(width + 6)}
    rule = data.mark_rule(color=QUIET, strokeDash=[3, 3]).encode(**across)
    label = data.mark_text(fontSize=11, color=MUTED, **name).encode(text="text:N", **across, **end)
    return [rule, label] if named else [rule]


def linear_domain(values: Iterable[float]) -> Interval:
    """Bounds of a linear axis around the values, with a little room."""
    known = list(values) or [0.0]
    room = 0.08 * ((max(known) - min(known)) or abs(known[0]) or 1.0)
    return min(known) - room, max(known) + room


def told_apart(
    field: str,
    names: Sequence[str],
    *,
    colors: Sequence[str] = COLORS,
    keep_end: bool = False,
    by_shape: bool = False,
) -> dict[str, Any]:
    """Colour and shape of each name of a field, with a legend above the chart where there are several.

    Args:
        field: field of the rows.
        names: its values, in order.
        colors: one for each name, from the start again when there are more names.
        keep_end: cut long names at their start in the legend, as paths that differ at their end want.
        by_shape: give neighbours different shapes too, where marks of all names cover each other.
    """
    cut = f"length(datum.label) > {_NAME} ? '…' + slice(datum.label, {1 - _NAME}) : datum.label"
    expression = {"labelExpr": cut} if keep_end else {}
    looks = {"orient": "top", "columns": 3, "labelLimit": 280, "symbolOpacity": 1, **expression}
    legend = alt.Legend(title=None, **looks) if len(names) > 1 else None
    hues = [colors[place % len(colors)] for place in range(len(names))]
    turns = [place // len(colors) + by_shape * place for place in range(len(names))]
    shapes = [_SHAPES[turn % len(_SHAPES)] for turn in turns]
    return {
        "color": alt.Color(f"{field}:N", scale=alt.Scale(domain=list(names), range=hues), legend=legend),
        "shape": alt.Shape(f"{field}:N", scale=alt.Scale(domain=list(names), range=shapes), legend=legend),
    }


def dot_row(domain: Interval, value: float, interval: Interval | None) -> dict[str, Any]:
    """The fields of `dots`: places on an axis, and numbers as text.

    What lies beyond an end of the axis is put at it, and what is not a number nowhere.

    Example:
        >>> dot_row((1.0, 9.0), float("inf"), (4.0, float("inf")))
        {'value': 'inf', 'interval': '4 to inf', 'place': 9.0, 'low': 4.0, 'high': 9.0, 'finite': False}
    """
    place, low, high = (
        None if math.isnan(each) else min(max(each, domain[0]), domain[1])
        for each in (value, *(interval or (math.nan, math.nan)))
    )
    return {
        "value": show_number(value),
        "interval": show_interval(interval),
        "place": place,
        "low": low,
        "high": high,
        "finite": math.isfinite(value),
    }


def dots(
    rows: Sequence[dict[str, Any]], *, tooltip: Sequence[alt.Tooltip], size: int = 80, **encoding: Any
) -> list[alt.Chart]:
    """A point for each row over its interval as a bar; an infinite value is an arrow head at the end of the axis.

    A list for `alt.layer`, without what has no row: altair copies a chart once for every level that it is nested in.
    """
    bars = [row for row in rows if None not in (row["low"], row["high"])]
    points = [row for row in rows if row["finite"]]
    heads = [row for row in rows if not row["finite"] and row["place"] is not None]
    plain = {channel: each for channel, each in encoding.items() if channel != "shape"}
    span = {"x": "low:Q", "x2": "high:Q"}
    looks = {"filled": True, "opacity": 1, "size": size}
    drawn = (
        (bars, {"type": "rule", "strokeWidth": 5, "opacity": 0.3}, plain | span),
        (points, {"type": "point", **looks}, {**encoding, "tooltip": list(tooltip)}),
        (heads, {"type": "point", "shape": "triangle-right", **looks}, {**plain, "tooltip": list(tooltip)}),
    )
    return [alt.Chart(values_of(own), mark=mark).encode(**channels) for own, mark, channels in drawn if own]


def dumbbells(
    rows: Sequence[dict[str, Any]], *, series: str, tooltip: Sequence[alt.Tooltip], x: alt.X, y: alt.Y, **marks: Any
) -> list[alt.Chart]:
    """`dots` of several series on one line for each name, joined; the first series is drawn larger, below the others."""
    spans: dict[str, list[float]] = {}
    for row in rows:
        spans.setdefault(row["name"], []).extend([] if row["place"] is None else [row["place"]])
    joined = [{"name": name, "from": min(places), "to": max(places)} for name, places in spans.items() if places]
    first = next((row[series] for row in rows), None)
    encoding = {"x": x, "y": y, "tooltip": tooltip, **marks}
    return [
        alt.Chart(values_of(joined)).mark_rule(color=QUIET, strokeWidth=2).encode(x="from:Q", x2="to:Q", y=y),
        *dots([row for row in rows if row[series] == first], size=150, **encoding),
        *dots([row for row in rows if row[series] != first], size=55, **encoding),
    ]


def value_column(rows: Sequence[dict[str, Any]], *, width: int, **encoding: Any) -> alt.Chart:
    """The field "text" of each row to the right of a panel of this width."""
    return (
        alt.Chart(values_of(list(rows)))
        .mark_text(align="left", baseline="middle", fontSize=12)
        .encode(x=alt.value(width + 10), text="text:N", **encoding)
    )


def ends_of(value: float, interval: Interval | None) -> list[float]:
    """What an axis must hold of a value and its interval: all that is finite."""
    return [each for each in (value, *(interval or ())) if math.isfinite(each)]


def show_number(value: float) -> str:
    """A number in four digits for a label.

    Example:
        >>> show_number(1211.11), show_number(0.99312), show_number(8.5e7)
        ('1,211', '0.9931', '8.5e+07')
    """
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"


def show_interval(interval: Interval | None) -> str:
    """Both ends of an interval in words."""
    return "no interval" if interval is None else f"{show_number(interval[0])} to {show_number(interval[1])}"


def percent(interval: Interval | None) -> Interval | None:
    """An interval of proportions in percent."""
    return interval and (100 * interval[0], 100 * interval[1])


def measured(records: Iterable[Record], *names: str) -> list[MeasurementRecord]:
    """The measurements with one of these names."""
    return [each for each in records if isinstance(each, MeasurementRecord) and each.name in names]


def task_scores(records: Iterable[Record]) -> list[MeasurementRecord]:
    """One score of each task, plain accuracy where there is one, as the paper averages it; the subject is the task."""
    known = (each for each in records if isinstance(each, MeasurementRecord) and each.unit == "proportion")
    scores = [each for each in known if any(part in each.name for part in _SCORES)]
    plain = {(each.condition, each.subject) for each in scores if each.name == "acc"}
    return [each for each in scores if each.name == "acc" or (each.condition, each.subject) not in plain]


def mean_accuracies(scores: Iterable[MeasurementRecord]) -> list[MeasurementRecord]:
    """The mean score of each condition in percent, over the tasks that all have; count is of tasks.

    Args:
        scores: what `task_scores` gives.
    """
    groups: dict[str, list[MeasurementRecord]] = {}
    for each in scores:
        groups.setdefault(each.condition, []).append(each)
    means = mean_scores(groups).values()
    return [each.model_copy(update={"value": 100 * each.value, "interval": percent(each.interval)}) for each in means]


def steps_of(each: MeasurementRecord) -> set[str]:
    """The kinds of what was done to the model; nothing for the original."""
    steps = each.intervention.get("steps")
    found = steps if isinstance(steps, list) else [each.intervention]
    return {str(step["kind"]) for step in found if isinstance(step, dict) and "kind" in step}


def mean_scores(groups: Mapping[Key, Sequence[MeasurementRecord]]) -> dict[Key, MeasurementRecord]:
    """The mean score of each group over the tasks that all groups have, or means would not compare; count is of tasks."""
    tasks = [{(each.name, each.subject): each for each in group} for group in groups.values()]
    shared = sorted(set.intersection(*map(set, tasks))) if tasks else []
    return {key: _mean([own[task] for task in shared]) for key, own in zip(groups, tasks, strict=True) if shared}


def _mean(scores: Sequence[MeasurementRecord]) -> MeasurementRecord:
    value = sum(each.value for each in scores) / len(scores)
    known = [each.standard_error for each in scores if each.standard_error is not None]
    error = math.hypot(*known) / len(scores) if len(known) == len(scores) else None
    interval = None if error is None else (max(0.0, value - _Z * error), min(1.0, value + _Z * error))
    changes = {"value": value, "standard_error": error, "interval": interval, "count": len(scores)}
    return scores[0].model_copy(update=changes)
