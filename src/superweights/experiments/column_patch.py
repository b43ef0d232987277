"""Column patches: what a damaged down projection lacks, fitted to activations that were kept from before the damage.

A patch adds a vector u to a column, `W[:, col] += u`: a rank-one change of the matrix. The u is the one that brings the
damaged outputs closest to the kept ones by least squares over the tokens of a short text. Inputs weigh by their square, so the
token of the super activation decides. Of the weights themselves nothing is read.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from superweights.coordinates import Coordinate
from superweights.experiments.evaluation import TOKENS_PER_PASS
from superweights.interventions.conditions import ORIGINAL, AddToWeights, Condition, ScaleWeights
from superweights.interventions.rows import applied
from superweights.measurements.windows import Windows
from superweights.model.architecture import DownProjection
from superweights.model.loading import LoadedModel
from superweights.progress import NO_PROGRESS, Progress

_NOISE = 1e-6
"""Entries of a patch below this share of its largest are rounding, and left out."""

_Home = tuple[DownProjection, int | None]
"""A down projection, and which of its experts."""


def fit_column_patches(
    model: LoadedModel, damage: ScaleWeights, windows: Windows, *, progress: Progress = NO_PROGRESS
) -> list[AddToWeights]:
    """Patches of the columns in which weights were damaged, one layer after the other.

    Args:
        model: the intact model, whose activations are those that somebody kept.
        damage: what is done to which weights.
        windows: a short text.
        progress: hears about each layer.

    Returns:
        What is added to the damaged model. Nothing for a column whose input is zero at every token, or that lacks nothing.
    """
    cols: defaultdict[_Home, list[int]] = defaultdict(list)
    for weight in sorted(damage.weights):
        home = model.architecture.locate(weight), weight.expert
        cols[home] = sorted({*cols[home], weight.col})
    kept = _activations(model, ORIGINAL, windows, cols, progress)
    patches: list[AddToWeights] = []
    for layer in sorted({projection.layer for projection, _ in cols}):
        here = {home: each for home, each in cols.items() if home[0].layer == layer}
        seen = _activations(model, Condition("damaged", (damage, *patches)), windows, here, progress)
        for home, activations in seen.items():
            patches += _patch(home, here[home], _fit_columns(activations, kept[home]))
    return patches


@dataclass(frozen=True)
class _Activations:
    """What a down projection took in and gave out; zeros where a token did not reach it."""

    inputs: torch.Tensor  # [tokens, damaged cols]
    outputs: torch.Tensor  # [tokens, rows]
    reached: torch.Tensor  # [tokens], bool


def _fit_columns(damaged: _Activations, kept: _Activations) -> torch.Tensor:
    """The columns u, [damaged cols, rows], for which inputs @ u comes closest to what the outputs lack."""
    both = damaged.reached & kept.reached
    lacking = (kept.outputs[both] - damaged.outputs[both]).double()
    columns: torch.Tensor = torch.linalg.lstsq(damaged.inputs[both].double(), lacking, driver="gelsd").solution
    return columns


def _patch(home: _Home, cols: Sequence[int], columns: torch.Tensor) -> Iterator[AddToWeights]:
    projection, expert = home
    for col, column in zip(cols, columns, strict=True):
        rows = (column.abs() > _NOISE * column.abs().max()).nonzero().flatten().tolist()
        if rows:
            places = tuple(Coordinate(projection.layer, expert, row, col) for row in rows)
            yield AddToWeights(places, tuple(column[rows].tolist()))


def _activations(
    model: LoadedModel, condition: Condition, windows: Windows, cols: Mapping[_Home, Sequence[int]], progress: Progress
) -> dict[_Home, _Activations]:
    """What the down projections of `cols` do to the windows under a condition."""
    tokens = windows.ids.numel()
    found = {
        home: _Activations(
            torch.zeros(tokens, len(each)), torch.zeros(tokens, home[0].rows), torch.zeros(tokens, dtype=torch.bool)
        )
        for home, each in cols.items()
    }
    done = 0

    def keep(home: _Home, places: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        if home in found:
            places = places.cpu() + done
            found[home].inputs[places] = inputs[:, list(cols[home])].detach().float().cpu()
            found[home].outputs[places] = outputs.detach().float().cpu()
            found[home].reached[places] = True

    with applied(model, condition), ExitStack() as stack:
        for projection in dict.fromkeys(projection for projection, _ in cols):
            stack.enter_context(_watched(model, projection, keep))
        for ids in torch.split(windows.ids, max(1, TOKENS_PER_PASS // windows.length)):
            model.states(ids, progress=progress)
            done += ids.numel()
    return found


@contextmanager
def _watched(model: LoadedModel, projection: DownProjection, keep: Callable[..., None]) -> Iterator[None]:
    """Hands inputs and outputs of a down projection to `keep`, without the routing weights of its experts."""
    module: Any = model.model.get_submodule(projection.module)
    if projection.experts is not None:
        module.observer = lambda expert, places, inputs, outputs, _: keep((projection, expert), places, inputs, outputs)
        try:
            yield
        finally:
            module.observer = None
        return

    def hook(_: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        flat = output.reshape(-1, projection.rows)
        keep((projection, None), torch.arange(len(flat)), args[0].reshape(-1, projection.cols), flat)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
