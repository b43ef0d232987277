import json
import math
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from superweights.checkpoint import Checkpoint, copying
from superweights.checkpoint.packed.reading import read_packed_matrix
from superweights.coordinates import Coordinate
from superweights.errors import (
    CheckpointError,
    CoordinateError,
    MalformedFileError,
    MissingTensorError,
    NonFiniteWeightsError,
    NotACheckpointError,
    QuantizedCheckpointError,
    RecordError,
    UnsupportedArchitectureError,
    UsageError,
)
from superweights.interventions.adapter import (
    Adapter,
    Form,
    RunningDtype,
    check_adapter,
    open_quantized,
    plan_adapter,
    write_adapter,
)
from superweights.interventions.conditions import QuantizeWeights, ScaleWeights
from superweights.interventions.quantized_checkpoint import quantize_checkpoint
from superweights.interventions.rewriting import rewrite_checkpoint
from superweights.model.loading import LoadedModel, load
from superweights.quantization.clipping import Clip
from superweights.quantization.scheme import Scheme
from superweights.testing import save_tiny_checkpoint, tiny_model

SUPER = Coordinate.parse("2:49:7")
OTHERS = (Coordinate.parse("2:3:5"), Coordinate.parse("0:1:2"))
MODULE = "model.layers.2.mlp.down_proj"


def quantized(source: Path, to: Path, scheme: str, clip: str | None = None, keep: tuple[Coordinate, ...] = ()) -> Path:
    how = QuantizeWeights(Scheme.parse(scheme), clip=Clip.parse(clip) if clip else None, keep=keep)
    quantize_checkpoint(source, to, [how], threads=1)
    return to


@pytest.fixture(scope="module")
def clipped(planted_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted model with its super weight cut off by rounding."""
    return quantized(planted_checkpoint, tmp_path_factory.mktemp("clipped") / "q", "int8-row", "z=3")


@pytest.fixture(scope="module")
def original(planted_checkpoint: Path) -> Iterator[LoadedModel]:
    with load(planted_checkpoint, residency="streamed") as model:
        yield model


def plan(
    model: LoadedModel, files: Path, *weights: Coordinate, form: Form = "peft", dtype: RunningDtype = "auto"
) -> Adapter:
    with open_quantized(files) as opened:
        return plan_adapter(model, opened, weights, form=form, dtype=dtype)


def unpacked(files: Path, module: str = MODULE) -> torch.Tensor:
    """A matrix of a packed checkpoint, float32 [rows, cols]."""
    with Checkpoint.open(files) as checkpoint:
        packed = read_packed_matrix(checkpoint, module)
        assert packed is not None
        return packed.weights.clone()


def restored(weights: torch.Tensor, folder: Path, module: str = MODULE) -> torch.Tensor:
    """W + (alpha / r) B A, as PEFT adds it, from the files alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    lora_a, lora_b = (tensors[f"base_model.model.{module}.lora_{each}.weight"] for each in "AB")
    return weights + config["lora_alpha"] / config["r"] * (lora_b @ lora_a)


def test_the_lora_puts_one_value_back_and_leaves_the_rest(
    original: LoadedModel, clipped: Path, planted_checkpoint: Path, tmp_path: Path
) -> None:
    planned = plan(original, clipped, SUPER)
    nbytes = write_adapter(planned, tmp_path / "lora")
    with Checkpoint.open(planted_checkpoint) as checkpoint:
        exact = checkpoint.read_scalar(f"{MODULE}.weight", (49, 7)).value
    before = unpacked(clipped)
    assert abs(before[49, 7] / exact) < 0.5  # the scheme did destroy it
    after = restored(before, tmp_path / "lora")
    assert after[49, 7] == pytest.approx(exact, rel=2**-23)  # one rounding of delta, one of the sum
    before[49, 7] = after[49, 7]
    assert torch.equal(before, after)
    assert nbytes == (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size < 2000


def test_several_weights_are_one_lora_per_matrix_of_one_rank(
    original: LoadedModel, clipped: Path, planted_checkpoint: Path, tmp_path: Path
) -> None:
    planned = plan(original, clipped, SUPER, *OTHERS, SUPER)
    assert planned.rank == 2
    assert [len(each.weights) for each in planned.matrices] == [2, 1]
    write_adapter(planned, tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {(*each.shape,) for each in tensors.values()} == {(2, 112), (64, 2)}  # every module has the one rank
    plain = load_file(planted_checkpoint / "model.safetensors")
    for module, places in ((MODULE, [(49, 7), (3, 5)]), ("model.layers.0.mlp.down_proj", [(1, 2)])):
        before = unpacked(clipped, module)
        after = restored(before, tmp_path / "lora", module)
        for place in places:
            assert after[place] == pytest.approx(plain[f"{module}.weight"][place].item(), rel=2**-22)
            before[place] = after[place]
        assert torch.equal(before, after)


def test_the_config_names_exactly_these_modules(original: LoadedModel, clipped: Path, tmp_path: Path) -> None:
    write_adapter(plan(original, clipped, SUPER), tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["target_modules"] == [MODULE]
    assert (config["peft_type"], config["task_type"], config["r"], config["lora_alpha"]) == ("LORA", "CAUSAL_LM", 1, 1)
    assert config["base_model_name_or_path"] == str(clipped)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_delta_is_taken_from_what_the_engine_unpacks(dtype: RunningDtype, tmp_path: Path) -> None:
    """compressed-tensors multiplies code and scale in the model's dtype, which rounds the product."""
    source = save_tiny_checkpoint("llama", tmp_path / "plain", dtype=torch.bfloat16)
    files = quantized(source, tmp_path / "q", "int4-g16")
    wide = unpacked(files, "model.layers.1.mlp.down_proj")
    place = tuple((wide.bfloat16().float() != wide).nonzero()[0].tolist())  # one that rounding moves
    with load(source) as model:
        (found,) = plan(model, files, Coordinate(1, None, *place), dtype=dtype).weights
    wide = wide[place]
    assert found.quantized == (wide.item() if dtype == "float32" else wide.bfloat16().item())
    assert found.quantized + found.delta == found.original


def test_a_matrix_that_is_stored_unrounded_needs_nothing(
    original: LoadedModel, planted_checkpoint: Path, tmp_path: Path
) -> None:
    planned = plan(original, quantized(planted_checkpoint, tmp_path / "q", "int4-g16", keep=(SUPER,)), SUPER)
    assert not planned.matrices
    assert [(each.plain, each.weights[0].coordinate) for each in planned.unchanged] == [(True, SUPER)]
    with pytest.raises(UsageError, match="nothing to restore"):
        write_adapter(planned, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_weight_on_the_grid_needs_nothing(planted_checkpoint: Path, tmp_path: Path) -> None:
    rewrite_checkpoint(planted_checkpoint, tmp_path / "zero", [ScaleWeights((SUPER,), 0.0)])
    files = quantized(tmp_path / "zero", tmp_path / "q", "int4-g16")
    with load(tmp_path / "zero") as model:
        planned = plan(model, files, SUPER, *OTHERS)
    assert [(each.plain, [str(w.coordinate) for w in each.weights]) for each in planned.unchanged] == [
        (False, ["2:49:7"])
    ]
    assert {each.coordinate for each in planned.weights} == set(OTHERS)


def test_a_held_out_weight_comes_back_whole(original: LoadedModel, planted_checkpoint: Path, tmp_path: Path) -> None:
    rewrite_checkpoint(planted_checkpoint, tmp_path / "held", [ScaleWeights((SUPER,), 0.0)])
    files = quantized(tmp_path / "held", tmp_path / "q", "int4-g16")
    (weight,) = plan(original, files, SUPER).weights
    assert weight.quantized == 0 and weight.delta == weight.original
    assert math.copysign(1, weight.quantized) == 1  # a code of zero times a negative scale is minus zero


def test_a_plain_matrix_with_another_value_is_restored_too(
    original: LoadedModel, planted_checkpoint: Path, tmp_path: Path
) -> None:
    rewrite_checkpoint(planted_checkpoint, tmp_path / "half", [ScaleWeights((SUPER,), 0.5)])
    planned = plan(original, tmp_path / "half", SUPER)
    (weight,) = planned.weights
    assert planned.matrices[0].plain
    assert weight.delta == weight.original / 2
    write_adapter(planned, tmp_path / "lora")
    with Checkpoint.open(tmp_path / "half") as checkpoint:
        after = restored(checkpoint.view(f"{MODULE}.weight"), tmp_path / "lora")
        assert after[49, 7].item() == weight.original


def test_conv1d_is_told_to_peft(tmp_path: Path) -> None:
    source = save_tiny_checkpoint("gpt2", tmp_path / "plain")
    place = Coordinate.parse("1:5:20")
    rewrite_checkpoint(source, tmp_path / "half", [ScaleWeights((place,), 0.5)])
    with load(source) as model:
        planned = plan(model, tmp_path / "half", place)
        projection = model.architecture.locate(place)
    write_adapter(planned, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True and config["target_modules"] == [projection.module]
    module = tiny_model("gpt2").get_submodule(projection.module)
    weights = module.weight.data  # type: ignore[union-attr]
    change = restored(torch.zeros(projection.rows, projection.cols), tmp_path / "lora", projection.module)
    assert change.t().shape == weights.shape
    assert change.nonzero().tolist() == [[5, 20]]
    assert change[5, 20] == weights[20, 5] / 2


def test_routed_experts_are_refused(tmp_path: Path) -> None:
    source = save_tiny_checkpoint("mixtral", tmp_path / "plain", layers=2)
    with load(source) as model, pytest.raises(UsageError, match="routed expert"):
        plan(model, source, Coordinate.parse("1/2:5:20"))


def test_a_shared_expert_is_a_linear_layer_like_any_other(tmp_path: Path) -> None:
    source = save_tiny_checkpoint("qwen2_moe", tmp_path / "plain", layers=2)
    place = Coordinate.parse("1:5:20")
    rewrite_checkpoint(source, tmp_path / "half", [ScaleWeights((place,), 0.5)])
    with load(source) as model:
        planned = plan(model, tmp_path / "half", place)
        (name,) = (each.module for each in planned.matrices)
        assert isinstance(model.model.get_submodule(name), torch.nn.Linear)
    assert name.endswith("shared_expert.down_proj")


@pytest.mark.parametrize("place", ["2:64:7", "2:49:112", "6:0:0"])
def test_a_coordinate_out_of_range(place: str, original: LoadedModel, clipped: Path) -> None:
    with pytest.raises(CoordinateError):
        plan(original, clipped, Coordinate.parse(place))


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("qwen2", {}, "is a qwen2 of 6 layers, and the original is a llama of 6"),
        ("llama", {"layers": 4}, "is a llama of 4 layers"),
        ("llama", {"hidden": 96}, "is 96 x 112 there, and 64 x 112 in the original"),
    ],
)
def test_another_model_is_refused(
    family: str, changes: dict[str, Any], says: str, original: LoadedModel, tmp_path: Path
) -> None:
    other = save_tiny_checkpoint(family, tmp_path / "other", **changes)
    with pytest.raises(UsageError, match=says):
        plan(original, other, SUPER)


def test_other_weights_of_the_same_shapes_are_refused(original: LoadedModel, tmp_path: Path) -> None:
    other = save_tiny_checkpoint("llama", tmp_path / "other", seed=5)
    with pytest.raises(UsageError, match="nothing to do with that of the original"):
        plan(original, other, SUPER)


def test_a_column_that_awq_rescaled_is_refused(original: LoadedModel, planted_checkpoint: Path, tmp_path: Path) -> None:
    """AWQ multiplies a column and divides its input: what belongs there is not the value of the original."""
    changed = tmp_path / "scaled"
    shutil.copytree(planted_checkpoint, changed)
    tensors = load_file(changed / "model.safetensors")
    tensors[f"{MODULE}.weight"][:, 7] *= 1.5
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    files = quantized(changed, tmp_path / "q", "int4-g16")
    with pytest.raises(UsageError, match=r"col 7 of .* multiplied by about 1\.\d+, as AWQ"):
        plan(original, files, SUPER)
    assert plan(original, files, OTHERS[0]).weights  # another column of the same matrix


@pytest.mark.parametrize("scheme", ["int2-g16", "int3-row", "int4-g16-asym", "int8-row"])
@pytest.mark.parametrize("clip", [None, "z=1"])
def test_no_rounding_is_taken_for_rescaling(
    scheme: str, clip: str | None, original: LoadedModel, planted_checkpoint: Path, tmp_path: Path
) -> None:
    files = quantized(planted_checkpoint, tmp_path / "q", scheme, clip)
    plan(original, files, *(Coordinate(2, None, 49, col) for col in range(112)))


def test_an_original_that_is_quantized_itself_is_refused(clipped: Path) -> None:
    with load(clipped) as model, pytest.raises(QuantizedCheckpointError, match="Restoring exact values"):
        plan(model, clipped, SUPER)


def test_a_value_that_is_no_number_is_refused(original: LoadedModel, planted_checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(planted_checkpoint, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors[f"{MODULE}.weight"][49, 7] = math.inf
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteWeightsError, match="2:49:7"):
        plan(original, broken, SUPER)


def test_codes_of_an_unknown_format_are_refused(
    original: LoadedModel, planted_checkpoint: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(planted_checkpoint, odd)
    tensors = load_file(odd / "model.safetensors")
    tensors[f"{MODULE}.weight"] = tensors[f"{MODULE}.weight"].to(torch.int8)
    save_file(tensors, odd / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"stored as I8"):
        plan(original, odd, SUPER)
    del tensors[f"{MODULE}.weight"]
    save_file(tensors, odd / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingTensorError, match=MODULE):
        plan(original, odd, SUPER)


@pytest.fixture
def written(original: LoadedModel, clipped: Path, tmp_path: Path) -> Path:
    write_adapter(plan(original, clipped, SUPER, *OTHERS), tmp_path / "lora")
    return tmp_path / "lora"


def test_an_adapter_is_read_back(original: LoadedModel, clipped: Path, written: Path) -> None:
    with Checkpoint.open(clipped) as checkpoint:
        found = check_adapter(written, checkpoint)
    assert found == plan(original, clipped, SUPER, *OTHERS)


@pytest.mark.parametrize(
    ("scheme", "clip", "says"), [("int4-g16", "z=3", "tensors differ"), ("int8-row", "z=2", "2:49:7 is")]
)
def test_an_adapter_for_another_model_is_refused(
    scheme: str, clip: str, says: str, written: Path, planted_checkpoint: Path, tmp_path: Path
) -> None:
    """Of the same scheme with another clip, all headers are the same; values tell."""
    other = quantized(planted_checkpoint, tmp_path / "other", scheme, clip)
    with Checkpoint.open(other) as checkpoint, pytest.raises(UsageError, match=says):
        check_adapter(written, checkpoint)


def test_damaged_adapters_are_refused(clipped: Path, written: Path) -> None:
    file, record = written / "adapter_model.safetensors", written / "superweights.json"
    whole, text = file.read_bytes(), record.read_text()
    tensors = load_file(file)
    name = next(each for each in tensors if each.endswith("lora_B.weight"))
    tensors[name][0, 0] = 1
    save_file(tensors, file)
    with Checkpoint.open(clipped) as checkpoint:
        with pytest.raises(MalformedFileError, match="does not hold what"):
            check_adapter(written, checkpoint)
        file.write_bytes(whole[:100])
        with pytest.raises(MalformedFileError, match="cannot be read"):
            check_adapter(written, checkpoint)
        file.write_bytes(whole)
        for old, new in (('"form"', '"from"'), ("2:49:7", "2:49:700"), ("2:49:7", "2-49"), ('"float32"', '"int3"')):
            assert old in text
            record.write_text(text.replace(old, new))
            with pytest.raises(MalformedFileError):
                check_adapter(written, checkpoint)
        record.unlink()
        with pytest.raises(NotACheckpointError):
            check_adapter(written, checkpoint)


def test_what_is_there_is_not_touched(original: LoadedModel, clipped: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "note.txt").write_text("mine")
    planned = plan(original, clipped, SUPER)
    for target in (tmp_path / "taken", tmp_path / "taken" / "note.txt"):
        with pytest.raises(UsageError, match="Give a new folder"):
            write_adapter(planned, target)
    assert [each.name for each in tmp_path.rglob("*")] == ["taken", "note.txt"]


def test_a_failed_write_leaves_nothing(
    original: LoadedModel, clipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(copying, "put_in_place", full)
    with pytest.raises(RecordError, match="No space left"):
        write_adapter(plan(original, clipped, SUPER), tmp_path / "lora")
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_taken_over(original: LoadedModel, clipped: Path, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    write_adapter(plan(original, clipped, SUPER), tmp_path / "lora")
    assert sorted(each.name for each in (tmp_path / "lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "superweights.json",
    ]


def test_peft_loads_it_and_the_logits_are_those_of_the_value_put_back(
    original: LoadedModel, clipped: Path, planted_checkpoint: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="peft is no dependency")
    pytest.importorskip("compressed_tensors", reason="reads the packed files back")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    write_adapter(plan(original, clipped, SUPER), tmp_path / "lora")
    ids = torch.arange(96).reshape(2, 48) + 3
    unpack = CompressedTensorsConfig(run_compressed=False)  # PEFT looks for `weight`, which packed modules do not have
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # peft and accelerate speak of their own future
        base, put_back = (AutoModelForCausalLM.from_pretrained(clipped, quantization_config=unpack) for _ in range(2))
        alone = base(ids).logits
        weight = put_back.get_submodule(MODULE).weight
        weight[49, 7] = load_file(planted_checkpoint / "model.safetensors")[f"{MODULE}.weight"][49, 7]
        expected = put_back(ids).logits
        with_adapter = peft.PeftModel.from_pretrained(base, tmp_path / "lora")(ids).logits
    assert (alone - expected).abs().max() > 0.05
    # One product and one sum in another order, of logits below 1.
    torch.testing.assert_close(with_adapter, expected, atol=2e-6, rtol=0)


def test_without_the_package_gguf_it_says_how_to_get_it(
    original: LoadedModel, clipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"pip install superweights\[gguf\]"):
        plan(original, clipped, SUPER, form="gguf")
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=r"pip install superweights\[gguf\]"), open_quantized(tmp_path / "some.gguf"):
        pass


@pytest.fixture
def gguf() -> Any:
    return pytest.importorskip("gguf", reason="superweights[gguf] is optional")


PLACES = (Coordinate.parse("1:5:20"), Coordinate.parse("1:6:21"), Coordinate.parse("0:5:20"))


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose rows are whole blocks of 32 weights."""
    return save_tiny_checkpoint("llama", tmp_path_factory.mktemp("blocks") / "plain", layers=2, intermediate=128)


@pytest.fixture(params=["Q4_0", "Q4_1", "Q8_0", "BF16", "F16"])
def gguf_file(gguf: Any, blocks: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Its down projections as a GGUF file, one weight held out."""
    kind = gguf.GGMLQuantizationType[request.param]
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(2)
    tensors = load_file(blocks / "model.safetensors")
    for layer in range(2):
        weights = tensors[f"model.layers.{layer}.mlp.down_proj.weight"]
        weights[5, 20] *= layer == 0
        writer.add_tensor(f"blk.{layer}.ffn_down.weight", gguf.quantize(weights.numpy(), kind), raw_dtype=kind)
    _finish(writer)
    return tmp_path / "model.gguf"


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_llama_cpp_finds_what_it_asks_for(gguf: Any, blocks: Path, gguf_file: Path, tmp_path: Path) -> None:
    """The checks of llama.cpp's own loader (src/llama-adapter.cpp): keys, pairs, and shapes against the model's tensor."""
    with load(blocks) as model:
        planned = plan(model, gguf_file, *PLACES, form="gguf")
    write_adapter(planned, tmp_path / "lora")
    reader = gguf.GGUFReader(tmp_path / "lora" / "adapter.gguf")
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert values == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 2.0,
    }
    found = {each.name: each for each in reader.tensors}
    base = {each.name: each for each in gguf.GGUFReader(gguf_file).tensors}
    names = {each.rpartition(".")[0] for each in found}
    assert names == {"blk.1.ffn_down.weight", "blk.0.ffn_down.weight"}
    plain = load_file(blocks / "model.safetensors")
    for name in names:
        lora_a, lora_b = found[f"{name}.lora_a"], found[f"{name}.lora_b"]
        assert lora_a.shape[0] == base[name].shape[0] and lora_b.shape[1] == base[name].shape[1]
        assert lora_a.shape[1] == lora_b.shape[0] == 2
        weights = torch.from_numpy(gguf.dequantize(base[name].data, base[name].tensor_type).copy())
        after = weights + torch.from_numpy(lora_b.data.copy()) @ torch.from_numpy(lora_a.data.copy())
        layer = int(name.split(".")[1])
        for each in (each for each in planned.weights if each.coordinate.layer == layer):
            place = each.coordinate.row, each.coordinate.col
            exact = plain[f"model.layers.{layer}.mlp.down_proj.weight"][place].item()
            assert after[place] == pytest.approx(exact, rel=2**-22)
            weights[place] = after[place]
        assert torch.equal(after, weights)


@pytest.mark.parametrize("gguf_file", ["Q4_0"], indirect=True)
def test_a_gguf_adapter_is_read_back_and_refused_elsewhere(
    blocks: Path, gguf_file: Path, clipped: Path, tmp_path: Path
) -> None:
    with load(blocks) as model:
        planned = plan(model, gguf_file, *PLACES, form="gguf")
    write_adapter(planned, tmp_path / "lora")
    with open_quantized(gguf_file) as files:
        assert check_adapter(tmp_path / "lora", files) == planned
    with open_quantized(clipped) as files, pytest.raises(UsageError, match="another model"):
        check_adapter(tmp_path / "lora", files)


def test_a_checkpoint_gets_an_adapter_for_llama_cpp_too(
    gguf: Any, original: LoadedModel, clipped: Path, tmp_path: Path
) -> None:
    planned = plan(original, clipped, SUPER, form="gguf")
    write_adapter(planned, tmp_path / "lora")
    with open_quantized(clipped) as files:
        assert check_adapter(tmp_path / "lora", files).matrices == plan(original, clipped, SUPER).matrices


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mistral", "llama"), ("qwen3", "qwen3"), ("gemma3_text", "gemma3"), ("gpt_neox", "gptneox"), ("phi3", "phi3"),
        ("olmo2", "olmo2"), ("cohere", "command-r"), ("falcon", "falcon"),
    ],
)  # fmt: skip
def test_families_have_their_names_in_llama_cpp(gguf: Any, family: str, name: str, tmp_path: Path) -> None:
    source = save_tiny_checkpoint(family, tmp_path / "plain", layers=2)
    place = Coordinate.parse("1:5:20")
    rewrite_checkpoint(source, tmp_path / "half", [ScaleWeights((place,), 0.5)])
    with load(source) as model:
        planned = plan(model, tmp_path / "half", place, form="gguf")
    assert planned.architecture == name
    assert set(planned.tensors()) == {"blk.1.ffn_down.weight.lora_a", "blk.1.ffn_down.weight.lora_b"}


def test_a_family_that_llama_cpp_lacks_is_refused(gguf: Any, tmp_path: Path) -> None:
    source = save_tiny_checkpoint("opt", tmp_path / "plain", layers=2)
    with load(source) as model, pytest.raises(UnsupportedArchitectureError, match="opt"):
        plan(model, source, Coordinate.parse("1:5:20"), form="gguf")


@pytest.mark.parametrize("gguf_file", ["F32"], indirect=True)
def test_any_of_several_parts_is_the_model(gguf: Any, blocks: Path, gguf_file: Path, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=1)
    writer.add_block_count(2)
    for each in gguf.GGUFReader(gguf_file).tensors:
        writer.add_tensor(each.name, each.data.copy(), raw_dtype=each.tensor_type)
    _finish(writer)
    with load(blocks) as model:
        found = [plan(model, tmp_path / f"m-0000{number}-of-00002.gguf", *PLACES, form="gguf") for number in (1, 2)]
        whole = plan(model, gguf_file, *PLACES, form="gguf")
    assert found[0].matrices == found[1].matrices == whole.matrices
    assert found[0].quantized.digest == found[1].quantized.digest


@pytest.mark.parametrize("gguf_file", ["Q4_0"], indirect=True)
def test_broken_and_strange_gguf_files(gguf: Any, original: LoadedModel, gguf_file: Path, tmp_path: Path) -> None:
    (tmp_path / "torn.gguf").write_bytes(gguf_file.read_bytes()[:200])
    with pytest.raises(MalformedFileError, match=r"torn\.gguf"), open_quantized(tmp_path / "torn.gguf"):
        pass
    with pytest.raises(NotACheckpointError), open_quantized(tmp_path / "none.gguf"):
        pass
    for name, layers, error, says in (
        ("qwen2", 6, UsageError, "is a qwen2 of 6 layers"),
        ("llama", 6, MissingTensorError, r"blk\.2\.ffn_down\.weight"),
    ):
        writer = gguf.GGUFWriter(tmp_path / "other.gguf", name)
        writer.add_block_count(layers)
        writer.add_tensor("blk.0.ffn_up.weight", torch.zeros(4, 4).numpy())
        _finish(writer)
        with pytest.raises(error, match=says):
            plan(original, tmp_path / "other.gguf", SUPER, form="gguf")
