"""The verb `trace`: the super activation through the layers, with and without the weights that make it."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from cyclopts import Parameter

from superweights.cli.model_options import (
    DEFAULT_MODEL_OPTIONS,
    FILE,
    HYPHEN_ALLOWED,
    ModelOptions,
    add_warnings,
    check_targets,
    describe_model_run,
    last_layer,
    open_model,
)
from superweights.cli.output import DEFAULT_OUTPUT, OutputSettings, write_rows, write_table, write_text
from superweights.cli.weights_option import weights_of
from superweights.coordinates import Coordinate
from superweights.detection.recording import record_peaks, record_persistence, record_prompts, record_residual_peaks
from superweights.detection.search import default_prompts
from superweights.errors import UsageError
from superweights.interventions.edit_text import parse_edit
from superweights.interventions.rows import applied
from superweights.model.loading import LoadedModel
from superweights.model.prompts import VARIED_TEXTS
from superweights.model.tracing import Trace
from superweights.model.tracing import trace as run_trace
from superweights.progress import RichProgress
from superweights.report.persistence import persistence_chart
from superweights.report.residual import residual_chart
from superweights.report.saving import save_chart
from superweights.results.records import NoteRecord, PromptRecord, Record, ResidualPeakRecord, Run
from superweights.results.store import STANDARD_STREAM, write_records


@Parameter(name="*", negative=())
@dataclass(frozen=True, slots=True)
class TraceSettings:
    """What `trace` compares and what it leaves behind."""

    edit: Annotated[tuple[str, ...], Parameter(metavar="EDIT", show_default=False)] = ()
    """Trace once more with an edit: scale=FACTOR (0 removes the weights), restore-sa (put the super activation back), sa=FACTOR
    or sa=mean (edit the super activation itself), prune-largest=SHARE or COUNT (the largest other weights of every matrix), or
    several joined by +, as scale=0+restore-sa. May be given several times."""
    weights: Annotated[str, HYPHEN_ALLOWED, Parameter(metavar="WEIGHTS")] = "auto"
    """Which weights to edit: auto (find them first), published (from the index), a .jsonl file of `find` (- for stdin), or
    coordinates such as 2:3968:7003, separated by commas."""
    out: Annotated[str | None, FILE, HYPHEN_ALLOWED] = None
    """Write all records to this .jsonl file; - writes them to stdout in place of the table."""
    plot: Annotated[str | None, FILE] = None
    """Draw the largest residual by layer, before and after the edit, to this .png, .svg, .pdf or .html file."""
    plot_persistence: Annotated[str | None, FILE] = None
    """Draw the super activation's channel for many prompts as a heat map, to such a file."""


_DEFAULT_SETTINGS = TraceSettings()


def trace(
    model: str,
    /,
    *,
    settings: TraceSettings = _DEFAULT_SETTINGS,
    options: ModelOptions = DEFAULT_MODEL_OPTIONS,
    output: OutputSettings = DEFAULT_OUTPUT,
) -> int:
    """Follows the largest value of the residual stream through the layers, over a dozen prompts of many kinds.

    With --edit, the model is edited and the pass repeated, as in figure 4 of the paper: where a super weight made the super
    activation, the curve falls. --plot-persistence shows whether the channel of the largest value is the same
    for all prompts.

    Args:
        model: A directory, a .gguf file, a Hub name or a URL.
    """
    _check_edits(settings)
    check_targets(records=settings.out, charts=[settings.plot, settings.plot_persistence])
    with open_model(model, options) as loaded:
        run = describe_model_run(
            loaded, options, command=sys.argv, settings={"edit": list(settings.edit), "weights": settings.weights}
        )
        records = list(_records(loaded, settings, options))
        run = add_warnings(run, loaded)
    try:
        _leave(settings, run, records, model)
    finally:  # a full disk must not cost the answer
        if settings.out != STANDARD_STREAM:
            _show(records, model, output)
    return 0


def _check_edits(settings: TraceSettings) -> None:
    """A wrong word must not cost a search."""
    if not settings.edit and settings.weights != _DEFAULT_SETTINGS.weights:
        raise UsageError(f"--weights {settings.weights} says what to edit. Add --edit, for example --edit scale=0.")
    for text in settings.edit:
        parse_edit(text, (), mean=lambda _: 0.0)


def _leave(settings: TraceSettings, run: Run, records: Sequence[Record], model: str) -> None:
    if settings.out is not None:
        write_records(settings.out, run, records)
    if settings.plot is not None:
        save_chart(residual_chart(records, title="Largest residual by layer", model=model), settings.plot)
    if settings.plot_persistence is not None:
        chart = persistence_chart(records, title="One channel over many prompts", model=model)
        save_chart(chart, settings.plot_persistence)


def _records(loaded: LoadedModel, settings: TraceSettings, options: ModelOptions) -> Iterator[Record]:
    last, progress = last_layer(loaded, options.layers), RichProgress()
    weights: tuple[Coordinate, ...] = ()
    if settings.edit:
        weights = weights_of(settings.weights, loaded, options, progress)
    prompts = default_prompts(loaded, (*options.prompt, *VARIED_TEXTS))
    original = run_trace(loaded, prompts, last_layer=last, progress=progress)
    yield from record_prompts(prompts)
    yield from record_peaks(original)
    yield from record_residual_peaks(original)
    yield from record_persistence(original, _largest_channel(original))
    if settings.edit and not weights:
        yield NoteRecord(level="warning", text="No super weight candidate was found, so nothing was edited.")
        return
    for text in settings.edit:
        condition = parse_edit(text, weights, mean=partial(_mean_super_activation, original))
        with applied(loaded, condition):
            edited = run_trace(loaded, prompts, last_layer=last, progress=progress)
        yield from record_peaks(edited, edited=True)
        yield from record_residual_peaks(edited, edit=condition.name)


def _mean_super_activation(trace: Trace, weight: Coordinate) -> float:
    """Mean over the prompts of the largest value of the weight's row after its layer."""
    values = trace.stream[weight.layer + 1, :, weight.row]
    owners = torch.tensor([prompt for prompt, _ in trace.positions])
    largest = []
    for prompt in range(len(trace.prompts)):
        mine = values[owners == prompt]
        largest.append(mine[mine.abs().argmax()].item())
    return sum(largest) / len(largest)


def _largest_channel(trace: Trace) -> int:
    inner = trace.stream[: trace.layers_run] if trace.complete else trace.stream  # the last layer takes the value away
    return int(inner.abs().amax(dim=(0, 1)).argmax())


def _show(records: Sequence[Record], model: str, output: OutputSettings) -> None:
    peaks = [each for each in records if isinstance(each, ResidualPeakRecord)]
    if output.format != "table":
        write_rows([each.model_dump(mode="json") for each in peaks], format=output.format)
        return
    count = sum(isinstance(each, PromptRecord) for each in records)
    edits = list(dict.fromkeys(each.edit for each in peaks if each.edit))
    write_table(
        [
            _row(
                each,
                {edit: other for edit in edits for other in peaks if (other.layer, other.edit) == (each.layer, edit)},
            )
            for each in peaks
            if not each.edit
        ],
        title=f"Largest |residual| by layer in {model}, over {count} prompts; layer -1 is the embedding output.",
    )
    write_text("".join(f"\n{name}: {edit}\n" for name, edit in zip(_edit_names(edits), edits, strict=True)))
    write_text("".join(f"\n{each.text}\n" for each in records if isinstance(each, NoteRecord)))


def _edit_names(edits: Sequence[str]) -> list[str]:
    """What the columns of each edit are called."""
    return ["edited"] if len(edits) == 1 else [f"edit {number}" for number in range(1, len(edits) + 1)]


def _row(peak: ResidualPeakRecord, edited: Mapping[str, ResidualPeakRecord]) -> dict[str, object]:
    names = zip(_edit_names(list(edited)), edited.values(), strict=True)
    return {
        "layer": peak.layer,
        "value": peak.value,
        "channel": peak.channel,
        "medians": round(abs(peak.value) / peak.median, 1) if peak.median else None,
        "token": f"{peak.token_text!r} at {peak.token}",
        "prompt": peak.prompt,
        **{f"{column} {name}": getattr(each, name) for column, each in names for name in ("value", "channel")},
    }
