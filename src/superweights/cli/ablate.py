"""The verb `ablate`: the paper's table 1."""

import sys
from collections.abc import Iterator, Sequence
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
from superweights.cli.output import DEFAULT_OUTPUT, OutputSettings, with_interval, write_rows, write_table, write_text
from superweights.cli.task_options import DEFAULT_TASK_OPTIONS, TaskOptions, task_records, write_tasks
from superweights.cli.text_options import DEFAULT_TEXT_OPTIONS, TextOptions, open_windows
from superweights.cli.weights_option import weights_of
from superweights.coordinates import Coordinate
from superweights.errors import UsageError
from superweights.experiments.ablation import ablate as run_ablation
from superweights.experiments.ablation import ablation_conditions
from superweights.interventions.rows import applied
from superweights.model.loading import LoadedModel
from superweights.progress import RichProgress
from superweights.results.records import MeasurementRecord, NoteRecord, Record, Run
from superweights.results.store import STANDARD_STREAM, write_records


@Parameter(name="*", negative=())
@dataclass(frozen=True, slots=True)
class AblateSettings:
    """What `ablate` removes, measures and leaves behind."""

    weights: Annotated[str, HYPHEN_ALLOWED, Parameter(metavar="WEIGHTS")] = "auto"
    """Which weights: auto (find them first), published (from the index), a .jsonl file of `find` (- for stdin), or coordinates
    such as 2:3968:7003, separated by commas."""
    others: Annotated[str | None, Parameter(metavar="SHARE|COUNT")] = None
    """How many of the largest other weights the control removes: a share of every matrix, as 1e-6, or a count for each, as 16.
    By default the paper's share of 1e-6, and at least one weight of every matrix."""
    sample: str = "My favorite condiment is"
    """A prompt that every condition continues; an empty text leaves it out."""
    out: Annotated[str | None, FILE, HYPHEN_ALLOWED] = None
    """Write all records to this .jsonl file; - writes them to stdout in place of the table."""
    plot: Annotated[str | None, FILE] = None
    """Draw the table to this .png, .svg, .pdf or .html file."""


_DEFAULT_SETTINGS = AblateSettings()


def ablate(
    model: str,
    /,
    *,
    settings: AblateSettings = _DEFAULT_SETTINGS,
    tasks: TaskOptions = DEFAULT_TASK_OPTIONS,
    text: TextOptions = DEFAULT_TEXT_OPTIONS,
    options: ModelOptions = DEFAULT_MODEL_OPTIONS,
    output: OutputSettings = DEFAULT_OUTPUT,
) -> int:
    """Measures the model without its super weights, as in table 1 of the paper.

    Beside the original: its super weights removed; many other large weights removed; the super weights removed and the super
    activation put back. Perplexity on a text, KL and agreement with the original, and zero-shot tasks with --tasks.

    Args:
        model: A directory, a .gguf file, a Hub name or a URL.
    """
    others = _amount(settings.others)
    check_targets(records=settings.out, charts=[settings.plot])
    with open_model(model, options) as loaded:
        run = describe_model_run(
            loaded,
            options,
            command=sys.argv,
            settings={**asdict(settings), **tasks.described(), **asdict(text)},
        )
        windows = open_windows(loaded, text)
        progress = RichProgress()
        weights = weights_of(settings.weights, loaded, options, progress)
        if not weights:
            write_text(f"No super weight candidate in {model}: nothing was removed. Name weights with --weights.\n")
            return 0
        found = run_ablation(loaded, weights, windows, others=others, progress=progress)
        records: list[Record] = [*found.records(), *_more(loaded, settings, tasks, weights, others, progress)]
        run = add_warnings(run, loaded)
    try:
        _leave(settings, run, records, model)
    finally:  # a full disk must not cost the answer
        if settings.out != STANDARD_STREAM:
            _show(records, weights, model, output)
    return 0


def _amount(text: str | None) -> float | int | None:
    if text is None:
        return None
    try:
        amount = int(text) if text.isdecimal() else float(text)
        if amount > 0:
            return amount
    except ValueError:
        pass
    raise UsageError(
        f"--others {text} is no amount. Write a share of every matrix, as 1e-6, or a count for each, as 16."
    )


def _more(
    loaded: LoadedModel,
    settings: AblateSettings,
    tasks: TaskOptions,
    weights: Sequence[Coordinate],
    others: float | int | None,
    progress: RichProgress,
) -> Iterator[Record]:
    """Samples and tasks under every condition."""
    from superweights.measurements.generation import continue_text

    for condition in ablation_conditions(loaded, weights, others=others):
        if settings.sample and loaded.tokenizer is not None:
            with applied(loaded, condition):
                continued = continue_text(loaded, settings.sample)
            yield NoteRecord(level="info", text=f"{condition.name}: {settings.sample!r} goes on {continued!r}")
        yield from task_records(loaded, tasks, [condition], progress)


def _leave(settings: AblateSettings, run: Run, records: Sequence[Record], model: str) -> None:
    from superweights.report.ablation import ablation_chart
    from superweights.report.saving import save_chart

    if settings.out is not None:
        write_records(settings.out, run, records)
    if settings.plot is not None:
        save_chart(ablation_chart(records, title="Without its super weights", model=model), settings.plot)


def _show(records: Sequence[Record], weights: Sequence[Coordinate], model: str, output: OutputSettings) -> None:
    measured = [each for each in records if isinstance(each, MeasurementRecord)]
    if output.format != "table":
        write_rows([each.model_dump(mode="json") for each in measured], format=output.format)
        return
    conditions = dict.fromkeys(each.condition for each in measured)
    first = measured[0]
    title = (
        f"{model} without {', '.join(map(str, weights))}; {first.count} windows of {first.dataset}. "
        "In brackets: 95 % intervals."
    )
    on_text, on_tasks = ([each for each in measured if bool(each.subject) == tasks] for tasks in (False, True))
    write_table([_row(name, [each for each in on_text if each.condition == name]) for name in conditions], title=title)
    write_tasks(on_tasks)
    write_text("".join(f"\n{each.text}\n" for each in records if isinstance(each, NoteRecord)))


def _row(condition: str, measured: Sequence[MeasurementRecord]) -> dict[str, object]:
    headings = {
        "perplexity": "perplexity",
        "perplexity_ratio": "ratio",
        "kl_to_original": "KL, nats",
        "top1_agreement": "same top token",
    }
    return {
        "condition": condition,
        **{headings.get(each.name, each.name): with_interval(each.value, each.interval) for each in measured},
    }
