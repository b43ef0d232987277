"""One edit, three shells: a resident model, a streamed model and a rewritten checkpoint are the same, bit for bit."""

import re
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import superweights as sw
from superweights.coordinates import Coordinate
from superweights.interventions.conditions import PruneLargest, ScaleWeights
from superweights.interventions.rewriting import rewrite_checkpoint
from superweights.interventions.weights import EditCount, WeightEdit, weights_edited
from superweights.model.architecture import read_architecture
from superweights.testing import PROMISED_FAMILIES, tiny_model, tiny_tokenizer

LAYERS = 2
VALUE = 37.0  # times 1.7 it has no short mantissa: rounding to the stored dtype shows
RESIDENCIES = ("resident", "streamed")


def plant(model, coordinate: Coordinate) -> None:
    projection = read_architecture(model).locate(coordinate)
    with torch.no_grad():
        model.get_parameter(projection.name)[projection.index(coordinate)] = VALUE


def coordinate_of(model) -> Coordinate:
    routed = any(each.experts for each in read_architecture(model).in_layer(1))
    return Coordinate(1, 1 if routed else None, 3, 5)


@pytest.fixture(scope="module", params=PROMISED_FAMILIES)
def family(request, tmp_path_factory) -> tuple[Path, Coordinate]:
    """A checkpoint in bfloat16 with one large weight, and its coordinate."""
    directory = tmp_path_factory.mktemp("family") / "model"
    model = tiny_model(request.param, layers=LAYERS)
    coordinate = coordinate_of(model)
    plant(model, coordinate)
    model.to(torch.bfloat16).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory, coordinate


def stream_of(model: sw.LoadedModel) -> torch.Tensor:
    return sw.trace(model, sw.make_prompts(model.tokenizer, ["What a day."], vocabulary=128)).stream


def edits_of(coordinate: Coordinate) -> dict[str, list[WeightEdit]]:
    scaled = ScaleWeights((coordinate,), 1.7)
    return {
        "removed": [ScaleWeights((coordinate,))],
        "scaled": [scaled],
        "pruned": [PruneLargest(3, keep=(coordinate,))],
        "pruned and scaled": [PruneLargest(3, keep=(coordinate,)), scaled],
    }


def test_three_shells_give_the_same_bits(family, tmp_path):
    directory, coordinate = family
    with ExitStack() as stack:
        models = [stack.enter_context(sw.load(directory, residency=each)) for each in RESIDENCIES]
        before = [stream_of(each) for each in models]
        assert torch.equal(*before)
        seen = [before[0]]
        for name, edits in edits_of(coordinate).items():
            counts, streams = [], []
            for model in models:
                with weights_edited(model, edits) as count:
                    streams.append(stream_of(model))
                counts.append(count)
            counts.append(rewrite_checkpoint(directory, tmp_path / name, edits))
            with sw.load(tmp_path / name) as model:
                streams.append(stream_of(model))
            assert torch.equal(streams[0], streams[1]), name
            assert torch.equal(streams[0], streams[2]), name
            assert len(set(counts)) == 1
            assert not any(torch.equal(streams[0], each) for each in seen), name
            seen.append(streams[0])
        for model in models:
            assert torch.equal(stream_of(model), before[0])


def changed(one: Path, other: Path) -> dict[str, torch.Tensor]:
    """Which elements of each tensor differ."""
    before, after = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert before.keys() == after.keys()
    return {name: before[name].view(torch.int16) != after[name].view(torch.int16) for name in before}


def test_pruning_takes_so_many_of_each_matrix_and_nothing_else(family, tmp_path):
    directory, coordinate = family
    count = rewrite_checkpoint(directory, tmp_path / "pruned", [PruneLargest(3, keep=(coordinate,))])
    found = EditCount(0, 0)
    for name, places in changed(directory, tmp_path / "pruned").items():
        pruned = re.search(r"\.[01]\.", name) and places.ndim > 1 and min(places.shape[-2:]) > 1 and "bias" not in name
        each = places.flatten(0, -3).flatten(-2).sum(-1) if places.ndim > 2 else places.sum()[None]  # [matrices]
        assert each.tolist() == [3 if pruned else 0] * len(each), name
        found = EditCount(found.weights + int(each.sum()), found.matrices + int((each > 0).sum()))
    assert count == found


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_oss"], indirect=True)
def test_transformers_loads_a_rewritten_checkpoint(family, tmp_path):
    directory, coordinate = family
    rewrite_checkpoint(directory, tmp_path / "removed", [ScaleWeights((coordinate,))])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "removed", dtype=torch.bfloat16)
    projection = read_architecture(model).locate(coordinate)
    weight = model.get_parameter(projection.name)
    assert weight[projection.index(coordinate)] == 0
    assert (weight == 0).sum() == 1
