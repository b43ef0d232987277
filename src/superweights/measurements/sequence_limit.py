"""How many tokens a model takes, by its config."""

from superweights.model.loading import LoadedModel

_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length", "max_target_positions")


def longest_sequence(model: LoadedModel) -> int | None:
    """How many tokens the model takes by its config; None where the config sets no limit."""
    config = model.model.config.get_text_config(decoder=True)
    limits = (getattr(config, name, None) for name in _NAMES)
    return next((each for each in limits if isinstance(each, int) and each > 0), None)
