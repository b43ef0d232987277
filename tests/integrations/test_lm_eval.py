"""The model and the tasks of lm-evaluation-harness, against plain loops over transformers' own model and the harness's own
definitions. No test here can reach a network."""

import json
import logging
import math
import socket
from hashlib import sha256
from types import SimpleNamespace

import pytest
import torch

from superweights.coordinates import Coordinate
from superweights.errors import CoordinateError, HubError, UnknownNameError, UsageError
from superweights.integrations import lm_eval as ours
from superweights.integrations.lm_eval import TASKS, LoadedModelLM, headline, run_tasks
from superweights.interventions.conditions import ORIGINAL, Condition, ScaleWeights, removal
from superweights.measurements.intervals import proportion_interval
from superweights.model.loading import load

SUPER_WEIGHT = Coordinate(2, None, 49, 7)
REMOVED = removal([SUPER_WEIGHT], name="removed")
PAIRS = [
    ("The cat sat on", " the mat."),
    ("The cat sat on ", "the mat."),
    ("", "Summer is hot."),
    ("<s>Once", " upon a time there was a king and a queen."),
    ("a", "b"),
    ("One two three four five six seven eight nine ten", " e"),
    ("   ", "x"),
]
RAW = {
    "arc_challenge": [
        {
            "question": f"Why is {each} wet?",
            "choices": {"text": ["It is dry.", f"{each} {each}", "no", "perhaps not"], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCDA"[number],
        }
        for number, each in enumerate(["rain", "the sea", "a cat", "soup", "it"])
    ],
    "hellaswag": [
        {
            "activity_label": each,
            "ctx_a": f"A man does {each}.",
            "ctx_b": "he",
            "endings": ["runs away.", "sits down and eats.", "is a dog.", "sings to the crowd."],
            "label": str(number % 4),
        }
        for number, each in enumerate(["Diving", "Cooking", "Chess", "Sleep", "Golf"])
    ],
    "lambada_openai": [
        {"text": f"I saw the {each} and then I ate the {each}"} for each in ["fig", "cake", "egg", "rice", "pie"]
    ],
    "piqa": [
        {"goal": f"How do I clean {each}?", "sol1": f"Wash {each}.", "sol2": "Burn it down at once.", "label": number % 2}
        for number, each in enumerate(["a pan", "a shoe", "glass", "tea", "my cat"])
    ],
    "sciq": [
        {
            "support": "" if number else "  Water is wet.",
            "question": f"What is {each}?",
            "distractor1": "iron",
            "distractor2": f"{each}'s",
            "distractor3": 'a "rock"',
            "correct_answer": "water",
        }
        for number, each in enumerate(["ice", "snow", "rain", "fog", "dew"])
    ],
    "winogrande": [
        {
            "sentence": f"Sarah met Maria at {each} because _ was late.",
            "option1": "Sarah",
            "option2": "Maria",
            "answer": "12121"[number],
        }
        for number, each in enumerate(["home", "work", "noon", "sea", "church"])
    ],
}  # fmt: skip
RAW["arc_easy"] = RAW["arc_challenge"]
"""Items as the harness fetches them."""


def local_item(task, item):
    """The same item as our files hold it."""
    if task.startswith("arc"):
        gold = item["choices"]["label"].index(item["answerKey"])
        return {"query": f"Question: {item['question']}", "choices": item["choices"]["text"], "gold": gold}
    if task == "hellaswag":
        query = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}"
        return {"query": query, "choices": item["endings"], "gold": int(item["label"])}
    if task == "lambada_openai":
        context, _, word = item["text"].rpartition(" ")
        return {"context": context, "continuation": word}
    if task == "piqa":
        return {"query": f"Question: {item['goal']}\n", "choices": [item["sol1"], item["sol2"]], "gold": item["label"]}
    if task == "winogrande":
        start, _, end = item["sentence"].partition("_")
        return {
            "context_options": [start + item["option1"], start + item["option2"]],
            "continuation": end.strip(),
            "gold": int(item["answer"]) - 1,
        }
    return item


def spelled_out(task, item):
    """Prompts and targets of one of our items, its right answer, and the lengths that normalise."""
    if task == "lambada_openai":
        return [(item["context"], f" {item['continuation']}")], 0, [1]
    if task == "winogrande":
        return [(each, f" {item['continuation']}") for each in item["context_options"]], item["gold"], [1, 1]
    if task == "sciq":
        prompt = f"{item['support'].lstrip()}\nQuestion: {item['question']}\nAnswer:"
        choices = [item[each] for each in ("distractor1", "distractor2", "distractor3", "correct_answer")]
        gold = 3
    else:
        prompt = item["query"] + {"hellaswag": "", "piqa": "Answer:"}.get(task, "\nAnswer:")
        choices, gold = item["choices"], item["gold"]
    return [(prompt, f" {each}") for each in choices], gold, [len(each) for each in choices]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a test tried the network")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def model(planted_checkpoint):
    pytest.importorskip("lm_eval")
    with load(planted_checkpoint) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def plain(planted_checkpoint):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(planted_checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for task in TASKS:
        lines = [json.dumps(local_item(task, each)) for each in RAW[task]]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def requests(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


@torch.no_grad()
def predict(plain, ids, count):
    """Log-probabilities of the last `count` of these ids, one text at a time, and whether all are the greedy choice."""
    found = plain(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)  # [tokens, vocabulary]
    places = range(len(ids) - count, len(ids))
    logs = [found[place - 1, ids[place]].item() for place in places]
    return logs, all(found[place - 1].argmax().item() == ids[place] for place in places)


def score(plain, tokenizer, context, continuation):
    start = [] if context.startswith("<s>") or not context else [tokenizer.bos_token_id]
    ids = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    before = len(tokenizer(context.rstrip(" "), add_special_tokens=False)["input_ids"])
    logs, greedy = predict(plain, [*start, *ids] if context else [tokenizer.bos_token_id, *ids], len(ids) - before)
    return math.fsum(logs), greedy


@torch.no_grad()
def generate(plain, ids, count):
    """The most likely tokens, one after the other, and transformers' own generation, which has to agree."""
    prompt = torch.tensor([ids])
    made = plain.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return made[0, len(ids) :].tolist()


def test_likelihoods_are_those_of_a_plain_loop(model, plain):
    found = LoadedModelLM(model).loglikelihood(requests(*PAIRS))
    for (value, greedy), pair in zip(found, PAIRS, strict=True):
        expected, expected_greedy = score(plain, model.tokenizer, *pair)
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy


def test_the_greedy_choice_is_known_as_such(model, plain):
    contexts = ["The cat", "Summer is", "for he was", "1 + 1", "Dear"]
    texts = {each: model.tokenizer.decode(generate(plain, model.tokenizer(each)["input_ids"], 3)) for each in contexts}
    pairs = [
        (context, text) for context, text in texts.items() if text.isascii() and text.isprintable() and "<" not in text
    ]
    assert pairs
    assert all(greedy for _, greedy in LoadedModelLM(model).loglikelihood(requests(*pairs)))
    others = [(context, text[:-1] + ("x" if text[-1] != "x" else "y")) for context, text in pairs]
    assert not any(greedy for _, greedy in LoadedModelLM(model).loglikelihood(requests(*others)))


@pytest.mark.parametrize("budget", [1, 40, 10**6])
def test_who_shares_a_pass_does_not_matter(budget, model, monkeypatch):
    passes = []
    states = model.states
    monkeypatch.setattr(model, "states", lambda ids, **kwargs: passes.append(tuple(ids.shape)) or states(ids, **kwargs))
    alone = [LoadedModelLM(model).loglikelihood(requests(each))[0] for each in PAIRS]
    passes.clear()
    together = LoadedModelLM(model, batch_tokens=budget).loglikelihood(requests(*PAIRS))
    assert [each[1] for each in together] == [each[1] for each in alone]
    assert [each[0] for each in together] == pytest.approx([each[0] for each in alone], abs=1e-4)
    assert all(rows == 1 or rows * width <= budget for rows, width in passes)
    assert len(passes) == {1: len(PAIRS), 10**6: 1}.get(budget, len(passes))


def test_logits_are_made_of_what_is_scored_and_piece_by_piece(model, monkeypatch):
    whole = LoadedModelLM(model).loglikelihood(requests(*PAIRS))
    sizes = []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda states: sizes.append(states.shape[1]) or logits(states))
    monkeypatch.setattr(ours, "_LOGITS_AT_ONCE", 3 * 128)
    assert LoadedModelLM(model).loglikelihood(requests(*PAIRS)) == [
        (pytest.approx(value, abs=1e-5), greedy) for value, greedy in whole
    ]
    assert max(sizes) == 3
    scored = [context[len(context.rstrip()) :] + continuation for context, continuation in PAIRS]
    assert sum(sizes) == sum(map(len, scored))


def test_both_residencies_give_the_same(model, planted_checkpoint, data):
    with load(planted_checkpoint, residency="streamed") as streamed:
        for condition in (ORIGINAL, REMOVED):
            found, expected = (
                list(run_tasks(each, ["piqa", "lambada_openai"], data=data, condition=condition))
                for each in (streamed, model)
            )
            assert found == expected
        asked = requests(("The cat", {"max_gen_toks": 5}))
        assert LoadedModelLM(streamed).generate_until(asked) == LoadedModelLM(model).generate_until(asked)


@pytest.mark.parametrize("text", ["Hi", "The cat sat on a mat.", "A dog barked at the moon all night long."])
def test_rolling_scores_every_token_once(text, model, plain):
    lm = LoadedModelLM(model)
    lm.max_length = 8
    bos = model.tokenizer.bos_token_id
    tokens = model.tokenizer(text)["input_ids"]  # starts with the same token again, as in HFLM
    expected = predict(plain, [bos, *tokens[:8]], len(tokens[:8]))[0]
    for first in range(8, len(tokens), 8):
        end = min(first + 8, len(tokens))
        expected += predict(plain, tokens[end - 9 : end], end - first)[0]
    assert len(expected) == len(tokens)
    assert lm.loglikelihood_rolling(requests((text,), ("Hi",)))[0] == pytest.approx(math.fsum(expected), abs=1e-4)


def test_generation_is_greedy(model, plain):
    contexts = ["The cat sat on", "S", "Once upon a time there was a king.", "1 + 1 = 2, 2 + 2 ="]
    limits = [12, 3, 7, 20]
    asked = [(each, {"until": [], "max_gen_toks": limit}) for each, limit in zip(contexts, limits, strict=True)]
    for budget in (1, 10**6):
        found = LoadedModelLM(model, batch_tokens=budget).generate_until(requests(*asked))
        for text, context, limit in zip(found, contexts, limits, strict=True):
            expected = generate(plain, model.tokenizer(context)["input_ids"], limit)
            assert text == model.tokenizer.decode(expected, skip_special_tokens=True)


def test_generation_ends_before_the_first_stop_text(model):
    lm = LoadedModelLM(model)
    whole = lm.generate_until(requests(("The cat", {"max_gen_toks": 20})))[0]
    assert len(whole) > 6
    early, late = whole[2:4], whole[4:6]
    cut = min(whole.index(early), whole.index(late))
    found = lm.generate_until(
        requests(("The cat", {"until": [late, "", early], "max_tokens": 20}), ("The cat", {"until": early}))
    )
    assert found == [whole[:cut], whole[: whole.index(early)]]


def test_generation_ends_with_the_end_of_the_text(model, plain, monkeypatch):
    tokens = generate(plain, model.tokenizer("The cat")["input_ids"], 6)
    monkeypatch.setattr(model.model.config, "eos_token_id", [tokens[4], tokens[3]])
    found = LoadedModelLM(model).generate_until(requests(("The cat", {"max_gen_toks": 20})))[0]
    end = min(tokens.index(tokens[3]), tokens.index(tokens[4]))
    assert found == model.tokenizer.decode(tokens[:end], skip_special_tokens=True)


def test_what_is_too_long_loses_its_left_end_and_that_is_said(model, plain, caplog):
    lm = LoadedModelLM(model)
    lm.max_length = 10
    context, continuation = "The quick brown fox jumps over", " the dog"
    ids = model.tokenizer(context + continuation)["input_ids"]
    with caplog.at_level(logging.WARNING):
        found = lm.loglikelihood(requests((context, continuation), ("a", "b")))
    assert found[0][0] == pytest.approx(math.fsum(predict(plain, ids[-11:], len(continuation))[0]), abs=1e-4)
    assert caplog.messages == [
        f"1 of 2 requests are longer than the 10 tokens that {model.name} takes: they lose their left end."
    ]
    text = lm.generate_until(requests((context, {"max_gen_toks": 4})))[0]
    assert text == model.tokenizer.decode(
        generate(plain, model.tokenizer(context)["input_ids"][-6:], 4), skip_special_tokens=True
    )
    assert len(caplog.messages) == 2


def test_seven_tasks_are_what_a_plain_loop_makes_of_them(model, plain, data, capfd):
    records = {(each.subject, each.name): each for each in run_tasks(model, data=data)}
    assert capfd.readouterr() == ("", "")
    assert {task for task, _ in records} == set(TASKS)
    for task in TASKS:
        hits, normed, nats = [], [], []
        for item in (local_item(task, each) for each in RAW[task]):
            pairs, gold, lengths = spelled_out(task, item)
            scores = [score(plain, model.tokenizer, *each) for each in pairs]
            values = [value for value, _ in scores]
            per_length = [value / length for value, length in zip(values, lengths, strict=True)]
            hits.append(scores[0][1] if task == "lambada_openai" else values.index(max(values)) == gold)
            normed.append(per_length.index(max(per_length)) == gold)
            nats.append(-values[0])
        expected = {"acc": sum(hits) / 5, "acc_norm": sum(normed) / 5, "perplexity": math.exp(sum(nats) / 5)}
        names = {name for subject, name in records if subject == task}
        second = {"lambada_openai": "perplexity", "winogrande": "acc"}.get(task, "acc_norm")
        assert names == {"acc", second}
        for name in names:
            record = records[task, name]
            assert record.value == pytest.approx(expected[name], rel=1e-3)
            assert (record.count, record.dataset, record.condition, record.intervention) == (5, task, "original", {})
            assert record.unit == ("1" if name == "perplexity" else "proportion")
            assert record.dataset_digest == f"sha256:{sha256((data / f'{task}.jsonl').read_bytes()).hexdigest()}"


def test_values_and_errors_are_the_harness_s(model, data):
    from lm_eval import evaluate
    from lm_eval.api.metrics import mean_stderr

    task = ours._open_task("piqa", data, None)
    expected = evaluate(LoadedModelLM(model), {"tasks": {"piqa": task.harness}}, bootstrap_iters=0)
    for record in run_tasks(model, ["piqa"], data=data):
        samples = [each[record.name] for each in expected["samples"]["piqa"]]
        assert record.value == expected["results"]["piqa"][f"{record.name},none"]
        assert record.standard_error == pytest.approx(mean_stderr(samples))
        wilson = proportion_interval(sum(map(int, samples)), len(samples))
        assert record.interval == (wilson.low, wilson.high)


@pytest.mark.parametrize("task", TASKS)
def test_our_definitions_are_the_harness_s_own(task, model, data, monkeypatch):
    """The same items, as the harness fetches them and as our files hold them, give the same requests and the same numbers."""
    import datasets

    rows = datasets.Dataset.from_list(RAW[task])
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: dict.fromkeys(("train", "validation", "test"), rows))
    fetched, local = ours._open_task(task, None, None), ours._open_task(task, data, None)
    for (_, asked), (_, expected) in zip(local.items, fetched.items, strict=True):
        assert [each.args for each in asked] == [each.args for each in expected]
    assert local.harness.aggregation() == fetched.harness.aggregation()
    assert local.harness.higher_is_better() == fetched.harness.higher_is_better()
    assert local.harness.VERSION == fetched.harness.VERSION
    pairs = zip(run_tasks(model, [task]), run_tasks(model, [task], data=data), strict=True)
    for found, expected in pairs:
        assert found.dataset_digest != expected.dataset_digest
        assert found.model_copy(update={"dataset_digest": expected.dataset_digest}) == expected


@pytest.mark.parametrize("residency", ["resident", "streamed"])
def test_an_edit_changes_the_numbers_and_is_recorded(residency, planted_checkpoint, plain, data):
    pytest.importorskip("lm_eval")
    from transformers import AutoModelForCausalLM

    edited = AutoModelForCausalLM.from_pretrained(planted_checkpoint, dtype=torch.float32).eval()
    edited.model.layers[2].mlp.down_proj.weight.data[49, 7] = 0
    with load(planted_checkpoint, residency=residency) as loaded:
        found = LoadedModelLM(loaded, condition=REMOVED).loglikelihood(requests(*PAIRS))
        before, after = (
            next(iter(run_tasks(loaded, ["lambada_openai"], data=data, condition=condition)))
            for condition in (ORIGINAL, REMOVED)
        )
        untouched = LoadedModelLM(loaded).loglikelihood(requests(*PAIRS))
    for (value, _), (same, _), pair in zip(found, untouched, PAIRS, strict=True):
        assert value == pytest.approx(score(edited, loaded.tokenizer, *pair)[0], abs=1e-4)
        assert same == pytest.approx(score(plain, loaded.tokenizer, *pair)[0], abs=1e-4)
    assert before.value != after.value
    assert (after.condition, after.intervention) == ("removed", REMOVED.describe())


def test_a_destroyed_model_has_numbers_too(model, data):
    destroyed = Condition("blown up", (ScaleWeights((SUPER_WEIGHT,), 1e37),))
    record = next(iter(run_tasks(model, ["lambada_openai"], data=data, condition=destroyed)))
    assert record.name == "perplexity"
    assert math.isnan(record.value) or record.value > 100
    assert ours._summary("perplexity", [-1e5, -2e5]).value == math.inf


def test_one_item_has_no_interval(model, data):
    for record in run_tasks(model, ["sciq", "lambada_openai"], data=data, limit=1):
        assert (record.count, record.standard_error, record.interval) == (1, None, None)


def test_progress_hears_of_every_request(model, data):
    heard = []
    progress = SimpleNamespace(
        start=lambda task, *, total, unit: heard.append((task, total, unit)),
        advance=lambda steps=1, *, nbytes=0: heard.append(steps),
        finish=lambda: heard.append("finished"),
    )
    list(run_tasks(model, ["piqa", "sciq"], data=data, limit=3, batch_tokens=64, progress=progress))
    first, second = heard[: heard.index("finished") + 1], heard[heard.index("finished") + 1 :]
    assert first[0] == ("piqa", 6, "requests")
    assert second[0] == ("sciq", 12, "requests")
    assert (sum(first[1:-1]), sum(second[1:-1])) == (6, 12)


def test_the_paper_averages_plain_accuracy():
    assert {headline(each) for each in TASKS} == {"acc"}
    with pytest.raises(UnknownNameError, match=r"There is no task 'arc_esy'. Did you mean 'arc_easy'"):
        headline("arc_esy")


def test_without_the_harness_everything_says_what_to_install(monkeypatch, capsys, planted_checkpoint):
    monkeypatch.setattr(ours, "register_model", None)
    with load(planted_checkpoint) as loaded:
        for use in (lambda: LoadedModelLM(loaded), lambda: next(run_tasks(loaded))):
            with pytest.raises(UsageError, match=r"`pip install superweights\[eval\]`"):
                use()
    assert ours.main() == 2
    assert "pip install superweights[eval]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"query": "a", "choices": ["b", "c"], "gold": 0}\nno\n', r"piqa\.jsonl: line 2 is no JSON"),
        (
            '{"query": "a", "choices": ["b", "c"], "gold": 0}\n{"query": "a"}\n',
            r"line 2 is not an item with the fields of",
        ),
        ("[1]\n", r"line 1 is not an item"),
        ("", r"piqa\.jsonl: it is empty"),
        (
            '{"question": "a", "choices": ["b", "c"], "gold": 0}\n',
            r"as items of piqa: .*'query'.*says which fields an item has",
        ),
        (
            '{"query": "a", "choices": ["b", "c"], "gold": 0}\n{"query": "a", "choices": null, "gold": 0}\n',
            r"as items of piqa: TypeError",
        ),
        (
            '{"query": "a", "choices": ["b", "c"], "gold": 0}\n{"query": "a", "choices": ["b", 3], "gold": 0}\n',
            r"as items of piqa: Arrow",
        ),
        (b'{"query": "\xff"}\n', r"line 1 is no JSON"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_before_any_pass(content, message, model, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "states", None)
    (tmp_path / "piqa.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message):
        list(run_tasks(model, ["piqa"], data=tmp_path))


def test_bad_requests_are_refused_before_any_pass(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "states", None)
    with pytest.raises(UnknownNameError, match=r"no task 'hellaswg'. Did you mean 'hellaswag'"):
        list(run_tasks(model, ["piqa", "hellaswg"], data=data))
    with pytest.raises(UsageError, match="The limit is 0 items"):
        list(run_tasks(model, ["piqa"], data=data, limit=0))
    with pytest.raises(UsageError, match=r"sciq\.jsonl, but .* is no folder\. Put the file there"):
        list(run_tasks(model, ["sciq"], data=tmp_path / "nowhere"))
    (tmp_path / "piqa.jsonl").write_bytes((data / "piqa.jsonl").read_bytes())
    with pytest.raises(UsageError, match=r"The items of sciq should be in .*the folder holds piqa\.jsonl"):
        list(run_tasks(model, ["piqa", "sciq"], data=tmp_path))
    for arguments, message in [
        (("The cat", {"do_sample": True, "temperature": 1.0}), "Generating with do_sample"),
        (("The cat", {"num_beams": 4}), "Generating with num_beams"),
        (("The cat", {"max_gen_toks": 0}), "Generating 0 tokens"),
        (("The cat", {"max_gen_toks": model.model.config.max_position_embeddings}), "takes at most 2048"),
    ]:
        with pytest.raises(UsageError, match=message):
            LoadedModelLM(model).generate_until(requests(arguments))
    lm = LoadedModelLM(model)
    lm.max_length = 4
    for pair, message in [(("The cat", ""), "adds no token"), (("a", "12345"), "a continuation of 5 tokens")]:
        with pytest.raises(UsageError, match=message):
            lm.loglikelihood(requests(pair))
    with pytest.raises(UsageError, match="A pass cannot have 0 tokens"):
        LoadedModelLM(model, batch_tokens=0)
    monkeypatch.setattr(model, "tokenizer", None)
    with pytest.raises(UsageError, match="needs a tokenizer"):
        LoadedModelLM(model)


def test_a_tokenizer_without_special_tokens_needs_a_context(model, plain, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=model.tokenizer.backend_tokenizer, unk_token="<unk>")
    bare.backend_tokenizer.post_processor = None
    monkeypatch.setattr(model, "tokenizer", bare)
    [(value, _)] = LoadedModelLM(model).loglikelihood(requests(("The cat", " sat")))
    assert value == pytest.approx(math.fsum(predict(plain, bare("The cat sat")["input_ids"], 4)[0]), abs=1e-4)
    with pytest.raises(
        UsageError, match=r"no beginning-of-sequence or end-of-sequence token\. Give the request a context"
    ):
        LoadedModelLM(model).loglikelihood(requests(("", "sat")))


def test_data_that_cannot_be_fetched_is_an_error_of_the_hub(model, monkeypatch):
    import datasets

    def refuse(**_):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        HubError, match=r"items of piqa through lm-eval: ConnectionError: no route\. Go online, or give a folder"
    ):
        list(run_tasks(model, ["piqa"]))


def test_the_harness_makes_the_model_of_text(model, planted_checkpoint):
    from lm_eval.api.registry import get_model

    made = get_model("superweights")
    assert made is LoadedModelLM
    given = f"pretrained={planted_checkpoint},residency=streamed,weights=2:49:7+3:1:2;4:0:1,scale=0.5,batch_tokens=100"
    lm = made.create_from_arg_string(given, {"batch_size": 1, "device": "cuda:0"})
    with lm.model as loaded:
        weights = (SUPER_WEIGHT, Coordinate(3, None, 1, 2), Coordinate(4, None, 0, 1))
        assert (loaded.residency, lm.batch_tokens) == ("streamed", 100)
        assert lm.condition == Condition("scale=0.5", (ScaleWeights(weights, 0.5),))
        [(value, _)] = lm.loglikelihood(requests(PAIRS[0]))
    assert value != LoadedModelLM(model).loglikelihood(requests(PAIRS[0]))[0][0]
    lm = made.create_from_arg_obj({"pretrained": str(planted_checkpoint), "weights": "2:49:7"})
    with lm.model:
        assert lm.condition == Condition("scale=0", (ScaleWeights((SUPER_WEIGHT,), 0.0),))
    lm = made.create_from_arg_obj({"pretrained": planted_checkpoint})
    with lm.model:
        assert lm.condition == ORIGINAL


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"residency": "streamed"}, UsageError, "needs pretrained="),
        (
            {"pretrained": ".", "weihgts": "1:2:3"},
            UnknownNameError,
            "no model argument 'weihgts'. Did you mean 'weights'",
        ),
        ({"pretrained": ".", "scale": 2}, UsageError, "give weights=LAYER:ROW:COL as well"),
        ({"pretrained": ".", "weights": "1:2:3", "scale": "two"}, UsageError, "scale=two is no number"),
        ({"pretrained": ".", "weights": "1:2"}, CoordinateError, "'1:2' is no coordinate"),
        ({"weights": "2:4900:7"}, CoordinateError, "2:4900:7 is outside"),
        ({"batch_tokens": "many"}, UsageError, "A pass cannot have many tokens"),
    ],
)
def test_model_arguments_that_are_wrong(arguments, error, message, planted_checkpoint):
    pytest.importorskip("lm_eval")
    given = (
        arguments if arguments.keys() & {"pretrained", "residency"} else {"pretrained": planted_checkpoint, **arguments}
    )
    with pytest.raises(error, match=message):
        LoadedModelLM.create_from_arg_obj(given)


def test_the_command_line_is_the_harness_s(monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    import lm_eval.__main__

    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", lambda: None)
    assert ours.main() == 0

    def fail():
        raise UsageError("It is wrong.")

    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", fail)
    assert ours.main() == 2
    assert capsys.readouterr().err == "It is wrong.\n"
