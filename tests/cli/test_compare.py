import json
from pathlib import Path

import pytest

from superweights.results.store import read_records
from superweights.testing import save_planted_checkpoint, save_tiny_checkpoint

from .conftest import Ask

QUICK = ("--weights", "2:49:7", "--windows", "3", "--length", "24")


def test_a_model_with_itself_changes_nothing(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    answer = ask("compare", planted_checkpoint, planted_checkpoint, *QUICK, "--plot", tmp_path / "plot.svg")
    assert (answer.status, answer.err) == (0, "")
    assert (tmp_path / "plot.svg").stat().st_size > 1000
    rows = [json.loads(line) for line in ask(
        "compare", planted_checkpoint, planted_checkpoint, *QUICK, "--format", "jsonl").out.splitlines()]  # fmt: skip
    (change,) = [each for each in rows if each["name"] == "weight_change"]
    assert change["value"] == 0


def test_models_of_other_sizes_are_refused(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    save_tiny_checkpoint("llama", tmp_path / "deep", layers=8)
    answer = ask("compare", planted_checkpoint, tmp_path / "deep", *QUICK)
    assert answer.status != 0
    assert "layers" in answer.err


def test_what_each_has_is_found(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    save_planted_checkpoint(tmp_path / "other")
    answer = ask("compare", planted_checkpoint, tmp_path / "other", *QUICK[2:])
    assert answer.status == 0
    assert "2:49:7" in answer.out


def test_the_tables(ask: Ask, planted_checkpoint: Path, random_checkpoint: Path) -> None:
    answer = ask("compare", planted_checkpoint, random_checkpoint, "--weights", "2:49:7,3:4:6", *QUICK[2:])
    assert (answer.status, answer.err) == (0, "")
    lines = answer.out.splitlines()
    rows = [line.split() for line in lines[3:9]]
    names = [str(planted_checkpoint), str(random_checkpoint)]
    assert [(row[0], row[1]) for row in rows[:4]] == [(each, name) for each in ("2:49:7", "3:4:6") for name in names]
    assert rows[0][2:6] == ["-64.0799", "1", "of", "7168"]
    assert [row[:3] for row in rows[4:]] == [["all", "together", name] for name in names]
    assert lines[10].startswith(f"Change from {names[0]} to {names[1]}, ")
    assert [line.split()[0] for line in lines[13:15]] == ["2:49:7", "3:4:6"]
    assert sum(line.startswith("perplexity of ") for line in lines) == 2


def test_both_models_are_in_the_first_line(
    ask: Ask, planted_checkpoint: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    ask("compare", planted_checkpoint, random_checkpoint, *QUICK, "--out", tmp_path / "run.jsonl")
    run, _ = read_records(tmp_path / "run.jsonl")
    assert (run.model, run.settings["second"]) == (str(planted_checkpoint), str(random_checkpoint))
    assert run.settings["second_digest"] and run.digest


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--weights", "2:49:112"), "cols are 0 to 111"),
        (("--weights", "x"), "neither auto, published nor a .jsonl file"),
        (("--windows", "0"), "must be 1 or more"),
        (("--plot", "plot.bmp"), "There is no chart format '.bmp'"),
        (("--layers", "0:9"), "--layers 0:9 cannot be run"),
    ],
)
def test_a_wrong_request_is_usage(words: tuple[str, ...], says: str, ask: Ask, planted_checkpoint: Path) -> None:
    answer = ask("compare", planted_checkpoint, planted_checkpoint, "--length", "24", *words)
    assert (answer.status, answer.out) == (2, "")
    assert says in answer.err


def test_no_candidate_in_either_is_told(ask: Ask, random_checkpoint: Path) -> None:
    answer = ask("compare", random_checkpoint, random_checkpoint, *QUICK[2:])
    assert answer.status == 2
    assert "neither has a candidate. Name the weights to compare." in answer.err
