"""The verb `repair`: how much of a model comes back after its super weights were destroyed."""

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
from superweights.cli.scale import span
from superweights.cli.text_options import DEFAULT_TEXT_OPTIONS, TextOptions, open_windows
from superweights.cli.weights_option import weights_of
from superweights.experiments.repair import RepairSettings as Repair
from superweights.experiments.repair import repair as destroy_and_repair
from superweights.progress import RichProgress
from superweights.results.records import MeasurementRecord, NoteRecord, Record
from superweights.results.store import STANDARD_STREAM, write_records


@Parameter(name="*", negative=())
@dataclass(frozen=True, slots=True)
class RepairSettings:
    """What `repair` destroys and what it leaves behind."""

    weights: Annotated[str, HYPHEN_ALLOWED, Parameter(metavar="WEIGHTS")] = "auto"
    """Which weights to destroy and to repair: auto (find them first), published (from the index), a .jsonl file of `find` (-
    for stdin), or coordinates such as 2:3968:7003, separated by commas."""
    out: Annotated[str | None, FILE, HYPHEN_ALLOWED] = None
    """Write all records to this .jsonl file; - writes them to stdout in place of the table."""


_DEFAULT_SETTINGS = RepairSettings()
_DEFAULT_REPAIR = Parameter(name="*", group="Repair")(Repair)()


def repair(
    model: str,
    /,
    *,
    settings: RepairSettings = _DEFAULT_SETTINGS,
    repaired: Repair = _DEFAULT_REPAIR,
    text: TextOptions = DEFAULT_TEXT_OPTIONS,
    options: ModelOptions = DEFAULT_MODEL_OPTIONS,
    output: OutputSettings = DEFAULT_OUTPUT,
) -> int:
    """Measures how much of a model comes back, without training, once its super weights are destroyed and their values lost.

    Two repairs are compared with the original and the destroyed model. A scalar is searched for: the value with which the
    damaged model predicts the first windows of the text best. And, as if activations of the original had been kept, a patch
    of the whole column is fitted to them. Both are measured on the other windows. No file is changed.

    Args:
        model: A directory, a .gguf file, a Hub name or a URL.
    """
    check_targets(records=settings.out, charts=[])
    progress = RichProgress()
    with open_model(model, options) as loaded:
        windows = open_windows(loaded, text)
        described = {"weights": settings.weights, **asdict(repaired), **asdict(text)}
        run = describe_model_run(loaded, options, command=sys.argv, settings=described)
        weights = weights_of(settings.weights, loaded, options, progress)
        records: list[Record] = [
            NoteRecord(level="warning", text="No super weight candidate was found, so nothing was destroyed.")
        ]
        if weights:
            records = list(destroy_and_repair(loaded, weights, windows, settings=repaired, progress=progress))
        run = add_warnings(run, loaded)
    try:
        if settings.out is not None:
            write_records(settings.out, run, records)
    finally:  # a full disk must not cost the answer
        if settings.out != STANDARD_STREAM:
            _show(records, model, output)
    return 0


def _show(records: Sequence[Record], model: str, output: OutputSettings) -> None:
    found = [each for each in records if isinstance(each, MeasurementRecord)]
    if output.format != "table":
        write_rows([each.model_dump(mode="json") for each in found], format=output.format)
        return
    if found:
        states: dict[str, dict[str, object]] = {}
        values: dict[str, dict[str, object]] = {}
        for each in found:
            if each.subject:
                column = each.name.replace("_", " ")
                values.setdefault(each.subject, {"coordinate": each.subject})[column] = each.value
            else:
                states.setdefault(each.condition, {"model": each.condition}).update(_cells(each))
        title = f"Super weights of {model} destroyed and repaired, on {found[0].count} windows of {found[0].dataset}."
        write_table(list(states.values()), title=title)
        write_text("\n")
        write_table(list(values.values()))
    write_text("".join(f"\n{each.text}\n" for each in records if isinstance(each, NoteRecord)))


def _cells(each: MeasurementRecord) -> dict[str, object]:
    """The columns that a measurement fills in its row."""
    if each.name == "perplexity":
        return {"perplexity": each.value}
    if each.name == "perplexity_ratio":
        return {"/ original": each.value, "95 % interval": span(each)}
    if each.name == "recovered":
        return {"recovered": each.value, "of the loss": span(each)}
    return {}
