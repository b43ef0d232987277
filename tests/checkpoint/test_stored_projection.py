from typing import Any

import pytest

from superweights.checkpoint.stored_projection import (
    StoredProjection,
    find_stored_projection,
    layer_tensors,
    named_stored_projection,
)
from superweights.coordinates import Coordinate
from superweights.errors import CoordinateError, UnsupportedArchitectureError

H, INNER, EXPERTS, LAYERS = 8, 24, 4, 3
PLAIN, FLIPPED = (H, INNER), (INNER, H)
Layer = dict[str, tuple[int, ...]]

# Attention tensors of the same shape as a down projection are there to mislead.
ATTENTION: Layer = {
    "self_attn.o_proj.weight": PLAIN,
    "self_attn.c_proj.weight": PLAIN,
    "attention.output.dense.weight": PLAIN,
}
DENSE: list[tuple[str, str, Layer]] = [
    ("model.layers", "mlp.down_proj.weight", {"mlp.up_proj.weight": FLIPPED, "mlp.gate_proj.weight": FLIPPED}),
    ("model.layers", "mlp.down_proj.weight", {"mlp.gate_up_proj.weight": (2 * INNER, H)}),
    ("transformer.h", "mlp.dense_4h_to_h.weight", {"mlp.dense_h_to_4h.weight": FLIPPED}),
    ("gpt_neox.layers", "mlp.dense_4h_to_h.weight", {"mlp.dense_h_to_4h.weight": FLIPPED}),
    ("transformer.h", "mlp.fc_out.weight", {"mlp.fc_in.weight": FLIPPED}),
    ("model.decoder.layers", "fc2.weight", {"fc1.weight": FLIPPED}),
    ("model.layers", "mlp.fc2.weight", {"mlp.fc1.weight": FLIPPED}),
    ("model.layers", "mlp.c_proj.weight", {"mlp.c_fc.weight": FLIPPED}),
    ("transformer.h", "mlp.c_proj.weight", {"mlp.w1.weight": FLIPPED, "mlp.w2.weight": FLIPPED}),
    ("transformer.blocks", "ffn.down_proj.weight", {"ffn.up_proj.weight": FLIPPED}),
    ("model.transformer.blocks", "ff_out.weight", {"ff_proj.weight": (2 * INNER, H)}),
    ("model.layers", "feed_forward.w2.weight", {"feed_forward.w1.weight": FLIPPED, "feed_forward.w3.weight": FLIPPED}),
    ("decoder.block", "layer.1.DenseReluDense.wo.weight", {"layer.1.DenseReluDense.wi.weight": FLIPPED}),
    ("bert.encoder.layer", "output.dense.weight", {"intermediate.dense.weight": FLIPPED}),
    ("transformer.h", "mlp.proj.weight", {"mlp.fc.weight": FLIPPED}),
    ("h", "mlp.fc2.weight", {"mlp.fc1.weight": FLIPPED}),
    ("cpmant.encoder.layers", "ffn.ffn.w_out.weight", {"ffn.ffn.w_in.w_0.weight": FLIPPED}),
    ("backbone.blocks", "ffn.proj_down.weight", {"ffn.proj_up.weight": FLIPPED}),
    ("prophetnet.decoder.layers", "feed_forward.output.weight", {"feed_forward.intermediate.weight": FLIPPED}),
]


def model(prefix: str, layer: Layer, *, config: dict[str, Any] | None = None) -> tuple[Layer, dict[str, Any]]:
    shapes = {f"{prefix}.{number}.{name}": shape for number in range(LAYERS) for name, shape in layer.items()}
    outside: Layer = {"embed_tokens.weight": (100, H), "lm_head.weight": (100, H)}
    return shapes | outside, {"model_type": "llama", "hidden_size": H, "num_hidden_layers": LAYERS} | (config or {})


def find(shapes: Layer, config: dict[str, Any], coordinate: str) -> StoredProjection:
    return find_stored_projection(shapes, config, coordinate=Coordinate.parse(coordinate))


@pytest.mark.parametrize(("prefix", "name", "neighbours"), DENSE)
def test_dense_projections_of_all_naming_schemes(prefix: str, name: str, neighbours: Layer) -> None:
    shapes, config = model(prefix, {**ATTENTION, **neighbours, name: PLAIN})
    found = find(shapes, config, "2:5:20")
    assert found == StoredProjection(f"{prefix}.2.{name}", rows=H, cols=INNER, transposed=False)
    assert found.index(Coordinate.parse("2:5:20")) == (5, 20)


@pytest.mark.parametrize("size", [INNER, H], ids=["wide", "square"])
@pytest.mark.parametrize("model_type", ["gpt2", "openai-gpt", "imagegpt", "decision_transformer"])
def test_conv1d_models_are_stored_transposed(model_type: str, size: int) -> None:
    layer: Layer = {"mlp.c_proj.weight": (size, H), "mlp.c_fc.weight": (H, size), "attn.c_proj.weight": (H, H)}
    shapes, config = model("h", layer, config={"model_type": model_type, "n_embd": H})
    found = find(shapes, config, "0:5:2")
    assert (found.rows, found.cols, found.transposed) == (H, size, True)
    assert found.index(Coordinate.parse("0:5:2")) == (2, 5)


def test_square_linear_layers_are_stored_as_they_are() -> None:
    shapes, config = model("model.layers", {"mlp.down_proj.weight": (H, H), "mlp.up_proj.weight": (H, H)})
    assert find(shapes, config, "0:5:2").index(Coordinate.parse("0:5:2")) == (5, 2)


EXPERT_NAMES = [
    "mlp.experts.{}.down_proj.weight",
    "block_sparse_moe.experts.{}.w2.weight",
    "feed_forward.experts.{}.w2.weight",
]


@pytest.mark.parametrize("name", EXPERT_NAMES)
def test_experts_stored_one_by_one(name: str) -> None:
    layer: Layer = {name.format(expert): PLAIN for expert in range(EXPERTS)}
    shapes, config = model("model.layers", layer)
    found = find(shapes, config, "1/3:5:20")
    assert found.tensor == "model.layers.1." + name.format(3)
    assert found.index(Coordinate.parse("1/3:5:20")) == (5, 20)


PACKED = [
    ("qwen3_moe", "mlp.experts.down_proj", (EXPERTS, H, INNER), (3, 5, 20)),
    ("gpt_oss", "mlp.experts.down_proj", (EXPERTS, INNER, H), (3, 20, 5)),
    ("llama4_text", "feed_forward.experts.down_proj", (EXPERTS, INNER, H), (3, 20, 5)),
    ("granitemoe", "block_sparse_moe.output_linear.weight", (EXPERTS, H, INNER), (3, 5, 20)),
    ("qwen3_moe", "mlp.experts.down_proj", (EXPERTS, H, H), (3, 5, 2)),
    ("gpt_oss", "mlp.experts.down_proj", (EXPERTS, H, H), (3, 2, 5)),
]


@pytest.mark.parametrize(("model_type", "name", "shape", "index"), PACKED)
def test_packed_experts(model_type: str, name: str, shape: tuple[int, ...], index: tuple[int, ...]) -> None:
    shapes, config = model("model.layers", {name: shape}, config={"model_type": model_type})
    coordinate = Coordinate.parse("1/3:5:20" if INNER in shape else "1/3:5:2")
    found = find_stored_projection(shapes, config, coordinate=coordinate)
    assert found.tensor == f"model.layers.1.{name}"
    assert found.experts == EXPERTS
    assert found.index(coordinate) == index


@pytest.mark.parametrize("name", ["mlp.shared_expert.down_proj.weight", "mlp.shared_experts.down_proj.weight"])
def test_a_coordinate_without_expert_is_the_shared_one(name: str) -> None:
    layer: Layer = {name: PLAIN} | {f"mlp.experts.{expert}.down_proj.weight": (H, 6) for expert in range(EXPERTS)}
    shapes, config = model("model.layers", layer)
    assert find(shapes, config, "1:5:20").tensor == f"model.layers.1.{name}"
    assert find(shapes, config, "1/2:5:4").tensor == "model.layers.1.mlp.experts.2.down_proj.weight"


def test_packed_shared_experts_are_no_routed_ones() -> None:
    layer: Layer = {"mlp.experts.down_proj": (EXPERTS, H, INNER), "mlp.shared_experts.down_proj": (1, H, INNER)}
    shapes, config = model("model.layers", layer)
    assert find(shapes, config, "1/0:5:20").tensor == "model.layers.1.mlp.experts.down_proj"


def test_the_language_model_of_a_multimodal_checkpoint_is_meant() -> None:
    layer: Layer = {"mlp.down_proj.weight": PLAIN}
    shapes, plain = model("language_model.model.layers", layer)
    shapes |= {f"vision_tower.encoder.layers.{number}.mlp.fc2.weight": PLAIN for number in range(LAYERS)}
    config = {"model_type": "gemma3", "text_config": plain}
    assert find(shapes, config, "1:5:20").tensor == "language_model.model.layers.1.mlp.down_proj.weight"


def test_the_decoder_of_an_encoder_decoder_is_meant() -> None:
    shapes, config = model("model.decoder.layers", {"fc2.weight": PLAIN})
    shapes |= {name.replace("decoder", "encoder"): shape for name, shape in shapes.items()}
    assert find(shapes, config, "1:5:20").tensor == "model.decoder.layers.1.fc2.weight"


def test_prediction_layers_past_the_last_are_reachable() -> None:
    shapes, config = model("model.layers", {"mlp.down_proj.weight": PLAIN}, config={"num_hidden_layers": LAYERS - 1})
    assert find(shapes, config, f"{LAYERS - 1}:5:20").tensor == f"model.layers.{LAYERS - 1}.mlp.down_proj.weight"


DENSE_LAYER: Layer = {"mlp.down_proj.weight": PLAIN}
EXPERT_LAYER: Layer = {f"mlp.experts.{expert}.down_proj.weight": PLAIN for expert in range(EXPERTS)}
PACKED_LAYER: Layer = {"mlp.experts.down_proj": (EXPERTS, H, INNER)}


@pytest.mark.parametrize(
    ("layer", "coordinate", "says"),
    [
        (DENSE_LAYER, "3:0:0", "no decoder layer 3.*layers are 0 to 2"),
        (DENSE_LAYER, "1/0:0:0", "no routed experts. Write LAYER:ROW:COL"),
        (EXPERT_LAYER, "1:0:0", "only routed experts, 0 to 3. Write LAYER/EXPERT:ROW:COL"),
        (EXPERT_LAYER, "1/4:0:0", "names expert 4; the experts are 0 to 3"),
        (PACKED_LAYER, "1:0:0", "only routed experts, 0 to 3"),
        (PACKED_LAYER, "1/4:0:0", "names expert 4; the experts are 0 to 3"),
    ],
)
def test_what_is_out_of_range_is_refused_with_the_range(layer: Layer, coordinate: str, says: str) -> None:
    shapes, config = model("model.layers", layer)
    with pytest.raises(CoordinateError, match=says):
        find(shapes, config, coordinate)


@pytest.mark.parametrize("coordinate", [f"1:{H}:0", f"1:0:{INNER}"])
def test_a_row_or_col_outside_is_refused_with_the_range(coordinate: str) -> None:
    shapes, config = model("model.layers", DENSE_LAYER)
    with pytest.raises(CoordinateError, match="rows are 0 to 7, cols are 0 to 23"):
        find(shapes, config, coordinate).index(Coordinate.parse(coordinate))


@pytest.mark.parametrize(
    ("layer", "config"),
    [
        ({"mlp.odd.weight": PLAIN}, {}),
        ({"mlp.down_proj.weight": PLAIN, "moe.down_proj.weight": PLAIN}, {}),
        ({"mlp.down_proj.weight": FLIPPED}, {}),
        ({"ffn.experts.mlp.w2": (EXPERTS * INNER, H)}, {"model_type": "dbrx"}),
        ({"mlp.down_proj.weight": PLAIN}, {"hidden_size": None}),
        ({"mlp.down_proj.qweight": (3, H)}, {}),
    ],
    ids=["unknown name", "two", "stored the other way", "experts laid end to end", "no hidden size", "packed"],
)
def test_doubt_is_refused_with_what_was_seen_and_a_way_out(layer: Layer, config: dict[str, Any]) -> None:
    shapes, full = model("model.layers", layer, config=config)
    with pytest.raises(UnsupportedArchitectureError) as refused:
        find(shapes, full, "1:0:0")
    assert all(name in str(refused.value) for name in layer)
    assert "--tensor" in str(refused.value) and "--transposed" in str(refused.value)


def test_names_without_layers_are_refused() -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"No tensor has a layer number.*odd\.weight"):
        find({"odd.weight": PLAIN}, {"hidden_size": H}, "0:0:0")


def test_two_lists_of_layers_are_refused() -> None:
    shapes, config = model("left.layers", DENSE_LAYER)
    shapes |= model("right.layers", DENSE_LAYER)[0]
    with pytest.raises(UnsupportedArchitectureError, match=r"left.layers \(3\), right.layers \(3\)"):
        find(shapes, config, "0:0:0")


@pytest.mark.parametrize(
    ("shape", "transposed", "coordinate", "index"),
    [
        (PLAIN, False, "9:5:20", (5, 20)),
        (FLIPPED, True, "9:5:20", (20, 5)),
        ((EXPERTS, INNER, H), True, "9/3:5:20", (3, 20, 5)),
        (PLAIN, False, "9/3:5:20", (5, 20)),
    ],
)
def test_a_named_tensor(shape: tuple[int, ...], transposed: bool, coordinate: str, index: tuple[int, ...]) -> None:
    wanted = Coordinate.parse(coordinate)
    assert named_stored_projection("t", shape, transposed=transposed, coordinate=wanted).index(wanted) == index


def test_a_named_vector_is_no_down_projection() -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"shape \[8\]"):
        named_stored_projection("norm.weight", (8,), transposed=False, coordinate=Coordinate.parse("0:0:0"))


def test_the_tensors_of_each_layer() -> None:
    layer: Layer = {"mlp.down_proj.weight": PLAIN, "norm.weight": (H,)}
    shapes, config = model("model.layers", layer)
    shapes |= {f"vision_tower.layers.{number}.fc2.weight": PLAIN for number in range(9)}
    expected = tuple(tuple(f"model.layers.{number}.{name}" for name in layer) for number in range(LAYERS))
    assert layer_tensors(shapes, config) == expected
    assert layer_tensors(shapes, config | {"num_hidden_layers": 2}) == expected[:2]
    assert layer_tensors(shapes, {"text_config": config}) == expected
    with pytest.raises(UnsupportedArchitectureError, match="No tensor has a layer number"):
        layer_tensors({"odd.weight": PLAIN}, config)
