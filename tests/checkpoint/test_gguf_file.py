"""GGUF files as checkpoints: every architecture that is read gives the model it was written from."""

import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import superweights as sw
from superweights.checkpoint import Checkpoint
from superweights.checkpoint.opening import open_dequantized
from superweights.errors import (
    MalformedFileError,
    MissingTensorError,
    NotACheckpointError,
    QuantizedCheckpointError,
    UnsupportedArchitectureError,
    UsageError,
    WeightMismatchError,
)
from superweights.experiments.audit import audit_weights
from superweights.testing import save_planted_checkpoint, save_tiny_checkpoint

gguf = pytest.importorskip("gguf")

from gguf_writer import write_gguf  # noqa: E402

FAMILIES = [
    "llama", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "falcon", "phi3", "bloom", "stablelm", "gpt2", "starcoder2",
    "nemotron", "gemma2", "gemma3_text",
]  # fmt: skip
SCALED = {"query_pre_attn_scalar": 16, "head_dim": 16}
CHANGES: dict[str, dict[str, Any]] = {"qwen3_moe": {"norm_topk_prob": True}, "gemma2": SCALED, "gemma3_text": SCALED}
"""Settings that files do not say, at the values that llama.cpp computes."""
DOWN = "model.layers.2.mlp.down_proj.weight"
WEIGHT = sw.Coordinate.parse("2:49:7")


def logits(path: Path, residency: str = "streamed") -> torch.Tensor:
    with sw.load(path, residency=residency) as model:
        return model.logits(model.states(torch.arange(3, 40)[None]))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_the_one_it_was_written_from(family: str, tmp_path: Path) -> None:
    source = save_tiny_checkpoint(family, tmp_path / "m", **CHANGES.get(family, {}))
    found = write_gguf(source, tmp_path / "m.gguf")
    expected = logits(source)
    assert torch.equal(logits(found), expected)
    assert torch.equal(logits(found, "resident"), expected)


@pytest.fixture(scope="module")
def source(planted_checkpoint: Path) -> Path:
    return planted_checkpoint


@pytest.fixture(scope="module")
def plain(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(source, tmp_path_factory.mktemp("plain") / "m.gguf", kind="F16")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose rows 32 divides, at Q8_0."""
    folder = tmp_path_factory.mktemp("packed")
    save_tiny_checkpoint("llama", folder / "m", intermediate_size=96)
    return write_gguf(folder / "m", folder / "m.gguf", kind="Q8_0")


def test_what_is_stored_plain_is_a_view_of_the_file(plain: Path, source: Path) -> None:
    with open_dequantized(plain) as found, Checkpoint.open(source) as expected:
        assert (found.entry(DOWN).dtype, found.packing, found.is_packed(DOWN)) == ("F16", None, False)
        values = expected.view(DOWN).half()
        assert torch.equal(found.view(DOWN), values)
        scalar = found.read_scalar(DOWN, (49, 7))
        assert scalar.value == float(values[49, 7])
        assert plain.read_bytes()[scalar.offset : scalar.offset + 2] == values[49, 7].numpy().tobytes()
        query = "model.layers.0.self_attn.q_proj.weight"  # in another order in the file
        assert found.is_packed(query) and torch.equal(found.view(query), expected.view(query).half().float())
        with pytest.raises(QuantizedCheckpointError, match=r"llama\.cpp's order"):
            found.read_scalar(query, (0, 0))


def test_a_suffix_in_capitals_is_the_same(plain: Path, tmp_path: Path) -> None:
    shutil.copy(plain, tmp_path / "M.GGUF")
    with open_dequantized(tmp_path / "M.GGUF") as found:
        assert found.gguf_file == "M.GGUF"


def test_find_finds_what_was_planted(plain: Path, source: Path) -> None:
    with sw.load(source) as other:
        tokenizer = other.tokenizer
    with sw.load(plain, tokenizer=tokenizer, residency="streamed") as model:
        assert WEIGHT in [each.coordinate for each in sw.find(model).candidates]


def test_packed_matrices_are_the_packages(packed: Path) -> None:
    stored = {each.name: each for each in gguf.GGUFReader(packed).tensors}
    with open_dequantized(packed) as found:
        assert found.packing == "gguf Q8_0"
        tensor = stored["blk.2.ffn_down.weight"]
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(found.view(DOWN), expected)
        matrix = found.packed_matrix(DOWN)
        assert matrix is not None and torch.equal(matrix.weights, expected) and matrix.shared == (1, 32)
        assert found.entry(DOWN).nbytes == tensor.n_bytes  # what a pass reads
        assert found.packed_matrix("model.norm.weight") is None
        query = "model.layers.0.self_attn.q_proj.weight"
        turned = found.packed_matrix(query)
        assert turned is not None and torch.equal(turned.weights, found.view(query))
        rows = found.view_rows("model.embed_tokens.weight", [5, 0])
        assert torch.equal(rows, found.view("model.embed_tokens.weight")[[5, 0]])
        assert found.view_rows("model.embed_tokens.weight", []).shape == (0, rows.shape[1])
        with pytest.raises(QuantizedCheckpointError, match="only read"):
            found.require_plain("quantizing")
    with sw.load(packed) as model:
        for _ in range(2):  # the second meets no new token
            model.run(torch.arange(9)[None])
        assert any("gguf Q8_0" in each for each in model.warnings)


def test_two_types_are_two_digests(packed: Path, tmp_path: Path) -> None:
    save_tiny_checkpoint("llama", tmp_path / "m", intermediate_size=96)
    other = write_gguf(tmp_path / "m", tmp_path / "m.gguf", kind="Q4_0")
    with open_dequantized(packed) as one, open_dequantized(other) as two, open_dequantized(packed) as again:
        assert one.digest == again.digest != two.digest


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_an_audit_follows_the_matrix(family: str, kind: str, tmp_path: Path) -> None:
    """Also where the original stores it the other way round, or the file packs experts."""
    weight = save_planted_checkpoint(tmp_path / "m", model_type=family, dtype=torch.float32)
    found = write_gguf(tmp_path / "m", tmp_path / "m.gguf", kind=kind)
    with open_dequantized(found) as quantized, Checkpoint.open(tmp_path / "m") as original:
        (record,) = audit_weights(quantized, [weight], original=original)
    assert record.verdict == "kept" and abs(record.stored) > 1
    assert record.error == 0 if kind == "F32" else abs(record.error) < 1e-2


def test_an_audit_refuses_another_model_of_the_same_shape(plain: Path, tmp_path: Path) -> None:
    other = save_tiny_checkpoint("qwen2", tmp_path / "m")
    with (
        open_dequantized(plain) as quantized,
        Checkpoint.open(other) as original,
        pytest.raises(UsageError, match=r"it is a llama, and .* is a qwen2"),
    ):
        list(audit_weights(quantized, [WEIGHT], original=original))


# Files in parts.


@pytest.fixture
def parts(source: Path, tmp_path: Path) -> list[Path]:
    """The planted model in two files."""
    reader = gguf.GGUFReader(write_gguf(source, tmp_path / "whole.gguf"))
    names = [each.name for each in reader.tensors]
    half = set(names[: len(names) // 2])
    found = []
    for number, chosen in ((1, half), (2, set(names) - half)):
        path = tmp_path / f"m-{number:05d}-of-00002.gguf"
        found.append(write_gguf(source, path, drop=tuple(set(names) - chosen)))
    return found


def test_parts_are_one_model(parts: list[Path], source: Path) -> None:
    assert torch.equal(logits(parts[0]), logits(source))
    parts[1].unlink()
    with pytest.raises(MissingTensorError, match="m-00002-of-00002"):
        open_dequantized(parts[0])


# Positions.


def test_positions_stretched_as_by_llama_3(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    source = save_tiny_checkpoint("llama", tmp_path / "m", rope_parameters=rope, head_dim=64)
    with sw.load(source) as model:
        rotary = model.model.model.rotary_emb
        base = 500000.0 ** (-torch.arange(0, 64, 2) / 64)
        factors = (base / rotary.inv_freq).numpy().astype(np.float32)
    assert factors.max() == pytest.approx(32) and (factors > 1).any() and (factors == 1).any()
    found = write_gguf(source, tmp_path / "m.gguf", extra={"rope_freqs.weight": factors})
    assert torch.allclose(logits(found), logits(source), atol=1e-5)
    strange = write_gguf(source, tmp_path / "s.gguf", extra={"rope_freqs.weight": factors * 1.1})
    with pytest.raises(UnsupportedArchitectureError, match="frequencies of its own"):
        open_dequantized(strange)


def test_positions_stretched_evenly(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    source = save_tiny_checkpoint("llama", tmp_path / "m", rope_parameters=rope)
    more = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}
    assert torch.equal(logits(write_gguf(source, tmp_path / "m.gguf", **more)), logits(source))
    untyped = {"llama__rope__scaling__factor": 4.0}  # llama.cpp takes that for linear
    assert torch.equal(logits(write_gguf(source, tmp_path / "u.gguf", **untyped)), logits(source))
    more["llama__rope__scaling__type"] = "spiral"
    with pytest.raises(UnsupportedArchitectureError, match="spiral"):
        open_dequantized(write_gguf(source, tmp_path / "s.gguf", **more))


def test_positions_of_gemma_3_are_stretched_in_layers_without_a_window(tmp_path: Path) -> None:
    """As in all of its models from 4B on."""
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
    }
    source = save_tiny_checkpoint("gemma3_text", tmp_path / "m", rope_parameters=rope, **SCALED)
    more = {
        "gemma3__rope__scaling__type": "linear",
        "gemma3__rope__scaling__factor": 8.0,
        "gemma3__rope__freq_base": 500000.0,
        "gemma3__rope__freq_base_swa": 20000.0,
    }
    assert torch.equal(logits(write_gguf(source, tmp_path / "m.gguf", **more)), logits(source))


def test_yarn_with_settings_that_are_not_read(source: Path, tmp_path: Path) -> None:
    more = {
        "llama__rope__scaling__type": "yarn",
        "llama__rope__scaling__factor": 4.0,
        "llama__rope__scaling__yarn_beta_fast": 16.0,
    }
    with open_dequantized(write_gguf(source, tmp_path / "m.gguf", **more)) as found:
        assert found.config["rope_parameters"]["beta_fast"] == 16
    more["llama__rope__scaling__yarn_log_multiplier"] = 0.1
    with pytest.raises(UnsupportedArchitectureError, match="'yarn' with yarn_log_multiplier"):
        open_dequantized(write_gguf(source, tmp_path / "s.gguf", **more))


# Bad input.


def test_the_models_name_does_not_choose_its_architecture(source: Path, tmp_path: Path) -> None:
    found = write_gguf(source, tmp_path / "m.gguf", general__name="mistral")
    assert torch.equal(logits(found), logits(source))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"llama__block_count": 2**32 - 1}, "says that it has 4294967295 layers, and holds 6"),
        ({"llama__attention__head_count": 0}, "refuses the settings of this llama: ZeroDivisionError"),
        ({"llama__rope__freq_base": "fast"}, "make no config of a llama"),
    ],
)
def test_settings_that_make_no_sense(more: dict[str, Any], says: str, source: Path, tmp_path: Path) -> None:
    extra = {"rope_freqs.weight": np.ones(8, np.float32)}
    with pytest.raises((MalformedFileError, UnsupportedArchitectureError), match=says):
        open_dequantized(write_gguf(source, tmp_path / "m.gguf", extra=extra, **more))


def test_a_matrix_that_lies_the_other_way_round_is_refused(source: Path, tmp_path: Path) -> None:
    """As many weights in another shape."""
    name = "blk.2.ffn_down.weight"
    extra = {name: np.zeros((112, 64), np.float32)}
    found = write_gguf(source, tmp_path / "m.gguf", drop=(name,), extra=extra)
    with pytest.raises(MalformedFileError, match=r"has the shape \[112, 64\], and .* has \[64, 112\]"):
        open_dequantized(found)


def test_experts_in_another_number_than_the_settings_say(tmp_path: Path) -> None:
    source = save_tiny_checkpoint("qwen3_moe", tmp_path / "m", norm_topk_prob=True)
    for name in ("down", "up"):
        stored = gguf.GGUFReader(write_gguf(source, tmp_path / "w.gguf"))
        whole = f"blk.0.ffn_{name}_exps.weight"
        values = next(each.data for each in stored.tensors if each.name == whole)
        drop = (whole, whole.removesuffix(".weight"))
        found = write_gguf(source, tmp_path / "m.gguf", drop=drop, extra={whole: np.array(values[:-1])})
        with pytest.raises(MalformedFileError, match=f"ffn_{name}_exps"):
            open_dequantized(found)


def test_a_tensor_that_has_no_place_is_refused(source: Path, tmp_path: Path) -> None:
    extra = {"blk.0.attn_q_norm.weight": np.zeros(64, np.float32)}
    with pytest.raises(QuantizedCheckpointError, match=r"blk\.0\.attn_q_norm\.weight"):
        open_dequantized(write_gguf(source, tmp_path / "m.gguf", extra=extra))


def test_a_missing_tensor_is_named(source: Path, tmp_path: Path) -> None:
    found = write_gguf(source, tmp_path / "m.gguf", drop=("blk.2.ffn_down.weight",))
    with sw.load(found, residency="streamed") as model, pytest.raises(WeightMismatchError, match="down_proj"):
        model.run(torch.arange(9)[None])


def test_sizes_that_contradict_the_metadata(source: Path, tmp_path: Path) -> None:
    found = write_gguf(source, tmp_path / "m.gguf", llama__feed_forward_length=999)
    with pytest.raises(MalformedFileError, match="ffn_"):
        open_dequantized(found)


def test_an_architecture_that_transformers_does_not_have(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "plamo")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedArchitectureError, match="plamo"):
        open_dequantized(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:3],
        lambda raw: b"GGML" + raw[4:],
        lambda raw: raw[:4] + struct.pack("<I", 99) + raw[8:],
        lambda raw: raw[:8] + struct.pack("<Q", 2**62) + raw[16:],
        lambda raw: raw[:16] + struct.pack("<Q", 2**62) + raw[24:],
        lambda raw: raw[:24] + struct.pack("<Q", 2**63) + raw[32:],
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-40],
        lambda raw: raw[:200],
    ],
    ids=["empty", "three bytes", "magic", "version", "tensors", "keys", "key length", "half", "end", "metadata"],
)
def test_damaged_files_are_refused(damage, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(damage(plain.read_bytes()))
    with pytest.raises(MalformedFileError, match=r"m\.gguf is no whole GGUF file"):
        open_dequantized(tmp_path / "m.gguf")


def test_where_safetensors_are_needed_a_gguf_file_is_refused(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(NotACheckpointError, match="is a GGUF file"):
        Checkpoint.open(plain)
    shutil.copy(plain, tmp_path / "m.gguf")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(NotACheckpointError, match=r"Give the \.gguf file itself"):
        open_dequantized(tmp_path)
