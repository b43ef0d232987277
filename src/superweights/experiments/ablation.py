"""Ablate: the paper's table 1, with super weights removed, other large weights removed, the super activation put back."""

from collections.abc import Sequence

from superweights.coordinates import Coordinate
from superweights.errors import UsageError
from superweights.experiments.evaluation import Evaluation, evaluate
from superweights.interventions.conditions import Condition, PruneLargest, with_and_without
from superweights.measurements.windows import Windows
from superweights.model.loading import LoadedModel
from superweights.progress import NO_PROGRESS, Progress

PAPER_SHARE = 1e-6
"""Share of each matrix that the paper's control removes: about 7,000 weights of Llama-7B."""


def ablation_conditions(
    model: LoadedModel, weights: Sequence[Coordinate], *, others: float | int | None = None
) -> tuple[Condition, ...]:
    """The rows of table 1: original, weights removed, largest others removed, removed and super activation restored.

    Args:
        model: says how large its matrices are.
        weights: the super weights.
        others: how many of the largest other weights to remove: a share of each matrix, or a count for each. By default the
            paper's share, and at least one weight of each matrix.

    Raises:
        UsageError: there is no weight to remove.
    """
    if not weights:
        raise UsageError(f"There is no weight of {model.name} to remove. Name some, or let find look for candidates.")
    original, removed, restored = with_and_without(weights)
    if others is None:
        smallest = min(each.rows * each.cols for each in model.architecture.down_projections)
        others = PAPER_SHARE if PAPER_SHARE * smallest >= 1 else 1
    control = Condition("largest others removed", (PruneLargest(others, keep=tuple(weights)),))
    return original, removed, control, restored


def ablate(
    model: LoadedModel,
    weights: Sequence[Coordinate],
    windows: Windows,
    *,
    others: float | int | None = None,
    progress: Progress = NO_PROGRESS,
) -> Evaluation:
    """Perplexity, KL and agreement of the rows of the paper's table 1 on a text.

    Args:
        model: the model.
        weights: the super weights.
        windows: the text.
        others: see `ablation_conditions`.
        progress: hears about windows.

    Raises:
        UsageError: there is nothing to remove, or removing changes nothing.
        CoordinateError: a weight is not in this model.

    Source:
        arXiv 2411.07191, table 1.
    """
    return evaluate(model, windows, ablation_conditions(model, weights, others=others), progress=progress)
