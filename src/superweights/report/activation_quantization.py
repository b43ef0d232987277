"""What rounding activations costs: perplexity over the original and KL to it, one row for each condition.

Source: tables 3 to 5 of "The Super Weight in Large Language Models", arXiv 2411.07191.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import altair as alt

from superweights.errors import UsageError
from superweights.report.appearance import (
    INK,
    MUTED,
    counted,
    describe_source,
    dot_row,
    dots,
    dress,
    mean_accuracies,
    measured,
    measured_axis,
    original_rule,
    row_axis,
    shorten,
    show_interval,
    show_number,
    steps_of,
    task_scores,
    value_column,
    values_of,
)
from superweights.results.records import MeasurementRecord, Record

_WIDTH, _ROW = 330, 40  # pixels of a panel, and of a row
_WIDE = 100
"""Largest over smallest value from which an axis is in powers: less would hide that the least cost is next to nothing."""
_TITLES = {"perplexity_ratio": "perplexity / original", "kl_to_original": "KL to the original, nats per token"}
_ORIGINAL = {"perplexity_ratio": 1.0, "kl_to_original": 0.0}
"""What the original has by definition."""


@dataclass(frozen=True, slots=True)
class _Panel:
    """One quantity of all conditions, with words at the right of their rows."""

    title: str
    found: list[MeasurementRecord]
    original: float | None
    words: Mapping[str, str]
    heading: str = ""
    """What the words are."""


def activation_quantization_chart(records: Iterable[Record], *, title: str, model: str = "") -> alt.TopLevelMixin:
    """A row for the original and for each condition: perplexity ratio, KL, and mean accuracy where tasks were run.

    Words at the right are the perplexity, and KL over that of naive rounding. A dashed line is the original. An infinite value
    is an arrow head at the edge, one that is not a number has its value in words only.

    Args:
        records: needs KL or perplexity ratios of quantized activations.
        title: the chart's title.
        model: named in the subtitle.

    Raises:
        UsageError: there is no such measurement.
    """
    known = list(records)
    found = [each for each in measured(known, *_TITLES) if _drawn(each) and not each.subject]
    if not any("quantize activations" in steps_of(each) for each in found):
        raise UsageError(
            "Cannot draw what rounding activations costs: the records hold no KL or perplexity ratio of quantized "
            "activations. `superweights quantize MODEL --activations` records them."
        )
    datasets = list(dict.fromkeys(each.dataset or "text" for each in found))
    panels = [panel for dataset in datasets for panel in _text_panels(known, found, dataset, several=len(datasets) > 1)]
    panels += _score_panels(known)
    whole = [*measured(known, "perplexity"), *task_scores(known)]
    original = next((each.condition for each in whole if not each.intervention), None)
    conditions = [each.condition for panel in panels for each in panel.found]
    names = list(dict.fromkeys([*([] if original is None else [original]), *conditions]))
    drawn = [_draw(panel, names, original, labelled=panel is panels[0]) for panel in panels]
    source = describe_source(known, model=model, more=", ".join(datasets))
    return dress(alt.hconcat(*drawn, spacing=28), title=title, subtitle=source)


def _drawn(each: MeasurementRecord) -> bool:
    """Whether a condition rounds activations, or is the one beside them that rounds weights alone."""
    steps = steps_of(each)
    return "quantize activations" in steps or (steps == {"quantize weights"} and ", " not in each.condition)


def _text_panels(
    known: Sequence[Record], found: Sequence[MeasurementRecord], dataset: str, *, several: bool
) -> list[_Panel]:
    """Perplexity ratio and KL on one data set."""
    here = [each for each in measured(known, "perplexity", "kl_over_naive") if (each.dataset or "text") == dataset]
    words = {
        "perplexity_ratio": {each.condition: show_number(each.value) for each in here if each.name == "perplexity"},
        "kl_to_original": {each.condition: _over_naive(each) for each in here if each.name == "kl_over_naive"},
    }
    panels = []
    for name, heading in _TITLES.items():
        own = [each for each in found if each.name == name and (each.dataset or "text") == dataset]
        lost = {each.condition: show_number(each.value) for each in own if not math.isfinite(each.value)}
        title = f"{heading}, {shorten(dataset, length=18)}" if several else heading
        said = {**words[name], **lost} if name == "kl_to_original" else {**lost, **words[name]}
        above = "perplexity" if name == "perplexity_ratio" and words[name] else ""
        panels.append(_Panel(title, own, _ORIGINAL[name], said, above))
    return [each for each in panels if each.found]


def _over_naive(each: MeasurementRecord) -> str:
    interval = f" ({show_interval(each.interval)})" if each.interval else ""
    return f"{show_number(each.value)} × naive{interval}"


def _score_panels(known: Sequence[Record]) -> list[_Panel]:
    """Mean accuracy, where there are tasks that all conditions have."""
    means = mean_accuracies(each for each in task_scores(known) if _drawn(each) or not each.intervention)
    original = next((each.value for each in means if not each.intervention), None)
    words = {each.condition: f"{each.value:.1f}" for each in means}
    edited = any(each.intervention for each in means)
    return [_Panel(f"accuracy, %, mean of {counted(means[0].count, 'task')}", means, original, words)] if edited else []


def _draw(panel: _Panel, names: Sequence[str], original: str | None, *, labelled: bool) -> alt.LayerChart:
    hold = [] if panel.original is None else [panel.original]
    domain, x = measured_axis(panel.found, title=panel.title, hold=hold, wide=_WIDE)
    y = row_axis(names, labelled=labelled)
    rows = [{**dot_row(domain, each.value, each.interval), "name": each.condition} for each in panel.found]
    own = [each for each in hold if domain[0] < each < domain[1]]  # no KL of 0 on an axis in powers
    said = dict(panel.words)
    if original is not None and original not in [row["name"] for row in rows]:
        rows += [{**dot_row(domain, each, None), "name": original} for each in own]
        said |= {} if own or panel.original is None else {original: show_number(panel.original)}
    words = [{"name": name, "text": said[name]} for name in names if name in said]
    tooltip = [
        alt.Tooltip("name:N", title="condition"),
        alt.Tooltip("value:N"),
        alt.Tooltip("interval:N", title="95 % interval"),
    ]
    above = alt.Chart(values_of([{"text": panel.heading}])).mark_text(
        align="left", baseline="bottom", fontSize=11, color=MUTED
    )
    return alt.layer(
        *(part for each in own for part in original_rule(each, x=x, named=original is None)),
        *dots(rows, x=x, y=y, color=alt.value(INK), tooltip=tooltip),
        *([value_column(words, width=_WIDTH, y=y, color=alt.value(INK))] if words else []),
        *([above.encode(x=alt.value(_WIDTH + 10), y=alt.value(-4), text="text:N")] if panel.heading else []),
    ).properties(width=_WIDTH, height=len(names) * _ROW)
