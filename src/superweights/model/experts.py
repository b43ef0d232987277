"""Packed experts: routed feed-forward matrices that live in one parameter, [experts, ...].

transformers keeps no module per expert, so a hook has nothing to hold on to. The forward passes here stand in for theirs,
compute expert by expert, and tell an observer what went in and came out of each down projection.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from superweights.model.widening import WideProducts

ExpertObserver = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Called with expert, token indices [n], inputs [n, cols], outputs [n, rows] and routing weights [n].

The outputs are those of the down projection alone; what reaches the residual stream is outputs * routing weights.
"""
ExpertCorrector = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Called before the observer with expert, token indices [n], inputs [n, cols] and outputs [n, rows], which it may change."""


def is_routed(module: nn.Module) -> bool:
    """Whether the module holds packed experts that transformers routes by index (its experts interface)."""
    return all(
        hasattr(module, name) for name in ("_apply_gate", "is_transposed", "has_gate", "down_proj", "num_experts")
    )


def is_batched(module: nn.Module) -> bool:
    """Whether the module holds packed experts that each see every token, scaled before (Llama 4)."""
    up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    return (
        not is_routed(module)
        and isinstance(up, nn.Parameter)
        and isinstance(down, nn.Parameter)
        and up.ndim == down.ndim == 3
        and up.shape[2] == 2 * down.shape[1]
        and up.shape[1] == down.shape[2]
    )


def install_observed_experts(module: nn.Module, products: WideProducts) -> None:
    """Makes the experts compute in float32, and call `module.corrector` and `module.observer` where they are not None."""
    module.observer = module.corrector = None  # type: ignore[assignment]
    forward = _routed_forward if is_routed(module) else _batched_forward
    module.forward = partial(forward, module, products)


def remove_observed_experts(module: nn.Module) -> None:
    """Gives the experts their own forward pass back."""
    del module.forward, module.observer, module.corrector


def _routed_forward(
    module: Any, products: WideProducts, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for expert in torch.unique(top_k_index).tolist():
        if expert >= module.num_experts:  # the slot of a token that goes to no expert
            continue
        tokens, slots = torch.where(top_k_index == expert)
        routing = top_k_weights[tokens, slots].float()  # [n]
        inputs = _expert_inputs(module, products, hidden[tokens], expert)  # [n, cols]
        outputs = _with_bias(
            module,
            "down_proj_bias",
            expert,
            products.product(inputs, module.down_proj[expert], transposed=module.is_transposed),
        )
        if module.corrector is not None:
            module.corrector(expert, tokens, inputs, outputs)
        if module.observer is not None:
            module.observer(expert, tokens, inputs, outputs, routing)
        if getattr(module, "has_post_expert_norm", False):
            outputs = module.post_expert_norm(outputs)
        total.index_add_(0, tokens, outputs * routing[:, None])
    return total.to(hidden.dtype)


def _expert_inputs(module: Any, products: WideProducts, hidden: torch.Tensor, expert: int) -> torch.Tensor:
    name = "gate_up_proj" if module.has_gate else "up_proj"
    up = products.product(hidden, getattr(module, name)[expert], transposed=module.is_transposed)
    up = _with_bias(module, f"{name}_bias", expert, up)
    inputs: torch.Tensor = module._apply_gate(up) if module.has_gate else module.act_fn(up)
    return inputs


def _with_bias(module: Any, name: str, expert: int, outputs: torch.Tensor) -> torch.Tensor:
    return outputs + getattr(module, name)[expert] if module.has_bias else outputs


def _batched_forward(module: Any, products: WideProducts, hidden: torch.Tensor) -> torch.Tensor:
    experts = module.down_proj.shape[0]
    per_expert = hidden.view(experts, -1, hidden.shape[-1])  # [experts, tokens, hidden], scaled by the routing before
    tokens = torch.arange(per_expert.shape[1], device=hidden.device)
    outputs = torch.empty(per_expert.shape, dtype=torch.float32, device=hidden.device)
    for expert in range(experts):
        gate, up = products.product(per_expert[expert], module.gate_up_proj[expert], transposed=True).chunk(2, dim=-1)
        inputs = up * module.act_fn(gate)
        outputs[expert] = products.product(inputs, module.down_proj[expert], transposed=True)
        if module.corrector is not None:
            module.corrector(expert, tokens, inputs, outputs[expert])
        if module.observer is not None:
            module.observer(expert, tokens, inputs, outputs[expert], torch.ones_like(tokens, dtype=torch.float32))
    return outputs.view(-1, outputs.shape[-1]).to(hidden.dtype)
