"""Find: trace, take the candidates, remove them, repeat."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from superweights.checkpoint.dtypes import FLOAT16_MAX
from superweights.coordinates import Coordinate
from superweights.detection.candidates import (
    Bars,
    Candidate,
    DetectionSettings,
    explain_none,
    find_candidates,
    is_refuted,
)
from superweights.detection.paper import find_by_peaks
from superweights.errors import UnknownNameError
from superweights.model.loading import LoadedModel
from superweights.model.prompts import DEFAULT_TEXTS, Prompt, make_prompts
from superweights.model.tracing import Trace, trace
from superweights.progress import NO_PROGRESS, Progress

Method = Literal["residual", "paper"]


@dataclass(frozen=True)
class Findings:
    """What a search found, and the traces it found it in."""

    candidates: tuple[Candidate, ...]
    """All candidates, by round and then strongest first."""
    traces: tuple[Trace, ...]
    """One trace a round; the first is of the unedited model."""
    method: Method
    """Which detector made the candidates."""
    reason: str
    """Why the search ended; where nothing was found, why not."""
    notes: tuple[str, ...]
    """What a reader must know besides, such as a float16 overflow."""


def find(
    model: LoadedModel,
    *,
    prompts: Sequence[Prompt] | None = None,
    method: Method = "residual",
    settings: DetectionSettings | None = None,
    last_layer: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> Findings:
    """Finds super weight candidates from forward passes over a few short prompts; needs no data.

    Args:
        model: the model.
        prompts: replaces the default prompts.
        method: "residual" starts from the residual stream, removes and repeats; "paper" pairs the largest input with the
            largest output of each down projection in one pass, as the paper's code does.
        settings: the thresholds of the residual method.
        last_layer: the last decoder layer to run; None for all.
        progress: hears about each layer of each pass.

    Raises:
        UnknownNameError: there is no such method.
        SuperweightsError: what `trace` raises.

    Source:
        arXiv 2411.07191, section 3.1: spike in X and Y, remove, repeat.
    """
    if method not in get_args(Method):
        raise UnknownNameError.among("method", method, get_args(Method))
    settings = settings or DetectionSettings()
    traces = [trace(model, prompts or default_prompts(model), last_layer=last_layer, progress=progress)]
    if method == "paper":
        found = find_by_peaks(model, traces[0])
        reason = "" if found else "No down projection has an input and an output beyond the paper's threshold of 50."
    else:
        found, reason = _remove_and_repeat(model, traces, settings, last_layer, progress)
    return Findings(_ranked(model, found), tuple(traces), method, reason, _notes(model, traces[0]))


def _remove_and_repeat(
    model: LoadedModel, traces: list[Trace], settings: DetectionSettings, last_layer: int | None, progress: Progress
) -> tuple[tuple[Candidate, ...], str]:
    """Adds a trace a round to `traces`; gives the candidates and why no more were found."""
    bars = Bars.of(traces[0], settings)
    found: dict[Coordinate, Candidate] = {}
    refuted: set[Coordinate] = set()
    for number in range(settings.rounds):
        latest = find_candidates(traces[-1], bars, settings, round_number=number)
        new = {each.coordinate: each for each in latest if each.coordinate not in found}
        if not new:
            break
        found |= new
        with model.edited(dict.fromkeys(found, 0.0)):
            traces.append(trace(model, traces[0].prompts, last_layer=last_layer, progress=progress))
        refuted |= {coordinate for coordinate, each in new.items() if is_refuted(each, traces, bars, settings)}
    kept = tuple(each for coordinate, each in found.items() if coordinate not in refuted)
    if any(each.coordinate not in found for each in find_candidates(traces[-1], bars, settings)):
        return kept, f"The search stopped after its last round, {settings.rounds}, and more shows: raise `rounds`."
    ended = explain_none(traces[-1], bars, settings)
    if found:
        ended = f"With {'these' if kept else 'them'} removed: {ended[0].lower()}{ended[1:]}"
    return kept, f"{_dropped(refuted)}{ended}"


def _dropped(refuted: Iterable[Coordinate]) -> str:
    listed = ", ".join(map(str, sorted(refuted)))
    return f"Tried and dropped, as the pass without them speaks against them: {listed}. " if listed else ""


def default_prompts(model: LoadedModel, texts: Sequence[str] = ()) -> tuple[Prompt, ...]:
    """The default prompts and any further texts, as this model's tokenizer sees them."""
    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    return make_prompts(model.tokenizer, (*DEFAULT_TEXTS, *texts), vocabulary=vocabulary)


def _ranked(model: LoadedModel, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Counts the place of each candidate in its matrix, with each matrix attached once."""
    ranked: dict[Coordinate, Candidate] = {}
    homes = {each.coordinate: model.architecture.locate(each.coordinate) for each in candidates}
    for projection in dict.fromkeys(homes.values()):
        with model.attached(projection) as parameter:
            for candidate in candidates:
                if homes[candidate.coordinate] == projection:
                    ranked[candidate.coordinate] = _rank(candidate, parameter)
    return tuple(ranked[each.coordinate] for each in candidates)


def _rank(candidate: Candidate, parameter: torch.Tensor) -> Candidate:
    matrix = parameter if candidate.coordinate.expert is None else parameter[candidate.coordinate.expert]
    # In pieces: the comparison takes memory of its own.
    larger = sum(int((piece.abs() > abs(candidate.value)).sum()) for piece in torch.split(matrix, 512))
    return replace(candidate, rank=larger + 1, matrix_size=matrix.numel())


def _notes(model: LoadedModel, traced: Trace) -> tuple[str, ...]:
    notes = []
    if model.tokenizer is None:
        notes.append("The model has no tokenizer: fixed token ids stood in for the prompts.")
    largest = max([traced.stream.abs().max().item(), *(abs(peak.value) for peak in traced.peaks)])
    if largest > FLOAT16_MAX:
        notes.append(
            f"Activations reach {largest:.4g}, which overflows float16 (largest {FLOAT16_MAX:.0f}): "
            "this model does not run in it."
        )
    return tuple(notes)
