"""What all charts share: sizes, colours, fonts, the layer axis, and how text is made fit to be shown."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import altair as alt

from superweights.results.records import ActivationPeakRecord, CandidateRecord, PromptRecord, Record, ResidualPeakRecord

WIDTH = 720
"""Width of a panel, in pixels."""
ACCENT = "#d9480f"
"""The colour of candidates, and of nothing else that is not about them."""
INK = "#1f3a5f"
"""The colour of the unedited model."""
QUIET = "#9aa5b1"
"""The colour of what is there for scale."""
MUTED = "#5b6875"
"""The colour of text that explains."""
NUMBER = ",~g"
"""How an axis writes numbers: 0.1, 10, 1,000."""

_FONT = "Inter, 'Helvetica Neue', Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
_TEXT, _GRID = "#222b36", "#e6eaee"
_TICKS = ((0.5, (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)), (2, (1, 2, 5)), (4, (1, 3)), (math.inf, (1,)))
"""The digits named on a log axis that spans fewer than so many powers of ten."""

Peak = TypeVar("Peak", ActivationPeakRecord, ResidualPeakRecord)


def dress(chart: alt.TopLevelMixin, *, title: str, subtitle: str) -> alt.TopLevelMixin:
    """The chart with its title, subtitle, fonts and grid."""
    heading = alt.TitleParams(title, subtitle=subtitle, anchor="start", frame="group", offset=14)
    return chart.properties(title=heading, padding=16, background="white").configure(
        font=_FONT,
        view=alt.ViewConfig(stroke=None),
        title=alt.TitleConfig(
            fontSize=17, fontWeight=600, color=_TEXT, subtitleFontSize=12, subtitleColor=MUTED, subtitlePadding=5
        ),
        axis=alt.AxisConfig(
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
            labelColor=MUTED,
            titleColor=_TEXT,
            gridColor=_GRID,
            domainColor="#c3cbd3",
            tickColor="#c3cbd3",
        ),
        legend=alt.LegendConfig(
            labelFontSize=12, titleFontSize=12, titleFontWeight="normal", labelColor=MUTED, titleColor=_TEXT
        ),
    )


def describe_source(records: Iterable[Record], *, model: str, more: str = "") -> str:
    """The subtitle: which model, how many prompts, and what else there is to say."""
    prompts = {each.index if isinstance(each, PromptRecord) else getattr(each, "prompt", None) for each in records}
    return " · ".join(part for part in (model, counted(len(prompts - {None}), "prompt"), more) if part)


def layer_axis(layers: Sequence[int], *, field: str = "layer", labelled: bool = True) -> alt.X:
    """The x axis over decoder layers, with half a layer of room at both ends; layer -1 is named "emb"."""
    return alt.X(
        f"{field}:Q",
        title="decoder layer" if labelled else None,
        scale=alt.Scale(domain=layer_domain(layers), nice=False, zero=False),
        axis=alt.Axis(
            values=layer_ticks(layers),
            labelExpr="datum.value < 0 ? 'emb' : format(datum.value, 'd')",
            labelOverlap=False,
            grid=False,
            labels=labelled,
            ticks=labelled,
        ),
    )


def layer_domain(layers: Sequence[int]) -> list[float]:
    """The first and last layer, with half a layer of room."""
    return [min(layers) - 0.5, max(layers) + 0.5]


def layer_ticks(layers: Sequence[int]) -> list[int]:
    """The layers to name on an axis: all of a few, every 2nd, 5th or 10th of many, and the embedding where it is.

    Example:
        >>> layer_ticks(range(-1, 32))[:4]
        [-1, 0, 2, 4]
    """
    low, high = min(layers), max(layers)
    step = next((step for step in (1, 2, 5) if high - low < 24 * step), 10)
    ticks = [layer for layer in range(max(low, 0), high + 1) if layer % step == 0]
    # The name of the embedding is wide: where layers stand close, the number 0 makes room for it.
    return ticks if low >= 0 else [-1, *(tick for tick in ticks if tick > 0 or step < 5)]


def point_size(layers: Sequence[int]) -> int:
    """Area of a point, in square pixels, smaller where many stand side by side."""
    return 36 if max(layers) - min(layers) < 48 else 16


def log_axis(domain: tuple[float, float], *, field: str, title: str) -> alt.Y:
    """A y axis in powers, with as many lines as help the eye."""
    return alt.Y(
        f"{field}:Q",
        title=title,
        scale=alt.Scale(type="log", domain=list(domain), nice=False),
        axis=alt.Axis(format=NUMBER, values=log_ticks(domain)),
    )


def log_domain(values: Iterable[float]) -> tuple[float, float]:
    """Bounds of a log axis around positive values, with a little room; any bounds where there are no values."""
    known = list(values) or [1.0]
    return min(known) / 1.3, max(known) * 1.3


def log_ticks(domain: tuple[float, float]) -> list[float]:
    """Round numbers inside the bounds: powers of ten, with 2 and 5 or with 3 between them where there is room.

    Example:
        >>> log_ticks((0.7, 30.0))
        [1.0, 2.0, 5.0, 10.0, 20.0]
    """
    low, high = (math.log10(bound) for bound in domain)
    steps = next(steps for decades, steps in _TICKS if high - low < decades)
    ticks = (float(f"{step}e{power}") for power in range(math.floor(low), math.ceil(high)) for step in steps)
    return [tick for tick in ticks if domain[0] <= tick <= domain[1]]


def largest_by_layer(peaks: Iterable[Peak]) -> list[Peak]:
    """The peak with the largest |value| of each layer, by layer."""
    largest: dict[int, Peak] = {}
    for peak in peaks:
        if peak.layer not in largest or abs(peak.value) > abs(largest[peak.layer].value):
            largest[peak.layer] = peak
    return [peak for _, peak in sorted(largest.items())]


def drawable(value: float) -> bool:
    """Whether a value has a place on a log axis: finite and not zero."""
    return math.isfinite(value) and value != 0


def show_token(text: str) -> str:
    r"""A token's text with its white space made visible.

    Example:
        >>> print(show_token(" the\n"))
        ␣the\n
    """
    seen = text.replace(" ", "␣")
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in seen)


def show_place(token_text: str, token: int) -> str:
    """A token and its position, for a tooltip."""
    return f"{show_token(token_text)} at {token}"


def shorten(text: str, *, length: int) -> str:
    """At most `length` characters, with the cut marked."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def values_of(rows: list[dict[str, Any]]) -> alt.Data:
    """Rows as the data of a chart."""
    return alt.Data(values=rows)


def counted(count: int, noun: str) -> str:
    """A count with its noun: "1 prompt", "2 prompts"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def candidate_rules(candidates: Iterable[CandidateRecord], x: alt.X) -> alt.Chart:
    """One vertical line at each layer that has a candidate."""
    rows = [{"layer": layer} for layer in sorted({each.layer for each in candidates})]
    return alt.Chart(values_of(rows)).mark_rule(color=ACCENT, strokeDash=[3, 3], opacity=0.6).encode(x=x)
