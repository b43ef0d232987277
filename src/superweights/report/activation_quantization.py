"""What rounding activations costs: KL to the original and perplexity over it, one row for each condition.

Source: tables 3 to 5 of "The Super Weight in Large Language Models", arXiv 2411.07191.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from superweights.errors import UsageError
from superweights.report.appearance import (
    INK,
    QUIET,
    describe_source,
    dot_row,
    dots,
    dress,
    ends_of,
    linear_domain,
    measured,
    number_axis,
    row_axis,
    show_number,
    value_column,
    values_of,
)
from superweights.results.records import MeasurementRecord, Record

_WIDTH, _ROW = 330, 40  # pixels of a panel, and of a row
_TITLES = {"kl_to_original": "KL to the original, nats per token", "perplexity_ratio": "perplexity / original"}


def activation_quantization_chart(records: Iterable[Record], *, title: str, model: str = "") -> alt.TopLevelMixin:
    """A panel of KL, with the ratio to that of naive rounding beside it in words, and one of the perplexity ratio.

    Args:
        records: needs KL or perplexity ratios of quantized activations.
        title: the chart's title.
        model: named in the subtitle.

    Raises:
        UsageError: there is no such measurement.
    """
    known = list(records)
    found = [each for each in measured(known, *_TITLES) if not each.subject]
    if not found:
        raise UsageError(
            "Cannot draw what rounding activations costs: the records hold no KL or perplexity ratio. "
            "`superweights quantize MODEL --activations` records them."
        )
    names = list(dict.fromkeys(each.condition for each in found))
    over = {each.condition: f"× {show_number(each.value)}" for each in measured(known, "kl_over_naive")}
    panels = [
        _panel([each for each in found if each.name == name], heading, names, over if name == "kl_to_original" else {})
        for name, heading in _TITLES.items()
    ]
    datasets = ", ".join(dict.fromkeys(each.dataset or "" for each in found))
    more = f"{datasets} · × is KL over that of naive rounding" if over else datasets
    source = describe_source(known, model=model, more=more)
    return dress(alt.hconcat(*panels, spacing=90), title=title, subtitle=source)


def _panel(
    found: Sequence[MeasurementRecord], heading: str, names: Sequence[str], over: dict[str, str]
) -> alt.LayerChart:
    ends = [end for each in found for end in ends_of(each.value, each.interval)]
    start = 0.0 if heading == _TITLES["kl_to_original"] else 1.0
    domain = linear_domain([start, *ends])
    rows: list[dict[str, Any]] = [
        {**dot_row(domain, each.value, each.interval), "name": each.condition, "text": over.get(each.condition, "")}
        for each in found
    ]
    x, y = number_axis(domain, title=heading), row_axis(names, labelled=heading == _TITLES["kl_to_original"])
    tooltip = [
        alt.Tooltip("name:N", title="condition"),
        alt.Tooltip("value:N"),
        alt.Tooltip("interval:N", title="95 % interval"),
    ]
    reference = alt.Chart(values_of([{"original": start}])).mark_rule(color=QUIET, strokeDash=[3, 3])
    return alt.layer(
        reference.encode(x=alt.X("original:Q")),
        *dots(rows, x=x, y=y, color=alt.value(INK), tooltip=tooltip),
        *(
            [value_column([row for row in rows if row["text"]], width=_WIDTH, y=y, color=alt.value(INK))]
            if over
            else []
        ),
    ).properties(width=_WIDTH, height=len(names) * _ROW)
