import math

import pytest
import torch

import superweights as sw
from superweights.errors import UnknownNameError, UsageError
from superweights.experiments.stop_words import StopWordSettings, make_token_prompts, stop_words
from superweights.interventions.conditions import with_and_without
from superweights.interventions.rows import applied
from superweights.measurements.intervals import mean_interval
from superweights.measurements.stop_words import stop_word_ids
from superweights.measurements.texts import Text
from superweights.results.records import MeasurementRecord, NoteRecord
from superweights.testing import save_tiny_checkpoint, tiny_model

DOCUMENTS = Text.of(
    "documents", ["", *(f"{'So it goes on and on. ' * (1 + n % 3)}Number {n}.\nthe end" for n in range(24))]
)
STREAM = Text.of("stream", ["It was a bright cold day in April, and the clocks were striking thirteen. " * 8])
SMALL = StopWordSettings(prompt_tokens=16, top=4)
NAMES = ["original", "weights removed", "removed, super activation restored"]


def measured(records, name):
    return [each for each in records if isinstance(each, MeasurementRecord) and each.name == name]


@pytest.fixture(scope="module")
def found(own_text):
    with sw.load(own_text.directory) as model:
        return list(stop_words(model, [own_text.weight], STREAM, settings=SMALL))


def probabilities(model, prompts):
    """Of the next token, one prompt after the other [prompts, vocabulary]."""
    return torch.stack(
        [model.logits(model.states(torch.tensor([each])))[0, -1].double().softmax(-1) for each in prompts]
    )


@pytest.mark.parametrize("text", [STREAM, DOCUMENTS])
def test_masses_and_changes_agree_with_a_plain_loop(text, own_text):
    with sw.load(own_text.directory) as model:
        records = list(stop_words(model, [own_text.weight], text, settings=SMALL))
        prompts = make_token_prompts(model, text, SMALL)
        chosen = stop_word_ids(model.tokenizer)
        masses = {}
        for condition in with_and_without([own_text.weight]):
            with applied(model, condition):
                masses[condition.name] = probabilities(model, prompts)[:, chosen].sum(dim=1)
    for each in measured(records, "stop_word_mass"):
        expected = mean_interval(masses[each.condition])
        assert (each.value, each.standard_error) == pytest.approx((expected.value, expected.standard_error), rel=1e-3)
        assert (each.unit, each.count, each.dataset) == ("proportion", len(prompts), text.name)
    for each in measured(records, "stop_word_mass_change"):
        expected = mean_interval(masses[each.condition] - masses["original"])
        assert each.interval == pytest.approx((expected.low, expected.high), rel=1e-3)
        assert abs(each.value) > 0.01, "an edit that does not show proves nothing"
    assert [each.condition for each in measured(records, "stop_word_mass")] == NAMES
    assert [each.condition for each in measured(records, "stop_word_mass_change")] == NAMES[1:]


def test_the_tokens_shown_are_the_likely_ones_and_those_that_change(own_text, found):
    records = measured(found, "next_token_probability")
    with sw.load(own_text.directory) as model:
        prompts = make_token_prompts(model, STREAM, SMALL)
        means = []
        for condition in with_and_without([own_text.weight]):
            with applied(model, condition):
                means.append(probabilities(model, prompts).mean(dim=0))
    subjects = list(dict.fromkeys(each.subject for each in records))
    likely, changed = means[0].topk(4), torch.stack([(each - means[0]).abs() for each in means]).amax(dim=0).topk(4)
    assert len(subjects) == len({*likely.indices.tolist(), *changed.indices.tolist()})
    for number, name in enumerate(NAMES):
        values = [each.value for each in records if each.condition == name]
        assert len(values) == len(subjects)
        assert values[:4] == pytest.approx(means[number][likely.indices].tolist(), rel=1e-3, abs=1e-9)
    shown = {each.subject: each.value for each in records if each.condition == NAMES[0]}
    moved = max(abs(each.value - shown[each.subject]) for each in records)
    assert moved == pytest.approx(changed.values[0].item(), rel=1e-3)


def test_the_case_names_the_most_likely_token_of_each_condition(own_text, found):
    records = measured(found, "case_probability")
    with sw.load(own_text.directory) as model:
        [prompt] = model.tokenizer(["Summer is hot. Winter is "])["input_ids"]
        with applied(model, with_and_without([own_text.weight])[1]):
            expected = probabilities(model, [prompt])[0].max().item()
    assert max(each.value for each in records if each.condition == NAMES[1]) == pytest.approx(expected, rel=1e-3)
    assert {each.condition for each in records} == set(NAMES)
    assert all((each.count, each.interval, each.dataset) == (1, None, None) for each in records)


def test_the_case_can_be_left_out(own_text):
    settings = StopWordSettings(prompt_tokens=16, count=3, case="")
    with sw.load(own_text.directory) as model:
        records = list(stop_words(model, [own_text.weight], STREAM, settings=settings))
    assert not measured(records, "case_probability")
    assert {each.count for each in measured(records, "stop_word_mass")} == {3}


def test_without_weights_the_original_alone(own_text):
    with sw.load(own_text.directory) as model:
        records = list(stop_words(model, [], STREAM, settings=SMALL))
    assert {each.condition for each in records if isinstance(each, MeasurementRecord)} == {"original"}
    assert len(measured(records, "next_token_probability")) == 4


def test_the_list_is_named(found):
    [note] = [each for each in found if isinstance(each, NoteRecord)]
    assert note.text == "Stop words: 16 of 128 tokens, by the list of 'en', version 1."


def test_interventions_are_data(found):
    described = {each.condition: each.intervention for each in measured(found, "stop_word_mass")}
    assert described["original"] == {}
    assert described["weights removed"] == {"kind": "scale", "factor": 0.0, "weights": ["2:49:7"]}
    assert described[NAMES[2]]["steps"][1] == {"kind": "restore super activation", "weights": ["2:49:7"]}


def test_documents_lose_their_last_word_and_long_ones_their_start(tmp_path):
    with sw.load(save_tiny_checkpoint("gpt2", tmp_path)) as model:  # takes 64 tokens
        prompts = make_token_prompts(model, DOCUMENTS, StopWordSettings())
        texts = [model.tokenizer.decode(each, skip_special_tokens=True) for each in prompts]
    assert len(prompts) == 24 and all(each[0] == 1 for each in prompts)
    assert texts[0] == "So it goes on and on. Number 0.\nthe"
    assert texts[2].endswith("and on. Number 2.\nthe") and len(prompts[2]) == 64


def test_a_text_of_few_documents_is_cut():
    from superweights.testing import tiny_tokenizer

    with sw.load(tiny_model("llama"), tokenizer=tiny_tokenizer()) as model:
        few = Text.of("few", DOCUMENTS.documents[:19])
        prompts = make_token_prompts(model, few, StopWordSettings(count=5, prompt_tokens=10))
    assert [len(each) for each in prompts] == [10] * 5


@pytest.mark.parametrize("wrong", [{"count": 0}, {"prompt_tokens": 1}, {"top": 0}])
def test_wrong_settings(wrong):
    with pytest.raises(UsageError, match="must be 2 or more, the others 1 or more"):
        StopWordSettings(**wrong)


def test_what_cannot_be_measured(own_text):
    with sw.load(own_text.directory) as model:
        with pytest.raises(UnknownNameError, match="language of stop words 'it'"):
            list(stop_words(model, [], STREAM, settings=StopWordSettings(language="it")))
        with pytest.raises(UsageError, match="takes at most 2048"):
            list(stop_words(model, [], STREAM, settings=StopWordSettings(prompt_tokens=4000)))
    with sw.load(tiny_model("llama")) as model, pytest.raises(UsageError, match="the model has none"):
        list(stop_words(model, [], STREAM))


def test_a_destroyed_model_is_an_answer(own_text):
    with sw.load(own_text.directory) as model:
        with torch.no_grad():
            model.model.get_parameter("model.norm.weight").fill_(math.inf)
        records = list(stop_words(model, [own_text.weight], STREAM, settings=SMALL))
    assert all(math.isnan(each.value) for each in measured(records, "stop_word_mass"))
