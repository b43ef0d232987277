"""Stop words: does a super weight keep them down, as the paper says, and what does the model say instead without it?"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch

from superweights.coordinates import Coordinate
from superweights.errors import UsageError
from superweights.experiments.evaluation import TOKENS_PER_PASS, measurement
from superweights.interventions.conditions import Condition, with_and_without
from superweights.interventions.rows import condition_states
from superweights.measurements.intervals import mean_interval
from superweights.measurements.model_windows import longest_sequence
from superweights.measurements.next_token import (
    NextToken,
    average_next_token,
    encode,
    next_token_probabilities,
    prompt_batches,
    token_texts,
)
from superweights.measurements.stop_words import STOP_WORDS_VERSION, stop_word_ids
from superweights.measurements.texts import Text
from superweights.measurements.windows import check_length, default_bos, make_windows
from superweights.model.loading import LoadedModel
from superweights.progress import NO_PROGRESS, Progress
from superweights.results.records import NoteRecord, Record

_MANY_DOCUMENTS = 20
_LONGEST_PROMPT = 512
_CASE_WORD = "the"


@dataclass(frozen=True, slots=True)
class StopWordSettings:
    """What `stopwords` measures."""

    language: str = "en"
    """Language of the text, whose stop words are added up: en, de, fr or es."""
    count: int = 500
    """At most so many prompts, the first ones of the text."""
    prompt_tokens: int = 64
    """Tokens of each prompt, where the text is cut. A text of 20 or more documents is not: its prompts are documents without
    their last word."""
    top: int = 10
    """Show so many of the tokens that are most likely, and of those that change most."""
    case: str = "Summer is hot. Winter is "
    """A prompt to look at alone; an empty text leaves it out."""

    def __post_init__(self) -> None:
        if self.count < 1 or self.prompt_tokens < 2 or self.top < 1:
            raise UsageError(
                f"Measuring stop words with count {self.count}, prompt_tokens {self.prompt_tokens} and top {self.top}: "
                "prompt_tokens must be 2 or more, the others 1 or more."
            )


def stop_words(
    model: LoadedModel,
    weights: Sequence[Coordinate],
    text: Text,
    *,
    settings: StopWordSettings | None = None,
    progress: Progress = NO_PROGRESS,
) -> Iterator[Record]:
    """Mean next-token probabilities with and without the weights, and with their super activation restored.

    | record | what |
    | --- | --- |
    | `stop_word_mass` | probability of all stop words together, mean over prompts |
    | `stop_word_mass_change` | the same minus that of the original, paired over prompts |
    | `next_token_probability` | mean probability of one token, the subject |
    | `case_probability` | of one token after the prompt `settings.case`: the most likely ones of each condition, and "the" |

    Args:
        model: the model.
        weights: the super weights, all removed together; without any, the original is measured alone.
        text: 20 documents or more are prompts without their last word; any other text is cut into prompts.
        settings: language, prompts and what to show.
        progress: hears about prompts.

    Raises:
        UsageError: no tokenizer, too short a text, or a weight that is zero.
        UnknownNameError: there is no list of stop words for the language.
        CoordinateError: a weight is not in this model.

    Source:
        arXiv 2411.07191, figure 5: 500 prompts of LAMBADA.
    """
    settings = settings or StopWordSettings()
    conditions = with_and_without(weights)
    vocabulary = model.model.get_output_embeddings().weight.shape[0]
    chosen = [each for each in stop_word_ids(model.tokenizer, settings.language) if each < vocabulary]
    prompts = make_token_prompts(model, text, settings)
    yield NoteRecord(
        level="info",
        text=f"Stop words: {len(chosen)} of {vocabulary} tokens, by the list of {settings.language!r}, version "
        f"{STOP_WORDS_VERSION}.",
    )
    states = _last_token_states(model, prompts, conditions, progress)
    found = average_next_token(model, states, stop_words=chosen)
    yield from _mean_records(model, conditions, found, text.name, _digest(text, prompts), settings.top)
    if settings.case:
        yield from _case_records(model, conditions, settings.case)


def make_token_prompts(model: LoadedModel, text: Text, settings: StopWordSettings) -> list[list[int]]:
    """The prompts of a text as token ids: its documents without their last word, or consecutive pieces of the whole."""
    documents = [each for each in text.documents if len(each.split()) > 1]
    if len(documents) < _MANY_DOCUMENTS:
        check_length(settings.prompt_tokens, longest_sequence(model), model.name)
        windows = make_windows(
            text,
            model.tokenizer,
            length=settings.prompt_tokens,
            limit=settings.count,
            bos=default_bos(model.tokenizer),
            vocabulary=model.model.get_input_embeddings().weight.shape[0],
        )
        pieces: list[list[int]] = windows.ids.tolist()
        return pieces
    most = min(_LONGEST_PROMPT, longest_sequence(model) or _LONGEST_PROMPT)
    start = int(default_bos(model.tokenizer))
    prompts = [encode(model, each.rsplit(maxsplit=1)[0]) for each in documents[: settings.count]]
    return [[*each[:start], *each[start:][start - most :]] for each in prompts]  # the end of a long one is kept


def _last_token_states(
    model: LoadedModel, prompts: Sequence[Sequence[int]], conditions: Sequence[Condition], progress: Progress
) -> Iterator[torch.Tensor]:
    """Last states of the last token [conditions, prompts, hidden] of a few prompts after the other."""
    progress.start("prompts", total=len(prompts), unit="prompts")
    try:
        for batch in prompt_batches(prompts, tokens=TOKENS_PER_PASS // len(conditions)):
            states = condition_states(model, batch.input_ids, conditions, attention_mask=batch.attention_mask)
            yield states[:, torch.arange(len(batch.last)), batch.last]
            progress.advance(len(batch.last))
    finally:
        progress.finish()


def _mean_records(
    model: LoadedModel, conditions: Sequence[Condition], found: NextToken, dataset: str, digest: str, top: int
) -> Iterator[Record]:
    data = {"unit": "proportion", "dataset": dataset, "dataset_digest": digest}
    for number, condition in enumerate(conditions):
        yield measurement("stop_word_mass", found.mass(number), condition=condition, **data)
        if number:
            yield measurement("stop_word_mass_change", found.mass_change(number), condition=condition, **data)
    tokens = _shown_tokens(found, top)
    for token, name in zip(tokens, token_texts(model.tokenizer, tokens), strict=True):
        for number, condition in enumerate(conditions):
            value = found.probability(number, token)
            yield measurement("next_token_probability", value, subject=name, condition=condition, **data)


def _shown_tokens(found: NextToken, top: int) -> list[int]:
    """The tokens that the original finds most likely, then those that any edit changes most."""
    top = min(top, found.mean.shape[1])
    change = (found.mean - found.mean[0]).abs().amax(dim=0).nan_to_num(0)
    likely = found.mean[0].topk(top).indices.tolist()
    changed = change.topk(top).indices.tolist() if len(found.mean) > 1 else []
    return list(dict.fromkeys([*likely, *changed]))


def _case_records(model: LoadedModel, conditions: Sequence[Condition], case: str) -> Iterator[Record]:
    """What the model says after one prompt: one number each, so there is no interval."""
    states = condition_states(model, torch.tensor([encode(model, case)]), conditions)[:, 0, -1]
    found = next_token_probabilities(model, states)  # [conditions, vocabulary]
    tokens = list(dict.fromkeys([*found.argmax(dim=1).tolist(), *_case_word(model, found)]))
    for token, name in zip(tokens, token_texts(model.tokenizer, tokens), strict=True):
        for condition, value in zip(conditions, found[:, token].tolist(), strict=True):
            value = mean_interval([value])
            yield measurement("case_probability", value, unit="proportion", subject=name, condition=condition)


def _case_word(model: LoadedModel, found: torch.Tensor) -> list[int]:
    """The token of "the", with or without a space in front, that is more likely in any condition; none if it has none."""
    last = {model.tokenizer(each, add_special_tokens=False)["input_ids"][-1] for each in (_CASE_WORD, f" {_CASE_WORD}")}
    words = [each for each in sorted(last) if model.tokenizer.decode([each]).strip() == _CASE_WORD]
    return sorted(words, key=lambda each: -found[:, each].max().item())[:1]


def _digest(text: Text, prompts: Sequence[Sequence[int]]) -> str:
    return f"sha256:{sha256(f'{text.digest} {json.dumps(prompts)}'.encode()).hexdigest()}"
