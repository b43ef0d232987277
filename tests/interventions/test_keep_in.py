"""Kept weights in an adapter beside packed files, and in 8 bits: exact to the bit, loaded by others, or refused in time."""

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from superweights.checkpoint import Checkpoint
from superweights.checkpoint.packed.reading import read_packed_matrix
from superweights.checkpoint.stored_matrices import checkpoint_matrices
from superweights.coordinates import Coordinate
from superweights.errors import RecordError, SuperweightsError, UsageError
from superweights.integrations.transformers_quantizer import load_packed
from superweights.interventions import quantized_checkpoint
from superweights.interventions.adapter import check_adapter
from superweights.interventions.conditions import QuantizeWeights
from superweights.interventions.quantized_checkpoint import ADAPTER_FOLDER, KeepIn, quantize_checkpoint
from superweights.interventions.rewriting import rewrite_checkpoint
from superweights.quantization.held_out import rounded
from superweights.quantization.scheme import Scheme
from superweights.testing import save_tiny_checkpoint

from .conftest import content, how, stored

IDS = torch.arange(4, 36)[None]
MODULE = "model.layers.1.mlp.down_proj"
DOWN = f"{MODULE}.weight"
UNPACK = CompressedTensorsConfig(dequantize=True)


def groups_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())["quantization_config"]
    return found


def loaded(directory: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # transformers says that the config passed is used, peft speaks of its own future
        return AutoModelForCausalLM.from_pretrained(directory, **{"dtype": "auto", **options})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("scheme", ["int4-g32", "int8-row", "int3-g32-signed", "int4-g32-asym", "int2-g16"])
def test_the_packed_matrix_and_the_lora_are_the_matrix_rounded_around_its_super_weight(scheme: str, planted, tmp_path):
    source, weight = planted
    plan = quantize_checkpoint(source, tmp_path / "new", [how(scheme, keep=(weight,))], keep_in="adapter")
    assert plan.kept == () and len(plan.quantized) == 21
    with Checkpoint.open(tmp_path / "new") as checkpoint:
        packed = read_packed_matrix(checkpoint, MODULE)
        assert packed is not None
        adapter = check_adapter(tmp_path / "new" / ADAPTER_FOLDER, checkpoint)
    (restored,) = adapter.weights
    exact = stored(source)[DOWN]
    assert (restored.coordinate, restored.quantized) == (weight, 0)
    assert restored.original == restored.delta == exact[weight.row, weight.col].item()
    lora_a, lora_b = adapter.matrices[0].factors(adapter.rank)
    place = weight.row * exact.shape[1] + weight.col
    expected = rounded(exact, Scheme.parse(scheme), kept=[place])
    assert torch.equal((packed.weights.bfloat16().float() + lora_b @ lora_a).bfloat16(), expected)
    (entry,) = groups_of(tmp_path / "new")["super_weights"]
    assert (entry["keep_in"], entry["value"]) == ("adapter", restored.original)


def test_others_read_the_packed_files_and_not_the_adapter(planted, tmp_path: Path):
    source, weight = planted
    quantize_checkpoint(source, tmp_path / "new", [how("int4-g32", keep=(weight,))], keep_in="adapter")
    reference = loaded(source)
    for name, parameter in reference.named_parameters():
        if name.endswith("_proj.weight"):
            held = [weight.row * parameter.shape[1] + weight.col] if name == DOWN else []
            with torch.no_grad():
                parameter.copy_(rounded(parameter, Scheme.parse("int4-g32"), kept=held))
                parameter.view(-1)[held] = 0
    expected = logits(reference)
    assert torch.equal(logits(loaded(tmp_path / "new")), expected)
    assert torch.equal(logits(loaded(tmp_path / "new", quantization_config=UNPACK)), expected)
    (group,) = QuantizationConfig.model_validate(groups_of(tmp_path / "new")).config_groups.values()
    tensors = stored(tmp_path / "new")
    state = {f"weight_{part}": tensors[f"{DOWN}_{part}"] for part in ("packed", "scale", "shape")}
    unpacked = PackedQuantizationCompressor.decompress(state, group)["weight"]
    assert torch.equal(unpacked, reference.get_parameter(DOWN))


def test_packed_kernels_restore_the_weight_without_the_adapter(planted, tmp_path: Path):
    """They read `super_weights`."""
    source, weight = planted
    quantize_checkpoint(source, tmp_path / "new", [how("int4-g32", keep=(weight,))], keep_in="adapter")
    module = load_packed(tmp_path / "new", dtype="auto").get_submodule(MODULE)
    exact = stored(source)[DOWN][weight.row, weight.col]
    assert module.to_linear(torch.bfloat16).weight[weight.row, weight.col] == exact


@pytest.mark.parametrize("scheme", ["int4-g32", "int3-g32-signed"])
def test_peft_adds_it_and_the_logits_are_those_of_the_weight_put_back(scheme: str, planted, tmp_path: Path):
    peft = pytest.importorskip("peft", reason="peft is optional")
    source, weight = planted
    quantize_checkpoint(source, tmp_path / "new", [how(scheme, keep=(weight,))], keep_in="adapter")
    base, put_back = (loaded(tmp_path / "new", dtype=torch.float32, quantization_config=UNPACK) for _ in range(2))
    alone = logits(base)
    with torch.no_grad():
        put_back.get_parameter(DOWN)[weight.row, weight.col] = stored(source)[DOWN][weight.row, weight.col].float()
    expected = logits(put_back)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = logits(peft.PeftModel.from_pretrained(base, tmp_path / "new" / ADAPTER_FOLDER))
    assert (alone - expected).abs().max() > 0.05
    # One product and one sum in another order, of logits below 2.
    torch.testing.assert_close(found, expected, atol=4e-6, rtol=0)


def test_the_adapter_is_refused_on_another_base(planted, tmp_path: Path):
    source, weight = planted
    for name, scheme in (("one", "int4-g32"), ("other", "int4-g16")):
        quantize_checkpoint(source, tmp_path / name, [how(scheme, keep=(weight,))], keep_in="adapter")
    quantize_checkpoint(source, tmp_path / "alike", [how("int4-g32")])  # same headers, the weight is not 0
    for name in ("other", "alike"):
        with Checkpoint.open(tmp_path / name) as checkpoint, pytest.raises(UsageError, match="is another model"):
            check_adapter(tmp_path / "one" / ADAPTER_FOLDER, checkpoint)


def test_an_interruption_while_the_adapter_is_written_is_made_good(planted, tmp_path: Path, monkeypatch):
    source, weight = planted
    parts = [how("int4-g32", keep=(weight,))]

    def interrupted(_: object, folder: Path) -> None:
        folder.mkdir()
        (folder / "half").write_text("written")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(quantized_checkpoint, "write_adapter_files", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(source, tmp_path / "new", parts, keep_in="adapter")
    assert [each.name for each in tmp_path.iterdir()] == [".new.partial"]
    quantize_checkpoint(source, tmp_path / "new", parts, keep_in="adapter")
    assert [each.name for each in tmp_path.iterdir()] == ["new"]
    found = content(tmp_path / "new")
    shutil.rmtree(tmp_path / "new")
    quantize_checkpoint(source, tmp_path / "new", parts, keep_in="adapter")
    assert found == content(tmp_path / "new")


def test_a_full_disk_leaves_neither_model_nor_adapter(planted, tmp_path: Path, monkeypatch):
    source, weight = planted

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quantized_checkpoint, "write_adapter_files", full)
    with pytest.raises(RecordError, match="No space left"):
        quantize_checkpoint(source, tmp_path / "new", [how("int4-g32", keep=(weight,))], keep_in="adapter")
    assert not list(tmp_path.iterdir())


def test_a_shared_expert_is_kept_in_an_adapter_and_a_plain_rewrite_drops_it(tmp_path: Path):
    source = save_tiny_checkpoint("qwen2_moe", tmp_path / "source", layers=2, dtype=torch.bfloat16)
    parts = [how("int4-row", keep=(Coordinate.parse("1:3:5"),))]
    plan = quantize_checkpoint(source, tmp_path / "new", parts, keep_in="adapter")
    assert plan.held.keys() == {"model.layers.1.mlp.shared_expert.down_proj.weight"}
    assert (tmp_path / "new" / ADAPTER_FOLDER / "adapter_config.json").is_file()
    quantize_checkpoint(source, tmp_path / "new", parts, overwrite=True)
    assert not (tmp_path / "new" / ADAPTER_FOLDER).exists()


# In 8 bits.


@pytest.mark.parametrize("scheme", ["int4-g32", "int3-row", "int4-g16-signed"])
def test_eight_bits_hold_the_largest_of_a_group_exactly(scheme: str, planted, tmp_path: Path):
    source, weight = planted
    plan = quantize_checkpoint(source, tmp_path / "new", [how(scheme, keep=(weight,))], keep_in="int8")
    fine = plan.quantized[DOWN]
    assert (fine.bits, fine.offset, fine.sharing) == (8, "signed", Scheme.parse(scheme).sharing)
    model = loaded(tmp_path / "new")
    found = logits(model)
    assert model.get_parameter(DOWN)[weight.row, weight.col] == stored(source)[DOWN][weight.row, weight.col]
    others = tuple(name for name in plan.quantized if name != DOWN)
    rewrite_checkpoint(source, tmp_path / "rewritten", [how(scheme, only=others), how(str(fine), only=(DOWN,))])
    assert torch.equal(found, logits(loaded(tmp_path / "rewritten")))


def test_two_schemes_are_an_error_where_transformers_would_read_one_as_the_other(planted, tmp_path: Path):
    """`dequantize=True` decodes all by the first group; with the narrow one first, it gave wrong weights and no error."""
    source, weight = planted
    quantize_checkpoint(source, tmp_path / "new", [how("int4-g32", keep=(weight,))], keep_in="int8")
    first, second = groups_of(tmp_path / "new")["config_groups"].values()
    assert (first["weights"]["num_bits"], second["weights"]["num_bits"]) == (8, 4)
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        loaded(tmp_path / "new", quantization_config=UNPACK)


def test_eight_bits_among_eight_bits_are_one_scheme_that_loads_in_every_way(planted, tmp_path: Path):
    source, weight = planted
    quantize_checkpoint(source, tmp_path / "new", [how("int8-g32", keep=(weight,))], keep_in="int8")
    (group,) = groups_of(tmp_path / "new")["config_groups"].values()
    assert group["targets"] == ["Linear"]
    unpacked = loaded(tmp_path / "new", quantization_config=UNPACK)
    assert torch.equal(logits(unpacked), logits(loaded(tmp_path / "new")))
    assert unpacked.get_parameter(DOWN)[weight.row, weight.col] == stored(source)[DOWN][weight.row, weight.col]


@pytest.mark.parametrize(("experts", "dense"), [("int3-g16", "int8-row"), ("int8-row", "int4-row")])
def test_experts_of_another_scheme_load_dequantized_too(experts: str, dense: str, tmp_path: Path):
    source = save_tiny_checkpoint("qwen3_moe", tmp_path / "source", layers=2, dtype=torch.bfloat16)
    with Checkpoint.open(source) as checkpoint:
        names = [each.tensor for each in checkpoint_matrices(checkpoint)]
    parts = [
        how(dense, only=tuple(name for name in names if ".experts." not in name)),
        how(experts, only=tuple(name for name in names if ".experts." in name)),
    ]
    quantize_checkpoint(source, tmp_path / "new", parts)
    rewrite_checkpoint(source, tmp_path / "rewritten", parts)
    expected = logits(loaded(tmp_path / "rewritten"))
    assert torch.equal(logits(loaded(tmp_path / "new")), expected)
    assert torch.equal(logits(loaded(tmp_path / "new", quantization_config=UNPACK)), expected)


# What it costs, and what is refused.


@pytest.mark.parametrize("keep_in", ["plain", "adapter", "int8"])
def test_the_cost_of_keeping_is_that_of_the_files(keep_in: KeepIn, planted, tmp_path: Path):
    source, weight = planted
    bare = quantize_checkpoint(source, tmp_path / "bare", [how("int4-g32")])
    plan = quantize_checkpoint(source, tmp_path / "new", [how("int4-g32", keep=(weight,))], keep_in=keep_in)
    assert (bare.keeping_nbytes, bare.bits_per_weight_without) == (0, bare.bits_per_weight)
    found = sum(each.nbytes for part in ("new", f"new/{ADAPTER_FOLDER}") for each in stored(tmp_path / part).values())
    assert plan.nbytes == found
    assert plan.keeping_nbytes == found - bare.nbytes
    assert plan.bits_per_weight_without == bare.bits_per_weight < plan.bits_per_weight


def refused(source: Path, to: Path, keep_in: KeepIn, part: QuantizeWeights) -> str:
    """The message of what is refused before anything is written."""
    with pytest.raises(SuperweightsError) as caught:
        quantize_checkpoint(source, to / "out" / "new", [part], keep_in=keep_in)
    assert not (to / "out").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("keep_in", "scheme", "place", "more", "says"),
    [
        ("adapter", "int4-g32", None, {"amplify": 2.0}, "Amplify them in the plain way"),
        ("int8", "int4-g32", None, {"amplify": 2.0}, "Amplify them in the plain way"),
        ("int8", "int4-g32-asym", None, {}, "transformers loads no such mixture"),
        ("int8", "int4-row", "1:5:7", {}, "only the largest weight of a row is exact there"),
        ("adapter", "int4-g32", "1/0:5:7", {}, "no routed experts"),
    ],
)
def test_weights_that_cannot_be_kept_in_this_way(
    keep_in: KeepIn, scheme: str, place: str | None, more: Mapping[str, Any], says: str, planted, tmp_path: Path
):
    source, weight = planted
    kept = weight if place is None else Coordinate.parse(place)
    assert says in refused(source, tmp_path, keep_in, how(scheme, keep=(kept,), **more))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_routed_experts_are_refused_for_an_adapter(family: str, tmp_path: Path):
    source = save_tiny_checkpoint(family, tmp_path / "source", layers=2, dtype=torch.bfloat16)
    part = how("int4-row", keep=(Coordinate.parse("1/2:3:5"),))
    assert "of a routed expert, on which engines load no LoRA" in refused(source, tmp_path, "adapter", part)


def test_gpt2_is_refused_for_an_adapter_as_it_is_plain(tmp_path: Path):
    source = save_tiny_checkpoint("gpt2", tmp_path / "source", layers=2)
    part = how("int4-row", keep=(Coordinate.parse("1:3:5"),))
    assert "c_attn.weight, which no packed format holds" in refused(source, tmp_path, "adapter", part)


def test_a_kept_weight_that_is_no_number_is_refused_for_an_adapter(planted, tmp_path: Path):
    source, weight = planted
    damaged = Path(shutil.copytree(source, tmp_path / "damaged"))
    with Checkpoint.open(damaged) as checkpoint:
        file = damaged / checkpoint.entry(DOWN).file
    tensors = load_file(file)
    tensors[DOWN][weight.row, weight.col] = float("inf")
    save_file(tensors, file, {"format": "pt"})
    assert "in an adapter: it is inf. Leave it out." in refused(
        damaged, tmp_path, "adapter", how("int4-g32", keep=(weight,))
    )
