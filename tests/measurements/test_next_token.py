import math
from statistics import mean, stdev

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import superweights as sw
from superweights.coordinates import Coordinate
from superweights.errors import UsageError
from superweights.interventions.conditions import with_and_without
from superweights.interventions.rows import applied, condition_states
from superweights.measurements import next_token
from superweights.measurements.intervals import mean_interval
from superweights.measurements.next_token import (
    average_next_token,
    encode,
    prompt_batches,
    token_texts,
)
from superweights.testing import tiny_model, tiny_tokenizer

PROMPTS = [[5, 9, 3], [17, 2, 8, 11, 20], [1, 2, 3, 4, 5, 6, 7, 8], [30, 31, 32]]
CONDITIONS = with_and_without([Coordinate(2, None, 49, 7)])
STOP = [3, 50, 127]


def batch_states(model, prompts, *, tokens):
    for batch in prompt_batches(prompts, tokens=tokens):
        states = condition_states(model, batch.input_ids, CONDITIONS, attention_mask=batch.attention_mask)
        yield states[:, torch.arange(len(batch.last)), batch.last]


def slow_probabilities(model, condition, prompt):
    with applied(model, condition):
        states = model.states(torch.tensor([prompt]))
    return model.logits(states)[0, -1].double().softmax(-1).tolist()


@pytest.mark.parametrize("residency", ["resident", "streamed"])
@pytest.mark.parametrize("tokens", [1, 12, 1000])
def test_the_averages_agree_with_a_plain_loop(residency, tokens, planted_checkpoint, monkeypatch):
    monkeypatch.setattr(next_token, "_LOGITS_AT_ONCE", 3 * 128)
    with sw.load(planted_checkpoint, residency=residency) as model:
        with torch.no_grad():
            model.model.lm_head.weight *= 20  # even probabilities would show little
        found = average_next_token(model, batch_states(model, PROMPTS, tokens=tokens), stop_words=STOP)
        slow = [[slow_probabilities(model, each, prompt) for prompt in PROMPTS] for each in CONDITIONS]
    assert found.count == len(PROMPTS)
    for number, rows in enumerate(slow):
        for token in (0, 3, 64, 127):
            values = [row[token] for row in rows]
            interval, expected = found.probability(number, token), mean_interval(values)
            assert interval.value == pytest.approx(mean(values), rel=1e-3, abs=1e-9)
            assert interval.standard_error == pytest.approx(stdev(values) / 2, rel=1e-3, abs=1e-9)
            assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), rel=2e-3, abs=1e-9)
        masses = [sum(row[token] for token in STOP) for row in rows]
        assert found.mass(number).value == pytest.approx(mean(masses), rel=1e-3)
        changes = [
            mine - before for mine, before in zip(masses, (sum(r[t] for t in STOP) for r in slow[0]), strict=True)
        ]
        assert found.mass_change(number).value == pytest.approx(mean(changes), abs=1e-4)
        assert found.mass_change(number).standard_error == pytest.approx(stdev(changes) / 2, rel=1e-2, abs=1e-7)
    assert torch.allclose(found.mean.sum(dim=1), torch.ones(3, dtype=torch.float64))
    assert abs(found.mass_change(1).value) > 1e-3, "an edit that does not show proves nothing"


def test_one_prompt_has_no_interval(planted_checkpoint):
    with sw.load(planted_checkpoint) as model:
        found = average_next_token(model, batch_states(model, PROMPTS[:1], tokens=99), stop_words=STOP)
    for interval in (found.probability(0, 3), found.mass(0), found.mass_change(1)):
        assert interval.count == 1 and math.isfinite(interval.value)
        assert all(map(math.isnan, (interval.standard_error, interval.low, interval.high)))


def test_batches_hold_all_prompts_padded_on_the_right():
    batches = list(prompt_batches(PROMPTS, tokens=10))
    assert [tuple(each.input_ids.shape) for each in batches] == [(2, 3), (1, 5), (1, 8)]
    seen = [row[: last + 1] for b in batches for row, last in zip(b.input_ids.tolist(), b.last.tolist(), strict=True)]
    assert sorted(seen) == sorted(PROMPTS)
    assert all(each.attention_mask is None for each in batches)


def test_a_batch_of_several_lengths_has_a_mask():
    [batch] = prompt_batches(PROMPTS, tokens=1000)
    assert batch.attention_mask.sum(dim=1).tolist() == [3, 3, 5, 8]
    assert batch.last.tolist() == [2, 2, 4, 7]


def test_a_prompt_longer_than_a_batch_runs_alone():
    assert [tuple(each.input_ids.shape) for each in prompt_batches([[1] * 50, [2]], tokens=8)] == [(1, 1), (1, 50)]
    assert list(prompt_batches([], tokens=8)) == []


def test_a_prompt_has_the_tokens_its_tokenizer_gives(planted_checkpoint):
    with sw.load(planted_checkpoint) as model:
        assert encode(model, "ab") == [1, *model.tokenizer("ab", add_special_tokens=False)["input_ids"]]


def test_a_prompt_that_cannot_be_read():
    with (
        sw.load(tiny_model("llama", vocab=128)) as model,
        pytest.raises(UsageError, match="has no tokenizer to read 'a'"),
    ):
        encode(model, "a")
    with (
        sw.load(tiny_model("llama", vocab=32), tokenizer=tiny_tokenizer()) as model,
        pytest.raises(UsageError, match="belongs to another model"),
    ):
        encode(model, "~")
    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.post_processor = None
    with sw.load(tiny_model("llama"), tokenizer=tokenizer) as model, pytest.raises(UsageError, match="gives no token"):
        encode(model, "")


def test_token_texts_keep_the_space_and_differ():
    words = ["<unk>", "a", "▁the", "the", "▁cat", "", "the\u200d"]
    made = Tokenizer(models.BPE({each: number for number, each in enumerate(words)}, [], unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    assert token_texts(tokenizer, [2, 3, 4, 5]) == [" the", "the", " cat", "#5"]
    assert token_texts(tokenizer, [3, 3]) == ["the #3", "the #3"]
    assert token_texts(tokenizer, []) == []


def test_broken_bytes_are_told_apart():
    tokenizer = tiny_tokenizer(260)
    first, second, *_ = token_texts(tokenizer, [130, 131])
    assert first != second and first.endswith("#130")
