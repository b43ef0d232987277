"""The search as a whole: what it returns, what it leaves as it was, what it tells."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from building import TOKENIZER, at, fire, quiet_llama, set_weights

import superweights
from superweights.coordinates import Coordinate
from superweights.detection.search import default_prompts, find
from superweights.errors import UnknownNameError
from superweights.model.loading import load
from superweights.model.prompts import DEFAULT_TEXTS
from superweights.testing import plant_super_weight, tiny_model

PLANTED = Coordinate(2, None, 49, 7)


class CountingProgress:
    """Remembers the passes and layers it hears about."""

    def __init__(self) -> None:
        self.passes: list[int | None] = []
        self.layers = 0

    def start(self, task: str, *, total: int | None, unit: str) -> None:
        self.passes.append(total)

    def advance(self, steps: int = 1, *, nbytes: int = 0) -> None:
        self.layers += steps

    def finish(self) -> None:
        pass


def test_it_is_the_packages_public_find() -> None:
    assert superweights.find is find


@pytest.mark.parametrize("residency", ["resident", "streamed"])
def test_finds_in_a_checkpoint(planted_checkpoint: Path, residency: str) -> None:
    with load(planted_checkpoint, residency=residency) as model:
        found = find(model)
    assert [each.coordinate for each in found.candidates] == [PLANTED]
    assert (found.method, found.notes, len(found.traces)) == ("residual", (), 2)
    assert found.reason.startswith("With these removed: no super activation")


def test_both_residencies_find_the_same(planted_checkpoint: Path) -> None:
    results = []
    for residency in ("resident", "streamed"):
        with load(planted_checkpoint, residency=residency) as model:
            results.append(find(model))
    assert results[0].candidates == results[1].candidates
    assert results[0].reason == results[1].reason


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama")
    planted = plant_super_weight(model, layer=1, tokenizer=TOKENIZER)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with load(model, tokenizer=TOKENIZER) as loaded:
        first = find(loaded)
        second = find(loaded)
    assert [each.coordinate for each in first.candidates] == [planted]
    assert first.candidates == second.candidates
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_removed_already_is_not_found(planted_checkpoint: Path) -> None:
    with load(planted_checkpoint) as model:
        with model.edited({PLANTED: 0.0}):
            found = find(model)
        assert found.candidates == ()
        assert found.reason.startswith("No super activation")
        assert [each.coordinate for each in find(model).candidates] == [PLANTED]


def test_only_the_layers_asked_for_run(planted_checkpoint: Path) -> None:
    progress = CountingProgress()
    with load(planted_checkpoint, residency="streamed") as model:
        found = find(model, last_layer=3, progress=progress)
    assert [each.coordinate for each in found.candidates] == [PLANTED]
    assert {each.layers_run for each in found.traces} == {4}
    assert progress.passes == [4, 4]
    assert progress.layers == 8


def test_the_default_prompts_come_with_and_without_the_beginning_token(planted_checkpoint: Path) -> None:
    with load(planted_checkpoint) as model:
        prompts = default_prompts(model, ["x ~ y"])
    assert [(each.text, each.bos) for each in prompts] == [
        (text, bos) for text in (*DEFAULT_TEXTS, "x ~ y") for bos in (False, True)
    ]
    texts = {text for each in prompts for text in each.token_texts}
    assert {".", "\n", "<s>", "A"} <= texts


def test_prompts_replace_the_default_ones(planted_checkpoint: Path) -> None:
    with load(planted_checkpoint) as model:
        prompts = default_prompts(model)[:1]
        assert find(model, prompts=prompts).traces[0].prompts == prompts


def test_the_rank_counts_larger_weights_of_the_same_matrix() -> None:
    model = quiet_llama()
    fire(model, at("."), layer=1, col=7, size=100)
    fire(model, at("~"), layer=1, col=8, size=1e-4, texts=("~",))
    set_weights(model, {"1:20:7": 3.0, "1:0:8": -5.0, "1:1:8": 4.0, "2:0:8": 9.0})
    with load(model, tokenizer=TOKENIZER) as loaded:
        (candidate,) = find(loaded).candidates
    assert (candidate.rank, candidate.matrix_size) == (3, 64 * 112)


def test_a_model_without_a_tokenizer_is_searched_with_fixed_tokens_and_says_so() -> None:
    model = tiny_model("llama")
    planted = plant_super_weight(model, layer=1)
    with load(model) as loaded:
        found = find(loaded)
    assert [each.coordinate for each in found.candidates] == [planted]
    assert any("no tokenizer" in note for note in found.notes)


def test_the_paper_method_makes_one_pass(planted_checkpoint: Path) -> None:
    with load(planted_checkpoint) as model:
        found = find(model, method="paper")
    assert len(found.traces) == 1
    assert found.candidates == ()  # the planted activation is massive against this small stream, and far below 50
    assert "threshold of 50" in found.reason


def test_an_unknown_method_names_the_near_one(planted_checkpoint: Path) -> None:
    with load(planted_checkpoint) as model, pytest.raises(UnknownNameError, match="Did you mean 'residual'"):
        find(model, method="residal")  # type: ignore[arg-type]


def test_candidates_are_plain_values(planted_checkpoint: Path) -> None:
    with load(planted_checkpoint) as model:
        (candidate,) = find(model).candidates
    assert replace(candidate) == candidate
    assert hash(candidate) == hash(replace(candidate))
