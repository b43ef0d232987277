"""The verb `find`: which scalars may be super weights, and the evidence."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Literal

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
from superweights.cli.text_options import TextOptions, open_windows
from superweights.detection.candidates import DetectionSettings
from superweights.detection.recording import record_findings
from superweights.detection.search import Findings, default_prompts
from superweights.detection.search import find as search
from superweights.model.loading import LoadedModel
from superweights.progress import RichProgress
from superweights.results.records import CandidateRecord, NoteRecord, Record, Run
from superweights.results.store import STANDARD_STREAM, write_records

if TYPE_CHECKING:
    from superweights.experiments.verify import Verification


@Parameter(name="*", negative=())
@dataclass(frozen=True, slots=True)
class FindSettings:
    """How `find` searches and what it leaves behind."""

    method: Literal["residual", "paper"] = "residual"
    """residual: from the residual stream, remove and repeat. paper: pair the largest input and output of each down projection
    in one pass, as the paper's code does; kept for comparison."""
    out: Annotated[str | None, FILE, HYPHEN_ALLOWED] = None
    """Write all records (peaks, candidates, notes) to this .jsonl file; - writes them to stdout in place of the table."""
    verify: bool = False
    """Go on to verify what was found, as the verb verify does with its defaults: does the model need it, alone or together?"""
    plot: Annotated[str | None, FILE] = None
    """Draw max |input| and |output| of the down projections by layer to this .png, .svg, .pdf or .html file."""


_DEFAULT_SETTINGS = FindSettings()
_DEFAULT_TEXT = Parameter(name="*", group="With --verify", negative=())(TextOptions)()
_DEFAULT_DETECTION = Parameter(name="*", group="Thresholds")(DetectionSettings)()


def find(
    model: str,
    /,
    *,
    settings: FindSettings = _DEFAULT_SETTINGS,
    options: ModelOptions = DEFAULT_MODEL_OPTIONS,
    detection: DetectionSettings = _DEFAULT_DETECTION,
    text: TextOptions = _DEFAULT_TEXT,
    output: OutputSettings = DEFAULT_OUTPUT,
) -> int:
    """Finds super weight candidates from forward passes over a few short prompts. Needs no data set.

    A candidate makes a decisive share of a super activation: a value of the residual stream that dwarfs its median, appears
    at one layer and persists. It is removed and the search repeated. A candidate is a structure, not yet a verdict: whether the
    model needs it is another question, which --verify and the verb verify answer on a text. Finding none is an answer too, with
    its reason and exit status 0.

    Args:
        model: A directory, a .gguf file, a Hub name or a URL.
    """
    check_targets(records=settings.out, charts=[settings.plot])
    with open_model(model, options) as loaded:
        run = describe_model_run(
            loaded,
            options,
            command=sys.argv,
            settings={"method": settings.method, **asdict(detection), **(asdict(text) if settings.verify else {})},
        )
        findings = search(
            loaded,
            prompts=default_prompts(loaded, options.prompt),
            method=settings.method,
            settings=detection,
            last_layer=last_layer(loaded, options.layers),
            progress=RichProgress(),
        )
        records = list(record_findings(findings))
        verification = _verify(loaded, findings, text) if settings.verify and findings.candidates else None
        verdicts = list(verification.records()) if verification else []
        try:
            _leave(settings, add_warnings(run, loaded), [*records, *verdicts], model)
        finally:  # a full disk must not cost the answer
            if settings.out != STANDARD_STREAM:
                _show(loaded, findings, records, output)
                if verification:
                    from superweights.cli.verify import show_verdicts

                    write_text("\n" if output.format == "table" else "")
                    show_verdicts(loaded, verification, verdicts, output)
    return 0


def _verify(loaded: LoadedModel, findings: Findings, text: TextOptions) -> "Verification":
    from superweights.cli.verify import VERIFY_LENGTH
    from superweights.experiments.verify import verify

    windows = open_windows(loaded, text, at_most=VERIFY_LENGTH)
    return verify(loaded, [each.coordinate for each in findings.candidates], windows, progress=RichProgress())


def _leave(settings: FindSettings, run: Run, records: Sequence[Record], model: str) -> None:
    from superweights.report.peaks import peaks_chart
    from superweights.report.saving import save_chart

    if settings.out is not None:
        write_records(settings.out, run, records)
    if settings.plot is not None:
        save_chart(peaks_chart(records, title="Down projection peaks by layer", model=model), settings.plot)


def _show(loaded: LoadedModel, findings: Findings, records: Sequence[Record], output: OutputSettings) -> None:
    candidates = [each for each in records if isinstance(each, CandidateRecord)]
    if output.format != "table":
        write_rows([each.model_dump(mode="json") for each in candidates], format=output.format)
        return
    write_table([_row(each) for each in candidates], title=_headline(loaded, findings, candidates))
    write_text("".join(f"\n{each.text}" for each in records if isinstance(each, NoteRecord)) + "\n")
    if candidates:
        write_text(
            "\nx, y: input at col and output at row of the layer's down projections, at this token of this prompt.\n"
            "share: part of y that W[row, col] * x makes; stream share: part of the super activation.\n"
            "medians: size of the super activation in medians of the residual stream; persists: part of the later layers that "
            "keep it.\nset: candidates of one set share a row or a col; round: 0 is the unedited model, then what was found is "
            "removed.\n"
        )


def _headline(loaded: LoadedModel, findings: Findings, candidates: Sequence[CandidateRecord]) -> str:
    count, sets = len(candidates), len({each.set for each in candidates})
    passes = f"{len(findings.traces)} forward {'pass' if len(findings.traces) == 1 else 'passes'}"
    if not count:
        return f"No super weight candidate in {loaded.name} ({passes})."
    noun = "candidate" if count == 1 else "candidates"
    return f"{count} super weight {noun} in {sets} {'set' if sets == 1 else 'sets'} in {loaded.name} ({passes})."


def _row(candidate: CandidateRecord) -> dict[str, object]:
    activation, median = candidate.super_activation, candidate.median
    return {
        "coordinate": candidate.coordinate,
        "value": candidate.value,
        "|W| rank": f"{candidate.rank} of {candidate.matrix_size}",
        "x": candidate.input_peak,
        "y": candidate.output_peak,
        "share": round(candidate.share, 3),
        "super activation": activation,
        "medians": None if activation is None or not median else round(abs(activation) / median),
        "stream share": None if candidate.stream_share is None else round(candidate.stream_share, 3),
        "persists": None if candidate.persistence is None else round(candidate.persistence, 2),
        "token": f"{candidate.token_text!r} at {candidate.token}",
        "prompt": candidate.prompt,
        "set": candidate.set,
        "round": candidate.round,
    }
