"""Does rounding activations break a model, and does taking the super activation out help: the paper's tables 3 to 5.

Weights and activations in 8 bits: rounded naively, smoothed by SmoothQuant, and with the super activation of each input
replaced before rounding and restored after. Where super activations sit is measured, on windows that are not scored.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from superweights.experiments.evaluation import Evaluation, evaluate, measurement
from superweights.interventions.conditions import (
    ORIGINAL,
    Condition,
    QuantizeActivations,
    QuantizeWeights,
    RoundedInput,
)
from superweights.measurements.intervals import Interval, bootstrap
from superweights.measurements.linear_inputs import MASSIVE_RATIO, LinearInput, linear_inputs
from superweights.measurements.windows import Windows
from superweights.model.loading import LoadedModel
from superweights.progress import NO_PROGRESS, Progress
from superweights.quantization.activations import Span
from superweights.quantization.scheme import Scheme
from superweights.quantization.smoothing import smoothing_factors
from superweights.results.records import MeasurementRecord, NoteRecord

Nats = NDArray[np.float64]
NAIVE, SMOOTHED, KEPT = "naive W8A8", "SmoothQuant", "super activation kept"
"""Names of the conditions, beside "original" and "weights only"."""


@dataclass(frozen=True, slots=True)
class ActivationSettings:
    """How activations are rounded."""

    activation_bits: int = 8
    """Bits of an activation."""
    scales: Literal["token", "tensor", "static"] = "token"
    """What shares a scale: a token (the paper), all tokens of a sequence, or all there will ever be, from the calibration."""
    median: Span = "token"
    """What a super activation takes the median of: its token, which then is scaled by its other values alone, or the tensor."""
    attention: bool = False
    """Round queries, keys, probabilities and values of attention too."""
    outputs: bool = False
    """Round what goes into the output projections of attention too; the paper does not list them."""
    alpha: float = 0.85
    """How much of the range SmoothQuant moves into weights, 0 to 1; the paper: 0.85."""
    massive_ratio: float = MASSIVE_RATIO
    """Largest |value| of an input over the median |value| of its token, from which it counts as a super activation."""


_DEFAULT = ActivationSettings()
PAPER_WEIGHTS = Scheme("int", 8, "tensor")
"""How the paper rounds weights beside activations: 8 bits, one scale for a tensor."""


@dataclass(frozen=True)
class ActivationConditions:
    """What is compared, and what must be said about it."""

    conditions: tuple[Condition, ...]
    """The original first."""
    notes: tuple[NoteRecord, ...]
    """Where super activations sit, and why SmoothQuant is left out where it is."""


def activation_conditions(
    model: LoadedModel,
    calibration: torch.Tensor,
    settings: ActivationSettings = _DEFAULT,
    *,
    weights: Scheme = PAPER_WEIGHTS,
) -> ActivationConditions:
    """Original, weights only, naive W8A8, SmoothQuant where it can be applied, super activation kept.

    Args:
        model: the model.
        calibration: token ids [sequences, tokens], of other text than is scored: where super activations sit, and how large
            channels get.
        settings: how activations are rounded.
        weights: how weights are rounded beside.

    Raises:
        UnsupportedArchitectureError: the model has no linear layer whose input can be rounded.
    """
    inputs = [
        each
        for each in linear_inputs(model, calibration, massive_ratio=settings.massive_ratio)
        if settings.outputs or not each.attention_output
    ]
    factors, reason = _smoothing(inputs, settings.alpha)
    places = [
        f"{each.module}, channel {each.channel} (x {each.ratio:.0f})" for each in inputs if each.channel is not None
    ]
    text = f"Super activations in {len(places)} of {len(inputs)} inputs: {'; '.join(places) or 'none, so nothing is kept'}."
    notes = [NoteRecord(level="info", text=text)]
    if reason:
        notes.append(NoteRecord(level="warning", text=f"SmoothQuant cannot be applied to {model.name}: {reason}"))
    return ActivationConditions(_conditions(inputs, factors, settings, QuantizeWeights(weights)), tuple(notes))


def compare_activation_quantization(
    model: LoadedModel,
    windows: Windows,
    conditions: ActivationConditions,
    *,
    progress: Progress = NO_PROGRESS,
) -> Iterator[MeasurementRecord | NoteRecord]:
    """Perplexity, KL and agreement of each condition; KL over that of naive rounding; shares of the loss that come back.

    Args:
        model: the model.
        windows: the text that is scored.
        conditions: what `activation_conditions` gave.
        progress: hears about windows.

    Raises:
        UsageError: a scheme does not fit.

    Source:
        arXiv 2411.07191, tables 3 to 5 (the code for these was never released).
    """
    found = evaluate(model, windows, conditions.conditions, progress=progress)
    yield from found.records()
    yield from _shares(found)
    yield from conditions.notes


def _conditions(
    inputs: Sequence[LinearInput],
    factors: dict[str, torch.Tensor] | None,
    settings: ActivationSettings,
    weights: QuantizeWeights,
) -> tuple[Condition, ...]:
    span: Span = "token" if settings.scales == "token" else "tensor"
    plain = tuple(_rounded_input(each, settings, kept=False) for each in inputs)
    kept = tuple(_rounded_input(each, settings, kept=True) for each in inputs)
    naive = QuantizeActivations(plain, settings.activation_bits, span, settings.median, settings.attention)
    found = [
        ORIGINAL,
        Condition("weights only", (weights,)),
        Condition(NAIVE, (weights, naive)),
        Condition(KEPT, (weights, replace(naive, inputs=kept))),
    ]
    if factors is not None:
        rescaled = tuple(
            _rounded_input(each, settings, kept=False, factors=factors.get(each.module)) for each in inputs
        )
        steps = (replace(weights, factors=factors), replace(naive, inputs=rescaled, factors=factors))
        found.insert(3, Condition(SMOOTHED, steps))
    return tuple(found)


def _rounded_input(
    each: LinearInput, settings: ActivationSettings, *, kept: bool, factors: torch.Tensor | None = None
) -> RoundedInput:
    channel = each.channel if kept else None
    if settings.scales != "static":
        return RoundedInput(each.module, channel)
    largest = float((each.sizes if factors is None else each.sizes / factors).max())
    largest = each.largest_but_one if channel is not None else largest
    return RoundedInput(each.module, channel, largest / ((1 << (settings.activation_bits - 1)) - 1))


def _smoothing(inputs: Sequence[LinearInput], alpha: float) -> tuple[dict[str, torch.Tensor] | None, str | None]:
    """SmoothQuant's factors by module, or why there are none: they are folded into the weight of the norm before."""
    groups: dict[str, list[LinearInput]] = {}
    for each in inputs:
        if each.norm is not None:
            groups.setdefault(each.norm, []).append(each)
    bare = [group[0].norm for group in groups.values() if not group[0].norm_has_weight]
    if bare:
        return None, f"it divides the weight of the norm before a linear layer, and {bare[0]} has no weight."
    if not groups:
        return None, "it divides the weight of the norm before a linear layer, and no norm feeds one directly."
    factors = {}
    for group in groups.values():
        sizes = torch.stack([each.weight_sizes for each in group]).amax(0)
        shared = smoothing_factors(group[0].sizes, sizes, alpha=alpha)
        factors.update(dict.fromkeys((each.module for each in group), shared))
    return factors, None


def _shares(found: Evaluation) -> Iterator[MeasurementRecord | NoteRecord]:
    """KL against that of naive rounding; how much of the loss in perplexity comes back, and how much of SmoothQuant's gain."""
    by_name = {each.name: each for each in found.conditions}
    text, digest = found.windows.text_name, found.windows.digest
    kl = dict(zip(by_name, found.scores.kl_nats.tolist(), strict=True))
    for name in (SMOOTHED, KEPT):
        if name in by_name:
            ratio = bootstrap(
                np.stack([kl[name], kl[NAIVE]], 1), lambda rows: float(rows[:, 0].sum() / rows[:, 1].sum())
            )
            yield measurement(
                "kl_over_naive", ratio, unit="1", condition=by_name[name], dataset=text, dataset_digest=digest
            )
    if found.ratio(by_name[NAIVE]).low <= 1:
        yield NoteRecord(
            level="info",
            text="Naive rounding costs no perplexity that these windows could show, so shares of that cost say nothing here.",
        )
    naive, original = (np.array(found.nll(by_name[name])) for name in (NAIVE, ORIGINAL.name))
    kept = np.array(found.nll(by_name[KEPT]))
    references = {"share_of_original_gap": original}
    if SMOOTHED in by_name:
        references["share_of_smoothquant_gain"] = np.array(found.nll(by_name[SMOOTHED]))
    for name, reference in references.items():
        yield measurement(
            name,
            _share(naive, kept, reference),
            unit="proportion",
            condition=by_name[KEPT],
            dataset=text,
            dataset_digest=digest,
        )


def _share(naive: Nats, kept: Nats, reference: Nats) -> Interval:
    """(naive - kept) / (naive - reference) in perplexity, as the paper computes it; bootstrap over windows, paired."""

    def share(windows: Nats) -> float:
        first, second, third = np.exp(windows.mean(0))
        return float((first - second) / (first - third)) if first != third else float("nan")

    return bootstrap(np.stack([naive, kept, reference], 1), share)
