"""The part of `quantize` that writes a file for llama.cpp."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from superweights.checkpoint import ModelReference
from superweights.checkpoint.gguf_writing import check_file_target
from superweights.cli.model_options import ModelOptions, open_model
from superweights.cli.output import OutputSettings, write_rows, write_table, write_text
from superweights.cli.weights_option import listed_weights, needs_model, weights_of
from superweights.coordinates import Coordinate
from superweights.interventions.quantized_gguf import KeptWeight, QuantizedGguf, plan_quantized_gguf, quantize_to_gguf

if TYPE_CHECKING:
    from superweights.progress import Progress


@dataclass(frozen=True, slots=True)
class GgufSettings:
    """What is written, and where."""

    to: Path
    """The file."""
    kind: str | None
    """The type of matrices; None for q4_0."""
    kept_kind: str | None
    """The type of those that hold a kept weight; None for F16 or what holds it exactly."""
    overwrite: bool
    """Whether a file that is there may be replaced."""
    threads: int | None
    """Pieces encoded at once."""


def is_gguf(to: Path) -> bool:
    """Whether a target is a GGUF file, by its name."""
    return to.suffix.lower() == ".gguf"


def quantize_gguf(
    model: str,
    keep: str,
    settings: GgufSettings,
    options: ModelOptions,
    progress: "Progress",
    output: OutputSettings,
) -> int:
    """Writes the file and says what is in it."""
    source = ModelReference.parse(model, revision=options.revision)
    kind = settings.kind or "q4_0"
    if needs_model(keep):
        # What would stop the writing shows before the forward pass that finds super weights.
        plan_quantized_gguf(source, kind, kept_kind=settings.kept_kind)
        check_file_target(settings.to.expanduser(), overwrite=settings.overwrite)
        with open_model(model, options) as loaded:
            weights = weights_of(keep, loaded, options, progress)
    else:
        weights = () if keep == "none" else listed_weights(keep)
    started = time.perf_counter()
    written = quantize_to_gguf(
        source,
        settings.to,
        kind,
        weights,
        kept_kind=settings.kept_kind,
        overwrite=settings.overwrite,
        threads=settings.threads,
        progress=progress,
    )
    _show(written, model, settings.to, weights, keep, time.perf_counter() - started, output)
    return 0


def _show(
    written: QuantizedGguf,
    model: str,
    to: Path,
    weights: Sequence[Coordinate],
    keep: str,
    seconds: float,
    output: OutputSettings,
) -> None:
    types = Counter(each.kind for each in written.tensors)
    row = {
        "tensors": ", ".join(f"{count} {kind}" for kind, count in types.most_common()),
        "bits_per_weight": round(written.bits_per_weight, 4),
        "gigabytes": round(written.nbytes / 1e9, 6),
        "keeping_costs": f"{written.keeping_nbytes} bytes, {_percent(written.keeping_share)}",
        "seconds": round(seconds, 2),
    }
    kept = [_kept(each) for each in written.kept]
    if output.format != "table":
        facts = {"model": model, "to": str(to), "type": written.kind, "architecture": written.architecture}
        write_rows([{**facts, **row, "kept": kept, "notes": list(written.notes)}], format=output.format)
        return
    write_table([row], title=f"{model} is quantized in {to}.")
    if kept:
        write_text("\n")
        write_table(
            kept, title=f"Super weights: what the file holds of them, and what {written.kind} would make of them."
        )
    elif keep == "auto" and not weights:
        write_text(f"\nNo super weight candidate in {model}: nothing is kept.\n")
    if written.unfit:
        write_text(
            f"\nAt F16, because blocks of {written.kind} do not divide their rows: {', '.join(written.unfit[:5])}"
            f"{f' and {len(written.unfit) - 5} others' if len(written.unfit) > 5 else ''}.\n"
        )
    write_text("".join(f"\n{note}\n" for note in written.notes))
    write_text(f"\nRun it with llama.cpp: llama-server -m {to}\n")


def _kept(weight: KeptWeight) -> dict[str, object]:
    return {
        "coordinate": str(weight.coordinate),
        "tensor": weight.tensor,
        "type": weight.kind,
        "value": weight.value,
        "written": weight.written,
        "error": _error(weight.written, weight.value),
        "error if rounded": _error(weight.rounded, weight.value),
        "neighbours' error if rounded": None if weight.block_error is None else _percent(weight.block_error),
    }


def _error(found: float | None, value: float) -> str | None:
    if found is None or not value:
        return None
    return _percent(abs(found - value) / abs(value))


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
