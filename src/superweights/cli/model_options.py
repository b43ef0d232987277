"""What every verb that runs a model asks: where the weights live, which prompts run, how far, where results go."""

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from errno import EISDIR
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from superweights.errors import RecordError, UsageError
from superweights.results.provenance import describe_run
from superweights.results.records import Run
from superweights.results.store import STANDARD_STREAM

if TYPE_CHECKING:
    from superweights.model.loading import LoadedModel

_log = logging.getLogger(__name__)


def _refuse_option(_: object, value: str | None) -> None:
    if value is not None and value.startswith("-") and value != STANDARD_STREAM:
        raise ValueError("That is an option, not a value.")


FILE = Parameter(metavar="FILE")
"""An option that takes the name of a file."""
HYPHEN_ALLOWED = Parameter(allow_leading_hyphen=True, validator=_refuse_option)
"""An option that may be `-`, which would otherwise be taken for the start of an option."""


@Parameter(name="*", negative=())
@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How the model is run."""

    layers: Annotated[str | None, Parameter(metavar="0:N")] = None
    """Decoder layers to run, as 0:4 for the first four. All by default; the first few are much faster to fetch and run."""
    prompt: Annotated[tuple[str, ...], Parameter(metavar="TEXT", show_default=False)] = ()
    """A further prompt, beside the built-in ones. May be given several times."""
    residency: Literal["streamed", "resident"] = "streamed"
    """Hold one decoder layer in memory at a time, or all. Same results, bit by bit."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""
    compute: Literal["auto", "float32"] = "auto"
    """float32: every product in float32. auto: the same, but a processor that multiplies bfloat16 itself does so for bfloat16
    weights, which is several times faster and rounds what goes in and comes out of a product."""
    nonfinite: Literal["refuse", "zero"] = "refuse"
    """What to do with NaN and infinite weights: stop and name them, or go on with zeros in their place."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint. Read it first."""


DEFAULT_MODEL_OPTIONS = ModelOptions()
"""What a verb does when nothing is said."""


def open_model(name: str, options: ModelOptions) -> "LoadedModel":
    """Loads the model that the command line names."""
    from transformers.utils import logging as transformers_logging

    from superweights.model.loading import load

    transformers_logging.set_verbosity_error()  # what matters comes as an error or a note of ours
    return load(
        name,
        revision=options.revision,
        residency=options.residency,
        nonfinite=options.nonfinite,
        compute=options.compute,
        trust_remote_code=options.trust_remote_code,
    )


def last_layer(model: "LoadedModel", layers: str | None) -> int | None:
    """The last layer that `--layers` asks for; None for all.

    Raises:
        UsageError: the text is no range from layer 0 inside the model.
    """
    if layers is None:
        return None
    start, colon, stop = layers.partition(":")
    count = model.architecture.layer_count
    if not (colon and start in ("", "0") and stop.isdecimal() and 1 <= int(stop) <= count):
        raise UsageError(
            f"--layers {layers} cannot be run. A forward pass starts at layer 0: write 0:N for the first N layers, with N from "
            f"1 to {count} in {model.name}."
        )
    return int(stop) - 1


def check_targets(*, records: str | None, charts: Iterable[str | None]) -> None:
    """Refuses what could not be written: a wrong name must not cost a forward pass.

    Args:
        records: where the records are to go; - is stdout.
        charts: where charts are to go.

    Raises:
        UnknownNameError: no chart is written with that suffix.
        RecordError: nothing can be written there.
    """
    from superweights.report.saving import checked_suffix

    drawn = [chart for chart in charts if chart is not None]
    for chart in drawn:
        checked_suffix(chart)
    for target in drawn if records in (None, STANDARD_STREAM) else [str(records), *drawn]:
        path = Path(target)
        try:
            if path.is_dir():
                raise IsADirectoryError(EISDIR, "Is a directory")
            if path.is_file() or not path.exists():  # a device or a pipe is written as it is
                with TemporaryFile(dir=path.resolve().parent):
                    pass
        except OSError as error:
            raise RecordError(
                f"Cannot write {target}: {error.strerror}. Give a file in a folder that you can write."
            ) from error


def describe_model_run(
    model: "LoadedModel", options: ModelOptions, *, command: list[str], settings: dict[str, Any]
) -> Run:
    """The first record of a run of this model; call it before the first pass, and `add_warnings` after the last."""
    checkpoint = model.checkpoint
    weights: Counter[str] = Counter()
    for entry in checkpoint.tensors.values() if checkpoint else ():
        weights[entry.dtype] += entry.numel
    return describe_run(
        command=command,
        model=model.name,
        revision=checkpoint.revision if checkpoint else None,
        digest=checkpoint.digest if checkpoint else None,
        storage_dtype=weights.most_common(1)[0][0] if weights else str(model.model.dtype),
        compute_dtype=model.compute_dtype,
        residency=model.residency,
        device="cpu",
        settings={**settings, "layers": options.layers, "nonfinite": options.nonfinite, "compute": options.compute},
    )


def add_warnings(run: Run, model: "LoadedModel") -> Run:
    """The run with what its passes must warn about, which the user is told as well."""
    for warning in model.warnings:
        _log.warning(warning)
    return run.model_copy(update={"warnings": model.warnings})
