"""Which weights a verb acts on: found ones, published ones, those of a result file, or coordinates."""

from pathlib import Path
from typing import TYPE_CHECKING

from superweights.cli.model_options import ModelOptions, last_layer
from superweights.coordinates import Coordinate
from superweights.detection.published import published_name, usable_weights
from superweights.errors import CoordinateError, UsageError
from superweights.results.records import CandidateRecord
from superweights.results.store import STANDARD_STREAM, read_records

if TYPE_CHECKING:
    from superweights.model.loading import LoadedModel
    from superweights.model.prompts import Prompt
    from superweights.progress import Progress


def chosen_weights(
    text: str, model: "LoadedModel", *, prompts: tuple["Prompt", ...], last_layer: int | None, progress: "Progress"
) -> tuple[Coordinate, ...]:
    """The weights that `--weights` names.

    Args:
        text: "auto" searches the model; "published" looks in the index; a .jsonl file, or "-" for stdin, gives the candidates
            of an earlier search; anything else is coordinates, separated by commas.
        model: the model they belong to.
        prompts: prompts of the search.
        last_layer: last layer of the search.
        progress: hears about the search.

    Raises:
        UsageError: no such file, nothing published, or text that is no coordinate.
        CoordinateError: a coordinate outside the model.
    """
    if text == "auto":
        from superweights.detection.search import find

        found = find(model, prompts=prompts, last_layer=last_layer, progress=progress)
        return tuple(each.coordinate for each in found.candidates)
    coordinates = _published(model) if text == "published" else listed_weights(text)
    for each in coordinates:
        model.architecture.locate(each)
    return coordinates


def needs_model(text: str) -> bool:
    """Whether only the model can say which weights are meant."""
    return text in ("auto", "published")


def listed_weights(text: str) -> tuple[Coordinate, ...]:
    """The weights of a .jsonl file, or of "-" for stdin, or coordinates separated by commas; of whatever model.

    Raises:
        UsageError: no such file, or text that is no coordinate.
    """
    if text == STANDARD_STREAM or text.endswith(".jsonl"):
        records = read_records(text)[1]
        return tuple(Coordinate.parse(each.coordinate) for each in records if isinstance(each, CandidateRecord))
    return _parsed(text)


def _parsed(text: str) -> tuple[Coordinate, ...]:
    try:
        return tuple(Coordinate.parse(each) for each in text.split(","))
    except CoordinateError as error:
        raise CoordinateError(f"--weights {text} is neither auto, published nor a .jsonl file, and {error}") from error


def _published(model: "LoadedModel") -> tuple[Coordinate, ...]:
    config_name = str(model.checkpoint.config.get("_name_or_path", "")) if model.checkpoint else ""
    name = model.name if not Path(model.name).exists() else config_name or Path(model.name).name
    weights = usable_weights(published_name(name))
    if not weights:
        raise UsageError(f"Nothing usable is published about {name}; `superweights index {name}` shows what there is.")
    return tuple(each.coordinate for each in weights if each.coordinate is not None)


def weights_of(text: str, model: "LoadedModel", options: ModelOptions, progress: "Progress") -> tuple[Coordinate, ...]:
    """The weights that `--weights` names, where a search uses the prompts and layers of the command line.

    Raises:
        UsageError: see `chosen_weights`.
        CoordinateError: a coordinate outside the model.
    """
    from superweights.detection.search import default_prompts

    prompts, last = default_prompts(model, options.prompt), last_layer(model, options.layers)
    return chosen_weights(text, model, prompts=prompts, last_layer=last, progress=progress)
