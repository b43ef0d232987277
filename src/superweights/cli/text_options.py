"""What every verb that measures on text asks: which text, how much of it, in windows of what length."""

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from superweights.measurements.model_windows import open_windows as cut
from superweights.measurements.texts import DEFAULT_TEXT
from superweights.measurements.windows import DEFAULT_LENGTH, Windows
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
    """Tokens per window. By default 2048 (verify 512, sinks 256), or as many as the model takes where that is less."""


DEFAULT_TEXT_OPTIONS = TextOptions()
"""What a verb measures on when nothing is said."""


def open_windows(model: LoadedModel, options: TextOptions, *, at_most: int = DEFAULT_LENGTH) -> Windows:
    """Reads the text and cuts it into windows.

    Args:
        model: says how many tokens it takes, and tokenises.
        options: text, number and length.
        at_most: longest window where the options name no length.
    """
    return cut(model, options.text, windows=options.windows, length=options.length, at_most=at_most)
