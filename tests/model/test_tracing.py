"""A trace against plain loops over what hooks see, and against weights and families it must refuse."""

import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lively_models import lively_model
from safetensors.torch import load_file, save_file
from torch import nn

import superweights as sw
from superweights.coordinates import Coordinate
from superweights.detection.search import default_prompts
from superweights.errors import ModelError, NonFiniteWeightsError, UnsupportedArchitectureError, UsageError
from superweights.model import tracing
from superweights.model.loading import LoadedModel
from superweights.model.prompts import Prompt
from superweights.model.tracing import JUMP_RATIO, Trace, trace
from superweights.testing import tiny_model, tiny_tokenizer

RESIDENCIES = ["resident", "streamed"]
# One of each way to hold a down projection.
KINDS = ["llama", "gpt2", "mixtral", "qwen2_moe", "gpt_oss", "llama4_text", "deepseek_v3"]
Peaks = dict[tuple[str, int | None, str], tuple[float, int, int, int]]


@contextmanager
def in_memory(family: str, *, dtype: torch.dtype = torch.float32) -> Iterator[tuple[LoadedModel, tuple[Prompt, ...]]]:
    with sw.load(lively_model(family, dtype=dtype), tokenizer=tiny_tokenizer()) as model:
        yield model, default_prompts(model)


def projected(module: Any, expert: int | None, inputs: torch.Tensor) -> torch.Tensor:
    """Output of a down projection for one token, written out anew: [rows]."""
    if expert is None:
        return module(inputs)
    matrix = module.down_proj[expert]  # [rows, cols] or [cols, rows]
    output = inputs @ matrix if getattr(module, "is_transposed", True) else matrix @ inputs
    return output + module.down_proj_bias[expert] if getattr(module, "has_bias", False) else output


def gated(module: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """Input of an expert's down projection for one token: [cols]."""
    matrix = module.gate_up_proj[expert]
    both = hidden @ matrix if getattr(module, "is_transposed", True) else matrix @ hidden
    if getattr(module, "has_bias", False):
        both = both + module.gate_up_proj_bias[expert]
    if hasattr(module, "_apply_gate"):
        return module._apply_gate(both)
    gate, up = both.chunk(2)
    return module.act_fn(gate) * up


def uses_of(
    module: Any, args: tuple[torch.Tensor, ...], cols: int
) -> Iterator[tuple[int | None, int, torch.Tensor, float]]:
    """Every use of a down projection in one call: expert, token, input [cols] and routing weight."""
    if isinstance(getattr(module, "down_proj", None), nn.Parameter):
        if len(args) == 1:  # Llama 4: every expert sees every token
            for expert, tokens in enumerate(args[0].view(len(module.down_proj), -1, args[0].shape[-1])):
                for token, hidden in enumerate(tokens):
                    yield expert, token, gated(module, expert, hidden), 1.0
            return
        hidden, index, weights = args
        for token in range(hidden.shape[0]):
            for expert, weight in zip(index[token].tolist(), weights[token].tolist(), strict=True):
                yield expert, token, gated(module, expert, hidden[token]), weight
        return
    for token, inputs in enumerate(args[0].reshape(-1, cols)):
        yield None, token, inputs, 1.0


@torch.no_grad()
def oracle_peaks(model: LoadedModel, prompts: tuple[Prompt, ...]) -> Peaks:
    """Runs each prompt alone and looks at one token at a time."""
    peaks: Peaks = {}
    calls: list[tuple[Any, tuple[torch.Tensor, ...]]] = []
    with ExitStack() as stack:
        for projection in model.architecture.down_projections:
            module = model.model.get_submodule(projection.module)
            hook = module.register_forward_pre_hook(lambda *call, each=projection: calls.append((each, call[1])))
            stack.callback(hook.remove)
        for number, prompt in enumerate(prompts):
            calls.clear()
            model.run(torch.tensor([prompt.token_ids]))
            for projection, args in list(calls):
                module = model.model.get_submodule(projection.module)
                for expert, token, inputs, routing in uses_of(module, args, projection.cols):
                    sides = {"input": inputs, "output": projected(module, expert, inputs) * routing}
                    for side, values in sides.items():
                        channel = int(values.abs().argmax())
                        key = (projection.module, expert, side)
                        if key not in peaks or abs(values[channel]) > abs(peaks[key][0]):
                            peaks[key] = (values[channel].item(), channel, number, token)
    return peaks


@pytest.mark.parametrize("family", KINDS)
def test_peaks_are_those_of_a_plain_loop(family):
    with in_memory(family) as (model, prompts):
        found = trace(model, prompts[:3]).peaks
        expected = oracle_peaks(model, prompts[:3])
    assert len(found) == len(expected)
    for peak in found:
        value, channel, prompt, token = expected[peak.module, peak.expert, peak.side]
        assert peak.value == pytest.approx(value, rel=1e-4)  # padding changes the order of sums in attention
        assert (peak.channel, peak.prompt, peak.token) == (channel, prompt, token)
        assert peak.module.startswith(model.architecture.layer_name(peak.layer) + ".")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "gpt_oss", "bloom", "mpt", "falcon"])
def test_a_padded_batch_is_each_prompt_alone(family):
    with in_memory(family) as (model, prompts):
        whole = trace(model, prompts)
        assert len({len(each.token_ids) for each in prompts}) > 1
        for number, prompt in enumerate(prompts):
            here = [index for index, (owner, _) in enumerate(whole.positions) if owner == number]
            alone = trace(model, [prompt])
            assert [whole.positions[each][1] for each in here] == list(range(len(prompt.token_ids)))
            # Padding changes the order of sums in attention, nothing else.
            largest = alone.stream.abs().max().item()
            torch.testing.assert_close(whole.stream[:, here], alone.stream, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "opt"])
@torch.no_grad()
def test_the_stream_is_what_transformers_calls_hidden_states(family, dtype):
    """Taken before the trace, from the user's own model; the last of theirs is behind the final norm."""
    model = lively_model(family, dtype=dtype)
    model.set_experts_implementation("eager")
    prompt = default_prompts_of(model)[0]
    theirs = model(torch.tensor([prompt.token_ids]), output_hidden_states=True).hidden_states
    with sw.load(model, tokenizer=tiny_tokenizer()) as loaded:
        found = trace(loaded, [prompt])
    assert found.stream.dtype == torch.float32
    assert {value.dtype for value in model.parameters()} == {dtype}
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6  # experts compute in float32, transformers' in bfloat16
    for ours, their in zip(found.stream[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(ours, their[0].float(), rtol=tolerance, atol=tolerance * their.abs().max().item())


def default_prompts_of(model: Any) -> tuple[Prompt, ...]:
    with sw.load(model, tokenizer=tiny_tokenizer()) as loaded:
        return default_prompts(loaded)


def test_a_trace_describes_itself():
    with in_memory("llama") as (model, prompts):
        found = trace(model, prompts)
    assert found.prompts == prompts
    assert found.positions == tuple((number, token) for number, prompt in enumerate(prompts)
                                    for token in range(len(prompt.token_ids)))  # fmt: skip
    assert found.stream.shape == (7, len(found.positions), 64)
    assert (found.layers_run, found.complete) == (6, True)
    assert found.medians.tolist() == [each.abs().flatten().median().item() for each in found.stream]


def jumps_with_all_terms(family: str, monkeypatch: pytest.MonkeyPatch) -> tuple[LoadedModel, Trace]:
    monkeypatch.setattr(tracing, "_TERMS_PER_JUMP", 10_000)
    with in_memory(family) as (model, prompts):
        return model, trace(model, prompts)


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2_moe", "llama4_text", "deepseek_v3"])
def test_all_terms_of_a_jump_sum_to_its_output(family, monkeypatch):
    """In families without a bias; with all terms kept."""
    _, found = jumps_with_all_terms(family, monkeypatch)
    assert found.jumps
    for jump in found.jumps:
        assert math.fsum(each.product for each in jump.terms) == pytest.approx(jump.output, rel=1e-4, abs=1e-4)
        assert [abs(each.product) for each in jump.terms] == sorted(
            (abs(each.product) for each in jump.terms), reverse=True
        )


@pytest.mark.parametrize("family", KINDS)
def test_terms_are_stored_weights_times_inputs(family, monkeypatch):
    model, found = jumps_with_all_terms(family, monkeypatch)
    for term in (term for jump in found.jumps[:3] for term in jump.terms[:20]):
        projection = model.architecture.locate(term.coordinate)
        assert term.module == projection.module
        stored = model.model.get_parameter(projection.name)[projection.index(term.coordinate)]
        assert term.weight == stored.item()
        if term.coordinate.expert is None or family == "llama4_text":  # no routing weight behind the projection
            assert term.product == pytest.approx(term.weight * term.input)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_terms_of_one_expert_share_its_routing_weight(family, monkeypatch):
    _, found = jumps_with_all_terms(family, monkeypatch)
    for jump in found.jumps[:3]:
        routed = [each for each in jump.terms if each.coordinate.expert is not None]
        for expert in {each.coordinate.expert for each in routed}:
            ratios = [each.product / (each.weight * each.input) for each in routed
                      if each.coordinate.expert == expert and abs(each.product) > 1e-4]  # fmt: skip
            assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-4)
            assert ratios[0] not in (0.0, 1.0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_jumps_are_the_large_changes_of_the_stream(family):
    with in_memory(family) as (model, prompts):
        found = trace(model, prompts)
    assert found.jumps
    for jump in found.jumps:
        assert jump.before == found.stream[jump.layer, jump.position, jump.channel].item()
        assert jump.after == found.stream[jump.layer + 1, jump.position, jump.channel].item()
        assert abs(jump.after) > abs(jump.before)
        assert abs(jump.after - jump.before) > JUMP_RATIO * found.medians[jump.layer + 1].item()
        assert len(jump.terms) == 8
        assert all(term.coordinate.row == jump.channel and term.coordinate.layer == jump.layer for term in jump.terms)
    for layer in range(6):
        grown = found.stream[layer + 1].abs() > found.stream[layer].abs()
        change = (found.stream[layer + 1] - found.stream[layer]).abs() * grown
        large = int((change > JUMP_RATIO * found.medians[layer + 1]).sum())
        assert len([each for each in found.jumps if each.layer == layer]) == min(large, 64)


def test_a_weight_that_leads_its_jump_is_the_first_term():
    with in_memory("llama") as (model, prompts):
        jump = max(trace(model, prompts).jumps, key=lambda each: abs(each.after))
    assert jump.terms[0].coordinate == Coordinate(1, None, 3, 5)
    assert jump.terms[0].weight == 40.0
    assert abs(jump.output) > 5 * jump.output_median


def test_edits_count():
    with in_memory("llama") as (model, prompts):
        with model.edited({Coordinate(1, None, 3, 5): 0.0}):
            edited = trace(model, prompts)
        whole = trace(model, prompts)
    assert torch.equal(edited.stream[:2], whole.stream[:2])
    assert edited.stream[2, :, 3].abs().max() < 0.1 * whole.stream[2, :, 3].abs().max()


class _CountingProgress:
    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def start(self, task: str, *, total: int | None, unit: str) -> None:
        self.heard.append(("start", total, unit))

    def advance(self, steps: int = 1, *, nbytes: int = 0) -> None:
        self.heard.append(("advance", steps, nbytes))

    def finish(self) -> None:
        self.heard.append(("finish",))


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_progress_hears_each_layer(residency, save_family):
    progress = _CountingProgress()
    with sw.load(save_family("llama"), residency=residency) as model:
        trace(model, default_prompts(model), last_layer=2, progress=progress)
        nbytes = [model.weights.layer_bytes(each) if residency == "streamed" else 0 for each in range(3)]
    assert progress.heard == [("start", 3, "layers"), *(("advance", 1, each) for each in nbytes), ("finish",)]


def hooks_of(model: Any) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules())


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_trace_leaves_no_hook(family):
    with in_memory(family) as (model, prompts):
        before = hooks_of(model.model)
        trace(model, prompts)
        assert hooks_of(model.model) == before
        model.layer(3).register_forward_pre_hook(failing)
        with pytest.raises(ModelError):
            trace(model, prompts)
        assert hooks_of(model.model) == before + 1
        assert not any(getattr(each, "observer", None) for each in model.model.modules())


def failing(*_: Any) -> None:
    raise ValueError("on purpose")


Damage = Callable[..., Path]


@pytest.fixture
def damage(save_family, tmp_path) -> Damage:
    """A copy of a family's checkpoint with `value` in the first `count` elements of a tensor, or of one of its rows."""

    def write(family: str, tensor: str, value: float, *, count: int = 1, row: int | None = None) -> Path:
        copy = shutil.copytree(save_family(family), tmp_path / "damaged")
        tensors = load_file(copy / "model.safetensors")
        part = tensors[tensor] if row is None else tensors[tensor][row]
        part.view(-1)[:count] = value
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    return write


# Family, tensor, its row (of packed experts: one that the prompts reach), and what the message calls it.
DAMAGED = [
    (
        "llama",
        "model.layers.2.mlp.down_proj.weight",
        None,
        "decoder layer 2 has NaN or infinite weights: model.layers.2.mlp.down_proj.weight (3)",
    ),
    (
        "llama",
        "model.layers.0.self_attn.q_proj.weight",
        None,
        "layer 0 has NaN or infinite weights: model.layers.0.self_attn.q_proj.weight (3)",
    ),
    (
        "llama",
        "model.layers.4.input_layernorm.weight",
        None,
        "layer 4 has NaN or infinite weights: model.layers.4.input_layernorm.weight (3)",
    ),
    (
        "gpt2",
        "transformer.h.1.mlp.c_proj.bias",
        None,
        "layer 1 has NaN or infinite weights: transformer.h.1.mlp.c_proj.bias (3)",
    ),
    (
        "gpt_oss",
        "model.layers.1.mlp.experts.down_proj",
        2,
        "layer 1 has NaN or infinite weights: model.layers.1.mlp.experts.down_proj (3)",
    ),
    ("gpt2", "transformer.wpe.weight", None, "transformer.wpe.weight (3)"),
]


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize(("family", "tensor", "row", "message"), DAMAGED)
def test_non_finite_weights_are_named_and_counted(family, tensor, row, message, residency, damage):
    value = math.nan if row is None else math.inf
    with sw.load(damage(family, tensor, value, count=3, row=row), residency=residency) as model:
        with pytest.raises(NonFiniteWeightsError) as caught:
            trace(model, default_prompts(model))
        assert message in str(caught.value)
        assert "--nonfinite zero" in str(caught.value)


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize(("family", "tensor", "row", "_"), DAMAGED)
def test_non_finite_weights_can_be_zeroed(family, tensor, row, _, residency, damage):
    damaged = damage(family, tensor, math.nan, count=3, row=row)
    with sw.load(damaged, residency=residency, nonfinite="zero") as model:
        zeroed = trace(model, default_prompts(model))
        again = trace(model, default_prompts(model))
        assert model.weights.zeroed == {tensor: 3}
    shutil.rmtree(damaged)
    with sw.load(damage(family, tensor, 0.0, count=3, row=row), residency=residency) as model:
        assert torch.equal(trace(model, default_prompts(model)).stream, zeroed.stream)
    assert torch.equal(again.stream, zeroed.stream)


@pytest.mark.parametrize("name", ["model.layers.3.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_non_finite_weights_of_a_model_in_memory_are_named(name):
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter(name)[:, 0] = math.nan
    with (
        sw.load(model, tokenizer=tiny_tokenizer()) as loaded,
        pytest.raises(NonFiniteWeightsError, match=re.escape(name)),
    ):
        trace(loaded, default_prompts(loaded))


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_non_finite_embedding_row_is_met_when_a_prompt_names_it(value, residency, damage):
    tensor, used = "model.embed_tokens.weight", tiny_tokenizer()("A", add_special_tokens=False)["input_ids"][0]
    damaged = damage("llama", tensor, value, count=2, row=used)
    with (
        sw.load(damaged, residency=residency) as model,
        pytest.raises(
            NonFiniteWeightsError, match=r"model\.embed_tokens\.weight has 2 NaN or infinite weights in the rows"
        ),
    ):
        trace(model, default_prompts(model))
    with sw.load(damaged, residency=residency, nonfinite="zero") as model:
        first, second = trace(model, default_prompts(model)), trace(model, default_prompts(model))
        assert model.weights.zeroed == {tensor: 2}
    assert first.stream.isfinite().all()
    assert torch.equal(first.stream, second.stream)


def test_a_non_finite_embedding_row_that_no_prompt_names_is_not_met(damage, save_family):
    with sw.load(damage("llama", "model.embed_tokens.weight", math.nan, count=64, row=127)) as model:
        found = trace(model, default_prompts(model))
    with sw.load(save_family("llama")) as model:
        assert torch.equal(trace(model, default_prompts(model)).stream, found.stream)


def test_a_non_finite_layer_that_does_not_run_is_not_met(damage):
    with sw.load(damage("llama", "model.layers.4.input_layernorm.weight", math.nan), residency="streamed") as model:
        assert trace(model, default_prompts(model), last_layer=3).stream.isfinite().all()


def test_finite_weights_that_overflow_are_not_called_damaged():
    model = tiny_model("llama", dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(6e4)
        model.model.layers[2].mlp.up_proj.weight.fill_(6e4)
        model.model.layers[2].mlp.gate_proj.weight.fill_(6e4)
    with sw.load(model, tokenizer=tiny_tokenizer()) as loaded, pytest.raises(ModelError) as caught:
        trace(loaded, default_prompts(loaded))
    assert not isinstance(caught.value, NonFiniteWeightsError)
    assert "Decoder layer 2 " in str(caught.value)
    assert "computing in float16). Load the model by its path" in str(caught.value)


@pytest.mark.parametrize("last_layer", [-1, 6])
@pytest.mark.parametrize("residency", RESIDENCIES)
def test_a_last_layer_that_is_not_there_is_refused(residency, last_layer, save_family):
    with (
        sw.load(save_family("llama"), residency=residency) as model,
        pytest.raises(UsageError, match=f"up to layer {last_layer}: its layers are 0 to 5"),
    ):
        trace(model, default_prompts(model), last_layer=last_layer)


@pytest.mark.parametrize("family", ["gemma3n_text", "deepseek_v4", "prophetnet"])
def test_a_stream_of_another_form_is_refused(family):
    words = r"decoder layer 0 has shape .* tokens of 64 channels were expected\. Several lanes, or further tokens"
    with (
        sw.load(tiny_model(family), tokenizer=tiny_tokenizer()) as model,
        pytest.raises(UnsupportedArchitectureError, match=words),
    ):
        trace(model, default_prompts(model))
