"""One channel of the residual stream over many prompts: a heat map of prompts by layers."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from superweights.errors import UsageError
from superweights.report.appearance import (
    NUMBER,
    WIDTH,
    describe_source,
    drawable,
    dress,
    layer_axis,
    shorten,
    show_place,
    show_token,
    values_of,
)
from superweights.results.records import PersistenceRecord, PromptRecord, Record

_DECADES = 4
"""Powers of ten below the largest value that the colours tell apart; what is smaller has the lightest colour."""
_SHADES = ("#fff9f2", "#fde3cf", "#fdae6b", "#ef6c1a", "#b93a06", "#5e1c02")
_ROW, _TALLEST = 24, 720  # pixels: one prompt's row, the tallest panel


def persistence_chart(records: Iterable[Record], *, title: str, model: str = "") -> alt.TopLevelMixin:
    """A row for each prompt, a column for each layer, darker where |value| of the channel is larger (log scale).

    Several channels give one panel each, with one scale. A value that is not finite is left blank.

    Args:
        records: needs persistence records; prompt records tell equal texts with and without BOS apart.
        title: the chart's title.
        model: named in the subtitle.

    Raises:
        UsageError: there is no persistence to draw.
    """
    known = list(records)
    cells = [each for each in known if isinstance(each, PersistenceRecord)]
    largest = max((abs(each.value) for each in cells if drawable(each.value)), default=None)
    if largest is None:
        raise UsageError("Cannot draw persistence: the records hold no value of it. `superweights trace` records them.")
    names = _row_names(cells, [each for each in known if isinstance(each, PromptRecord)])
    panels = [
        _panel([each for each in cells if each.channel == channel], names, largest=largest)
        for channel in dict.fromkeys(each.channel for each in cells)
    ]
    return dress(alt.vconcat(*panels, spacing=24), title=title, subtitle=describe_source(known, model=model))


def _panel(cells: Sequence[PersistenceRecord], names: dict[int, str], *, largest: float) -> alt.Chart:
    layers = sorted({each.layer for each in cells})
    prompts = sorted({each.prompt for each in cells})
    color = alt.Color(
        "size:Q",
        title="|value|",
        scale=alt.Scale(type="log", domain=[largest / 10**_DECADES, largest], range=list(_SHADES), clamp=True),
        legend=alt.Legend(format=NUMBER, gradientLength=120, tickCount=_DECADES),
    )
    return (
        alt.Chart(values_of([_row(each, names) for each in cells]))
        .mark_rect()
        .encode(
            x=layer_axis(layers, field="left"),
            x2="right:Q",
            y=alt.Y("name:N", sort=[names[each] for each in prompts], title=None, axis=alt.Axis(**_NAMES)),
            color=color,
            tooltip=_tooltip(),
        )
        .properties(
            width=WIDTH,
            height=min(_ROW * len(prompts), _TALLEST),
            title=alt.TitleParams(
                f"residual channel {cells[0].channel}", anchor="start", frame="group", fontSize=13, offset=6
            ),
        )
    )


_NAMES: dict[str, Any] = {"labelLimit": 320, "labelOverlap": True, "grid": False, "domain": False, "ticks": False}


def _row_names(cells: Iterable[PersistenceRecord], prompts: Iterable[PromptRecord]) -> dict[int, str]:
    """A short name for each prompt's row; no two are equal."""
    bos = {each.index: "with BOS" if each.bos else "no BOS" for each in prompts}
    names = {each.prompt: shorten(_one_line(each.prompt_text), length=40) for each in cells}
    names = _tell_apart(names, bos)
    return _tell_apart(names, {prompt: f"#{prompt}" for prompt in names})


def _tell_apart(names: dict[int, str], marks: dict[int, str]) -> dict[int, str]:
    """Adds its mark to each name that another prompt has too."""
    uses = Counter(names.values())
    return {
        prompt: f"{name} ({marks[prompt]})" if uses[name] > 1 and prompt in marks else name
        for prompt, name in names.items()
    }


def _one_line(text: str) -> str:
    return show_token(text).replace("␣", " ")


def _row(cell: PersistenceRecord, names: dict[int, str]) -> dict[str, Any]:
    # JSON has no infinity: a value that is not finite becomes null, which Vega leaves blank.
    value = cell.value if drawable(cell.value) or cell.value == 0 else None
    return {
        "left": cell.layer - 0.5,
        "right": cell.layer + 0.5,
        "layer": cell.layer,
        "name": names[cell.prompt],
        "size": None if value is None else abs(value),
        "signed": value,
        "prompt": cell.prompt,
        "text": cell.prompt_text,
        "token": show_place(cell.token_text, cell.token),
    }


def _tooltip() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("text:N", title="prompt"),
        alt.Tooltip("layer:Q"),
        alt.Tooltip("signed:Q", title="value", format=".5~g"),
        alt.Tooltip("token:N"),
    ]
