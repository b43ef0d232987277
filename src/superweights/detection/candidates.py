"""Which weights of a trace are super weight candidates: pure functions on a trace, no model.

The idea, after the residual-stream recipe in Castillo's replication and section 3.1 of arXiv 2411.07191: a super activation
is a value of the residual stream that dwarfs the stream's median, appears at one layer and persists; a super weight is a scalar
whose product with one input makes a decisive share of it. Looking at the stream first leaves out the removers: the spikes of
the last layers that only take the super activation away again.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from superweights.coordinates import Coordinate
from superweights.errors import UsageError
from superweights.model.tracing import Jump, Term, Trace


@dataclass(frozen=True)
class DetectionSettings:
    """The thresholds. docs/detection.md says where each comes from and what moving it does.

    Raises:
        UsageError: a value is out of its range; names the field and the range.
    """

    massive_ratio: float = 50.0
    """A stream value is massive above this many medians of |stream| after the same layer."""
    peak_share: float = 0.1
    """And above this share of the largest |stream| of all layers."""
    layer_share: float = 0.25
    """The layer adds at least this share of the super activation's plateau."""
    term_share: float = 0.35
    """One scalar product makes at least this share of what the layer's down projections add."""
    output_ratio: float = 10.0
    """The down projections' output is at least this many times its median over channels: attention did not make the jump."""
    hold: float = 0.5
    """The value holds while it stays above this share of its size at the layer where it appears."""
    persistence: float = 0.5
    """It holds in at least this share of the later layers, the model's last one left out."""
    rounds: int = 6
    """Remove what was found and search again, at most this many times."""

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                allowed = f"{low} or more" if high == math.inf else f"from {low} to {high}"
                raise UsageError(f"The threshold {name} is {value:g}; it must be {allowed}.")


_RANGES = {
    "massive_ratio": (0, math.inf),
    "peak_share": (0, 1),
    "layer_share": (0, 1),
    "term_share": (0, 1),
    "output_ratio": (0, math.inf),
    "hold": (0, 1),
    "persistence": (0, 1),
    "rounds": (1, math.inf),
}


@dataclass(frozen=True)
class Bars:
    """What counts as massive after each layer, [layers run + 1]; frozen at round 0, or removal would lower it for ever."""

    values: torch.Tensor
    """The bar after each stage; entry 0 is the embedding output."""

    @classmethod
    def of(cls, trace: Trace, settings: DetectionSettings) -> "Bars":
        """Reads the bars off a trace of the unedited model."""
        inner = _without_last(trace)
        peak = trace.stream[:inner].abs().max()
        return cls(torch.maximum(settings.massive_ratio * trace.medians, settings.peak_share * peak))


@dataclass(frozen=True, slots=True)
class Candidate:
    """One weight that may be a super weight, with its evidence."""

    coordinate: Coordinate
    """Which weight."""
    module: str
    """Name of the module that holds it."""
    value: float
    """W[row, col]."""
    input: float
    """x[token, col] at the token of the super activation."""
    output: float
    """What the layer's down projections give to channel `row` at that token."""
    share: float
    """W[row, col] * x[token, col] / output."""
    super_activation: float | None
    """The largest value the channel reaches at that token, with its sign, the model's last layer left out. None, as the
    next three, for a method that does not look at the stream."""
    median: float | None
    """Median of |stream| after the layer where it does."""
    stream_share: float | None
    """The scalar product over the super activation; of another scale where a norm stands behind the down projection."""
    persistence: float | None
    """Share of the later layers in which the value holds, 0 to 1."""
    prompt: int
    """Index of the prompt where the scalar product is largest."""
    token: int
    """Position in that prompt."""
    round: int
    """Search round that found it; 0 is the unedited model."""
    rank: int = 0
    """Place of |W[row, col]| in its matrix, from 1; 0 while it is not counted."""
    matrix_size: int = 0
    """Weights in that matrix."""


def _without_last(trace: Trace) -> int:
    """Stages of the stream to look at: the output of the model's last layer is left out."""
    return trace.layers_run if trace.complete else trace.layers_run + 1


def find_candidates(
    trace: Trace, bars: Bars, settings: DetectionSettings, *, round_number: int = 0
) -> tuple[Candidate, ...]:
    """The candidates of one trace, one per weight, strongest first.

    Args:
        trace: a trace, of the unedited model or with earlier candidates removed.
        bars: the bars of round 0.
        settings: the thresholds.
        round_number: goes into the candidates.
    """
    found: dict[Coordinate, Candidate] = {}
    for jump in trace.jumps:
        persistence = _persistence(trace, jump, settings)
        if (
            persistence is None
            or persistence < settings.persistence
            or not _is_super_activation(trace, jump, bars, settings)
        ):
            continue
        for term in _decisive_terms(jump, settings):
            candidate = _candidate(trace, jump, term, persistence, round_number)
            known = found.get(term.coordinate)
            if known is None or abs(candidate.value * candidate.input) > abs(known.value * known.input):
                found[term.coordinate] = candidate
    return tuple(sorted(found.values(), key=lambda each: -abs(each.share * each.output)))


def is_refuted(candidate: Candidate, traces: Sequence[Trace], bars: Bars, settings: DetectionSettings) -> bool:
    """Whether the pass with the candidate removed speaks against it.

    The stream may jump without it: then attention made the jump and the neuron only fired beside it. Or the unedited model
    uses it to take a super activation away, and it looks like a maker only where that one is gone already.

    Args:
        candidate: a candidate of the last trace but one.
        traces: of the unedited model first, with the candidate removed last.
        bars: the bars of round 0.
        settings: the thresholds.
    """
    layer, row = candidate.coordinate.layer, candidate.coordinate.row
    position = traces[0].positions.index((candidate.prompt, candidate.token))
    (unedited_in, unedited_out), (found_in, found_out), (left_in, left_out) = (
        traces[each].stream[layer : layer + 2, position, row].tolist() for each in (0, -2, -1)
    )
    made, left = found_out - found_in, left_out - left_in
    stays = abs(made - left) < settings.layer_share * abs(made)
    removes = abs(unedited_in) > float(bars.values[layer]) and abs(unedited_out) < settings.hold * abs(unedited_in)
    return bool(stays or removes)


def group_sets(candidates: tuple[Candidate, ...]) -> tuple[tuple[Candidate, ...], ...]:
    """Groups candidates that share a column (one neuron, many channels) or a row (one channel, many neurons) of a matrix."""
    groups: list[list[Candidate]] = []
    for candidate in candidates:
        linked = [group for group in groups if any(_linked(candidate, other) for other in group)]
        groups = [group for group in groups if group not in linked]
        groups.append([each for group in linked for each in group] + [candidate])
    return tuple(tuple(group) for group in groups)


def _linked(one: Candidate, other: Candidate) -> bool:
    here, there = one.coordinate, other.coordinate
    return (here.layer, here.expert) == (there.layer, there.expert) and (here.row == there.row or here.col == there.col)


def _values(trace: Trace, jump: Jump) -> torch.Tensor:
    """The jump's channel at its token after each stage from its layer on, the model's last layer left out."""
    return trace.stream[jump.layer + 1 : _without_last(trace), jump.position, jump.channel]


def _persistence(trace: Trace, jump: Jump, settings: DetectionSettings) -> float | None:
    later = _values(trace, jump)[1:]
    return (later.abs() >= settings.hold * abs(jump.after)).float().mean().item() if len(later) else None


def _is_super_activation(trace: Trace, jump: Jump, bars: Bars, settings: DetectionSettings) -> bool:
    values = _values(trace, jump).abs()
    massive = bool((values > bars.values[jump.layer + 1 : _without_last(trace)]).any())
    return (
        massive
        and abs(jump.after - jump.before) >= settings.layer_share * values.max().item()
        and jump.output != 0  # a layer without a down projection, or whose projection is all zeros
        and abs(jump.output) >= settings.output_ratio * jump.output_median
    )


def _decisive_terms(jump: Jump, settings: DetectionSettings) -> Iterator[Term]:
    return (term for term in jump.terms if term.product / jump.output >= settings.term_share)


def _candidate(trace: Trace, jump: Jump, term: Term, persistence: float, round_number: int) -> Candidate:
    values = _values(trace, jump)
    top = int(values.abs().argmax())
    prompt, token = trace.positions[jump.position]
    return Candidate(
        coordinate=term.coordinate,
        module=term.module,
        value=term.weight,
        input=term.input,
        output=jump.output,
        share=term.product / jump.output,
        super_activation=values[top].item(),
        median=trace.medians[jump.layer + 1 + top].item(),
        stream_share=term.product / values[top].item(),
        persistence=persistence,
        prompt=prompt,
        token=token,
        round=round_number,
    )


def explain_none(trace: Trace, bars: Bars, settings: DetectionSettings) -> str:
    """Says in a sentence why a trace has no candidate: which test its strongest jump fails."""
    inner = _without_last(trace)
    ratios = (trace.stream[:inner].abs() / bars.values[:inner, None, None]).nan_to_num(0)  # 0 / 0: a stream of zeros
    stage, position, channel = (int(each) for each in torch.unravel_index(ratios.argmax(), ratios.shape))
    value = trace.stream[stage, position, channel].item()
    size, bar = (
        abs(each / trace.medians[stage]).item() for each in (trace.stream[stage, position, channel], bars.values[stage])
    )
    prompt, token = trace.positions[position]
    where = f"channel {channel} after layer {stage - 1}, token {trace.prompts[prompt].token_texts[token]!r}"
    if stage == 0:
        where = f"channel {channel} of the embedding output, token {trace.prompts[prompt].token_texts[token]!r}"
    if ratios.max() <= 1:
        return (
            f"No super activation: the largest value of the residual stream is {value:.4g} ({where}), "
            f"{size:.3g} medians; the bar is {bar:.3g} medians."
        )
    jumps = [jump for jump in trace.jumps if _is_super_activation(trace, jump, bars, settings)]
    held = [jump for jump in jumps if (_persistence(trace, jump, settings) or 0) >= settings.persistence]
    reason = "no single layer's down projection makes it: it comes with the embedding, from attention, or bit by bit"
    if jumps and not held:
        reason = "it does not persist in later layers"
        if all(_persistence(trace, jump, settings) is None for jump in jumps):
            rest = "too late to persist" if trace.complete else "after which no layer ran: run more layers"
            reason = f"it appears in layer {jumps[-1].layer}, {rest}"
    elif held:
        share, name = max((term.product / jump.output, str(term.coordinate)) for jump in held for term in jump.terms)
        reason = f"no scalar is decisive: the largest share is {share:.2f} ({name}), the bar {settings.term_share}"
    return f"A super activation without a super weight: {value:.4g} at {where}, {size:.3g} medians; {reason}."
