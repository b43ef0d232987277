"""Sinks: does the attention to the first token survive when the super weights are gone?"""

from collections.abc import Iterator, Sequence

import torch

from superweights.coordinates import Coordinate
from superweights.experiments.evaluation import TOKENS_PER_PASS, measurement
from superweights.interventions.conditions import Condition, with_and_without
from superweights.interventions.rows import applied
from superweights.measurements.attention_sinks import attention_to_first
from superweights.measurements.intervals import mean_interval
from superweights.measurements.windows import Windows
from superweights.model.loading import LoadedModel
from superweights.progress import NO_PROGRESS, Progress
from superweights.results.records import Record

_ATTENTION_AT_ONCE = 1 << 26
"""Elements of the attention weights of one layer in one pass: 256 MB, of which some copies are made."""


def sinks(
    model: LoadedModel, weights: Sequence[Coordinate], windows: Windows, *, progress: Progress = NO_PROGRESS
) -> Iterator[Record]:
    """Attention to the first token by layer, with and without the weights, and with their super activation restored.

    Records are named `attention_to_first`; the subject is the layer, as "layer 3", or empty for the mean over all layers that
    attend. Intervals are over windows.

    Args:
        model: the model.
        weights: the super weights, all removed together; without any, the original is measured alone.
        windows: the text. Attention weights take heads x tokens x tokens numbers, so some hundred tokens per window are apt.
        progress: hears about windows.

    Raises:
        UnsupportedArchitectureError: no layer gives its attention weights.
        UsageError: a weight that is zero.
        CoordinateError: a weight is not in this model.

    Source:
        arXiv 2411.07191, appendix, where the sinks survive; pruning whole super experts is said to destroy them.
    """
    found = {each: _attention(model, windows, each, progress) for each in with_and_without(weights)}
    original, *_ = found.values()
    attends = ~original.isnan().all(dim=1)  # [layers]; an edit that destroys the model may make others nan as well
    for condition, values in found.items():
        yield from _records(values, attends, condition, windows)


def _attention(model: LoadedModel, windows: Windows, condition: Condition, progress: Progress) -> torch.Tensor:
    """Attention to the first token [layers, windows] under one condition."""
    progress.start(condition.name, total=len(windows.ids), unit="windows")
    parts = []
    try:
        with applied(model, condition):
            for ids in torch.split(windows.ids, _rows_at_once(model, windows.length)):
                parts.append(attention_to_first(model, ids))
                progress.advance(len(ids))
    finally:
        progress.finish()
    return torch.cat(parts, dim=1)


def _rows_at_once(model: LoadedModel, length: int) -> int:
    config = model.model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None) or 32
    return max(1, min(TOKENS_PER_PASS // length, _ATTENTION_AT_ONCE // (heads * length**2)))


def _records(found: torch.Tensor, attends: torch.Tensor, condition: Condition, windows: Windows) -> Iterator[Record]:
    numbers = {"": found[attends].mean(dim=0)}
    numbers |= {f"layer {layer}": found[layer] for layer in attends.nonzero().flatten().tolist()}
    for subject, values in numbers.items():
        yield measurement(
            "attention_to_first",
            mean_interval(values, bounds=(0, 1)),
            unit="proportion",
            subject=subject,
            condition=condition,
            dataset=windows.text_name,
            dataset_digest=windows.digest,
        )
