"""The largest value of the residual stream by layer, before and after edits.

Source: figure 4 of "The Super Weight in Large Language Models", arXiv 2411.07191.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from superweights.errors import UsageError
from superweights.report.appearance import (
    ACCENT,
    INK,
    MUTED,
    QUIET,
    WIDTH,
    candidate_rules,
    describe_source,
    drawable,
    dress,
    largest_by_layer,
    layer_axis,
    log_axis,
    log_domain,
    point_size,
    shorten,
    show_place,
    values_of,
)
from superweights.report.labels import spread
from superweights.results.records import CandidateRecord, Record, ResidualPeakRecord

_HEIGHT, _LABEL_GAP = 340, 16  # pixels
_EDITED = (ACCENT, "#2a7f74", "#7b559c", "#a8730f", "#3f7fbf")
"""Colours of the edits, in the order in which they appear; they repeat when there are more."""


def residual_chart(records: Iterable[Record], *, title: str, model: str = "") -> alt.TopLevelMixin:
    """Max |residual| over the decoder layers, one line per edit, with the stream's median in grey, on a log axis.

    Each point is the largest peak over all prompts. Layer -1 is the embedding output. Values that are zero or not
    finite have no place on a log axis and are left out.

    Args:
        records: needs residual peaks; the layers of candidates are marked when there are any.
        title: the chart's title.
        model: named in the subtitle.

    Raises:
        UsageError: there is no residual peak to draw.
    """
    known = list(records)
    peaks = [each for each in known if isinstance(each, ResidualPeakRecord) and drawable(each.value)]
    if not peaks:
        raise UsageError(
            "Cannot draw the residual stream: the records hold no peak. `superweights trace` records them."
        )
    edits = sorted(dict.fromkeys(each.edit for each in peaks), key=bool)  # the unedited model first, the rest in order
    lines = {edit: [_row(each) for each in largest_by_layer(p for p in peaks if p.edit == edit)] for edit in edits}
    medians = [row for row in lines[edits[0]] if drawable(row["median"])]
    candidates = [each for each in known if isinstance(each, CandidateRecord)]
    chart = _draw(lines, medians, candidates)
    return dress(chart, title=title, subtitle=describe_source(known, model=model))


def _draw(
    lines: dict[str, list[dict[str, Any]]], medians: list[dict[str, Any]], candidates: Sequence[CandidateRecord]
) -> alt.LayerChart:
    rows = [row for line in lines.values() for row in line]
    layers = sorted({row["layer"] for row in rows})
    domain = log_domain([row["size"] for row in rows] + [row["median"] for row in medians])
    x = layer_axis(layers)
    y = log_axis(domain, field="size", title="max |residual|")
    colors = dict(zip(lines, _colors(list(lines)), strict=True))
    color = alt.Color("edit:N", scale=alt.Scale(domain=list(colors), range=list(colors.values())), legend=None)
    drawn = alt.Chart(values_of(rows)).encode(x=x, y=y, color=color)
    return alt.layer(
        candidate_rules(candidates, x),
        alt.Chart(values_of(medians)).mark_line(color=QUIET, strokeWidth=1).encode(x=x, y="median:Q"),
        drawn.mark_line(strokeWidth=2),
        drawn.mark_point(filled=True, opacity=1, size=point_size(layers)).encode(tooltip=_tooltip()),
        _end_labels(lines, medians, colors, domain),
    ).properties(width=WIDTH, height=_HEIGHT)


def _end_labels(
    lines: dict[str, list[dict[str, Any]]],
    medians: list[dict[str, Any]],
    colors: dict[str, str],
    domain: tuple[float, float],
) -> alt.LayerChart:
    """The name of each line at its right end, moved apart where ends lie close."""
    ends = [(edit or "original", line[-1]["size"], colors[edit]) for edit, line in lines.items()]
    ends += [("median |residual|", medians[-1]["median"], MUTED)] if medians else []
    low, high = map(math.log, domain)
    heights = spread([(math.log(value) - low) / (high - low) * _HEIGHT for _, value, _ in ends], gap=_LABEL_GAP)
    layers = [
        alt.Chart(values_of([{"place": math.exp(low + height / _HEIGHT * (high - low)), "name": name}]))
        .mark_text(align="left", baseline="middle", fontSize=12, color=color)
        .encode(x=alt.value(WIDTH + 6), y="place:Q", text=alt.value(shorten(name, length=38)), tooltip="name:N")
        for (name, _, color), height in zip(ends, heights, strict=True)
    ]
    return alt.layer(*layers)


def _colors(edits: Sequence[str]) -> list[str]:
    """Ink for the unedited model, the next free colour for each edit."""
    edited = iter(range(len(edits)))
    return [_EDITED[next(edited) % len(_EDITED)] if edit else INK for edit in edits]


def _row(peak: ResidualPeakRecord) -> dict[str, Any]:
    return {
        "layer": peak.layer,
        "size": abs(peak.value),
        "signed": peak.value,
        "median": peak.median,
        "channel": peak.channel,
        "token": show_place(peak.token_text, peak.token),
        "prompt": peak.prompt,
        "edit": peak.edit,
        "name": peak.edit or "original",
    }


def _tooltip() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("name:N", title="edit"),
        alt.Tooltip("layer:Q"),
        alt.Tooltip("signed:Q", title="value", format=".5~g"),
        alt.Tooltip("median:Q", title="median |residual|", format=".3~g"),
        alt.Tooltip("channel:Q"),
        alt.Tooltip("token:N"),
        alt.Tooltip("prompt:Q"),
    ]
