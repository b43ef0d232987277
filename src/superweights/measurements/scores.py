"""How well a model predicts a text, from its last states: nats per token, KL and agreement with a reference.

The logits of a window over a large vocabulary do not fit in memory, so they are made a few tokens at a time and reduced on the
spot. Everything is float32 here and float64 where windows are averaged.
"""

import math
from dataclasses import dataclass

import torch

from superweights.model.loading import LoadedModel

_LOGITS_AT_ONCE = 1 << 25
"""Elements of one piece of logits: 128 MB."""


@dataclass(frozen=True)
class Scores:
    """What conditions do to the prediction of windows; each [conditions, windows], float64, means over tokens."""

    nll_nats: torch.Tensor
    """Negative log likelihood per predicted token."""
    kl_nats: torch.Tensor
    """Kullback-Leibler divergence of each condition from the reference, per predicted token."""
    agreement: torch.Tensor
    """Share of tokens whose most likely next token is the reference's."""

    @classmethod
    def joined(cls, parts: list["Scores"], dim: int) -> "Scores":
        """Scores of several passes side by side: conditions along 0, windows along 1."""
        names = ("nll_nats", "kl_nats", "agreement")
        return cls(*(torch.cat([getattr(each, name) for each in parts], dim=dim) for name in names))


def score_states(
    model: LoadedModel,
    states: torch.Tensor,
    input_ids: torch.Tensor,
    reference: torch.Tensor | None,
    *,
    reference_model: LoadedModel | None = None,
) -> Scores:
    """Scores of windows under several conditions.

    Args:
        model: makes logits of states.
        states: last states [conditions, windows, tokens, hidden].
        input_ids: the windows [windows, tokens]; every token but the first of each is predicted.
        reference: last states of what to compare with [windows, tokens, hidden]; None leaves KL and agreement nan, at half
            the cost.
        reference_model: makes logits of the reference; None where that is the same model.
    """
    conditions, windows, tokens, _ = states.shape
    vocabulary = model.model.get_output_embeddings().weight.shape[0]
    step = max(1, _LOGITS_AT_ONCE // (vocabulary * windows * 2))
    sums = torch.zeros(3, conditions, windows, dtype=torch.float64)
    for first in range(0, tokens - 1, step):
        piece = slice(first, min(first + step, tokens - 1))
        targets = input_ids[:, first + 1 : piece.stop + 1].to(states.device)[..., None]
        expected = None
        if reference is not None:
            logits = (reference_model or model).logits(reference[:, piece])  # [windows, piece, vocabulary]
            expected = logits.log_softmax(-1)
        for condition in range(conditions):
            found = model.logits(states[condition][:, piece]).log_softmax(-1)
            for number, value in enumerate(_compare(found, targets, expected)):
                sums[number, condition] += value.double().sum(-1).cpu()
    nll, kl, agreement = sums / (tokens - 1)
    return Scores(nll, kl, agreement)


def _compare(
    found: torch.Tensor, targets: torch.Tensor, expected: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, divergence and agreement of each token, [windows, tokens] each."""
    nll = -found.gather(-1, targets)[..., 0]
    if expected is None:
        unknown = torch.full_like(nll, math.nan)
        return nll, unknown, unknown
    kl = torch.nn.functional.kl_div(found, expected, reduction="none", log_target=True).sum(-1)
    return nll, kl, found.argmax(-1) == expected.argmax(-1)
