"""GGUF files that are written, against the package that reads them, transformers, and the model they were made of."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

import superweights as sw
from superweights.checkpoint import Checkpoint
from superweights.checkpoint.gguf_families import FAMILIES
from superweights.checkpoint.gguf_writing import WRITTEN_KINDS, block_size
from superweights.checkpoint.opening import open_dequantized
from superweights.coordinates import Coordinate
from superweights.errors import (
    CoordinateError,
    MissingTensorError,
    NonFiniteWeightsError,
    NotACheckpointError,
    QuantizedCheckpointError,
    RecordError,
    SuperweightsError,
    UnsupportedArchitectureError,
    UsageError,
)
from superweights.interventions.quantized_gguf import plan_quantized_gguf, quantize_to_gguf
from superweights.testing import save_tiny_checkpoint, tiny_model

gguf = pytest.importorskip("gguf", reason="superweights[gguf] is optional")
BOOKS = Path(sw.__file__).parent / "data" / "tiny-books"
PLACE = Coordinate.parse("0:68:364")
DOWN, THEIRS = "model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"
ROPES = {
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
}
WINDOWED = {
    "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
}
GEMMA: dict[str, Any] = {"query_pre_attn_scalar": 16, "head_dim": 16}
READ_BACK: list[Any] = [
    ("llama", {}),
    ("llama", {"head_dim": 32}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    *(("llama", {"rope_parameters": each}) for each in ROPES.values()),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 32}),
    ("qwen2_moe", {}),
    ("qwen3_moe", {"norm_topk_prob": True, "head_dim": 32}),
    ("gpt2", {}),
    ("gemma2", GEMMA),
    ("gemma3_text", GEMMA),
    ("starcoder2", {"sliding_window": None}),
    ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    ("phi3", {"partial_rotary_factor": 0.5}),
]
"""Families that transformers reads from GGUF files, and configs of them."""


def stored(path: Path) -> dict[str, Any]:
    return {each.name: each for each in gguf.GGUFReader(path).tensors}


def values(tensor: Any) -> np.ndarray:
    return gguf.dequantize(tensor.data, tensor.tensor_type)


def save(family: str, folder: Path, **changes: Any) -> Any:
    """A tiny model with large matrices and odd norms, and a tokenizer that llama.cpp takes."""
    model = tiny_model(family, layers=6, vocab=1024, **changes)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.mul_(5) if value.dim() > 1 else value.add_(0.25 if "norm" in name else 0.125)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BOOKS).save_pretrained(folder)
    return model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of a trained model that may be changed."""
    return Path(shutil.copytree(BOOKS, tmp_path / "model"))


@pytest.mark.parametrize(("family", "changes"), READ_BACK)
def test_what_is_written_is_the_model(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = save(family, tmp_path / "model", **changes)
    quantize_to_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    with open_dequantized(tmp_path / "model.gguf") as ours, Checkpoint.open(tmp_path / "model") as theirs:
        assert set(ours.tensors) == set(theirs.tensors)
        # Gemma's norms have 1 added and taken off again.
        close = 1e-6 if "gemma" in family else 0
        for name in theirs.tensors:
            torch.testing.assert_close(ours.view(name).float(), theirs.view(name).float(), rtol=0, atol=close)
    ids = torch.randint(4, 1000, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), sw.load(str(tmp_path / "model.gguf"), residency="streamed") as loaded:
        found, expected = loaded.logits(loaded.states(ids)), model(ids).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_config_and_the_tokenizer_are_read_back(tmp_path: Path) -> None:
    quantize_to_gguf(BOOKS, tmp_path / "m.gguf", keep=[PLACE])
    ours = AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf")
    theirs = AutoConfig.from_pretrained(BOOKS)
    same = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("head_dim", "vocab_size", "max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id"),
    )
    assert {each: getattr(ours, each) for each in same} == {each: getattr(theirs, each) for each in same}
    assert ours.rms_norm_eps == pytest.approx(theirs.rms_norm_eps)
    assert ours.rope_parameters["rope_theta"] == theirs.rope_parameters["rope_theta"]
    text = (BOOKS.parent / "heldout.txt").read_text(encoding="utf-8")[:20000]
    tokenizers = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf"), AutoTokenizer.from_pretrained(BOOKS)
    ids = [each(text, add_special_tokens=False).input_ids for each in tokenizers]
    assert ids[0] == ids[1] and len(ids[0]) > 1000


@pytest.mark.parametrize("kind", [each for each in WRITTEN_KINDS if block_size(each)[0] <= 32])
def test_matrices_are_what_the_package_makes_of_them(kind: str, tmp_path: Path) -> None:
    plan = quantize_to_gguf(BOOKS, tmp_path / "m.gguf", kind.lower(), [PLACE], threads=3)
    found = stored(tmp_path / "m.gguf")
    assert [(each.name, each.kind, each.nbytes) for each in plan.tensors] == [
        (name, each.tensor_type.name, each.n_bytes) for name, each in found.items()
    ]
    weights = load_file(BOOKS / "model.safetensors")
    theirs = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.5.ffn_up.weight": "model.layers.5.mlp.up_proj.weight",
    }
    for name, source in theirs.items():
        plain = weights[source].float().numpy()
        expected = gguf.quantize(plain, gguf.GGMLQuantizationType[kind])
        np.testing.assert_array_equal(found[name].data.view(np.uint8), expected.view(np.uint8))
    # Float16 holds bfloat16 exactly down to 2^-14, and steps of 2^-24 below.
    np.testing.assert_allclose(values(found[THEIRS]), weights[DOWN].float().numpy(), rtol=0, atol=2.0**-25)
    assert found["output_norm.weight"].tensor_type.name == "F32"


def test_the_super_weights_tensor_stays_exact_and_its_cost_is_said(tmp_path: Path) -> None:
    plan = quantize_to_gguf(BOOKS, tmp_path / "kept.gguf", "q4_1", [PLACE])
    plain = quantize_to_gguf(BOOKS, tmp_path / "plain.gguf", "q4_1")
    original = float(load_file(BOOKS / "model.safetensors")[DOWN][68, 364])
    (kept,) = plan.kept
    assert (kept.tensor, kept.index, kept.kind) == (THEIRS, (68, 364), "F16")
    assert kept.value == kept.written == original == values(stored(tmp_path / "kept.gguf")[THEIRS])[68, 364]
    rounded = values(stored(tmp_path / "plain.gguf")[THEIRS])
    assert kept.rounded == rounded[68, 364]
    block = slice(352, 384)
    exact = load_file(BOOKS / "model.safetensors")[DOWN][68].float().numpy()
    others = np.delete(np.arange(352, 384), 364 - 352)
    expected = np.linalg.norm(rounded[68][others] - exact[others]) / np.linalg.norm(exact[others])
    assert kept.block_error == pytest.approx(expected) and expected > 0.05, block
    sizes = [sum(each.n_bytes for each in stored(tmp_path / name).values()) for name in ("kept.gguf", "plain.gguf")]
    assert [plan.nbytes, plain.nbytes] == sizes
    assert plan.keeping_nbytes == sizes[0] - sizes[1] > 0 == plain.keeping_nbytes
    assert plan.keeping_share == pytest.approx(sizes[0] / sizes[1] - 1)
    fields = gguf.GGUFReader(tmp_path / "kept.gguf").fields
    assert fields["superweights.kept"].contents() == [f"0:68:364 {original!r} in {THEIRS}, F16"]
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_1


def test_the_plan_is_what_is_written_and_reads_no_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = quantize_to_gguf(BOOKS, tmp_path / "m.gguf", "q5_0", [PLACE])
    monkeypatch.setattr(Checkpoint, "view", None)
    planned = plan_quantized_gguf(BOOKS, "Q5_0", [PLACE])
    assert (planned.tensors, planned.keeping_nbytes) == (written.tensors, written.keeping_nbytes)
    assert planned.kept[0].value == written.kept[0].value and planned.kept[0].written is None


def test_q8_0_for_the_super_weights_tensor(tmp_path: Path) -> None:
    (kept,) = quantize_to_gguf(BOOKS, tmp_path / "m.gguf", "q4_0", [PLACE], kept_kind="q8_0").kept
    assert kept.kind == "Q8_0" and kept.written == values(stored(tmp_path / "m.gguf")[THEIRS])[68, 364]
    assert 0 < abs(kept.written - kept.value) < 0.005 * abs(kept.value)


@pytest.mark.parametrize(
    ("dtype", "value", "kind"),
    [
        (torch.bfloat16, 512.0, "F16"),
        (torch.bfloat16, 2.0**-30, "BF16"),
        (torch.bfloat16, 70144.0, "BF16"),
        (torch.float32, 1.0 + 2.0**-20, "F32"),
        (torch.float32, 3.25, "F16"),
    ],
)
def test_the_type_holds_the_super_weight_exactly(dtype: torch.dtype, value: float, kind: str, model: Path) -> None:
    weights = {name: each.to(dtype) for name, each in load_file(model / "model.safetensors").items()}
    weights[DOWN][68, 364] = value
    save_file(weights, model / "model.safetensors")
    (kept,) = quantize_to_gguf(model, model / "m.gguf", "q4_0", [PLACE]).kept
    assert (kept.kind, kept.written) == (kind, value)


def test_a_value_beyond_float16_in_a_rounded_tensor_is_refused(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights[DOWN][68, 364] = 70144.0
    save_file(weights, model / "model.safetensors")
    with pytest.raises(UsageError, match=r"blk\.0\.ffn_down\.weight holds 70144, which is beyond float16"):
        quantize_to_gguf(model, model / "m.gguf", "q4_0")
    assert not list(model.glob("*.gguf*")) and not list(model.glob(".*"))


def test_rows_that_blocks_do_not_divide_are_f16(tmp_path: Path) -> None:
    save("llama", tmp_path / "model", intermediate=112)
    plan = quantize_to_gguf(tmp_path / "model", tmp_path / "m.gguf", "q4_0")
    kinds = {name: each.tensor_type.name for name, each in stored(tmp_path / "m.gguf").items()}
    assert {kinds[f"blk.{layer}.ffn_down.weight"] for layer in range(6)} == {"F16"}
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert set(plan.unfit) == {f"blk.{layer}.ffn_down.weight" for layer in range(6)}


def test_a_type_that_no_matrix_can_have_is_refused(tmp_path: Path) -> None:
    save("llama", tmp_path / "model")
    with pytest.raises(UsageError, match="blocks of 256 divide the rows of none"):
        plan_quantized_gguf(tmp_path / "model", "tq1_0")


def test_experts_are_packed_and_the_router_is_left_alone(tmp_path: Path) -> None:
    save("mixtral", tmp_path / "model", sliding_window=None, intermediate=128)
    place = Coordinate.parse("2/3:5:20")
    (kept,) = quantize_to_gguf(tmp_path / "model", tmp_path / "m.gguf", "q4_0", [place]).kept
    weights, found = load_file(tmp_path / "model" / "model.safetensors"), stored(tmp_path / "m.gguf")
    assert (kept.tensor, kept.index) == ("blk.2.ffn_down_exps.weight", (3, 5, 20))
    packed = values(found["blk.2.ffn_down_exps.weight"])
    theirs = [weights[f"model.layers.2.block_sparse_moe.experts.{expert}.w2.weight"].numpy() for expert in range(4)]
    np.testing.assert_allclose(packed, np.stack(theirs), atol=2e-3)
    assert kept.value == theirs[3][5, 20]
    assert found["blk.2.ffn_gate_inp.weight"].tensor_type.name == "F32"
    assert found["blk.2.ffn_up_exps.weight"].tensor_type.name == "Q4_0"


def test_a_weight_of_a_transposed_matrix_is_kept_in_its_place(tmp_path: Path) -> None:
    save("gpt2", tmp_path / "model")
    place = Coordinate.parse("1:5:20")
    (kept,) = quantize_to_gguf(tmp_path / "model", tmp_path / "m.gguf", "q8_0", [place], kept_kind="f32").kept
    weight = load_file(tmp_path / "model" / "model.safetensors")["transformer.h.1.mlp.c_proj.weight"]
    assert kept.value == kept.written == weight[20, 5].item()


def test_a_transposed_matrix_that_is_square(tmp_path: Path) -> None:
    """Its shape does not tell which way round it lies."""
    save_tiny_checkpoint("gpt2", tmp_path / "model", n_inner=64, intermediate=64)
    (kept,) = quantize_to_gguf(tmp_path / "model", tmp_path / "m.gguf", "f32", [Coordinate.parse("1:5:20")]).kept
    weight = load_file(tmp_path / "model" / "model.safetensors")["transformer.h.1.mlp.c_proj.weight"]
    assert weight.shape == (64, 64) and kept.value == kept.written == weight[20, 5].item()


def test_several_weights_keep_their_order(tmp_path: Path) -> None:
    places = [Coordinate.parse(each) for each in ("3:5:6", "0:68:364", "0:1:2")]
    plan = quantize_to_gguf(BOOKS, tmp_path / "m.gguf", keep=[*places, places[0]])
    assert [each.coordinate for each in plan.kept] == places
    assert sum(each.kind == "F16" for each in plan.tensors) == 2


# A GGUF file as the source.


@pytest.fixture
def plain_file(tmp_path: Path) -> Path:
    quantize_to_gguf(BOOKS, tmp_path / "plain.gguf", "bf16")
    return tmp_path / "plain.gguf"


def test_a_gguf_file_gives_what_its_checkpoint_gives(plain_file: Path, tmp_path: Path) -> None:
    from_file = quantize_to_gguf(plain_file, tmp_path / "a.gguf", "q4_0", [PLACE])
    from_checkpoint = quantize_to_gguf(BOOKS, tmp_path / "b.gguf", "q4_0", [PLACE])
    assert from_file.tensors == from_checkpoint.tensors and from_file.kept == from_checkpoint.kept
    ours, theirs = (gguf.GGUFReader(tmp_path / name) for name in ("a.gguf", "b.gguf"))
    for one, other in zip(ours.tensors, theirs.tensors, strict=True):
        np.testing.assert_array_equal(one.data, other.data)
    assert list(ours.fields) == list(theirs.fields)
    for key in set(ours.fields) - {"general.name"}:
        assert ours.fields[key].contents() == theirs.fields[key].contents(), key


def strange_file(path: Path, experts: int | None = None) -> Path:
    """An architecture that neither transformers nor our table has, with settings of every type."""
    writer = gguf.GGUFWriter(path, "plamo3")
    writer.add_uint64("plamo3.big", 1 << 40)
    writer.add_int8("plamo3.small", -3)
    writer.add_float64("plamo3.precise", 1 / 3)
    writer.add_bool("plamo3.flag", True)
    writer.add_array("plamo3.heads", [1, 2, 3])
    writer.add_key_value("plamo3.shorts", [7, 8], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT16)
    writer.add_array("tokenizer.ggml.tokens", ["a", "ü", "<s>"])
    rng = np.random.default_rng(0)
    shape = (64, 96) if experts is None else (experts, 64, 96)
    for layer in range(2):
        name = "ffn_down" if experts is None else "ffn_down_exps"
        writer.add_tensor(f"blk.{layer}.{name}.weight", rng.normal(size=shape).astype(np.float16))
        writer.add_tensor(f"blk.{layer}.ffn_gate_inp.weight", rng.normal(size=(4, 64)).astype(np.float32))
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", rng.normal(size=64).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("experts", "place"), [(None, "1:63:95"), (4, "1/3:63:95")])
def test_any_architecture_goes_through(experts: int | None, place: str, tmp_path: Path) -> None:
    source = strange_file(tmp_path / "source.gguf", experts)
    plan = quantize_to_gguf(source, tmp_path / "m.gguf", "q8_0", [Coordinate.parse(place)])
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(tmp_path / "m.gguf")
    for key, field in before.fields.items():
        if not key.startswith("GGUF."):
            assert (after.fields[key].types, after.fields[key].contents()) == (field.types, field.contents()), key
    found = stored(tmp_path / "m.gguf")
    kinds = [each.tensor_type.name for each in found.values()]
    assert kinds == ["Q8_0", "F32", "F32", "F16", "F32", "F32"]
    assert plan.kept[0].value == plan.kept[0].written == values(found[plan.kept[0].tensor])[plan.kept[0].index]
    np.testing.assert_array_equal(found[plan.kept[0].tensor].data, stored(source)[plan.kept[0].tensor].data)


def test_several_parts_become_one_file(plain_file: Path, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "s.gguf", "plamo3", split_max_tensors=2)
    rng = np.random.default_rng(0)
    weights = {f"blk.{layer}.ffn_down.weight": rng.normal(size=(4, 32)).astype(np.float16) for layer in range(3)}
    for name, each in weights.items():
        writer.add_tensor(name, each)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    quantize_to_gguf(tmp_path / "s-00001-of-00002.gguf", tmp_path / "m.gguf", "f32", [Coordinate.parse("2:1:2")])
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert not [key for key in reader.fields if key.startswith("split.")]
    for each in reader.tensors:
        np.testing.assert_array_equal(each.data, weights[each.name].astype(np.float32))


def test_a_quantized_source_is_refused_or_kept_as_it_is(tmp_path: Path) -> None:
    quantize_to_gguf(BOOKS, tmp_path / "q.gguf", "q4_0", [PLACE])
    with pytest.raises(QuantizedCheckpointError, match=r"token_embd\.weight is Q4_0 there and would become Q8_0"):
        quantize_to_gguf(tmp_path / "q.gguf", tmp_path / "m.gguf", "q8_0")
    with pytest.raises(QuantizedCheckpointError, match=r"blk\.1\.ffn_down\.weight is Q4_0 there and would become F16"):
        quantize_to_gguf(tmp_path / "q.gguf", tmp_path / "m.gguf", "q4_0", [PLACE, Coordinate.parse("1:0:0")])
    quantize_to_gguf(tmp_path / "q.gguf", tmp_path / "m.gguf", "q4_0", [PLACE])
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "q.gguf").read_bytes()


def test_a_quantized_checkpoint_is_refused(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(QuantizedCheckpointError, match="gptq, 4 bits"):
        quantize_to_gguf(model, model / "m.gguf")


# What cannot be written.


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_no_number_is_refused_by_tensor(value: float, model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.layers.3.self_attn.v_proj.weight"][1, 2] = value
    save_file(weights, model / "model.safetensors")
    with pytest.raises(NonFiniteWeightsError, match=r"blk\.3\.attn_v\.weight: 1 of"):
        quantize_to_gguf(model, model / "m.gguf")
    assert not list(model.glob("*.gguf*")) and not list(model.glob(".*"))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_nothing(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(b"old")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("os.fsync", fail)
    expected = (
        (RecordError, "No space left on device.*GB free") if isinstance(error, OSError) else (KeyboardInterrupt, None)
    )
    with pytest.raises(expected[0], match=expected[1]):
        quantize_to_gguf(BOOKS, tmp_path / "m.gguf", overwrite=True)
    assert [each.name for each in tmp_path.iterdir()] == ["m.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == b"old"


def test_a_target_that_is_taken(plain_file: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"old")
    with pytest.raises(UsageError, match="that file exists"):
        quantize_to_gguf(BOOKS, tmp_path / "m.gguf")
    with pytest.raises(UsageError, match="that is a folder"):
        quantize_to_gguf(BOOKS, tmp_path, overwrite=True)
    with pytest.raises(UsageError, match="that is the model itself"):
        quantize_to_gguf(plain_file, plain_file, overwrite=True)
    quantize_to_gguf(BOOKS, tmp_path / "m.gguf", overwrite=True)
    assert len(stored(tmp_path / "m.gguf")) == 56


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("q4_00", "Did you mean 'q4_0'"),
        ("int4-g128", "There is no GGUF type 'int4-g128'"),
        ("q4_k_m", r"llama-quantize --tensor-type 'blk\\.0\\.ffn_down=f16' f16\.gguf out\.gguf Q4_K_M"),
        ("IQ2_XS", "only llama.cpp writes"),
    ],
)
def test_types_that_are_not_written(kind: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        quantize_to_gguf(BOOKS, tmp_path / "m.gguf", kind, [PLACE])
    with pytest.raises(UsageError):
        quantize_to_gguf(BOOKS, tmp_path / "m.gguf", "q4_0", [PLACE], kept_kind=kind)


@pytest.mark.parametrize("place", ["6:0:0", "0:128:0", "0:0:384", "0/1:0:0"])
def test_weights_that_are_not_there(place: str, plain_file: Path, tmp_path: Path) -> None:
    for source in (BOOKS, plain_file):
        with pytest.raises((CoordinateError, UnsupportedArchitectureError)):
            quantize_to_gguf(source, tmp_path / "m.gguf", keep=[Coordinate.parse(place)])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpointError, match="There is no file"):
        quantize_to_gguf(tmp_path / "none.gguf", tmp_path / "m.gguf")
    (tmp_path / "torn.gguf").write_bytes(b"GGUF\x03")
    with pytest.raises(SuperweightsError, match="no whole GGUF file"):
        quantize_to_gguf(tmp_path / "torn.gguf", tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("bloom", {}, "convert_hf_to_gguf.py"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', and llama.cpp computes only 'silu'"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False"),
        ("gemma2", {}, "query_pre_attn_scalar is 256, and llama.cpp takes 16"),
        ("qwen2", {"rope_parameters": ROPES["linear"]}, "rotary embedding is 'linear'"),
        ("olmoe", {"num_key_value_heads": 2}, "2 heads of keys"),
        ("llama", {"rope_parameters": ROPES["yarn"] | {"beta_fast": 16}}, "beta_fast of its rotary embedding is 16"),
        ("llama", {"rope_parameters": ROPES["yarn"] | {"attention_factor": 2.0}}, "attention_factor .* is 2.0"),
        ("gemma3_text", GEMMA | {"rope_parameters": WINDOWED}, "layers with a window rotate positions by"),
        ("llama", {"max_position_embeddings": 10**18}, "llama.context_length is 1000000000000000000"),
    ],
)
def test_models_that_llama_cpp_would_compute_otherwise(
    family: str, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    save_tiny_checkpoint(family, tmp_path / "model", **changes)
    with pytest.raises(UnsupportedArchitectureError, match=says):
        quantize_to_gguf(tmp_path / "model", tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("family", "name", "says"),
    [
        ("llama", "model.layers.2.mlp.down_proj.weight", r"nothing for blk\.2\.ffn_down\.weight"),
        ("llama", "lm_head.weight", r"nothing for output\.weight"),
        ("llama", "model.embed_tokens.weight", r"nothing for token_embd\.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight", r"blk\.1\.ffn_down_exps\.weight, expert 3"),
    ],
)
def test_a_checkpoint_that_lacks_a_tensor_is_not_written(family: str, name: str, says: str, tmp_path: Path) -> None:
    save_tiny_checkpoint(family, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights[name]
    save_file(weights, tmp_path / "model" / "model.safetensors")
    with pytest.raises(MissingTensorError, match=says):
        plan_quantized_gguf(tmp_path / "model")


def test_a_place_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for target in (tmp_path / "file" / "m.gguf", tmp_path / f"{'m' * 250}.gguf"):
        with pytest.raises(RecordError, match="Cannot write"):
            quantize_to_gguf(BOOKS, target)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_window_that_llama_cpp_does_not_know_is_said(tmp_path: Path) -> None:
    save_tiny_checkpoint("mistral", tmp_path / "model", sliding_window=8)
    assert any("last 8 tokens" in note for note in plan_quantized_gguf(tmp_path / "model").notes)


def test_every_family_of_the_table_has_its_tensors_named(tmp_path: Path) -> None:
    special = {
        "mistral": {"sliding_window": None},
        "mixtral": {"sliding_window": None},
        "starcoder2": {"sliding_window": None},
        "qwen3_moe": {"norm_topk_prob": True},
        "gemma2": GEMMA,
        "gemma3_text": GEMMA,
        "olmoe": {"num_key_value_heads": 4},
    }
    for family in FAMILIES:
        tiny_model(family, layers=6, vocab=128, **special.get(family, {})).save_pretrained(tmp_path / family)
        plan = plan_quantized_gguf(tmp_path / family, "f32")
        with Checkpoint.open(tmp_path / family) as checkpoint:
            assert plan.nbytes == checkpoint.nbytes, family
        assert any("No tokenizer is written" in note for note in plan.notes)
