import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from superweights.checkpoint import Checkpoint
from superweights.errors import MissingTensorError, NotACheckpointError, PickleCheckpointError

WriteModel = Callable[..., Path]


@pytest.fixture
def model(write_model: WriteModel) -> Path:
    return write_model({"w": torch.arange(4.0)})


def test_a_path_as_text_and_as_url(model: Path) -> None:
    for name in (model, str(model), f"file://{model}", f"{model}/"):
        with Checkpoint.open(name) as checkpoint:
            assert checkpoint.view("w").tolist() == [0, 1, 2, 3]


def test_a_single_file_beside_its_config(model: Path) -> None:
    with Checkpoint.open(model / "model.safetensors") as checkpoint:
        assert checkpoint.directory == model
        assert list(checkpoint.tensors) == ["w"]


def test_a_single_file_without_config(model: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(model / "model.safetensors", alone)
    with pytest.raises(NotACheckpointError, match=r"no config\.json.*model\.safetensors"):
        Checkpoint.open(alone / "model.safetensors")


def test_one_shard_of_several_is_not_a_model(sharded: Path) -> None:
    with pytest.raises(NotACheckpointError, match=r"one shard of several.*sharded"):
        Checkpoint.open(sharded / "model-00001-of-00002.safetensors")


def test_another_file_is_not_a_model(model: Path) -> None:
    with pytest.raises(NotACheckpointError, match=r"config\.json is a file, not a model"):
        Checkpoint.open(model / "config.json")


def test_a_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpointError, match=r"no config\.json\. Found: nothing"):
        Checkpoint.open(tmp_path)


def test_links_as_in_the_hub_cache_are_followed(model: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in model.iterdir():
        (linked / file.name).symlink_to(file)
    with Checkpoint.open(linked) as checkpoint:
        assert checkpoint.view("w").tolist() == [0, 1, 2, 3]


def test_a_broken_link_counts_as_missing(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(sharded / "gone")
    with pytest.raises(MissingTensorError, match="model-00002"):
        Checkpoint.open(sharded)


def test_shards_in_a_folder_below(sharded: Path) -> None:
    (sharded / "parts").mkdir()
    index = sharded / "model.safetensors.index.json"
    for shard in list(sharded.glob("*.safetensors")):
        shard.rename(sharded / "parts" / shard.name)
    index.write_text(index.read_text().replace('"model-', '"parts/model-'))
    with Checkpoint.open(sharded) as checkpoint:
        assert checkpoint.tensors["head"].file == "parts/model-00002-of-00002.safetensors"
        assert checkpoint.view("head").shape == (1024, 768)


def test_pickles_are_named_and_never_opened(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(PickleCheckpointError, match=r"pytorch_model\.bin.*save_pretrained"):
        Checkpoint.open(model)


def test_the_standard_file_comes_first(model: Path) -> None:
    save_file({"other": torch.zeros(1)}, model / "consolidated.safetensors")
    with Checkpoint.open(model) as checkpoint:
        assert list(checkpoint.tensors) == ["w"]
