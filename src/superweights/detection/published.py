"""The published index: coordinates, residual channels and contradictions found in papers and repositories.

The data lie beside this file in published-index.json, one entry per line, with the source of each. Nothing is dropped: an
entry known to be wrong keeps its place with a status that says so, and `usable_weights` leaves it out. No torch here.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any, Literal

from superweights.coordinates import Coordinate
from superweights.errors import UnknownNameError

_REJECTED = ("published-wrong", "detected-late-layer")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedWeight:
    """What one source says about one scalar, row, column or expert of a down projection."""

    model: str
    """Full Hub name of the model."""
    status: str
    """What the source claims, or what is known of the claim: `published`, `published-wrong`, `confirmed-loadbearing`, ..."""
    module: str
    """The parameter as the source names it."""
    source: str
    """Paper or repository, and the place in it."""
    layer: int | None = None
    """Decoder layer, from 0; None when the source speaks of the whole model."""
    expert: int | None = None
    """Routed expert, from 0."""
    row: int | None = None
    """Output channel; None when the source names none."""
    col: int | None = None
    """Input channel; None when the source names none."""
    value: float | None = None
    """The weight itself, where printed."""
    input_peak: float | None = None
    """Super activation at the input of the down projection."""
    output_peak: float | None = None
    """Super activation at its output."""
    share: float | None = None
    """`value * input_peak / output_peak`: near 1 when the scalar explains the peak."""
    effect: str | None = None
    """What removing it did, in the source's numbers."""
    note: str | None = None
    """Errata and remarks."""

    @property
    def coordinate(self) -> Coordinate | None:
        """The full coordinate; None for an entry about a row, a column, an expert or a whole model."""
        if self.layer is None or self.row is None or self.col is None:
            return None
        return Coordinate(self.layer, self.expert, self.row, self.col)

    @property
    def coordinate_text(self) -> str:
        """The coordinate, with a star for each part that the source does not name.

        Example:
            >>> PublishedWeight(model="m", status="row", module="row", source="s", layer=2, row=7).coordinate_text
            '2:7:*'
        """
        layer, row, col = ("*" if part is None else part for part in (self.layer, self.row, self.col))
        return f"{layer}{'' if self.expert is None else f'/{self.expert}'}:{row}:{col}"

    @property
    def usable(self) -> bool:
        """Whether the entry names a scalar and is neither an erratum nor a late-layer remover."""
        return self.coordinate is not None and not self.status.startswith(_REJECTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCount:
    """How often a token carries the massive activation."""

    position: Literal["first", "later"]
    """Whether the token opens the sequence."""
    token: str
    """The token's text."""
    count: int
    """Sequences in which it carries the peak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualChannels:
    """Massive channels of one model's residual stream, as measured by one source."""

    model: str
    """Full Hub name of the model."""
    channels: tuple[int, ...]
    """Channels of the residual stream; empty when none was found."""
    source: str
    """Paper or repository, and the place in it."""
    bos: bool | None = None
    """Whether the prompts began with a BOS token; None when not said."""
    onset_layer: int | None = None
    """Decoder layer after which the channels are massive, from 0."""
    last_layer: int | None = None
    """Last decoder layer after which they still are."""
    max_abs: Mapping[int, float] = field(default_factory=dict)
    """Largest absolute value by channel."""
    top_tokens: tuple[TokenCount, ...] = ()
    """The tokens that carry the peaks."""
    perplexity: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By treatment of the channels (`original`, `set_to_zero`, `set_to_mean`), then by data set (`wikitext2`, `c4`)."""
    note: str | None = None
    """Errata and remarks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """A point on which sources disagree, or on which they agree against expectation."""

    models: tuple[str, ...]
    """Full Hub names of the models concerned."""
    issue: str
    """What the point is."""
    agree: tuple[str, ...]
    """Sources on one side."""
    disagree: tuple[str, ...]
    """Sources on the other."""


@dataclass(frozen=True, slots=True)
class PublishedIndex:
    """The whole index."""

    weights: tuple[PublishedWeight, ...]
    """All coordinate entries, in the order of the data file."""
    residual_channels: tuple[ResidualChannels, ...]
    """All residual-channel records."""
    conflicts: tuple[Conflict, ...]
    """All contradictions."""


@cache
def published_index() -> PublishedIndex:
    """The whole index, read once."""
    data = json.loads(files(__package__).joinpath("published-index.json").read_text("utf-8"))
    return PublishedIndex(
        weights=tuple(PublishedWeight(**entry) for entry in data["weights"]),
        residual_channels=tuple(_residual_channels(entry) for entry in data["residual_channels"]),
        conflicts=tuple(Conflict(**{key: _frozen(part) for key, part in entry.items()}) for entry in data["conflicts"]),
    )


@cache
def published_models() -> tuple[str, ...]:
    """Full names of all models in the index, sorted."""
    index = published_index()
    names = {entry.model for entry in index.weights} | {entry.model for entry in index.residual_channels}
    return tuple(sorted(names.union(*(conflict.models for conflict in index.conflicts)), key=str.casefold))


def published_name(model: str) -> str:
    """The full name that `model` stands for: that name in any case, or its part after the slash when that is unique.

    Raises:
        UnknownNameError: no model, or more than one, has that name; gives the near ones.

    Example:
        >>> published_name("LLAMA-7B")
        'huggyllama/llama-7b'
    """
    wanted = model.casefold()
    fitting = [each for each in published_models() if each.casefold() == wanted]
    fitting = fitting or [each for each in published_models() if _short(each) == wanted]
    if len(fitting) != 1:
        near = ", ".join(repr(each) for each in fitting or _near(wanted))
        ask = f"Did you mean {near}?" if near else "No name is near."
        raise UnknownNameError(
            f"There is no published model {model!r}. {ask} `superweights index` lists all {len(published_models())}."
        )
    return fitting[0]


def published_weights(model: str) -> tuple[PublishedWeight, ...]:
    """All entries about a model, errata included.

    Raises:
        UnknownNameError: the index does not know the model.
    """
    name = published_name(model)
    return tuple(entry for entry in published_index().weights if entry.model == name)


def usable_weights(model: str) -> tuple[PublishedWeight, ...]:
    """One entry for each scalar that can be used as published, sorted by coordinate; errata and removers are left out.

    Where several sources name a scalar, the first that prints its value stands for all.

    Raises:
        UnknownNameError: the index does not know the model.
    """
    chosen: dict[Coordinate, PublishedWeight] = {}
    for entry in published_weights(model):
        if not entry.usable or entry.coordinate is None:
            continue
        if entry.coordinate not in chosen or (chosen[entry.coordinate].value is None and entry.value is not None):
            chosen[entry.coordinate] = entry
    return tuple(chosen[each] for each in sorted(chosen, key=_reading_order))


def residual_channels(model: str) -> tuple[ResidualChannels, ...]:
    """All residual-channel records of a model.

    Raises:
        UnknownNameError: the index does not know the model.
    """
    name = published_name(model)
    return tuple(entry for entry in published_index().residual_channels if entry.model == name)


def conflicts_for(model: str) -> tuple[Conflict, ...]:
    """All contradictions that concern a model.

    Raises:
        UnknownNameError: the index does not know the model.
    """
    name = published_name(model)
    return tuple(conflict for conflict in published_index().conflicts if name in conflict.models)


def _residual_channels(entry: Mapping[str, Any]) -> ResidualChannels:
    fields = {key: _frozen(part) for key, part in entry.items()}
    fields["max_abs"] = MappingProxyType({int(channel): value for channel, value in entry["max_abs"].items()})
    fields["top_tokens"] = tuple(TokenCount(**token) for token in entry.get("top_tokens", ()))
    return ResidualChannels(**fields)


def _frozen(part: Any) -> Any:
    if isinstance(part, dict):
        return MappingProxyType({key: _frozen(each) for key, each in part.items()})
    return tuple(_frozen(each) for each in part) if isinstance(part, list) else part


def _short(name: str) -> str:
    return name.rpartition("/")[2].casefold()


def _near(wanted: str) -> Iterable[str]:
    """Names near `wanted`, compared whole and by their part after the slash."""
    spellings = {spelling: name for name in published_models() for spelling in (name.casefold(), _short(name))}
    close = get_close_matches(wanted, spellings, n=5) or get_close_matches(_short(wanted), spellings, n=5)
    return dict.fromkeys(spellings[each] for each in close)


def _reading_order(coordinate: Coordinate) -> tuple[int, int, int, int]:
    """Sort key; a Coordinate with an expert does not compare with one without."""
    return coordinate.layer, -1 if coordinate.expert is None else coordinate.expert, coordinate.row, coordinate.col
