"""What every verb that runs a model refuses before it runs, and says in its run record after."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from superweights.results.store import read_records

from .conftest import Ask

VERBS = ("find", "trace")


@pytest.fixture
def no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a forward pass fail the test."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a forward pass ran")

    monkeypatch.setattr("superweights.model.loading.LoadedModel.run", fail)


@pytest.mark.usefixtures("no_pass")
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("layers", ["2:4", "0:99", "0:7", "x", "0:0", "4", "0:-1", "0:", ":", "0:2:3", "0:²", "1:6"])
def test_layers_that_cannot_be_run_are_usage(verb: str, layers: str, ask: Ask, planted_checkpoint: Path) -> None:
    answer = ask(verb, planted_checkpoint, f"--layers={layers}")
    assert (answer.status, answer.out) == (2, "")
    assert answer.err == (
        f"superweights: error: --layers {layers} cannot be run. A forward pass starts at layer 0: write 0:N for the first N "
        f"layers, with N from 1 to 6 in {planted_checkpoint}.\n"
    )


@pytest.mark.parametrize(
    ("verb", "option"),
    [("find", "--out"), ("find", "--plot"), ("trace", "--out"), ("trace", "--plot"), ("trace", "--plot-persistence")],
)
@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("missing/x.svg", "No such file or directory"),
        ("file/x.svg", "Not a directory"),
        ("folder.svg", "Is a directory"),
    ],
)
def test_an_unwritable_target_is_refused_before_the_model_is_opened(
    verb: str, option: str, place: str, says: str, ask: Ask, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.svg").mkdir()
    target = tmp_path / place
    answer = ask(verb, "no/such-model-anywhere", option, target)
    assert (answer.status, answer.out) == (3, "")
    assert answer.err == (
        f"superweights: error: Cannot write {target}: {says}. Give a file in a folder that you can write.\n"
    )
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder.svg"]


def test_a_folder_that_takes_no_file_is_refused(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("superweights.cli.model_options.TemporaryFile", full)
    answer = ask("find", "no/such-model-anywhere", "--out", tmp_path / "x.jsonl")
    assert answer.status == 3
    assert "x.jsonl: No space left on device." in answer.err


@pytest.mark.parametrize(("verb", "option"), [("find", "--plot"), ("trace", "--plot"), ("trace", "--plot-persistence")])
@pytest.mark.parametrize("name", ["peaks.bmp", "peaks", "peaks.svgz"])
def test_an_unknown_picture_format_is_refused_before_the_model_is_opened(
    verb: str, option: str, name: str, ask: Ask
) -> None:
    answer = ask(verb, "no/such-model-anywhere", option, name)
    assert (answer.status, answer.out) == (2, "")
    assert "There is no chart format" in answer.err and "'.svg'" in answer.err


@pytest.mark.parametrize(("verb", "option"), [("find", "--out"), ("trace", "--out"), ("trace", "--weights")])
def test_an_option_is_not_taken_for_a_forgotten_file(verb: str, option: str, ask: Ask) -> None:
    answer = ask(verb, "no/such-model-anywhere", option, "--verbose")
    assert (answer.status, answer.out) == (2, "")
    assert option in answer.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--residency", "nowhere"), '"streamed", "resident"'),
        (("--nonfinite", "ignore"), '"refuse", "zero"'),
        (("--no-trust-remote-code",), "--no-trust-remote-code"),
        (("--prompt",), "--prompt"),
    ],
)
@pytest.mark.parametrize("verb", VERBS)
def test_a_wrong_choice_is_usage(verb: str, words: tuple[str, ...], says: str, ask: Ask) -> None:
    answer = ask(verb, "no/such-model-anywhere", *words)
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.count("\n") == 1 and says in answer.err


def test_a_revision_of_a_directory_is_usage(ask: Ask, planted_checkpoint: Path) -> None:
    answer = ask("find", planted_checkpoint, "--revision", "main")
    assert (answer.status, answer.out) == (2, "")
    assert "A revision (main) is of a model on the Hub" in answer.err


def test_the_run_says_what_was_run(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    assert ask("find", planted_checkpoint, "--layers", "0:1", "--residency", "resident", "--out", out).status == 0
    run = read_records(out)[0]
    assert (run.model, run.revision, run.residency) == (str(planted_checkpoint), None, "resident")
    assert (run.storage_dtype, run.compute_dtype, run.device) == ("F32", "float32", "cpu")
    assert run.digest is not None and len(run.digest) == 64


def test_the_storage_dtype_is_that_of_most_weights(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    model, out = shutil.copytree(planted_checkpoint, tmp_path / "model"), tmp_path / "run.jsonl"
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert ask("find", model, "--layers", "0:1", "--out", out).status == 0
    assert read_records(out)[0].storage_dtype == "F32"


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_names_what_an_option_takes(verb: str, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = " ".join(ask(verb, "--help").out.replace("│", " ").split())
    for option in ("--layers 0:N", "--prompt TEXT", "--out FILE", "--plot FILE", "--residency CHOICE"):
        assert option in words
    assert "()" not in words
