"""Conditions on windows of text: which pass runs what, and the numbers as records.

Conditions that edit activations or single weights share passes as rows of one batch; those that edit all weights or all
activations run by themselves. Windows are the outer loop, so a caller may stop as soon as the numbers decide.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from superweights.errors import UsageError
from superweights.interventions.conditions import ORIGINAL, Condition
from superweights.interventions.rows import applied, condition_states
from superweights.measurements.intervals import Interval, mean_interval, perplexity, perplexity_ratio
from superweights.measurements.scores import Scores, score_states
from superweights.measurements.windows import Windows
from superweights.model.loading import LoadedModel
from superweights.progress import NO_PROGRESS, Progress
from superweights.results.records import MeasurementRecord

TOKENS_PER_PASS = 8192
"""Rows times tokens of one pass. It bounds the memory of activations: 8192 tokens of a 7B model take about 1 GB."""


@dataclass(frozen=True)
class Evaluation:
    """Conditions, the first of them the original, and their scores on the same windows."""

    conditions: tuple[Condition, ...]
    """What was compared; the first is the original."""
    scores: Scores
    """Loss, divergence and agreement of each condition and window."""
    windows: Windows
    """The text; scores may be of its first windows only."""

    @property
    def count(self) -> int:
        """How many windows were scored."""
        return self.scores.nll_nats.shape[1]

    @property
    def tokens(self) -> int:
        """How many tokens were predicted."""
        return self.count * (self.windows.length - 1)

    def nll(self, condition: Condition) -> list[float]:
        """Nats per token of each window."""
        values: list[float] = self.scores.nll_nats[self.conditions.index(condition)].tolist()
        return values

    def ratio(self, condition: Condition) -> Interval:
        """Perplexity over that of the original, paired over windows."""
        return perplexity_ratio(self.nll(condition), self.nll(self.conditions[0]))

    def kl(self, condition: Condition) -> Interval:
        """Divergence from the original, nats per token."""
        values = self.scores.kl_nats[self.conditions.index(condition)].tolist()
        return mean_interval(values, bounds=(0, math.inf))

    def records(self) -> Iterator[MeasurementRecord]:
        """Perplexity of every condition; ratio, KL and agreement of every edited one."""
        for condition in self.conditions:
            yield from self.records_of(condition)

    def records_of(self, condition: Condition) -> Iterator[MeasurementRecord]:
        """Those of one condition."""
        yield self._record(condition, "perplexity", "1", perplexity(self.nll(condition)))
        number = self.conditions.index(condition)
        if number:
            agreement = self.scores.agreement[number].tolist()
            yield self._record(condition, "perplexity_ratio", "1", self.ratio(condition))
            yield self._record(condition, "kl_to_original", "nats per token", self.kl(condition))
            yield self._record(condition, "top1_agreement", "proportion", mean_interval(agreement, bounds=(0, 1)))

    def _record(self, condition: Condition, name: str, unit: str, value: Interval) -> MeasurementRecord:
        return measurement(
            name,
            value,
            unit=unit,
            condition=condition,
            dataset=self.windows.text_name,
            dataset_digest=self.windows.digest,
        )


def measurement(
    name: str,
    value: Interval,
    *,
    unit: str,
    condition: Condition = ORIGINAL,
    subject: str = "",
    dataset: str | None = None,
    dataset_digest: str | None = None,
) -> MeasurementRecord:
    """One number with its interval as a record; with one item there is no interval."""
    known = value.count > 1
    return MeasurementRecord(
        name=name,
        subject=subject,
        condition=condition.name,
        unit=unit,
        value=value.value,
        standard_error=value.standard_error if known else None,
        interval=(value.low, value.high) if known else None,
        count=value.count,
        dataset=dataset,
        dataset_digest=dataset_digest,
        intervention=condition.describe(),
    )


def evaluate(
    model: LoadedModel, windows: Windows, conditions: Sequence[Condition], *, progress: Progress = NO_PROGRESS
) -> Evaluation:
    """Scores all windows under all conditions.

    Args:
        model: the model.
        windows: the text.
        conditions: what to compare; the first is the original and the reference of KL.
        progress: hears about windows.

    Raises:
        UsageError: an edit changes nothing.
        CoordinateError: a weight is not in this model.
    """
    in_rows = [each for each in conditions if not each.needs_own_pass]
    # Only those that need their own pass ask for them later: of a long text they take gigabytes.
    references: list[torch.Tensor] | None = [] if len(in_rows) < len(conditions) else None
    parts = evaluate_in_parts(model, windows, in_rows, references=references, progress=progress)
    found = dict(zip(in_rows, _by_condition(Scores.joined(list(parts), dim=1)), strict=True))
    for condition in conditions:
        if condition not in found and references is not None:  # edits weights: all windows while the edit lasts
            found[condition] = _score_alone(model, windows, condition, references, progress)
    return Evaluation(tuple(conditions), Scores.joined([found[each] for each in conditions], dim=0), windows)


def evaluate_in_parts(
    model: LoadedModel,
    windows: Windows,
    conditions: Sequence[Condition],
    *,
    references: list[torch.Tensor] | None = None,
    compare: bool = True,
    progress: Progress = NO_PROGRESS,
) -> Iterator[Scores]:
    """Scores of a few windows after the other, under all conditions; memory bounds how many go together.

    Args:
        model: the model.
        windows: the text.
        conditions: the original first; none may need a pass of its own.
        references: takes the last states of the original of each part.
        compare: False leaves KL and agreement out, at half the cost.
        progress: hears about windows.
    """
    if conditions[0].interventions:
        raise UsageError(f"Others are compared with the first condition: put the original before {conditions[0].name}.")
    rows = max(1, TOKENS_PER_PASS // windows.length)
    progress.start("windows", total=len(windows.ids), unit="windows")
    try:
        for ids in torch.split(windows.ids, max(1, rows // len(conditions))):
            reference, scores = _score_rows(model, ids, conditions, max(1, rows // len(ids)), compare)
            if references is not None:
                references.append(reference.clone())  # not a view, which would hold the states of all conditions
            yield scores
            progress.advance(len(ids))
    finally:
        progress.finish()


def _score_rows(
    model: LoadedModel, ids: torch.Tensor, conditions: Sequence[Condition], at_once: int, compare: bool
) -> tuple[torch.Tensor, Scores]:
    """Last states of the original, and scores of a few windows, `at_once` conditions a pass."""
    parts = []
    reference: torch.Tensor | None = None
    for first in range(0, len(conditions), at_once):
        states = condition_states(model, ids, conditions[first : first + at_once])
        reference = states[0] if reference is None else reference
        parts.append(score_states(model, states, ids, reference if compare else None))
    assert reference is not None
    return reference, Scores.joined(parts, dim=0)


def _score_alone(
    model: LoadedModel, windows: Windows, condition: Condition, references: list[torch.Tensor], progress: Progress
) -> Scores:
    parts = torch.split(windows.ids, len(references[0]))
    progress.start(condition.name, total=len(parts), unit="passes")
    scores = []
    try:
        with applied(model, condition):
            for ids, reference in zip(parts, references, strict=True):
                scores.append(score_states(model, model.states(ids)[None], ids, reference))
                progress.advance()
    finally:
        progress.finish()
    return Scores.joined(scores, dim=1)


def _by_condition(scores: Scores) -> list[Scores]:
    rows = zip(scores.nll_nats, scores.kl_nats, scores.agreement, strict=True)
    return [Scores(*(each[None] for each in row)) for row in rows]
