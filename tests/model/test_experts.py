"""Our packed experts against transformers' own forward pass, and what the observer hears."""

from typing import Any

import pytest
import torch
from torch import nn

from superweights.model import experts
from superweights.model.architecture import read_architecture
from superweights.model.widening import WideProducts
from superweights.testing import tiny_model

ROUTED = ["mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe", "nemotron_h"]
FAMILIES = [*ROUTED, "llama4_text"]
TOKENS, EXPERTS, HIDDEN = 9, 4, 64


def experts_of(family: str, *, dtype: torch.dtype = torch.float32) -> Any:
    """The packed experts of one layer, with large random weights and biases; transformers runs them one by one."""
    model = tiny_model(family)
    model.set_experts_implementation("eager")
    projection = next(each for each in read_architecture(model).down_projections if each.experts)
    module = model.get_submodule(projection.module)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.to(dtype)


def arguments_of(family: str) -> tuple[torch.Tensor, ...]:
    """What the experts' forward takes; no token goes to expert 1."""
    generator = torch.Generator().manual_seed(4)
    if family == "llama4_text":
        return (torch.randn(EXPERTS * TOKENS, HIDDEN, generator=generator),)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    scores = torch.rand(TOKENS, EXPERTS, generator=generator)
    scores[:, 1] = 0
    weights, index = scores.topk(2)
    return hidden, index, weights


class Heard:
    """An observer that keeps what it hears."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def __call__(self, *call: Any) -> None:
        self.calls.append(tuple(each.clone() if isinstance(each, torch.Tensor) else each for each in call))  # type: ignore[arg-type]


def installed(module: Any) -> Heard:
    experts.install_observed_experts(module, WideProducts(1))
    module.observer = Heard()
    return module.observer


@pytest.mark.parametrize("family", FAMILIES)
def test_kinds_are_told_apart(family):
    module = experts_of(family)
    assert experts.is_routed(module) == (family in ROUTED)
    assert experts.is_batched(module) == (family == "llama4_text")


def test_other_modules_hold_no_packed_experts():
    for module in [*tiny_model("llama").modules(), nn.Linear(2, 2)]:
        assert not experts.is_routed(module)
        assert not experts.is_batched(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_outputs_are_those_of_transformers(family, dtype):
    module, arguments = experts_of(family, dtype=dtype), arguments_of(family)
    reference = experts_of(family, dtype=dtype).float()(*arguments)
    installed(module)
    # The same products in float32; only the order of the sums over experts may differ.
    torch.testing.assert_close(module(*arguments), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_outputs_have_the_dtype_of_the_hidden_states(family):
    module, (hidden, *rest) = experts_of(family, dtype=torch.bfloat16), arguments_of(family)
    installed(module)
    assert module(hidden.bfloat16(), *rest).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ROUTED)
@torch.no_grad()
def test_observer_hears_every_routed_token_once(family):
    module, (hidden, index, weights) = experts_of(family), arguments_of(family)
    heard = installed(module)
    module(hidden, index, weights)
    assert [call[0] for call in heard.calls] == [0, 2, 3]
    for expert, tokens, inputs, outputs, routing in heard.calls:
        slots = {(token, slot) for token, slot in (index == expert).nonzero().tolist()}
        assert sorted(tokens.tolist()) == sorted(token for token, _ in slots)
        assert routing.tolist() == [weights[token, slot].item() for token, slot in sorted(slots)]
        assert inputs.shape == (len(slots), module.down_proj.shape[1 if module.is_transposed else 2])
        assert outputs.shape == (len(slots), HIDDEN)


@pytest.mark.parametrize("family", ROUTED)
@torch.no_grad()
def test_observed_outputs_times_routing_are_the_whole_output(family):
    module, arguments = experts_of(family), arguments_of(family)
    heard = installed(module)
    found = module(*arguments)
    total = torch.zeros(TOKENS, HIDDEN)
    for _, tokens, _, outputs, routing in heard.calls:
        for place, token in enumerate(tokens.tolist()):
            total[token] += outputs[place] * routing[place]
    torch.testing.assert_close(total, found)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_observed_outputs_are_the_down_projection_of_the_inputs(family):
    module = experts_of(family)
    heard = installed(module)
    module(*arguments_of(family))
    transposed = getattr(module, "is_transposed", True)
    for expert, _, inputs, outputs, _ in heard.calls:
        weight = module.down_proj[expert].t() if transposed else module.down_proj[expert]  # [rows, cols]
        bias = module.down_proj_bias[expert] if getattr(module, "has_bias", False) else 0
        torch.testing.assert_close(outputs, inputs @ weight.t() + bias)


@torch.no_grad()
def test_batched_experts_see_every_token_with_weight_one():
    module, (hidden,) = experts_of("llama4_text"), arguments_of("llama4_text")
    heard = installed(module)
    found = module(hidden).view(EXPERTS, TOKENS, HIDDEN)
    assert [call[0] for call in heard.calls] == list(range(EXPERTS))
    for expert, tokens, _, outputs, routing in heard.calls:
        assert tokens.tolist() == list(range(TOKENS))
        assert routing.tolist() == [1.0] * TOKENS
        assert torch.equal(outputs, found[expert])


@torch.no_grad()
def test_a_slot_that_goes_to_no_expert_adds_nothing():
    module, (hidden, index, weights) = experts_of("mixtral"), arguments_of("mixtral")
    reference = experts_of("mixtral")
    index[:, 1] = EXPERTS
    heard = installed(module)
    torch.testing.assert_close(module(hidden, index, weights), reference(hidden, index, weights), rtol=1e-5, atol=1e-5)
    assert {call[0] for call in heard.calls} <= set(range(EXPERTS))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_no_observer_no_difference(family):
    module, arguments = experts_of(family), arguments_of(family)
    installed(module)
    observed = module(*arguments)
    module.observer = None
    assert torch.equal(module(*arguments), observed)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_removal_gives_the_class_its_forward_back(family):
    module, arguments = experts_of(family), arguments_of(family)
    own = module(*arguments)
    before = set(vars(module))
    installed(module)
    assert set(vars(module)) == before | {"forward", "observer", "corrector"}
    experts.remove_observed_experts(module)
    assert set(vars(module)) == before
    assert module.forward.__func__ is type(module).forward
    assert torch.equal(module(*arguments), own)
