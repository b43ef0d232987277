import io
import json
from pathlib import Path

import pytest

from superweights.cli.weights_option import chosen_weights
from superweights.coordinates import Coordinate
from superweights.detection.search import default_prompts
from superweights.errors import CoordinateError, RecordError, UnknownNameError, UsageError
from superweights.model.loading import LoadedModel, load
from superweights.progress import NO_PROGRESS
from superweights.testing import save_tiny_checkpoint

from .conftest import Ask

PLANTED = Coordinate.parse("2:49:7")


def choose(text: str, model: LoadedModel, last_layer: int | None = None) -> tuple[Coordinate, ...]:
    return chosen_weights(text, model, prompts=default_prompts(model), last_layer=last_layer, progress=NO_PROGRESS)


@pytest.fixture
def found(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> Path:
    """The result file of a search."""
    assert ask("find", planted_checkpoint, "--out", tmp_path / "run.jsonl").status == 0
    return tmp_path / "run.jsonl"


def test_auto_searches(planted_checkpoint: Path, random_checkpoint: Path) -> None:
    with load(planted_checkpoint) as model:
        assert choose("auto", model) == (PLANTED,)
        assert choose("auto", model, last_layer=1) == ()
    with load(random_checkpoint) as model:
        assert choose("auto", model) == ()


def test_coordinates_are_taken_in_their_order(planted_checkpoint: Path) -> None:
    with load(planted_checkpoint) as model:
        assert list(map(str, choose("3:1:2, 0:63:111", model))) == ["3:1:2", "0:63:111"]
        many = [f"{layer}:{row}:0" for layer in range(6) for row in range(64)]  # longer than any file name may be
        assert list(map(str, choose(",".join(many), model))) == many


def test_a_result_file_gives_its_candidates(planted_checkpoint: Path, found: Path) -> None:
    with load(planted_checkpoint) as model:
        assert choose(str(found), model) == (PLANTED,)


def test_a_hyphen_reads_stdin(planted_checkpoint: Path, found: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(found.read_bytes())))
    with load(planted_checkpoint) as model:
        assert choose("-", model) == (PLANTED,)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("2:64:7", "rows are 0 to 63, cols are 0 to 111"),
        ("2:49:112", "rows are 0 to 63, cols are 0 to 111"),
        ("6:49:7", "the layers are 0 to 5"),
        ("2/1:49:7", "expert"),
        ("2:49:7,2:49", "'2:49' is no coordinate"),
        ("atuo", "--weights atuo is neither auto, published nor a .jsonl file"),
        ("", "LAYER:ROW:COL"),
    ],
)
def test_a_wrong_coordinate_is_refused_with_the_range(text: str, says: str, planted_checkpoint: Path) -> None:
    with load(planted_checkpoint) as model, pytest.raises(CoordinateError) as caught:
        choose(text, model)
    assert says in str(caught.value)


def test_a_result_file_of_a_larger_model_is_refused(random_checkpoint: Path, found: Path) -> None:
    lines = found.read_text().splitlines()
    larger = [line.replace('"layer":2', '"layer":9').replace('"2:49:7"', '"9:49:7"') for line in lines]
    found.write_text("\n".join(larger))
    with load(random_checkpoint) as model, pytest.raises(CoordinateError, match="the layers are 0 to 5"):
        choose(str(found), model)


def test_a_missing_result_file_is_named(planted_checkpoint: Path, tmp_path: Path) -> None:
    with load(planted_checkpoint) as model, pytest.raises(RecordError, match=r"none\.jsonl: No such file"):
        choose(str(tmp_path / "none.jsonl"), model)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint that calls itself GPT-2 and is large enough for the weight that is published about it."""
    directory = tmp_path_factory.mktemp("published") / "copy"
    save_tiny_checkpoint("gpt2", directory, layers=3, hidden=448, intermediate=672)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "_name_or_path": "openai-community/gpt2"}))
    return directory


def test_published_weights_are_those_of_the_model_the_config_names(gpt2: Path) -> None:
    with load(gpt2) as model:
        assert list(map(str, choose("published", model))) == ["2:447:666"]


def test_published_weights_go_by_the_folder_where_the_config_names_none(gpt2: Path, tmp_path: Path) -> None:
    directory = tmp_path / "gpt2"
    directory.mkdir()
    for file in gpt2.iterdir():
        (directory / file.name).symlink_to(file)
    config = json.loads((gpt2 / "config.json").read_text())
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps({**config, "_name_or_path": ""}))
    with load(directory) as model:
        assert list(map(str, choose("published", model))) == ["2:447:666"]


def test_published_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    directory = save_tiny_checkpoint("gpt2", tmp_path / "gpt2", layers=3)
    with load(directory) as model, pytest.raises(CoordinateError, match="rows are 0 to 63"):
        choose("published", model)


def test_a_model_without_published_weights_is_named(planted_checkpoint: Path, tmp_path: Path) -> None:
    with (
        load(planted_checkpoint) as model,
        pytest.raises(UnknownNameError, match="There is no published model 'llama'"),
    ):
        choose("published", model)
    errata_only = tmp_path / "Qwen2.5-0.5B"
    errata_only.symlink_to(planted_checkpoint, target_is_directory=True)
    with load(errata_only) as model, pytest.raises(UsageError, match="Nothing usable is published about Qwen"):
        choose("published", model)
