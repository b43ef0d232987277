"""What removing each set of weights does, beside what removing random large weights does: one row for each verdict."""

from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from superweights.errors import UsageError
from superweights.report.appearance import (
    ACCENT,
    MUTED,
    QUIET,
    Interval,
    counted,
    describe_source,
    dot_row,
    dots,
    dress,
    ends_of,
    log_axis,
    log_domain,
    row_axis,
    show_number,
    value_column,
    values_of,
)
from superweights.results.records import Record, VerdictRecord

_PANEL, _ROW = 520, 34  # pixels: width of the panel, height of a row
_BAR = 2.0
"""Perplexity ratio from which weights are critical."""
_COLORS = {
    "critical alone": ACCENT,
    "critical jointly": "#a8730f",
    "contributing": "#2a7f74",
    "undecided": "#7b559c",
    "inert": MUTED,
}


def verdicts_chart(records: Iterable[Record], *, title: str, model: str = "") -> alt.TopLevelMixin:
    """Perplexity ratio of each verdict with its interval, coloured by its label, on a log axis.

    A grey bar reaches from 1 to the largest ratio of the null. An infinite ratio is an arrow head at the right edge, one that
    is not a number has its value in words only.

    Args:
        records: needs verdicts.
        title: the chart's title.
        model: named in the subtitle.

    Raises:
        UsageError: there is no verdict to draw.
    """
    known = list(records)
    verdicts = [each for each in known if isinstance(each, VerdictRecord)]
    if not verdicts:
        raise UsageError("Cannot draw verdicts: the records hold none. `superweights verify` records them.")
    datasets = list(dict.fromkeys(each.dataset for each in verdicts))
    nulls = [each.null_maximum for each in verdicts if each.null_maximum is not None]
    ends = [end for each in verdicts for end in ends_of(each.ratio, each.interval)]
    domain = log_domain([1.0, _BAR, *ends, *(end for each in nulls for end in ends_of(each, None))])
    rows = [_row(each, domain, several=len(datasets) > 1) for each in verdicts]
    source = describe_source(known, model=model, more=", ".join(datasets))
    return dress(_draw(rows, domain), title=title, subtitle=source)


def _draw(rows: Sequence[dict[str, Any]], domain: Interval) -> alt.LayerChart:
    y = row_axis(list(dict.fromkeys(row["name"] for row in rows)))
    known = any(row["null"] is not None for row in rows)
    title = "perplexity with the weights removed / original" + (" (grey: random large weights)" if known else "")
    x = log_axis(domain, field="place", title=title, channel=alt.X)
    color = alt.Color("label:N", scale=alt.Scale(domain=list(_COLORS), range=list(_COLORS.values())), legend=None)
    nulls = alt.Chart(values_of([row for row in rows if row["null"] is not None])).encode(y=y, tooltip=_tooltip())
    bar = alt.Chart(values_of([{"place": _BAR}]))
    return alt.layer(
        alt.Chart(values_of([{"place": 1.0}])).mark_rule(color=QUIET, strokeWidth=1.5).encode(x=x),
        bar.mark_rule(color=MUTED, strokeDash=[4, 4]).encode(x=x),
        bar.mark_text(color=MUTED, fontSize=11, baseline="bottom").encode(
            x=x, y=alt.value(-4), text=alt.value("critical")
        ),
        nulls.mark_rule(color=QUIET, strokeWidth=12, opacity=0.35).encode(x="one:Q", x2="null:Q"),
        nulls.mark_tick(color=QUIET, thickness=3, height=18).encode(x="null:Q"),
        *dots(rows, x=x, y=y, color=color, tooltip=_tooltip()),
        value_column(rows, width=_PANEL, y=y, color=color),
    ).properties(width=_PANEL, height=_ROW * len({row["name"] for row in rows}))


def _row(each: VerdictRecord, domain: Interval, *, several: bool) -> dict[str, Any]:
    null = None if each.null_maximum is None else dot_row(domain, each.null_maximum, None)
    found = dot_row(domain, each.ratio, each.interval)
    return {
        **found,
        "name": _name(each) + (f", {each.dataset}" if several else ""),
        "text": f"{found['value']} · {each.label}",
        "label": each.label,
        "one": 1.0,
        "null": null and null["place"],
        "random": f"{null['value']} in {counted(each.null_count, 'draw')}" if null else "none",
        "without": "none" if each.without is None else show_number(each.without),
        "weights": ", ".join(each.weights),
        "count": each.count,
        "reason": each.reason,
    }


def _name(each: VerdictRecord) -> str:
    if each.kind == "all":
        return f"all {counted(len(each.weights), 'candidate')}"
    return ("smallest critical set: " if each.kind == "minimal set" else "") + ", ".join(each.weights)


def _tooltip() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("weights:N"),
        alt.Tooltip("label:N", title="verdict"),
        alt.Tooltip("value:N", title="perplexity ratio"),
        alt.Tooltip("interval:N", title="95 % interval"),
        alt.Tooltip("random:N", title="largest of random weights"),
        alt.Tooltip("without:N", title="all but these removed"),
        alt.Tooltip("count:Q", title="windows", format=","),
        alt.Tooltip("reason:N"),
    ]
