import pytest
import torch

from superweights.errors import UsageError
from superweights.model.prompts import DEFAULT_TEXTS, VARIED_TEXTS, Prompt, as_batch, make_prompts
from superweights.testing import tiny_tokenizer


def test_each_text_comes_without_and_with_a_first_token():
    tokenizer = tiny_tokenizer()
    prompts = make_prompts(tokenizer, ["ab.\n", "c"], vocabulary=128)
    a, b, dot, newline, c = (tokenizer.convert_tokens_to_ids(each) for each in ["a", "b", ".", "Ċ", "c"])
    bos = tokenizer.bos_token_id
    assert prompts == (
        Prompt("ab.\n", False, (a, b, dot, newline), ("a", "b", ".", "\n")),
        Prompt("ab.\n", True, (bos, a, b, dot, newline), ("<s>", "a", "b", ".", "\n")),
        Prompt("c", False, (c,), ("c",)),
        Prompt("c", True, (bos, c), ("<s>", "c")),
    )


def test_no_first_token_when_the_tokenizer_has_none():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    assert [each.bos for each in make_prompts(tokenizer, ["ab", "c"], vocabulary=128)] == [False, False]


def test_no_first_token_when_the_model_has_no_row_for_it():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    assert tokenizer.bos_token_id >= 101
    assert [each.bos for each in make_prompts(tokenizer, ["ab"], vocabulary=101)] == [False]


def test_default_texts_hold_what_super_activations_sit_on():
    assert any("." in each[:-1] for each in DEFAULT_TEXTS)
    assert any("\n" in each for each in DEFAULT_TEXTS)
    assert any(each.startswith("The ") for each in DEFAULT_TEXTS)
    assert not set(DEFAULT_TEXTS) & set(VARIED_TEXTS)
    assert len(make_prompts(tiny_tokenizer(), vocabulary=128)) == 2 * len(DEFAULT_TEXTS)


def test_an_empty_text_is_left_out_but_for_its_first_token():
    assert make_prompts(tiny_tokenizer(), ["", "a"], vocabulary=128)[0].token_ids == (1,)


@pytest.mark.parametrize("texts", [[], [""]])
def test_no_tokens_at_all_are_refused(texts):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(UsageError, match=r"give no tokens\. Give at least one prompt with text"):
        make_prompts(tokenizer, texts, vocabulary=128)


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(UsageError) as caught:
        make_prompts(tiny_tokenizer(260), ["abc", "é"], vocabulary=128)
    highest = max(tiny_tokenizer(260)("é")["input_ids"])
    assert str(caught.value) == (
        f"Tokenising 'é' gives token id {highest}, but the model has ids 0 to 127. The tokenizer belongs to another model."
    )


@pytest.mark.parametrize("vocabulary", [1, 7, 128, 32_000])
def test_without_a_tokenizer_fixed_ids_stand_in(vocabulary):
    prompts = make_prompts(None, vocabulary=vocabulary)
    assert len(prompts) == 2
    for prompt in prompts:
        assert (prompt.text, prompt.bos, len(prompt.token_ids)) == ("", False, 12)
        assert all(0 <= each < vocabulary for each in prompt.token_ids)
        assert prompt.token_texts == tuple(f"#{each}" for each in prompt.token_ids)
    distinct = {each for prompt in prompts for each in prompt.token_ids}
    assert len(distinct) == min(24, vocabulary)


def test_a_batch_is_padded_on_the_right():
    prompts = [Prompt("", False, (5, 6, 7), ("", "", "")), Prompt("", False, (9,), ("",))]
    ids, real = as_batch(prompts)
    assert ids[0].tolist() == [5, 6, 7]
    assert ids[1, 0] == 9
    assert real.tolist() == [[True, True, True], [True, False, False]]
    assert set(ids[1, 1:].tolist()) <= {9}, "padding must not read another embedding row"
    assert ids.dtype == torch.int64


@pytest.mark.parametrize("prompts", [[], [Prompt("", False, (), ())]])
def test_a_batch_of_nothing_is_refused(prompts):
    with pytest.raises(UsageError, match="at least one prompt, and at least one token in each"):
        as_batch(prompts)
