import math

import pytest

from superweights.results.records import (
    ActivationPeakRecord,
    CandidateRecord,
    PersistenceRecord,
    PromptRecord,
    Record,
    ResidualPeakRecord,
)

LAYERS = 4


def activation_peak(layer: int, side: str, value: float, **changes: object) -> ActivationPeakRecord:
    fields = {
        "expert": None,
        "module": f"model.layers.{layer}.mlp.down_proj",
        "channel": 7,
        "prompt": 0,
        "token": 1,
        "token_text": " мир\n",
        "token_id": 9,
        "round": 0,
        "edited": False,
    }
    return ActivationPeakRecord(layer=layer, side=side, value=value, **(fields | changes))


def residual_peak(layer: int, value: float, edit: str = "", **changes: object) -> ResidualPeakRecord:
    fields = {"channel": 3, "median": 0.1, "prompt": 0, "token": 0, "token_text": "<s>", "round": 0}
    return ResidualPeakRecord(layer=layer, value=value, edit=edit, **(fields | changes))


def persistence(prompt: int, layer: int, value: float, text: str = "Hi", channel: int = 3) -> PersistenceRecord:
    return PersistenceRecord(
        prompt=prompt, prompt_text=text, layer=layer, channel=channel, value=value, token=0, token_text="<s>"
    )


def candidate(coordinate: str = "1:3:7", **changes: object) -> CandidateRecord:
    layer, row, col = (int(part) for part in coordinate.split(":"))
    fields = {
        "expert": None,
        "module": f"model.layers.{layer}.mlp.down_proj",
        "value": -2.0,
        "rank": 1,
        "matrix_size": 100,
        "input_peak": 100.0,
        "output_peak": -200.0,
        "share": 1.0,
        "stream_share": 1.0,
        "persistence": 1.0,
        "super_activation": -200.0,
        "median": 0.1,
        "prompt": 0,
        "token": 0,
        "token_text": "<s>",
        "token_id": 1,
        "round": 0,
        "set": 0,
        "method": "residual",
    }
    return CandidateRecord(coordinate=coordinate, layer=layer, row=row, col=col, **(fields | changes))


def prompt(index: int, text: str, *, bos: bool) -> PromptRecord:
    return PromptRecord(index=index, text=text, bos=bos, token_ids=(1,), token_texts=("<s>",))


@pytest.fixture
def peaks() -> list[Record]:
    """Two prompts; the peak of layer 1 is the candidate's."""
    return [
        activation_peak(layer, side, (-1) ** layer * (100 if layer == 1 else 1) * scale, prompt=number)
        for layer in range(LAYERS)
        for side in ("input", "output")
        for number, scale in enumerate((1.0, 2.0))
    ]


@pytest.fixture
def residuals() -> list[Record]:
    edits = (("scale=0 on 1:3:7", 1.0), ("", 500.0))
    return [residual_peak(layer, -size, edit) for edit, size in edits for layer in range(-1, LAYERS)]


@pytest.fixture
def persistences() -> list[Record]:
    values = (math.nan, 0.0, -500.0, 510.0, 2.0)
    return [
        persistence(number, layer, value, text)
        for number, text in enumerate(("Hi", "Hi", "A\nb" * 30))
        for layer, value in zip(range(-1, LAYERS), values, strict=True)
    ]
