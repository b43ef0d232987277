"""The largest input and output of the down projections by layer, with the candidates marked.

Source: figure 3 of "The Super Weight in Large Language Models", arXiv 2411.07191.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import altair as alt

from superweights.errors import UsageError
from superweights.report.appearance import (
    ACCENT,
    INK,
    WIDTH,
    candidate_rules,
    counted,
    describe_source,
    drawable,
    dress,
    largest_by_layer,
    layer_axis,
    layer_domain,
    log_axis,
    log_domain,
    point_size,
    show_place,
    values_of,
)
from superweights.report.labels import assign_lanes
from superweights.results.records import ActivationPeakRecord, CandidateRecord, Record

_LETTER, _LANE = 6.8, 16  # pixels: mean letter width at the label's size, height of one row of labels
_PANELS: tuple[tuple[Literal["input", "output"], str], ...] = (
    ("input", "max |input|"),
    ("output", "max |output|"),
)


def peaks_chart(records: Iterable[Record], *, title: str, model: str = "") -> alt.TopLevelMixin:
    """Two panels over the decoder layers: max |input| and max |output| of the down projection, on log axes.

    Each point is the largest peak of the unedited model over all prompts and experts. Peaks that are zero or not finite
    have no place on a log axis and are left out.

    Args:
        records: needs activation peaks; candidates are marked when there are any.
        title: the chart's title.
        model: named in the subtitle.

    Raises:
        UsageError: there is no activation peak to draw.
    """
    known = list(records)
    peaks = [each for each in known if isinstance(each, ActivationPeakRecord) and not each.edited]
    peaks = [each for each in peaks if drawable(each.value)]
    if not peaks:
        raise UsageError("Cannot draw activation peaks: the records hold none. `superweights find` records them.")
    candidates = [each for each in known if isinstance(each, CandidateRecord)]
    layers = sorted({each.layer for each in peaks} | {each.layer for each in candidates})
    panels = [_panel(peaks, candidates, layers, side=side, title=name) for side, name in _PANELS]
    strip = [_label_strip(candidates, layers)] if candidates else []
    chart = alt.vconcat(*strip, *panels, spacing=8)
    found = counted(len(candidates), "candidate")
    return dress(chart, title=title, subtitle=describe_source(known, model=model, more=found))


def _panel(
    peaks: Sequence[ActivationPeakRecord],
    candidates: Sequence[CandidateRecord],
    layers: Sequence[int],
    *,
    side: Literal["input", "output"],
    title: str,
) -> alt.LayerChart:
    rows = [_peak_row(each) for each in largest_by_layer(each for each in peaks if each.side == side)]
    marks = [_candidate_row(each, side=side) for each in candidates]
    marks = [row for row in marks if drawable(row["signed"])]
    domain = log_domain(row["size"] for row in (*rows, *marks))
    x = layer_axis(layers, labelled=side == "output")
    y = log_axis(domain, field="size", title=title)
    drawn = alt.Chart(values_of(rows)).encode(x=x, y=y)
    return alt.layer(
        candidate_rules(candidates, x),
        drawn.mark_line(color=INK, strokeWidth=1.5),
        drawn.mark_point(color=INK, filled=True, opacity=1, size=point_size(layers)).encode(tooltip=_peak_tooltip()),
        alt.Chart(values_of(marks))
        .mark_point(color=ACCENT, filled=True, opacity=1, size=110)
        .encode(x=x, y=y, tooltip=_candidate_tooltip(side)),
    ).properties(width=WIDTH, height=190)


def _label_strip(candidates: Sequence[CandidateRecord], layers: Sequence[int]) -> alt.Chart:
    """The coordinates above the panels, over their layers, in as many lanes as it takes."""
    low, high = layer_domain(layers)
    by_layer: dict[int, list[CandidateRecord]] = {}
    for each in sorted(candidates, key=lambda each: (each.layer, each.round)):
        by_layer.setdefault(each.layer, []).append(each)
    rows: list[dict[str, Any]] = []
    for layer, group in by_layer.items():
        more = f" +{len(group) - 1} more" if len(group) > 1 else ""
        text = group[0].coordinate + more
        half = len(text) * _LETTER / 2
        middle = min(max((layer - low) / (high - low) * WIDTH, half), WIDTH - half)
        everything = ", ".join(each.coordinate for each in group)
        rows.append({"text": text, "all": everything, "left": middle - half, "right": middle + half, "middle": middle})
    lanes = assign_lanes([(row["left"], row["right"]) for row in rows], gap=8)
    for row, lane in zip(rows, lanes, strict=True):
        row["lane"] = (max(lanes) - lane + 0.5) * _LANE
    return (
        alt.Chart(values_of(rows))
        .mark_text(color=ACCENT, fontSize=12, fontWeight=600, baseline="middle")
        .encode(
            x=alt.X("middle:Q", scale=alt.Scale(domain=[0, WIDTH]), axis=None),
            y=alt.Y("lane:Q", scale=alt.Scale(domain=[0, (max(lanes) + 1) * _LANE], reverse=True), axis=None),
            text="text:N",
            tooltip=alt.Tooltip("all:N", title="candidates"),
        )
        .properties(width=WIDTH, height=(max(lanes) + 1) * _LANE)
    )


def _peak_row(peak: ActivationPeakRecord) -> dict[str, Any]:
    return {
        "layer": peak.layer,
        "size": abs(peak.value),
        "signed": peak.value,
        "module": peak.module,
        "expert": "none" if peak.expert is None else str(peak.expert),
        "channel": peak.channel,
        "token": show_place(peak.token_text, peak.token),
        "prompt": peak.prompt,
    }


def _candidate_row(candidate: CandidateRecord, *, side: Literal["input", "output"]) -> dict[str, Any]:
    value = candidate.input_peak if side == "input" else candidate.output_peak
    return {
        "layer": candidate.layer,
        "size": abs(value),
        "signed": value,
        "coordinate": candidate.coordinate,
        "module": candidate.module,
        "weight": candidate.value,
        "rank": candidate.rank,
        "share": candidate.share,
        "token": show_place(candidate.token_text, candidate.token),
        "prompt": candidate.prompt,
        "round": candidate.round,
    }


def _peak_tooltip() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("layer:Q"),
        alt.Tooltip("module:N"),
        alt.Tooltip("expert:N"),
        alt.Tooltip("signed:Q", title="value", format=".5~g"),
        alt.Tooltip("channel:Q"),
        alt.Tooltip("token:N"),
        alt.Tooltip("prompt:Q"),
    ]


def _candidate_tooltip(side: str) -> list[alt.Tooltip]:
    return [
        alt.Tooltip("coordinate:N", title="candidate"),
        alt.Tooltip("module:N"),
        alt.Tooltip("weight:Q", format=".5~g"),
        alt.Tooltip("rank:Q", title="rank of |weight|", format=","),
        alt.Tooltip("signed:Q", title=side, format=".5~g"),
        alt.Tooltip("share:Q", title="share of output", format=".1%"),
        alt.Tooltip("token:N"),
        alt.Tooltip("prompt:Q"),
        alt.Tooltip("round:Q"),
    ]
