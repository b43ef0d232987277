"""The few short prompts of a data-free forward pass, with and without a beginning-of-sequence token.

A super activation may sit on the first token, on '.', on a newline or on an article, and some models form it only behind a
beginning-of-sequence token: the prompts below hold all of these. They are no data set and nothing is fitted to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from superweights.errors import UsageError

DEFAULT_TEXTS = (
    "Apple Inc. is a worldwide tech company.",
    "Summer is hot.\nWinter is cold.",
    "The cat sat on a mat.\nA dog barked.",
)
"""The first is the prompt of the paper's code; the others bring '.', newline and articles early and late."""

VARIED_TEXTS = (
    "Once upon a time there was a king.",
    "def add(a, b):\n    return a + b",
    "1 + 1 = 2, 2 + 2 = 4",
    "Dear Sir or Madam,",
    "Der Hund schläft.",
    "What is the capital of France?",
    "THE END",
    "for he was, and is, the one",
    "yes yes yes yes yes",
)
"""Further prompts of many kinds, to see whether a super activation keeps its channel and token whatever the input."""

_TOKENS_WITHOUT_TOKENIZER = 12


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as the model sees it."""

    text: str
    """The text before tokenisation; "" when there is no tokenizer."""
    bos: bool
    """Whether a beginning-of-sequence token was put in front."""
    token_ids: tuple[int, ...]
    """Token ids, in order."""
    token_texts: tuple[str, ...]
    """Text of each token."""


def make_prompts(tokenizer: Any, texts: Sequence[str] = DEFAULT_TEXTS, *, vocabulary: int) -> tuple[Prompt, ...]:
    """Tokenises each text without special tokens, and once more behind the beginning-of-sequence token if there is one.

    Args:
        tokenizer: a transformers tokenizer, or None: then fixed token ids stand in for the texts.
        texts: the prompts.
        vocabulary: how many token ids the model has.

    Raises:
        UsageError: a text gives no token, or a token the model does not have.
    """
    if tokenizer is None:
        return _prompts_without_tokenizer(vocabulary)
    prompts = []
    for text in texts:
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        starts: list[list[int]] = [[]]
        if tokenizer.bos_token_id is not None and tokenizer.bos_token_id < vocabulary:
            starts.append([tokenizer.bos_token_id])
        for start in starts:
            token_ids = tuple([*start, *plain])
            if token_ids:
                _check(text, token_ids, vocabulary)
                texts_of = tuple(tokenizer.decode([each]) for each in token_ids)
                prompts.append(Prompt(text, bool(start), token_ids, texts_of))
    if not prompts:
        raise UsageError(f"The prompts {list(texts)!r} give no tokens. Give at least one prompt with text.")
    return tuple(prompts)


def _prompts_without_tokenizer(vocabulary: int) -> tuple[Prompt, ...]:
    step = max(1, vocabulary // (2 * _TOKENS_WITHOUT_TOKENIZER + 1))
    ids = [each % vocabulary for each in range(step, step * (2 * _TOKENS_WITHOUT_TOKENIZER + 1), step)]
    halves = (ids[:_TOKENS_WITHOUT_TOKENIZER], ids[_TOKENS_WITHOUT_TOKENIZER:])
    return tuple(Prompt("", False, tuple(half), tuple(f"#{each}" for each in half)) for half in halves)


def _check(text: str, token_ids: tuple[int, ...], vocabulary: int) -> None:
    if max(token_ids) >= vocabulary:
        raise UsageError(
            f"Tokenising {text!r} gives token id {max(token_ids)}, but the model has ids 0 to {vocabulary - 1}. "
            "The tokenizer belongs to another model."
        )


def as_batch(prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives token ids [prompts, tokens], padded on the right, and whether each is real [prompts, tokens] (bool).

    Raises:
        UsageError: there is no prompt, or one without tokens.
    """
    if not prompts or not all(each.token_ids for each in prompts):
        raise UsageError("A forward pass needs at least one prompt, and at least one token in each.")
    width = max(len(each.token_ids) for each in prompts)
    ids = torch.tensor([[*each.token_ids, *[each.token_ids[-1]] * (width - len(each.token_ids))] for each in prompts])
    lengths = torch.tensor([len(each.token_ids) for each in prompts])
    return ids, torch.arange(width) < lengths[:, None]
