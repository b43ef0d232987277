"""What rounding weights costs, by scheme and method: KL to the original and perplexity over it.

Source: figure 7 of "The Super Weight in Large Language Models", arXiv 2411.07191.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import altair as alt

from superweights.errors import UsageError
from superweights.quantization.scheme import Scheme
from superweights.report.appearance import (
    COLORS,
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
    show_number,
    steps_of,
    task_scores,
    told_apart,
    value_column,
    values_of,
)
from superweights.results.records import MeasurementRecord, Record

_WIDTH, _HEIGHT = 420, 300  # pixels of a panel of lines
_ROWS_WIDTH = 340  # pixels of a panel of rows
_ROW, _LINE = 14, 13  # pixels: a row without its lines, and one line for each method
_STEP = 4  # pixels from the interval of one method to that of the next where all have the same place
_LARGEST, _SMALLEST = 150, 30  # square pixels: the first method's point and the last one's
_TEXT_LINE = 13  # pixels
_COLORS = (INK, *COLORS[1:4], "#4a9ad4", "#8c2f45")
"""Also apart for readers who see two hues of three."""
_TITLES = {"kl_to_original": "KL to the original, nats per token", "perplexity_ratio": "perplexity / original"}
_SHARINGS = {"group": "groups", "block": "blocks", "tile": "tiles"}
_SAME_BITS = 0.05
"""Bits per weight by which methods of a scheme may differ and still be named by one number."""


@dataclass(frozen=True, slots=True)
class _Panel:
    """One quantity of all schemes and methods."""

    title: str
    found: list[MeasurementRecord]
    original: float | None
    """That of the original; None where it has no line."""


def weight_quantization_chart(records: Iterable[Record], *, title: str, model: str = "") -> alt.TopLevelMixin:
    """A panel of KL, one of the perplexity ratio, and one of mean accuracy where tasks were run.

    Where schemes differ in nothing but the number of weights that share a scale, that number is the x axis and each method a
    line, as in the paper; else each scheme is a row, those with most bits per weight first. A dashed line is the original. An
    infinite value is an arrow head at the edge, one that is not a number has its value in words only.

    Args:
        records: needs measurements under conditions named "SCHEME, METHOD". KL on windows that were not scored, as it chooses a
            clip, is left out.
        title: the chart's title.
        model: named in the subtitle.

    Raises:
        UsageError: there is no such measurement.
    """
    known = list(records)
    panels = [*_text_panels(known), *_score_panels(known)]
    if not panels:
        raise UsageError(
            "Cannot draw what rounding weights costs: the records hold no KL, perplexity ratio or task scores of quantized "
            "weights. `superweights quantize MODEL --compare` or `--measure` records them."
        )
    found = [each for panel in panels for each in panel.found]
    methods = list(dict.fromkeys(_parts(each)[1] for each in found))
    schemes = list(dict.fromkeys(_parts(each)[0] for each in found))
    bits = {each.condition: each.value for each in measured(known, "bits_per_weight")}
    series = _series(schemes)
    if series:
        drawn = [_lines(panel, methods, series, bits) for panel in panels]
    else:
        rows, slots = _row_names(schemes, bits), _slots((_parts(each) for each in found), methods)
        drawn = [_rows(panel, slots, methods, rows, bits, labelled=panel is panels[0]) for panel in panels]
    datasets = ", ".join(dict.fromkeys(each.dataset or "text" for each in found if each.name in _TITLES))
    about = " · ".join(part for part in (datasets, _series_name(series)) if part)
    source = describe_source(known, model=model, more=about)
    return dress(alt.hconcat(*drawn, spacing=28), title=title, subtitle=source)


def _text_panels(known: Sequence[Record]) -> list[_Panel]:
    """KL and ratio, of each data set."""
    found = [each for each in measured(known, *_TITLES) if _parts(each)[0] and not each.subject]
    scored = {_windows(each) for each in found if each.name == "perplexity_ratio"}
    found = [each for each in found if not scored or _windows(each) in scored]
    datasets = list(dict.fromkeys(each.dataset or "text" for each in found))
    panels = [
        _Panel(
            f"{heading}, {shorten(dataset, length=18)}" if len(datasets) > 1 else heading,
            [each for each in found if each.name == name and (each.dataset or "text") == dataset],
            1.0 if name == "perplexity_ratio" else None,
        )
        for dataset in datasets
        for name, heading in _TITLES.items()
    ]
    return [each for each in panels if each.found]


def _windows(each: MeasurementRecord) -> tuple[str, str | None, str | None, int]:
    """A condition and the windows it was measured on."""
    return each.condition, each.dataset, each.dataset_digest, each.count


def _score_panels(known: Sequence[Record]) -> list[_Panel]:
    """Mean accuracy, where there are tasks that all conditions have."""
    means = mean_accuracies(each for each in task_scores(known) if _parts(each)[0] or not each.intervention)
    found = [each for each in means if _parts(each)[0]]
    original = next((each.value for each in means if not each.intervention), None)
    return [_Panel(f"accuracy, %, mean of {counted(found[0].count, 'task')}", found, original)] if found else []


def _parts(each: MeasurementRecord) -> tuple[str, str]:
    """Scheme and method of a condition; empty where it is not about quantized weights alone."""
    scheme, _, method = each.condition.partition(", ")
    steps = steps_of(each)
    return (scheme, method) if method and steps and steps <= {"quantize weights", "load weights"} else ("", "")


def _series(schemes: Sequence[str]) -> list[Scheme]:
    """The schemes by size, where they differ in nothing else; else none."""
    try:
        parsed = [Scheme.parse(each) for each in schemes]
    except UsageError:  # what another package made has the name of the package
        return []
    alike = len({(each.kind, each.bits, each.sharing, each.offset) for each in parsed}) == 1
    apart = len({_shared(each) for each in parsed}) == len(parsed) > 1
    return sorted(parsed, key=_shared) if alike and apart and parsed[0].sharing in _SHARINGS else []


def _shared(scheme: Scheme) -> int:
    rows, cols = scheme.size
    return rows * cols


def _row_names(schemes: Sequence[str], bits: Mapping[str, float]) -> dict[str, str]:
    """Each scheme with its bits per weight, most bits first; those without a number last."""
    known = {each: _bits_of(each, bits) for each in schemes}
    ordered = sorted(schemes, key=lambda each: -min(known[each], default=-1.0))
    return {each: ", ".join([each, *(f"{shown} bits" for shown in _show_bits(known[each]))]) for each in ordered}


def _bits_of(scheme: str, bits: Mapping[str, float]) -> list[float]:
    return [value for condition, value in bits.items() if condition.partition(", ")[0] == scheme]


def _show_bits(found: Sequence[float]) -> list[str]:
    """Bits per weight in words, from the least to the most of methods; nothing where there is none."""
    ends = [min(found), max(found)] if found else []
    wide = bool(ends) and ends[1] - ends[0] > _SAME_BITS
    return [" to ".join(show_number(end) for end in ends[: 1 + wide])] if ends else []


def _point(each: MeasurementRecord, domain: tuple[float, float], bits: Mapping[str, float]) -> dict[str, Any]:
    scheme, method = _parts(each)
    stored = show_number(bits[each.condition]) if each.condition in bits else "unknown"
    return {**dot_row(domain, each.value, each.interval), "name": scheme, "method": method, "bits": stored}


def _lines(
    panel: _Panel, methods: Sequence[str], series: Sequence[Scheme], bits: Mapping[str, float]
) -> alt.LayerChart:
    """A line for each method over the weights that share a scale.

    Points that coincide lie in each other, the first method's below and largest; intervals stand side by side.
    """
    hold = [] if panel.original is None else [panel.original]
    domain, y = measured_axis(panel.found, title=panel.title, channel=alt.Y, hold=hold)
    low, high, step = _spread(series, methods)
    rows = []
    for each in panel.found:
        scheme, method = _parts(each)
        shared, place = _shared(Scheme.parse(scheme)), methods.index(method)
        aside = shared * 2 ** (step * (place - (len(methods) - 1) / 2))
        size = _LARGEST - (_LARGEST - _SMALLEST) * place / max(1, len(methods) - 1)
        rows.append({**_point(each, domain, bits), "shared": shared, "aside": aside, "size": size})
    rows.sort(key=lambda row: -row["size"])
    marks = told_apart("method", methods, colors=_COLORS, by_shape=True)
    scale = alt.Scale(type="log", base=2, domain=[low, high], nice=False)
    x, aside_x = alt.X("shared:Q", scale=scale, axis=_size_axis(series, bits)), alt.X("aside:Q")
    line = alt.Chart(values_of([row if row["finite"] else row | {"place": None} for row in rows]))
    finite = alt.Chart(values_of([row for row in rows if row["finite"]]))
    bars = alt.Chart(values_of([row for row in rows if None not in (row["low"], row["high"])]))
    heads = alt.Chart(values_of([row for row in rows if not row["finite"] and row["place"] is not None]))
    lost = _lost(rows)
    above = -8 - _TEXT_LINE * max((row["text"].count("\n") + 1 for row in lost), default=0)
    looks = {"filled": True, "opacity": 1}
    return alt.layer(
        *([] if panel.original is None else original_rule(panel.original, y=y, width=_WIDTH)),
        bars.mark_rule(strokeWidth=3, opacity=0.4).encode(
            x=aside_x, y=alt.Y("low:Q"), y2="high:Q", color=marks["color"]
        ),
        line.mark_line(strokeWidth=1.5, opacity=0.7).encode(x=x, y=y, color=marks["color"]),
        finite.mark_point(**looks).encode(
            x=x, y=y, size=alt.Size("size:Q", scale=None, legend=None), tooltip=_tooltip(), **marks
        ),
        heads.mark_point(shape="triangle-up", size=80, **looks).encode(
            x=aside_x, y=y, color=marks["color"], tooltip=_tooltip()
        ),
        alt.Chart(values_of(lost))
        .mark_text(fontSize=11, lineHeight=_TEXT_LINE, color=MUTED, baseline="top", lineBreak="\n")
        .encode(x=x, y=alt.value(above), text="text:N"),
    ).properties(width=_WIDTH, height=_HEIGHT)


def _spread(series: Sequence[Scheme], methods: Sequence[str]) -> tuple[float, float, float]:
    """Ends of the axis of weights that share a scale, and the doublings from one method's interval to the next."""
    sizes = [_shared(each) for each in series]
    low, high = min(sizes) / 1.6, max(sizes) * 1.6
    doubling = _WIDTH / math.log2(high / low)  # pixels
    least = doubling * min(math.log2(after / before) for before, after in pairwise(sizes))
    return low, high, min(_STEP, 0.6 * least / len(methods)) / doubling


def _size_axis(series: Sequence[Scheme], bits: Mapping[str, float]) -> alt.Axis:
    """Each size, with the bits per weight below it."""
    labels = {_shared(each): [_size_label(each), *_show_bits(_bits_of(str(each), bits))] for each in series}
    return alt.Axis(
        title=f"weights that share a scale{'; bits per weight' if bits else ''}",
        values=list(labels),
        labelExpr=" : ".join(f"datum.value == {size} ? {lines}" for size, lines in labels.items()) + " : ''",
        grid=False,
        labelOverlap="greedy",
        labelSeparation=4,
    )


def _size_label(scheme: Scheme) -> str:
    rows, cols = scheme.size
    return f"{rows}²" if rows == cols else f"{rows} × {cols}" if rows > 1 else show_number(cols)


def _series_name(series: Sequence[Scheme]) -> str:
    """What schemes that differ in size have in common; nothing where there are none."""
    first = next(iter(series), None)
    if first is None:
        return ""
    return f"{first.kind}{first.bits} {_SHARINGS[first.sharing]}{'' if first.offset == 'sym' else f', {first.offset}'}"


def _lost(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is not finite at each size, a line of words for each method."""
    words: dict[int, list[str]] = {}
    for row in rows:
        if not row["finite"]:
            words.setdefault(row["shared"], []).append(f"{row['method']} {row['value']}")
    return [{"shared": shared, "text": "\n".join(lines)} for shared, lines in words.items()]


def _rows(
    panel: _Panel,
    slots: Mapping[tuple[str, str], int],
    methods: Sequence[str],
    names: Mapping[str, str],
    bits: Mapping[str, float],
    *,
    labelled: bool,
) -> alt.LayerChart:
    """A row for each scheme, a line in it for each method that it has."""
    hold = [] if panel.original is None else [panel.original]
    domain, x = measured_axis(panel.found, title=panel.title, hold=hold)
    rows = [
        {**_point(each, domain, bits), "name": names[_parts(each)[0]], "slot": slots[_parts(each)]}
        for each in panel.found
    ]
    marks = told_apart("method", methods, colors=_COLORS, by_shape=True)
    half_lines = list(range(max(slots.values()) + 1))
    lines = {
        "y": row_axis(list(names.values()), labelled=labelled),
        "yOffset": alt.YOffset("slot:O", scale=alt.Scale(domain=half_lines)),
    }
    lost = [{**row, "text": row["value"]} for row in rows if not row["finite"]]
    height = len(names) * (_ROW + _LINE * (len(half_lines) + 1) // 2)
    return alt.layer(
        *([] if panel.original is None else original_rule(panel.original, x=x)),
        *dots(rows, x=x, **lines, **marks, tooltip=_tooltip(), size=60),
        *([value_column(lost, width=_ROWS_WIDTH, **lines, color=marks["color"])] if lost else []),
    ).properties(width=_ROWS_WIDTH, height=height)


def _slots(conditions: Iterable[tuple[str, str]], methods: Sequence[str]) -> dict[tuple[str, str], int]:
    """Half lines from the top of a row to each method of its scheme, so that those of every scheme are in the middle."""
    own: dict[str, list[str]] = {}
    for scheme, method in dict.fromkeys(conditions):
        own.setdefault(scheme, []).append(method)
    most = max(map(len, own.values()))
    return {
        (scheme, method): most - len(found) + 2 * place
        for scheme, found in own.items()
        for place, method in enumerate(sorted(found, key=methods.index))
    }


def _tooltip() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("name:N", title="scheme"),
        alt.Tooltip("method:N"),
        alt.Tooltip("bits:N", title="bits per weight"),
        alt.Tooltip("value:N"),
        alt.Tooltip("interval:N", title="95 % interval"),
    ]
