"""The training program of the reference models, from end to end at a toy size."""

import json
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import superweights as sw
from superweights.results.records import MeasurementRecord
from superweights.results.store import read_records

sys.path.append(str(Path(__file__).parents[1] / "studies" / "reference_models"))
import describe
import recipe as recipes
import train as program


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    text = files("superweights").joinpath("data/heldout.txt").read_text()
    for part, piece in (("train", text[:60_000]), ("val", text[60_000:80_000]), ("test", text[80_000:])):
        (folder / f"gutenberg-{part}.txt").write_text(piece)
    return folder


def toy(corpus: Path, to: Path) -> None:
    program.train(recipes.read_recipe("toy", steps=6), corpus, to, corpus / "cache", None, None)


def test_every_recipe_is_read_and_has_its_size():
    sizes = {}
    for file in recipes.RECIPES.glob("*.toml"):
        recipe = recipes.read_recipe(file.stem)
        with torch.device("meta"):
            sizes[file.stem] = sum(each.numel() for each in program.build(recipe).parameters())
    assert 2 * sizes["tiny"] <= 8_000_000
    assert 20e6 <= sizes["small"] <= 40e6
    assert 80e6 <= sizes["medium"] <= 120e6
    small = recipes.read_recipe("small")
    assert small.steps * small.batch * small.sequence >= 500e6


def test_an_interrupted_run_ends_as_one_that_was_not(corpus, tmp_path, monkeypatch):
    toy(corpus, tmp_path / "whole")
    batch_at = program.batch_at

    def interrupting(ids, recipe, step):
        if step == 4:
            raise KeyboardInterrupt
        return batch_at(ids, recipe, step)

    monkeypatch.setattr(program, "batch_at", interrupting)
    with pytest.raises(KeyboardInterrupt):
        toy(corpus, tmp_path / "cut")
    monkeypatch.undo()
    toy(corpus, tmp_path / "cut")
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) == list(range(7))


def test_the_model_loads_and_its_card_says_what_was_measured(corpus, tmp_path):
    toy(corpus, tmp_path)
    describe.describe(tmp_path, corpus, "a test")
    with sw.load(tmp_path / "model") as model:
        assert model.tokenizer("a")["input_ids"][0] == model.tokenizer.bos_token_id == 0
    card = (tmp_path / "model" / "README.md").read_text()
    found = {
        each.name: each for each in read_records(tmp_path / "records.jsonl")[1] if isinstance(each, MeasurementRecord)
    }
    assert f"{found['perplexity'].value:.4g}" in card
    assert "a test" in card


def test_a_state_of_another_recipe_is_refused(corpus, tmp_path):
    toy(corpus, tmp_path)
    with pytest.raises(SystemExit, match="of another recipe"):
        program.train(recipes.read_recipe("toy", steps=7), corpus, tmp_path, corpus / "cache", None, None)
