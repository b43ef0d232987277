import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from superweights.results.records import AuditRecord, MeasurementRecord
from superweights.results.store import read_records
from superweights.testing import save_tiny_checkpoint

from .conftest import Ask

QUICK = ("--windows", "4", "--length", "24")


@pytest.fixture(scope="module")
def clipped(tmp_path_factory: pytest.TempPathFactory, planted_checkpoint: Path) -> Path:
    """The planted model with its super weight cut off."""
    from superweights.cli import main

    to = tmp_path_factory.mktemp("clipped") / "q"
    words = ("--scheme", "int8-row", "--clip", "z=3", "--keep", "none", "--to", str(to))
    assert main(["quantize", str(planted_checkpoint), *words]) == 0
    return to


def test_a_lost_weight_is_status_1(ask: Ask, planted_checkpoint: Path, clipped: Path, tmp_path: Path) -> None:
    out = tmp_path / "audit.jsonl"
    answer = ask("audit", clipped, "--original", planted_checkpoint, "--out", out, *QUICK)
    assert (answer.status, answer.err) == (1, "")
    assert "2:49:7" in answer.out and "lost" in answer.out and "quantized, super weights put back" in answer.out
    records = read_records(out)[1]
    assert [each.verdict for each in records if isinstance(each, AuditRecord)] == ["lost"]
    assert any(each.condition == "quantized" for each in records if isinstance(each, MeasurementRecord))


def test_a_kept_weight_is_status_0(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    assert ask("quantize", planted_checkpoint, "--scheme", "int4-g16", "--to", tmp_path / "q").status == 0
    answer = ask("audit", tmp_path / "q", "--original", planted_checkpoint, "--no-measure", "--format", "json")
    assert answer.status == 0
    assert [(row["verdict"], row["format"]) for row in json.loads(answer.out)] == [("kept", "plain")]


def test_without_the_original_weights_are_named_or_found(ask: Ask, clipped: Path) -> None:
    answer = ask("audit", clipped, "--weights", "2:49:7")
    assert answer.status == 0
    assert "unknown" in answer.out and "Give --original" in answer.out


def test_a_coordinate_out_of_range(ask: Ask, planted_checkpoint: Path, clipped: Path) -> None:
    answer = ask("audit", clipped, "--original", planted_checkpoint, "--weights", "2:700:7")
    assert answer.status == 2 and "rows are 0 to" in answer.err


def test_without_the_original_the_files_name_what_was_kept(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    words = ("--scheme", "int4-g16", "--keep", "2:49:7", "--to")
    for form, status, verdict in (("plain", 0, "kept"), ("adapter", 1, "lost")):
        assert ask("quantize", planted_checkpoint, *words, tmp_path / form, "--keep-in", form).status == 0
        answer = ask("audit", tmp_path / form, "--format", "json")
        assert answer.status == status
        assert [(row["coordinate"], row["verdict"]) for row in json.loads(answer.out)] == [("2:49:7", verdict)]


def test_what_the_files_name_is_checked(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    words = ("--scheme", "int4-g16", "--keep", "2:49:7", "--to", tmp_path / "q")
    assert ask("quantize", planted_checkpoint, *words).status == 0
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"]["super_weights"][0]["coordinate"] = "2:49"
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    answer = ask("audit", tmp_path / "q")
    assert answer.status == 3 and "has the super weight" in answer.err and "2:49" in answer.err


def test_another_original_is_seen_before_anything_is_looked_for(ask: Ask, clipped: Path, tmp_path: Path) -> None:
    """Also one without any candidate."""
    other = save_tiny_checkpoint("qwen2", tmp_path / "qwen2")
    answer = ask("audit", clipped, "--original", other)
    assert answer.status == 2 and "is a llama" in answer.err and "is a qwen2" in answer.err
    wide = save_tiny_checkpoint("llama", tmp_path / "wide", hidden_size=32)
    answer = ask("audit", clipped, "--original", wide)
    assert answer.status == 2 and "its hidden_size is 64" in answer.err


def test_another_model_of_the_same_shape_is_refused(ask: Ask, clipped: Path, tmp_path: Path) -> None:
    other = save_tiny_checkpoint("llama", tmp_path / "other", seed=7)
    answer = ask("audit", clipped, "--original", other, "--weights", "2:49:7")
    assert answer.status == 2 and "of another model" in answer.err and "Give the model it was made from" in answer.err


@pytest.mark.parametrize("layer", [2, 4])
def test_a_scale_that_is_no_number_is_refused(
    layer: int, ask: Ask, planted_checkpoint: Path, clipped: Path, tmp_path: Path
) -> None:
    """In the matrix of the weight, and in one that only the measurement reads."""
    damaged = tmp_path / "q"
    shutil.copytree(clipped, damaged)
    tensors = load_file(damaged / "model.safetensors")
    name = f"model.layers.{layer}.mlp.down_proj.weight_scale"
    tensors[name][0] = torch.nan
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    answer = ask("audit", damaged, "--original", planted_checkpoint, *QUICK)
    assert (answer.status, answer.out) == (3, "")
    assert f"layers.{layer}.mlp.down_proj" in answer.err and "NaN or infinite" in answer.err
