"""Windows: a text as rows of token ids that all have one length, which a model is measured on.

Consecutive, without overlap, and cut from one stream of tokens, after GPTQ's scripts (Frantar et al., arXiv 2210.17323),
whose perplexities the literature quotes. No model here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import torch

from superweights.errors import UsageError
from superweights.measurements.texts import Text

DEFAULT_LENGTH = 2048
"""Tokens per window, as in GPTQ's scripts, where the model takes as many."""

# Tokenised at once: enough to keep WikiText-2 in one piece, so that its windows are those of the literature, and little
# enough that a few windows of a huge text cost a second or so.
_PIECE_CHARACTERS = 2_000_000


@dataclass(frozen=True, slots=True)
class Windows:
    """A text as the model sees it."""

    ids: torch.Tensor
    """Token ids [windows, length], int64."""
    text_name: str
    """Name of the text."""
    digest: str
    """"sha256:" and the SHA-256 of the text's digest, length, bos and token ids."""
    length: int
    """Tokens per window, the beginning-of-sequence token included."""
    bos: bool
    """Whether every window starts with the beginning-of-sequence token."""


def make_windows(
    text: Text, tokenizer: Any, *, length: int, limit: int | None = None, bos: bool, vocabulary: int
) -> Windows:
    """Tokenises the whole text without special tokens and cuts it into consecutive windows; the rest is dropped.

    With `bos`, every window starts with the beginning-of-sequence token and holds `length - 1` tokens of the text: a model
    that forms its super activation on that token has it in every window. GPTQ's scripts let the tokenizer put it once,
    before the whole text, so that only the first window has it.

    A text of more than 2 million characters is tokenised in pieces that end with a line; `limit` does not move the cuts.

    Args:
        text: the text.
        tokenizer: a transformers tokenizer.
        length: tokens per window, at least 2.
        limit: at most so many windows, the first ones; None takes all.
        bos: whether windows start with the beginning-of-sequence token; `default_bos` gives the tokenizer's own habit.
        vocabulary: how many token ids the model has.

    Raises:
        UsageError: no tokenizer, no such token, a text shorter than one window, or a token the model does not have.
    """
    if tokenizer is None:
        raise UsageError(
            f"Measuring on {text.name} needs a tokenizer, and the model has none. Put its tokenizer.json beside config.json."
        )
    if limit is not None and limit < 1:
        raise UsageError(f"The limit is {limit} windows; it must be 1 or more.")
    check_length(length, None, text.name)
    start = _start(tokenizer, bos)
    own = length - len(start)  # tokens of the text in one window
    tokens = _tokens(text, tokenizer, None if limit is None else limit * own)
    count = min(len(tokens) // own, limit or len(tokens))
    if count == 0:
        raise UsageError(_too_short(text, length, len(tokens) + len(start)))
    first = torch.tensor(start, dtype=torch.int64).expand(count, len(start))
    ids = torch.cat([first, tokens[: count * own].view(count, own)], dim=1)  # [windows, length]
    _check_vocabulary(ids, text, tokenizer, vocabulary)
    return Windows(ids, text.name, _digest(text, ids, bos), length, bos)


def default_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts the beginning-of-sequence token first; False without a tokenizer."""
    return tokenizer is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def window_length(config_limit: int | None, wanted: int | None) -> int:
    """The length that was asked for, as it is, or else 2048, or the model's limit where that is smaller.

    Args:
        config_limit: longest sequence that the model takes; None where it has no limit.
        wanted: what the user asked for; `check_length` judges it.

    Example:
        >>> window_length(1024, None), window_length(131072, None), window_length(1024, 512)
        (1024, 2048, 512)
    """
    return min(DEFAULT_LENGTH, config_limit or DEFAULT_LENGTH) if wanted is None else wanted


def split_windows(windows: Windows, *, calibration: int = 8) -> tuple[Windows, torch.Tensor]:
    """Windows to score, and the last ones of the same text to calibrate on, at most a quarter of all.

    Raises:
        UsageError: there are fewer than two windows.
    """
    count = len(windows.ids)
    if count < 2:
        raise UsageError(
            "Calibrating needs a window of text beside those that are scored. Use shorter windows (--length)."
        )
    aside = max(1, min(calibration, count // 4))
    return replace(windows, ids=windows.ids[:-aside]), windows.ids[-aside:]


def check_length(length: int, limit: int | None, name: str) -> None:
    """Refuses windows that are too short to predict a token, or longer than the model takes.

    Args:
        length: tokens per window.
        limit: longest sequence that the model takes; None where it has no limit.
        name: the model.

    Raises:
        UsageError: the length is out of range.
    """
    if length < 2:
        raise UsageError(f"The window length is {length}; it must be 2 or more: the first token is never predicted.")
    if limit is not None and length > limit:
        raise UsageError(
            f"The window length is {length}, but {name} takes at most {limit} tokens. Use {limit} or less."
        )


def _start(tokenizer: Any, bos: bool) -> list[int]:
    if bos and tokenizer.bos_token_id is None:
        raise UsageError(
            "The tokenizer has no beginning-of-sequence token to start a window with. Use windows without it."
        )
    return [tokenizer.bos_token_id] if bos else []


def _tokens(text: Text, tokenizer: Any, wanted: int | None) -> torch.Tensor:
    """Token ids of the text [tokens]; stops after the piece that completes the `wanted` first ones."""
    found: list[torch.Tensor] = []
    for piece in _pieces(text.whole):
        ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]  # verbose warns of long sequences
        found.append(torch.tensor(ids, dtype=torch.int64))
        if wanted is not None and sum(map(len, found)) >= wanted:
            break
    return torch.cat(found)


def _pieces(text: str) -> Iterator[str]:
    """Cuts after the first newline that follows so many characters; a text without newlines stays whole."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _PIECE_CHARACTERS) + 1 or len(text)
        yield text[start:end]
        start = end


def _too_short(text: Text, length: int, available: int) -> str:
    fits = f"Use a length of at most {available}, or a longer text." if available >= 2 else "Give a longer text."
    return f"{text.name} fills only {available} of the {length} tokens of one window. {fits}"


def _check_vocabulary(ids: torch.Tensor, text: Text, tokenizer: Any, vocabulary: int) -> None:
    highest = int(ids.max())
    if highest >= vocabulary:
        raise UsageError(
            f"Tokenising {text.name} gives token id {highest} ({tokenizer.decode([highest])!r}), but the model has ids 0 to "
            f"{vocabulary - 1}. The tokenizer belongs to another model."
        )


def _digest(text: Text, ids: torch.Tensor, bos: bool) -> str:
    described = f"{text.digest} {ids.shape[1]} {bos} ".encode()
    return f"sha256:{sha256(described + ids.numpy().astype('<i8').tobytes()).hexdigest()}"
