"""What it does to a model to multiply its super weights: perplexity ratio and mean task accuracy over the factor.

Source: figure 6 of "The Super Weight in Large Language Models", arXiv 2411.07191.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from superweights.errors import UsageError
from superweights.report.appearance import (
    ACCENT,
    INK,
    MUTED,
    QUIET,
    WIDTH,
    Interval,
    counted,
    describe_source,
    dot_row,
    dress,
    ends_of,
    linear_domain,
    log_axis,
    log_domain,
    mean_scores,
    measured,
    number_axis,
    percent,
    shorten,
    show_interval,
    show_number,
    task_scores,
    values_of,
)
from superweights.results.records import MeasurementRecord, Record

_HEIGHT = 230  # pixels
_NEAR = 1.1
"""Ratio below which a second panel shows what the first, with its wide range, cannot."""
_WIDE = 10
"""Largest over smallest ratio from which an axis is in powers."""


@dataclass(frozen=True, slots=True)
class _Point:
    factor: float
    value: float
    interval: Interval | None


def scaling_chart(records: Iterable[Record], *, title: str, model: str = "") -> alt.TopLevelMixin:
    """Perplexity ratio over the factor of the weights, with its interval as a band; a panel for each data set.

    Another panel shows ratios below 1.1 where the first goes beyond, and one the mean accuracy where tasks were run. A ring
    marks the best factor. At factor 1 the ratio is 1 by definition. What is not finite is named at the top. The subtitle has
    the gain on windows that had no say in the factor, where it was measured.

    Args:
        records: needs perplexity ratios of models with scaled weights; scores of tasks add a panel.
        title: the chart's title.
        model: named in the subtitle.

    Raises:
        UsageError: there is no finite ratio of a scaled model to draw.
    """
    known = list(records)
    ratios: dict[str, dict[float, _Point]] = {}
    for each in measured(known, "perplexity_ratio"):
        if (factor := _factor(each)) is not None:
            points = ratios.setdefault(each.dataset or "text", {1.0: _Point(1.0, 1.0, (1.0, 1.0))})
            points[factor] = _Point(factor, each.value, each.interval)
    if not any(math.isfinite(each.value) for points in ratios.values() for each in points.values() if each.factor != 1):
        raise UsageError(
            "Cannot draw the scaling: the records hold no finite perplexity ratio with the factor of its weights. "
            "`superweights scale` records them."
        )
    panels = [
        panel
        for dataset, points in ratios.items()
        for panel in _ratio_panels(list(points.values()), title=f"perplexity / original, {shorten(dataset, length=18)}")
    ]
    chart = alt.vconcat(*panels, *_score_panels(task_scores(known)), spacing=18)
    return dress(chart, title=title, subtitle=describe_source(known, model=model, more=_held_out(known)))


def _held_out(records: Iterable[Record]) -> str:
    gains = list(measured(records, "best_factor_gain"))
    listed = ", ".join(f"{show_number(each.value)} ({show_interval(each.interval)})" for each in gains)
    real = any(each.interval is not None and each.interval[1] < 1 for each in gains)
    verdict = "a real gain" if real else "no real gain"
    return f"best factor, on windows that did not choose it: {listed}, {verdict}" if listed else ""


def _factor(each: MeasurementRecord) -> float | None:
    """The factor of the weights, 1 in the unedited model; None where something else was done to it."""
    factor = each.intervention.get("factor") if each.intervention.get("kind") == "scale" else None
    return 1.0 if not each.intervention else float(factor) if isinstance(factor, int | float) else None


def _ratio_panels(points: Sequence[_Point], *, title: str) -> list[alt.LayerChart]:
    near = [each for each in points if each.value < _NEAR]
    ends = _ends(points)
    zoomed = max(ends) > _NEAR and len(near) > 1
    panels = [_panel(points, ends, title=title, log=max(ends) > _WIDE * min(ends))]
    close = [end for end in _ends(near) if end <= _NEAR]
    return [*panels, _panel(points, close, title="the same, near 1")] if zoomed else panels


def _score_panels(scores: Sequence[MeasurementRecord]) -> list[alt.LayerChart]:
    factors = {factor for each in scores if (factor := _factor(each)) is not None}
    means = mean_scores({factor: [each for each in scores if _factor(each) == factor] for factor in factors})
    points = [_Point(factor, 100 * each.value, percent(each.interval)) for factor, each in means.items()]
    names = {f"accuracy, %, mean of {counted(each.count, 'task')}" for each in means.values()}
    return [_panel(points, _ends(points), title=name, sign=-1) for name in names]


def _ends(points: Iterable[_Point]) -> list[float]:
    return [end for each in points for end in ends_of(each.value, each.interval)]


def _panel(
    points: Sequence[_Point], ends: Sequence[float], *, title: str, log: bool = False, sign: int = 1
) -> alt.LayerChart:
    """A line with its band, and a ring at the smallest value times `sign`, which is named beside the panel."""
    domain = log_domain(ends) if log else linear_domain(ends)
    y = log_axis(domain, field="place", title=title) if log else number_axis(domain, title=title, channel=alt.Y)
    rows = _rows(points, limits=(domain[0], max(_ends(points), default=domain[1])))
    finite = [row for row in rows if row["finite"]]
    best = sorted(finite, key=lambda row: sign * row["place"])[:1]
    drawn = alt.Chart(values_of(rows)).encode(x=_factor_axis(points), y=y)
    reference = alt.Chart(values_of([row for row in finite if row["factor"] == 1]))
    lost = alt.Chart(values_of([row for row in rows if not row["finite"]]))
    ring = alt.Chart(values_of(best)).encode(y="place:Q")
    return alt.layer(
        drawn.mark_area(color=INK, opacity=0.18, clip=True).encode(y="low:Q", y2="high:Q"),
        reference.mark_rule(color=QUIET, strokeWidth=1.5).encode(y="place:Q"),
        drawn.mark_line(color=INK, strokeWidth=2, clip=True),
        drawn.mark_point(color=INK, filled=True, opacity=1, size=36, clip=True).encode(tooltip=_tooltip()),
        lost.mark_text(color=MUTED, fontSize=12, baseline="top").encode(x="factor:Q", y=alt.value(3), text="value:N"),
        ring.mark_point(size=190, strokeWidth=2, color=ACCENT, opacity=1).encode(x="factor:Q"),
        ring.mark_text(align="left", baseline="middle", fontSize=12, fontWeight=600, color=ACCENT).encode(
            x=alt.value(WIDTH + 8), text="best:N"
        ),
    ).properties(width=WIDTH, height=_HEIGHT)


def _rows(points: Sequence[_Point], *, limits: Interval) -> list[dict[str, Any]]:
    """By factor; what is not finite has no place, and breaks the line."""
    rows = [
        {**dot_row(limits, each.value, each.interval), "factor": each.factor, "best": _best_name(each)}
        for each in sorted(points, key=lambda each: each.factor)
    ]
    return [row if row["finite"] else row | {"place": None, "low": None, "high": None} for row in rows]


def _best_name(point: _Point) -> str:
    return "no factor is better" if point.factor == 1 else f"best at {point.factor:g}: {show_number(point.value)}"


def _factor_axis(points: Sequence[_Point]) -> alt.X:
    factors = sorted({each.factor for each in points})
    axis = alt.Axis(values=factors, format="~g", grid=False, labelOverlap="greedy", labelSeparation=4)
    scale = alt.Scale(domain=list(linear_domain(factors)), nice=False, zero=False)
    return alt.X("factor:Q", title="factor of the super weights", scale=scale, axis=axis)


def _tooltip() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("factor:Q", format="~g"),
        alt.Tooltip("value:N"),
        alt.Tooltip("interval:N", title="95 % interval"),
    ]
