import json
import subprocess
import sys
from pathlib import Path

import pytest

from superweights.coordinates import Coordinate
from superweights.detection.published import (
    conflicts_for,
    published_index,
    published_models,
    published_name,
    published_weights,
    residual_channels,
    usable_weights,
)
from superweights.errors import UnknownNameError

SHARED = Path(__file__).parents[3] / "shared" / "published-index.json"
OLMO = "allenai/OLMo-1B-0724-hf"


def coordinates(model: str) -> list[str]:
    return [str(entry.coordinate) for entry in usable_weights(model)]


def test_the_whole_index_is_there() -> None:
    index = published_index()
    assert (len(index.weights), len(index.residual_channels), len(index.conflicts)) == (137, 41, 13)


def test_it_says_what_the_collected_sources_say() -> None:
    if not SHARED.exists():
        pytest.skip("the collected sources are not here")
    collected = json.loads(SHARED.read_text())
    keys = ("layer", "row", "col", "value")
    assert [[entry.get(key) for key in (*keys, "status", "expert")] for entry in collected["entries"]] == [
        [getattr(entry, key) for key in (*keys, "status", "expert")] for entry in published_index().weights
    ]
    assert [entry["channels"] for entry in collected["residual_channels"]] == [
        list(entry.channels) for entry in published_index().residual_channels
    ]
    assert [entry["issue"] for entry in collected["conflicts"]] == [each.issue for each in published_index().conflicts]


def test_every_model_has_a_full_hub_name() -> None:
    assert all(name.count("/") == 1 and " " not in name for name in published_models())


def test_every_model_has_something_to_say() -> None:
    for model in published_models():
        assert published_weights(model) or residual_channels(model) or conflicts_for(model), model


@pytest.mark.parametrize("name", ["huggyllama/llama-7b", "HuggyLlama/LLaMA-7B", "llama-7b", "LLAMA-7b"])
def test_a_model_is_found_by_its_name_in_any_case(name: str) -> None:
    assert published_name(name) == "huggyllama/llama-7b"


def test_an_unknown_model_names_the_near_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"no published model 'Llama-2-7b'.*'meta-llama/Llama-2-7b-hf'"):
        published_weights("Llama-2-7b")


def test_an_unknown_model_without_near_ones_says_where_the_list_is() -> None:
    with pytest.raises(UnknownNameError, match=r"No name is near\. `superweights index` lists all"):
        published_weights("zzzzzz")


def test_the_layer_typo_is_kept_and_never_usable() -> None:
    [wrong] = [entry for entry in published_weights(OLMO) if entry.status == "published-wrong"]
    assert wrong.coordinate == Coordinate.parse("1:1764:8041")
    assert wrong.note is not None and "real layer is 2" in wrong.note
    assert coordinates(OLMO) == ["1:1764:1710", "2:1764:8041"]


def test_late_layer_removers_are_kept_and_never_usable() -> None:
    assert {entry.layer for entry in published_weights("Llama-2-7b-hf")} >= {29, 30}
    assert coordinates("Llama-2-7b-hf") == ["1:1415:7890", "1:2533:7890"]


def test_entries_without_a_full_coordinate_are_kept_and_never_usable() -> None:
    entries = published_weights("HuggingFaceTB/SmolLM2-135M")
    assert [(entry.coordinate, entry.coordinate_text) for entry in entries] == [(None, "11:507:*")]
    assert usable_weights("HuggingFaceTB/SmolLM2-135M") == ()


def test_an_entry_about_an_expert_says_which() -> None:
    assert {entry.coordinate_text for entry in published_weights("Qwen3-30B-A3B")} == {
        "1/68:*:*",
        "2/92:*:*",
        "3/82:*:*",
    }


def test_a_scalar_of_several_sources_stands_once_with_its_value() -> None:
    [mistral] = usable_weights("Mistral-7B-v0.1")
    assert len([each for each in published_weights("Mistral-7B-v0.1") if each.coordinate == mistral.coordinate]) == 4
    assert mistral.value == -0.2734375


def test_the_paper_table_2_is_usable_but_for_its_typo() -> None:
    paper = [each for each in published_index().weights if each.source.startswith("arXiv:2411.07191 Table 2")]
    assert len(paper) == 21
    assert [each.coordinate_text for each in paper if not each.usable] == ["1:1764:8041"]
    for entry in filter(lambda each: each.usable, paper):
        assert entry.coordinate in [each.coordinate for each in usable_weights(entry.model)]


def test_shares_follow_from_the_other_numbers() -> None:
    for entry in published_index().weights:
        if entry.share is not None and entry.value and entry.input_peak and entry.output_peak:
            # Sources print three digits.
            assert entry.value * entry.input_peak / entry.output_peak == pytest.approx(entry.share, abs=2e-3), entry


def test_residual_channels_have_numbers_by_channel() -> None:
    with_bos = next(entry for entry in residual_channels("Llama-2-7b-hf") if entry.bos)
    assert with_bos.max_abs == {1415: 1632.0, 2533: 2768.0, 1512: 173.0}
    assert with_bos.perplexity["set_to_zero"]["wikitext2"] == pytest.approx(8976.8955)
    assert (with_bos.top_tokens[0].position, with_bos.top_tokens[0].token) == ("first", "<s>")


def test_a_conflict_over_several_models_is_found_from_each() -> None:
    assert conflicts_for("microsoft/phi-2") == conflicts_for("facebook/opt-6.7b") != ()
    assert any("2427" in conflict.issue for conflict in conflicts_for("Meta-Llama-3-8B"))


def test_the_index_is_read_only() -> None:
    channels = residual_channels("Llama-2-7b-hf")[0]
    with pytest.raises(TypeError):
        channels.max_abs[0] = 1.0  # type: ignore[index]


def test_no_torch_is_imported() -> None:
    code = "import sys, superweights.detection.published as p; p.published_index(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
