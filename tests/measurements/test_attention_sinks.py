import pytest
import torch

import superweights as sw
from superweights.coordinates import Coordinate
from superweights.errors import UnsupportedArchitectureError
from superweights.interventions.conditions import removal
from superweights.interventions.rows import applied
from superweights.measurements.attention_sinks import attention_to_first
from superweights.testing import save_tiny_checkpoint, tiny_model

IDS = torch.tensor([[5, 9, 3, 17, 2, 8, 11, 21, 22, 23, 24, 25], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]])
FAMILIES = [
    "llama",
    "gpt2",
    "mistral",
    "gemma2",
    "qwen3",
    "falcon",
    "bloom",
    "mpt",
    "gpt_oss",
    "deepseek_v3",
    "roformer",
]


def slow(model, ids):
    """The same from the attention weights that transformers gives."""
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        attentions = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    half = ids.shape[1] // 2
    rows = [
        [mean_of(weights[row, head, query, 0] for head in range(weights.shape[1]) for query in range(half, ids.shape[1]))
         for row in range(len(ids))]
        for weights in attentions
    ]  # fmt: skip
    return torch.tensor(rows, dtype=torch.float64)


def mean_of(values):
    known = [each.item() for each in values]
    return sum(known) / len(known)


@pytest.mark.parametrize("residency", ["resident", "streamed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_numbers_of_transformers(family, residency, tmp_path):
    save_tiny_checkpoint(family, tmp_path)
    with sw.load(tmp_path, residency=residency) as model:
        found = attention_to_first(model, IDS)
    torch.testing.assert_close(found, slow(tiny_model(family), IDS), rtol=1e-5, atol=1e-7)
    assert found.shape == (6, 2)


def test_a_sliding_window_that_ends_too_early_gives_nothing():
    with sw.load(tiny_model("mistral", sliding_window=4)) as model:
        assert attention_to_first(model, IDS).eq(0).all()
    with sw.load(tiny_model("mistral", sliding_window=12)) as model:
        assert attention_to_first(model, IDS).gt(0).all()


def test_an_odd_length_and_a_single_token():
    with sw.load(tiny_model("llama")) as model:
        torch.testing.assert_close(attention_to_first(model, IDS[:, :7]), slow(tiny_model("llama"), IDS[:, :7]))
        assert attention_to_first(model, IDS[:, :1]).eq(1).all()


@pytest.mark.parametrize("family", ["llama", "falcon", "mpt", "gemma3"])
def test_everything_comes_back(family):
    model = tiny_model(family)
    before = [(each, each._attn_implementation) for each in {id(c): c for c in configs(model)}.values()]
    with sw.load(model) as loaded:
        states = loaded.states(IDS)
        attention_to_first(loaded, IDS)
        assert torch.equal(loaded.states(IDS), states)
    assert all(each._attn_implementation == implementation for each, implementation in before)


def configs(model):
    return [each.config for each in model.modules() if hasattr(each, "config")]


def test_edits_count(planted_checkpoint):
    with sw.load(planted_checkpoint) as model:
        before = attention_to_first(model, IDS)
        with applied(model, removal([Coordinate(2, None, 49, 7)], name="removed")):
            after = attention_to_first(model, IDS)
    assert torch.equal(before[:3], after[:3])
    assert not torch.equal(before[3:], after[3:])


def test_layers_without_attention_are_nan():
    with sw.load(tiny_model("recurrent_gemma")) as model:
        found = attention_to_first(model, IDS)
    assert found.isnan().all(dim=1).tolist() == [True, True, False, True, True, False]


def test_a_model_without_attention_is_refused():
    with (
        sw.load(tiny_model("rwkv")) as model,
        pytest.raises(UnsupportedArchitectureError, match=r"no module in the decoder layers of RwkvForCausalLM gives"),
    ):
        attention_to_first(model, IDS)


def test_keys_and_values_are_no_attention_weights(planted_checkpoint):
    """Where heads are as wide as the text is long, they have the shape of attention weights."""
    with sw.load(planted_checkpoint) as model:
        expected = attention_to_first(model, IDS)
        strange = torch.randn(2, 4, 12, 12)
        for layer in range(6):
            model.layer(layer).mlp.register_forward_hook(lambda _, __, output: (output, strange))
            model.layer(layer).register_forward_hook(lambda _, __, output: output)
            model.layer(layer).mlp.register_forward_hook(lambda _, __, output: output[0])
        assert torch.equal(attention_to_first(model, IDS), expected)
