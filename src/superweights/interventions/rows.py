"""Several conditions in one pass: each runs in its own rows of a batch, its edits made exact on outputs.

A scaled weight changes one product: `y[row] += (factor - 1) W[row, col] x[col]`. Added to the output of the down projection, in
the rows of one condition only, the correction equals the edit, and no weight is touched: conditions share every read of the
weights, and all layers before the first edit.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from superweights.coordinates import Coordinate
from superweights.errors import ModelError, SuperweightsError, UnsupportedArchitectureError, UsageError
from superweights.interventions.activations import activations_rounded
from superweights.interventions.conditions import (
    AddToWeights,
    Condition,
    EditSuperActivation,
    LoadWeights,
    PruneLargest,
    QuantizeActivations,
    QuantizeWeights,
    RestoreSuperActivation,
    ScaleWeights,
)
from superweights.interventions.replacing import replaced_forward
from superweights.interventions.weights import weights_edited
from superweights.model.architecture import DownProjection
from superweights.model.loading import LoadedModel
from superweights.progress import NO_PROGRESS, Progress


@dataclass(frozen=True, slots=True)
class _OutputEdits:
    """What one condition does to the output of one down projection."""

    block: int
    """Number of the condition: which rows of the batch."""
    expert: int | None
    scaled: dict[Coordinate, float]
    """Factors by weight."""
    added: dict[Coordinate, float]
    """What is added to each weight, after scaling."""
    restored: tuple[int, ...]
    """Channels that keep their untouched value at one token of each sequence."""


@contextmanager
def applied(model: LoadedModel, condition: Condition) -> Iterator[None]:
    """The model under one condition, in every pass until the context ends.

    Raises:
        CoordinateError: a weight is not in this model.
        UsageError: an edit changes nothing; of a streamed model, and of activations, a pass finds that out.

    Example:
        >>> from superweights.interventions.conditions import removal
        >>> from superweights.model.loading import load
        >>> with load(example_checkpoint) as model, applied(model, removal([Coordinate(2, None, 49, 7)], name="pruned")):
        ...     states = model.states(torch.tensor([[1, 2, 3]]))
    """
    steps = condition.interventions
    in_rows = any(
        isinstance(each, RestoreSuperActivation) for each in steps
    )  # needs the untouched output beside the edited
    on_weights = [
        each
        for each in steps
        if isinstance(each, PruneLargest | QuantizeWeights | LoadWeights)
        or (isinstance(each, ScaleWeights) and not in_rows)
    ]
    others = tuple(each for each in steps if each not in on_weights and not isinstance(each, QuantizeActivations))
    with ExitStack() as stack:
        stack.enter_context(weights_edited(model, on_weights))
        for each in steps:
            if isinstance(each, QuantizeActivations):
                stack.enter_context(activations_rounded(model, each))
        stack.enter_context(_rows_edited(model, [Condition(condition.name, others)], None))
        yield


def condition_states(
    model: LoadedModel,
    input_ids: torch.Tensor,
    conditions: Sequence[Condition],
    *,
    attention_mask: torch.Tensor | None = None,
    progress: Progress = NO_PROGRESS,
) -> torch.Tensor:
    """Last states of the same tokens under several conditions, in one pass.

    Args:
        model: the model; weight edits that are in force count for all conditions.
        input_ids: token ids [sequences, tokens].
        conditions: what to do. Pruning largest weights and quantizing are no matter of rows: use `applied`.
        attention_mask: 1 for real tokens, [sequences, tokens]; None where all are.
        progress: hears about each layer.

    Returns:
        [conditions, sequences, tokens, hidden].

    Raises:
        CoordinateError: a weight is not in this model.
        UsageError: an edit changes nothing, or needs a pass of its own.
        UnsupportedArchitectureError: the model does not keep sequences and tokens apart.
    """
    count = len(conditions)
    alone = [each.name for each in conditions if each.needs_own_pass]
    if alone:
        raise UsageError(
            f"{alone[0]!r} edits all weights or activations, and cannot run in rows of a batch: use `applied`."
        )
    with _rows_edited(model, conditions, input_ids.shape[0]) as first_layer:
        if count > 1 and 0 < first_layer < model.architecture.layer_count and attention_mask is None:
            states = _shared_prefix_states(model, input_ids, first_layer, count, progress)
            if states is not None:
                return states.reshape(count, -1, *states.shape[1:])
        mask = None if attention_mask is None else attention_mask.repeat(count, 1)
        states = model.states(input_ids.repeat(count, 1), attention_mask=mask, progress=progress)
    return states.reshape(count, -1, *states.shape[1:])


class _CannotBranch(SuperweightsError):
    """A layer takes tensors of which it is not clear how they go with the sequences."""


def _shared_prefix_states(
    model: LoadedModel, input_ids: torch.Tensor, layer: int, count: int, progress: Progress
) -> torch.Tensor | None:
    """Last states with the sequences repeated `count` times from a layer on; None where the model's code forbids that."""
    sequences = input_ids.shape[0]

    def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        batched = [each for each in _tensors((args, kwargs)) if each.ndim > 1]
        if any(each.shape[0] not in (1, sequences) for each in batched):  # one bias per head, or time before sequence
            raise _CannotBranch
        return _repeated(args, sequences, count), _repeated(kwargs, sequences, count)

    handle = model.layer(layer).register_forward_pre_hook(enter, with_kwargs=True)
    try:
        states = model.states(input_ids, progress=progress)
        return states if states.shape[0] == sequences * count else None
    except (_CannotBranch, ModelError):  # run whole, an error of another kind comes back
        return None
    finally:
        handle.remove()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def _repeated(value: Any, sequences: int, count: int) -> Any:
    if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[0] == sequences:
        return value.repeat(count, *[1] * (value.ndim - 1))
    if isinstance(value, dict):
        return {key: _repeated(each, sequences, count) for key, each in value.items()}
    return (
        type(value)(_repeated(each, sequences, count) for each in value) if isinstance(value, tuple | list) else value
    )


@contextmanager
def _rows_edited(model: LoadedModel, conditions: Sequence[Condition], sequences: int | None) -> Iterator[int]:
    """Edits outputs in the rows of each condition, which follow each other in every batch; gives the first layer edited.

    `sequences` says how many rows a condition has; None: one condition has them all.
    """
    outputs: dict[DownProjection, list[_OutputEdits]] = defaultdict(list)
    streams: dict[int, list[tuple[int, EditSuperActivation]]] = defaultdict(list)
    for block, condition in enumerate(conditions):
        for projection, edits in _output_edits(model, block, condition):
            outputs[projection].append(edits)
        for each in condition.interventions:
            if isinstance(each, EditSuperActivation):
                _check_place(model, each)
                streams[each.layer].append((block, each))
    layers = {projection.layer for projection in outputs} | streams.keys()
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_layout_checked(model, layer))
        for projection, group in outputs.items():
            stack.enter_context(_outputs_corrected(model, projection, group, sequences))
        for layer, edited in streams.items():
            stack.enter_context(_stream_edited(model, layer, edited, sequences))
        yield min(layers, default=model.architecture.layer_count)


def _output_edits(
    model: LoadedModel, block: int, condition: Condition
) -> Iterator[tuple[DownProjection, _OutputEdits]]:
    scaled: dict[tuple[DownProjection, int | None], dict[Coordinate, float]] = defaultdict(dict)
    added: dict[tuple[DownProjection, int | None], dict[Coordinate, float]] = defaultdict(dict)
    restored: dict[tuple[DownProjection, int | None], dict[int, None]] = defaultdict(dict)
    for each in condition.interventions:
        if isinstance(each, ScaleWeights):
            for weight in each.weights:
                here = scaled[model.architecture.locate(weight), weight.expert]
                here[weight] = here.get(weight, 1.0) * each.factor
        elif isinstance(each, AddToWeights):
            for weight, value in zip(each.weights, each.values, strict=True):
                if value == 0:
                    raise UsageError(f"Adding 0 to {weight} of {model.name} changes nothing. Leave that weight out.")
                here = added[model.architecture.locate(weight), weight.expert]
                here[weight] = here.get(weight, 0.0) + value
        elif isinstance(each, RestoreSuperActivation):
            for weight in each.weights:
                restored[model.architecture.locate(weight), weight.expert][weight.row] = None
    edited = dict.fromkeys([*scaled, *added])
    rows = {(home, weight.row) for group in (scaled, added) for home, here in group.items() for weight in here}
    bare = [(home[0].name, row) for home, here in restored.items() for row in here if (home, row) not in rows]
    if bare:
        raise UsageError(
            f"Restoring the super activation of row {bare[0][1]} of {bare[0][0]} changes nothing: no weight of it is "
            "edited. Edit its weights as well, as in scale=0+restore-sa."
        )
    for projection, expert in edited:
        home = projection, expert
        yield projection, _OutputEdits(block, expert, scaled[home], added[home], tuple(restored.get(home, ())))


@contextmanager
def _outputs_corrected(
    model: LoadedModel, projection: DownProjection, edits: Sequence[_OutputEdits], sequences: int | None
) -> Iterator[None]:
    module: Any = model.model.get_submodule(projection.module)

    def correct(expert: int | None, tokens: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        for edit in edits:
            if edit.expert == expert:
                _correct(model, edit, _block(tokens, edit.block, model, sequences), tokens, inputs, outputs)

    def corrected(inputs: torch.Tensor, *, forward: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        outputs = forward(inputs)
        flat = outputs.reshape(-1, projection.rows)
        tokens = torch.arange(flat.shape[0], device=flat.device)
        correct(None, tokens, inputs.reshape(-1, projection.cols), flat)
        return flat.view(outputs.shape)

    if projection.experts is None:
        with replaced_forward(module, partial(corrected, forward=module.forward)):
            yield
    else:
        module.corrector = correct
        try:
            yield
        finally:
            module.corrector = None


def _block(tokens: torch.Tensor, block: int, model: LoadedModel, sequences: int | None) -> torch.Tensor:
    """Which of these tokens of the batch are in the rows of a condition; indices into `tokens`."""
    if sequences is None:
        return torch.arange(len(tokens), device=tokens.device)
    return (tokens // (sequences * model.pass_tokens) == block).nonzero().flatten()


def _correct(
    model: LoadedModel,
    edit: _OutputEdits,
    chosen: torch.Tensor,
    tokens: torch.Tensor,
    inputs: torch.Tensor,
    outputs: torch.Tensor,
) -> None:
    untouched = {row: outputs[chosen, row] for row in edit.restored}
    for weight, factor in edit.scaled.items():
        outputs[chosen, weight.row] += model.weight_change(weight, factor) * inputs[chosen, weight.col].to(
            outputs.dtype
        )
    for weight, value in edit.added.items():
        outputs[chosen, weight.row] += value * inputs[chosen, weight.col].to(outputs.dtype)
    for row, values in untouched.items():
        for place in _largest_of_each_sequence(model, tokens[chosen], values):
            outputs[chosen[place], row] = values[place]


def _largest_of_each_sequence(model: LoadedModel, tokens: torch.Tensor, values: torch.Tensor) -> Iterator[int]:
    """Where |values| is largest in each sequence, padding left out; indices into `tokens`."""
    sizes = values.abs()
    if model.pass_mask is not None:
        sizes = sizes.masked_fill(model.pass_mask.flatten()[tokens] == 0, -1)
    sequence = tokens // model.pass_tokens
    for each in torch.unique(sequence):
        mine = (sequence == each).nonzero().flatten()
        yield int(mine[sizes[mine].argmax()])


def _check_place(model: LoadedModel, edit: EditSuperActivation) -> None:
    layers, channels = model.architecture.layer_count, model.architecture.hidden_size
    if not (0 <= edit.layer < layers and 0 <= edit.channel < channels):
        raise UsageError(
            f"Editing the super activation in channel {edit.channel} after layer {edit.layer} of {model.name}: its layers are "
            f"0 to {layers - 1}, its channels 0 to {channels - 1}."
        )


@contextmanager
def _stream_edited(
    model: LoadedModel, layer: int, edits: Sequence[tuple[int, EditSuperActivation]], sequences: int | None
) -> Iterator[None]:
    module = model.layer(layer)

    def edited(*args: Any, forward: Callable[..., Any], **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        hidden = output[0] if isinstance(output, tuple | list) else output
        flat = hidden.flatten(0, -2).clone()  # [rows * tokens, hidden]
        tokens = torch.arange(flat.shape[0], device=flat.device)
        for block, edit in edits:
            chosen = _block(tokens, block, model, sequences)
            values = flat[chosen, edit.channel]
            for place in _largest_of_each_sequence(model, tokens[chosen], values):
                value = values[place]
                flat[chosen[place], edit.channel] = value * edit.factor if edit.value is None else edit.value
            if torch.equal(values, flat[chosen, edit.channel]):
                raise UsageError(
                    f"Editing channel {edit.channel} after layer {layer} of {model.name} changes nothing. Choose another "
                    "factor or channel."
                )
        hidden = flat.view(hidden.shape)
        return type(output)((hidden, *output[1:])) if isinstance(output, tuple | list) else hidden

    with replaced_forward(module, partial(edited, forward=module.forward)):
        yield


@contextmanager
def _layout_checked(model: LoadedModel, layer: int) -> Iterator[None]:
    """Refuses a layer that takes time before sequence, or an unknown number of tokens."""

    def check(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        per_row = hidden.shape[1] if hidden.ndim == 3 else model.pass_tokens
        if hidden.ndim not in (2, 3) or per_row != model.pass_tokens:
            raise UnsupportedArchitectureError(
                f"Editing activations of {model.name}: decoder layer {layer} takes a tensor of shape {list(hidden.shape)} for "
                f"rows of {model.pass_tokens} tokens; [rows, tokens, hidden] was expected."
            )

    handle = model.layer(layer).register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
