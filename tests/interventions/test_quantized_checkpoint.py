"""What is written loads in transformers through compressed-tensors, and computes what was measured, to the bit."""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from superweights.checkpoint import Checkpoint
from superweights.checkpoint.stored_matrices import checkpoint_matrices
from superweights.coordinates import Coordinate
from superweights.errors import NonFiniteWeightsError, QuantizedCheckpointError, UsageError
from superweights.interventions.conditions import QuantizeWeights
from superweights.interventions.quantized_checkpoint import quantize_checkpoint
from superweights.quantization.clipping import Clip
from superweights.quantization.held_out import rounded
from superweights.quantization.scheme import Scheme
from superweights.testing import save_tiny_checkpoint

SUPER_WEIGHT = Coordinate(2, None, 49, 7)
HOLDER = "model.layers.2.mlp.down_proj.weight"
IDS = torch.arange(4, 28)[None]


@pytest.fixture(scope="module")
def sixteen_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama in bfloat16, in several shards."""
    place = tmp_path_factory.mktemp("llama") / "llama"
    return save_tiny_checkpoint("llama", place, dtype=torch.bfloat16, shards=True)


def logits(place: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(place)(IDS).logits


def expected_logits(place: Path, schemes: dict[str, Scheme]) -> torch.Tensor:
    """Of the plain model with its matrices rounded."""
    model = AutoModelForCausalLM.from_pretrained(place)
    with torch.no_grad():
        for name, scheme in schemes.items():
            parameter = model.get_parameter(name)
            parameter.copy_(rounded(parameter.data, scheme))
        return model(IDS).logits


def matrices(place: Path) -> list[str]:
    with Checkpoint.open(place) as checkpoint:
        return [each.tensor for each in checkpoint_matrices(checkpoint)]


@pytest.mark.parametrize("text", ["int4-g16", "int4-g16-signed", "int8-row", "int3-g16", "int4-row", "int5-row"])
def test_it_loads_and_computes_what_was_measured(sixteen_bits: Path, tmp_path: Path, text: str) -> None:
    scheme = Scheme.parse(text)
    plan = quantize_checkpoint(sixteen_bits, tmp_path / "q", [QuantizeWeights(scheme, keep=(SUPER_WEIGHT,))])
    assert plan.kept == (HOLDER,)
    schemes = {name: scheme for name in matrices(sixteen_bits) if name != HOLDER}
    assert torch.equal(logits(tmp_path / "q"), expected_logits(sixteen_bits, schemes))


def test_two_schemes_in_one_model(sixteen_bits: Path, tmp_path: Path) -> None:
    names = matrices(sixteen_bits)
    parts = {
        "int4-g16": [each for each in names if "mlp" in each],
        "int8-row": [each for each in names if "attn" in each],
    }
    how = [QuantizeWeights(Scheme.parse(text), only=tuple(only)) for text, only in parts.items()]
    quantize_checkpoint(sixteen_bits, tmp_path / "q", how)
    schemes = {name: Scheme.parse(text) for text, only in parts.items() for name in only}
    assert torch.equal(logits(tmp_path / "q"), expected_logits(sixteen_bits, schemes))


@pytest.mark.parametrize("text", ["int4-g16-asym", "int8-row-asym", "int3-row-asym"])
def test_asymmetric_files_are_what_compressed_tensors_unpacks(sixteen_bits: Path, tmp_path: Path, text: str) -> None:
    """transformers 5.23 expects zero points unpacked and refuses these; the package's own decompressor is the judge."""
    scheme = Scheme.parse(text)
    quantize_checkpoint(sixteen_bits, tmp_path / "q", [QuantizeWeights(scheme)])
    config = QuantizationConfig(**plain_config(tmp_path / "q"))
    stored = {k: v for file in (tmp_path / "q").glob("*.safetensors") for k, v in load_file(file).items()}
    with Checkpoint.open(sixteen_bits) as original:
        for name in matrices(sixteen_bits)[:4]:
            parts = {key.rpartition(".")[2]: value for key, value in stored.items() if key.startswith(f"{name}_")}
            found = PackedQuantizationCompressor.decompress(parts, config.config_groups["group_0"])["weight"]
            assert torch.equal(found, rounded(original.view(name), scheme))


def plain_config(place: Path) -> dict:
    found = json.loads((place / "config.json").read_text())["quantization_config"]
    return {key: value for key, value in found.items() if key != "super_weights"}


def test_sizes_are_those_of_the_files(sixteen_bits: Path, tmp_path: Path) -> None:
    plan = quantize_checkpoint(sixteen_bits, tmp_path / "q", [QuantizeWeights(Scheme.parse("int4-g16"))])
    with Checkpoint.open(sixteen_bits) as before, Checkpoint.open(tmp_path / "q") as after:
        names = matrices(sixteen_bits)
        packed = sum(entry.nbytes for name, entry in after.tensors.items() if name.startswith(tuple(names)))
        assert (plan.nbytes, plan.bits_per_weight) == (
            after.nbytes,
            pytest.approx(8 * packed / sum(before.tensors[name].numel for name in names)),
        )


def test_bytes_do_not_depend_on_threads(sixteen_bits: Path, tmp_path: Path) -> None:
    for threads in (1, 4):
        how = [QuantizeWeights(Scheme.parse("int4-g16"), clip=Clip("z", 3.0))]
        quantize_checkpoint(sixteen_bits, tmp_path / str(threads), how, threads=threads)
    for file in (tmp_path / "1").iterdir():
        assert file.read_bytes() == (tmp_path / "4" / file.name).read_bytes()


def test_amplifying_changes_one_weight(sixteen_bits: Path, tmp_path: Path) -> None:
    how = [QuantizeWeights(Scheme.parse("int4-g16"), keep=(SUPER_WEIGHT,), amplify=1.5)]
    quantize_checkpoint(sixteen_bits, tmp_path / "q", how)
    with Checkpoint.open(sixteen_bits) as before, Checkpoint.open(tmp_path / "q") as after:
        changed = (before.view(HOLDER) != after.view(HOLDER)).nonzero().tolist()
    assert changed == [[49, 7]]


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    tied = save_tiny_checkpoint("llama", tmp_path / "tied", dtype=torch.bfloat16, tie_word_embeddings=True)
    quantize_checkpoint(tied, tmp_path / "q", [QuantizeWeights(Scheme.parse("int8-row"))])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_nan_weights_are_named_and_nothing_is_left(tmp_path: Path) -> None:
    place = save_tiny_checkpoint("llama", tmp_path / "llama")
    weights = load_file(place / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteWeightsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*1 weight is NaN"):
        quantize_checkpoint(place, tmp_path / "q", [QuantizeWeights(Scheme.parse("int4-g16"))])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (QuantizeWeights(Scheme.parse("int4-g24")), "groups of 24 do not divide"),
        (QuantizeWeights(Scheme.parse("nf4-g16")), "`--measure` evaluates it"),
        (QuantizeWeights(Scheme.parse("int4-tensor")), "`--measure` evaluates it"),
        (QuantizeWeights(Scheme.parse("int4-g16-minmax")), "`--measure` evaluates it"),
        (QuantizeWeights(Scheme.parse("int4-g16"), largest=1), "largest of every matrix cannot be kept"),
        (QuantizeWeights(Scheme.parse("int4-g16"), only=("model.norm.weight",)), "is no matrix of its decoder layers"),
    ],
)
def test_what_cannot_be_packed_is_refused(sixteen_bits: Path, tmp_path: Path, how: QuantizeWeights, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        quantize_checkpoint(sixteen_bits, tmp_path / "q", [how])
    assert not list(tmp_path.iterdir())


def test_a_quantized_model_is_refused(sixteen_bits: Path, tmp_path: Path) -> None:
    how = [QuantizeWeights(Scheme.parse("int4-g16"))]
    quantize_checkpoint(sixteen_bits, tmp_path / "q", how)
    with pytest.raises(QuantizedCheckpointError, match="compressed-tensors, 4 bits"):
        quantize_checkpoint(tmp_path / "q", tmp_path / "again", how)


def test_conv1d_has_no_packed_layout(tmp_path: Path) -> None:
    place = save_tiny_checkpoint("gpt2", tmp_path / "gpt2")
    with pytest.raises(UsageError, match="no packed format holds"):
        quantize_checkpoint(place, tmp_path / "q", [QuantizeWeights(Scheme.parse("int8-row"))])
