from datetime import UTC, datetime

import pytest

from superweights.results.records import CandidateRecord, NoteRecord, PromptRecord, Record, Run


@pytest.fixture
def run() -> Run:
    return Run(
        command=("superweights", "find", "tiny"),
        model="tiny",
        revision=None,
        digest="sha256:00",
        storage_dtype="bfloat16",
        compute_dtype="float32",
        residency="streamed",
        device="cpu",
        seed=None,
        settings={"layers": [0, 4]},
        versions={"superweights": "0.1.0"},
        started=datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC),
    )


@pytest.fixture
def candidate() -> CandidateRecord:
    return CandidateRecord(
        coordinate="2:3968:7003",
        layer=2,
        expert=None,
        row=3968,
        col=7003,
        module="model.layers.2.mlp.down_proj",
        value=-1.25,
        rank=3,
        matrix_size=45088768,
        input_peak=-560.5,
        output_peak=700.625,
        share=1.0,
        stream_share=0.97,
        persistence=1.0,
        super_activation=708.0,
        median=0.125,
        prompt=0,
        token=1,
        token_text="\n\u2028",
        token_id=13,
        round=0,
        set=0,
        method="residual",
    )


@pytest.fixture
def records(candidate: CandidateRecord) -> list[Record]:
    prompt = PromptRecord(index=0, text="Hi, мир.\u2028", bos=True, token_ids=(1, 13), token_texts=("<s>", "\n\u2028"))
    return [prompt, candidate, NoteRecord(level="warning", text="layer 3 overflowed float16")]
