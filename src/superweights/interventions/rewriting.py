"""Interventions on the weights of a checkpoint, written as a new checkpoint that other tools load unchanged."""

from collections.abc import Sequence
from pathlib import Path

import torch

from superweights.checkpoint import Checkpoint, ModelReference
from superweights.checkpoint.copying import Pieces, copy_checkpoint
from superweights.errors import UsageError
from superweights.interventions.weights import EditCount, EditPlan, WeightEdit, plan_stored_edits
from superweights.progress import NO_PROGRESS, Progress


def rewrite_checkpoint(
    source: ModelReference | str | Path,
    to: str | Path,
    interventions: Sequence[WeightEdit],
    *,
    overwrite: bool = False,
    progress: Progress = NO_PROGRESS,
) -> EditCount:
    """Writes a checkpoint with edited weights: the model that `weights_edited` makes, as files.

    Config, tokenizer, headers and the layout of the files stay as they are; only edited weights differ. The folder is whole or
    not there.

    Args:
        source: a directory, a Hub name or a URL; it is only read, whole.
        to: the new folder.
        interventions: what is done, in order.
        overwrite: whether a model that is at `to` already may be replaced.
        progress: hears about each block.

    Returns:
        How much is changed.

    Raises:
        CoordinateError: a coordinate is not in this model.
        UsageError: an edit changes nothing, an amount is out of range, or `to` is taken or is where the model lies.
        UnsupportedArchitectureError: the names do not say which tensors make up the decoder layers.
        CheckpointError: the files of the source cannot be used, or are quantized.
        RecordError: the copy cannot be written; nothing is left of it.
    """
    if not interventions:
        raise UsageError(f"Rewriting {source}: there is nothing to do. Name at least one intervention.")
    with Checkpoint.open(source) as checkpoint:
        checkpoint.require_plain("rewriting weights")
        plan = plan_stored_edits(checkpoint, interventions)
        copy_checkpoint(
            checkpoint, Path(to), lambda file: _edited(checkpoint, plan, file), overwrite=overwrite, progress=progress
        )
    return plan.count


def _edited(checkpoint: Checkpoint, plan: EditPlan, file: str) -> Pieces:
    """The edited matrices of a file, one in memory at a time."""
    for name, parts in plan.steps.items():
        entry = checkpoint.entry(name)
        if entry.file != file:
            continue
        checkpoint.fetch((name,), populate=False)
        tensor = checkpoint.view(name)
        for part in parts:
            matrix = (tensor if part is None else tensor[part]).clone()
            plan.edit_matrix(name, part, matrix)
            yield entry.start + (part or 0) * matrix.nbytes, matrix.view(torch.uint8).numpy().data
