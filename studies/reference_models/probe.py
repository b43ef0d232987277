"""What a model in training holds: the largest stream values, the scalars that make them, and what removing them costs.

Everything is measured at one place: the token and channel of the largest residual value of the probe sequences.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Scalar = tuple[int, int, int]  # layer, row, col


def named(scalar: Scalar) -> str:
    """`LAYER:ROW:COL`."""
    return ":".join(map(str, scalar))


@torch.no_grad()
def token_nll(model: nn.Module, windows: Tensor, *, batch: int = 16) -> Tensor:
    """Mean nats of each window, [windows]."""
    means = []
    for ids in windows.split(batch):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        nll = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        means.append(nll.view(len(ids), -1).mean(1))
    return torch.cat(means)


@contextmanager
def zeroed(model: Any, scalars: list[Scalar]) -> Iterator[None]:
    """The model with some scalars of its down projections at zero; the old values return bit for bit."""
    held = []
    for layer, row, col in scalars:
        weight = model.model.layers[layer].mlp.down_proj.weight.data
        held.append((weight, row, col, weight[row, col].clone()))
        weight[row, col] = 0
    try:
        yield
    finally:
        for weight, row, col, value in reversed(held):
            weight[row, col] = value


@contextmanager
def channel_zeroed(model: Any, channel: int) -> Iterator[None]:
    """The model with one channel of the first token at zero after every layer: the super activation removed."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden.clone()
        hidden[:, 0, channel] = 0
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with ExitStack() as stack:
        for layer in model.model.layers:
            stack.callback(layer.register_forward_hook(hook).remove)
        yield


@torch.no_grad()
def recorded(model: Any, windows: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Residual stream after every layer and input of every down projection; [windows, tokens, channels] each."""
    residuals: list[Tensor] = []
    inputs: list[Tensor] = []
    with ExitStack() as stack:
        for layer in model.model.layers:
            keep_output = lambda _m, _i, o: residuals.append(o[0] if isinstance(o, tuple) else o)  # noqa: E731
            keep_input = lambda _m, i: inputs.append(i[0])  # noqa: E731
            stack.callback(layer.register_forward_hook(keep_output).remove)
            stack.callback(layer.mlp.down_proj.register_forward_pre_hook(keep_input).remove)
        model(input_ids=windows, use_cache=False)
    return residuals, inputs


@torch.no_grad()
def sink_share(model: Any, windows: Tensor) -> list[float]:
    """Mean attention to the first token, of the queries of the second half of each window; one per layer."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    attentions = model(input_ids=windows, use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation(before)
    return [a[:, :, a.shape[2] // 2 :, 0].mean().item() for a in attentions]


def probe(model: Any, windows: Tensor, *, singles: int = 6, sets: tuple[int, ...] = (2, 4, 8)) -> dict[str, Any]:
    """One record of a model: peaks by layer, the largest scalar products at the peak, and perplexity ratios on `windows`."""
    model.eval()
    base = token_nll(model, windows)
    few = windows[:4]
    residuals, inputs = recorded(model, few)
    peaks = [r.abs().amax().item() for r in residuals]
    onset = max(range(len(peaks) - 1), key=lambda layer: peaks[layer])
    flat = residuals[onset].abs().flatten().argmax().item()
    window, token, channel = (int(i) for i in torch.unravel_index(torch.tensor(flat), residuals[onset].shape))
    products: list[tuple[float, Scalar, float, float]] = []
    for layer, x in enumerate(inputs):
        weight = model.model.layers[layer].mlp.down_proj.weight
        product = weight.float() * x[window, token].float()
        for index in product.abs().flatten().topk(8).indices.tolist():
            row, col = divmod(index, product.shape[1])
            entry = (product[row, col].item(), (layer, row, col), weight[row, col].item(), x[window, token, col].item())
            products.append(entry)
    products.sort(key=lambda entry: -abs(entry[0]))
    ratio = lambda: math.exp((token_nll(model, windows) - base).mean().item())  # noqa: E731
    effects = {}
    for _, scalar, _, _ in products[:singles]:
        with zeroed(model, [scalar]):
            effects[named(scalar)] = ratio()
    for count in sets:
        with zeroed(model, [scalar for _, scalar, _, _ in products[:count]]):
            effects[f"largest {count}"] = ratio()
    with channel_zeroed(model, channel):
        effects["super activation"] = ratio()
    return {
        "nll_nats": base.mean().item(),
        "token": token,
        "channel": channel,
        "peaks": peaks,
        "at_first": [r[:, 0].abs().amax().item() for r in residuals],
        "elsewhere": [r[:, 1:].abs().amax().item() for r in residuals],
        "medians": [r.abs().median().item() for r in residuals],
        "in_channel": [r[window, token, channel].item() for r in residuals],
        "products": [{"scalar": named(s), "product": p, "weight": w, "x": x} for p, s, w, x in products[:12]],
        "ratios": effects,
        "sink": sink_share(model, few),
    }
