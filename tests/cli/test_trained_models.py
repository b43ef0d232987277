"""Trained models, where they lie beside the repository: a structure that is there is seen, none is made up."""

import json
from pathlib import Path
from typing import Any

import pytest

from superweights.checkpoint import Checkpoint

from .conftest import Ask

MODELS = Path(__file__).resolve().parents[2].parent / "shared" / "models"

pytestmark = pytest.mark.skipif(not MODELS.is_dir(), reason="there are no trained models in ../shared/models")


def found(ask: Ask, model: str, *words: str) -> dict[str, dict[str, Any]]:
    """The candidates of a model by coordinate."""
    answer = ask("find", MODELS / model, "--format", "jsonl", *words)
    assert (answer.status, answer.err) == (0, "")
    candidates = [json.loads(line) for line in answer.out.splitlines()]
    return {each["coordinate"]: each for each in candidates}


def test_books_has_one_channel_of_super_activations_at_its_first_token(ask: Ask) -> None:
    candidates = found(ask, "books1.5M")
    assert {each["row"] for each in candidates.values()} == {69}
    assert {(each["token"], each["token_text"]) for each in candidates.values()} == {(0, "<s>")}
    first = next(iter(candidates.values()))
    assert (first["coordinate"], first["rank"], first["matrix_size"], first["round"]) == ("2:69:290", 1, 128 * 384, 0)
    assert first["value"] == pytest.approx(1.01, abs=0.005)
    assert first["input_peak"] == pytest.approx(84.7, abs=0.1)
    assert first["output_peak"] == pytest.approx(164, abs=0.5)
    assert first["share"] == pytest.approx(0.52, abs=0.005)
    assert first["super_activation"] == pytest.approx(345, abs=1)
    assert first["persistence"] == 1


def test_the_stored_value_is_the_one_that_was_found(ask: Ask) -> None:
    candidate = found(ask, "books1.5M")["2:69:290"]
    with Checkpoint.open(MODELS / "books1.5M") as checkpoint:
        assert checkpoint.read_scalar(f"{candidate['module']}.weight", (69, 290)).value == candidate["value"]


def test_stories_has_none_and_says_why(ask: Ask) -> None:
    answer = ask("find", MODELS / "stories260K")
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.startswith("No super weight candidate in ")
    assert "No super activation: the largest value of the residual stream is 3.659" in answer.out
    assert found(ask, "stories260K") == {}


@pytest.mark.parametrize("model", ["books1.5M", "stories260K"])
@pytest.mark.parametrize("verb", ["find", "trace"])
def test_residencies_agree_to_the_last_digit(verb: str, model: str, ask: Ask) -> None:
    words = (verb, MODELS / model, "--format", "jsonl", "--residency")
    assert ask(*words, "streamed") == ask(*words, "resident")
