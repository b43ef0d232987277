from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from superweights.coordinates import Coordinate
from superweights.interventions.conditions import QuantizeWeights
from superweights.quantization.scheme import Scheme
from superweights.testing import plant_super_weight, tiny_model


def how(scheme: str, **more: Any) -> QuantizeWeights:
    return QuantizeWeights(Scheme.parse(scheme), **more)


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: each for path in directory.glob("*.safetensors") for name, each in load_file(path).items()}


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Coordinate]:
    """A llama in bfloat16, in several shards, and its super weight in layer 1. Do not change it."""
    model = tiny_model("llama", layers=3, intermediate=128)
    weight = plant_super_weight(model, layer=1)
    directory = tmp_path_factory.mktemp("planted") / "source"
    model.to(torch.bfloat16).save_pretrained(directory, max_shard_size=200_000)
    return directory, weight
