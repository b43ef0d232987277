"""Packed checkpoints in transformers: what is loaded, what is saved again to the bit, and what is refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import superweights as sw
from superweights.coordinates import Coordinate
from superweights.errors import (
    CheckpointError,
    CoordinateError,
    MalformedFileError,
    MissingTensorError,
    QuantizedCheckpointError,
    UsageError,
)
from superweights.integrations.packed_linear import MANY_TOKENS, PackedLinear
from superweights.integrations.transformers_quantizer import SuperweightsConfig, SuperweightsQuantizer, load_packed
from superweights.interventions.conditions import QuantizeWeights
from superweights.quantization.held_out import rounded
from superweights.testing import save_tiny_checkpoint

TINY_BOOKS = Path(sw.__file__).parent / "data" / "tiny-books"
WEIGHT = Coordinate.parse("1:3:5")
KEPT = "model.layers.1.mlp.down_proj"
UP = "model.layers.0.mlp.up_proj"
FEW = torch.arange(14).view(2, 7) * 5 % 97 + 3
MANY = torch.arange(MANY_TOKENS + 16)[None] * 7 % 97 + 3
Config = dict[str, Any]


def quantized(source: Path, to: Path, scheme: str, *, keep: bool = True) -> Path:
    sw.quantize_checkpoint(source, to, [QuantizeWeights(sw.Scheme.parse(scheme), keep=(WEIGHT,) if keep else ())])
    return to


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A llama in bfloat16, in several shards. Do not change it."""
    directory = tmp_path_factory.mktemp("packed") / "source"
    return save_tiny_checkpoint(
        "llama", directory, layers=2, intermediate=128, dtype=torch.bfloat16, shards=True, max_position_embeddings=256
    )


@pytest.fixture(scope="module")
def packed(source) -> Path:
    """The same in int4-g32, 1:3:5 kept. Do not change it."""
    return quantized(source, source.parent / "packed", "int4-g32")


@pytest.fixture(scope="module")
def rows(source) -> Path:
    """The same in int8-row, nothing kept. Do not change it."""
    return quantized(source, source.parent / "rows", "int8-row", keep=False)


@pytest.fixture
def changed(packed, tmp_path) -> Callable[..., Path]:
    """Makes a copy of a packed folder with another quantization_config, or other tensors."""

    def change(
        config: Callable[[Config], object] = lambda _: None,
        tensors: Callable[[dict[str, torch.Tensor]], object] = lambda _: None,
        *,
        of: Path = packed,
    ) -> Path:
        copy = Path(shutil.copytree(of, tmp_path / "changed"))
        stored = json.loads((copy / "config.json").read_text())
        config(stored["quantization_config"])
        (copy / "config.json").write_text(json.dumps(stored))
        values = contents(copy)
        for path in copy.glob("*.safetensors*"):
            path.unlink()
        tensors(values)
        save_file(values, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    return change


def contents(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def config_of(folder: Path) -> Config:
    found: Config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    return ((name, each) for name, each in model.named_modules() if isinstance(each, PackedLinear))


def reference(source: Path, names: list[str], scheme: str) -> PreTrainedModel:
    """The model of the source with those layers rounded, by the functions that have tests of their own."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    for name in names:
        weight = model.get_submodule(name).weight
        weight.data = rounded(weight.data.float(), sw.Scheme.parse(scheme), scale_dtype=torch.bfloat16).to(weight.dtype)
    return model.float()


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("scheme", ["int4-g32", "int8-row", "int3-g64", "int8-g32", "int4-g16"])
@pytest.mark.parametrize(("ids", "bound"), [(FEW, 14 * 2**-9), (MANY, 2**-9)], ids=["few tokens", "many tokens"])
def test_logits_are_those_of_the_rounded_weights(scheme, ids, bound, source, tmp_path):
    """A kernel rounds activations and results to bfloat16 in 14 layers, 2^-9 of each; tiles are float32, and the weights of the
    reference are rounded to bfloat16."""
    model = load_packed(quantized(source, tmp_path / "packed", scheme), dtype=torch.float32)
    layers = dict(packed_layers(model))
    assert len(layers) == 13
    assert type(model.get_submodule(KEPT)) is nn.Linear
    assert not any(each.kernel is None for each in layers.values())
    expected = logits(reference(source, list(layers), scheme), ids)
    assert (logits(model, ids) - expected).norm() < bound * expected.norm()
    original = logits(reference(source, [], scheme), ids)
    if "int8" not in scheme:  # the bound is less than what rounding does
        assert (original - expected).norm() > bound * expected.norm()


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox", "opt", "phi3", "gemma2", "falcon"])
def test_other_families(family, tmp_path):
    """With biases, fused matrices, other names of everything, and heads that are shared with the embedding."""
    directory = save_tiny_checkpoint(family, tmp_path / "source", layers=2, intermediate=128, dtype=torch.bfloat16)
    model = load_packed(quantized(directory, tmp_path / "packed", "int4-g32", keep=False), dtype=torch.float32)
    names = [name for name, _ in packed_layers(model)]
    assert len(names) >= 8
    expected = logits(reference(directory, names, "int4-g32"), FEW)
    assert (logits(model, FEW) - expected).norm() < 14 * 2**-9 * expected.norm()


@pytest.fixture(scope="module")
def books(tmp_path_factory) -> Path:
    """A trained model in int4-g32, nothing kept. Do not change it."""
    return quantized(TINY_BOOKS, tmp_path_factory.mktemp("books") / "packed", "int4-g32", keep=False)


@pytest.mark.parametrize("method", ["compressed-tensors", "superweights"])
def test_generate(method, books, changed, tmp_path):
    """Token by token with a cache, on a trained model; the reference multiplies plain matrices."""
    model = load_packed(changed(lambda config: config.update(quant_method=method), of=books), dtype=torch.float32)
    if method == "superweights":
        model.save_pretrained(tmp_path / "saved")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids = model.generate(
        MANY[:, :9], attention_mask=torch.ones(1, 9), max_new_tokens=24, do_sample=False, eos_token_id=1
    )
    assert ids.shape == (1, 33)
    best = logits(reference(TINY_BOOKS, [name for name, _ in packed_layers(model)], "int4-g32"), ids)[0, 8:-1].topk(2)
    same = best.indices[:, 0] == ids[0, 9:]
    clear = best.values[:, 0] - best.values[:, 1] > 0.15  # a rounded activation may decide a near tie
    assert same[clear].all()
    assert clear.float().mean() > 0.5 and same.float().mean() > 0.9


@pytest.mark.parametrize(
    ("scheme", "dtype", "ids"), [("int4-g32", torch.bfloat16, FEW), ("int8-row", torch.float32, MANY)]
)
def test_a_whole_model_under_compile(scheme, dtype, ids, source, tmp_path):
    """In one graph, whose products are the same ones."""
    model = load_packed(quantized(source, tmp_path / "packed", scheme), dtype=dtype)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(logits(compiled, ids), logits(model, ids))


@pytest.mark.parametrize("method", ["compressed-tensors", "superweights"])
@pytest.mark.parametrize("shard", ["20KB", "5GB"])
def test_saving_gives_the_same_tensors_and_config(method, shard, packed, changed, tmp_path):
    folder = changed(lambda config: config.update(quant_method=method))
    model = load_packed(folder)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "saved", max_shard_size=shard)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == (1 if shard == "5GB" else 5)
    one, other = contents(packed), contents(tmp_path / "saved")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)
    assert config_of(tmp_path / "saved") == config_of(packed) | {"quant_method": method}
    load = AutoModelForCausalLM.from_pretrained if method == "superweights" else load_packed
    again = load(tmp_path / "saved")
    assert torch.equal(logits(again, FEW), logits(model, FEW))


def test_others_read_what_is_saved(packed, tmp_path):
    pytest.importorskip("compressed_tensors", reason="a development dependency")
    model = load_packed(packed, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    expected = logits(theirs, MANY)
    assert (logits(model, MANY) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("saved_before", [False, True])
def test_dequantize_is_exact(saved_before, source, packed, tmp_path):
    model = load_packed(packed)
    names = [name for name, _ in packed_layers(model)]
    if saved_before:  # transformers then has the dtype as a text
        model.save_pretrained(tmp_path / "saved")
    plain = model.dequantize()
    assert not list(packed_layers(plain))
    expected = reference(source, names, "int4-g32").bfloat16().state_dict()
    state = plain.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_without_a_head(changed):
    folder = changed(lambda config: config.update(quant_method="superweights"))
    body = AutoModel.from_pretrained(folder)
    assert len(list(packed_layers(body))) == 13
    with torch.no_grad():
        found = body(FEW).last_hidden_state
    expected = AutoModelForCausalLM.from_pretrained(folder).model
    with torch.no_grad():
        assert torch.equal(found, expected(FEW).last_hidden_state)


def super_weight(tensor: str, row: int, col: int, value: float) -> Config:
    return {"coordinate": f"?:{row}:{col}", "tensor": f"{tensor}.weight", "row": row, "col": col, "value": value}


def test_a_super_weight_in_a_packed_matrix_is_exact(rows, changed):
    listed = [super_weight(UP, 3, 5, 12.5), super_weight(UP, 4, 5, -2.0), super_weight(KEPT, 0, 1, 0.25)]
    folder = changed(lambda config: config.update(super_weights=listed), of=rows)
    model, before = load_packed(folder), load_packed(rows)
    expected = before.get_submodule(UP).dequantized()
    expected[3, 5], expected[4, 5] = 12.5, -2.0
    assert torch.equal(model.get_submodule(UP).dequantized(), expected)
    assert model.get_submodule(KEPT).dequantized()[0, 1] == 0.25
    given = torch.ones(1, 64)
    difference = (model.get_submodule(UP)(given) - before.get_submodule(UP)(given))[0]
    assert difference.nonzero().flatten().tolist() == [3, 4]
    stored = before.get_submodule(UP).dequantized()
    torch.testing.assert_close(difference[3], 12.5 - stored[3, 5], rtol=1e-5, atol=0)


def test_a_super_weight_of_a_plain_matrix_needs_nothing(packed):
    assert config_of(packed)["super_weights"][0]["tensor"] == f"{KEPT}.weight"
    assert not any(each.super_weights for _, each in packed_layers(load_packed(packed)))


def test_int8_inputs_are_set_saved_and_loaded(rows, tmp_path):
    wanted = {UP: 9, KEPT: None}
    model = load_packed(rows, int8_inputs=wanted)
    found = {name: each.channel for name, each in packed_layers(model) if each.int8_inputs}
    assert found == wanted
    model.save_pretrained(tmp_path / "saved")
    assert config_of(tmp_path / "saved") == config_of(rows) | {"int8_inputs": wanted}
    again = load_packed(tmp_path / "saved")
    assert torch.equal(logits(again, FEW), logits(model, FEW))
    weights_only = load_packed(tmp_path / "saved", int8_inputs={})
    assert torch.equal(logits(weights_only, FEW), logits(load_packed(rows), FEW))
    assert not torch.equal(logits(weights_only, FEW), logits(model, FEW))


def test_two_ways_to_pack_in_one_model(source, tmp_path):
    names = [f"model.layers.{layer}.mlp.{which}_proj.weight" for layer in (0, 1) for which in ("gate", "up")]
    others = [f"model.layers.{layer}.self_attn.{which}_proj.weight" for layer in (0, 1) for which in "qkvo"]
    how = [
        QuantizeWeights(sw.Scheme.parse("int4-g32"), only=tuple(names)),
        QuantizeWeights(sw.Scheme.parse("int8-row"), only=tuple(others)),
    ]
    sw.quantize_checkpoint(source, tmp_path / "packed", how)
    kernels = {f"{name}.weight": each.kernel for name, each in packed_layers(load_packed(tmp_path / "packed"))}
    assert kernels == dict.fromkeys(names, "int4") | dict.fromkeys(others, "int8")


def test_what_targets_mean():
    def group(bits: int, *targets: str) -> Config:
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"}
        return {"targets": list(targets), "weights": weights}

    config = SuperweightsConfig(
        config_groups={"a": group(4, "Linear"), "b": group(8, r"re:.*up$", "x.gate"), "c": group(3, "x.up")},
        ignore=["re:.*head", "y.up", "LayerNorm"],
    )

    def bits(name: str, module: nn.Module) -> int | None:
        found = config.group_of(name, module)
        return None if found is None else found.bits

    linear = nn.Linear(2, 2)
    names = ["x.down", "x.gate", "z.up", "x.up", "lm_head", "y.up", "y.up.z"]
    assert [bits(each, linear) for each in names] == [4, 8, 8, 3, None, None, 4]
    assert bits("x.down", nn.LayerNorm(2)) is None
    assert bits("x.down", nn.Embedding(2, 2)) is None


def group_weights(config: Config) -> Config:
    found: Config = config["config_groups"]["group_0"]["weights"]
    return found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda config: group_weights(config).update(symmetric=False), "asymmetric weights"),
        (lambda config: group_weights(config).update(num_bits=16), "weights of 16 bits"),
        (lambda config: group_weights(config).update(type="float", num_bits=8), "8 bits of type 'float'"),
        (lambda config: group_weights(config).update(strategy="tensor", group_size=None), "scales by 'tensor'"),
        (lambda config: group_weights(config).update(strategy="block"), "scales by 'block'"),
        (lambda config: group_weights(config).update(dynamic=True), "scales by 'group'"),
        (lambda config: group_weights(config).update(actorder="group"), "the key 'actorder' of weights"),
        (lambda config: config["config_groups"]["group_0"].update(input_activations={"num_bits": 8}), "activations quantized"),
        (lambda config: config["config_groups"]["group_0"].update(format="int-quantized"), "format 'int-quantized'"),
        (lambda config: config.update(format="marlin-24"), "format 'marlin-24'"),
        (lambda config: config.update(quantization_status="frozen"), "quantization_status 'frozen'"),
        (lambda config: config.update(kv_cache_scheme={"num_bits": 8}), "a quantized cache"),
        (lambda config: config.update(layout_version=2), "the key 'layout_version', unknown here"),
        (lambda config: config.update(config_groups={}), "no config_groups"),
        (lambda config: config.update(config_groups={"a": None}), "the group None, which has no targets"),
        (lambda config: config["config_groups"]["group_0"].pop("weights"), "has no targets"),
        (lambda config: config["config_groups"]["group_0"].update(targets="Linear"), "has no targets"),
        (lambda config: group_weights(config).update(group_size=0), "scales by 'group' of 0"),
        (lambda config: group_weights(config).pop("group_size"), "scales by 'group' of None"),
        (lambda config: config.update(ignore="lm_head"), "ignore 'lm_head', which is no list"),
        (lambda config: config.update(super_weights=[{"row": 1}]), "has no tensor, row, col and value"),
        (lambda config: config.update(quant_method="gptq"), "packed by gptq"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(change, says, changed):
    with pytest.raises(QuantizedCheckpointError, match=says):
        load_packed(changed(change))


SCALE, CODES = f"{UP}.weight_scale", f"{UP}.weight_packed"


@pytest.mark.parametrize(
    ("config", "tensors", "error", "says"),
    [
        (None, lambda found: found.pop(SCALE), MissingTensorError, f"{SCALE} is missing"),
        (None, lambda found: found.pop(CODES), MissingTensorError, f"the files have no {CODES}"),
        (None, lambda found: found.update({f"{UP}.weight_zero_point": found[SCALE] + 0}), QuantizedCheckpointError, "beside"),
        (None, lambda found: found.update({SCALE: found[SCALE][:, :1].clone()}), MalformedFileError, r"\[128, 1\]; 4 bits"),
        (None, lambda found: found.update({f"{UP}.weight_shape": torch.tensor([128, 63])}), MalformedFileError, r"\[128, 63\]"),
        (lambda config: config["ignore"].append(UP), None, QuantizedCheckpointError, f"{UP} is packed in the files, but"),
        (lambda config: config["ignore"].remove(KEPT), None, MissingTensorError, f"no {KEPT}.weight_packed"),
        (lambda config: group_weights(config).update(num_bits=8), None, MalformedFileError, "8 bits of 64 x 64"),
        (lambda config: config.update(super_weights=[super_weight(UP, 128, 0, 1)]), None, CoordinateError, "rows are 0 to 127"),
        (lambda config: config.update(super_weights=[super_weight("x.y", 1, 0, 1)]), None, MissingTensorError, "weight of x.y"),
        (lambda config: config.update(int8_inputs={KEPT: 1}), None, UsageError, f"{KEPT} is no packed layer"),
        (lambda config: config.update(int8_inputs={UP: 1}), None, UsageError, "one scale per row"),
    ],
)  # fmt: skip
def test_files_that_contradict_their_config(config, tensors, error, says, changed):
    folder = changed(config or (lambda _: None), tensors or (lambda _: None))
    with pytest.raises(error, match=says):
        load_packed(folder)


def test_routed_experts_are_refused(tmp_path):
    directory = save_tiny_checkpoint("mixtral", tmp_path / "source", layers=2, intermediate=64, dtype=torch.bfloat16)
    folder = quantized(directory, tmp_path / "packed", "int4-g32", keep=False)
    with pytest.raises(CheckpointError, match="Routed experts that are stored one by one"):
        load_packed(folder)


def test_plain_weights_and_tensors_in_memory_are_refused(source, packed):
    with pytest.raises(UsageError, match="has plain weights"):
        load_packed(source)
    quantizer = SuperweightsQuantizer(SuperweightsConfig(**config_of(packed)))
    with pytest.raises(UsageError, match="device map puts layers on disk"):
        quantizer.validate_environment(device_map={"model": "cpu", "lm_head": "disk"})
    with pytest.raises(UsageError, match="tensors in memory cannot be checked"):
        quantizer.preprocess_model(AutoModelForCausalLM.from_pretrained(source), checkpoint_files=None)


def test_only_its_own_import_registers_it(packed):
    """And what is written does not need it: transformers only warns of a method that it does not know."""
    assert config_of(packed)["quant_method"] == "compressed-tensors"
    code = "import sys, superweights; print([each for each in sys.modules if 'integrations' in each or each == 'transformers'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
