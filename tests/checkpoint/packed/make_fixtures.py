"""Writes the fixtures: a tiny llama that other packages quantize, and what they say the weights are afterwards.

Each package wants an environment of its own; run this file in it, with the name of the format:

    gptq                gptqmodel 7.6.0, transformers 5.23.0 (GPTQMODEL_CPU_WORKERS=4 where there are few cores)
    auto-round          auto-round 0.16.1, transformers 5.23.0
    awq                 auto-round too; then awq-dequantized where gptqmodel is (AWQ itself needs a GPU)
    bitsandbytes        bitsandbytes 0.50.2, transformers 5.23.0
    compressed-tensors  llmcompressor 0.14.0.1, compressed-tensors 0.19.0, transformers 5.17.0
    fp8                 transformers 5.23.0
    torchao             torchao 0.18.0, transformers 5.23.0
    hqq                 hqq 0.2.8.post1, transformers 4.57.6 (transformers 5 does not quantize with hqq)
    quanto              optimum-quanto 0.2.7, transformers 5.23.0
    plain               transformers 5.23.0: the weights before, by number of cols

all with torch 2.13.0 for the CPU, as versions.json in each folder says. A fixture is config.json and model.safetensors with the
tensors of one or two modules, and dequantized.safetensors with their weights as the package itself gives them back.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

FIXTURES = Path(__file__).parent / "fixtures"
DOWN, QUERY = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"
PLANTED = (5, 77)
"""Row and col of one weight of 2 in the down projection; all others are near 0.02."""
Truth = dict[str, torch.Tensor | None]
Made = Iterator[tuple[str, Path, Truth]]
"""Name of the fixture, folder of the quantized model, and weights by module."""


def plain_model(directory: Path, dtype: torch.dtype, *, intermediate: int = 96) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=intermediate, num_hidden_layers=2, vocab_size=64, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_submodule(DOWN).weight[PLANTED] = 2.0
    model.to(dtype).save_pretrained(directory)
    return directory


def keep(made: Path, to: Path, truth: Truth) -> None:
    """Copies what a test needs of a quantized model."""
    to.mkdir(parents=True)
    modules = tuple(f"{module}." for module in truth)
    kept_names = (*modules, "model.norm.weight")
    tensors = {
        name: each for name, each in load_file(made / "model.safetensors").items() if name.startswith(kept_names)
    }
    with safe_open(made / "model.safetensors", "pt") as file:
        metadata = {
            key: text for key, text in (file.metadata() or {}).items() if key.startswith(modules) or key == "format"
        }
    save_file(tensors, to / "model.safetensors", metadata=metadata)
    told = {module: each.contiguous() for module, each in truth.items() if each is not None}
    if told:
        save_file(told, to / "dequantized.safetensors")
    config = json.loads((made / "config.json").read_text())
    keys = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "quantization_config")
    kept = {key: config[key] for key in keys if key in config}
    kept.get("quantization_config", {}).pop("meta", None)  # folders of the machine that made it
    (to / "config.json").write_text(json.dumps(kept, indent=1) + "\n")


def through(layer: torch.nn.Module, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """The weights of a layer by what it makes of each unit vector: exact, every sum has one term that is not 0."""
    with torch.no_grad():
        return layer(torch.eye(cols, dtype=dtype)).t()


def tokens(count: int = 16) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(3, 64, (48,), generator=generator).tolist(), "attention_mask": [1] * 48}
        for _ in range(count)
    ]


def tokenizer(directory: Path) -> Any:
    """A vocabulary that the packages ask for and do not use."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", bos_token="w1", pad_token="w0")
    made.save_pretrained(directory)
    return made


def plain() -> None:
    tensors = {}
    with tempfile.TemporaryDirectory() as work:
        for cols in (96, 128, 256):
            model = plain_model(Path(work) / str(cols), torch.float32, intermediate=cols)
            tensors[str(cols)] = load_file(model / "model.safetensors")[f"{DOWN}.weight"]
    (FIXTURES / "plain").mkdir(exist_ok=True)
    save_file(tensors, FIXTURES / "plain" / "down_proj.safetensors")
    note_versions(FIXTURES / "plain", "transformers", "torch")


def gptq(work: Path) -> Made:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    source = plain_model(work / "plain", torch.float16)
    tokenizer(source)
    for name, settings in {
        "v1-4bit-act-order": {"bits": 4, "group_size": 32, "desc_act": True, "sym": False, "act_group_aware": False},
        "v2-4bit": {"bits": 4, "group_size": 32, "desc_act": False, "sym": False, "format": "gptq_v2"},
        "v1-3bit": {"bits": 3, "group_size": 32, "desc_act": False},
        "v1-2bit": {"bits": 2, "group_size": 32, "desc_act": False, "sym": False},
        "v1-8bit": {"bits": 8, "group_size": -1, "desc_act": False, "act_group_aware": False},
    }.items():
        model = GPTQModel.load(
            str(source), QuantizeConfig(**settings, offload_to_disk=False), device="cpu", dtype=torch.float16
        )
        model.quantize(tokens(), batch_size=4)
        model.save(str(work / name))
        again = GPTQModel.load(str(work / name), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
        yield name, work / name, {DOWN: again.model.get_submodule(DOWN).dequantize_weight().t()}


def awq(work: Path) -> Made:
    """auto-round packs; what the codes mean is said by gptqmodel, in `awq_dequantized`."""
    ways = {"gemm": ("auto_awq", "W4A16", False), "auto-round": ("auto_round:auto_awq", "W4A16", False)}
    yield from ((name, made, {DOWN: None}) for name, made in rounded(work, ways))


def awq_dequantized() -> None:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    for made in (FIXTURES / "awq").glob("*/model.safetensors"):
        stored = load_file(made)
        parts = (stored[f"{DOWN}.{part}"] for part in ("qweight", "qzeros", "scales"))
        truth = dequantize_gemm(*parts, 4, 32).t().contiguous()
        save_file({DOWN: truth}, made.with_name("dequantized.safetensors"))
    note_versions(FIXTURES / "awq", "gptqmodel")


def rounded(work: Path, ways: dict[str, tuple[str, str, bool]]) -> Iterator[tuple[str, Path]]:
    """Models of auto-round by format, scheme and whether the grid is symmetric."""
    from auto_round import AutoRound

    source = plain_model(work / "plain", torch.float16)
    words = tokenizer(source)
    for name, (format, scheme, symmetric) in ways.items():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
        rounding = AutoRound(
            model, tokenizer=words, iters=0, disable_opt_rtn=True, device_map="cpu", enable_torch_compile=False,
            scheme=scheme, sym=symmetric, group_size=32,
        )  # fmt: skip
        rounding.quantize_and_save(str(work / name), format=format)
        yield name, next((work / name).rglob("model.safetensors")).parent


def auto_round(work: Path) -> Made:
    ways = {
        "auto-gptq-4bit": ("auto_round", "W4A16", True),
        "auto-gptq-3bit": ("auto_round", "W3A16", True),
    }
    for name, made in rounded(work, ways):
        again = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float16, device_map="cpu")
        yield name, made, {DOWN: through(again.get_submodule(DOWN), 96, torch.float16)}


def bitsandbytes(work: Path) -> Made:
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
    from transformers import BitsAndBytesConfig

    for name, intermediate, settings in (
        ("nf4-double", 128, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
        ("nf4-over-rows", 96, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        ("fp4", 128, {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
        ("fp4-double-in-bfloat16", 128, {
            "load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True,
            "bnb_4bit_quant_storage": torch.bfloat16,
        }),
        ("int8", 128, {"load_in_8bit": True}),
    ):  # fmt: skip
        source = plain_model(work / f"plain-{intermediate}", torch.float16, intermediate=intermediate)
        config = BitsAndBytesConfig(**settings)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float16, quantization_config=config, device_map="cpu"
        )
        model.save_pretrained(work / name)
        weight = model.get_submodule(DOWN).weight
        if name == "int8":
            truth = int8_vectorwise_dequant(weight.data, load_file(work / name / "model.safetensors")[f"{DOWN}.SCB"])
        else:
            truth = dequantize_4bit(weight.data, weight.quant_state)
        yield name, work / name, {DOWN: truth}


def compressed_tensors(work: Path) -> Made:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    def group(targets: str = "Linear", **settings: Any) -> QuantizationScheme:
        return QuantizationScheme(targets=[targets], weights=QuantizationArgs(**settings))

    integers = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    source = plain_model(work / "plain", torch.bfloat16)
    for name, recipe in {
        "pack-4bit-group": {"g": group(**integers)},
        "pack-4bit-group-asym": {"g": group(**integers, symmetric=False)},
        "pack-3bit-channel-asym": {"g": group(num_bits=3, type="int", strategy="channel", symmetric=False)},
        "pack-8bit-tensor": {"g": group(num_bits=8, type="int", strategy="tensor")},
        "two-groups": {
            "a": group("re:.*(q|k|v|o|gate|up)_proj", **integers),
            "b": group("re:.*down_proj", num_bits=8, type="int", strategy="channel"),
        },
        "int-channel": "W8A8",
        "float-channel": "FP8_DYNAMIC",
        "naive-float-tensor": {"g": group(num_bits=8, type="float", strategy="tensor")},
        "naive-float-block": {"g": group(num_bits=8, type="float", strategy="block", block_structure=[32, 32])},
        "nvfp4": "NVFP4A16",
        "mxfp4": "MXFP4A16",
        "mxfp8": "MXFP8A16",
    }.items():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        how = {"config_groups": recipe} if isinstance(recipe, dict) else {"scheme": recipe, "targets": "Linear"}
        oneshot(model=model, recipe=QuantizationModifier(ignore=["lm_head"], **how))
        model.save_pretrained(work / name, save_compressed=True)
        modules = (DOWN, QUERY) if name == "two-groups" else (DOWN,)
        yield name, work / name, {module: decompressed(work / name, module) for module in modules}


def decompressed(made: Path, module: str) -> torch.Tensor:
    """What the compressor of the layout makes of a module's tensors."""
    import re

    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    config = json.loads((made / "config.json").read_text())["quantization_config"]
    of_module = [
        each
        for each in config["config_groups"].values()
        if any(target == "Linear" or re.match(target.removeprefix("re:"), module) for target in each["targets"])
    ]
    scheme = QuantizationScheme(**of_module[0])
    stored = load_file(made / "model.safetensors")
    state = {name.removeprefix(f"{module}."): each for name, each in stored.items() if name.startswith(f"{module}.")}
    return BaseCompressor.get_value_from_registry(of_module[0]["format"]).decompress(state, scheme)["weight"]


def fp8(work: Path) -> Made:
    """Without a GPU transformers does not quantize a model, but the two operations it would call run anywhere."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    source = plain_model(work / "plain", torch.float32)
    plain = load_file(source / "model.safetensors")
    for name, block, kind in (
        ("block", [16, 48], "float"),
        ("block-power-of-two", [32, 32], "ue8m0"),
        ("matrix", None, "float"),
    ):
        settings = {"weight_block_size": block, "scale_fmt": kind}
        quantizer = SimpleNamespace(quantization_config=SimpleNamespace(**settings))
        parts = Fp8Quantize(quantizer).convert({f"{DOWN}.weight": plain[f"{DOWN}.weight"]})
        given = {part: parts[f"{DOWN}.{part}"] for part in ("weight", "weight_scale_inv")}
        truth = Fp8Dequantize(quantizer).convert(given)["weight"]
        made = work / name
        made.mkdir()
        save_file({**plain, **parts}, made / "model.safetensors")
        config = json.loads((source / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic", **settings}
        (made / "config.json").write_text(json.dumps(config))
        yield name, made, {DOWN: truth}


def torchao(work: Path) -> Made:
    import torchao.quantization as ao
    from transformers import TorchAoConfig

    source = plain_model(work / "plain", torch.bfloat16)
    for name, config in {
        "int8-row": ao.Int8WeightOnlyConfig(version=2),
        "int8-group": ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(32)),
        "int8-activations-too": ao.Int8DynamicActivationInt8WeightConfig(),
        "float8-row": ao.Float8WeightOnlyConfig(),
        "int4-group": ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)),
        "int3-row-asym": ao.IntxWeightOnlyConfig(
            weight_dtype=torch.int3, granularity=ao.PerAxis(0), mapping_type=ao.quant_primitives.MappingType.ASYMMETRIC
        ),
    }.items():
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.bfloat16, quantization_config=TorchAoConfig(config)
        )
        model.save_pretrained(work / name)
        again = AutoModelForCausalLM.from_pretrained(work / name, dtype=torch.bfloat16)
        yield name, work / name, {DOWN: again.get_submodule(DOWN).weight.dequantize()}


def hqq(work: Path) -> Made:
    from transformers import HqqConfig

    source = plain_model(work / "plain", torch.float32)
    for name, settings in {
        "8bit": {"nbits": 8, "group_size": 32},
        "4bit-as-float": {"nbits": 4, "group_size": 32, "view_as_float": True},
        "4bit-over-rows": {"nbits": 4, "group_size": 64},
        "4bit-columns": {"nbits": 4, "group_size": 16, "axis": 0},
        "3bit": {"nbits": 3, "group_size": 32},
        "2bit": {"nbits": 2, "group_size": 16},
        "1bit": {"nbits": 1, "group_size": 32},
    }.items():
        config = HqqConfig(**settings)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, quantization_config=config, device_map="cpu"
        )
        model.save_pretrained(work / name)
        yield name, work / name, {DOWN: model.get_submodule(DOWN).dequantize()}


def quanto(work: Path) -> Made:
    from optimum.quanto import QuantizedModelForCausalLM, qfloat8, qint2, qint4, qint8

    for name, kind, intermediate in (
        ("int8", qint8, 96), ("float8", qfloat8, 96), ("int4", qint4, 96), ("int4-group", qint4, 256), ("int2", qint2, 96),
    ):  # fmt: skip
        source = plain_model(work / f"plain-{intermediate}", torch.float32, intermediate=intermediate)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        QuantizedModelForCausalLM.quantize(model, weights=kind, exclude="lm_head").save_pretrained(work / name)
        again = QuantizedModelForCausalLM.from_pretrained(work / name)
        modules = (DOWN, "model.layers.0.mlp.up_proj") if name == "int4" else (DOWN,)
        yield name, work / name, {each: again._wrapped.get_submodule(each).weight.dequantize() for each in modules}


FORMATS: dict[str, tuple[Callable[[Path], Made], tuple[str, ...]]] = {
    "gptq": (gptq, ("gptqmodel",)),
    "awq": (awq, ("auto-round",)),
    "auto-round": (auto_round, ("auto-round",)),
    "bitsandbytes": (bitsandbytes, ("bitsandbytes",)),
    "compressed-tensors": (compressed_tensors, ("llmcompressor", "compressed-tensors")),
    "fp8": (fp8, ()),
    "torchao": (torchao, ("torchao",)),
    "hqq": (hqq, ("hqq",)),
    "quanto": (quanto, ("optimum-quanto",)),
}
"""How each is made, and the packages whose versions count beside torch and transformers."""


def note_versions(folder: Path, *packages: str) -> None:
    file = folder / "versions.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**known, **{each: version(each) for each in packages}}, indent=1) + "\n")


def main() -> None:
    name = sys.argv[1]
    if name == "awq-dequantized":
        return awq_dequantized()
    if name == "plain":
        return plain()
    make, packages = FORMATS[name]
    target = FIXTURES / name
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory() as work:
        for fixture, made, truth in make(Path(work)):
            keep(made, target / fixture, truth)
    note_versions(target, *packages, "transformers", "torch")


if __name__ == "__main__":
    main()
