"""What is written against what vLLM reads, which cannot run here: its rules as it documents them and as its reader checks them.

Source:
    vLLM's reader of compressed-tensors (compressed_tensors.py, utils.py, schemes/compressed_tensors_wNa16.py) and
    marlin_utils.py, as of 2026: module names or the class in targets and ignore; fused layers need one answer for all parts;
    weight_packed int32 [rows, words], weight_scale [rows, groups] in the model's dtype, weight_shape int64 [2],
    weight_zero_point int32 [words of rows, groups]. Its Marlin kernels take 4 and 8 bits (with zero points 4), and groups of
    32, 64, 128 or a whole row.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file

from superweights.coordinates import Coordinate
from superweights.interventions.adapter import check_adapter, open_quantized
from superweights.interventions.quantized_checkpoint import ADAPTER_FOLDER, KeepIn, quantize_checkpoint
from superweights.testing import plant_super_weight, tiny_model

from .conftest import how

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Coordinate]:
    """A llama in bfloat16 and its super weight in layer 1. Do not change it."""
    model = tiny_model("llama", layers=3, intermediate=128)
    weight = plant_super_weight(model, layer=1)
    directory = tmp_path_factory.mktemp("planted") / "source"
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory, weight


def scheme_of(module: str, config: dict[str, Any]) -> dict[str, Any] | None:
    """The group that vLLM takes for a linear layer of the checkpoint; None where it is ignored."""
    if module in config["ignore"]:
        return None
    groups = config["config_groups"].values()
    named = [each for each in groups if module in each["targets"]]
    (found,) = named or [each for each in groups if "Linear" in each["targets"]]
    return dict(found["weights"])


def faults(directory: Path) -> list[str]:
    """Everything in a folder that vLLM would refuse."""
    whole = json.loads((directory / "config.json").read_text())
    config, dtype = whole["quantization_config"], getattr(torch, whole["dtype"])
    read = QuantizationConfig.model_validate(config)
    found = [] if (read.quant_method, read.format) == ("compressed-tensors", "pack-quantized") else ["format"]
    for group in config["config_groups"].values():
        QuantizationScheme.model_validate(group)  # refuses keys that it does not know
        found += ["input activations"] if group["input_activations"] else []
    tensors = load_file(directory / "model.safetensors")
    modules = {name.rpartition(".")[0] for name in tensors if "_proj.weight" in name}
    schemes = {module: scheme_of(module, config) for module in modules}
    for module, scheme in schemes.items():
        parts = {
            name.removeprefix(f"{module}."): each for name, each in tensors.items() if name.startswith(f"{module}.")
        }
        if scheme is None:
            found += [] if parts.keys() == {"weight"} else [f"{module} is ignored and packed"]
        else:
            found += _layout_faults(module, parts, scheme, dtype)
    for layer in {module.rpartition(".")[0] for module in modules}:
        for names in FUSED:
            answers = [schemes[f"{layer}.{name}"] for name in names if f"{layer}.{name}" in schemes]
            found += [] if all(each == answers[0] for each in answers) else [f"{layer}: {'/'.join(names)} differ"]
    return found


def _layout_faults(
    module: str, parts: dict[str, torch.Tensor], scheme: dict[str, Any], dtype: torch.dtype
) -> list[str]:
    rows, cols = parts["weight_shape"].tolist()
    bits, size = scheme["num_bits"], cols if scheme["strategy"] == "channel" else scheme["group_size"]
    expected = {
        "weight_packed": (torch.int32, (rows, math.ceil(cols * bits / 32))),
        "weight_scale": (dtype, (rows, cols // size)),
        "weight_shape": (torch.int64, (2,)),
    }
    if not scheme["symmetric"]:
        expected["weight_zero_point"] = (torch.int32, (math.ceil(rows * bits / 32), cols // size))
    found = {name: (each.dtype, tuple(each.shape)) for name, each in parts.items()}
    return [] if found == expected else [f"{module}: {found} is not {expected}"]


@pytest.mark.parametrize("scheme", ["int4-g32", "int8-row", "int4-g32-signed"])
@pytest.mark.parametrize("keep_in", ["plain", "adapter", "int8"])
def test_every_form_follows_the_rules(keep_in: KeepIn, scheme: str, planted, tmp_path: Path):
    source, weight = planted
    quantize_checkpoint(source, tmp_path / "new", [how(scheme, keep=(weight,))], keep_in=keep_in)
    assert faults(tmp_path / "new") == []


@pytest.mark.parametrize("scheme", ["int4-g32-asym", "int8-row-asym"])
@pytest.mark.parametrize("keep_in", ["plain", "adapter"])
def test_zero_points_follow_the_rules(keep_in: KeepIn, scheme: str, planted, tmp_path: Path):
    source, weight = planted
    quantize_checkpoint(source, tmp_path / "new", [how(scheme, keep=(weight,))], keep_in=keep_in)
    assert faults(tmp_path / "new") == []


def test_parts_of_a_fused_layer_that_differ_are_not_for_vllm(planted, tmp_path: Path):
    """As a budget may choose them: transformers loads that."""
    fine = ("model.layers.0.self_attn.k_proj.weight",)
    rest = tuple(
        name
        for name in load_file(planted[0] / "model.safetensors")
        if "_proj.weight" in name and name not in fine and ".1.mlp.gate" not in name
    )
    quantize_checkpoint(planted[0], tmp_path / "new", [how("int4-g32", only=rest), how("int8-g32", only=fine)])
    assert sorted(faults(tmp_path / "new")) == [
        "model.layers.0.self_attn: q_proj/k_proj/v_proj differ",
        "model.layers.1.mlp: gate_proj/up_proj differ",
    ]


@pytest.mark.parametrize(
    ("scheme", "runs"),
    [
        ("int4-g32", True),
        ("int4-g64", True),
        ("int4-row", True),
        ("int8-g32-signed", True),
        ("int8-row", True),
        ("int4-g32-asym", True),
        ("int8-g32-asym", False),
        ("int4-g16", False),
        ("int3-g32", False),
    ],
)
def test_which_schemes_marlin_kernels_run(scheme: str, runs: bool, planted, tmp_path: Path):
    quantize_checkpoint(planted[0], tmp_path / "new", [how(scheme)])
    (group,) = json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"][
        "config_groups"
    ].values()
    weights = group["weights"]
    size = -1 if weights["strategy"] == "channel" else weights["group_size"]
    bits = (4, 8) if weights["symmetric"] else (4,)
    assert (weights["num_bits"] in bits and size in (-1, 32, 64, 128)) == runs


def test_the_adapter_is_lora_as_vllm_loads_it(planted, tmp_path: Path):
    """PEFT's names on a module that is not fused, no bias, no DoRA, a rank of at most 16 (--max-lora-rank)."""
    source, weight = planted
    quantize_checkpoint(source, tmp_path / "new", [how("int4-g32", keep=(weight,))], keep_in="adapter")
    folder = tmp_path / "new" / ADAPTER_FOLDER
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["bias"], config["use_dora"]) == (1, 1, "none", False)
    assert (config["modules_to_save"], config["use_rslora"]) == (None, False)
    (module,) = config["target_modules"]
    assert module == "model.layers.1.mlp.down_proj"
    tensors = load_file(folder / "adapter_model.safetensors")
    shapes = {f"base_model.model.{module}.lora_A.weight": (1, 128), f"base_model.model.{module}.lora_B.weight": (64, 1)}
    assert {name: tuple(each.shape) for name, each in tensors.items()} == shapes
    with open_quantized(tmp_path / "new") as files:
        assert check_adapter(folder, files).quantized.digest == files.identity.digest
