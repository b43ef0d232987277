"""What rounding weights costs, by scheme and method: KL to the original and perplexity over it.

Source: figure 7 of "The Super Weight in Large Language Models", arXiv 2411.07191.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from superweights.errors import UnknownNameError, UsageError
from superweights.quantization.scheme import Scheme
from superweights.report.appearance import (
    COLORS,
    QUIET,
    describe_source,
    dot_row,
    dots,
    dress,
    ends_of,
    linear_domain,
    log_axis,
    log_domain,
    mean_scores,
    measured,
    number_axis,
    percent,
    row_axis,
    task_scores,
    told_apart,
    values_of,
)
from superweights.results.records import MeasurementRecord, Record

_WIDTH, _HEIGHT = 420, 300  # pixels of a panel of lines
_ROW, _LINE = 14, 13  # pixels: a row without its lines, and one line for each method
_COLORS = (*COLORS, "#b0475f")  # as many as there are methods
_WIDE = 4
"""Largest over smallest value from which an axis is in powers."""
_TITLES = {"kl_to_original": "KL to the original, nats per token", "perplexity_ratio": "perplexity / original"}


def weight_quantization_chart(records: Iterable[Record], *, title: str, model: str = "") -> alt.TopLevelMixin:
    """A panel of KL and one of the perplexity ratio, and one of mean accuracy where tasks were run.

    Where schemes differ in nothing but the number of weights that share a scale, that number is the x axis and each method a
    line, as in the paper; else each scheme is a row.

    Args:
        records: needs measurements under conditions named "SCHEME, METHOD".
        title: the chart's title.
        model: named in the subtitle.

    Raises:
        UsageError: there is no such measurement.
    """
    known = list(records)
    found = [each for each in measured(known, *_TITLES) if _parts(each) and not each.subject]
    if not found:
        raise UsageError(
            "Cannot draw what rounding costs: the records hold no KL or perplexity ratio of quantized weights. "
            "`superweights quantize MODEL --compare` or `--measure` records them."
        )
    scores = [each for each in task_scores(known) if _parts(each)]
    groups = {name: [each for each in scores if each.condition == name] for name in {each.condition for each in scores}}
    panels = [(_TITLES[name], [each for each in found if each.name == name], 1) for name in _TITLES]
    means = list(mean_scores(groups).values())
    panels += [(f"accuracy, %, mean of {means[0].count} tasks", means, 100)] if means else []
    methods = list(dict.fromkeys(_parts(each)[1] for each in found))
    schemes = list(dict.fromkeys(_parts(each)[0] for each in found))
    bits = {_parts(each)[0]: each.value for each in reversed(measured(known, "bits_per_weight")) if _parts(each)}
    draw = _lines if _is_a_series(schemes) else _rows
    drawn = [draw(own, name, methods, schemes, bits, scale) for name, own, scale in panels if own]
    datasets = ", ".join(dict.fromkeys(each.dataset or "" for each in found))
    source = describe_source(known, model=model, more=datasets)
    return dress(alt.hconcat(*drawn, spacing=28), title=title, subtitle=source)


def _parts(each: MeasurementRecord) -> tuple[str, str]:
    """Scheme and method of a condition; empty for the original."""
    scheme, comma, method = each.condition.partition(", ")
    return (scheme, method) if comma and each.intervention else ("", "")


def _is_a_series(schemes: Sequence[str]) -> bool:
    try:
        parsed = [Scheme.parse(each) for each in schemes]
    except UnknownNameError:  # what another package made
        return False
    alike = {(each.kind, each.bits, each.sharing, each.offset) for each in parsed}
    return len(parsed) > 1 and len(alike) == 1 and parsed[0].sharing not in ("tensor", "row")


def _shared(scheme: str) -> int:
    rows, cols = Scheme.parse(scheme).size
    return rows * cols


def _domain(found: Sequence[MeasurementRecord], scale: float) -> tuple[tuple[float, float], bool]:
    """Bounds of an axis, and whether it is in powers."""
    ends = [scale * end for each in found for end in ends_of(each.value, each.interval)]
    positive = [end for end in ends if end > 0]
    powers = bool(positive) and len(positive) == len(ends) and max(positive) > _WIDE * min(positive)
    return (log_domain(ends) if powers else linear_domain(ends)), powers


def _points(found: Sequence[MeasurementRecord], domain: tuple[float, float], scale: float) -> list[dict[str, Any]]:
    rows = []
    for each in found:
        scheme, method = _parts(each)
        interval = percent(each.interval) if scale == 100 else each.interval
        rows.append({**dot_row(domain, scale * each.value, interval), "name": scheme, "method": method})
    return rows


def _lines(
    found: Sequence[MeasurementRecord],
    name: str,
    methods: Sequence[str],
    schemes: Sequence[str],
    bits: dict[str, float],
    scale: float,
) -> alt.LayerChart:
    domain, powers = _domain(found, scale)
    rows = [{**row, "shared": _shared(row["name"])} for row in _points(found, domain, scale)]
    channel = {"field": "place", "title": name, "channel": alt.Y}
    y = log_axis(domain, **channel) if powers else number_axis(domain, title=name, channel=alt.Y)
    sizes = sorted({_shared(each) for each in schemes})
    labels = {_shared(each): _size_label(each) for each in schemes}
    named = " : ".join(f"datum.value == {size} ? '{label}'" for size, label in labels.items()) + " : ''"
    x = alt.X(
        "shared:Q",
        title="weights that share a scale",
        scale=alt.Scale(type="log", base=2, domain=[min(sizes) / 1.4, max(sizes) * 1.4], nice=False),
        axis=alt.Axis(values=sizes, labelExpr=named, grid=False),
    )
    marks = told_apart("method", methods, colors=_COLORS)
    finite = [row for row in rows if row["finite"]]
    lines = alt.Chart(values_of(finite)).mark_line(strokeWidth=1.5).encode(x=x, y=y, color=marks["color"])
    bars = alt.Chart(values_of([row for row in finite if None not in (row["low"], row["high"])]))
    lost = alt.Chart(values_of([row for row in rows if not row["finite"] and row["place"] is not None]))
    tooltip = _tooltip()
    return alt.layer(
        bars.mark_rule(strokeWidth=4, opacity=0.25).encode(x=x, y="low:Q", y2="high:Q", color=marks["color"]),
        lines,
        alt.Chart(values_of(finite))
        .mark_point(filled=True, size=55, opacity=1)
        .encode(x=x, y=y, tooltip=tooltip, **marks),
        lost.mark_point(shape="triangle-up", filled=True, size=80, opacity=1).encode(
            x=x, y="place:Q", color=marks["color"], tooltip=tooltip
        ),
    ).properties(width=_WIDTH, height=_HEIGHT)


def _size_label(scheme: str) -> str:
    rows, cols = Scheme.parse(scheme).size
    return f"{rows} × {cols}" if rows > 1 else str(cols)


def _rows(
    found: Sequence[MeasurementRecord],
    name: str,
    methods: Sequence[str],
    schemes: Sequence[str],
    bits: dict[str, float],
    scale: float,
) -> alt.LayerChart:
    domain, powers = _domain(found, scale)
    names = {each: f"{each}, {bits[each]:.3g} bits" if each in bits else each for each in schemes}
    rows = [{**row, "name": names[row["name"]]} for row in _points(found, domain, scale)]
    x = log_axis(domain, field="place", title=name, channel=alt.X) if powers else number_axis(domain, title=name)
    y = row_axis(list(names.values()), labelled=name == _TITLES["kl_to_original"])
    offset = alt.YOffset("method:N", scale=alt.Scale(domain=list(methods)))
    marks = told_apart("method", methods, colors=_COLORS)
    one = alt.Chart(values_of([{"one": 1.0}])).mark_rule(color=QUIET, strokeDash=[3, 3]).encode(x="one:Q")
    reference = [one] if name == _TITLES["perplexity_ratio"] and domain[0] < 1 < domain[1] else []
    return alt.layer(
        *reference, *dots(rows, x=x, y=y, yOffset=offset, **marks, tooltip=_tooltip(), size=55)
    ).properties(width=_WIDTH - 80, height=len(names) * (_ROW + _LINE * len(methods)))


def _tooltip() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("name:N", title="scheme"),
        alt.Tooltip("method:N"),
        alt.Tooltip("value:N"),
        alt.Tooltip("interval:N", title="95 % interval"),
    ]
