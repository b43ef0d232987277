"""Windows of a text for one model: how many tokens it takes, and whether its windows start with a token of their own."""

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

_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length", "max_target_positions")


def longest_sequence(model: LoadedModel) -> int | None:
    """How many tokens the model takes by its config; None where the config sets no limit."""
    config = model.model.config.get_text_config(decoder=True)
    limits = (getattr(config, name, None) for name in _NAMES)
    return next((each for each in limits if isinstance(each, int) and each > 0), None)


def open_windows(
    model: LoadedModel,
    text: str = DEFAULT_TEXT,
    *,
    windows: int = 32,
    length: int | None = None,
    at_most: int = DEFAULT_LENGTH,
) -> Windows:
    """Reads a text and cuts it into windows for a model, each with the beginning-of-sequence token if its tokenizer says so.

    Args:
        model: says how many tokens it takes, and tokenises.
        text: a known text, or a file; see `read_text`.
        windows: take at most so many, the first ones.
        length: tokens per window; None for `at_most`, or what the model takes where that is less.
        at_most: longest window where no length is given.

    Raises:
        UnknownNameError: there is no such text.
        UsageError: the text or the model cannot be measured so.
        HubError: the text cannot be fetched.
    """
    limit = longest_sequence(model)
    chosen = length if length is not None else min(window_length(limit, None), at_most)
    check_length(chosen, limit, model.name)
    return make_windows(
        read_text(text),
        model.tokenizer,
        length=chosen,
        limit=windows,
        bos=default_bos(model.tokenizer),
        vocabulary=model.model.get_input_embeddings().weight.shape[0],
    )
