import json
from pathlib import Path

import pytest

from superweights.results.records import MeasurementRecord, NoteRecord
from superweights.results.store import read_records
from superweights.testing import save_tiny_checkpoint

from .conftest import Ask

QUICK = ("--weights", "2:49:7", "--windows", "3", "--length", "24")


def test_one_row_a_layer(ask: Ask, planted_checkpoint: Path) -> None:
    answer = ask("sinks", planted_checkpoint, *QUICK)
    assert (answer.status, answer.err) == (0, "")
    title, _, header, *rows = answer.out.splitlines()
    assert title == f"Mean attention to the first token by layer in {planted_checkpoint}, over 3 windows of heldout."
    assert header.endswith("removed, super activation restored")
    assert [row.split()[0] for row in rows] == ["mean", *map(str, range(6))]
    assert rows[1].split()[1] == rows[1].split()[2], "layer 0 comes before the edit"


def test_records_and_a_picture(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "run.jsonl", tmp_path / "plot.svg"
    assert ask("sinks", planted_checkpoint, *QUICK, "--out", out, "--plot", plot).status == 0
    run, records = read_records(out)
    assert (run.settings["text"], run.settings["windows"], run.settings["length"]) == ("heldout", 3, 24)
    assert len(records) == 3 * 7
    assert "attention to the first token, %" in plot.read_text()


def test_windows_are_short_by_default(ask: Ask, planted_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    monkeypatch.setattr(
        "superweights.cli.sinks.measure",
        lambda _, __, windows, **___: lengths.append(windows.length) or iter([NoteRecord(level="info", text="none")]),
    )
    monkeypatch.setattr("superweights.cli.sinks._show", lambda *_: None)
    ask("sinks", planted_checkpoint, "--weights", "2:49:7", "--windows", "1")
    ask("sinks", planted_checkpoint, "--weights", "2:49:7", "--windows", "1", "--length", "512")
    assert lengths == [256, 512]


def test_nothing_found_removes_nothing_and_says_so(ask: Ask, random_checkpoint: Path, tmp_path: Path) -> None:
    answer = ask("sinks", random_checkpoint, *QUICK[2:], "--out", tmp_path / "run.jsonl")
    assert answer.status == 0
    assert answer.out.endswith("\nNo super weight candidate was found, so nothing was removed.\n")
    records = read_records(tmp_path / "run.jsonl")[1]
    assert {each.condition for each in records if isinstance(each, MeasurementRecord)} == {"original"}


def test_residencies_give_the_same_answer(ask: Ask, planted_checkpoint: Path) -> None:
    words = ("sinks", planted_checkpoint, *QUICK, "--format", "jsonl", "--residency")
    streamed = ask(*words, "streamed")
    assert streamed == ask(*words, "resident")
    assert len([json.loads(line) for line in streamed.out.splitlines()]) == 3 * 7


def test_a_model_without_attention_cannot(ask: Ask, tmp_path: Path) -> None:
    answer = ask(
        "sinks", save_tiny_checkpoint("rwkv", tmp_path), "--windows", "1", "--length", "8", "--weights", "2:3:5"
    )
    assert (answer.status, answer.out) == (3, "")
    assert "Its attention sinks cannot be measured." in answer.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--text", "wiki"), "There is no file or known text 'wiki'"),
        (("--length", "1"), "must be 2 or more"),
        (("--windows", "0"), "must be 1 or more"),
        (("--weights", "9:0:0"), "the layers are 0 to 5"),
    ],
)
def test_a_wrong_request_is_usage(words: tuple[str, ...], says: str, ask: Ask, planted_checkpoint: Path) -> None:
    answer = ask("sinks", planted_checkpoint, *words)
    assert (answer.status, answer.out) == (2, "")
    assert says in answer.err
