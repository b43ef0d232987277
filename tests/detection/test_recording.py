"""Findings and traces as records: nothing is left out, and every record names what it belongs to."""

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest
from building import TOKENIZER, at, fire, quiet_llama, search, set_weights

from superweights.detection.recording import record_findings, record_peaks, record_persistence, record_residual_peaks
from superweights.detection.search import Findings, find
from superweights.model.loading import load
from superweights.results.records import CandidateRecord, NoteRecord, Record, Run
from superweights.results.store import read_records, write_records
from superweights.testing import plant_super_weight, tiny_model

PROMPTS, LAYERS = 6, 6


@pytest.fixture(scope="module")
def findings() -> Findings:
    """Two sets: rows 20 and 30 of column 7, and row 40 of column 9 in a later layer."""
    model = quiet_llama()
    fire(model, at("."), layer=1, col=7, size=100)
    fire(model, at("S"), layer=2, col=9, size=100)
    set_weights(model, {"1:20:7": 3.0, "1:30:7": -4.0, "2:40:9": 2.0})
    return search(model)


@pytest.fixture(scope="module")
def records(findings: Findings) -> list[Record]:
    return list(record_findings(findings))


def test_one_record_for_everything_seen(records: list[Record]) -> None:
    assert Counter(each.type for each in records) == {
        "prompt": PROMPTS,
        "activation_peak": 2 * LAYERS,
        "residual_peak": LAYERS + 1,
        "candidate": 3,
        "note": 1,
    }


def test_they_survive_a_file(records: list[Record], tmp_path: Path) -> None:
    run = Run(
        command=("superweights", "find"),
        model="tiny",
        revision=None,
        digest=None,
        storage_dtype="float32",
        compute_dtype="float32",
        residency="resident",
        device="cpu",
        seed=None,
        settings={},
        versions={},
        started=datetime(2025, 1, 2, tzinfo=UTC),
    )
    write_records(tmp_path / "run.jsonl", run, records)
    assert read_records(tmp_path / "run.jsonl") == (run, records)


def test_a_candidate_record_says_what_the_candidate_says(findings: Findings, records: list[Record]) -> None:
    written = [each for each in records if isinstance(each, CandidateRecord)]
    for record, candidate in zip(written, findings.candidates, strict=True):
        assert record.coordinate == str(candidate.coordinate)
        for name in ("value", "share", "stream_share", "persistence", "super_activation", "median", "round", "rank"):
            assert getattr(record, name) == getattr(candidate, name)
        assert (record.input_peak, record.output_peak) == (candidate.input, candidate.output)
        prompt = findings.traces[0].prompts[candidate.prompt]
        assert record.token_text == prompt.token_texts[candidate.token]
        assert record.token_id == prompt.token_ids[candidate.token]
        assert record.method == "residual"


def test_sets_are_numbered(records: list[Record]) -> None:
    sets = {each.coordinate: each.set for each in records if isinstance(each, CandidateRecord)}
    assert sets["1:20:7"] == sets["1:30:7"] != sets["2:40:9"]
    assert set(sets.values()) == {0, 1}


def test_reason_and_notes_are_kept() -> None:
    with load(tiny_model("llama")) as model:
        found = find(model)
    notes = [each.text for each in record_findings(found) if isinstance(each, NoteRecord)]
    assert notes == [found.reason, *found.notes]
    assert len(notes) == 2  # nothing found, and no tokenizer


def test_no_empty_note_where_the_paper_method_finds_something() -> None:
    model = quiet_llama()
    fire(model, at("."), layer=1, col=7, size=100)
    set_weights(model, {"1:20:7": 3.0})
    found = search(model, method="paper")
    assert found.candidates and found.reason == ""
    written = list(record_findings(found))
    assert not any(isinstance(each, NoteRecord) for each in written)
    (candidate,) = (each for each in written if isinstance(each, CandidateRecord))
    assert (candidate.method, candidate.persistence, candidate.super_activation) == ("paper", None, None)


def test_peaks_carry_their_round(findings: Findings) -> None:
    plain, edited = (
        list(record_peaks(findings.traces[number], round_number=number, edited=number > 0)) for number in (0, 1)
    )
    assert {(each.round, each.edited) for each in plain} == {(0, False)}
    assert {(each.round, each.edited) for each in edited} == {(1, True)}
    largest = {number: max(abs(each.value) for each in peaks) for number, peaks in enumerate((plain, edited))}
    assert largest[0] > 300 and largest[1] < 150  # the inputs of 100 stay, the outputs go
    first = plain[0]
    prompt = findings.traces[0].prompts[first.prompt]
    assert (first.token_text, first.token_id) == (prompt.token_texts[first.token], prompt.token_ids[first.token])


def test_residual_peaks_start_with_the_embedding(findings: Findings) -> None:
    peaks = list(record_residual_peaks(findings.traces[0]))
    assert [each.layer for each in peaks] == [-1, 0, 1, 2, 3, 4, 5]
    assert [each.channel for each in peaks[2:]] == [30] * 5
    assert all(each.value < -390 for each in peaks[2:])
    assert peaks[2].token_text == "."


def test_persistence_follows_one_channel_at_one_token_of_each_prompt(findings: Findings) -> None:
    written = list(record_persistence(findings.traces[0], 40))
    assert len(written) == PROMPTS * (LAYERS + 1)
    for prompt in range(PROMPTS):
        mine = [each for each in written if each.prompt == prompt]
        assert len({each.token for each in mine}) == 1
        assert [each.layer for each in mine] == list(range(-1, LAYERS))
    with_s = [each for each in written if each.token_text == "S" and each.layer >= 2]
    assert len(with_s) == 2 * 4  # "Summer ..." with and without the beginning token
    assert all(each.value > 190 for each in with_s)


def test_an_expert_is_recorded() -> None:
    model = tiny_model("mixtral")
    planted = plant_super_weight(model, layer=1, tokenizer=TOKENIZER)
    with load(model, tokenizer=TOKENIZER) as loaded:
        written = list(record_findings(find(loaded)))
    (candidate,) = (each for each in written if isinstance(each, CandidateRecord))
    assert (candidate.expert, candidate.coordinate) == (planted.expert, str(planted))
    assert {each.expert for each in written if each.type == "activation_peak"} == {0, 1, 2, 3}
