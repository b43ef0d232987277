"""What every verb that measures on text asks: which text, how much of it, in windows of what length."""

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from superweights.measurements.sequence_limit import longest_sequence
from superweights.measurements.texts import DEFAULT_TEXT, read_text
from superweights.measurements.windows import (
    DEFAULT_LENGTH,
    Windows,
    check_length,
    default_bos,
    make_windows,
    window_length,
)
from superweights.model.loading import LoadedModel


@Parameter(name="*", negative=())
@dataclass(frozen=True, slots=True)
class TextOptions:
    """What is measured on."""

    text: Annotated[str, Parameter(metavar="TEXT")] = DEFAULT_TEXT
    """Text to measure on: heldout (passages of books, comes with the package), wikitext2, c4 or lambada (from the Hub), or a
    file: .jsonl, .json, .parquet (FILE::FIELD takes another field than "text") or plain text."""
    windows: int = 32
    """Measure on at most so many windows, the first ones of the text."""
    length: int | None = None
    """Tokens per window. By default 2048, or as many as the model takes where that is less."""


DEFAULT_TEXT_OPTIONS = TextOptions()
"""What a verb measures on when nothing is said."""


def open_windows(model: LoadedModel, options: TextOptions, *, at_most: int = DEFAULT_LENGTH) -> Windows:
    """Reads the text and cuts it into windows, which start with the beginning-of-sequence token if the tokenizer says so.

    Args:
        model: says how many tokens it takes, and tokenises.
        options: text, number and length.
        at_most: longest window where the options name no length.

    Raises:
        UnknownNameError: there is no such text.
        UsageError: the text or the model cannot be measured so.
        HubError: the text cannot be fetched.
    """
    limit = longest_sequence(model)
    length = window_length(limit, options.length)
    if options.length is None:
        length = min(length, at_most)
    check_length(length, limit, model.name)
    return make_windows(
        read_text(options.text),
        model.tokenizer,
        length=length,
        limit=options.windows,
        bos=default_bos(model.tokenizer),
        vocabulary=model.model.get_input_embeddings().weight.shape[0],
    )
