"""The tables of `quantize`."""

from collections.abc import Sequence
from pathlib import Path

from superweights.cli.output import OutputSettings, with_interval, write_rows, write_table, write_text
from superweights.cli.task_options import write_tasks
from superweights.coordinates import Coordinate
from superweights.interventions.quantized_checkpoint import ADAPTER_FOLDER, QuantizedCheckpoint
from superweights.results.records import MeasurementRecord, NoteRecord, Record

_COLUMNS = {
    "bits_per_weight": "bits/weight",
    "perplexity": "perplexity",
    "perplexity_ratio": "/ original",
    "kl_to_original": "KL, nats",
    "kl_over_naive": "KL / naive",
    "top1_agreement": "same top token",
    "share_of_original_gap": "share of the gap",
    "share_of_smoothquant_gain": "share of SmoothQuant's gain",
    "weight_error": "squared error / squared weights",
}
_AROUND = {"weight_error": "moved by", "neighbour_error_ratio": "neighbours' error if held out"}


def show_written(
    written: QuantizedCheckpoint,
    *,
    model: str,
    to: Path,
    weights: Sequence[Coordinate],
    seconds: float,
    output: OutputSettings,
) -> None:
    """Says what was written, and how large it is."""
    row = {
        "matrices": len(written.quantized),
        "as_stored": len(written.kept),
        "bits_per_weight": round(written.bits_per_weight, 4),
        "gigabytes": round(written.nbytes / 1e9, 4),
        "seconds": round(seconds, 2),
        "kept": ", ".join(map(str, weights)) or None,
        "kept_in": written.keep_in if weights else None,
    }
    if output.format != "table":
        more = {
            "bytes": written.nbytes,
            "bytes_to_keep": written.keeping_nbytes,
            "bits_per_weight_without": round(written.bits_per_weight_without, 4),
            "unrounded": list(written.kept),
        }
        write_rows([{"model": model, "to": str(to), **row, **more}], format=output.format)
        return
    write_table([row], title=f"{model} is quantized in {to}.")
    if written.kept:
        shown = ", ".join(written.kept[:5]) + (", ..." if len(written.kept) > 5 else "")
        write_text(f"\nStored unrounded: {shown}.\n")
    if written.keeping_nbytes:
        share = 100 * written.keeping_nbytes / written.nbytes
        write_text(
            f"\nKeeping weights exact takes {written.keeping_nbytes} of {written.nbytes} bytes ({share:.2g} %): "
            f"{written.bits_per_weight:.4g} bits per weight, {written.bits_per_weight_without:.4g} without.\n"
        )
    if written.held:
        write_text(
            f"\nThe kept weights are 0 in the packed files, and the LoRA in {to / ADAPTER_FOLDER} adds them. Load both: "
            f"{to / 'README.md'} says how.\n"
        )
    write_text("\n")


def show_measured(records: Sequence[Record], *, model: str, output: OutputSettings) -> None:
    """One row for each condition; what happens around super weights; tasks; notes."""
    measured = [each for each in records if isinstance(each, MeasurementRecord)]
    if output.format != "table":
        write_rows([each.model_dump(mode="json") for each in measured], format=output.format)
        return
    whole = [each for each in measured if not each.subject]
    around = [each for each in measured if each.name in _AROUND and each.subject]
    tasks = [each for each in measured if each.subject and each.name not in _AROUND]
    if whole:
        text = next((f"; {each.count} windows of {each.dataset}" for each in whole if each.dataset), "")
        write_table(_rows(whole), title=f"{model}{text}. In brackets: 95 % intervals.")
    if around:
        rows = [
            {"condition": condition, "weight": weight, **{_AROUND[each.name]: _around(each) for each in group}}
            for (condition, weight), group in _grouped(around).items()
        ]
        write_text("\n")
        write_table(rows, title="What plain rounding does to each super weight, and to those that share its scale.")
    write_tasks(tasks)
    write_text("".join(f"\n{each.text}\n" for each in records if isinstance(each, NoteRecord)))


def _rows(measured: Sequence[MeasurementRecord]) -> list[dict[str, object]]:
    rows: dict[str, dict[str, object]] = {}
    for each in measured:
        row = rows.setdefault(each.condition, {"condition": each.condition})
        row[_COLUMNS.get(each.name, each.name)] = with_interval(each.value, each.interval)
    order = ["condition", *_COLUMNS.values()]
    return [{key: row[key] for key in order if key in row} for row in rows.values()]


def _grouped(measured: Sequence[MeasurementRecord]) -> dict[tuple[str, str], list[MeasurementRecord]]:
    groups: dict[tuple[str, str], list[MeasurementRecord]] = {}
    for each in measured:
        groups.setdefault((each.condition, each.subject), []).append(each)
    return groups


def _around(each: MeasurementRecord) -> str:
    return f"{100 * each.value:.3g} %" if each.name == "weight_error" else f"x {each.value:.3g}"
