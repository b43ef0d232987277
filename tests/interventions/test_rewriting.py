"""What a rewritten checkpoint's files hold, byte for byte, and what is refused."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file

import superweights as sw
from superweights.checkpoint import Checkpoint
from superweights.coordinates import Coordinate
from superweights.errors import (
    CoordinateError,
    MalformedFileError,
    NotACheckpointError,
    QuantizedCheckpointError,
    RecordError,
    SuperweightsError,
    UsageError,
)
from superweights.interventions.conditions import PruneLargest, ScaleWeights
from superweights.interventions.rewriting import rewrite_checkpoint
from superweights.interventions.weights import EditCount, prune_largest
from superweights.testing import save_tiny_checkpoint

from .conftest import content

WEIGHT = Coordinate.parse("1:3:5")
TENSOR = "model.layers.1.mlp.down_proj.weight"
REMOVAL = ScaleWeights((WEIGHT,))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A llama in bfloat16, in several shards. Do not change it."""
    return save_tiny_checkpoint(
        "llama", tmp_path_factory.mktemp("rewriting") / "source", layers=2, dtype=torch.bfloat16, shards=True
    )


def expected(source: Path, tensor: str, values: torch.Tensor) -> dict[str, bytes]:
    """The files with one tensor replaced by hand."""
    files = content(source)
    with Checkpoint.open(source) as checkpoint:
        entry = checkpoint.entry(tensor)
    raw = values.contiguous().view(torch.uint8).numpy().tobytes()
    assert len(raw) == entry.nbytes
    files[entry.file] = files[entry.file][: entry.start] + raw + files[entry.file][entry.end :]
    return files


def stored(source: Path, tensor: str) -> torch.Tensor:
    with Checkpoint.open(source) as checkpoint:
        return load_file(source / checkpoint.entry(tensor).file)[tensor]


@pytest.mark.parametrize("factor", [0.0, 1.7, -1.0, 1e30])
def test_one_weight_is_scaled_in_its_own_dtype_and_no_other_byte_differs(factor, source, tmp_path):
    assert len(list(source.glob("*.safetensors"))) > 1
    before, values = content(source), stored(source, TENSOR)
    values[3, 5] *= factor
    count = rewrite_checkpoint(str(source), tmp_path / "copy", [ScaleWeights((WEIGHT,), factor)])
    assert count == EditCount(1, 1)
    assert content(tmp_path / "copy") == expected(source, TENSOR, values)
    assert content(source) == before


def test_pruning_touches_every_matrix_of_the_layers(source, tmp_path):
    count = rewrite_checkpoint(source, str(tmp_path / "copy"), [PruneLargest(0.001, keep=(WEIGHT,))])
    found = [0, 0]
    with Checkpoint.open(source) as one, Checkpoint.open(tmp_path / "copy") as other:
        for name, entry in one.tensors.items():
            matrix = ".layers." in name and len(entry.shape) == 2
            values = one.view(name).clone()
            if matrix:
                kept = [3 * 112 + 5] if name == TENSOR else []
                flat = prune_largest(values, 0.001, kept)
                values.view(-1)[flat] = 0
                found[0], found[1] = found[0] + len(flat), found[1] + 1
            assert torch.equal(other.view(name), values)
    assert count == EditCount(*found)
    names = [name for name in content(source) if not name.endswith(".safetensors")]
    assert all(content(tmp_path / "copy")[name] == content(source)[name] for name in names)


def test_packed_experts_are_edited_one_by_one(tmp_path):
    source = save_tiny_checkpoint("gpt_oss", tmp_path / "source", layers=2, dtype=torch.bfloat16)
    removal = ScaleWeights((Coordinate.parse("1/0:5:3"), Coordinate.parse("1/2:5:3")))
    assert rewrite_checkpoint(source, tmp_path / "copy", [removal]) == EditCount(2, 2)
    tensor = "model.layers.1.mlp.experts.down_proj"
    values = stored(source, tensor)
    values[[0, 2], 3, 5] *= 0
    assert content(tmp_path / "copy") == expected(source, tensor, values)


def test_from_a_url(source, tmp_path, monkeypatch):
    monkeypatch.setenv("SUPERWEIGHTS_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.put(f"{source}/", "/rewritten/tiny", recursive=True)
    try:
        rewrite_checkpoint("memory://rewritten/tiny", tmp_path / "copy", [REMOVAL])
    finally:
        memory.rm("/rewritten", recursive=True)
    values = stored(source, TENSOR)
    values[3, 5] *= 0
    wanted = expected(source, TENSOR, values)
    assert all(each == wanted[name] for name, each in content(tmp_path / "copy").items() if "index" not in name)
    with sw.load(tmp_path / "copy") as model:
        assert model.model.get_parameter(TENSOR)[3, 5] == 0


@pytest.mark.parametrize(
    ("edits", "error", "says"),
    [
        ([], UsageError, "there is nothing to do"),
        ([ScaleWeights((WEIGHT,), 1.0)], UsageError, "Scaling 1:3:5 of .* by 1 changes nothing"),
        ([REMOVAL, REMOVAL], UsageError, "Scaling 1:3:5 of .* by 0 changes nothing: the weight is -?0"),
        ([ScaleWeights(())], UsageError, "none is named"),
        ([PruneLargest(1e-9)], UsageError, "the largest matrix has 7168 weights"),
        ([PruneLargest(-1)], UsageError, "the amount is -1"),
        ([PruneLargest(1, keep=(Coordinate.parse("1:64:0"),))], CoordinateError, "rows are 0 to 63"),
        ([ScaleWeights((Coordinate.parse("2:0:0"),))], CoordinateError, "layers are 0 to 1"),
    ],
)
def test_what_is_refused_leaves_nothing(edits, error, says, source, tmp_path):
    with pytest.raises(error, match=says):
        rewrite_checkpoint(source, tmp_path / "out" / "copy", edits)
    assert content(tmp_path) == {}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", [1, 3])
def test_a_full_disk_and_an_interruption_leave_what_was_there(step, error, source, tmp_path, monkeypatch):
    rewrite_checkpoint(source, tmp_path / "copy", [REMOVAL])
    before, fsync, calls = content(tmp_path), os.fsync, []

    def fail(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == step:
            raise error
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RecordError if isinstance(error, OSError) else KeyboardInterrupt):
        rewrite_checkpoint(source, tmp_path / "copy", [PruneLargest(1)], overwrite=True)
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_model_is_replaced_only_when_asked(source, tmp_path):
    rewrite_checkpoint(source, tmp_path / "copy", [REMOVAL])
    before = content(tmp_path / "copy")
    with pytest.raises(UsageError, match="the folder is not empty"):
        rewrite_checkpoint(source, tmp_path / "copy", [PruneLargest(1)])
    assert content(tmp_path / "copy") == before
    rewrite_checkpoint(source, tmp_path / "copy", [PruneLargest(1)], overwrite=True)
    assert content(tmp_path / "copy") != before


def test_a_rewritten_checkpoint_is_rewritten_again_and_gives_the_bytes_of_both(source, tmp_path):
    pruning = PruneLargest(2, keep=(WEIGHT,))
    rewrite_checkpoint(source, tmp_path / "one", [REMOVAL])
    rewrite_checkpoint(tmp_path / "one", tmp_path / "two", [pruning])
    rewrite_checkpoint(source, tmp_path / "both", [REMOVAL, pruning])
    assert content(tmp_path / "two") == content(tmp_path / "both")


@pytest.mark.parametrize(
    ("config", "cut", "error"),
    [
        ({}, 100, MalformedFileError),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, 0, QuantizedCheckpointError),
    ],
)
def test_a_source_that_cannot_be_used(
    config: dict[str, Any], cut: int, error: type[SuperweightsError], source, tmp_path
):
    broken = Path(shutil.copytree(source, tmp_path / "broken"))
    path = broken / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    shard = next(broken.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size - cut])
    with pytest.raises(error):
        rewrite_checkpoint(broken, tmp_path / "copy", [REMOVAL])
    assert not (tmp_path / "copy").exists()


def test_no_such_source(tmp_path):
    with pytest.raises(NotACheckpointError):
        rewrite_checkpoint(tmp_path / "nothing", tmp_path / "copy", [REMOVAL])
