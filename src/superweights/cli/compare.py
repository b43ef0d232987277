"""The verb `compare`: the super weights of two models of one shape, side by side."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
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
    last_layer,
    open_model,
)
from superweights.cli.output import DEFAULT_OUTPUT, OutputSettings, write_rows, write_table, write_text
from superweights.cli.scale import span
from superweights.cli.text_options import DEFAULT_TEXT_OPTIONS, TextOptions, open_windows
from superweights.cli.weights_option import weights_of
from superweights.coordinates import Coordinate
from superweights.experiments.comparison import compare as set_side_by_side
from superweights.model.loading import LoadedModel
from superweights.progress import RichProgress
from superweights.results.records import MeasurementRecord, NoteRecord, Record, Run
from superweights.results.store import STANDARD_STREAM, write_records


@Parameter(name="*", negative=())
@dataclass(frozen=True, slots=True)
class CompareSettings:
    """What `compare` looks at and what it leaves behind."""

    weights: Annotated[str, HYPHEN_ALLOWED, Parameter(metavar="WEIGHTS")] = "auto"
    """Which weights to compare: auto (find them in both models), published (of the first, from the index), a .jsonl file of
    `find` (- for stdin), or coordinates such as 2:3968:7003, separated by commas."""
    second_revision: str | None = None
    """Branch, tag or commit of the second model; --revision is that of the first alone."""
    out: Annotated[str | None, FILE, HYPHEN_ALLOWED] = None
    """Write all records to this .jsonl file; - writes them to stdout in place of the table."""
    plot: Annotated[str | None, FILE] = None
    """Draw weights, super activations and perplexities of both models to this .png, .svg, .pdf or .html file."""


_DEFAULT_SETTINGS = CompareSettings()
_CHANGES = ("weight_change", "weight_change_quantile")


def compare(
    first: str,
    second: str,
    /,
    *,
    settings: CompareSettings = _DEFAULT_SETTINGS,
    text: TextOptions = DEFAULT_TEXT_OPTIONS,
    options: ModelOptions = DEFAULT_MODEL_OPTIONS,
    output: OutputSettings = DEFAULT_OUTPUT,
) -> int:
    """Sets the super weights of two models side by side, as of a base model and one that was tuned or merged from it.

    For each weight and model: its value, the super activation in its row, and what removing it does to the perplexity. And
    how much the second model changed it, beside the change of all weights of the same matrix. The models must have the same
    hidden size and as many layers.

    Args:
        first: A directory, a .gguf file, a Hub name or a URL.
        second: Another one.
    """
    check_targets(records=settings.out, charts=[settings.plot])
    progress = RichProgress()
    later = replace(options, revision=settings.second_revision)
    with open_model(first, options) as one, open_model(second, later) as other:
        windows = open_windows(one, text), open_windows(other, text)
        described = {"weights": settings.weights, **asdict(text), **_describe_second(other)}
        run = describe_model_run(one, options, command=sys.argv, settings=described)
        last = last_layer(one, options.layers)
        weights: tuple[Coordinate, ...] | None = None
        if settings.weights != "auto":
            weights = weights_of(settings.weights, one, options, progress)
        records = list(
            set_side_by_side(
                one, other, *windows, weights=weights, texts=options.prompt, last_layer=last, progress=progress
            )
        )
        warnings = add_warnings(run, other).warnings
        run = add_warnings(run, one)
        run = run.model_copy(update={"warnings": (*run.warnings, *warnings)})
    try:
        _leave(settings, run, records, f"{first} and {second}")
    finally:  # a full disk must not cost the answer
        if settings.out != STANDARD_STREAM:
            _show(records, output)
    return 0


def _describe_second(model: LoadedModel) -> dict[str, object]:
    """What the first line of the records, which is about the first model, must say of the second."""
    checkpoint = model.checkpoint
    return {
        "second": model.name,
        "second_revision": checkpoint.revision if checkpoint else None,
        "second_digest": checkpoint.digest if checkpoint else None,
    }


def _leave(settings: CompareSettings, run: Run, records: Sequence[Record], models: str) -> None:
    from superweights.report.comparison import comparison_chart
    from superweights.report.saving import save_chart

    if settings.out is not None:
        write_records(settings.out, run, records)
    if settings.plot is not None:
        save_chart(comparison_chart(records, title="Super weights side by side", model=models), settings.plot)


def _show(records: Sequence[Record], output: OutputSettings) -> None:
    found = [each for each in records if isinstance(each, MeasurementRecord)]
    if output.format != "table":
        write_rows([each.model_dump(mode="json") for each in found], format=output.format)
        return
    rows: dict[tuple[str, str], dict[str, object]] = {}
    for each in found:
        if each.subject:
            row = rows.setdefault((each.subject, each.condition), {"coordinate": each.subject})
            row.update({"model": each.condition} if each.name not in _CHANGES else {}, **_cells(each))
    models = [row for row in rows.values() if "model" in row]
    changes = [row for row in rows.values() if "model" not in row]
    order = list(dict.fromkeys(each.subject for each in found))
    write_table(
        sorted(models, key=lambda row: order.index(str(row["coordinate"]))), title="Super weights side by side."
    )
    if changes:
        write_text("\n")
        between = next(each.condition for each in found if each.name in _CHANGES)
        write_table(changes, title=f"Change from {between}, and the share of the same matrix that changed less.")
    for each in found:
        if each.name == "perplexity":
            data = f"on {each.count} windows of {each.dataset}"
            write_text(f"\nperplexity of {each.condition}: {each.value:.6g} ({span(each)}) {data}\n")
    write_text("".join(f"\n{each.text}\n" for each in records if isinstance(each, NoteRecord)))


def _cells(each: MeasurementRecord) -> dict[str, object]:
    """The columns that a measurement fills in its row."""
    match each.name:
        case "weight_rank":
            return {"|W| rank": f"{each.value:g} of {each.count}"}
        case "perplexity_ratio_removed":
            return {"without / with": each.value, "95 % interval": span(each)}
        case "weight_change":
            return {"relative change": each.value}
        case "weight_change_quantile":
            return {"changed less": each.value}
        case _:
            return {each.name.replace("_", " "): each.value}
