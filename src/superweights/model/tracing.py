"""What one forward pass shows: peaks of every down projection, the residual stream, and where it jumps.

One pass over a few short prompts. At each decoder layer the input and output of every down projection and the residual
stream before and after are looked at while the weights are at hand; jumps of the stream are split into scalar products
`W[row, col] * x[token, col]` on the spot, so no weight is read twice and no input is kept.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch

from superweights.coordinates import Coordinate
from superweights.errors import ModelError, NonFiniteWeightsError, UnsupportedArchitectureError
from superweights.model.architecture import DownProjection
from superweights.model.loading import LoadedModel
from superweights.model.prompts import Prompt, as_batch
from superweights.progress import NO_PROGRESS, Progress

JUMP_RATIO = 5.0
"""A stream value that one layer changes by more than this many medians is split into scalar products. Loose on purpose:
it only bounds the work; detection judges."""
_JUMPS_PER_LAYER = 64
_CHANNELS_PER_LAYER = 32
"""And the largest jump of this many channels, or one that attention fills at every token would crowd out the others."""
_TERMS_PER_JUMP = 8


@dataclass(frozen=True, slots=True)
class ActivationPeak:
    """The largest |value| in the input or output of one down projection, over all prompts and tokens."""

    layer: int
    """Decoder layer, from 0."""
    expert: int | None
    """Routed expert; None for a plain projection."""
    module: str
    """Name of the module that holds the weight."""
    side: Literal["input", "output"]
    """Which side of the down projection; the output of a routed expert counts with its routing weight."""
    value: float
    """The value, with its sign."""
    channel: int
    """Col of W on the input side, row of W on the output side."""
    prompt: int
    """Index of the prompt."""
    token: int
    """Position in the prompt."""


@dataclass(frozen=True, slots=True)
class Term:
    """One scalar product of a down projection at one token."""

    coordinate: Coordinate
    """Which weight."""
    module: str
    """Name of the module that holds the weight."""
    weight: float
    """W[row, col]."""
    input: float
    """x[token, col]."""
    product: float
    """W[row, col] * x[token, col], times the routing weight of a routed expert."""


@dataclass(frozen=True, slots=True)
class Jump:
    """One value of the residual stream that one decoder layer changes a lot."""

    layer: int
    """The layer that changes it."""
    position: int
    """Index into `Trace.positions`: which prompt and token."""
    channel: int
    """Channel of the residual stream: a row of W."""
    before: float
    """Value that enters the layer."""
    after: float
    """Value that leaves the layer."""
    output: float
    """What the layer's down projections give to this channel at this token, routing weights included."""
    output_median: float
    """Median of |down projection output| over the layer's channels at this token."""
    terms: tuple[Term, ...]
    """The largest scalar products of `output`, by |product|."""


@dataclass(frozen=True)
class Trace:
    """What one forward pass shows."""

    prompts: tuple[Prompt, ...]
    """The prompts that ran."""
    positions: tuple[tuple[int, int], ...]
    """(prompt, token) of each position; padding is left out."""
    stream: torch.Tensor
    """Residual stream [layers run + 1, positions, hidden], float32; entry 0 is the embedding output."""
    complete: bool
    """Whether the pass ran to the model's last layer."""
    peaks: tuple[ActivationPeak, ...]
    """Input and output peak of every down projection that ran, by layer."""
    jumps: tuple[Jump, ...]
    """Where the stream jumps, by layer."""

    @property
    def layers_run(self) -> int:
        """How many decoder layers ran."""
        return self.stream.shape[0] - 1

    @cached_property
    def medians(self) -> torch.Tensor:
        """Median of |stream| at each stage, [layers run + 1]."""
        return self.stream.abs().flatten(1).median(dim=1).values


@dataclass
class _Seen:
    """What one down projection took in and gave out, padding left out."""

    projection: DownProjection
    expert: int | None
    positions: torch.Tensor  # [n]
    inputs: torch.Tensor  # [n, cols]
    outputs: torch.Tensor  # [n, rows], with routing weights
    routing: torch.Tensor  # [n]


@dataclass
class _Recorder:
    model: LoadedModel
    real: torch.Tensor  # [prompts * tokens], bool
    position_of: torch.Tensor  # [prompts * tokens] -> position, -1 for padding
    positions: tuple[tuple[int, int], ...]
    stream: list[torch.Tensor] = field(default_factory=list)
    peaks: list[ActivationPeak] = field(default_factory=list)
    jumps: list[Jump] = field(default_factory=list)
    seen: list[_Seen] = field(default_factory=list)
    entering: torch.Tensor = field(default_factory=lambda: torch.empty(0))


def trace(
    model: LoadedModel, prompts: Sequence[Prompt], *, last_layer: int | None = None, progress: Progress = NO_PROGRESS
) -> Trace:
    """Runs the prompts through the model once and records what its down projections and residual stream do.

    Args:
        model: the model; edits that are in force count.
        prompts: the prompts; all run in one batch.
        last_layer: the last decoder layer to run; None for all.
        progress: hears about each layer.

    Raises:
        UsageError: no prompt, a prompt without tokens, or no such last layer.
        NonFiniteWeightsError: NaN or infinite weights were met; names them.
        ModelError: finite weights gave NaN or infinite activations.
        UnsupportedArchitectureError: the residual stream has an unknown form.
    """
    input_ids, real = as_batch(prompts)
    positions = tuple((prompt, token) for prompt, token in real.nonzero().tolist())
    flat = real.flatten()
    position_of = torch.where(flat, flat.cumsum(0) - 1, -1)
    recorder = _Recorder(model, flat, position_of, positions)
    device = model.model.get_input_embeddings().weight.device
    mask = None if bool(real.all()) else real.long().to(device)
    with _recording(recorder):
        model.run(input_ids.to(device), attention_mask=mask, last_layer=last_layer, progress=progress)
    complete = len(recorder.stream) == model.architecture.layer_count + 1
    return Trace(
        tuple(prompts), positions, torch.stack(recorder.stream), complete, tuple(recorder.peaks), tuple(recorder.jumps)
    )


@contextmanager
def _recording(recorder: _Recorder) -> Iterator[None]:
    model, handles, watched = recorder.model, [], []
    for projection in model.architecture.down_projections:
        module: Any = model.model.get_submodule(projection.module)
        if projection.experts is None:
            handles.append(module.register_forward_hook(_plain_hook(recorder, projection)))
        else:
            module.observer = _expert_observer(recorder, projection)
            watched.append(module)
    for layer in range(model.architecture.layer_count):
        module = model.layer(layer)
        handles.append(module.register_forward_pre_hook(_entering_hook(recorder, layer), with_kwargs=True))
        # First in line: the weights are gone after the model's own hook.
        handles.append(module.register_forward_hook(_leaving_hook(recorder, layer), prepend=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in watched:
            module.observer = None


def _plain_hook(recorder: _Recorder, projection: DownProjection) -> Any:
    def hook(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        inputs = args[0].reshape(-1, projection.cols)
        if inputs.shape[0] != recorder.real.numel():
            raise UnsupportedArchitectureError(
                f"{recorder.model.name}: {projection.module} saw {inputs.shape[0]} tokens of {recorder.real.numel()}, and "
                "which ones cannot be told."
            )
        everything = torch.arange(inputs.shape[0])
        _see(
            recorder,
            projection,
            None,
            everything,
            inputs,
            output.reshape(-1, projection.rows),
            torch.ones(len(everything)),
        )

    return hook


def _expert_observer(recorder: _Recorder, projection: DownProjection) -> Any:
    def observe(
        expert: int, tokens: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor, routing: torch.Tensor
    ) -> None:
        _see(recorder, projection, expert, tokens.cpu(), inputs, outputs, routing)

    return observe


def _see(
    recorder: _Recorder,
    projection: DownProjection,
    expert: int | None,
    tokens: torch.Tensor,
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    routing: torch.Tensor,
) -> None:
    kept = recorder.real[tokens]
    routing = routing.detach().float().cpu()[kept]
    seen = _Seen(
        projection,
        expert,
        recorder.position_of[tokens][kept],
        inputs.detach().float().cpu()[kept],
        outputs.detach().float().cpu()[kept] * routing[:, None],
        routing,
    )
    if len(seen.positions):
        recorder.seen.append(seen)
        recorder.peaks.extend(_peak(recorder, seen, side) for side in ("input", "output"))


def _peak(recorder: _Recorder, seen: _Seen, side: Any) -> ActivationPeak:
    values = seen.inputs if side == "input" else seen.outputs
    row, channel = divmod(int(values.abs().argmax()), values.shape[1])
    prompt, token = recorder.positions[int(seen.positions[row])]
    return ActivationPeak(
        seen.projection.layer,
        seen.expert,
        seen.projection.module,
        side,
        values[row, channel].item(),
        channel,
        prompt,
        token,
    )


def _entering_hook(recorder: _Recorder, layer: int) -> Any:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        recorder.entering = _stream(recorder, hidden, layer).clone()
        recorder.seen.clear()
        if layer == 0:
            recorder.stream.append(recorder.entering)

    return hook


def _leaving_hook(recorder: _Recorder, layer: int) -> Any:
    def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
        leaving = _stream(recorder, output[0] if isinstance(output, tuple | list) else output, layer)
        if not bool(leaving.isfinite().all()):
            raise _non_finite_error(recorder.model, layer)
        recorder.stream.append(leaving.clone())
        recorder.jumps.extend(_jumps(recorder, layer, leaving))
        recorder.seen.clear()

    return hook


def _stream(recorder: _Recorder, hidden: torch.Tensor, layer: int) -> torch.Tensor:
    """The residual stream [positions, hidden] in float32, padding left out."""
    channels = recorder.model.architecture.hidden_size
    if hidden.shape[-1] != channels or hidden.numel() != recorder.real.numel() * channels:
        raise UnsupportedArchitectureError(
            f"The residual stream at decoder layer {layer} has shape {list(hidden.shape)}; "
            f"{recorder.real.numel()} tokens of {channels} channels were expected. Several lanes, or further tokens, are "
            "not supported."
        )
    return hidden.detach().float().cpu().reshape(-1, channels)[recorder.real]


def _jumps(recorder: _Recorder, layer: int, leaving: torch.Tensor) -> Iterator[Jump]:
    """Splits the largest changes this layer made to the stream into scalar products."""
    change = (leaving - recorder.entering).abs()
    change[leaving.abs() <= recorder.entering.abs()] = 0  # what shrinks a value does not make it
    largest = change.flatten().topk(min(_JUMPS_PER_LAYER, change.numel())).indices
    by_channel, tokens = change.max(dim=0)  # [hidden]
    channels = by_channel.topk(min(_CHANNELS_PER_LAYER, len(by_channel))).indices
    bar = JUMP_RATIO * leaving.abs().median()
    for place in sorted({*largest.tolist(), *(tokens[channels] * change.shape[1] + channels).tolist()}):
        if change.flatten()[place] <= bar:
            continue
        position, channel = divmod(place, leaving.shape[1])
        seen = [(each, int(row)) for each in recorder.seen for row in (each.positions == position).nonzero()]
        outputs = sum((each.outputs[row] for each, row in seen), start=torch.zeros(leaving.shape[1]))  # [rows]
        terms = [term for each, row in seen for term in _terms(recorder.model, each, row, channel)]
        yield Jump(
            layer,
            position,
            channel,
            recorder.entering[position, channel].item(),
            leaving[position, channel].item(),
            outputs[channel].item(),
            outputs.abs().median().item(),
            tuple(sorted(terms, key=lambda term: -abs(term.product))[:_TERMS_PER_JUMP]),
        )


def _terms(model: LoadedModel, seen: _Seen, row: int, channel: int) -> Iterator[Term]:
    weights = model.matrix_row(seen.projection, seen.expert, channel)  # [cols]
    products = weights * seen.inputs[row] * seen.routing[row]
    for col in products.abs().topk(min(_TERMS_PER_JUMP, len(products))).indices.tolist():
        coordinate = Coordinate(seen.projection.layer, seen.expert, channel, col)
        yield Term(
            coordinate, seen.projection.module, weights[col].item(), seen.inputs[row, col].item(), products[col].item()
        )


def _non_finite_error(model: LoadedModel, layer: int) -> Exception:
    prefix = model.architecture.layer_name(layer)
    inside = model.layer(layer).named_parameters(prefix=prefix)
    outside = (each for each in model.outside_layers() if not each[1].is_meta)
    where, bad = f"decoder layer {layer}", _non_finite_counts(inside)
    if not bad:
        where, bad = "the decoder outside its layers", _non_finite_counts(outside)
    if not bad:
        advice = "Load the model by its path: that computes in float32." if model.weights is None else "Are they sound?"
        return ModelError(
            f"Decoder layer {layer} of {model.name} turned finite weights into NaN or infinite activations "
            f"(computing in {model.compute_dtype}). {advice}"
        )
    listed = ", ".join(f"{name} ({count})" for name, count in list(bad.items())[:5])
    return NonFiniteWeightsError(
        f"{model.name}: {where} has NaN or infinite weights: {listed}{', ...' if len(bad) > 5 else ''}. "
        "The checkpoint is damaged. To go on with zeros in their place, pass --nonfinite zero."
    )


def _non_finite_counts(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, int]:
    counts = {name: int((~value.isfinite()).sum()) for name, value in named}
    return {name: count for name, count in counts.items() if count}
