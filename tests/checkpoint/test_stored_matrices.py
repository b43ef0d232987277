"""Which stored tensors are matrices of linear layers: as the loaded model has them, whatever they are called in the files.

The model is asked by marking: its linear layers are filled with numbers of their rows, everything else with zeros. Then it is
saved by transformers, which renames, splits and joins, and the marks are looked for in the files.
"""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from superweights.checkpoint import Checkpoint
from superweights.checkpoint.stored_matrices import StoredMatrix, checkpoint_matrices, stored_matrices
from superweights.errors import QuantizedCheckpointError, UnsupportedArchitectureError
from superweights.testing import PROMISED_FAMILIES, tiny_model

LAYERS, HIDDEN = 2, 64
OTHERS = ("granitemoe", "granitemoehybrid", "hunyuan_v1_moe", "lfm2_moe", "minimax", "phimoe", "qwen3_next", "roberta")
"""Families with names, packs or parts of their own."""
ROUTERS = {  # linear layers by class that choose experts or weigh them against each other, by the end of their stored name
    "hunyuan_v1_moe": {"mlp.gate.wg.weight"},
    "llama4_text": {"feed_forward.router.weight"},
    "phimoe": {"block_sparse_moe.gate.weight"},
    "qwen2_moe": {"mlp.shared_expert_gate.weight"},
    "qwen3_next": {"mlp.shared_expert_gate.weight"},
}


def experts_packed_in(module: nn.Module) -> bool:
    return "Expert" in type(module).__name__


@torch.no_grad()
def mark(model: nn.Module) -> None:
    """Fills linear layers of the decoder layers, [rows, cols], with 1, 2, ... down the rows, and all else with zeros."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.zero_()
    (layers,) = (each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each) == LAYERS)
    for module in layers.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Linear) and name == "weight":
                parameter += torch.arange(1, parameter.shape[0] + 1)[:, None]
            elif isinstance(module, Conv1D) and name == "weight":
                parameter += torch.arange(1, parameter.shape[1] + 1)
            elif parameter.ndim == 3 and experts_packed_in(module):
                parameter += packed_marks(name, parameter)


def packed_marks(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Rows are outputs: hidden ones of a projection back, others of all else; no other axis is as long as the hidden size."""
    back = name.startswith("down") or parameter.shape[1] == HIDDEN and "gate" not in name and "up" not in name
    rows = next(axis for axis in (1, 2) if (parameter.shape[axis] == HIDDEN) == back)
    marks = torch.arange(1, parameter.shape[rows] + 1)
    return marks[:, None] if rows == 1 else marks


@pytest.fixture(scope="module", params=(*PROMISED_FAMILIES, *OTHERS))
def marked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A family and its marked checkpoint."""
    directory = tmp_path_factory.mktemp("marked") / request.param
    model = tiny_model(request.param, layers=LAYERS)
    mark(model)
    model.save_pretrained(directory)
    return request.param, directory


def test_they_are_the_linear_layers_of_the_model_but_for_routers(marked: tuple[str, Path]):
    family, directory = marked
    with Checkpoint.open(directory) as checkpoint:
        found = {each.tensor: each for each in checkpoint_matrices(checkpoint)}
        linear = {name for name in checkpoint.tensors if checkpoint.view(name).any()}
        assert found.keys() <= linear
        assert {re.split(r"\.\d+\.", name, maxsplit=1)[1] for name in linear - found.keys()} == ROUTERS.get(family, set())
        for each in found.values():
            tensor = checkpoint.view(each.tensor)
            assert each.numel == tensor.numel()
            assert (each.experts is not None) == (tensor.ndim == 3)
            by_rows = (tensor.mT if each.transposed else tensor).reshape(-1, each.rows, each.cols)
            assert len(by_rows) == (each.experts or 1)
            marks = torch.arange(1, each.rows + 1.0)[:, None].expand(each.rows, each.cols)
            # Joined matrices of one module, such as gate and up, may be stored apart; then the marks of the second go on.
            assert all(torch.equal(matrix - matrix[0, 0] + 1, marks) for matrix in by_rows), each


def test_each_layer_has_as_many(marked: tuple[str, Path]):
    family, directory = marked
    if family in ("lfm2_moe", "llama4_text", "minimax", "qwen3_next", "deepseek_v3", "granitemoehybrid"):
        pytest.skip("layers of several kinds")
    with Checkpoint.open(directory) as checkpoint:
        found = [each.tensor for each in checkpoint_matrices(checkpoint)]
    first, second = ([re.sub(r"\.[01]\.", ".", each, count=1) for each in found if f".{n}." in each] for n in range(2))
    assert first


def test_orientation():
    conv = stored_matrices(["h.0.mlp.c_fc.weight"], {"h.0.mlp.c_fc.weight": (8, 24)}, {"model_type": "gpt2"})
    assert conv == (StoredMatrix("h.0.mlp.c_fc.weight", rows=24, cols=8, transposed=True),)
