"""Quantizing is one edit: the same bits in a resident model, a streamed model, a rewritten checkpoint and a model in memory."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import superweights as sw
from superweights.coordinates import Coordinate
from superweights.errors import UsageError
from superweights.interventions.conditions import Condition, QuantizeWeights
from superweights.interventions.weights import weights_edited
from superweights.quantization.clipping import Clip
from superweights.quantization.held_out import rounded
from superweights.quantization.scheme import Scheme
from superweights.testing import save_tiny_checkpoint

FAMILIES = ["llama", "gpt2", "mixtral", "qwen3_moe", "gpt_oss", "gpt_neox", "phi3", "olmo2"]
IDS = torch.arange(4, 28)[None]
HOW = QuantizeWeights(Scheme.parse("int4-row"), clip=Clip("z", 3.0), largest=2)


def states(model) -> torch.Tensor:
    return model.logits(model.states(IDS))


@pytest.mark.parametrize("family", FAMILIES)
def test_wherever_the_weights_live(family: str, tmp_path: Path) -> None:
    place = save_tiny_checkpoint(family, tmp_path / "plain")
    condition = Condition("rounded", (HOW,))
    found = []
    for residency in ("resident", "streamed"):
        with sw.load(place, residency=residency) as model:
            before = states(model)
            with sw.applied(model, condition):
                found.append(states(model))
            assert torch.equal(states(model), before)
    sw.rewrite_checkpoint(place, tmp_path / "rounded", [HOW])
    with sw.load(tmp_path / "rounded") as model:
        found.append(states(model))
    assert not torch.equal(found[0], before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_in_memory(family: str, tmp_path: Path) -> None:
    place = save_tiny_checkpoint(family, tmp_path / "plain")
    sw.rewrite_checkpoint(place, tmp_path / "rounded", [HOW])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "rounded")
    mine = AutoModelForCausalLM.from_pretrained(place)
    kept = {name: each.clone() for name, each in mine.state_dict().items()}
    with sw.load(mine) as model:
        with weights_edited(model, [HOW]):
            assert all(torch.equal(each, theirs.state_dict()[name]) for name, each in mine.state_dict().items())
        assert all(torch.equal(each, kept[name]) for name, each in mine.state_dict().items())


def test_kept_weights_only_some_matrices_and_amplified(planted_checkpoint: Path, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    weight = Coordinate(2, None, 49, 7)
    how = QuantizeWeights(Scheme.parse("int4-g16"), keep=(weight,), only=(name,), amplify=2.0)
    sw.rewrite_checkpoint(planted_checkpoint, tmp_path / "q", [how])
    with sw.load(planted_checkpoint) as before, sw.load(tmp_path / "q") as after:
        original, edited = (each.model.get_parameter(name).data for each in (before, after))
        expected = rounded(original, how.scheme, kept=[49 * original.shape[1] + 7])
        expected[49, 7] *= 2
        assert torch.equal(edited, expected)
        others = [each for each, value in before.model.named_parameters() if each != name and not value.is_meta]
        assert all(torch.equal(before.model.get_parameter(each), after.model.get_parameter(each)) for each in others)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (QuantizeWeights(Scheme.parse("int4-g24")), "groups of 24 do not divide"),
        (QuantizeWeights(Scheme.parse("int4-row"), only=("model.norm.weight",)), "is no matrix"),
        (QuantizeWeights(Scheme.parse("int4-row"), factors={"model.norm": torch.ones(2)}), "have no matrix model.norm"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(planted_checkpoint: Path, how, says: str) -> None:
    with (
        sw.load(planted_checkpoint) as model,
        pytest.raises(UsageError, match=says),
        weights_edited(model, [how]),
    ):
        pass


def test_rows_of_a_batch_refuse_it(planted_checkpoint: Path) -> None:
    from superweights.interventions.rows import condition_states

    with sw.load(planted_checkpoint) as model, pytest.raises(UsageError, match="use `applied`"):
        condition_states(model, IDS, [Condition("original"), Condition("rounded", (HOW,))])
