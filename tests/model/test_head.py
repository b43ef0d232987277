"""From the decoder's last states to logits: the model's own head, for every way of storing and tying it."""

import pytest
import torch
from required_families import EXPECTED
from transformers import AutoModelForCausalLM

import superweights as sw
from superweights.errors import ModelError

IDS = torch.tensor([[5, 9, 3, 17, 2, 8], [1, 2, 3, 4, 5, 6]])
ODD_HEADS = ["bert", "roberta", "modernbert-decoder", "rwkv", "xlnet"]


@pytest.mark.parametrize("family", [*EXPECTED, *ODD_HEADS])
def test_logits_are_those_of_transformers(family, save_family):
    theirs = AutoModelForCausalLM.from_pretrained(save_family(family), dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(input_ids=IDS, use_cache=False).logits
    found = {}
    for residency in ("resident", "streamed"):
        with sw.load(save_family(family), residency=residency) as model:
            states = model.states(IDS)
            found[residency] = torch.cat([model.logits(states[:, :2]), model.logits(states[:, 2:])], dim=1)
    assert torch.equal(found["resident"], found["streamed"])
    # Tiles of widened 16-bit weights move the last bits of float32.
    torch.testing.assert_close(found["resident"], expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    with sw.load(theirs) as model:
        torch.testing.assert_close(model.logits(model.states(IDS)), expected, rtol=0, atol=1e-6)


def test_padding_on_the_left_changes_nothing(save_family):
    with sw.load(save_family("llama")) as model:
        alone = model.logits(model.states(IDS[:1, 2:]))
        mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
        padded = model.logits(model.states(IDS[:1], attention_mask=mask))[:, 2:]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-5)


def test_a_pass_up_to_a_layer_still_stops_there(save_family):
    with sw.load(save_family("llama")) as model:
        model.states(IDS)
        assert model.run(IDS, last_layer=1) is None


def test_out_of_memory_says_what_to_lower(save_family, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")

    with sw.load(save_family("llama")) as model:
        monkeypatch.setattr(model.decoder, "forward", full)
        with pytest.raises(ModelError, match=r"2 rows of 6 tokens: out of memory. Use shorter windows \(--length\)"):
            model.states(IDS)
