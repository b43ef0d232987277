"""The verb `trace`: the super activation through the layers, with and without the weights that make it."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cyclopts import Parameter

from superweights.cli.model_options import (
    DEFAULT_MODEL_OPTIONS,
    ModelOptions,
    describe_model_run,
    last_layer,
    open_model,
)
from superweights.cli.output import DEFAULT_OUTPUT, OutputSettings, write_rows, write_table, write_text
from superweights.cli.weights_option import chosen_weights
from superweights.coordinates import Coordinate
from superweights.detection.recording import record_peaks, record_persistence, record_prompts, record_residual_peaks
from superweights.detection.search import default_prompts
from superweights.errors import UsageError
from superweights.model.loading import LoadedModel
from superweights.model.prompts import VARIED_TEXTS
from superweights.model.tracing import Trace
from superweights.model.tracing import trace as run_trace
from superweights.progress import RichProgress
from superweights.report.persistence import persistence_chart
from superweights.report.residual import residual_chart
from superweights.report.saving import checked_suffix, save_chart
from superweights.results.records import NoteRecord, Record, ResidualPeakRecord
from superweights.results.store import write_records


@Parameter(name="*", negative=())
@dataclass(frozen=True, slots=True)
class TraceSettings:
    """What `trace` compares and what it leaves behind."""

    edit: str | None = None
    """Trace once more with the weights edited: scale=0 removes them, scale=2 doubles them."""
    weights: str = "auto"
    """Which weights to edit: auto (find them first), published (from the index), a .jsonl file of `find`, or coordinates
    such as 2:3968:7003, separated by commas."""
    out: str | None = None
    """Write all records to this .jsonl file; - writes them to stdout in place of the table."""
    plot: str | None = None
    """Draw the largest residual by layer, before and after the edit, to this .png, .svg, .pdf or .html file."""
    plot_persistence: str | None = None
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
    """Follows the largest value of the residual stream through the layers.

    With --edit, the weights of --weights are scaled and the pass repeated, as in figure 4 of the paper: where a super weight
    made the super activation, the curve falls. The channel of the largest value is also followed over a dozen prompts of
    many kinds.

    Args:
        model: A directory, a Hub name or a URL.
    """
    factor = _factor(settings.edit)
    for path in filter(None, (settings.plot, settings.plot_persistence)):
        checked_suffix(path)  # a wrong name must not cost a pass
    with open_model(model, options) as loaded:
        records = list(_records(loaded, settings, options, factor))
        run = describe_model_run(
            loaded, options, command=sys.argv, settings={"edit": settings.edit, "weights": settings.weights}
        )
    if settings.out is not None:
        write_records(settings.out, run, records)
    if settings.plot is not None:
        save_chart(residual_chart(records, title="Largest residual by layer", model=model), settings.plot)
    if settings.plot_persistence is not None:
        chart = persistence_chart(records, title="One channel over many prompts", model=model)
        save_chart(chart, settings.plot_persistence)
    if settings.out != "-":
        _show(records, model, output)
    return 0


def _factor(edit: str | None) -> float | None:
    if edit is None:
        return None
    name, _, value = edit.partition("=")
    try:
        if name == "scale":
            return float(value)
    except ValueError:
        pass
    raise UsageError(f"--edit {edit!r} is unknown. Write scale=FACTOR, for example scale=0 to remove the weights.")


def _records(
    loaded: LoadedModel, settings: TraceSettings, options: ModelOptions, factor: float | None
) -> Iterator[Record]:
    prompts, last, progress = (
        default_prompts(loaded, options.prompt),
        last_layer(loaded, options.layers),
        RichProgress(),
    )
    many = default_prompts(loaded, (*options.prompt, *VARIED_TEXTS))  # begins with the prompts above: indices agree
    original = run_trace(loaded, prompts, last_layer=last, progress=progress)
    yield from record_prompts(many)
    yield from record_peaks(original)
    yield from record_residual_peaks(original)
    if factor is not None:
        weights = chosen_weights(settings.weights, loaded, prompts=prompts, last_layer=last, progress=progress)
        if weights:
            with loaded.edited(dict.fromkeys(weights, factor)):
                edited = run_trace(loaded, prompts, last_layer=last, progress=progress)
            yield from record_peaks(edited, edited=True)
            yield from record_residual_peaks(edited, edit=_describe(factor, weights))
        else:
            yield NoteRecord(level="warning", text="No super weight candidate was found, so nothing was edited.")
    varied = run_trace(loaded, many, last_layer=last, progress=progress)
    yield from record_persistence(varied, _largest_channel(original))


def _describe(factor: float, weights: Sequence[Coordinate]) -> str:
    return f"scale={factor:g} on {', '.join(map(str, weights))}"


def _largest_channel(trace: Trace) -> int:
    stages = trace.stream[1 : trace.layers_run] if trace.complete else trace.stream[1:]
    return int(stages.abs().amax(dim=(0, 1)).argmax())


def _show(records: Sequence[Record], model: str, output: OutputSettings) -> None:
    peaks = [each for each in records if isinstance(each, ResidualPeakRecord)]
    if output.format != "table":
        write_rows([each.model_dump(mode="json") for each in peaks], format=output.format)
        return
    edits = list(dict.fromkeys(each.edit for each in peaks))
    write_table(
        [
            _row(each, [other for other in peaks if other.layer == each.layer and other.edit])
            for each in peaks
            if not each.edit
        ],
        title=f"Largest |residual| by layer in {model}; layer -1 is the embedding output.",
    )
    write_text("".join(f"\nedited: {edit}\n" for edit in edits if edit))
    write_text("".join(f"\n{each.text}\n" for each in records if isinstance(each, NoteRecord)))


def _row(peak: ResidualPeakRecord, edited: Sequence[ResidualPeakRecord]) -> dict[str, object]:
    return {
        "layer": peak.layer,
        "value": peak.value,
        "channel": peak.channel,
        "medians": round(abs(peak.value) / peak.median, 1) if peak.median else None,
        "token": f"{peak.token_text!r} at {peak.token}",
        "prompt": peak.prompt,
        **{f"edited {name}": getattr(each, name) for each in edited for name in ("value", "channel")},
    }
