from pathlib import Path

import pytest

from superweights.results.records import MeasurementRecord
from superweights.results.store import read_records

from .conftest import Ask


def test_destroyed_and_repaired_stand_side_by_side(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    answer = ask("repair", planted_checkpoint, "--weights", "2:49:7", "--windows", "6", "--length", "24", "--out", out)
    assert (answer.status, answer.err) == (0, "")
    records = [each for each in read_records(out)[1] if isinstance(each, MeasurementRecord)]
    assert {"perplexity", "perplexity_ratio", "recovered", "rederived_value"} <= {each.name for each in records}
    conditions = list(dict.fromkeys(each.condition for each in records))
    assert conditions[:2] == ["original", "destroyed"]


def test_nothing_found_repairs_nothing(ask: Ask, random_checkpoint: Path) -> None:
    answer = ask("repair", random_checkpoint, "--windows", "6", "--length", "24")
    said = "No super weight candidate was found, so nothing was destroyed."
    assert (answer.status, answer.out, answer.err) == (0, f"\n{said}\n", "")


def test_the_tables_name_states_and_values(ask: Ask, planted_checkpoint: Path) -> None:
    words = ("--weights", "2:49:7", "--windows", "6", "--length", "24", "--fit-windows", "2", "--reach", "3000")
    lines = ask("repair", planted_checkpoint, *words).out.splitlines()
    assert lines[0] == f"Super weights of {planted_checkpoint} destroyed and repaired, on 4 windows of heldout."
    states = ["original", "destroyed", "scalar re-derived", "column patch fitted on activations"]
    assert [line.split("  ")[0] for line in lines[3:7]] == states
    assert lines[8].split() == ["coordinate", "true", "value", "rederived", "value"]
    assert lines[9].split()[:2] == ["2:49:7", "-64.0799"]


def test_without_kept_activations_there_is_no_patch(ask: Ask, planted_checkpoint: Path) -> None:
    words = ("--weights", "2:49:7", "--windows", "3", "--length", "24", "--fit-windows", "1", "--no-patch")
    answer = ask("repair", planted_checkpoint, *words)
    assert answer.status == 0
    assert "scalar re-derived" in answer.out and "column patch" not in answer.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--weights", "31:3968:7003"), "the layers are 0 to 5"),
        (("--windows", "5", "--length", "24"), "takes 6 windows or more"),
        (("--damage", "1"), "a finite factor other than 1"),
        (("--reach", "0"), "reach above 0"),
        (("--length", "1"), "must be 2 or more"),
    ],
)
def test_a_wrong_request_is_usage(words: tuple[str, ...], says: str, ask: Ask, planted_checkpoint: Path) -> None:
    answer = ask("repair", planted_checkpoint, *words)
    assert (answer.status, answer.out) == (2, "")
    assert says in answer.err
