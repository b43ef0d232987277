"""What every verb that runs a model asks: where the weights live, which prompts run, how far."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import Parameter

from superweights.errors import UsageError
from superweights.results.provenance import describe_run
from superweights.results.records import Run

if TYPE_CHECKING:
    from superweights.model.loading import LoadedModel


@Parameter(name="*", negative=())
@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How the model is run."""

    layers: str | None = None
    """Decoder layers to run, as 0:4 for the first four. All by default; the first few are much faster to fetch and run."""
    prompt: tuple[str, ...] = ()
    """A further prompt, beside the built-in ones. May be given several times."""
    residency: Literal["streamed", "resident"] = "streamed"
    """Hold one decoder layer in memory at a time, or all. Same results, bit by bit."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""
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
    if not (colon and start in ("", "0") and stop.isdigit() and 1 <= int(stop) <= count):
        raise UsageError(
            f"--layers {layers} cannot be run. A forward pass starts at layer 0: write 0:N for the first N layers, with N from "
            f"1 to {count} in {model.name}."
        )
    return int(stop) - 1


def describe_model_run(
    model: "LoadedModel", options: ModelOptions, *, command: list[str], settings: dict[str, Any]
) -> Run:
    """The first record of a run of this model."""
    checkpoint = model.checkpoint
    weights = {entry.dtype: entry.numel for entry in checkpoint.tensors.values()} if checkpoint else {}
    return describe_run(
        command=command,
        model=model.name,
        revision=checkpoint.revision if checkpoint else None,
        digest=checkpoint.digest if checkpoint else None,
        storage_dtype=max(weights, key=lambda dtype: weights[dtype]) if weights else str(model.model.dtype),
        compute_dtype="float32",
        residency=model.residency,
        device="cpu",
        settings={**settings, "layers": options.layers, "nonfinite": options.nonfinite},
        warnings=[
            f"{count} NaN or infinite weights of {name} were set to 0"
            for name, count in (model.weights.zeroed if model.weights else {}).items()
        ],
    )
