import pytest

import superweights as sw
from superweights.coordinates import Coordinate
from superweights.errors import UsageError
from superweights.interventions.conditions import removal
from superweights.interventions.rows import applied
from superweights.measurements.generation import continue_text, end_tokens
from superweights.testing import save_tiny_checkpoint, tiny_model, tiny_tokenizer


def generated(model, tokenizer, prompt, tokens):
    """What transformers writes; the token that ends a text is left out."""
    asked = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    written = model.generate(**asked, do_sample=False, max_new_tokens=tokens, pad_token_id=0)[0]
    start, ends = asked["input_ids"].shape[1], model.generation_config.eos_token_id
    new = [each for each in written[start:].tolist() if each not in (ends if isinstance(ends, list) else [ends])]
    return tokenizer.decode([*written[:start], *new])[len(tokenizer.decode(written[:start])) :], new


@pytest.mark.parametrize("residency", ["resident", "streamed"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_the_text_of_transformers(family, residency, tmp_path):
    save_tiny_checkpoint(family, tmp_path)
    with sw.load(tmp_path, residency=residency) as model:
        found = continue_text(model, "Summer is hot. ", tokens=9)
    assert found == generated(tiny_model(family), tiny_tokenizer(), "Summer is hot. ", 9)[0]
    assert found


@pytest.mark.parametrize("several", [False, True])
def test_the_model_ends_the_text(several):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    whole, ids = generated(model, tokenizer, "ab", 6)
    last = ids[3]
    model.generation_config.eos_token_id = [last, 77] if several else last
    with sw.load(model, tokenizer=tokenizer) as loaded:
        assert end_tokens(loaded) == {2, last, *([77] if several else [])}
        found = continue_text(loaded, "ab", tokens=6)
    assert found == generated(model, tokenizer, "ab", 6)[0]
    assert whole.startswith(found) and len(found) < len(whole)


def test_edits_count(planted_checkpoint):
    with sw.load(planted_checkpoint) as model:
        before = continue_text(model, "ab", tokens=4)
        with applied(model, removal([Coordinate(2, None, 49, 7)], name="removed")):
            assert continue_text(model, "ab", tokens=4) != before
        assert continue_text(model, "ab", tokens=4) == before
        assert continue_text(model, "ab", tokens=0) == ""


def test_without_a_tokenizer_there_is_no_text():
    with sw.load(tiny_model("llama")) as model, pytest.raises(UsageError, match="has no tokenizer"):
        continue_text(model, "ab")
