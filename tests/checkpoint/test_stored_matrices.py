"""Which stored tensors are matrices of linear layers: as the loaded model has them, whatever they are called in the files.

The model is asked by marking: its linear layers are filled with numbers of their rows, everything else with zeros. Then it is
saved by transformers, which renames, splits and joins, and the marks are looked for in the files.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from superweights.checkpoint import Checkpoint
from superweights.checkpoint.stored_matrices import StoredMatrix, checkpoint_matrices, stored_matrices
from superweights.errors import QuantizedCheckpointError, UnsupportedArchitectureError
from superweights.testing import PROMISED_FAMILIES, tiny_model

LAYERS, HIDDEN = 2, 64
OTHERS = (
    "granitemoe",
    "granitemoehybrid",
    "hunyuan_v1_moe",
    "jetmoe",
    "lfm2_moe",
    "minimax",
    "phimoe",
    "qwen3_next",
    "roberta",
)
"""Families with names, packs or parts of their own."""
ROUTERS = {  # linear layers by class that choose experts or weigh them against each other, by the end of their stored name
    "hunyuan_v1_moe": {"mlp.gate.wg.weight"},
    "jetmoe": {"mlp.router.layer.weight", "self_attention.experts.router.layer.weight"},
    "llama4_text": {"feed_forward.router.weight"},
    "phimoe": {"block_sparse_moe.gate.weight"},
    "qwen2_moe": {"mlp.shared_expert_gate.weight"},
    "qwen3_next": {"mlp.shared_expert_gate.weight"},
}


@torch.no_grad()
def mark(model: nn.Module) -> None:
    """Fills linear layers of the decoder layers, [rows, cols], with 1, 2, ... down the rows, and all else with zeros."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.zero_()
    (layers,) = (each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each) == LAYERS)
    for path, module in layers.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Linear | Conv1D) and name == "weight":
                fill(parameter, rows=0 if isinstance(module, nn.Linear) else 1)
            elif "Experts" in type(module).__name__ and parameter.ndim == 3:
                # What leads back to the stream has hidden-size outputs; all else has hidden-size inputs.
                back = re.search("down|output", f"{path}.{name}") is not None
                fill(parameter, rows=1 if (parameter.shape[1] == HIDDEN) == back else 2)


def fill(parameter: torch.Tensor, *, rows: int) -> None:
    numbers = torch.arange(1.0, parameter.shape[rows] + 1)
    parameter.copy_(numbers if rows == parameter.ndim - 1 else numbers[:, None])


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
        assert {re.split(r"\.\d+\.", name, maxsplit=1)[1] for name in linear - found.keys()} == ROUTERS.get(
            family, set()
        )
        for each in found.values():
            tensor = checkpoint.view(each.tensor)
            assert each.numel == tensor.numel()
            assert (each.experts is not None) == (tensor.ndim == 3)
            by_rows = (tensor.mT if each.transposed else tensor).reshape(-1, each.rows, each.cols)
            assert len(by_rows) == (each.experts or 1)
            marks = torch.arange(1, each.rows + 1.0)[:, None].expand(each.rows, each.cols)
            # Of what one parameter holds, such as gate and up, the files may hold parts: then the numbers go on.
            assert all(torch.equal(matrix - matrix[0, 0] + 1, marks) for matrix in by_rows), each


@pytest.mark.parametrize("marked", ["gpt2", "gpt_oss"], indirect=True)
def test_what_is_stored_with_inputs_first(marked: tuple[str, Path]):
    family, directory = marked
    with Checkpoint.open(directory) as checkpoint:
        found = {
            each.tensor.rpartition(".1.")[2]: each for each in checkpoint_matrices(checkpoint) if ".1." in each.tensor
        }
    transposed = {name: (each.rows, each.cols, each.experts) for name, each in found.items() if each.transposed}
    if family == "gpt2":
        assert transposed == {
            "attn.c_attn.weight": (192, 64, None),
            "attn.c_proj.weight": (64, 64, None),
            "mlp.c_fc.weight": (112, 64, None),
            "mlp.c_proj.weight": (64, 112, None),
        }
        assert len(found) == 4
    else:
        assert transposed == {
            "mlp.experts.gate_up_proj": (224, 64, 4),
            "mlp.experts.down_proj": (64, 112, 4),
        }
        assert {"self_attn.q_proj.weight", "self_attn.o_proj.weight"} < found.keys()


NO_MATRICES = {
    "a norm": ("layers.0.norm.weight", (8,)),
    "a bias": ("layers.0.mlp.up.bias", (24,)),
    "biases of all experts": ("layers.0.mlp.experts.down_proj_bias", (4, 8)),
    "biases of all experts as columns": ("layers.0.mlp.experts.down_proj_bias", (4, 8, 3)),
    "a convolution": ("layers.0.conv.weight", (8, 1, 4)),
    "a wide convolution": ("layers.0.conv.weight", (8, 8, 4)),
    "a gate of one output": ("layers.0.mlp.shared_gate.weight", (1, 8)),
    "no weight": ("layers.0.attention.sinks", (8, 4)),
    "a router": ("layers.0.mlp.gate.weight", (4, 8)),
    "a router with a layer": ("layers.0.mlp.router.layer.weight", (4, 8)),
}


@pytest.mark.parametrize(("name", "shape"), NO_MATRICES.values(), ids=NO_MATRICES)
def test_what_is_no_matrix_of_a_linear_layer(name: str, shape: tuple[int, ...]):
    shapes = {name: shape, "layers.0.mlp.gate_proj.weight": (24, 8)}
    (found,) = stored_matrices(shapes, shapes, {"model_type": "llama"})
    assert found == StoredMatrix("layers.0.mlp.gate_proj.weight", rows=24, cols=8, transposed=False)


def test_a_pack_counts_all_its_weights_and_knows_its_module():
    shapes = {"layers.0.mlp.experts.down_proj": (4, 24, 8)}
    (packed,) = stored_matrices(shapes, shapes, {"text_config": {"model_type": "llama4_text"}})
    assert packed == StoredMatrix("layers.0.mlp.experts.down_proj", rows=8, cols=24, transposed=True, experts=4)
    assert (packed.numel, packed.module) == (768, "layers.0.mlp.experts")
    (plain,) = stored_matrices(shapes, shapes, {"model_type": "qwen3_moe"})
    assert (plain.rows, plain.cols, plain.transposed) == (24, 8, False)


def test_prediction_layers_and_other_towers_are_left_out(write_model: Callable[..., Path]):
    names = ["model.layers.0.up.weight", "model.layers.1.up.weight", "model.layers.2.eh_proj.weight"]
    names += ["vision.layers.0.up.weight", "model.embed_tokens.weight", "lm_head.weight"]
    directory = write_model({name: torch.ones(4, 8) for name in names}, num_hidden_layers=2)
    with Checkpoint.open(directory) as checkpoint:
        assert [each.tensor for each in checkpoint_matrices(checkpoint)] == names[:2]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.float32, torch.float16, torch.bfloat16]
)
def test_only_plain_floats_can_be_rounded(dtype: torch.dtype, write_model: Callable[..., Path]):
    tensors = {"layers.0.up.weight": torch.ones(4, 8, dtype=dtype), "layers.0.down.weight": torch.ones(8, 4)}
    with Checkpoint.open(write_model(tensors)) as checkpoint:
        found = {each.tensor for each in checkpoint_matrices(checkpoint)}
    plain = dtype in (torch.float32, torch.float16, torch.bfloat16)
    assert found == ({"layers.0.up.weight", "layers.0.down.weight"} if plain else {"layers.0.down.weight"})


def test_a_checkpoint_without_any_is_refused(write_model: Callable[..., Path]):
    tensors = {"layers.0.up.weight": torch.ones(4, 8, dtype=torch.int8), "layers.0.norm.weight": torch.ones(8).double()}
    with (
        Checkpoint.open(write_model(tensors)) as checkpoint,
        pytest.raises(QuantizedCheckpointError, match=r"hold none in F32, F16 or BF16 \(they hold F64, I8\)"),
    ):
        checkpoint_matrices(checkpoint)


def test_a_checkpoint_without_layers_is_refused(write_model: Callable[..., Path]):
    with (
        Checkpoint.open(write_model({"up.weight": torch.ones(4, 8)})) as checkpoint,
        pytest.raises(UnsupportedArchitectureError, match="No tensor has a layer number"),
    ):
        checkpoint_matrices(checkpoint)
