"""The structural rules over every family, and coordinates against what they read."""

from typing import Any

import pytest
import torch
from required_families import EXPECTED, HIDDEN, LAYERS
from torch import nn
from transformers.pytorch_utils import Conv1D

from superweights.coordinates import Coordinate
from superweights.errors import CoordinateError, UnsupportedArchitectureError
from superweights.model.architecture import Architecture, read_architecture
from superweights.testing import causal_lm_families, tiny_config, tiny_model

ALL_FAMILIES = causal_lm_families()
REFUSED = {
    "mamba": "6 decoder layers .* none of them holds a down projection: no feed-forward weight with 64 outputs",
    "jetmoe": r"input_linear \(JetMoeParallelExperts\) packs matrices in a way the rules do not know: .*\(4, 224, 64\)",
    "xlm": "looked for one list of 6 decoder layers and found 4. Module lists seen: transformer.attentions",
    "blt": "BltConfig has no single hidden_size and num_hidden_layers",
}
_NO_DOWN_PROJECTIONS = ("lm_head", "per_layer_projection", "laurel", "layernorm.", "adapter_modules")


def architecture_of(family: str, **changes: Any) -> Architecture:
    return read_architecture(tiny_model(family, **changes))


def test_all_required_families_are_here():
    assert len(EXPECTED) == 28
    assert set(EXPECTED) <= set(ALL_FAMILIES)


@pytest.mark.parametrize("family", EXPECTED)
def test_required_family_is_read_exactly(family):
    model, expected = tiny_model(family), EXPECTED[family]
    found = read_architecture(model)
    assert (found.decoder, found.layers, found.layer_count, found.hidden_size) == (
        expected.decoder,
        expected.layers,
        LAYERS,
        HIDDEN,
    )
    for layer in range(LAYERS):
        shapes = expected.rest if layer else expected.first
        prefix = f"{expected.layers}.{layer}."
        read = [(each.name.removeprefix(prefix), each.cols, each.transposed, each.experts)
                for each in found.in_layer(layer)]  # fmt: skip
        assert sorted(read, key=str) == sorted(
            ((each.path, each.cols, each.transposed, each.experts) for each in shapes), key=str
        )
        for shape in shapes:
            assert tuple(model.get_parameter(f"{prefix}{shape.path}").shape) == shape.stored
    assert all(each.rows == HIDDEN for each in found.down_projections)
    assert [each.layer for each in found.down_projections] == sorted(each.layer for each in found.down_projections)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_any_family_is_read_whole_or_refused(family):
    """Nothing else than an architecture without gaps, or the one error."""
    try:
        model = tiny_model(family)
        found = read_architecture(model)
    except UnsupportedArchitectureError as error:
        assert len(str(error)) > 60
        return
    listed = {each.name for each in found.down_projections}
    assert shaped_like_a_down_projection(model, found) <= listed
    for each in found.down_projections:
        stored = (each.cols, each.rows) if each.transposed else (each.rows, each.cols)
        assert tuple(model.get_parameter(each.name).shape) == (
            stored if each.experts is None else (each.experts, *stored)
        )
        assert each.rows == found.hidden_size == HIDDEN


def shaped_like_a_down_projection(model: Any, found: Architecture) -> set[str]:
    """All weights of the decoder layers that only a down projection can be, by the sizes that tiny models have."""
    names = set()
    for name, module in model.get_submodule(found.layers).named_modules(prefix=found.layers):
        if any(each in name for each in _NO_DOWN_PROJECTIONS):
            continue
        if isinstance(module, nn.Linear | Conv1D):
            outputs, inputs = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
            if outputs == HIDDEN and inputs in (112, 80, 48):
                names.add(f"{name}.weight")
        elif getattr(getattr(module, "down_proj", None), "ndim", 0) == 3:
            names.add(f"{name}.down_proj")
    return names


@pytest.mark.parametrize("family", REFUSED)
def test_refusal_says_what_was_seen(family):
    with pytest.raises(UnsupportedArchitectureError, match=REFUSED[family]):
        architecture_of(family)


def test_mixers_are_not_taken_for_feed_forward():
    """Nemotron-H layers hold one thing each: the Mamba and attention ones have a projection to the hidden size too."""
    kinds = tiny_config("nemotron_h").layers_block_type
    with_projections = {each.layer for each in architecture_of("nemotron_h").down_projections}
    assert with_projections == {layer for layer, kind in enumerate(kinds) if kind in ("moe", "mlp")}


@pytest.mark.parametrize(("family", "transposed"), [("mixtral", False), ("gpt_oss", True), ("llama4_text", True)])
def test_square_experts_keep_their_orientation(family, transposed):
    """Where the shape says nothing, the class does."""
    routed = [each for each in architecture_of(family, intermediate=HIDDEN).down_projections if each.experts]
    assert {(each.rows, each.cols, each.transposed) for each in routed} == {(HIDDEN, HIDDEN, transposed)}


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_layers_as_many_as_heads_or_experts_are_still_found(family):
    found = architecture_of(family, layers=4)
    assert (found.layers, found.layer_count) == (EXPECTED[family].layers, 4)


def test_weights_on_meta_are_enough():
    config = tiny_config("deepseek_v3")
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert read_architecture(model) == architecture_of("deepseek_v3")


@pytest.mark.parametrize("coordinate", ["0:63:111", "1/3:63:47", "5:0:0"])
def test_locate_takes_the_last_valid_place(coordinate):
    parsed = Coordinate.parse(coordinate)
    projection = architecture_of("deepseek_v3").locate(parsed)
    assert projection.layer == parsed.layer
    assert (projection.experts is None) == (parsed.expert is None)


@pytest.mark.parametrize(
    ("family", "coordinate", "message"),
    [
        ("llama", "6:0:0", "6:0:0 names layer 6; the layers are 0 to 5."),
        ("llama", "2:64:0", "2:64:0 is outside model.layers.2.mlp.down_proj.weight: rows are 0 to 63, cols are 0 to 111."),
        ("llama", "2:0:112", "2:0:112 is outside model.layers.2.mlp.down_proj.weight: rows are 0 to 63, cols are 0 to 111."),
        ("gpt2", "2:111:63", "2:111:63 is outside transformer.h.2.mlp.c_proj.weight: rows are 0 to 63, cols are 0 to 111."),
        ("llama", "2/0:0:0", "2/0:0:0 does not fit layer 2, which has no routed experts: write LAYER:ROW:COL."),
        (
            "mixtral",
            "2:0:0",
            "2:0:0 does not fit layer 2, which has routed experts only: write LAYER/EXPERT:ROW:COL.",
        ),
        ("mixtral", "2/4:0:0", "2/4:0:0 names expert 4; the experts are 0 to 3."),
        ("mixtral", "2/1:64:0", "2/1:64:0 is outside model.layers.2.mlp.experts.down_proj: rows are 0 to 63, cols are 0 to 111."),  # noqa: E501
        ("nemotron_h", "0:0:0", "0:0:0 does not fit layer 0, which has no down projection."),
        ("nemotron_h", "0/1:0:0", "0/1:0:0 does not fit layer 0, which has no down projection."),
    ],
)  # fmt: skip
def test_locate_says_what_is_valid(family, coordinate, message):
    with pytest.raises(CoordinateError) as caught:
        architecture_of(family).locate(Coordinate.parse(coordinate))
    assert str(caught.value) == message


def test_locate_refuses_a_layer_below_zero():
    with pytest.raises(CoordinateError, match="the layers are 0 to 5"):
        architecture_of("llama").locate(Coordinate(-1, None, 0, 0))


@pytest.mark.parametrize("coordinate", [Coordinate(1, None, -1, 0), Coordinate(1, None, 0, -1)])
def test_locate_refuses_a_row_or_col_below_zero(coordinate):
    with pytest.raises(CoordinateError, match="rows are 0 to 63, cols are 0 to 111"):
        architecture_of("llama").locate(coordinate)


def test_locate_refuses_an_expert_below_zero():
    with pytest.raises(CoordinateError, match="the experts are 0 to 3"):
        architecture_of("mixtral").locate(Coordinate(1, -1, 0, 0))


@pytest.mark.parametrize(
    ("family", "coordinate", "index"),
    [
        ("llama", "1:5:90", (5, 90)),
        ("gpt2", "1:5:90", (90, 5)),
        ("mixtral", "1/3:5:90", (3, 5, 90)),
        ("gpt_oss", "1/3:5:90", (3, 90, 5)),
        ("llama4_text", "1/3:5:90", (3, 90, 5)),
        ("llama4_text", "1:5:90", (5, 90)),
    ],
)
def test_index_is_where_the_scalar_is_stored(family, coordinate, index):
    parsed = Coordinate.parse(coordinate)
    assert architecture_of(family).locate(parsed).index(parsed) == index
