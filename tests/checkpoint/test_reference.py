from pathlib import Path

import pytest

from superweights.checkpoint import ModelReference


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("allenai/OLMo-1B-0724-hf", "hub"),
        ("gpt2", "hub"),
        ("s3://bucket/model", "url"),
        ("memory://model", "url"),
        ("https://host/model", "url"),
        ("./gpt2", "nowhere"),
        ("/no/such/path", "nowhere"),
        ("a/b/c", "nowhere"),
        ("a--b/c", "nowhere"),
        ("a..b", "nowhere"),
        ("has space", "nowhere"),
        ("org/model.git", "nowhere"),
        ("org/" + "m" * 95, "nowhere"),
        ("", "nowhere"),
        ("model-q4_0.gguf", "nowhere"),
        ("org/model.GGUF", "nowhere"),
    ],
)
def test_the_place_of_a_name(name: str, place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert ModelReference(name).place == place


def test_an_existing_path_comes_before_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert ModelReference("gpt2").place == "path"


def test_the_home_directory_is_resolved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert ModelReference("~/model").path == tmp_path / "model"


def test_parse_takes_what_a_caller_has(tmp_path: Path) -> None:
    reference = ModelReference("org/name", "v1")
    assert ModelReference.parse(reference) == reference
    assert ModelReference.parse(reference, revision="v2").revision == "v2"
    assert ModelReference.parse(tmp_path) == ModelReference(str(tmp_path))
    assert ModelReference.parse(f"file://{tmp_path}") == ModelReference(str(tmp_path))
    assert ModelReference.parse("hf://org/name") == ModelReference("org/name")
    assert str(reference) == "org/name at revision v1"
