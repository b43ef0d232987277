"""The baseline: what the paper's released code shows a reader, made into coordinates.

It prints, layer by layer, the largest |input| and the largest |output| of the down projection where they exceed 50, each on
its own; a person pairs them. Here the pairing is literal: the input's channel is the col, the output's channel is the row,
whether or not both come from one token. It is kept to be compared with, not to be trusted.
"""

from superweights.coordinates import Coordinate
from superweights.detection.candidates import Candidate
from superweights.model.loading import LoadedModel
from superweights.model.tracing import ActivationPeak, Trace

SPIKE = 50.0
"""Threshold of `analyze.py` in the paper's repository, on both sides."""


def find_by_peaks(model: LoadedModel, trace: Trace) -> tuple[Candidate, ...]:
    """One candidate for each down projection whose input and output both peak beyond the threshold, largest output first."""
    sides = {(peak.module, peak.expert, peak.side): peak for peak in trace.peaks}
    pairs = [
        (peak, sides[peak.module, peak.expert, "output"])
        for peak in trace.peaks
        if peak.side == "input"
        and abs(peak.value) > SPIKE
        and abs(sides[peak.module, peak.expert, "output"].value) > SPIKE
    ]
    pairs.sort(key=lambda pair: -abs(pair[1].value))
    return tuple(_candidate(model, trace, spike_in, spike_out) for spike_in, spike_out in pairs)


def _candidate(model: LoadedModel, trace: Trace, spike_in: ActivationPeak, spike_out: ActivationPeak) -> Candidate:
    coordinate = Coordinate(spike_in.layer, spike_in.expert, spike_out.channel, spike_in.channel)
    projection = model.architecture.locate(coordinate)
    with model.attached(projection):
        value = model.matrix_row(projection, coordinate.expert, coordinate.row)[coordinate.col].item()
    return Candidate(
        coordinate=coordinate,
        module=spike_in.module,
        value=value,
        input=spike_in.value,
        output=spike_out.value,
        share=value * spike_in.value / spike_out.value,
        super_activation=None,
        median=None,
        stream_share=None,
        persistence=None,
        prompt=spike_out.prompt,
        token=spike_out.token,
        round=0,
    )
