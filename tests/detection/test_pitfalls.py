"""What misleads a search for super weights, planted one by one: each is found for what it is, or not found at all."""

from pathlib import Path

import pytest
import torch
from building import (
    TOKENIZER,
    at,
    coordinates,
    fire,
    mlp_inputs,
    prompts_of,
    quiet_llama,
    search,
    set_neuron,
    set_weights,
)
from transformers import PreTrainedModel

from superweights.checkpoint.dtypes import FLOAT16_MAX
from superweights.detection.candidates import Bars, DetectionSettings, find_candidates, group_sets
from superweights.detection.search import Findings, find
from superweights.model.loading import load
from superweights.testing import plant_super_weight, save_planted_checkpoint, tiny_model, tiny_tokenizer


def llama_with(
    where: str = ".", *, size: float = 100.0, weights: dict[str, float] | None = None, layers: int = 6
) -> PreTrainedModel:
    """Neuron 7 of layer 1 fires at the tokens `where`; its weight to channel 20 makes 300 of it."""
    model = quiet_llama(layers=layers)
    fire(model, at(where), layer=1, col=7, size=size)
    set_weights(model, weights or {"1:20:7": 3.0})
    return model


def amplify_attention(model: PreTrainedModel, *, layer: int, channel: int, factor: float) -> None:
    """Makes the attention of a layer write large values into a channel, at every token."""
    with torch.no_grad():
        model.model.layers[layer].self_attn.o_proj.weight[channel] *= factor


def largest(findings: Findings, *, bos: bool) -> float:
    trace = findings.traces[0]
    mine = [place for place, (prompt, _) in enumerate(trace.positions) if trace.prompts[prompt].bos == bos]
    return trace.stream[:, mine].abs().max().item()


# Which token it is on.


def test_one_that_shows_only_behind_the_beginning_token() -> None:
    found = search(llama_with("<s>"))
    assert coordinates(found) == ["1:20:7"]
    assert found.traces[0].prompts[found.candidates[0].prompt].bos
    assert largest(found, bos=False) < 10 < 200 < largest(found, bos=True)


def test_one_that_shows_only_without_the_beginning_token() -> None:
    model = quiet_llama()
    fire(model, lambda prompt, token: token == 0 and not prompt.bos, layer=1, col=7, size=100, detail=1e-4)
    set_weights(model, {"1:20:7": 3.0})
    found = search(model)
    assert coordinates(found) == ["1:20:7"]
    assert not found.traces[0].prompts[found.candidates[0].prompt].bos
    assert largest(found, bos=True) < 30 < 200 < largest(found, bos=False)


@pytest.mark.parametrize("text", [".", "\n"])
def test_one_on_a_token_that_is_not_the_first(text: str) -> None:
    found = search(llama_with(text))
    assert coordinates(found) == ["1:20:7"]
    (candidate,) = found.candidates
    assert candidate.token > 0
    assert found.traces[0].prompts[candidate.prompt].token_texts[candidate.token] == text


def test_one_that_needs_the_users_prompt() -> None:
    model = quiet_llama()
    fire(model, at("~"), layer=1, col=7, size=100, texts=("a ~ b",))
    set_weights(model, {"1:20:7": 3.0})
    assert coordinates(search(model)) == []
    found = search(model, "x ~ y")
    assert coordinates(found) == ["1:20:7"]
    assert found.traces[0].prompts[found.candidates[0].prompt].text == "x ~ y"


def test_input_and_output_that_peak_at_different_tokens() -> None:
    model = quiet_llama()
    fire(model, at("W"), layer=1, col=7, size=60)
    fire(model, at("."), layer=1, col=9, size=120)  # the larger input, which reaches no channel
    set_weights(model, {"1:20:7": 5.0, "1:20:9": 1e-4})
    assert coordinates(search(model)) == ["1:20:7"]
    by_peaks = search(model, method="paper")
    assert coordinates(by_peaks) == ["1:20:9"]
    assert abs(by_peaks.candidates[0].share) < 0.01


# Large, and no super weight.


def test_the_largest_weight_of_its_matrix_that_no_input_reaches() -> None:
    model = quiet_llama()
    fire(model, at("~"), layer=1, col=7, size=1e-4, texts=("a ~ b",))
    set_weights(model, {"1:20:7": 50.0})
    assert model.model.layers[1].mlp.down_proj.weight.abs().max() == 50
    assert coordinates(search(model)) == []


@pytest.mark.parametrize("layer", [4, 5])
def test_a_remover_in_the_last_layers(layer: int) -> None:
    model = llama_with()
    fire(model, at("."), layer=layer, col=11, size=100)
    set_weights(model, {f"{layer}:20:11": -3.0})
    found = search(model)
    dot = next(
        i for i, (p, t) in enumerate(found.traces[0].positions) if found.traces[0].prompts[p].token_texts[t] == "."
    )
    assert abs(found.traces[0].stream[layer, dot, 20]) > 250
    assert abs(found.traces[0].stream[layer + 1, dot, 20]) < 50  # it does remove
    assert coordinates(found) == ["1:20:7"]


@pytest.mark.parametrize("layer", [10, 9, 8])
def test_a_remover_stays_none_once_what_it_removes_is_gone(layer: int) -> None:
    model = llama_with(layers=12)
    fire(model, at("."), layer=layer, col=11, size=100)
    set_weights(model, {f"{layer}:20:11": -3.0})
    assert coordinates(search(model)) == ["1:20:7"]


@pytest.mark.parametrize("layer", [4, 5])
def test_a_spike_in_the_last_layers_only(layer: int) -> None:
    model = quiet_llama()
    fire(model, at("."), layer=layer, col=11, size=100)
    set_weights(model, {f"{layer}:20:11": 3.0})
    found = search(model)
    assert coordinates(found) == []
    assert "run more layers" not in found.reason  # all of them ran


def test_a_super_activation_that_many_neurons_make() -> None:
    model = quiet_llama()
    for col in range(4):
        fire(model, at("."), layer=1, col=col, size=100)
    set_weights(model, {f"1:20:{col}": 1.0 for col in range(4)})
    found = search(model)
    assert coordinates(found) == []
    assert "no scalar is decisive" in found.reason and "0.25" in found.reason


def test_a_jump_that_attention_makes() -> None:
    model = quiet_llama()
    amplify_attention(model, layer=1, channel=20, factor=3000)
    found = search(model)
    assert coordinates(found) == []
    assert "from attention" in found.reason


def test_a_jump_that_attention_makes_where_a_neuron_adds_next_to_nothing() -> None:
    model = quiet_llama()
    amplify_attention(model, layer=1, channel=20, factor=3000)
    fire(model, at("."), layer=1, col=7, size=10, detail=1e-3)
    set_weights(model, {"1:20:7": 0.5})
    assert coordinates(search(model)) == []


def test_attention_that_fills_a_channel_at_every_token_hides_nothing() -> None:
    model = quiet_llama()
    amplify_attention(model, layer=1, channel=20, factor=30000)
    fire(model, at("."), layer=1, col=7, size=100, detail=1e-4)
    set_weights(model, {"1:30:7": 3.0})
    found = search(model)
    assert found.traces[0].stream[2, :, 30].abs().max() > 200
    assert coordinates(found) == ["1:30:7"]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_channel_massive_at_every_token_from_the_embedding_on(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 20] = 50 * model.model.embed_tokens.weight.abs().max()
    found = search(model)
    stage_0 = found.traces[0].stream[0]
    assert (stage_0[:, 20].abs() > 50 * stage_0.abs().median()).all()
    assert coordinates(found) == []
    assert "comes with the embedding" in found.reason


def test_nothing_planted() -> None:
    found = search(quiet_llama())
    assert coordinates(found) == []
    assert found.reason.startswith("No super activation") and "the bar is 50 medians" in found.reason
    assert len(found.traces) == 1


def test_a_spike_in_the_last_layer_that_ran() -> None:
    model = llama_with()
    found = search(model, last_layer=1)
    assert coordinates(found) == []
    assert "run more layers" in found.reason
    assert coordinates(search(model, last_layer=2)) == ["1:20:7"]


# Sets.


def test_one_column_and_three_rows_are_one_set() -> None:
    found = search(llama_with(weights={"1:20:7": 3.0, "1:30:7": -4.0, "1:40:7": 2.0}))
    (group,) = group_sets(found.candidates)
    assert [str(each.coordinate) for each in group] == ["1:30:7", "1:20:7", "1:40:7"]  # strongest first
    assert {each.round for each in group} == {0}


def test_one_row_and_two_columns_are_one_set() -> None:
    model = llama_with()
    fire(model, at("."), layer=1, col=8, size=-50)
    set_weights(model, {"1:20:7": 3.0, "1:20:8": -4.0})
    found = search(model)
    (group,) = group_sets(found.candidates)
    assert [str(each.coordinate) for each in group] == ["1:20:7", "1:20:8"]
    assert [each.share for each in group] == pytest.approx([0.6, 0.4], abs=0.02)


# Rounds.


def llama_with_a_second() -> PreTrainedModel:
    """`llama_with()`, and 2:20:8, whose neuron fires only while 1:20:7 is removed."""
    model = llama_with()
    prompts = prompts_of(model)
    intact = mlp_inputs(model, 2, prompts)
    set_weights(model, {"1:20:7": 0.0})
    removed = mlp_inputs(model, 2, prompts)
    set_weights(model, {"1:20:7": 3.0})
    dots = torch.tensor([each == "." for prompt in prompts for each in prompt.token_texts])
    chosen = torch.cat([torch.zeros_like(dots), dots])
    set_neuron(model, torch.cat([intact, removed]), chosen, layer=2, col=8, size=100)
    set_weights(model, {"2:20:8": 2.0})
    return model


def test_a_second_one_that_shows_once_the_first_is_removed() -> None:
    found = search(llama_with_a_second())
    assert [(str(each.coordinate), each.round) for each in found.candidates] == [("1:20:7", 0), ("2:20:8", 1)]
    assert len(found.traces) == 3
    assert found.reason.startswith("With these removed: no super activation")


def test_the_search_ends_at_its_last_round_and_says_so() -> None:
    found = search(llama_with_a_second(), settings=DetectionSettings(rounds=1))
    assert coordinates(found) == ["1:20:7"]
    assert len(found.traces) == 2
    assert "round" in found.reason and "no scalar is decisive" not in found.reason


def test_the_bars_of_round_0_hold_for_all_rounds() -> None:
    model = llama_with(size=1000.0)
    fire(model, at("S"), layer=2, col=9, size=20)
    set_weights(model, {"2:30:9": 3.0})  # 60: beyond 50 medians, and 2 % of the first
    found = search(model)
    assert coordinates(found) == ["1:20:7"]
    settings = DetectionSettings()
    lowered = find_candidates(found.traces[1], Bars.of(found.traces[1], settings), settings)
    assert [str(each.coordinate) for each in lowered] == ["2:30:9"]  # what bars of round 1 would let in


# Signs, storage, experts, size.


@pytest.mark.parametrize(("size", "weight"), [(-100.0, 3.0), (100.0, -3.0), (-100.0, -3.0)])
def test_negative_inputs_and_outputs(size: float, weight: float) -> None:
    (candidate,) = search(llama_with(size=size, weights={"1:20:7": weight})).candidates
    assert str(candidate.coordinate) == "1:20:7"
    assert candidate.input == pytest.approx(size, rel=0.05)
    assert candidate.output == pytest.approx(size * weight, rel=0.05)
    assert candidate.super_activation == pytest.approx(size * weight, rel=0.05)
    assert candidate.share == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("family", "weight", "transposed"),
    [
        ("gpt2", "transformer.h.1.mlp.c_proj.weight", True),
        ("phi3", "model.layers.1.mlp.down_proj.weight", False),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj", True),
        ("mixtral", "model.layers.1.mlp.experts.down_proj", False),
    ],
)
def test_the_coordinate_is_row_then_col_whatever_the_storage(family: str, weight: str, transposed: bool) -> None:
    model = tiny_model(family, intermediate=96)
    planted = plant_super_weight(model, layer=1, tokenizer=TOKENIZER)
    with load(model, tokenizer=TOKENIZER) as loaded:
        found = find(loaded)
    (candidate,) = found.candidates
    assert candidate.coordinate == planted
    matrix = model.get_parameter(weight).detach()
    matrix = matrix if planted.expert is None else matrix[planted.expert]
    place = (planted.col, planted.row) if transposed else (planted.row, planted.col)
    assert matrix[place] == candidate.value == matrix.flatten()[matrix.abs().argmax()]
    assert (candidate.rank, candidate.matrix_size) == (1, matrix.numel())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_the_routing_weight_of_an_expert_counts(family: str) -> None:
    model = tiny_model(family)
    planted = plant_super_weight(model, layer=1, tokenizer=TOKENIZER)
    assert planted.expert is not None
    with load(model, tokenizer=TOKENIZER) as loaded:
        (candidate,) = find(loaded).candidates
    assert candidate.coordinate == planted
    routing = candidate.share * candidate.output / (candidate.value * candidate.input)
    assert 0.1 < routing < 0.9
    assert candidate.share == pytest.approx(1, abs=0.1)
    assert candidate.stream_share == pytest.approx(1, abs=0.1)


def test_a_shared_expert_beside_routed_ones() -> None:
    model = tiny_model("qwen2_moe")
    planted = plant_super_weight(model, layer=1, tokenizer=TOKENIZER, routed=False)
    assert planted.expert is None
    with load(model, tokenizer=TOKENIZER) as loaded:
        assert [each.coordinate for each in find(loaded).candidates] == [planted]


def test_a_super_activation_beyond_float16() -> None:
    found = search(llama_with(size=1000.0, weights={"1:20:7": 300.0}))
    assert coordinates(found) == ["1:20:7"]
    assert abs(found.candidates[0].super_activation or 0) > 2 * FLOAT16_MAX
    assert any("overflows float16" in note and "3.0" in note for note in found.notes)
    assert not any("float16" in note for note in search(llama_with()).notes)


@pytest.mark.parametrize("residency", ["resident", "streamed"])
def test_a_float16_checkpoint_whose_activations_do_not_fit_float16(tmp_path: Path, residency: str) -> None:
    model = llama_with(size=1000.0, weights={"1:20:7": 300.0})
    model.to(torch.float16).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with load(tmp_path, residency=residency) as loaded:
        found = find(loaded)
    assert coordinates(found) == ["1:20:7"]
    assert any("overflows float16" in note for note in found.notes)


def test_a_checkpoint_on_disk_gives_what_was_planted(tmp_path: Path) -> None:
    planted = save_planted_checkpoint(tmp_path, layer=2)
    with load(tmp_path, residency="streamed") as loaded:
        assert [each.coordinate for each in find(loaded).candidates] == [planted]
        with loaded.edited({planted: 0.0}):
            assert find(loaded).candidates == ()
