"""The verb `audit`: was the super weight kept?"""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Annotated

from cyclopts import Parameter

from superweights.checkpoint import Checkpoint
from superweights.checkpoint.opening import open_dequantized
from superweights.checkpoint.packed.unpacked import UnpackedCheckpoint
from superweights.checkpoint.quantized import stored_settings
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
from superweights.cli.quantize_tables import show_measured
from superweights.cli.text_options import DEFAULT_TEXT_OPTIONS, TextOptions, open_windows
from superweights.cli.weights_option import weights_of
from superweights.coordinates import Coordinate
from superweights.detection.published import published_name, usable_weights
from superweights.errors import CoordinateError, MalformedFileError, SuperweightsError, UnknownNameError, UsageError
from superweights.experiments.audit import audit_weights, measure_audit, require_same_model
from superweights.interventions.adapter import check_adapter
from superweights.interventions.quantized_checkpoint import ADAPTER_FOLDER
from superweights.progress import RichProgress
from superweights.results.records import AuditRecord, MeasurementRecord, NoteRecord, Record
from superweights.results.store import STANDARD_STREAM, write_records


@Parameter(name="*", negative=())
@dataclass(frozen=True, slots=True)
class AuditSettings:
    """What `audit` compares with, and what it leaves behind."""

    original: Annotated[str | None, Parameter(metavar="MODEL")] = None
    """The model before it was quantized: gives the values to compare with, and lets the cost be measured. Without it, values
    come from the files where `superweights quantize` wrote them, or from the index of published weights."""
    weights: Annotated[str, HYPHEN_ALLOWED, Parameter(metavar="WEIGHTS")] = "auto"
    """Which weights: auto (find them in the original; without it those that the files name, or found in them), published
    (from the index), a .jsonl file of `find` (- for stdin), or coordinates such as 2:3968:7003, separated by commas."""
    no_measure: bool = False
    """Do not measure what the errors cost."""
    out: Annotated[str | None, FILE, HYPHEN_ALLOWED] = None
    """Write all records to this .jsonl file; - writes them to stdout in place of the table."""


_DEFAULT_SETTINGS = AuditSettings()


def audit(
    quantized: str,
    /,
    *,
    settings: AuditSettings = _DEFAULT_SETTINGS,
    text: TextOptions = DEFAULT_TEXT_OPTIONS,
    options: ModelOptions = DEFAULT_MODEL_OPTIONS,
    output: OutputSettings = DEFAULT_OUTPUT,
) -> int:
    """Says what a quantizer did to super weights, from the codes and scales in the files.

    For each weight: its stored value against the original, in percent and in steps of its own grid; whether it was cut off;
    the error of the weights that share its scale; and a verdict: kept (within 5 %), bent (within a half), lost. With --original
    it also measures what that error does alone, what all of the quantization does, and what comes back when the super weights
    are put back. Ends with status 1 where a weight is lost.

    Read are GPTQ, AWQ, auto-round, bitsandbytes, compressed-tensors, fp8, torchao, HQQ, quanto, GGUF, and plain checkpoints.

    Args:
        quantized: A directory, a .gguf file, a Hub name or a URL of the quantized model.
    """
    check_targets(records=settings.out, charts=[])
    progress = RichProgress()
    with ExitStack() as stack:
        revision = None if settings.original else options.revision
        looked_at = stack.enter_context(open_dequantized(quantized, revision=revision))
        model = stack.enter_context(open_model(settings.original or quantized, options))
        described = {**asdict(settings), "quantized": quantized, **asdict(text)}
        run = describe_model_run(model, options, command=sys.argv, settings=described)
        if settings.original and model.checkpoint is not None:
            require_same_model(looked_at, model.checkpoint)
        recorded = {} if settings.original else _recorded(looked_at)
        if settings.weights == "auto" and recorded:
            weights = tuple(recorded)
        else:
            weights = weights_of(settings.weights, model, options, progress)
        if not weights:
            write_text(f"No super weight candidate in {settings.original or quantized}: name weights with --weights.\n")
            write_text("".join(f"\n{each.text}\n" for each in _adapter_note(looked_at)))
            return 0
        original = model.checkpoint if settings.original else None
        records: list[Record] = []
        audited = list(
            audit_weights(looked_at, weights, original=original, values=_known(quantized, weights) | recorded)
        )
        records += audited
        if settings.original and not settings.no_measure:
            windows = open_windows(model, text)
            records += measure_audit(model, looked_at, audited, windows, progress=progress)
        if not settings.original:
            records.append(
                NoteRecord(
                    level="info", text="Give --original to compare with it, and to measure what the errors cost."
                )
            )
        records += _adapter_note(looked_at)
        run = add_warnings(run, model)
    try:
        if settings.out is not None:
            write_records(settings.out, run, records)
    finally:  # a full disk must not cost the answer
        if settings.out != STANDARD_STREAM:
            _show(records, quantized, output)
    return int(any(each.verdict == "lost" for each in audited))


def _known(name: str, weights: Sequence[Coordinate]) -> dict[Coordinate, float]:
    """Published values of these weights, where the index knows the model."""
    try:
        published = usable_weights(published_name(name))
    except (UnknownNameError, UsageError):
        return {}
    values = {
        each.coordinate: each.value for each in published if each.coordinate is not None and each.value is not None
    }
    return {each: values[each] for each in weights if each in values}


def _recorded(quantized: Checkpoint) -> dict[Coordinate, float]:
    """The kept weights and their values that `quantize` wrote into the config."""
    packed = quantized.packed if isinstance(quantized, UnpackedCheckpoint) else quantized
    found = {}
    for _, settings in stored_settings(packed.config):
        for each in settings.get("super_weights") or () if isinstance(settings, dict) else ():
            try:
                found[Coordinate.parse(each["coordinate"])] = float(each["value"])
            except (TypeError, KeyError, ValueError, CoordinateError) as error:
                raise MalformedFileError(
                    f"config.json of {quantized.reference} has the super weight {each!r:.80}, which is none: {error}. Quantize "
                    "the model again."
                ) from error
    return found


def _adapter_note(quantized: Checkpoint) -> list[NoteRecord]:
    """Says what restores weights that `quantize --keep-in adapter` left out."""
    packed = quantized.packed if isinstance(quantized, UnpackedCheckpoint) else quantized
    folder = packed.directory / ADAPTER_FOLDER
    if not (folder / "superweights.json").is_file():
        return []
    try:
        restored = ", ".join(str(each.coordinate) for each in check_adapter(folder, packed).weights)
        text = f"The adapter in {folder} was made for these files and restores {restored}. Load it with the model."
    except SuperweightsError as error:
        return [NoteRecord(level="warning", text=str(error))]
    return [NoteRecord(level="info", text=text)]


def _show(records: Sequence[Record], quantized: str, output: OutputSettings) -> None:
    audited = [each for each in records if isinstance(each, AuditRecord)]
    if output.format != "table":
        write_rows([each.model_dump(mode="json") for each in audited], format=output.format)
        return
    rows = [
        {
            "coordinate": each.coordinate,
            "verdict": each.verdict,
            "format": each.format,
            "original": each.original,
            "stored": each.stored,
            "error": None if each.error is None else f"{100 * each.error:+.3g} %",
            "steps": each.error_steps and round(each.error_steps, 2),
            "cut off": None if each.clipped is None else ("yes" if each.clipped else "no"),
            "neighbours' error": None if each.block_error is None else f"{100 * each.block_error:.3g} %",
            "sharing": each.block_size,
            "column x": None if each.column_scale == 1 else round(each.column_scale, 3),
        }
        for each in audited
    ]
    write_table(rows, title=f"Super weights in {quantized}.")
    measured: list[Record] = [each for each in records if isinstance(each, MeasurementRecord | NoteRecord)]
    if measured:
        write_text("\n")
        show_measured(measured, model=quantized, output=output)
