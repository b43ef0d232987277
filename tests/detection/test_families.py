"""Every family that must work: what is planted is found, alone; where nothing is planted, nothing is."""

import pytest
from building import TOKENIZER

from superweights.detection.search import find
from superweights.model.loading import load
from superweights.testing import PROMISED_FAMILIES, plant_super_weight, tiny_model


@pytest.mark.parametrize("family", PROMISED_FAMILIES)
def test_finds_exactly_what_was_planted(family: str) -> None:
    layer = 1 + PROMISED_FAMILIES.index(family) % 2
    model = tiny_model(family)
    with load(model, tokenizer=TOKENIZER) as loaded:
        before = find(loaded)
    assert before.candidates == ()
    assert before.reason.startswith("No super activation")
    planted = plant_super_weight(model, layer=layer, tokenizer=TOKENIZER)
    with load(model, tokenizer=TOKENIZER) as loaded:
        after = find(loaded)
    assert [each.coordinate for each in after.candidates] == [planted]
    (candidate,) = after.candidates
    assert candidate.share == pytest.approx(1, abs=0.2)
    assert candidate.rank == 1
