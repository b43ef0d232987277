"""What can be loaded, what is refused and with which words, and that nothing is left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lively_models import lively_model
from safetensors.torch import load_file, save_file

import superweights as sw
from superweights.coordinates import Coordinate
from superweights.detection.search import default_prompts
from superweights.errors import (
    MalformedFileError,
    MissingTensorError,
    ModelError,
    NotACheckpointError,
    RemoteCodeError,
    SuperweightsError,
    UnknownNameError,
    UnsupportedArchitectureError,
    UsageError,
    WeightMismatchError,
)
from superweights.model.tracing import trace
from superweights.testing import save_tiny_checkpoint, tiny_model, tiny_tokenizer

RESIDENCIES = ["resident", "streamed"]
Change = Callable[..., Path]

REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OddConfig(LlamaConfig):
    model_type = "odd"

class OddModel(LlamaForCausalLM):
    config_class = OddConfig
"""


@pytest.fixture
def changed_copy(save_family, tmp_path) -> Change:
    """A copy of a tiny checkpoint with other values in config.json, without some tensors, or with further files."""

    def change(family: str = "llama", *, without: str = "", files: dict[str, str] | None = None, **config: Any) -> Path:
        copy = Path(shutil.copytree(save_family(family), tmp_path / "changed"))
        path = copy / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        if without:
            tensors = load_file(copy / "model.safetensors")
            kept = {name: value for name, value in tensors.items() if without not in name}
            assert len(kept) < len(tensors)
            save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
        for name, text in (files or {}).items():
            (copy / name).write_text(text)
        return copy

    return change


def stream_of(model: sw.LoadedModel) -> torch.Tensor:
    return trace(model, default_prompts(model)).stream


def test_a_loaded_model_describes_itself(save_family):
    directory = save_family("llama")
    with sw.load(str(directory), residency="streamed") as model:
        assert model.name == str(directory)
        assert model.residency == "streamed"
        assert type(model.model).__name__ == "LlamaForCausalLM"
        assert model.tokenizer.bos_token == "<s>"
        assert model.checkpoint.directory == directory
        assert model.architecture.layer_count == 6
        assert model.decoder is model.model.model
        assert model.layer(3) is model.model.model.layers[3]


def test_resident_is_the_default(save_family):
    with sw.load(save_family("llama")) as model:
        assert model.residency == "resident"


def test_a_given_tokenizer_replaces_the_checkpoints_own(save_family):
    tokenizer = tiny_tokenizer()
    with sw.load(save_family("llama"), tokenizer=tokenizer) as model:
        assert model.tokenizer is tokenizer


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_no_tokenizer_is_no_obstacle(residency, changed_copy):
    copy = changed_copy()
    for path in copy.glob("tokenizer*"):
        path.unlink()
    with sw.load(copy, residency=residency) as model:
        assert model.tokenizer is None
        assert stream_of(model).shape == (7, 24, 64)


def test_a_tokenizer_of_another_model_is_refused_when_it_shows(save_family):
    with (
        sw.load(save_family("llama"), tokenizer=tiny_tokenizer(260)) as model,
        pytest.raises(UsageError, match="The tokenizer belongs to another model"),
    ):
        default_prompts(model, ["déjà vu"])


def test_no_such_path(tmp_path):
    with pytest.raises(NotACheckpointError):
        sw.load(tmp_path / "nothing")


def test_a_config_of_other_sizes(changed_copy):
    with pytest.raises(
        WeightMismatchError, match=r"shape \[.*\] in the checkpoint and \[.*\].*Do config.json and the weights"
    ):
        sw.load(changed_copy(hidden_size=96, head_dim=24))


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_a_config_of_another_intermediate_size(residency, changed_copy):
    """The decoder outside its layers fits: what does not shows when the layer is loaded."""
    with (
        pytest.raises(WeightMismatchError) as caught,
        sw.load(changed_copy(intermediate_size=120), residency=residency) as model,
    ):
        stream_of(model)
    assert "model.layers.0.mlp." in str(caught.value)
    assert "[112, 64]" in str(caught.value) or "[64, 112]" in str(caught.value)
    assert "Do config.json and the weights belong together?" in str(caught.value)


def test_a_config_of_more_layers(changed_copy):
    with pytest.raises(MissingTensorError, match=r"no tensors for decoder layers 6, 7\..*Do config\.json"):
        sw.load(changed_copy(num_hidden_layers=8))


def test_a_config_of_no_layers(changed_copy):
    with pytest.raises(UnsupportedArchitectureError, match="num_hidden_layers 0: there is no decoder layer"):
        sw.load(changed_copy(num_hidden_layers=0, layer_types=[]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_config_of_fewer_layers_is_said(family, changed_copy):
    """No error: prediction layers stand behind the decoder's in DeepSeek-V3."""
    name = "n_layer" if family == "gpt2" else "num_hidden_layers"
    with sw.load(changed_copy(family, **{name: 4}, layer_types=None), residency="streamed") as model:
        assert stream_of(model).shape[0] == 5
        (warning,) = model.warnings
    assert warning.startswith(
        "config.json describes 4 decoder layers and the files hold 6: those from 4 on were left out."
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "deepseek_v3"])
def test_a_sound_checkpoint_gives_no_warning(family, save_family):
    with sw.load(save_family(family), residency="streamed") as model:
        assert model.warnings == ()


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("missing", ["mlp.down_proj.weight", "post_attention_layernorm.weight"])
def test_a_layer_that_lacks_a_tensor(missing, residency, changed_copy):
    with (
        pytest.raises(
            WeightMismatchError, match=f"Loading decoder layer 4 .* no tensor for 1 of its parameters: {missing}"
        ),
        sw.load(changed_copy(without=f"layers.4.{missing}"), residency=residency) as model,
    ):
        stream_of(model)


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_a_layer_that_lacks_one_of_its_experts(residency, changed_copy):
    with (
        pytest.raises(WeightMismatchError, match=r"model\.layers\.2\.mlp\.experts"),
        sw.load(
            changed_copy("mixtral", without="layers.2.block_sparse_moe.experts.1.w2."), residency=residency
        ) as model,
    ):
        stream_of(model)


def test_no_token_embedding(changed_copy):
    with pytest.raises(MissingTensorError, match=r"no tensors for the token embedding model\.embed_tokens\.weight"):
        sw.load(changed_copy(without="embed_tokens"))


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_position_embeddings_that_are_missing_are_refused(residency, changed_copy):
    """Outside the layers, but the pass needs them: never run on whatever memory holds."""
    with (
        pytest.raises(SuperweightsError, match=r"transformer\.wpe\.weight"),
        sw.load(changed_copy("gpt2", without="wpe"), residency=residency) as model,
    ):
        stream_of(model)


def test_the_language_head_is_not_needed(changed_copy, save_family):
    with sw.load(save_family("llama")) as model:
        whole = stream_of(model)
    with sw.load(changed_copy(without="lm_head"), residency="streamed") as model:
        assert torch.equal(stream_of(model), whole)


def test_a_type_that_transformers_does_not_know(changed_copy):
    with pytest.raises(
        UnsupportedArchitectureError, match="is of type 'odd', which the installed transformers does not know"
    ):
        sw.load(changed_copy(model_type="odd"))


@pytest.mark.parametrize("model_type", [["llama"], {"llama": 1}, 3, None])
def test_a_type_that_is_no_text(model_type, changed_copy):
    with pytest.raises(UnsupportedArchitectureError, match="which the installed transformers does not know"):
        sw.load(changed_copy(model_type=model_type))


@pytest.mark.parametrize("auto_map", [[], ["modeling_odd.OddModel"], "modeling_odd.OddModel", None])
def test_an_auto_map_that_is_no_map(auto_map, changed_copy):
    with pytest.raises(UnsupportedArchitectureError, match="is of type 'odd', which the installed"):
        sw.load(changed_copy(model_type="odd", auto_map=auto_map))


@pytest.mark.parametrize("option", ["residency", "nonfinite", "compute"])
def test_a_choice_that_is_not_there(option, save_family):
    with pytest.raises(UnknownNameError, match=f"There is no {option} 'odd'"):
        sw.load(save_family("llama"), **{option: "odd"})


def test_a_type_without_a_causal_language_model(changed_copy):
    with pytest.raises(
        UnsupportedArchitectureError, match="'vit', for which transformers has no causal language model"
    ):
        sw.load(changed_copy(model_type="vit", architectures=None))


def test_a_model_that_transformers_cannot_build(changed_copy):
    with pytest.raises(
        UnsupportedArchitectureError, match=r"transformers cannot build LlamaForCausalLM from config\.json: "
    ):
        sw.load(changed_copy(hidden_act="odd"))


def test_a_config_that_speaks_of_packed_weights_where_none_are(changed_copy):
    with pytest.raises(MalformedFileError, match=r"gptq.*none of its tensors is packed"):
        sw.load(changed_copy(quantization_config={"quant_method": "gptq", "bits": 4}))


AUTO_MAP = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddModel"}


@pytest.mark.parametrize("config", [{"model_type": "odd"}, {"model_type": "vit", "architectures": None}])
def test_remote_code_is_refused_and_not_run(config, changed_copy):
    code = "raise SystemExit('the code ran')"
    copy = changed_copy(files={"modeling_odd.py": code}, auto_map=AUTO_MAP, **config)
    with pytest.raises(RemoteCodeError) as caught:
        sw.load(copy)
    assert "modeling_odd.OddModel" in str(caught.value)
    assert "--trust-remote-code (trust_remote_code=True in Python)" in str(caught.value)


def test_remote_code_runs_when_it_is_trusted(changed_copy, save_family, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    copy = changed_copy(files={"modeling_odd.py": REMOTE_CODE}, auto_map=AUTO_MAP, model_type="odd")
    with sw.load(copy, trust_remote_code=True) as model, sw.load(save_family("llama")) as plain:
        assert type(model.model).__name__ == "OddModel"
        assert torch.equal(stream_of(model), stream_of(plain))


def test_code_that_is_not_needed_is_not_run(changed_copy):
    """A known type runs with transformers' own class, whatever code lies beside it."""
    copy = changed_copy(files={"modeling_odd.py": "raise SystemExit('the code ran')"}, auto_map=AUTO_MAP)
    with sw.load(copy) as model:
        assert stream_of(model).isfinite().all()


def failing(*_: Any) -> None:
    raise ValueError("on purpose")


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def is_bare(model: sw.LoadedModel) -> bool:
    return all(each.is_meta for layer in range(6) for each in model.layer(layer).parameters())


@pytest.mark.parametrize("residency", RESIDENCIES)
def test_a_forward_pass_that_fails_is_a_model_error(residency, save_family):
    with sw.load(save_family("llama"), residency=residency) as model:
        model.layer(2).mlp.register_forward_pre_hook(failing)
        with pytest.raises(ModelError, match="forward pass of LlamaModel failed with ValueError: on purpose") as caught:
            stream_of(model)
        assert isinstance(caught.value.__cause__, ValueError)
        assert str(save_family("llama")) in str(caught.value)


@pytest.mark.parametrize(("hook", "error"), [(failing, ModelError), (interrupted, KeyboardInterrupt)])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_pass_that_ends_half_way_leaves_nothing_attached(family, hook, error, save_family):
    with sw.load(save_family(family), residency="streamed") as model:
        before = stream_of(model)
        handle = model.layer(2).mlp.register_forward_pre_hook(hook)
        with pytest.raises(error):
            stream_of(model)
        assert is_bare(model)
        handle.remove()
        assert torch.equal(stream_of(model), before)


def test_an_interrupted_pass_keeps_no_edit(save_family):
    with sw.load(save_family("llama"), residency="streamed") as model:
        before = stream_of(model)
        handle = model.layer(1).mlp.register_forward_pre_hook(interrupted)
        with pytest.raises(KeyboardInterrupt), model.edited({Coordinate(1, None, 3, 5): 0.0}):
            stream_of(model)
        handle.remove()
        assert torch.equal(stream_of(model), before)


def test_a_load_that_fails_closes_its_files(changed_copy, monkeypatch):
    closed = []
    monkeypatch.setattr("superweights.checkpoint.Checkpoint.close", lambda checkpoint: closed.append(checkpoint))
    with pytest.raises(MissingTensorError):
        sw.load(changed_copy(num_hidden_layers=8))
    assert len(closed) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "mixtral", "llama4_text"])
def test_a_model_in_memory_is_given_back_as_it_was(family, dtype):
    model = lively_model(family, dtype=dtype)
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with sw.load(model, tokenizer=tiny_tokenizer()) as loaded:
        assert loaded.model is model
        assert (loaded.residency, loaded.checkpoint) == ("resident", None)
        before = stream_of(loaded)
        coordinate = Coordinate.parse({"llama": "1:3:5", "mixtral": "1/2:3:5", "llama4_text": "1/2:5:3"}[family])
        with loaded.edited({coordinate: 0.0}):
            assert not torch.equal(stream_of(loaded), before)
        assert torch.equal(stream_of(loaded), before)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(
        torch.equal(value, bits[name]) and value.dtype == bits[name].dtype for name, value in model.state_dict().items()
    )
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_in_memory_that_the_rules_do_not_fit():
    with pytest.raises(UnsupportedArchitectureError, match="MambaForCausalLM"):
        sw.load(tiny_model("mamba"))


def test_closing_twice_does_no_harm():
    with sw.load(lively_model("mixtral", dtype=torch.float32), tokenizer=tiny_tokenizer()) as loaded:
        loaded.close()


def test_a_training_model_is_traced_without_dropout_and_trains_on():
    model = tiny_model("gpt2")
    model.train()
    with sw.load(model, tokenizer=tiny_tokenizer()) as loaded:
        assert torch.equal(stream_of(loaded), stream_of(loaded))
    assert model.training


def test_an_edit_of_a_model_that_trains():
    """Parameters that require gradients can be edited in place and come back."""
    model = lively_model("llama", dtype=torch.float32)
    weight = model.model.layers[1].mlp.down_proj.weight
    with sw.load(model, tokenizer=tiny_tokenizer()) as loaded:
        with loaded.edited({Coordinate(1, None, 3, 5): 0.5}):
            assert weight[3, 5].item() == 20.0
        assert weight[3, 5].item() == 40.0


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("compute", ["auto", "float32"])
@pytest.mark.parametrize(("family", "hidden"), [("llama", 64), ("llama", 512), ("mixtral", 512)])
def test_bfloat16_products_are_said_where_they_are_made(family, hidden, compute, residency, tmp_path, monkeypatch):
    monkeypatch.setattr("superweights.model.streaming.multiplies_bfloat16", lambda: True)
    sizes = {"layers": 2, "hidden": hidden, "intermediate": 2 * hidden}
    directory = save_tiny_checkpoint(family, tmp_path / "model", dtype=torch.bfloat16, **sizes)
    made = compute == "auto" and hidden == 512
    with sw.load(directory, compute=compute, residency=residency) as model:
        assert model.compute_dtype == ("float32 with bfloat16 products" if made else "float32")
