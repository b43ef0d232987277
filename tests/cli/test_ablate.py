from pathlib import Path

import pytest

from superweights.results.records import MeasurementRecord, NoteRecord
from superweights.results.store import read_records

from .conftest import Ask

QUICK = ("--weights", "2:49:7", "--windows", "3", "--length", "24")
CONDITIONS = ["original", "weights removed", "largest others removed", "removed, super activation restored"]


def test_the_rows_of_table_1(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "run.jsonl", tmp_path / "plot.svg"
    answer = ask("ablate", planted_checkpoint, *QUICK, "--others", "3", "--out", out, "--plot", plot)
    assert (answer.status, answer.err) == (0, "")
    assert answer.out.startswith(f"{planted_checkpoint} without 2:49:7; 3 windows of heldout.")
    assert [line for line in answer.out.splitlines() if line.startswith(tuple(CONDITIONS)) and "(" in line][3:]
    records = read_records(out)[1]
    measured = [each for each in records if isinstance(each, MeasurementRecord)]
    assert list(dict.fromkeys(each.condition for each in measured)) == CONDITIONS
    assert {each.name for each in measured} == {"perplexity", "perplexity_ratio", "kl_to_original", "top1_agreement"}
    control = next(each for each in measured if each.condition == CONDITIONS[2])
    assert control.intervention == {"kind": "prune largest", "amount": 3, "keep": ["2:49:7"]}
    assert sum(isinstance(each, NoteRecord) and "goes on" in each.text for each in records) == 4
    assert "largest others removed" in plot.read_text()


def test_residencies_give_the_same_answer(ask: Ask, planted_checkpoint: Path) -> None:
    words = ("ablate", planted_checkpoint, *QUICK, "--sample", "", "--format", "jsonl", "--residency")
    assert ask(*words, "streamed") == ask(*words, "resident")


@pytest.mark.parametrize("amount", ["0", "x", "-3", "nan"])
def test_an_amount_that_is_none(ask: Ask, planted_checkpoint: Path, amount: str) -> None:
    answer = ask("ablate", planted_checkpoint, *QUICK, f"--others={amount}")
    assert answer.status == 2
    assert f"--others {amount} is no amount" in answer.err


def test_nothing_found_removes_nothing(ask: Ask, random_checkpoint: Path) -> None:
    answer = ask("ablate", random_checkpoint, "--windows", "2", "--length", "24")
    assert answer.status == 0
    assert "nothing was removed" in answer.out
