"""Every bad input is one line on stderr that says what, where and what to do next; never a traceback, never a guess."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from superweights.results.records import CandidateRecord
from superweights.results.store import read_records
from superweights.testing import save_tiny_checkpoint, tiny_tokenizer

from .conftest import Answer, Ask

DOWN = "model.layers.2.mlp.down_proj.weight"


def refused(answer: Answer, status: int, *says: str) -> None:
    """Fails unless the answer is one line that says all this."""
    assert (answer.status, answer.out) == (status, "")
    assert answer.err.startswith("superweights: error: ")
    assert answer.err.count("\n") == 1
    for words in says:
        assert words in answer.err


@pytest.fixture
def copy(planted_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the planted checkpoint to be broken."""
    return shutil.copytree(planted_checkpoint, tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of several shards."""
    return save_tiny_checkpoint("llama", tmp_path / "sharded", shards=True)


def change_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensor(model: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[name] = change(tensors[name].clone()).contiguous()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("verb", ["find", "trace"])
def test_no_such_path(verb: str, ask: Ask, tmp_path: Path) -> None:
    refused(ask(verb, tmp_path / "nowhere"), 3, "There is no such path", "nowhere", "Give a directory with config.json")


def test_a_folder_that_is_no_model(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("")
    refused(ask("find", tmp_path), 3, str(tmp_path), "it has no config.json", "Found: notes.md")


def test_a_file_that_is_no_model(ask: Ask, copy: Path) -> None:
    refused(ask("find", copy / "config.json"), 3, "is a file, not a model", "Give the directory")


def test_a_pickle_is_never_loaded(ask: Ask, copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"weight": Trap()}, copy / "pytorch_model.bin")
    refused(ask("find", copy), 3, "only as pickles (pytorch_model.bin)", "never loaded", "save_pretrained")
    assert not (tmp_path / "sprung").exists()


def test_no_weights(ask: Ask, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    refused(ask("find", copy), 3, "holds no .safetensors weights")


def test_a_truncated_shard(ask: Ask, sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    refused(ask("find", sharded), 3, f"{shard.name} is truncated", "Download it again")


def test_a_header_longer_than_the_file(ask: Ask, copy: Path) -> None:
    (copy / "model.safetensors").write_bytes((10_000).to_bytes(8, "little") + b"{}")
    refused(ask("find", copy), 3, "model.safetensors claims a header of 10000 bytes but has only 10 bytes", "download")


def test_an_index_that_names_a_missing_shard(ask: Ask, sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[-1]
    shard.unlink()
    refused(ask("find", sharded), 3, f"names {shard.name}, which is not there", "Download the missing files")


def test_an_index_that_names_a_missing_tensor(ask: Ask, sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.9.up"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    refused(ask("find", sharded), 3, "'model.layers.9.up'", "download them again")


@pytest.mark.parametrize("residency", ["streamed", "resident"])
def test_a_matrix_of_another_shape(residency: str, ask: Ask, copy: Path) -> None:
    change_tensor(copy, DOWN, lambda weight: weight[:, :100])
    answer = ask("find", copy, "--residency", residency)
    refused(answer, 3, str(copy), DOWN, "[64, 100]", "[64, 112]", "Do config.json and the weights belong together?")


def test_an_embedding_of_another_shape(ask: Ask, copy: Path) -> None:
    change_config(copy, vocab_size=256)
    refused(ask("find", copy), 3, "model.embed_tokens.weight", "[128, 64]", "[256, 64]", "belong together?")


def test_a_config_of_a_deeper_model(ask: Ask, copy: Path) -> None:
    change_config(copy, num_hidden_layers=8)
    refused(ask("find", copy), 3, str(copy), "decoder layers 6, 7", "Do config.json and the weights belong together?")


@pytest.mark.parametrize("verb", ["find", "trace"])
def test_a_config_of_a_shallower_model_is_said(verb: str, ask: Ask, copy: Path, tmp_path: Path) -> None:
    change_config(copy, num_hidden_layers=5, layer_types=None)
    answer = ask(verb, copy, "--out", tmp_path / "run.jsonl")
    warning = "config.json describes 5 decoder layers and the files hold 6: those from 5 on were left out."
    assert answer.status == 0
    assert warning in answer.err
    assert read_records(tmp_path / "run.jsonl")[0].warnings[0].startswith(warning)


@pytest.mark.parametrize(
    ("option", "says"),
    [("--rounds=0", "rounds is 0; it must be 1 or more"), ("--hold=-1", "hold is -1; it must be from 0")],
)
def test_a_threshold_out_of_its_range(option: str, says: str, ask: Ask, planted_checkpoint: Path) -> None:
    refused(ask("find", planted_checkpoint, option), 2, says)


@pytest.mark.parametrize("residency", ["streamed", "resident"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damaged_weights_are_named_and_counted(bad: float, residency: str, ask: Ask, copy: Path) -> None:
    def damage(weight: torch.Tensor) -> torch.Tensor:
        weight[5, 10:13] = bad
        return weight

    change_tensor(copy, DOWN, damage)
    answer = ask("find", copy, "--residency", residency)
    refused(answer, 3, str(copy), f"{DOWN} (3)", "NaN or infinite", "--nonfinite zero")


def test_zero_goes_on_and_the_run_says_so(ask: Ask, copy: Path, tmp_path: Path) -> None:
    def damage(weight: torch.Tensor) -> torch.Tensor:
        weight[5, 10:13] = float("nan")
        return weight

    change_tensor(copy, DOWN, damage)
    answer = ask("find", copy, "--nonfinite", "zero", "--out", tmp_path / "run.jsonl")
    warning = f"3 NaN or infinite weights of {DOWN} set to 0"
    assert (answer.status, answer.err) == (0, f"superweights: WARNING: {warning}\n")
    run, records = read_records(tmp_path / "run.jsonl")
    assert (run.warnings, run.settings["nonfinite"]) == ((warning,), "zero")
    assert [each.coordinate for each in records if isinstance(each, CandidateRecord)] == ["2:49:7"]


def test_a_damaged_embedding_row_of_a_prompt(ask: Ask, copy: Path) -> None:
    row = tiny_tokenizer()("n", add_special_tokens=False)["input_ids"][0]

    def damage(weight: torch.Tensor) -> torch.Tensor:
        weight[row, 3] = float("nan")
        return weight

    change_tensor(copy, "model.embed_tokens.weight", damage)
    refused(ask("find", copy), 3, "model.embed_tokens.weight has 1 NaN or infinite weights", "--nonfinite zero")
    answer = ask("find", copy, "--nonfinite", "zero")
    assert (answer.status, answer.err.count("\n")) == (0, 1)
    assert "1 NaN or infinite weight of model.embed_tokens.weight set to 0" in answer.err


@pytest.mark.parametrize("verb", ["find", "trace"])
def test_a_config_that_speaks_of_packed_weights_where_none_are(verb: str, ask: Ask, copy: Path) -> None:
    change_config(copy, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    refused(ask(verb, copy), 3, str(copy), "quantized (gptq, 4 bits)", "none of its tensors is packed")


@pytest.mark.parametrize(
    ("coordinate", "says"),
    [
        ("2:64:7", "rows are 0 to 63, cols are 0 to 111"),
        ("2:0:112", "rows are 0 to 63, cols are 0 to 111"),
        ("6:0:0", "the layers are 0 to 5"),
        ("2/0:0:0", "expert"),
        ("2.0.0", "is no coordinate"),
    ],
)
def test_a_coordinate_out_of_range(coordinate: str, says: str, ask: Ask, planted_checkpoint: Path) -> None:
    refused(ask("trace", planted_checkpoint, "--edit", "scale=0", "--weights", coordinate), 2, coordinate, says)
    refused(ask("show", planted_checkpoint, coordinate), 2, says)


MODELING = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def remote_code(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The planted checkpoint under a type of its own, with the code for it."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # transformers adds the folder below to it
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (copy / "modeling_own.py").write_text(MODELING)
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    change_config(copy, model_type="own_llama", architectures=["OwnForCausalLM"], auto_map=auto_map)
    return copy


def test_remote_code_is_refused(ask: Ask, remote_code: Path) -> None:
    trap = remote_code.parent / "sprung"
    (remote_code / "modeling_own.py").write_text(f"open({str(trap)!r}, 'w')" + MODELING)
    answer = ask("find", remote_code)
    refused(answer, 3, str(remote_code), "modeling_own.OwnForCausalLM", "read that code", "--trust-remote-code")
    assert not trap.exists()


def test_remote_code_of_a_tokenizer_is_refused_by_name(ask: Ask, remote_code: Path) -> None:
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (remote_code / "tokenizer_config.json").write_text(json.dumps(own))
    (remote_code / "tokenization_own.py").write_text("raise AssertionError('this ran')")
    refused(ask("find", remote_code), 3, "Python code of its own", "--trust-remote-code")
    change_config(remote_code, model_type="llama", auto_map={})
    refused(ask("find", remote_code), 3, "tokenizer", "--trust-remote-code")


def test_remote_code_runs_where_it_is_trusted(ask: Ask, remote_code: Path) -> None:
    answer = ask("find", remote_code, "--trust-remote-code", "--format", "jsonl")
    assert (answer.status, answer.err) == (0, "")
    assert json.loads(answer.out)["coordinate"] == "2:49:7"


def test_a_tokenizer_of_another_model(ask: Ask, copy: Path) -> None:
    # é is two bytes, whose tokens come after the 128 that the model has.
    tiny_tokenizer(260).save_pretrained(copy)
    assert ask("find", copy).status == 0
    refused(
        ask("find", copy, "--prompt", "é"), 2, "the model has ids 0 to 127", "The tokenizer belongs to another model"
    )


def test_a_broken_tokenizer(ask: Ask, copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    refused(ask("find", copy), 3, "tokenizer", str(copy))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "config.json is not JSON in UTF-8"),
        ("[]", "config.json holds a JSON list where an object is expected"),
        ("{}", "type None"),
        ('{"model_type": "no_such_type"}', "type 'no_such_type', which the installed transformers does not know"),
        ('{"model_type": "llama", "hidden_size": "many"}', "hidden_size"),
        ('{"model_type": "llama", "num_attention_heads": 7}', "attention heads (7)"),
        ('{"model_type": "clip"}', "type 'clip', for which transformers has no causal language model"),
    ],
)
def test_a_broken_config(content: str, says: str, ask: Ask, copy: Path) -> None:
    (copy / "config.json").write_text(content)
    answer = ask("find", copy)
    refused(answer, 3, str(copy), says)
    assert "tokenizer" not in answer.err


def test_an_unsupported_family_says_what_was_seen(ask: Ask, tmp_path: Path) -> None:
    model = save_tiny_checkpoint("mamba", tmp_path / "mamba")
    refused(ask("find", model), 3, "Mamba", "down projection")


def test_verbose_gives_the_traceback_too(ask: Ask, tmp_path: Path) -> None:
    answer = ask("find", tmp_path / "nowhere", "-v")
    assert answer.status == 3
    assert answer.err.startswith("Traceback (most recent call last)")
    assert answer.err.splitlines()[-1].startswith("superweights: error: There is no such path")
