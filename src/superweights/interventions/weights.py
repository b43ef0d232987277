"""Edits of weights, the same for a model in memory, a streamed model and a rewritten checkpoint.

The one idea: interventions become a plan, which says for each matrix, as it is stored, what happens to which of its weights.
A plan is made from names and shapes alone. Whoever holds the matrices brings them to it: before they become parameters, as
parameters, or on their way into another file (`rewriting`).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from decimal import ROUND_UP, Context, Decimal
from functools import partial
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from superweights.checkpoint import Checkpoint
from superweights.checkpoint.stored_matrices import StoredMatrix, stored_matrices
from superweights.checkpoint.stored_projection import StoredProjection, find_stored_projection, layer_tensors
from superweights.coordinates import Coordinate
from superweights.errors import CoordinateError, NonFiniteWeightsError, QuantizedCheckpointError, UsageError
from superweights.interventions.conditions import LoadWeights, PruneLargest, QuantizeWeights, ScaleWeights
from superweights.model.loading import LoadedModel, scale_weight
from superweights.quantization.held_out import rounded
from superweights.quantization.scheme import Scheme

WeightEdit = ScaleWeights | PruneLargest | QuantizeWeights | LoadWeights
"""The interventions that change weights."""
_Shapes = Mapping[str, tuple[int, ...]]
_Locate = Callable[[Coordinate], tuple[str, tuple[int, ...]]]
"""Gives the tensor that holds a coordinate, and the index there."""
_PIECE = 1 << 18
"""Weights that are looked at together: 1 MB in float32 stays in cache, some ten times faster than a matrix at once."""


@dataclass(frozen=True, slots=True)
class EditCount:
    """How much interventions change, known before any weight is read."""

    weights: int
    """Weights that are set; one that two interventions set counts twice."""
    matrices: int
    """Matrices that hold them; each expert has its own."""


@dataclass(frozen=True, slots=True)
class _Scale:
    """Multiplies one weight of a matrix."""

    row: int
    col: int
    factor: float
    what: str
    count: int = 1

    def apply(self, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Edits a matrix in place; gives the flat indices of what changed, and the values before."""
        original = scale_weight(matrix, (self.row, self.col), self.factor, what=self.what)
        return torch.tensor([self.row * matrix.shape[1] + self.col]), original[None]


@dataclass(frozen=True, slots=True)
class _Prune:
    """Sets the largest weights of a matrix to zero."""

    count: int
    kept: tuple[int, ...]

    def apply(self, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Edits a matrix in place; gives the flat indices of what changed, and the values before."""
        flat = prune_largest(matrix, self.count, self.kept)
        original = _get(matrix, flat)
        _put(matrix, flat, torch.zeros_like(original))
        return flat, original


@dataclass(frozen=True, slots=True)
class _Quantize:
    """Rounds a matrix."""

    how: QuantizeWeights
    matrix: StoredMatrix
    kept: tuple[int, ...]
    """Flat indices, row by row of [rows, cols]."""

    @property
    def count(self) -> int:
        """How many weights are set."""
        return self.matrix.rows * self.matrix.cols

    def apply(self, matrix: torch.Tensor) -> None:
        """Edits a matrix in place."""
        by_rows = matrix.t().contiguous() if self.matrix.transposed else matrix
        factors = self.how.factors.get(self.matrix.module)
        weights = by_rows if factors is None else by_rows.float() * factors
        kept = list(self.kept)
        if self.how.largest:
            kept += prune_largest(weights, self.how.largest, kept).tolist()
        try:
            found = rounded(
                weights, self.how.scheme, clip=self.how.clip, kept=kept, keep=self.how.keep_by, scale_dtype=matrix.dtype
            )
        except (UsageError, NonFiniteWeightsError) as error:
            raise type(error)(f"{self.matrix.tensor}: {error}") from error
        if self.how.amplify != 1 and self.kept:
            found.view(-1)[list(self.kept)] *= self.how.amplify
        matrix.copy_(found.t() if self.matrix.transposed else found)


@dataclass(frozen=True, slots=True)
class _Load:
    """Takes a tensor from elsewhere."""

    how: LoadWeights
    tensor: str
    kept: tuple[tuple[int, ...], ...]
    """Where it keeps its own values, as stored."""
    count: int

    def apply(self, tensor: torch.Tensor) -> None:
        """Edits a tensor in place."""
        found = self.how.read(self.tensor)
        if found is None:
            return
        if found.shape != tensor.shape:
            raise UsageError(
                f"Loading {self.tensor} from {self.how.source}: it has the shape {list(found.shape)} there and "
                f"{list(tensor.shape)} here. Are these two forms of one model?"
            )
        own = [tensor[index].clone() for index in self.kept]
        tensor.copy_(found)
        for index, value in zip(self.kept, own, strict=True):
            tensor[index] = value


_Step = _Scale | _Prune | _Quantize | _Load


@dataclass(frozen=True, slots=True)
class EditPlan:
    """What interventions do to the weights of one model."""

    steps: Mapping[str, Mapping[int | None, Sequence[_Step]]]
    """By tensor and matrix, in order; a matrix is its place on the first axis of a tensor that packs several, else None."""

    @property
    def count(self) -> EditCount:
        """How much they change."""
        parts = [steps for tensor in self.steps.values() for steps in tensor.values()]
        return EditCount(sum(each.count for steps in parts for each in steps), len(parts))

    def edit(self, name: str, tensor: torch.Tensor) -> None:
        """Edits a tensor in place.

        Raises:
            UsageError: a weight that is to be scaled stays as it is.
        """
        for part in self.steps[name]:
            self.edit_matrix(name, part, _matrix(tensor, part))

    def edit_matrix(self, name: str, part: int | None, matrix: torch.Tensor) -> None:
        """Edits one matrix of a tensor in place; errors are those of `edit`."""
        for step in self.steps[name][part]:
            step.apply(matrix)


@contextmanager
def weights_edited(model: LoadedModel, interventions: Sequence[WeightEdit]) -> Iterator[EditCount]:
    """Applies interventions to a model's weights, in order, until the context ends; the original bits come back.

    Wherever the weights live, the edited model is the same, bit for bit, and the same as one loaded from the checkpoint that
    `rewrite_checkpoint` writes. A model that was in memory already is edited as it is there: packed gate and up projections
    count as one matrix, while a checkpoint may store two.

    Args:
        model: any loaded model.
        interventions: none for the original.

    Yields:
        How much is changed.

    Raises:
        CoordinateError: a coordinate is not in this model.
        UsageError: an edit changes nothing; a streamed model knows of a factor when the layer is read. Or an amount is out of
            range.
        UnsupportedArchitectureError: the checkpoint's names do not say which tensors make up the decoder layers.

    Example:
        >>> from superweights.model.loading import load
        >>> with load(example_checkpoint) as model, weights_edited(model, [PruneLargest(2)]) as count:
        ...     print(count)
        EditCount(weights=84, matrices=42)
    """
    scalings = [each for each in interventions if isinstance(each, ScaleWeights)]
    if len(scalings) < len(interventions):
        plan = _plan_model(model, interventions)
        edits = {name: partial(plan.edit, name) for name in plan.steps}
        with model.stored_edited(edits) if model.checkpoint else _parameters_edited(model, plan):
            yield plan.count
        return
    with ExitStack() as stack:  # cheaper than to attach layers again
        for each in scalings:
            stack.enter_context(model.edited(dict.fromkeys(_weights(each), each.factor)))
        weights = [weight for each in scalings for weight in _weights(each)]
        yield EditCount(len(weights), len({(weight.layer, weight.expert) for weight in weights}))


def prune_largest(tensor: torch.Tensor, amount: float | int, kept: Sequence[int] = ()) -> torch.Tensor:
    """Where the largest |weights| of a matrix are.

    Of equal ones the first are taken. Infinities are the largest; NaN comes last.

    Args:
        tensor: a matrix of any floating dtype.
        amount: a float is the share of the matrix, rounded down; an int is how many weights.
        kept: flat indices, row by row, of weights that count as not there.

    Returns:
        Flat indices, ascending, int64, on the CPU; fewer than asked for only where no more are left.

    Raises:
        UsageError: the amount is out of range.
        CoordinateError: a flat index is outside.

    Example:
        >>> prune_largest(torch.tensor([[1.0, -4.0], [4.0, 9.0]]), 2, kept=[3]).tolist()
        [1, 2]
    """
    numel = tensor.numel()
    outside = [index for index in kept if not 0 <= index < numel]
    if outside:
        raise CoordinateError(f"Flat index {outside[0]} is outside a matrix of {numel} weights.")
    count = _prune_count(amount, numel, len(set(kept)))
    flat, absent = tensor.detach().flatten(), np.array(kept, dtype=np.int64)
    places, sizes = np.empty(0, np.int64), np.empty(0, np.float32)
    step = max(_PIECE, 2 * count)
    for start in range(0, numel if count else 0, step):
        piece = _sizes(flat[start : start + step])
        piece[absent[(start <= absent) & (absent < start + len(piece))] - start] = -2
        full = len(sizes) == count
        larger = np.flatnonzero(piece > sizes.min()) if full else np.arange(len(piece))
        places, sizes = np.concatenate([places, start + larger]), np.concatenate([sizes, piece[larger]])
        best = _first_largest(sizes, count)
        places, sizes = places[best], sizes[best]
    return torch.from_numpy(places)


def _sizes(weights: torch.Tensor) -> npt.NDArray[np.floating]:
    """Absolute values, with -1 for NaN."""
    wide = weights if weights.dtype == torch.float64 else weights.float()
    sizes: npt.NDArray[np.floating] = wide.abs().cpu().numpy()
    sizes[np.isnan(sizes)] = -1
    return sizes


def _first_largest(sizes: npt.NDArray[np.floating], count: int) -> npt.NDArray[np.int64]:
    """Where the largest are, ascending; of equal ones the first."""
    if count >= len(sizes):
        return np.arange(len(sizes))
    smallest = np.partition(sizes, len(sizes) - count)[len(sizes) - count]
    chosen = sizes > smallest
    chosen[np.flatnonzero(sizes == smallest)[: count - np.count_nonzero(chosen)]] = True
    return np.flatnonzero(chosen)


def plan_stored_edits(checkpoint: Checkpoint, interventions: Sequence[WeightEdit]) -> EditPlan:
    """What interventions do to the tensors of a checkpoint.

    Raises:
        CoordinateError: a coordinate is not in this model.
        UsageError: there is nothing to do, or an amount is out of range.
        QuantizedCheckpointError: a coordinate is in a tensor of integers.
        UnsupportedArchitectureError: the names do not say which tensors make up the decoder layers.
    """
    shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    layers = layer_tensors(shapes, checkpoint.config)
    floats = {name: shapes[name] for names in layers for name in names if checkpoint.tensors[name].storage.exponent}

    def locate(coordinate: Coordinate) -> tuple[str, tuple[int, ...]]:
        if coordinate.layer >= len(layers):
            raise CoordinateError(
                f"{coordinate} names layer {coordinate.layer}; the layers are 0 to {len(layers) - 1}."
            )
        tensor, index = locate_stored(checkpoint, coordinate)
        if tensor not in floats:
            dtype = checkpoint.tensors[tensor].dtype
            raise QuantizedCheckpointError(
                f"{coordinate} is in {tensor}, which is stored as {dtype}. Give a checkpoint in F32, F16 or BF16."
            )
        return tensor, index

    return _plan(interventions, floats, locate, config=checkpoint.config, name=str(checkpoint.reference))


def locate_stored(checkpoint: Checkpoint, coordinate: Coordinate) -> tuple[str, tuple[int, ...]]:
    """The stored tensor that holds a coordinate, and the index there.

    Raises:
        CoordinateError: it is not in this model.
        UnsupportedArchitectureError: the names do not say which tensor is meant.
    """
    projection = projection_of(checkpoint, coordinate)
    return projection.tensor, projection.index(coordinate)


def projection_of(checkpoint: Checkpoint, coordinate: Coordinate) -> StoredProjection:
    """The stored down projection that holds a coordinate; the errors are those of `locate_stored`."""
    shapes = {name: entry.shape for name, entry in checkpoint.tensors.items()}
    return find_stored_projection(shapes, checkpoint.config, coordinate=coordinate)


def _plan_model(model: LoadedModel, interventions: Sequence[WeightEdit]) -> EditPlan:
    if model.checkpoint:
        return plan_stored_edits(model.checkpoint, interventions)
    layers = model.model.get_submodule(model.architecture.layers)
    named = layers.named_parameters(prefix=model.architecture.layers)
    shapes = {name: tuple(each.shape) for name, each in named if each.is_floating_point()}

    def locate(coordinate: Coordinate) -> tuple[str, tuple[int, ...]]:
        projection = model.architecture.locate(coordinate)
        return projection.name, projection.index(coordinate)

    return _plan(interventions, shapes, locate, config=model.model.config.to_dict(), name=model.name)


def _plan(
    interventions: Sequence[WeightEdit], shapes: _Shapes, locate: _Locate, *, config: Mapping[str, Any], name: str
) -> EditPlan:
    steps: defaultdict[str, defaultdict[int | None, list[_Step]]]
    steps = defaultdict(lambda: defaultdict(list))
    for each in interventions:
        if isinstance(each, PruneLargest):
            for tensor, part, step in _prunes(each, shapes, locate, name):
                steps[tensor][part].append(step)
            continue
        if isinstance(each, LoadWeights):
            kept: defaultdict[str, list[tuple[int, ...]]] = defaultdict(list)
            for coordinate in each.keep:
                tensor, index = locate(coordinate)
                kept[tensor].append(index)
            for tensor, shape in shapes.items():
                steps[tensor][None].append(_Load(each, tensor, tuple(kept[tensor]), prod(shape)))
            continue
        if isinstance(each, QuantizeWeights):
            matrices = stored_matrices(shapes, shapes, config)
            for tensor, part, rounding in _quantizations(each, matrices, locate, name):
                steps[tensor][part].append(rounding)
            continue
        for weight in _weights(each):
            tensor, (*first, row, col) = locate(weight)
            steps[tensor][first[0] if first else None].append(_Scale(row, col, each.factor, f"{weight} of {name}"))
    return EditPlan(steps)


def _weights(scaling: ScaleWeights) -> dict[Coordinate, None]:
    """The weights, each once."""
    if not scaling.weights:
        raise UsageError("Scaling weights: none is named, so nothing would change. Name at least one.")
    return dict.fromkeys(scaling.weights)


def _prunes(
    pruning: PruneLargest, shapes: _Shapes, locate: _Locate, name: str
) -> Iterator[tuple[str, int | None, _Prune]]:
    """What is done to the matrices of the decoder layers that lose a weight: two axes, or three where experts are packed.

    A bias of packed experts has two axes as well; only its name tells.
    """
    matrices = [
        (tensor, part)
        for tensor, shape in shapes.items()
        if len(shape) in (2, 3) and min(shape[-2:]) > 1 and not tensor.endswith("bias")
        for part in (range(shape[0]) if len(shape) == 3 else (None,))
    ]
    kept = defaultdict(set)
    for coordinate in pruning.keep:
        tensor, (*first, row, col) = locate(coordinate)
        kept[tensor, first[0] if first else None].add(row * shapes[tensor][-1] + col)
    counts = {
        (tensor, part): _prune_count(pruning.amount, _numel(shapes[tensor]), len(kept[tensor, part]))
        for tensor, part in matrices
    }
    if not any(counts.values()):
        largest = max((_numel(shapes[tensor]) for tensor, _ in matrices), default=0)
        smallest = Context(prec=3, rounding=ROUND_UP).divide(Decimal(1), Decimal(max(largest, 1)))
        raise UsageError(
            f"Pruning the largest {pruning.amount:g} of every matrix of {name} changes nothing: the largest matrix has "
            f"{largest} weights. The smallest share that prunes a weight is {float(smallest):g}."
        )
    for (tensor, part), count in counts.items():
        if count:
            yield tensor, part, _Prune(count, tuple(sorted(kept[tensor, part])))


def _quantizations(
    how: QuantizeWeights, matrices: Sequence[StoredMatrix], locate: _Locate, name: str
) -> Iterator[tuple[str, int | None, _Quantize]]:
    """What is done to each matrix that is rounded; every fault shows before any weight is read."""
    chosen = {each.tensor: each for each in matrices if how.only is None or each.tensor in how.only}
    strange = sorted(set(how.only or ()) - chosen.keys())
    if strange or not chosen:
        what = f"{strange[0]} is no matrix of its decoder layers" if strange else "its decoder layers have no matrix"
        raise UsageError(f"Quantizing {name} by {how.scheme}: {what}.")
    smoothed = sorted(how.factors.keys() - {each.module for each in chosen.values()})
    if smoothed:
        raise UsageError(
            f"Quantizing smoothed weights of {name}: the stored tensors have no matrix {smoothed[0]}.weight."
        )
    for each in chosen.values():
        check_fit(how.scheme, each, name)
    kept: defaultdict[tuple[str, int | None], list[int]] = defaultdict(list)
    for coordinate in dict.fromkeys(how.keep):
        tensor, index = locate(coordinate)
        if tensor not in chosen and how.only is None:
            raise UsageError(f"Keeping {coordinate} of {name}: {tensor} is not quantized. Leave that coordinate out.")
        if tensor in chosen:
            place = coordinate.row * chosen[tensor].cols + coordinate.col
            kept[tensor, index[0] if len(index) == 3 else None].append(place)
    for tensor, each in chosen.items():
        for part in range(each.experts) if each.experts else (None,):
            yield tensor, part, _Quantize(how, each, tuple(kept[tensor, part]))


def check_fit(scheme: Scheme, matrix: StoredMatrix, name: str) -> None:
    """Refuses a scheme that does not fit a matrix of the model of this name.

    Raises:
        UsageError: its groups or tiles do not divide the matrix.
    """
    fault = scheme.fault(matrix.rows, matrix.cols)
    if fault:
        raise UsageError(
            f"Quantizing {name} by {scheme}: {matrix.tensor} has {matrix.rows} x {matrix.cols} weights; {fault}."
        )


def _numel(shape: tuple[int, ...]) -> int:
    """Weights of one matrix."""
    return shape[-2] * shape[-1]


def _prune_count(amount: float | int, numel: int, kept: int) -> int:
    """How many weights of a matrix are pruned. A share is meant as it is written: 0.29 of 100 are 29."""
    whole = isinstance(amount, int) and not isinstance(amount, bool)
    if not (amount >= 1 if whole else isinstance(amount, float) and 0 < amount <= 1):
        raise UsageError(
            f"Pruning the largest weights: the amount is {amount!r}. Give a whole number of weights from 1 on, or a share of "
            "each matrix above 0 and up to 1, such as 1e-6."
        )
    return min(int(amount if whole else Decimal(str(amount)) * numel), numel - kept)


@contextmanager
def _parameters_edited(model: LoadedModel, plan: EditPlan) -> Iterator[None]:
    """Edits parameters in place, for a model that has no checkpoint to come from."""
    undone: list[Callable[[], object]] = []
    try:
        for name, parts in plan.steps.items():
            parameter = model.model.get_parameter(name).data
            for part, steps in parts.items():
                matrix = _matrix(parameter, part)
                for step in steps:
                    if isinstance(step, _Quantize | _Load):
                        undone.append(partial(matrix.copy_, matrix.clone()))
                        step.apply(matrix)
                    else:
                        undone.append(partial(_put, matrix, *step.apply(matrix)))
        yield
    finally:
        for undo in reversed(undone):
            undo()


def _matrix(tensor: torch.Tensor, part: int | None) -> torch.Tensor:
    return tensor if part is None else tensor[part]


def _get(matrix: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    return matrix[flat // matrix.shape[1], flat % matrix.shape[1]]


def _put(matrix: torch.Tensor, flat: torch.Tensor, values: torch.Tensor) -> None:
    matrix[flat // matrix.shape[1], flat % matrix.shape[1]] = values
