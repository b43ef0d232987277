"""Conditions as rows of one batch: the same numbers as one run each, with the edit in the weights."""

import pytest
import torch

import superweights as sw
from superweights.coordinates import Coordinate
from superweights.errors import UsageError
from superweights.interventions.conditions import (
    ORIGINAL,
    Condition,
    EditSuperActivation,
    PruneLargest,
    RestoreSuperActivation,
    ScaleWeights,
    removal,
)
from superweights.interventions.rows import applied, condition_states
from superweights.testing import save_tiny_checkpoint

IDS = torch.tensor([[5, 9, 3, 17, 2, 8, 11], [1, 2, 3, 4, 5, 6, 7]])
DENSE, EXPERT = Coordinate(2, None, 3, 5), Coordinate(2, 1, 3, 5)
FAMILIES = [
    "llama", "mistral", "gemma2", "gemma3_text", "olmo2", "phi3", "phi", "cohere", "gpt2", "gpt_neox", "gptj", "opt", "falcon",
    "bloom", "mpt", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "llama4_text",
]  # fmt: skip


def weight_of(model: sw.LoadedModel) -> Coordinate:
    dense = any(each.experts is None for each in model.architecture.in_layer(2))
    return DENSE if dense else EXPERT


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_one_batch_equal_separate_runs(family, tmp_path):
    save_tiny_checkpoint(family, tmp_path)
    with sw.load(tmp_path) as model:
        weight = weight_of(model)
        later = Coordinate(weight.layer + 1, weight.expert, 4, 6)
        conditions = [
            ORIGINAL,
            Condition("strong", (ScaleWeights((weight,), -300.0), ScaleWeights((later,), 200.0))),
            Condition("back", (ScaleWeights((weight,), -300.0), RestoreSuperActivation((weight,)))),
            Condition("stream", (EditSuperActivation(2, 3, value=50.0),)),
        ]
        together = condition_states(model, IDS, conditions)
        for condition, states in zip(conditions, together, strict=True):
            with applied(model, condition):
                alone = model.states(IDS)
            # Products of other batch sizes, and a sum of two roundings in place of one, move the last bits.
            torch.testing.assert_close(states, alone, rtol=1e-4, atol=2e-4 * alone.abs().max().item())
        changes = (together[1:] - together[0]).abs().amax(dim=(1, 2, 3)) / together[0].abs().max()
        assert (changes[[0, 2]] > 1e-3).all(), f"edits that do not show prove nothing: {changes}"


@pytest.mark.parametrize("residency", ["resident", "streamed"])
def test_layers_before_the_first_edit_run_once(residency, planted_checkpoint):
    with sw.load(planted_checkpoint, residency=residency) as model:
        seen = []
        handles = [
            model.layer(each).register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
            for each in range(6)
        ]
        condition_states(model, IDS, [ORIGINAL, removal([Coordinate(3, None, 3, 5)], name="pruned")])
        for handle in handles:
            handle.remove()
        assert seen == [2, 2, 2, 2, 4, 4]  # hooks of the test run after the one that repeats, so layer 3 shows its rows


def test_the_super_activation_comes_back_at_one_token_of_each_sequence(planted_checkpoint):
    weight = Coordinate(2, None, 49, 7)
    with sw.load(planted_checkpoint) as model:
        outputs = []
        pruned = removal([weight], name="pruned")
        restored = Condition("restored", (*pruned.interventions, RestoreSuperActivation((weight,))))
        module = model.model.get_submodule("model.layers.2.mlp.down_proj")
        for condition in (ORIGINAL, pruned, restored):
            with applied(model, condition):
                handle = module.register_forward_hook(lambda _, __, output: outputs.append(output.clone()))
                model.states(IDS)
                handle.remove()
    original, without, back = outputs
    for sequence in range(2):
        token = original[sequence, :, 49].abs().argmax()
        expected = without[sequence].clone()
        expected[token, 49] = original[sequence, token, 49]
        torch.testing.assert_close(back[sequence], expected, rtol=0, atol=1e-6 * original.abs().max().item())
    assert not torch.equal(without, original)


def test_the_stream_is_edited_where_it_is_largest_and_padding_is_left_out(planted_checkpoint):
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    with sw.load(planted_checkpoint) as model:
        seen = []
        for condition in (ORIGINAL, Condition("removed", (EditSuperActivation(3, 49),))):
            with applied(model, condition):
                handle = model.layer(3).register_forward_hook(lambda _, __, output: seen.append(output.clone()))
                model.states(IDS, attention_mask=mask)
                handle.remove()
    original, removed = seen
    for sequence, length in ((0, 4), (1, 7)):
        expected = original[sequence].clone()
        expected[original[sequence, :length, 49].abs().argmax(), 49] = 0
        assert torch.equal(removed[sequence], expected)


def test_everything_comes_back(planted_checkpoint):
    condition = Condition(
        "all",
        (
            ScaleWeights((Coordinate(2, None, 49, 7),)),
            RestoreSuperActivation((Coordinate(2, None, 49, 7),)),
            PruneLargest(2, keep=(Coordinate(2, None, 49, 7),)),
            EditSuperActivation(3, 49, factor=0.5),
        ),
    )
    for residency in ("resident", "streamed"):
        with sw.load(planted_checkpoint, residency=residency) as model:
            before = model.states(IDS)
            with applied(model, condition):
                assert not torch.equal(model.states(IDS), before)
            assert torch.equal(model.states(IDS), before)


def test_what_cannot_be_done_is_said(planted_checkpoint):
    weight = Coordinate(2, None, 49, 7)
    with sw.load(planted_checkpoint) as model:
        for condition, message in (
            (Condition("x", (RestoreSuperActivation((weight,)),)), "no weight of it is edited"),
            (Condition("x", (EditSuperActivation(9, 0),)), "its layers are 0 to 5"),
            (Condition("x", (EditSuperActivation(2, 49, factor=1.0),)), "changes nothing"),
            (Condition("x", (ScaleWeights((weight,), 1.0),)), "changes nothing"),
            (Condition("x", (PruneLargest(2),)), "cannot run in rows"),
        ):
            with pytest.raises(UsageError, match=message):
                condition_states(model, IDS, [ORIGINAL, condition])
        assert torch.equal(model.states(IDS), model.states(IDS))


def test_a_restored_row_that_nothing_edits_is_refused(planted_checkpoint):
    other = Coordinate(2, None, 3, 7)
    steps = (ScaleWeights((Coordinate(2, None, 49, 7),)), RestoreSuperActivation((other,)))
    with sw.load(planted_checkpoint) as model, pytest.raises(UsageError, match=r"row 3 of .* changes nothing"):
        condition_states(model, torch.tensor([[1, 2, 3]]), [Condition("x", steps)])
