"""Plants structure in a tiny Llama with precision: a neuron that fires at chosen tokens only, and weights that carry it on."""

from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedModel

from superweights.coordinates import Coordinate
from superweights.detection.search import Findings, default_prompts, find
from superweights.model.loading import load
from superweights.model.prompts import Prompt, as_batch
from superweights.testing import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
Where = Callable[[Prompt, int], bool]
"""Says at which token of which prompt a neuron fires."""
GATE = 10.0
"""Gate before its activation: silu(10) = 10, silu(-10) = 0 as far as any threshold goes."""


def quiet_llama(*, seed: int = 0, layers: int = 6) -> PreTrainedModel:
    """A tiny Llama whose stream is the token embedding and little else: median |stream| about 0.7 after every layer."""
    model = tiny_model("llama", seed=seed, layers=layers)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(50)
    return model


def prompts_of(model: PreTrainedModel, *texts: str) -> tuple[Prompt, ...]:
    with load(model, tokenizer=TOKENIZER) as loaded:
        return default_prompts(loaded, texts)


def search(model: PreTrainedModel, *texts: str, **options: object) -> Findings:
    """Finds in a model in memory, with the default prompts and any further texts."""
    with load(model, tokenizer=TOKENIZER) as loaded:
        return find(loaded, prompts=default_prompts(loaded, texts), **options)


def coordinates(findings: Findings) -> list[str]:
    return sorted(str(each.coordinate) for each in findings.candidates)


def at(text: str) -> Where:
    """Fires at every token with this text."""
    return lambda prompt, token: prompt.token_texts[token] == text


def mlp_inputs(model: PreTrainedModel, layer: int, prompts: tuple[Prompt, ...]) -> torch.Tensor:
    """What gate and up of a layer take in, [positions, hidden], padding left out."""
    seen: list[torch.Tensor] = []
    hook = model.model.layers[layer].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    ids, real = as_batch(prompts)
    with load(model, tokenizer=TOKENIZER) as loaded:
        loaded.run(ids, attention_mask=real.long(), last_layer=layer)
    hook.remove()
    return seen[0][real]


@torch.no_grad()
def fire(
    model: PreTrainedModel,
    where: Where,
    *,
    layer: int,
    col: int,
    size: float,
    texts: tuple[str, ...] = (),
    detail: float = 1e-2,
) -> None:
    """Makes neuron `col` of a layer give `size` at the chosen tokens and nothing elsewhere, and its column nearly silent.

    Args:
        model: a tiny Llama.
        where: the tokens.
        layer: decoder layer.
        col: the neuron.
        size: input of the down projection at these tokens, with its sign.
        texts: prompts besides the default ones.
        detail: how faint a direction of the inputs may be used to tell tokens apart, of the strongest one.
    """
    prompts = prompts_of(model, *texts)
    inputs = mlp_inputs(model, layer, prompts)
    chosen = torch.tensor([where(prompt, token) for prompt in prompts for token in range(len(prompt.token_ids))])
    set_neuron(model, inputs, chosen, layer=layer, col=col, size=size, detail=detail)


@torch.no_grad()
def set_neuron(
    model: PreTrainedModel,
    inputs: torch.Tensor,
    chosen: torch.Tensor,
    *,
    layer: int,
    col: int,
    size: float,
    detail: float = 1e-2,
) -> None:
    """Sets gate and up of a neuron by least squares on `inputs` [n, hidden]: on where `chosen` [n], off elsewhere."""
    assert chosen.any(), "no token is chosen"
    targets = torch.stack([torch.where(chosen, GATE, -GATE), torch.where(chosen, size / GATE, 0.0)], dim=1)
    rows = torch.linalg.lstsq(inputs, targets, rcond=detail, driver="gelsd").solution  # [hidden, 2]
    mlp = model.model.layers[layer].mlp
    mlp.gate_proj.weight[col], mlp.up_proj.weight[col] = rows[:, 0], rows[:, 1]
    mlp.down_proj.weight[:, col] *= 1e-3


@torch.no_grad()
def set_weights(model: PreTrainedModel, weights: Mapping[str, float]) -> None:
    """Sets scalars of down projections, by coordinate text."""
    for text, value in weights.items():
        coordinate = Coordinate.parse(text)
        model.model.layers[coordinate.layer].mlp.down_proj.weight[coordinate.row, coordinate.col] = value
