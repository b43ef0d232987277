"""Which matrices deserve more bits: chosen by measured KL, under a budget of bits per weight, super weights first."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from superweights.checkpoint.stored_matrices import StoredMatrix, checkpoint_matrices
from superweights.coordinates import Coordinate
from superweights.errors import UsageError
from superweights.experiments.evaluation import evaluate
from superweights.experiments.weight_quantization import checkpoint_of
from superweights.interventions.conditions import ORIGINAL, Condition, QuantizeWeights
from superweights.interventions.weights import locate_stored
from superweights.measurements.windows import Windows
from superweights.model.loading import LoadedModel
from superweights.progress import NO_PROGRESS, Progress
from superweights.quantization.clipping import Clip
from superweights.quantization.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Choice:
    """What one matrix gets."""

    tensor: str
    """The stored matrix."""
    what: str
    """The scheme, with its clip where that is better; or "as stored"."""
    scheme: Scheme | None
    """None leaves the matrix as it is stored."""
    clip: Clip | None
    bits: float
    """Stored bits of the matrix."""
    kl_nats: float
    """KL to the original, nats per token, with this matrix alone rounded so."""
    holds: tuple[Coordinate, ...] = ()
    """Super weights in it."""


@dataclass(frozen=True)
class Allocation:
    """What every matrix gets."""

    choices: tuple[Choice, ...]
    """In the order of the model."""
    bits_per_weight: float
    """Over all matrices of the decoder layers."""
    budget: float
    """What was allowed."""

    def how(self, weights: Sequence[Coordinate]) -> tuple[QuantizeWeights, ...]:
        """The interventions that do it."""
        groups: dict[tuple[Scheme, Clip | None], list[str]] = {}
        for each in self.choices:
            if each.scheme is not None:
                groups.setdefault((each.scheme, each.clip), []).append(each.tensor)
        found = [QuantizeWeights(scheme, clip=clip, only=tuple(only)) for (scheme, clip), only in groups.items()]
        left = {each.tensor for each in self.choices if each.scheme is None}
        kept = tuple(each for choice in self.choices if choice.tensor in left for each in choice.holds)
        return (replace(found[0], keep=tuple(each for each in weights if each in kept)), *found[1:]) if found else ()


def allocate(
    model: LoadedModel,
    windows: Windows,
    weights: Sequence[Coordinate],
    scheme: Scheme,
    *,
    budget: float,
    fine: Scheme | None = None,
    clip: Clip | None = None,
    progress: Progress = NO_PROGRESS,
) -> Allocation:
    """Gives each matrix a scheme, clipped or not, 8 bits, or none.

    Every matrix starts with `scheme`, clipped where that is better. Then those that hold super weights are left as they are
    stored, as far as the budget goes; then, one after the other, whatever lowers KL most for its bits. What is measured is each
    matrix rounded alone: effects are taken to add up, and only a measurement of the whole shows how far they do.

    Args:
        model: the model, from a checkpoint.
        windows: a text to choose by; measure the result on another.
        weights: the super weights.
        scheme: the cheapest way to store a matrix.
        budget: bits per weight, scales included, over all matrices of the decoder layers.
        fine: the better way; default: 8 bits with the same sharing.
        clip: how clipped candidates clip; None has none.
        progress: hears about conditions.

    Raises:
        UsageError: the budget is below what `scheme` takes alone, or a scheme does not fit.
    """
    checkpoint = checkpoint_of(model)
    fine = fine or replace(scheme, kind="int", bits=8)
    matrices = checkpoint_matrices(checkpoint)
    total = sum(each.numel for each in matrices)
    stored = {each.tensor: checkpoint.tensors[each.tensor].storage.nbits for each in matrices}
    holds: dict[str, list[Coordinate]] = {}
    for coordinate in weights:
        holds.setdefault(locate_stored(checkpoint, coordinate)[0], []).append(coordinate)

    def bits(matrix: StoredMatrix, of: Scheme) -> float:
        return matrix.numel * of.bits_per_weight(matrix.rows, matrix.cols, scale_bits=stored[matrix.tensor])

    least = sum(bits(each, scheme) for each in matrices) / total
    if budget < least:
        raise UsageError(
            f"Quantizing {model.name} with {budget:g} bits per weight: {scheme} alone takes {least:.4g}. Give that or more."
        )
    ways = [(scheme, None), *([(scheme, clip)] if clip else []), (fine, None)]
    conditions = {
        (each.tensor, way): Condition(
            f"{each.tensor}, {_described(*way)}", (QuantizeWeights(way[0], clip=way[1], only=(each.tensor,)),)
        )
        for each in matrices
        for way in ways
    }
    found = evaluate(model, windows, [ORIGINAL, *conditions.values()], progress=progress)

    def choice(matrix: StoredMatrix, of: Scheme, cut: Clip | None) -> Choice:
        kl = found.kl(conditions[matrix.tensor, (of, cut)]).value
        return Choice(
            matrix.tensor, _described(of, cut), of, cut, bits(matrix, of), kl, tuple(holds.get(matrix.tensor, ()))
        )

    chosen: dict[str, Choice] = {}
    better: list[Choice] = []
    for matrix in matrices:
        coarse = [choice(matrix, of, cut) for of, cut in ways[:-1]]
        chosen[matrix.tensor] = min(coarse, key=lambda each: each.kl_nats)
        whole = Choice(
            matrix.tensor, "as stored", None, None, matrix.numel * stored[matrix.tensor], 0.0,
            tuple(holds.get(matrix.tensor, ())),
        )  # fmt: skip
        better += [choice(matrix, fine, None), whole]
    spare = budget * total - sum(each.bits for each in chosen.values())
    firsts = [each for each in better if each.scheme is None and each.holds]
    for each in sorted(firsts, key=lambda each: -chosen[each.tensor].kl_nats):
        spare -= _take(each, chosen, spare)
    while fitting := [each for each in better if _gain(each, chosen) > 0 and _cost(each, chosen) <= spare]:
        spare -= _take(max(fitting, key=lambda each: _gain(each, chosen) / max(_cost(each, chosen), 1)), chosen, spare)
    used = sum(each.bits for each in chosen.values())
    return Allocation(tuple(chosen[each.tensor] for each in matrices), used / total, budget)


def _cost(each: Choice, chosen: dict[str, Choice]) -> float:
    return each.bits - chosen[each.tensor].bits


def _described(scheme: Scheme, clip: Clip | None) -> str:
    return str(scheme) if clip is None else f"{scheme}, clip {clip}"


def _gain(each: Choice, chosen: dict[str, Choice]) -> float:
    return chosen[each.tensor].kl_nats - each.kl_nats


def _take(each: Choice, chosen: dict[str, Choice], spare: float) -> float:
    """Takes a choice where the budget allows it; gives what it cost."""
    cost = _cost(each, chosen)
    if cost > spare:
        return 0.0
    chosen[each.tensor] = each
    return cost
