"""Small checkpoints to open, and ones that are broken in a chosen way."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import LocalHub
from safetensors.torch import save_file

torch.set_num_threads(1)

CONFIG = {"model_type": "llama", "hidden_size": 8}


@pytest.fixture
def write_model(tmp_path: Path) -> Callable[..., Path]:
    """Writes config.json and a model.safetensors of given bytes or tensors; gives the directory."""

    def write(weights: bytes | dict[str, torch.Tensor], *, folder: str = "model", **config: Any) -> Path:
        directory = tmp_path / folder
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(CONFIG | config))
        if isinstance(weights, bytes):
            (directory / "model.safetensors").write_bytes(weights)
        else:
            save_file(weights, directory / "model.safetensors")
        return directory

    return write


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model of two shards with an index, some megabytes so that single tensors are small parts of it."""
    directory = tmp_path / "sharded"
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    shards = {
        "model-00001-of-00002.safetensors": ["embed", "layer.0.down", "layer.1.down"],
        "model-00002-of-00002.safetensors": ["layer.2.down", "layer.3.down", "head"],
    }
    for file, names in shards.items():
        tensors = {name: torch.randn(1024, 768, generator=generator).bfloat16() for name in names}
        save_file(tensors, directory / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture
def hub(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A local Hub that serves `sharded` as acme/tiny, with the real client pointed at it."""
    from huggingface_hub.utils import close_session

    with LocalHub({"acme/tiny": sharded}) as server:
        server.point_client_here(monkeypatch, tmp_path / "home")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server
        close_session()
