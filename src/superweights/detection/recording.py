"""Findings and traces as result records."""

from collections.abc import Iterator, Sequence

from superweights.detection.candidates import Candidate, group_sets
from superweights.detection.search import Findings
from superweights.model.prompts import Prompt
from superweights.model.tracing import Trace
from superweights.results.records import (
    ActivationPeakRecord,
    CandidateRecord,
    NoteRecord,
    PersistenceRecord,
    PromptRecord,
    Record,
    ResidualPeakRecord,
)


def record_findings(findings: Findings) -> Iterator[Record]:
    """Prompts, peaks of the unedited model, candidates, and what must be said besides."""
    prompts = findings.traces[0].prompts
    yield from record_prompts(prompts)
    yield from record_peaks(findings.traces[0])
    yield from record_residual_peaks(findings.traces[0])
    sets = group_sets(findings.candidates)
    for candidate in findings.candidates:
        number = next(index for index, group in enumerate(sets) if candidate in group)
        yield _record_candidate(candidate, prompts, set_number=number, method=findings.method)
    yield from (NoteRecord(level="info", text=text) for text in (findings.reason, *findings.notes) if text)


def record_prompts(prompts: Sequence[Prompt]) -> Iterator[PromptRecord]:
    """One record a prompt; the other records name it by its index."""
    for index, prompt in enumerate(prompts):
        yield PromptRecord(
            index=index, text=prompt.text, bos=prompt.bos, token_ids=prompt.token_ids, token_texts=prompt.token_texts
        )


def record_peaks(trace: Trace, *, round_number: int = 0, edited: bool = False) -> Iterator[ActivationPeakRecord]:
    """The input and output peak of every down projection."""
    for peak in trace.peaks:
        prompt = trace.prompts[peak.prompt]
        yield ActivationPeakRecord(
            layer=peak.layer,
            expert=peak.expert,
            module=peak.module,
            side=peak.side,
            value=peak.value,
            channel=peak.channel,
            prompt=peak.prompt,
            token=peak.token,
            token_text=prompt.token_texts[peak.token],
            token_id=prompt.token_ids[peak.token],
            round=round_number,
            edited=edited,
        )


def record_residual_peaks(trace: Trace, *, round_number: int = 0, edit: str = "") -> Iterator[ResidualPeakRecord]:
    """The largest |residual| after each layer, the embedding output first."""
    for stage, (stream, median) in enumerate(zip(trace.stream, trace.medians.tolist(), strict=True)):
        position, channel = divmod(int(stream.abs().argmax()), stream.shape[1])
        prompt, token = trace.positions[position]
        yield ResidualPeakRecord(
            layer=stage - 1,
            value=stream[position, channel].item(),
            channel=channel,
            median=median,
            prompt=prompt,
            token=token,
            token_text=trace.prompts[prompt].token_texts[token],
            round=round_number,
            edit=edit,
        )


def record_persistence(trace: Trace, channel: int) -> Iterator[PersistenceRecord]:
    """One channel after each layer, for every prompt at the token where it is largest over the layers."""
    values = trace.stream[:, :, channel]  # [stages, positions]
    inner = values[: trace.layers_run] if trace.complete else values
    for index, prompt in enumerate(trace.prompts):
        mine = [place for place, (owner, _) in enumerate(trace.positions) if owner == index]
        position = mine[int(inner[:, mine].abs().amax(dim=0).argmax())]
        token = trace.positions[position][1]
        for stage in range(values.shape[0]):
            yield PersistenceRecord(
                prompt=index,
                prompt_text=prompt.text,
                layer=stage - 1,
                channel=channel,
                value=values[stage, position].item(),
                token=token,
                token_text=prompt.token_texts[token],
            )


def _record_candidate(
    candidate: Candidate, prompts: Sequence[Prompt], *, set_number: int, method: str
) -> CandidateRecord:
    coordinate, prompt = candidate.coordinate, prompts[candidate.prompt]
    return CandidateRecord(
        coordinate=str(coordinate),
        layer=coordinate.layer,
        expert=coordinate.expert,
        row=coordinate.row,
        col=coordinate.col,
        module=candidate.module,
        value=candidate.value,
        rank=candidate.rank,
        matrix_size=candidate.matrix_size,
        input_peak=candidate.input,
        output_peak=candidate.output,
        share=candidate.share,
        stream_share=candidate.stream_share,
        persistence=candidate.persistence,
        super_activation=candidate.super_activation,
        median=candidate.median,
        prompt=candidate.prompt,
        token=candidate.token,
        token_text=prompt.token_texts[candidate.token],
        token_id=prompt.token_ids[candidate.token],
        round=candidate.round,
        set=set_number,
        method=method,
    )
