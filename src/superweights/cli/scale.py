"""The verb `scale`: what multiplying the super weights does, and which factor is best."""

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
from superweights.errors import UsageError
from superweights.experiments.scaling import ScalingSettings
from superweights.experiments.scaling import scale as measure
from superweights.progress import RichProgress
from superweights.results.records import MeasurementRecord, NoteRecord, Record, Run
from superweights.results.store import STANDARD_STREAM, write_records


@Parameter(name="*", negative=())
@dataclass(frozen=True, slots=True)
class ScaleSettings:
    """What `scale` tries and what it leaves behind."""

    weights: Annotated[str, HYPHEN_ALLOWED, Parameter(metavar="WEIGHTS")] = "auto"
    """Which weights to scale, all together: auto (find them first), published (from the index), a .jsonl file of `find` (- for
    stdin), or coordinates such as 2:3968:7003, separated by commas."""
    factors: Annotated[str, Parameter(metavar="F,F,...")] = ",".join(f"{each:g}" for each in ScalingSettings().factors)
    """What they are multiplied by; 1, the original, is always among them. Negative ones as --factors=-1,0,1."""
    seed: int = 0
    """Seed of the halves and of the bootstrap."""
    out: Annotated[str | None, FILE, HYPHEN_ALLOWED] = None
    """Write all records to this .jsonl file; - writes them to stdout in place of the table."""
    plot: Annotated[str | None, FILE] = None
    """Draw the perplexity ratio over the factor to this .png, .svg, .pdf or .html file."""


_DEFAULT_SETTINGS = ScaleSettings()


def scale(
    model: str,
    /,
    *,
    settings: ScaleSettings = _DEFAULT_SETTINGS,
    text: TextOptions = DEFAULT_TEXT_OPTIONS,
    options: ModelOptions = DEFAULT_MODEL_OPTIONS,
    output: OutputSettings = DEFAULT_OUTPUT,
) -> int:
    """Measures perplexity with the weights of --weights multiplied by one factor after the other, as in figure 6 of the paper.

    The best of many factors looks good on the text it was chosen on. So the gain is measured at factors chosen on other
    windows: the best for one half of the windows is measured on the other half, both ways. It is real when its 95 % interval
    stays below 1.

    Args:
        model: A directory, a .gguf file, a Hub name or a URL.
    """
    scaling = ScalingSettings(_factors(settings.factors), seed=settings.seed)
    check_targets(records=settings.out, charts=[settings.plot])
    progress = RichProgress()
    with open_model(model, options) as loaded:
        windows = open_windows(loaded, text)
        described = {"weights": settings.weights, **asdict(scaling), **asdict(text)}
        run = describe_model_run(loaded, options, command=sys.argv, settings=described)
        weights = weights_of(settings.weights, loaded, options, progress)
        records: list[Record] = [
            NoteRecord(level="warning", text="No super weight candidate was found, so nothing was scaled.")
        ]
        if weights:
            records = list(measure(loaded, weights, windows, settings=scaling, progress=progress))
        run = add_warnings(run, loaded)
    try:
        _leave(settings, run, records, model)
    finally:  # a full disk must not cost the answer
        if settings.out != STANDARD_STREAM:
            _show(records, model, output)
    return 0


def _factors(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(each) for each in text.split(","))
    except ValueError:
        raise UsageError(f"--factors {text} are no numbers. Write them with commas, as 0,0.5,1,2.") from None


def _leave(settings: ScaleSettings, run: Run, records: Sequence[Record], model: str) -> None:
    from superweights.report.saving import save_chart
    from superweights.report.scaling import scaling_chart

    if settings.out is not None:
        write_records(settings.out, run, records)
    if settings.plot is not None and any(isinstance(each, MeasurementRecord) for each in records):
        save_chart(scaling_chart(records, title="Scaling the super weights", model=model), settings.plot)


def _show(records: Sequence[Record], model: str, output: OutputSettings) -> None:
    found = [each for each in records if isinstance(each, MeasurementRecord)]
    if output.format != "table":
        write_rows([each.model_dump(mode="json") for each in found], format=output.format)
        return
    if found:
        first = found[0]
        rows: dict[str, dict[str, object]] = {}
        for each in found:
            rows.setdefault(each.condition, {"factor": each.intervention.get("factor", 1.0)}).update(_cells(each))
        write_table(
            sorted(rows.values(), key=lambda row: float(str(row["factor"]))),
            title=f"Super weights of {model} scaled, on {first.count} windows of {first.dataset}.",
        )
        write_text("".join(f"\n{_sentence(each)}\n" for each in found if each.name == "best_factor"))
    write_text("".join(f"\n{each.text}\n" for each in records if isinstance(each, NoteRecord)))


def _cells(each: MeasurementRecord) -> dict[str, object]:
    """The columns that a measurement fills in its row."""
    columns = {
        "perplexity": "perplexity",
        "perplexity_ratio": "/ original",
        "kl_to_original": "KL, nats",
        "top1_agreement": "same top token",
    }
    if each.name not in columns:
        return {}
    cells: dict[str, object] = {columns[each.name]: each.value}
    if each.name == "perplexity_ratio":
        cells["95 % interval"] = span(each)
    return cells


def _sentence(best: MeasurementRecord) -> str:
    return f"Lowest mean loss at factor {best.value:g}; 95 % of bootstrap samples have theirs at {span(best)}."


def span(each: MeasurementRecord) -> str | None:
    """The interval of a measurement as text; None where there is none."""
    return None if each.interval is None else f"{each.interval[0]:.5g} to {each.interval[1]:.5g}"
