import json
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from superweights.errors import UnknownNameError, UnsupportedArchitectureError, UsageError
from superweights.testing import (
    PROMISED_FAMILIES,
    causal_lm_families,
    save_tiny_checkpoint,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)

# One of each way to hold weights: plain, transposed, tied, dense beside experts, packed experts, hybrid, latent attention.
KINDS = ["llama", "gpt2", "gemma3_text", "deepseek_v3", "gpt_oss", "llama4_text", "jamba", "minicpm3", "emu3", "bloom"]
REFUSED = ["gemma4_assistant", "gemma4_unified_assistant", "musicgen", "musicgen_melody"]
TEXT = "Hello, World.\n  two  spaces\ta_b's 12"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 13)[None]).logits  # [1, tokens, vocab]


@pytest.mark.parametrize("family", PROMISED_FAMILIES)
def test_required_family_runs_on_tokens(family):
    model = tiny_model(family)
    found = logits(model)
    assert found.shape == (1, 12, 128)
    assert found.isfinite().all()
    assert found.std() > 1e-3
    assert model.config.num_hidden_layers == 6
    assert model.config.hidden_size == 64
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000


@pytest.mark.parametrize("family", KINDS)
def test_no_matrix_is_zero_or_not_finite(family):
    for name, parameter in tiny_model(family).named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.dim() < 2 or parameter.any(), name


@pytest.mark.parametrize("family", KINDS)
def test_same_seed_same_weights_whatever_was_in_memory(family):
    first = tiny_model(family, seed=3).state_dict()
    torch.full((1_000_000,), 7.0)  # what torch.empty may hand out next
    second = tiny_model(family, seed=3).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = tiny_model(family, seed=4).state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_building_leaves_the_callers_torch_as_it_was():
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    tiny_model("llama", layers=1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("family", KINDS)
def test_reloaded_checkpoint_gives_the_same_logits(family, tmp_path):
    save_tiny_checkpoint(family, tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(reloaded), logits(tiny_model(family)))


def test_shards_have_an_index(tmp_path):
    save_tiny_checkpoint("llama", tmp_path, shards=True, dtype=torch.bfloat16)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 1
    assert shards == {path.name for path in tmp_path.glob("*.safetensors")}
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.dtype == torch.bfloat16
    assert torch.equal(logits(reloaded), logits(tiny_model("llama", dtype=torch.bfloat16)))


def test_one_file_by_default(tmp_path):
    assert save_tiny_checkpoint("llama", tmp_path / "new") == tmp_path / "new"
    assert [path.name for path in (tmp_path / "new").glob("*.safetensors*")] == ["model.safetensors"]


def test_dense_layer_comes_before_expert_layers():
    layers = tiny_model("deepseek_v3").model.layers
    assert [hasattr(layer.mlp, "experts") for layer in layers] == [False] + [True] * 5


def test_down_projection_shapes_cannot_be_confused():
    named = dict(tiny_model("qwen2_moe").named_parameters())
    assert named["model.layers.0.mlp.experts.down_proj"].shape == (4, 64, 48)
    assert named["model.layers.0.mlp.shared_expert.down_proj.weight"].shape == (64, 80)
    assert dict(tiny_model("llama").named_parameters())["model.layers.0.mlp.down_proj.weight"].shape == (64, 112)


def test_composite_family_gives_its_language_part():
    assert tiny_config("gemma3").model_type == "gemma3_text"


def test_sizes_and_fields_can_be_chosen():
    config = tiny_config(
        "mixtral", layers=2, hidden=128, intermediate=208, vocab=300, num_local_experts=8, attention_dropout=0.5
    )
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size) == (
        2,
        128,
        208,
        300,
    )
    assert (config.num_local_experts, config.attention_dropout) == (8, 0.5)


@pytest.mark.parametrize("family", causal_lm_families())
def test_every_family_runs_on_tokens_or_is_refused(family):
    if family in REFUSED:
        with pytest.raises(UnsupportedArchitectureError, match=f"Cannot build a tiny {family}: it "):
            tiny_config(family)
        return
    model = tiny_model(family)
    assert logits(model).isfinite().all()
    config = model.config
    assert config.vocab_size == 128
    for name, token in {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.items():
        assert getattr(config, name, None) in (token, None)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_5_text", "gpt2", "bert"])
def test_tokenizer_round_trip(family, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    tiny_config(family).save_pretrained(tmp_path)  # AutoTokenizer looks at the family
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(TEXT)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 1
    assert len(ids) == 1 + len(TEXT)
    assert max(ids) < 128
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == ids[1:]


def test_tokenizer_takes_any_text():
    assert max(tiny_tokenizer()("déjà vu 日本 \x00")["input_ids"]) < 128
    whole = tiny_tokenizer(260)
    assert whole.decode(whole("déjà vu 日本 \x00")["input_ids"], skip_special_tokens=True) == "déjà vu 日本 \x00"


def test_tokenizer_too_small_for_ascii_is_refused():
    with pytest.raises(UsageError, match="at least 101, not 64"):
        tiny_tokenizer(64)


def test_unknown_family_names_the_near_ones():
    with pytest.raises(UnknownNameError, match=r"no causal language model family 'lama'.*'llama'"):
        tiny_config("lama")
