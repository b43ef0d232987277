"""Packed checkpoints: other packages read them, and find the weights that rounding gives, to the bit."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from superweights.checkpoint import Checkpoint
from superweights.checkpoint.stored_matrices import checkpoint_matrices
from superweights.coordinates import Coordinate
from superweights.errors import (
    CoordinateError,
    NonFiniteWeightsError,
    QuantizedCheckpointError,
    SuperweightsError,
    UsageError,
)
from superweights.interventions.conditions import QuantizeWeights
from superweights.interventions.quantized_checkpoint import (
    QuantizedCheckpoint,
    plan_quantized_checkpoint,
    quantize_checkpoint,
)
from superweights.interventions.rewriting import rewrite_checkpoint
from superweights.quantization.clipping import Clip
from superweights.quantization.held_out import rounded
from superweights.quantization.scheme import Scheme
from superweights.testing import save_tiny_checkpoint

from .conftest import content, how, stored

INT4 = QuantizeWeights(Scheme.parse("int4-g32"))
IDS = torch.arange(4, 36)[None]
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen3_moe, whose experts are stored one by one. Do not change it."""
    return save_tiny_checkpoint("qwen3_moe", tmp_path_factory.mktemp("moe") / "source", layers=2, dtype=torch.bfloat16)


def config_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return found


@torch.no_grad()
def logits(directory: Path, **options: Any) -> torch.Tensor:
    """What transformers makes of a checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", **options)
    found: torch.Tensor = model(IDS).logits
    return found


def dequantized_logits(directory: Path) -> torch.Tensor:
    with pytest.warns(UserWarning, match="loading attributes .* will be overwritten with the one you passed"):
        return logits(directory, quantization_config=CompressedTensorsConfig(dequantize=True))


@torch.no_grad()
def rounded_logits(directory: Path, plan: QuantizedCheckpoint, clip: Clip | None = None) -> torch.Tensor:
    """What transformers makes of the source with each planned matrix rounded by hand."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    for name, scheme in plan.quantized.items():
        parameter = model.get_parameter(name)
        parameter.copy_(rounded(parameter, scheme, clip=clip))
    found: torch.Tensor = model(IDS).logits
    return found


def decompressed(directory: Path) -> dict[str, torch.Tensor]:
    """Packed weights by the decompressor of compressed-tensors itself, through the config that was written."""
    config = QuantizationConfig(**config_of(directory)["quantization_config"])
    tensors, found = stored(directory), {}
    for name in [each.removesuffix("_packed") for each in tensors if each.endswith("_packed")]:
        (scheme,) = (
            each
            for each in config.config_groups.values()
            if each.targets == ["Linear"] or name.removesuffix(".weight") in each.targets
        )
        assert isinstance(scheme, QuantizationScheme)
        parts = {part: tensors.get(f"{name}_{part}") for part in ("packed", "scale", "shape", "zero_point")}
        state = {f"weight_{part}": tensor for part, tensor in parts.items() if tensor is not None}
        found[name] = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    return found


@pytest.mark.parametrize("scheme", ["int4-g32", "int8-row", "int3-g32", "int4-row", "int5-row", "int4-g16-signed"])
def test_transformers_loads_the_weights_that_rounding_gives(scheme: str, planted, tmp_path: Path):
    source, weight = planted
    before = content(source)
    plan = quantize_checkpoint(source, tmp_path / "new", [how(scheme, keep=(weight,))])
    assert plan.kept == (DOWN,)
    assert set(plan.quantized.values()) == {Scheme.parse(scheme)}
    assert len(plan.quantized) == 20
    found = logits(tmp_path / "new")
    assert torch.equal(found, rounded_logits(source, plan))
    assert not torch.equal(found, logits(source))
    new, old = stored(tmp_path / "new"), stored(source)
    plain = old.keys() - plan.quantized.keys()
    assert all(torch.equal(new[name], old[name]) for name in plain)
    assert new.keys() - plain == {f"{name}_{part}" for name in plan.quantized for part in ("packed", "scale", "shape")}
    assert content(source) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_transformers_loads_other_dtypes(dtype: torch.dtype, tmp_path: Path):
    source = save_tiny_checkpoint("llama", tmp_path / "source", layers=2, dtype=dtype)
    plan = quantize_checkpoint(source, tmp_path / "new", [how("int4-g16")])
    assert stored(tmp_path / "new")[f"{DOWN}_scale"].dtype == dtype
    assert torch.equal(logits(tmp_path / "new"), rounded_logits(source, plan))


def test_two_schemes_in_one_checkpoint(planted, tmp_path: Path):
    """Where both name a tensor, the later one says; a matrix that neither names stays."""
    source, weight = planted
    with Checkpoint.open(source) as checkpoint:
        names = [each.tensor for each in checkpoint_matrices(checkpoint)]
    clip = Clip.parse("z=2")
    rows, groups = names[::2], names[1::3]
    parts = [how("int3-row", only=tuple(rows), keep=(weight,)), how("int8-g32", only=tuple(groups), clip=clip)]
    plan = quantize_checkpoint(source, tmp_path / "new", parts)
    expected = dict.fromkeys(rows, parts[0].scheme) | dict.fromkeys(groups, parts[1].scheme)
    expected.pop(DOWN, None)
    assert plan.quantized == expected
    assert set(plan.kept) == set(names) - expected.keys()
    old, found = stored(source), decompressed(tmp_path / "new")
    for name, scheme in expected.items():
        assert torch.equal(found[name], rounded(old[name], scheme, clip=clip if name in groups else None)), name
    by_scheme = [
        how("int3-row", only=tuple(name for name in rows if expected.get(name) == parts[0].scheme)),
        how("int8-g32", only=tuple(name for name in groups if name in expected), clip=clip),
    ]
    rewrite_checkpoint(source, tmp_path / "rewritten", by_scheme)
    assert torch.equal(logits(tmp_path / "new"), logits(tmp_path / "rewritten"))


def test_clipped_weights(planted, tmp_path: Path):
    source, _ = planted
    plan = quantize_checkpoint(source, tmp_path / "new", [how("int4-row", clip=Clip.parse("z=2"))])
    found = logits(tmp_path / "new")
    assert torch.equal(found, rounded_logits(source, plan, Clip.parse("z=2")))
    assert not torch.equal(found, rounded_logits(source, plan))


@pytest.mark.parametrize("bits", range(2, 9))
def test_compressed_tensors_decodes_every_width(bits: int, tmp_path: Path):
    """Rows and cols that fill no 32-bit words; weights far from the middle, all equal, all zero, and outliers."""
    weights = torch.randn(37, 48, generator=torch.Generator().manual_seed(bits)).bfloat16()
    weights[3], weights[5], weights[6], weights[7:9, 20] = weights[3].abs() + 2, 0.5, 0, -40.0
    schemes = [f"int{bits}-{sharing}{offset}" for sharing in ("row", "g16") for offset in ("", "-signed", "-asym")]
    names = {scheme: f"layers.{number}.up.weight" for number, scheme in enumerate(schemes)}
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text('{"model_type": "llama"}')
    save_file({name: weights.clone() for name in names.values()}, tmp_path / "source" / "model.safetensors")
    parts = [how(scheme, only=(name,)) for scheme, name in names.items()]
    quantize_checkpoint(tmp_path / "source", tmp_path / "new", parts)
    found = decompressed(tmp_path / "new")
    for scheme, name in names.items():
        assert torch.equal(found[name], rounded(weights, Scheme.parse(scheme))), scheme


@pytest.mark.parametrize("scheme", ["int4-row-asym", "int3-g32-asym", "int8-g16-asym"])
def test_asymmetric_weights_load_dequantized(scheme: str, planted, tmp_path: Path):
    """transformers 5.23 cannot keep them packed: it makes room for zero points that are not packed."""
    source, weight = planted
    plan = quantize_checkpoint(source, tmp_path / "new", [how(scheme, keep=(weight,))])
    assert torch.equal(dequantized_logits(tmp_path / "new"), rounded_logits(source, plan))


def test_what_the_config_says(planted, tmp_path: Path):
    source, weight = planted
    quantize_checkpoint(source, tmp_path / "new", [how("int4-g32", keep=(weight,))])
    config = config_of(tmp_path / "new")
    written = config.pop("quantization_config")
    assert config == config_of(source)
    read = QuantizationConfig(**written)
    assert (read.quant_method, read.format, read.quantization_status) == (
        "compressed-tensors",
        "pack-quantized",
        "compressed",
    )
    (group,) = read.config_groups.values()
    assert group.targets == ["Linear"]
    assert group.input_activations is None and group.output_activations is None
    weights = group.weights
    assert (weights.num_bits, weights.type, weights.symmetric, weights.dynamic) == (4, "int", True, False)
    assert (weights.strategy, weights.group_size) == ("group", 32)
    assert {"lm_head", DOWN.removesuffix(".weight"), "model.embed_tokens"} <= set(read.ignore)
    assert not {name for name in read.ignore if ".layers." in name} - {DOWN.removesuffix(".weight")}
    value = stored(source)[DOWN][weight.row, weight.col].item()
    assert written["super_weights"] == [
        {"coordinate": str(weight), "tensor": DOWN, "row": weight.row, "col": weight.col, "value": value}
    ]


def test_rows_are_channels_and_zero_points_are_said(planted, tmp_path: Path):
    source, _ = planted
    quantize_checkpoint(source, tmp_path / "new", [how("int8-row-asym")])
    (group,) = QuantizationConfig(**config_of(tmp_path / "new")["quantization_config"]).config_groups.values()
    assert (group.weights.strategy, group.weights.group_size) == ("channel", None)
    assert (group.weights.num_bits, group.weights.symmetric) == (8, False)


@pytest.mark.parametrize("scheme", ["int4-g32", "int3-row", "int8-row-asym", "int5-g16-asym"])
def test_sizes_are_those_of_the_files(scheme: str, planted, tmp_path: Path):
    source, weight = planted
    plan = quantize_checkpoint(source, tmp_path / "new", [how(scheme, keep=(weight,))])
    new, old = stored(tmp_path / "new"), stored(source)
    assert plan.nbytes == sum(each.nbytes for each in new.values())
    matrices = [*plan.quantized, *plan.kept]
    assert len(matrices) == 21
    bits = 8 * sum(each.nbytes for name, each in new.items() if name.startswith(tuple(matrices)))
    assert plan.bits_per_weight == bits / sum(old[name].numel() for name in matrices)
    with Checkpoint.open(source) as checkpoint:
        assert plan_quantized_checkpoint(checkpoint, [how(scheme, keep=(weight,))]) == plan


def test_further_files_and_the_bytes_of_any_number_of_threads(planted, tmp_path: Path):
    source, _ = planted
    for threads in (1, 4):
        quantize_checkpoint(
            source, tmp_path / str(threads), [INT4], settings={"scheme": "int4-g32"}, card="# A card\n", threads=threads
        )
    found = content(tmp_path / "1")
    assert found == content(tmp_path / "4")
    assert json.loads(found["superweights.json"]) == {"scheme": "int4-g32"}
    assert found["README.md"] == b"# A card\n"
    assert found["generation_config.json"] == content(source)["generation_config.json"]
    quantize_checkpoint(source, tmp_path / "1", [how("int8-row")], overwrite=True)
    assert "superweights.json" not in content(tmp_path / "1")


def test_an_interrupted_run_with_another_clip_starts_over(planted, tmp_path: Path):
    source, _ = planted

    class Interruption:
        done = 0

        def start(self, task: str, *, total: int | None, unit: str) -> None:
            pass

        def advance(self, steps: int = 1, *, nbytes: int = 0) -> None:
            self.done += steps
            if self.done == 25:
                raise KeyboardInterrupt

        def finish(self) -> None:
            pass

    clipped = [replace(INT4, clip=Clip.parse("z=2"))]
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, tmp_path / "new", clipped, threads=1, progress=Interruption())
    assert list((tmp_path / ".new.partial").glob("*.safetensors"))
    quantize_checkpoint(source, tmp_path / "new", [INT4])
    quantize_checkpoint(source, tmp_path / "whole", [INT4])
    assert content(tmp_path / "new") == content(tmp_path / "whole")


@pytest.mark.parametrize("amplify", [1.0, 1.7, 0.0])
def test_amplify_changes_exactly_one_weight(amplify: float, planted, tmp_path: Path):
    source, weight = planted
    quantize_checkpoint(source, tmp_path / "plain", [how("int4-g32", keep=(weight,))])
    quantize_checkpoint(source, tmp_path / "new", [how("int4-g32", keep=(weight, weight), amplify=amplify)])
    plain, new = stored(tmp_path / "plain"), stored(tmp_path / "new")
    expected = plain[DOWN].clone()
    expected[weight.row, weight.col] *= amplify
    assert new.keys() == plain.keys()
    assert all(torch.equal(new[name], expected if name == DOWN else plain[name]) for name in plain)
    values = {each["value"] for each in config_of(tmp_path / "new")["quantization_config"]["super_weights"]}
    assert values == {expected[weight.row, weight.col].item()}


def test_tied_weights_stay_tied(tmp_path: Path):
    source = save_tiny_checkpoint(
        "llama", tmp_path / "source", layers=2, dtype=torch.bfloat16, tie_word_embeddings=True
    )
    assert "lm_head.weight" not in stored(source)
    plan = quantize_checkpoint(source, tmp_path / "new", [how("int4-row")])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype="auto")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(logits(tmp_path / "new"), rounded_logits(source, plan))


@pytest.mark.parametrize("family", ["gpt_neox_japanese", "roberta", "gpt_neox", "phi3", "gemma3_text"])
def test_heads_of_other_names_and_other_layouts_load(family: str, tmp_path: Path):
    source = save_tiny_checkpoint(family, tmp_path / "source", layers=2, dtype=torch.bfloat16)
    plan = quantize_checkpoint(source, tmp_path / "new", [how("int4-row")])
    rewrite_checkpoint(source, tmp_path / "rewritten", [how("int4-row")])
    assert plan.kept == ()
    assert torch.equal(logits(tmp_path / "new"), logits(tmp_path / "rewritten"))


def test_falcon_loads_dequantized(tmp_path: Path):
    """transformers 5.23 looks at the weight of each of its linear layers before it is unpacked."""
    source = save_tiny_checkpoint("falcon", tmp_path / "source", layers=2, dtype=torch.bfloat16)
    plan = quantize_checkpoint(source, tmp_path / "new", [how("int4-row")])
    assert torch.equal(dequantized_logits(tmp_path / "new"), rounded_logits(source, plan))


@pytest.mark.parametrize("experts_first", [True, False])
def test_experts_that_are_stored_one_by_one(experts_first: bool, moe: Path, tmp_path: Path):
    """With a scheme of their own, which transformers takes from the first group of the config."""
    with Checkpoint.open(moe) as checkpoint:
        names = [each.tensor for each in checkpoint_matrices(checkpoint)]
    experts = tuple(name for name in names if ".experts." in name)
    assert len(experts) == 24
    dense = tuple(name for name in names if name not in experts)
    parts = [how("int3-g16", only=experts), how("int8-row", only=dense)]
    plan = quantize_checkpoint(moe, tmp_path / "new", parts if experts_first else parts[::-1])
    assert plan.kept == ()
    rewrite_checkpoint(moe, tmp_path / "rewritten", parts)
    assert torch.equal(logits(tmp_path / "new"), logits(tmp_path / "rewritten"))


def test_a_weight_of_a_shared_expert_is_kept(tmp_path: Path):
    source = save_tiny_checkpoint("qwen2_moe", tmp_path / "source", layers=2, dtype=torch.bfloat16)
    plan = quantize_checkpoint(source, tmp_path / "new", [how("int4-row", keep=(Coordinate.parse("1:3:5"),))])
    assert plan.kept == ("model.layers.1.mlp.shared_expert.down_proj.weight",)
    rewrite_checkpoint(source, tmp_path / "rewritten", [how("int4-row", only=tuple(plan.quantized))])
    assert torch.equal(logits(tmp_path / "new"), logits(tmp_path / "rewritten"))


def test_packed_experts_stay_as_they_are_stored(tmp_path: Path):
    source = save_tiny_checkpoint("gpt_oss", tmp_path / "source", layers=2, dtype=torch.bfloat16)
    weight = Coordinate.parse("1/2:5:3")
    plan = quantize_checkpoint(source, tmp_path / "new", [how("int4-row", keep=(weight,), amplify=2.0)])
    packs = {f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("gate_up_proj", "down_proj")}
    assert set(plan.kept) == packs
    assert len(plan.quantized) == 8
    new, old = stored(tmp_path / "new"), stored(source)
    old["model.layers.1.mlp.experts.down_proj"][2, 3, 5] *= 2
    assert all(torch.equal(new[name], old[name]) for name in packs)
    shutil.copytree(source, tmp_path / "amplified")
    save_file(old, tmp_path / "amplified" / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(tmp_path / "new"), rounded_logits(tmp_path / "amplified", plan))


def refused(source: Path, to: Path, *interventions: QuantizeWeights) -> str:
    """The message of what is refused, and leaves nothing."""
    before = content(source)
    with pytest.raises(SuperweightsError) as caught:
        quantize_checkpoint(source, to / "out" / "new", interventions)
    assert content(source) == before
    assert not (to / "out").exists() or not list((to / "out").iterdir())
    return f"{type(caught.value).__name__}: {caught.value}"


ADVICE = "`--measure` evaluates it without writing."


@pytest.mark.parametrize(
    ("scheme", "more", "says"),
    [
        ("nf4-g32", {}, "packed are int2 to int8, each row or group with its own scale"),
        ("int8-tensor", {}, "packed are int2 to int8"),
        ("int4-block64", {}, "packed are int2 to int8"),
        ("int4-tile32x32", {}, "packed are int2 to int8"),
        ("int4-g32-minmax", {}, "sym, signed or asym, such as int4-g128"),
        ("int4-row-minmax", {}, "sym, signed or asym, such as int4-g128"),
        ("int4-g32", {"largest": 1}, "the largest of every matrix cannot be kept"),
        (
            "int4-g32",
            {"factors": {"model.layers.1.mlp.down_proj": torch.ones(128)}},
            "smoothed weights need their norms",
        ),
    ],
)
def test_what_no_packed_format_holds_is_refused(
    scheme: str, more: Mapping[str, Any], says: str, planted, tmp_path: Path
):
    message = refused(planted[0], tmp_path, how(scheme, **more))
    assert message.startswith("UsageError: Quantizing ")
    assert f" by {scheme} into files: " in message
    assert says in message and message.endswith(ADVICE)


def test_groups_that_do_not_divide_are_refused_with_some_that_do(planted_checkpoint: Path, tmp_path: Path):
    message = refused(planted_checkpoint, tmp_path, INT4)
    assert "model.layers.0.mlp.down_proj.weight has 64 x 112 weights" in message
    assert "groups of 32 do not divide rows of 112; shorter ones do: 28, 16, 14." in message


def test_a_checkpoint_that_is_quantized_already_is_refused(planted, tmp_path: Path):
    quantize_checkpoint(planted[0], tmp_path / "once", [INT4])
    message = refused(tmp_path / "once", tmp_path, INT4)
    assert message.startswith(QuantizedCheckpointError.__name__)
    assert "are quantized (compressed-tensors, 4 bits). Give the checkpoint it was quantized from." in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused_by_tensor(value: float, planted, tmp_path: Path):
    source, weight = planted
    damaged = Path(shutil.copytree(source, tmp_path / "damaged"))
    with Checkpoint.open(damaged) as checkpoint:
        file = damaged / checkpoint.entry(DOWN).file
    tensors = load_file(file)
    tensors[DOWN].view(-1)[[5, 900]] = value
    save_file(tensors, file, {"format": "pt"})
    message = refused(damaged, tmp_path, INT4)
    assert message.startswith(NonFiniteWeightsError.__name__)
    assert f"{DOWN}: Quantizing a matrix of 64 x 128: 2 weights are NaN or infinite." in message
    quantize_checkpoint(damaged, tmp_path / "new", [how("int4-g32", keep=(weight,))])  # that matrix is left out


@pytest.mark.parametrize(
    ("coordinate", "error", "says"),
    [
        ("3:0:0", CoordinateError, "no decoder layer 3"),
        ("1:64:0", CoordinateError, "rows are 0 to 63"),
        ("1:0:128", CoordinateError, "cols are 0 to 127"),
        ("1/0:0:0", CoordinateError, "no routed experts"),
    ],
)
def test_a_weight_to_keep_that_is_not_there(
    coordinate: str, error: type[Exception], says: str, planted, tmp_path: Path
):
    message = refused(planted[0], tmp_path, how("int4-g32", keep=(Coordinate.parse(coordinate),)))
    assert message.startswith(error.__name__)
    assert says in message


def test_a_weight_to_keep_in_a_tensor_that_is_not_quantized(planted, tmp_path: Path):
    source, weight = planted
    wide = Path(shutil.copytree(source, tmp_path / "wide"))
    with Checkpoint.open(wide) as checkpoint:
        file = wide / checkpoint.entry(DOWN).file
    tensors = load_file(file)
    save_file({**tensors, DOWN: tensors[DOWN].double()}, file, {"format": "pt"})
    message = refused(wide, tmp_path, how("int4-g32", keep=(weight,)))
    assert f"{DOWN} is not quantized. Leave it out." in message


@pytest.mark.parametrize(
    ("only", "says"),
    [
        (("model.norm.weight",), "model.norm.weight is no matrix of its decoder layers"),
        (("lm_head.weight",), "lm_head.weight is no matrix of its decoder layers"),
        ((DOWN,), "no matrix is left to quantize"),
        ((), "no matrix is left to quantize"),
    ],
)
def test_tensors_that_cannot_be_quantized(only: tuple[str, ...], says: str, planted, tmp_path: Path):
    source, weight = planted
    message = refused(source, tmp_path, how("int4-g32", only=only, keep=(weight,)))
    assert message.startswith(UsageError.__name__)
    assert says in message


def test_gpt2_is_refused_with_advice(tmp_path: Path):
    source = save_tiny_checkpoint("gpt2", tmp_path / "source", layers=2)
    message = refused(source, tmp_path, how("int4-row"))
    assert "all matrices are like transformer.h.0.attn.c_attn.weight, which no packed format holds" in message
    assert message.endswith(ADVICE)


def kept(_: Checkpoint) -> list[QuantizeWeights]:
    return [how("int4-row", keep=(Coordinate.parse("1/2:3:5"),))]


def without(pattern: str) -> Callable[[Checkpoint], list[QuantizeWeights]]:
    def find(checkpoint: Checkpoint) -> list[QuantizeWeights]:
        names = [each.tensor for each in checkpoint_matrices(checkpoint)]
        return [how("int4-row", only=tuple(name for name in names if pattern not in name))]

    return find


def mixed(checkpoint: Checkpoint) -> list[QuantizeWeights]:
    names = [each.tensor for each in checkpoint_matrices(checkpoint)]
    return [how("int4-row"), how("int8-row", only=tuple(name for name in names if "experts.1.up" in name))]


@pytest.mark.parametrize(
    ("find", "says"),
    [
        (kept, "model.layers.1.mlp.experts.2.down_proj.weight would stay as it is stored"),
        (without(".experts.3.gate_proj"), "model.layers.0.mlp.experts.3.gate_proj.weight would stay as it is stored"),
        (without(".experts."), "experts.0.down_proj.weight would stay as it is stored"),
        (mixed, "model.layers.0.mlp.experts.1.up_proj.weight would be packed by int8-row"),
    ],
)
def test_experts_that_transformers_could_not_join_are_refused(
    find: Callable[[Checkpoint], list[QuantizeWeights]], says: str, moe: Path, tmp_path: Path
):
    with Checkpoint.open(moe) as checkpoint:
        parts = find(checkpoint)
    message = refused(moe, tmp_path, *parts)
    assert says in message
    assert "loads routed experts only where all are packed by one scheme" in message
    assert message.endswith(ADVICE)


@pytest.mark.parametrize("family", ["llama4", "llama4_text"])
def test_packed_experts_that_transformers_would_take_apart_are_refused(family: str, tmp_path: Path):
    source = save_tiny_checkpoint(family, tmp_path / "source", layers=2)
    message = refused(source, tmp_path, how("int4-row"))
    assert "feed_forward.experts.down_proj would stay packed" in message
    assert message.endswith(ADVICE)
