"""The verb `stopwords`: what the model says next, with and without its super weights."""

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
from superweights.cli.weights_option import weights_of
from superweights.experiments.stop_words import StopWordSettings, stop_words
from superweights.measurements.texts import DEFAULT_TEXT, read_text
from superweights.progress import RichProgress
from superweights.results.records import MeasurementRecord, NoteRecord, Record, Run
from superweights.results.store import STANDARD_STREAM, write_records


@Parameter(name="*", negative=())
@dataclass(frozen=True, slots=True)
class StopwordsSettings:
    """What `stopwords` removes, what it measures on and what it leaves behind."""

    weights: Annotated[str, HYPHEN_ALLOWED, Parameter(metavar="WEIGHTS")] = "auto"
    """Which weights to remove: auto (find them first), published (from the index), a .jsonl file of `find` (- for stdin), or
    coordinates such as 2:3968:7003, separated by commas."""
    text: Annotated[str, Parameter(metavar="TEXT")] = DEFAULT_TEXT
    """Text of the prompts: heldout (passages of books, comes with the package), lambada (the paper's, from the Hub), wikitext2
    or c4, or a file: .jsonl, .json, .parquet (FILE::FIELD takes another field than "text") or plain text."""
    out: Annotated[str | None, FILE, HYPHEN_ALLOWED] = None
    """Write all records to this .jsonl file; - writes them to stdout in place of the table."""
    plot: Annotated[str | None, FILE] = None
    """Draw the probabilities of the tokens to this .png, .svg, .pdf or .html file."""


_DEFAULT_SETTINGS = StopwordsSettings()
_DEFAULT_MEASURED = Parameter(name="*", negative=(), group="Prompts")(StopWordSettings)()


def stopwords(
    model: str,
    /,
    *,
    settings: StopwordsSettings = _DEFAULT_SETTINGS,
    measured: StopWordSettings = _DEFAULT_MEASURED,
    options: ModelOptions = DEFAULT_MODEL_OPTIONS,
    output: OutputSettings = DEFAULT_OUTPUT,
) -> int:
    """Averages what the model says next over many prompts, with and without the weights of --weights.

    Three states of the model are compared, as in figure 5 of the paper: the original, the weights removed, and removed with
    their super activation put back at one token. The paper says that without a super weight, stop words become 2 to 5 times
    more likely; its own data show that for Llama-7B, in part for OLMo-7B and not for Mistral-7B.

    Args:
        model: A directory, a .gguf file, a Hub name or a URL.
    """
    check_targets(records=settings.out, charts=[settings.plot])
    progress = RichProgress()
    text = read_text(settings.text)
    with open_model(model, options) as loaded:
        described = {"weights": settings.weights, "text": settings.text, **asdict(measured)}
        run = describe_model_run(loaded, options, command=sys.argv, settings=described)
        weights = weights_of(settings.weights, loaded, options, progress)
        records = list(stop_words(loaded, weights, text, settings=measured, progress=progress))
        if not weights:
            note = "No super weight candidate was found, so nothing was removed."
            records.append(NoteRecord(level="warning", text=note))
        run = add_warnings(run, loaded)
    try:
        _leave(settings, run, records, model)
    finally:  # a full disk must not cost the answer
        if settings.out != STANDARD_STREAM:
            _show(records, model, measured, output)
    return 0


def _leave(settings: StopwordsSettings, run: Run, records: Sequence[Record], model: str) -> None:
    from superweights.report.saving import save_chart
    from superweights.report.stop_words import stop_words_chart

    if settings.out is not None:
        write_records(settings.out, run, records)
    if settings.plot is not None:
        save_chart(stop_words_chart(records, title="What the model says next", model=model), settings.plot)


def _show(records: Sequence[Record], model: str, measured: StopWordSettings, output: OutputSettings) -> None:
    found = [each for each in records if isinstance(each, MeasurementRecord)]
    if output.format != "table":
        write_rows([each.model_dump(mode="json") for each in found], format=output.format)
        return
    masses, tokens, case = (
        _table(found, each) for each in ("stop_word_mass", "next_token_probability", "case_probability")
    )
    first = found[0]
    changes = [each for each in found if each.name == "stop_word_mass_change"]
    title = f"Mean next-token probability in {model}, over {first.count} prompts of {first.dataset}, in percent."
    write_table([*({**row, "token": "all stop words"} for row in masses), *tokens], title=title)
    write_text("".join(f"\n{_describe(each)}" for each in changes) + "\n" * bool(changes))
    if case:
        write_text("\n")
        write_table(case, title=f"After {measured.case!r}:")
    write_text("".join(f"\n{each.text}\n" for each in records if isinstance(each, NoteRecord)))


def _table(found: Sequence[MeasurementRecord], name: str) -> list[dict[str, object]]:
    """One row for each subject, one column for each condition, in percent."""
    rows: dict[str, dict[str, object]] = {}
    for each in found:
        if each.name == name:
            rows.setdefault(each.subject, {"token": repr(each.subject)})[each.condition] = 100 * each.value
    return list(rows.values())


def _describe(change: MeasurementRecord) -> str:
    interval = (
        "" if change.interval is None else " ({:+.3g} to {:+.3g})".format(*(100 * each for each in change.interval))
    )
    return f"Stop words, {change.condition} minus original: {100 * change.value:+.3g} points{interval}."
