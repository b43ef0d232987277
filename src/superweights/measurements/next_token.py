"""What a model says next, on average over prompts: the probability of every token, and of all stop words together.

A vocabulary is large and prompts are many: probabilities of a few prompts at a time are summed and dropped.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from superweights.errors import UsageError
from superweights.measurements.intervals import Interval, mean_interval, t_quantile
from superweights.model.loading import LoadedModel

_LOGITS_AT_ONCE = 1 << 24
"""Elements of one piece of logits: 64 MB, and 128 MB as probabilities."""


@dataclass(frozen=True)
class NextToken:
    """Next-token probabilities under several conditions, the first of them the original; float64."""

    mean: torch.Tensor
    """Mean probability of each token over the prompts, [conditions, vocabulary]."""
    standard_error: torch.Tensor
    """Its standard error, [conditions, vocabulary]; nan where there is one prompt."""
    count: int
    """How many prompts."""
    stop_word_mass: torch.Tensor
    """Probability of all stop words together after each prompt, [conditions, prompts]."""

    def probability(self, condition: int, token: int) -> Interval:
        """Mean probability of one token."""
        value, error = self.mean[condition, token].item(), self.standard_error[condition, token].item()
        margin = t_quantile(max(self.count - 1, 1)) * error
        # In this order nan stays nan.
        return Interval(value, error, max(value - margin, 0.0), min(value + margin, 1.0), self.count)

    def mass(self, condition: int) -> Interval:
        """Mean probability of all stop words together."""
        return mean_interval(self.stop_word_mass[condition], bounds=(0, 1))

    def mass_change(self, condition: int) -> Interval:
        """The same minus that of the original, paired over prompts."""
        return mean_interval(self.stop_word_mass[condition] - self.stop_word_mass[0])


def average_next_token(model: LoadedModel, states: Iterable[torch.Tensor], *, stop_words: Sequence[int]) -> NextToken:
    """Averages the probabilities of the next token over prompts.

    Args:
        model: makes logits of states.
        states: last states of the last token of a few prompts at a time, under all conditions: each
            [conditions, prompts, hidden], one prompt or more in all.
        stop_words: the tokens whose probabilities are added up.

    Source:
        arXiv 2411.07191, figure 5.
    """
    chosen = torch.tensor(stop_words)
    sums, masses = torch.zeros(()), []
    for batch in states:
        found = [_sums(model, each, chosen) for each in batch]
        sums = sums + torch.stack([each for each, _ in found], dim=1)  # [2, conditions, vocabulary]
        masses.append(torch.stack([each for _, each in found]))
    mass = torch.cat(masses, dim=1)
    count = mass.shape[1]
    mean, square = sums / count
    variance = (square - mean**2).clamp(min=0) * count / (count - 1) if count > 1 else mean * math.nan
    return NextToken(mean, (variance / count).sqrt(), count, mass)


def _sums(model: LoadedModel, states: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of probabilities and of their squares [2, vocabulary], and the mass of the chosen tokens [prompts]."""
    vocabulary = model.model.get_output_embeddings().weight.shape[0]
    sums, masses = torch.zeros(2, vocabulary, dtype=torch.float64), []
    for piece in torch.split(states, max(1, _LOGITS_AT_ONCE // vocabulary)):
        found = next_token_probabilities(model, piece)
        sums += torch.stack([found.sum(0), found.square().sum(0)])
        masses.append(found[:, chosen].sum(1))
    return sums, torch.cat(masses)


def next_token_probabilities(model: LoadedModel, states: torch.Tensor) -> torch.Tensor:
    """Probabilities of the next token [prompts, vocabulary], float64, of last states [prompts, hidden]."""
    return model.logits(states[:, None])[:, 0].softmax(-1).double().cpu()


def encode(model: LoadedModel, text: str) -> list[int]:
    """Token ids of a prompt, with the special tokens that the tokenizer puts around it by itself.

    Raises:
        UsageError: there is no tokenizer, no token, or a token the model does not have.
    """
    if model.tokenizer is None:
        raise UsageError(
            f"{model.name} has no tokenizer to read {text!r} with. Put its tokenizer.json beside config.json."
        )
    ids: list[int] = model.tokenizer(text, verbose=False)["input_ids"]
    vocabulary = model.model.get_input_embeddings().weight.shape[0]
    if not ids:
        raise UsageError(f"The prompt {text!r} gives no token. Give one with text.")
    if max(ids) >= vocabulary:
        raise UsageError(
            f"Tokenising {text!r} gives token id {max(ids)}, but {model.name} has ids 0 to {vocabulary - 1}. The tokenizer "
            "belongs to another model."
        )
    return ids


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token, with the space in front of a word, no two equal: "#" and the id tell equal ones apart."""
    front = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]  # alone, many tokenizers drop the space
    start = tokenizer.decode(front, clean_up_tokenization_spaces=False)
    texts = [
        tokenizer.decode([*front, each], clean_up_tokenization_spaces=False).removeprefix(start) or f"#{each}"
        for each in ids
    ]
    uses = Counter(texts)
    return [text if uses[text] == 1 else f"{text} #{each}" for text, each in zip(texts, ids, strict=True)]


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts that run together."""

    input_ids: torch.Tensor
    """Token ids [prompts, tokens], padded on the right."""
    attention_mask: torch.Tensor | None
    """1 for real tokens, [prompts, tokens]; None where all are."""
    last: torch.Tensor
    """Position of the last token of each prompt, [prompts]."""


def prompt_batches(prompts: Sequence[Sequence[int]], *, tokens: int) -> Iterator[PromptBatch]:
    """Batches of prompts of about one length, the shortest first.

    Args:
        prompts: token ids of each prompt.
        tokens: prompts times tokens of one batch, padding included; a prompt that is longer is a batch by itself.
    """
    batch: list[Sequence[int]] = []
    for prompt in sorted(prompts, key=len):
        if batch and (len(batch) + 1) * len(prompt) > tokens:
            yield _batch(batch)
            batch = []
        batch.append(prompt)
    if batch:
        yield _batch(batch)


def _batch(prompts: Sequence[Sequence[int]]) -> PromptBatch:
    lengths = torch.tensor([len(each) for each in prompts])
    width = int(lengths.max())
    ids = torch.tensor([[*each, *[each[-1]] * (width - len(each))] for each in prompts])
    mask = (torch.arange(width) < lengths[:, None]).long()  # [prompts, tokens]
    return PromptBatch(ids, None if bool(mask.all()) else mask, lengths - 1)
