"""The verb `sinks`: whether attention sinks survive the removal of super weights."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

from cyclopts import Parameter

from superweights.cli.model_options import (
    DEFAULT_MODEL_OPTIONS,
    FILE,
    HYPHEN_ALLOWED,
    ModelOptions,
    add_warnings,
    check_targets,
    describe_model_run,
    open_model,
)
from superweights.cli.output import DEFAULT_OUTPUT, OutputSettings, write_rows, write_table, write_text
from superweights.cli.text_options import DEFAULT_TEXT_OPTIONS, TextOptions, open_windows
from superweights.cli.weights_option import weights_of
from superweights.experiments.sinks import sinks as measure
from superweights.progress import RichProgress
from superweights.results.records import MeasurementRecord, NoteRecord, Record, Run
from superweights.results.store import STANDARD_STREAM, write_records

_LENGTH = 256


@Parameter(name="*", negative=())
@dataclass(frozen=True, slots=True)
class SinkSettings:
    """What `sinks` removes and what it leaves behind."""

    weights: Annotated[str, HYPHEN_ALLOWED, Parameter(metavar="WEIGHTS")] = "auto"
    """Which weights to remove: auto (find them first), published (from the index), a .jsonl file of `find` (- for stdin), or
    coordinates such as 2:3968:7003, separated by commas."""
    out: Annotated[str | None, FILE, HYPHEN_ALLOWED] = None
    """Write all records to this .jsonl file; - writes them to stdout in place of the table."""
    plot: Annotated[str | None, FILE] = None
    """Draw the attention to the first token by layer to this .png, .svg, .pdf or .html file."""


_DEFAULT_SETTINGS = SinkSettings()


def sinks(
    model: str,
    /,
    *,
    settings: SinkSettings = _DEFAULT_SETTINGS,
    text: TextOptions = DEFAULT_TEXT_OPTIONS,
    options: ModelOptions = DEFAULT_MODEL_OPTIONS,
    output: OutputSettings = DEFAULT_OUTPUT,
) -> int:
    """Measures how much attention goes to the first token, with and without the weights of --weights.

    Three states of the model are compared: the original, the weights removed, and removed with their super activation put
    back at one token. The number is the mean probability that tokens in the second half of a window give to its first token,
    over all heads. A layer whose sliding window does not reach the first token gives 0, one without attention nothing.

    Attention weights take much memory, so here windows have at most 256 tokens unless --length says otherwise.

    Args:
        model: A directory, a .gguf file, a Hub name or a URL.
    """
    check_targets(records=settings.out, charts=[settings.plot])
    progress = RichProgress()
    with open_model(model, options) as loaded:
        windows = open_windows(loaded, text, at_most=_LENGTH)
        run = describe_model_run(
            loaded, options, command=sys.argv, settings={"weights": settings.weights, **asdict(text)}
        )
        weights = weights_of(settings.weights, loaded, options, progress)
        records: list[Record] = list(measure(loaded, weights, windows, progress=progress))
        if not weights:
            text_of_note = "No super weight candidate was found, so nothing was removed."
            records.append(NoteRecord(level="warning", text=text_of_note))
        run = add_warnings(run, loaded)
    try:
        _leave(settings, run, records, model)
    finally:  # a full disk must not cost the answer
        if settings.out != STANDARD_STREAM:
            _show(records, model, output)
    return 0


def _leave(settings: SinkSettings, run: Run, records: Sequence[Record], model: str) -> None:
    from superweights.report.saving import save_chart
    from superweights.report.sinks import sinks_chart

    if settings.out is not None:
        write_records(settings.out, run, records)
    if settings.plot is not None:
        save_chart(sinks_chart(records, title="Attention to the first token by layer", model=model), settings.plot)


def _show(records: Sequence[Record], model: str, output: OutputSettings) -> None:
    found = [each for each in records if isinstance(each, MeasurementRecord)]
    if output.format != "table":
        write_rows([each.model_dump(mode="json") for each in found], format=output.format)
        return
    rows: dict[str, dict[str, object]] = {}
    for each in found:
        rows.setdefault(each.subject, {"layer": each.subject.removeprefix("layer ") or "mean"})[each.condition] = (
            each.value
        )
    first = found[0]
    title = f"Mean attention to the first token by layer in {model}, over {first.count} windows of {first.dataset}."
    write_table(list(rows.values()), title=title)
    write_text("".join(f"\n{each.text}\n" for each in records if isinstance(each, NoteRecord)))
