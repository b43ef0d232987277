"""What edits cost: perplexity and mean task accuracy, one row for each condition.

Source: table 1 of "The Super Weight in Large Language Models", arXiv 2411.07191.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from superweights.errors import UsageError
from superweights.report.appearance import (
    INK,
    QUIET,
    counted,
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
    row_axis,
    show_number,
    task_scores,
    told_apart,
    value_column,
    values_of,
)
from superweights.results.records import MeasurementRecord, Record

_LEFT, _RIGHT = 400, 260  # pixels: widths of the panels
_ROW, _LINE = 18, 17  # pixels: a row without its lines, and one line for each data set


def ablation_chart(records: Iterable[Record], *, title: str, model: str = "") -> alt.TopLevelMixin:
    """A row for each condition, in order of appearance: perplexity on a log axis, and accuracy where tasks were run.

    A dashed line is at the first condition's perplexity. An infinite perplexity is an arrow head at the right edge, one that
    is not a number has its value in words only. A dot of accuracy is the mean over the tasks that all conditions have, a
    grey tick is a task.

    Args:
        records: needs perplexities, of one or several data sets, or scores of tasks.
        title: the chart's title.
        model: named in the subtitle.

    Raises:
        UsageError: there is neither a perplexity nor a score to draw.
    """
    known = list(records)
    perplexities = [each for each in measured(known, "perplexity") if not each.subject]  # a task's is of another scale
    scores = task_scores(known)
    if not (perplexities or scores):
        raise UsageError("Cannot draw an ablation: the records hold no perplexity. `superweights ablate` records it.")
    names = list(dict.fromkeys(each.condition for each in (*perplexities, *scores)))
    datasets = list(dict.fromkeys(_dataset(each) for each in perplexities))
    size = {"height": len(names) * (_ROW + _LINE * max(1, len(datasets)))}
    panels = [_perplexity_panel(perplexities, names, datasets).properties(width=_LEFT, **size)] if perplexities else []
    panels += [_score_panel(scores, names, labelled=not panels).properties(width=_RIGHT, **size)] if scores else []
    source = describe_source(known, model=model, more=datasets[0] if len(datasets) == 1 else "")
    return dress(alt.hconcat(*panels, spacing=28), title=title, subtitle=source)


def _perplexity_panel(
    perplexities: Sequence[MeasurementRecord], names: Sequence[str], datasets: Sequence[str]
) -> alt.LayerChart:
    domain = log_domain(end for each in perplexities for end in ends_of(each.value, each.interval))
    rows = [_row(each, domain) for each in perplexities]
    marks = told_apart("dataset", datasets)
    lines = {"y": row_axis(names), "yOffset": alt.YOffset("dataset:N", scale=alt.Scale(domain=list(datasets)))}
    x = log_axis(domain, field="place", title="perplexity", channel=alt.X)
    first = alt.Chart(values_of([row for row in rows if row["name"] == names[0] and row["finite"]]))
    return alt.layer(
        first.mark_rule(strokeDash=[3, 3], opacity=0.6).encode(x=x, color=marks["color"]),
        *dots(rows, x=x, **lines, **marks, tooltip=_tooltip("dataset", "windows")),
        value_column(rows, width=_LEFT, **lines, color=marks["color"]),
    )


def _score_panel(scores: Sequence[MeasurementRecord], names: Sequence[str], *, labelled: bool) -> alt.LayerChart:
    groups = {name: [each for each in scores if each.condition == name] for name in names}
    means = mean_scores({name: group for name, group in groups.items() if group}).values()
    ends = [end for each in scores for end in ends_of(each.value, None)]
    ends += [end for each in means for end in ends_of(each.value, each.interval)]
    domain = linear_domain(100 * end for end in ends)
    rows = [_row(each, domain, percent=True) for each in means]
    x, y = number_axis(domain, title=_score_title(means)), row_axis(names, labelled=labelled)
    return alt.layer(
        alt.Chart(values_of([_row(each, domain, percent=True) for each in scores]))
        .mark_tick(color=QUIET, thickness=2, height=14)
        .encode(x=x, y=y, tooltip=_tooltip("task", "items")),
        *dots(rows, x=x, y=y, color=alt.value(INK), tooltip=_tooltip("what", "tasks")),
        value_column(rows, width=_RIGHT, y=y, color=alt.value(INK)),
    )


def _score_title(means: Iterable[MeasurementRecord]) -> str:
    count = next((each.count for each in means), 0)
    return f"accuracy, % (dot: mean of {counted(count, 'task')})" if count else "accuracy, % (no task in common)"


def _dataset(each: MeasurementRecord) -> str:
    return each.dataset or "text"


def _row(each: MeasurementRecord, domain: tuple[float, float], *, percent: bool = False) -> dict[str, Any]:
    scale = 100 if percent else 1
    interval = each.interval and (scale * each.interval[0], scale * each.interval[1])
    return {
        **dot_row(domain, scale * each.value, interval),
        "text": f"{scale * each.value:.1f}" if percent else show_number(each.value),
        "name": each.condition,
        "dataset": _dataset(each),
        "task": f"{each.subject} {each.name}",
        "what": "mean over tasks",
        "count": each.count,
    }


def _tooltip(about: str, items: str) -> list[alt.Tooltip]:
    return [
        alt.Tooltip("name:N", title="condition"),
        alt.Tooltip(f"{about}:N", title=about),
        alt.Tooltip("value:N"),
        alt.Tooltip("interval:N", title="95 % interval"),
        alt.Tooltip("count:Q", title=items, format=","),
    ]
