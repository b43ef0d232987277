from pathlib import Path

import pytest
import torch

import superweights as sw
from superweights.errors import UnsupportedArchitectureError
from superweights.measurements.linear_inputs import linear_inputs
from superweights.testing import save_tiny_checkpoint, tiny_model

IDS = torch.arange(4, 52).view(2, 24)


def test_norms_and_outputs_of_attention_are_told_by_what_runs(planted_checkpoint: Path) -> None:
    with sw.load(planted_checkpoint) as model:
        found = {each.module.removeprefix("model.layers.1."): each for each in linear_inputs(model, IDS)}
    norms = {
        name: each.norm and each.norm.removeprefix("model.layers.1.")
        for name, each in found.items()
        if "layers" not in name
    }
    assert norms == {
        "self_attn.q_proj": "input_layernorm",
        "self_attn.k_proj": "input_layernorm",
        "self_attn.v_proj": "input_layernorm",
        "self_attn.o_proj": None,
        "mlp.gate_proj": "post_attention_layernorm",
        "mlp.up_proj": "post_attention_layernorm",
        "mlp.down_proj": None,
    }
    assert [name for name, each in found.items() if each.attention_output and "layers" not in name] == [
        "self_attn.o_proj"
    ]


def test_sizes_are_those_of_the_transformers_model(planted_checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(planted_checkpoint)
    module, seen = theirs.model.layers[3].mlp.down_proj, []
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        theirs(IDS)
    with sw.load(planted_checkpoint) as model:
        ours = next(each for each in linear_inputs(model, IDS) if each.module == "model.layers.3.mlp.down_proj")
    sizes = seen[0].abs()
    assert torch.allclose(ours.sizes, sizes.amax((0, 1)), rtol=1e-5)
    assert torch.equal(ours.weight_sizes, module.weight.detach().abs().amax(0))
    second = max(float(each.flatten().topk(2).values[1]) for each in sizes)
    assert ours.largest_but_one == pytest.approx(second, rel=1e-5)


def test_a_channel_counts_where_it_is_the_largest_of_every_sequence(planted_checkpoint: Path) -> None:
    with sw.load(planted_checkpoint) as model:
        planted = next(each for each in linear_inputs(model, IDS) if each.module == "model.layers.3.self_attn.q_proj")
        high = next(
            each
            for each in linear_inputs(model, IDS, massive_ratio=1e9)
            if each.module == "model.layers.3.self_attn.q_proj"
        )
    assert planted.channel == 49 and planted.ratio > 20
    assert high.channel is None and high.ratio == planted.ratio


def test_streamed_and_resident_see_the_same(planted_checkpoint: Path) -> None:
    found = []
    for residency in ("resident", "streamed"):
        with sw.load(planted_checkpoint, residency=residency) as model:
            found.append(
                [(each.module, each.channel, each.ratio, float(each.sizes.sum())) for each in linear_inputs(model, IDS)]
            )
    assert found[0] == found[1]


def test_conv1d_weights_are_read_the_other_way(tmp_path: Path) -> None:
    directory = save_tiny_checkpoint("gpt2", tmp_path / "gpt2")
    with sw.load(directory) as model:
        each = next(each for each in linear_inputs(model, IDS) if each.module.endswith("0.mlp.c_proj"))
    assert each.weight_sizes.shape == each.sizes.shape


def test_where_no_linear_layer_runs_it_says_so() -> None:
    with sw.load(tiny_model("llama")) as model:
        for layer in model.model.model.layers:
            layer.forward = lambda hidden, **_: hidden
        with pytest.raises(UnsupportedArchitectureError, match="none ran"):
            linear_inputs(model, IDS)
