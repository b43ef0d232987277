"""The verb `verify`: which weights the model needs, alone or together, against a null."""

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
from superweights.experiments.verify import Verification, VerifySettings
from superweights.experiments.verify import verify as run_verify
from superweights.model.loading import LoadedModel
from superweights.progress import RichProgress
from superweights.results.records import NoteRecord, Record, VerdictRecord
from superweights.results.store import STANDARD_STREAM, write_records

_NO = 1
VERIFY_LENGTH = 512
"""Tokens of a window where nothing is said: more windows of a short text decide sooner than few long ones."""


@Parameter(name="*", negative=())
@dataclass(frozen=True, slots=True)
class VerdictSettings:
    """What `verify` looks at and what it leaves behind."""

    weights: Annotated[str, HYPHEN_ALLOWED, Parameter(metavar="WEIGHTS")] = "auto"
    """Which weights: auto (find them first), published (from the index), a .jsonl file of `find` (- for stdin), or coordinates
    such as 2:3968:7003, separated by commas."""
    out: Annotated[str | None, FILE, HYPHEN_ALLOWED] = None
    """Write all records to this .jsonl file; - writes them to stdout in place of the table."""
    plot: Annotated[str | None, FILE] = None
    """Draw the verdicts, with intervals and the null, to this .png, .svg, .pdf or .html file."""


_DEFAULT_SETTINGS = VerdictSettings()
_DEFAULT_VERIFICATION = Parameter(name="*", group="Certainty and cost", negative=())(VerifySettings)()


def verify(
    model: str,
    /,
    *,
    settings: VerdictSettings = _DEFAULT_SETTINGS,
    verification: VerifySettings = _DEFAULT_VERIFICATION,
    text: TextOptions = DEFAULT_TEXT_OPTIONS,
    options: ModelOptions = DEFAULT_MODEL_OPTIONS,
    output: OutputSettings = DEFAULT_OUTPUT,
) -> int:
    """Says of each weight whether the model needs it: removes it alone, together with the others, and all but it.

    Random weights among the largest of the same matrices are removed as well, one by one and in sets: the null. Verdicts:
    *critical alone* or *critical jointly*, where removal multiplies the perplexity by --critical or more with the whole 95 %
    interval and beyond the null; *contributing*, where it costs more than the null; *inert*, where it costs at most 1 % more
    than the null, with the whole interval; *undecided*, where the text is too short to tell. Windows have 512 tokens unless
    --length says otherwise. Measuring stops as soon as the intervals decide. Exit status 1: no weight is critical.

    Args:
        model: A directory, a .gguf file, a Hub name or a URL.
    """
    check_targets(records=settings.out, charts=[settings.plot])
    with open_model(model, options) as loaded:
        run = describe_model_run(
            loaded,
            options,
            command=sys.argv,
            settings={"weights": settings.weights, **asdict(verification), **asdict(text)},
        ).model_copy(update={"seed": verification.seed})
        windows = open_windows(loaded, text, at_most=VERIFY_LENGTH)
        progress = RichProgress()
        weights = weights_of(settings.weights, loaded, options, progress)
        if not weights:
            nothing = f"No super weight candidate in {model}: there is nothing to verify. Name weights with --weights."
            if settings.out is not None:
                write_records(settings.out, add_warnings(run, loaded), [NoteRecord(level="info", text=nothing)])
            write_text(f"{nothing}\n" if settings.out != STANDARD_STREAM else "")
            return _NO
        found = run_verify(loaded, weights, windows, settings=verification, progress=progress)
        run = add_warnings(run, loaded)
    records = list(found.records())
    try:
        if settings.out is not None:
            write_records(settings.out, run, records)
        if settings.plot is not None:
            draw_verdicts(records, settings.plot, model)
    finally:  # a full disk must not cost the answer
        if settings.out != STANDARD_STREAM:
            show_verdicts(loaded, found, records, output)
    return 0 if found.weights else _NO


def draw_verdicts(records: Sequence[Record], target: str, model: str) -> None:
    """Draws the verdicts to a file."""
    from superweights.report.saving import save_chart
    from superweights.report.verdicts import verdicts_chart

    save_chart(verdicts_chart(records, title="What removal does", model=model), target)


def show_verdicts(loaded: LoadedModel, found: Verification, records: Sequence[Record], output: OutputSettings) -> None:
    """Prints the verdicts."""
    verdicts = [each for each in records if isinstance(each, VerdictRecord)]
    if output.format != "table":
        write_rows([each.model_dump(mode="json") for each in verdicts], format=output.format)
        return
    write_table([_row(each) for each in verdicts], title=_headline(loaded, found, verdicts))
    write_text(
        "\nratio: perplexity with the weights removed over that of the original, with its 95 % interval, paired over windows.\n"
        "rest: ratio with all candidates removed but this one. null: largest ratio of random weights among the largest of the "
        "same matrices.\n"
    )
    write_text("".join(f"\n{each.text}\n" for each in records if isinstance(each, NoteRecord)))


def _row(verdict: VerdictRecord) -> dict[str, object]:
    low, high = verdict.interval
    return {
        "weights": ", ".join(verdict.weights) if verdict.kind != "all" else f"all {len(verdict.weights)} together",
        "verdict": verdict.label,
        "ratio": verdict.ratio,
        "95 % interval": f"{low:.5g} to {high:.5g}",
        "rest": verdict.without,
        "null": verdict.null_maximum,
        "draws": verdict.null_count,
    }


def _headline(loaded: LoadedModel, found: Verification, verdicts: Sequence[VerdictRecord]) -> str:
    first = verdicts[0]
    needed = len(found.weights)
    what = f"{loaded.name} needs {needed} of {sum(each.kind == 'single' for each in verdicts)} weights"
    return (
        f"{what}; measured on {first.count} windows of {found.evaluation.windows.length} tokens of {first.dataset}, "
        f"original perplexity {_original(found):.4g}."
    )


def _original(found: Verification) -> float:
    from superweights.measurements.intervals import perplexity

    return perplexity(found.evaluation.nll(found.evaluation.conditions[0])).value
