"""The verb `adapter`: restore super weights on top of a quantized model, by a LoRA of a few kilobytes."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from superweights.cli.model_options import DEFAULT_MODEL_OPTIONS, HYPHEN_ALLOWED, ModelOptions, open_model
from superweights.cli.output import DEFAULT_OUTPUT, OutputSettings, write_rows, write_table, write_text
from superweights.cli.weights_option import weights_of
from superweights.interventions.adapter import (
    AdaptedMatrix,
    Adapter,
    Form,
    RunningDtype,
    open_quantized,
    plan_adapter,
    require_free,
    write_adapter,
)
from superweights.progress import RichProgress

_log = logging.getLogger(__name__)


@Parameter(name="*", negative=())
@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """What `adapter` restores, and where it writes."""

    original: Annotated[str, Parameter(metavar="MODEL")]
    """The model that was quantized: a directory, a Hub name or a URL."""
    to: Annotated[Path, Parameter(metavar="DIR")]
    """Write the adapter to this new folder."""
    weights: Annotated[str, HYPHEN_ALLOWED, Parameter(metavar="WEIGHTS")] = "auto"
    """Which weights to restore: auto (find them in the original), published (from the index), a .jsonl file of `find` (- for
    stdin), or coordinates such as 2:3968:7003, separated by commas."""
    form: Form | None = None
    """peft: for transformers and other engines that load LoRA as PEFT writes it. gguf: for llama.cpp; needs
    `superweights[gguf]`. By default gguf where QUANTIZED is a .gguf file."""
    dtype: RunningDtype = "auto"
    """What the engine that will run QUANTIZED rounds unpacked weights to. auto: the dtype in its config, in which transformers
    unpacks, whatever it runs in. float32 where unpacked weights are not rounded."""
    quantized_revision: str | None = None
    """Branch, tag or commit of QUANTIZED on the Hub; --revision is that of the original."""


def adapter(
    quantized: str,
    /,
    *,
    settings: AdapterSettings,
    options: ModelOptions = DEFAULT_MODEL_OPTIONS,
    output: OutputSettings = DEFAULT_OUTPUT,
) -> int:
    """Restores the exact values of super weights on top of a model that somebody quantized, as a LoRA of a few kilobytes.

    The quantized model stays as it is. For each weight the adapter adds what rounding took, original - quantized, to its row,
    times its input; engines that load LoRA on down projections add it on top of any kernel. It fits this quantized model only.
    Exit status 1 says that nothing had to be restored, and nothing is written then.

    Args:
        quantized: The quantized model: a directory, a Hub name or a URL, or a .gguf file.
    """
    require_free(settings.to)
    form: Form = settings.form or ("gguf" if quantized.lower().endswith(".gguf") else "peft")
    with (
        open_quantized(quantized, revision=settings.quantized_revision) as files,
        open_model(settings.original, options) as model,
    ):
        plan_adapter(
            model, files, (), form=form, dtype=settings.dtype
        )  # what would stop it shows before the forward pass
        weights = weights_of(settings.weights, model, options, RichProgress())
        planned = plan_adapter(model, files, weights, form=form, dtype=settings.dtype)
        for warning in model.warnings:
            _log.warning(warning)
    nbytes = write_adapter(planned, settings.to) if planned.matrices else 0
    _show(planned, settings, nbytes, output)
    return 0 if planned.matrices else 1


def _show(planned: Adapter, settings: AdapterSettings, nbytes: int, output: OutputSettings) -> None:
    restored, unchanged = _rows(planned.matrices), _rows(planned.unchanged)
    if output.format != "table":
        rows = [{**row, "restored": True} for row in restored] + [{**row, "restored": False} for row in unchanged]
        write_rows(rows, format=output.format)
        return
    if restored:
        title = (
            f"{settings.to} restores {len(restored)} of {len(restored) + len(unchanged)} super weights of "
            f"{planned.original.name} on {planned.quantized.name} (form {planned.form}, rank {planned.rank}, {nbytes} bytes)."
        )
        write_table(restored, title=title)
    for each in planned.unchanged:
        names = ", ".join(str(weight.coordinate) for weight in each.weights)
        why = "is stored unrounded" if each.plain else "holds the exact value packed"
        write_text(f"\nNothing to restore at {names}: {each.stored} {why}.\n")
    if not restored:
        none = "" if unchanged else f"No super weight candidate in {planned.original.name}. "
        write_text(f"\n{none}Nothing is written.\n")


def _rows(matrices: Sequence[AdaptedMatrix]) -> list[dict[str, object]]:
    return [
        {
            "coordinate": str(weight.coordinate),
            "module": each.module,
            "original": weight.original,
            "quantized": weight.quantized,
            "delta": weight.delta,
        }
        for each in matrices
        for weight in each.weights
    ]
