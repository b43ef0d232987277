"""What a model says next, before and after an edit: mean next-token probabilities, one row for each token.

Source: figure 5 of "The Super Weight in Large Language Models", arXiv 2411.07191.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from superweights.errors import UsageError
from superweights.report.appearance import (
    ACCENT,
    COLORS,
    INK,
    Interval,
    describe_source,
    dot_row,
    dress,
    dumbbells,
    ends_of,
    measured,
    number_axis,
    percent,
    row_axis,
    shorten,
    show_token,
    told_apart,
    value_column,
)
from superweights.results.records import MeasurementRecord, Record

_PANEL, _ROW = 520, 26  # pixels: width of a panel, height of a row
_MOST = 10
"""Tokens of one panel."""
_ORIGINAL = "original"

_Table = dict[str, dict[str, MeasurementRecord]]
"""Probabilities by token and condition."""


def stop_words_chart(records: Iterable[Record], *, title: str, model: str = "") -> alt.TopLevelMixin:
    """Two panels of tokens: the ten that the original finds most likely, and the ten others that the edits change most.

    Each row joins the probability under the original with those under the edits, in percent. The subtitle has the total
    probability of stop words where it was measured.

    Args:
        records: needs next-token probabilities of the original.
        title: the chart's title.
        model: named in the subtitle.

    Raises:
        UsageError: there is no probability under the original to draw.
    """
    known = list(records)
    table: _Table = {}
    for each in measured(known, "next_token_probability"):
        if math.isfinite(each.value) or each.condition != _ORIGINAL:
            table.setdefault(each.subject, {})[each.condition] = each
    table = {token: row for token, row in table.items() if _ORIGINAL in row}
    if not table:
        raise UsageError(
            "Cannot draw stop words: the records hold no next-token probability of the original. "
            "`superweights stopwords` records them."
        )
    conditions = list(dict.fromkeys([_ORIGINAL, *(name for row in table.values() for name in row)]))
    likely = sorted(table, key=lambda token: -table[token][_ORIGINAL].value)[:_MOST]
    changed = sorted((token for token in table if _change(table[token]) > 0), key=lambda token: -_change(table[token]))
    others = [token for token in changed if token not in likely][:_MOST]
    chosen = (("most likely in the original", likely), ("changed most among the others", others))
    ends = [end for token in (*likely, *others) for each in table[token].values() for end in _ends(each)]
    domain = (0.0, 1.05 * max(ends) or 1.0)
    panels = [_panel(table, tokens, conditions, domain, title=name) for name, tokens in chosen if tokens]
    source = describe_source(known, model=model, more=_headline(measured(known, "stop_word_mass")))
    return dress(alt.vconcat(*panels, spacing=22), title=title, subtitle=source)


def _change(row: dict[str, MeasurementRecord]) -> float:
    """The largest change of a token by any edit."""
    changes = (abs(each.value - row[_ORIGINAL].value) for each in row.values())
    return max(each for each in changes if math.isfinite(each))


def _headline(masses: Sequence[MeasurementRecord]) -> str:
    named = (f"{each.condition} {100 * each.value:.3g} %" for each in masses)
    return shorten(f"stop words: {', '.join(named)}", length=100) if masses else ""


def _panel(
    table: _Table, tokens: Sequence[str], conditions: Sequence[str], domain: Interval, *, title: str
) -> alt.LayerChart:
    rows = [_row(table[token][name], domain) for name in conditions for token in tokens if name in table[token]]
    x = number_axis(domain, title="mean next-token probability, %")
    y = row_axis([show_token(token) for token in tokens])
    marks = told_apart("condition", conditions, colors=(INK, ACCENT, *COLORS[1:]))
    layers = dumbbells(rows, series="condition", x=x, y=y, **marks, tooltip=_tooltip())
    if len(conditions) == 2:
        texts = [{"name": show_token(token), "text": _arrow(table[token], conditions)} for token in tokens]
        layers.append(value_column(texts, width=_PANEL, y=y, color=alt.value(INK)))
    heading = alt.TitleParams(title, anchor="start", frame="group", fontSize=13, offset=6)
    return alt.layer(*layers).properties(width=_PANEL, height=_ROW * len(tokens), title=heading)


def _arrow(row: dict[str, MeasurementRecord], conditions: Sequence[str]) -> str:
    return " → ".join(f"{100 * row[name].value:.2f}" if name in row else "none" for name in conditions) + " %"


def _ends(each: MeasurementRecord) -> list[float]:
    return ends_of(100 * each.value, percent(each.interval))


def _row(each: MeasurementRecord, domain: Interval) -> dict[str, Any]:
    return {
        **dot_row(domain, 100 * each.value, percent(each.interval)),
        "name": show_token(each.subject),
        "condition": each.condition,
        "count": each.count,
    }


def _tooltip() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("name:N", title="token"),
        alt.Tooltip("condition:N"),
        alt.Tooltip("value:N", title="%"),
        alt.Tooltip("interval:N", title="95 % interval, %"),
        alt.Tooltip("count:Q", title="prompts", format=","),
    ]
