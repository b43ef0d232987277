"""Verify: does the model need these weights, alone or together, more than other large weights of the same matrices?

Every candidate is removed alone, all together, and all but one; random weights of the largest |W| of the same matrices stand
beside them as a null, as singles and as sets. All of it runs on the same windows, as rows of shared passes, until the
intervals decide or the budget is spent.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from superweights.coordinates import Coordinate
from superweights.errors import UsageError
from superweights.experiments.evaluation import Evaluation, evaluate_in_parts
from superweights.interventions.conditions import ORIGINAL, Condition, removal
from superweights.measurements.intervals import Interval
from superweights.measurements.scores import Scores
from superweights.measurements.windows import Windows
from superweights.model.architecture import DownProjection
from superweights.model.loading import LoadedModel
from superweights.progress import NO_PROGRESS, Progress
from superweights.results.records import NoteRecord, Record, VerdictRecord

Kind = Literal["single", "all", "minimal set"]
Label = Literal["critical alone", "critical jointly", "contributing", "inert", "undecided"]
ALL = "all candidates"
_FEWEST_WINDOWS = 8
_NEGLIGIBLE = 0.01
"""A weight is inert when the whole interval costs at most this share more than the null."""


@dataclass(frozen=True)
class VerifySettings:
    """How sure `verify` must be, and what it may cost."""

    null: int = 20
    """Random draws of the null, as singles and, for several candidates, as sets."""
    null_top: int = 100
    """The null draws from so many of the largest |W| of each candidate's matrix."""
    critical: float = 2.0
    """A weight or set is critical when its removal multiplies the perplexity by at least this much, with the whole interval."""
    minutes: float | None = None
    """Stop after so many minutes, with what is known by then."""
    seed: int = 0
    """Seed of the null's draws."""

    def __post_init__(self) -> None:
        timely = self.minutes is None or self.minutes > 0
        if self.null < 1 or self.null_top < 1 or not self.critical > 1 or not timely:
            raise UsageError(
                f"Verifying with null {self.null}, null_top {self.null_top}, critical {self.critical:g} and minutes "
                f"{self.minutes}: the first two must be 1 or more, critical above 1, minutes above 0."
            )


@dataclass(frozen=True)
class Verification:
    """What removal does, and what follows for each candidate."""

    verdicts: tuple[VerdictRecord, ...]
    """One for each candidate, one for all together, and one for the minimal critical set where there is one."""
    evaluation: Evaluation
    """The scores behind them."""
    notes: tuple[str, ...]
    """Why the measuring stopped, and what a reader must know besides."""

    @cached_property
    def weights(self) -> tuple[Coordinate, ...]:
        """The weights that the model needs: critical alone or jointly."""
        needed = [each for each in self.verdicts if each.kind == "single" and each.label.startswith("critical")]
        return tuple(Coordinate.parse(each.weights[0]) for each in needed)

    def records(self) -> Iterator[Record]:
        """Everything as records."""
        yield from self.verdicts
        for record in self.evaluation.records():
            if record.name in ("perplexity", "perplexity_ratio"):  # the others are not measured
                yield record
        yield from (NoteRecord(level="info", text=text) for text in self.notes)


def verify(
    model: LoadedModel,
    weights: Sequence[Coordinate],
    windows: Windows,
    *,
    settings: VerifySettings | None = None,
    progress: Progress = NO_PROGRESS,
) -> Verification:
    """Says of each weight whether the model needs it: critical alone, critical jointly, contributing or inert.

    Args:
        model: the model.
        weights: the candidates; their order is kept.
        windows: the text to measure on; at most all of it is used.
        settings: thresholds and budget.
        progress: hears about windows.

    Raises:
        UsageError: no weight, one that is zero already, or a model whose loss is not finite as it is.
        CoordinateError: a weight is not in this model.

    Source:
        arXiv 2411.07191, table 1, for removal; the null and the sets after Castillo's replication.
    """
    settings = settings or VerifySettings()
    weights = tuple(dict.fromkeys(weights))
    if not weights:
        raise UsageError(f"There is no weight of {model.name} to verify. Name some, or let find look for candidates.")
    plan = _Plan.of(model, weights, settings)
    started = time.monotonic()
    evaluation, notes = _evaluate(model, windows, plan, settings, started, progress)
    verdicts = list(_judge(plan, evaluation, settings))
    minimal = _minimal_set(model, plan, evaluation, settings)
    if minimal is not None:
        verdicts = [*_with_joint(verdicts, minimal), minimal]
    return Verification(tuple(verdicts), evaluation, tuple(notes))


@dataclass(frozen=True)
class _Plan:
    """All conditions of a verification."""

    weights: tuple[Coordinate, ...]
    singles: tuple[Condition, ...]
    together: Condition
    """All candidates removed; the same as the single one where there is one."""
    all_but: tuple[Condition, ...]
    null_singles: tuple[Condition, ...]
    null_sets: tuple[Condition, ...]

    @classmethod
    def of(cls, model: LoadedModel, weights: tuple[Coordinate, ...], settings: VerifySettings) -> "_Plan":
        singles = tuple(removal([each], name=f"without {each}") for each in weights)
        pools = _null_pools(model, weights, settings.null_top)
        draw = np.random.default_rng(settings.seed)
        null_singles = [_draw(draw, pools, [weights[int(draw.integers(len(weights)))]]) for _ in range(settings.null)]
        several = len(weights) > 1
        null_sets = [_draw(draw, pools, weights) for _ in range(settings.null if several else 0)]
        return cls(
            weights,
            singles,
            removal(weights, name=f"without {ALL}") if several else singles[0],
            tuple(
                removal([each for each in weights if each != kept], name=f"without {ALL} but {kept}")
                for kept in weights
                if several
            ),
            tuple(removal(each, name=f"null {number}") for number, each in enumerate(null_singles, start=1)),
            tuple(removal(each, name=f"null set {number}") for number, each in enumerate(null_sets, start=1)),
        )

    @property
    def conditions(self) -> tuple[Condition, ...]:
        parts = (ORIGINAL, *self.singles, self.together, *self.all_but, *self.null_singles, *self.null_sets)
        return tuple(dict.fromkeys(parts))  # with two candidates, all but one is the other


def _null_pools(
    model: LoadedModel, weights: Sequence[Coordinate], top: int
) -> dict[tuple[DownProjection, int | None], list[Coordinate]]:
    """The largest |W| of the matrices of the candidates, without them."""
    homes = {(model.architecture.locate(each), each.expert) for each in weights}
    pools = {}
    for projection, expert in homes:
        with model.attached(projection) as parameter:
            matrix = parameter if expert is None else parameter[expert]
            flat = matrix.flatten().abs()
            places = flat.topk(min(top + len(weights), flat.numel())).indices.tolist()
        places = [divmod(each, matrix.shape[1]) for each in places]
        found = [
            Coordinate(projection.layer, expert, *(place[::-1] if projection.transposed else place)) for place in places
        ]
        pools[projection, expert] = [each for each in found if each not in weights][:top]
        needed = sum((model.architecture.locate(each), each.expert) == (projection, expert) for each in weights)
        if len(pools[projection, expert]) < needed:
            raise UsageError(f"{projection.name} has too few weights beside the candidates to draw a null from.")
    # Drawn from by name: the order must not depend on the order of a set.
    return {
        home: sorted(pool) for home, pool in sorted(pools.items(), key=lambda each: (each[0][0].name, each[0][1] or 0))
    }


def _draw(
    draw: np.random.Generator,
    pools: dict[tuple[DownProjection, int | None], list[Coordinate]],
    like: Sequence[Coordinate],
) -> list[Coordinate]:
    """As many random weights of each matrix as `like` has there."""
    drawn = []
    for (projection, expert), pool in pools.items():
        count = sum((each.layer, each.expert) == (projection.layer, expert) for each in like)
        drawn += [pool[int(each)] for each in draw.choice(len(pool), size=count, replace=False)]
    return drawn


def _evaluate(
    model: LoadedModel,
    windows: Windows,
    plan: _Plan,
    settings: VerifySettings,
    started: float,
    progress: Progress,
) -> tuple[Evaluation, list[str]]:
    """Scores windows until every interval decides, the budget is spent or the text ends.

    Intervals are looked at after 8 windows, 16, 32 and so on: who looks after every window stops at a lucky one.
    """
    parts: list[Scores] = []
    notes: list[str] = []
    evaluation: Evaluation | None = None
    look = _FEWEST_WINDOWS
    for part in evaluate_in_parts(model, windows, plan.conditions, compare=False, progress=progress):
        if not part.nll_nats[0].isfinite().all():
            raise UsageError(
                f"The loss of {model.name} on {windows.text_name} is not finite as it is, so removal has nothing to be "
                "compared with. Check its weights, or give another text."
            )
        parts.append(part)
        evaluation = Evaluation(plan.conditions, Scores.joined(parts, dim=1), windows)
        spent = (time.monotonic() - started) / 60
        if evaluation.count < len(windows.ids):
            if evaluation.count >= look:
                look = 2 * evaluation.count
                if _is_decided(plan, evaluation, settings):
                    notes.append(
                        f"Stopped after {evaluation.count} of {len(windows.ids)} windows: every interval decides."
                    )
                    break
            if settings.minutes is not None and spent > settings.minutes:
                spent_on = f"{evaluation.count} of {len(windows.ids)} windows"
                notes.append(f"Stopped after {spent_on}: the {settings.minutes:g} minutes are spent.")
                break
    assert evaluation is not None
    if evaluation.count < _FEWEST_WINDOWS:
        notes.append(
            f"Windows measured: {evaluation.count}. Below 8, intervals are too narrow: give more text or time."
        )
    return evaluation, notes


def _is_decided(plan: _Plan, evaluation: Evaluation, settings: VerifySettings) -> bool:
    return all(each.label != "undecided" for each in _judge(plan, evaluation, settings))


def _null_maximum(evaluation: Evaluation, conditions: Sequence[Condition]) -> float:
    """The largest ratio of a null; a draw that makes the loss nan counts as infinite."""
    ratios = [evaluation.ratio(each).value for each in conditions]
    return max(math.inf if math.isnan(each) else each for each in ratios)


def _judge(plan: _Plan, evaluation: Evaluation, settings: VerifySettings) -> Iterator[VerdictRecord]:
    """The verdict of each candidate alone, and of all together."""
    null = _null_maximum(evaluation, plan.null_singles)
    lonely = len(plan.weights) == 1
    for number, weight in enumerate(plan.weights):
        without = None if lonely else evaluation.ratio(plan.all_but[number]).value
        ratio = evaluation.ratio(plan.singles[number])
        yield _verdict(evaluation, "single", [weight], ratio, null, len(plan.null_singles), settings, without)
    if not lonely:
        ratio, null = evaluation.ratio(plan.together), _null_maximum(evaluation, plan.null_sets)
        yield _verdict(evaluation, "all", plan.weights, ratio, null, len(plan.null_sets), settings, None)


def _verdict(
    evaluation: Evaluation,
    kind: Kind,
    weights: Sequence[Coordinate],
    ratio: Interval,
    null: float,
    draws: int,
    settings: VerifySettings,
    without: float | None,
) -> VerdictRecord:
    label, reason = _label(kind, ratio, null, settings)
    return VerdictRecord(
        kind=kind,
        weights=tuple(map(str, weights)),
        label=label,
        ratio=ratio.value,
        interval=(ratio.low, ratio.high),
        without=without,
        null_maximum=null,
        null_count=draws,
        count=evaluation.count,
        tokens=evaluation.tokens,
        dataset=evaluation.windows.text_name,
        dataset_digest=evaluation.windows.digest,
        reason=reason,
    )


def _label(kind: Kind, ratio: Interval, null: float, settings: VerifySettings) -> tuple[Label, str]:
    critical: Label = "critical alone" if kind == "single" else "critical jointly"
    known = f"removal multiplies the perplexity by {ratio.value:.4g} ({ratio.low:.4g} to {ratio.high:.4g})"
    beside = f"; the null's largest is {null:.4g}"
    bar = max(1.0, null)
    if not math.isfinite(ratio.value):  # destroyed beyond numbers
        return critical, f"removal makes the loss {'infinite' if ratio.value > 0 else 'not a number'}{beside}"
    if math.isnan(ratio.low):
        return "undecided", f"{known}; one window gives no interval"
    if ratio.low >= settings.critical:
        if ratio.low > null:
            return critical, known + beside
        return "undecided", f"{known}, but other large weights cost about as much{beside}"
    if ratio.high >= settings.critical:
        return "undecided", f"{known}, and the bar of {settings.critical:g} is inside; measure on more windows{beside}"
    if ratio.low > bar:
        return "contributing", known + beside
    if ratio.high <= bar * (1 + _NEGLIGIBLE):
        return "inert", f"{known}, which other large weights reach or which is no loss{beside}"
    return "undecided", f"{known}, and what other large weights cost is inside; measure on more windows{beside}"


def _minimal_set(
    model: LoadedModel, plan: _Plan, evaluation: Evaluation, settings: VerifySettings
) -> VerdictRecord | None:
    """The smallest critical set that greedy removal leaves; None where all together are not critical.

    From all candidates, the one that the rest can best do without is left out, while what stays is still critical.
    """
    together = evaluation.ratio(plan.together)
    if len(plan.weights) == 1 or not _is_critical(together, settings):
        return None
    alone = [(evaluation.ratio(each), weight) for each, weight in zip(plan.singles, plan.weights, strict=True)]
    if any(_is_critical(ratio, settings) for ratio, _ in alone):
        return None  # the set is one weight, and its own verdict says so
    kept, ratio = plan.weights, together
    used = Windows(
        evaluation.windows.ids[: evaluation.count],
        evaluation.windows.text_name,
        evaluation.windows.digest,
        evaluation.windows.length,
        evaluation.windows.bos,
    )
    while len(kept) > 1:
        smaller = [tuple(each for each in kept if each != left) for left in kept]
        conditions = (ORIGINAL, *(removal(each, name=f"set {number}") for number, each in enumerate(smaller)))
        parts = list(evaluate_in_parts(model, used, conditions, compare=False))
        scored = Evaluation(conditions, Scores.joined(parts, dim=1), used)
        ratios = [scored.ratio(each) for each in conditions[1:]]
        best = max(range(len(smaller)), key=lambda number: _worst_first(ratios[number]))
        if not _is_critical(ratios[best], settings):
            break
        kept, ratio = smaller[best], ratios[best]
    null = _null_maximum(evaluation, plan.null_sets)
    return _verdict(evaluation, "minimal set", kept, ratio, null, len(plan.null_sets), settings, None)


def _is_critical(ratio: Interval, settings: VerifySettings) -> bool:
    return ratio.low >= settings.critical or not math.isfinite(ratio.value)


def _worst_first(ratio: Interval) -> float:
    return ratio.low if math.isfinite(ratio.value) else math.inf


def _with_joint(verdicts: Sequence[VerdictRecord], minimal: VerdictRecord) -> Iterator[VerdictRecord]:
    """The verdicts, where a weight of the minimal set that is not critical alone is critical jointly."""
    for each in verdicts:
        if each.kind == "single" and each.weights[0] in minimal.weights and minimal.label == "critical jointly":
            reason = f"alone, {each.reason}; the set {', '.join(minimal.weights)} is critical"
            yield each.model_copy(update={"label": "critical jointly", "reason": reason})
        else:
            yield each
