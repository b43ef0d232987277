"""What a model writes: its most likely continuation of a prompt."""

import torch

from superweights.measurements.next_token import encode
from superweights.model.loading import LoadedModel


def continue_text(model: LoadedModel, prompt: str, *, tokens: int = 24) -> str:
    """The text that the model puts after a prompt, the most likely token at each step; it ends early where the model ends it.

    Every step runs the whole text again, so edits of weights and activations act as they do in any other pass.

    Args:
        model: the model; edits that are in force count.
        prompt: what to continue.
        tokens: at most so many new tokens.

    Raises:
        UsageError: there is no tokenizer, or the prompt gives no token.
    """
    start = encode(model, prompt)
    ids, ends = list(start), end_tokens(model)
    for _ in range(tokens):
        states = model.states(torch.tensor([ids]))
        following = int(model.logits(states[:, -1:]).argmax())
        if following in ends:
            break
        ids.append(following)
    before, after = (model.tokenizer.decode(each, clean_up_tokenization_spaces=False) for each in (start, ids))
    return str(after[len(before) :])  # the new tokens alone would lose the space in front of the first


def end_tokens(model: LoadedModel) -> set[int]:
    """The tokens that end a text, by the model's config and by its tokenizer."""
    config = model.model.config.get_text_config(decoder=True)
    sources = (getattr(model.model, "generation_config", None), config, model.tokenizer)
    ends = [getattr(each, "eos_token_id", None) for each in sources]
    return {token for each in ends for token in (each if isinstance(each, list) else [each]) if token is not None}
