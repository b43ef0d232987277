from pathlib import Path

import pytest

from superweights.results.records import MeasurementRecord, VerdictRecord
from superweights.results.store import read_records

from .conftest import Ask

QUICK = ("--windows", "9", "--length", "24", "--null", "3")


def test_a_table_of_verdicts_and_the_answer_as_exit_status(ask: Ask, planted_checkpoint: Path) -> None:
    answer = ask("verify", planted_checkpoint, "--weights", "2:49:7,3:5:5", *QUICK)
    assert (answer.status, answer.err) == (1, ""), "a random model predicts nothing, so it needs nothing"
    title, _, header, first, second, together, *_ = answer.out.splitlines()
    assert title.startswith(f"{planted_checkpoint} needs 0 of 2 weights; measured on 9 windows of 24 tokens of heldout")
    assert header.split() == ["weights", "verdict", "ratio", "95", "%", "interval", "rest", "null", "draws"]
    assert [first.split()[0], second.split()[0]] == ["2:49:7", "3:5:5"]
    assert together.startswith("all 2 together")


def test_records_and_a_picture(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "run.jsonl", tmp_path / "plot.svg"
    ask("verify", planted_checkpoint, *QUICK, "--out", out, "--plot", plot)
    run, records = read_records(out)
    assert (run.seed, run.settings["null"], run.settings["text"]) == (0, 3, "heldout")
    (verdict,) = [each for each in records if isinstance(each, VerdictRecord)]
    assert (verdict.weights, verdict.count, verdict.tokens, verdict.null_count) == (("2:49:7",), 9, 9 * 23, 3)
    ratios = {each.condition: each.value for each in records if isinstance(each, MeasurementRecord)
              and each.name == "perplexity_ratio"}  # fmt: skip
    assert ratios["without 2:49:7"] == verdict.ratio
    assert verdict.null_maximum == max(value for name, value in ratios.items() if name.startswith("null"))
    assert "2:49:7" in plot.read_text()


def test_residencies_give_the_same_answer(ask: Ask, planted_checkpoint: Path) -> None:
    words = ("verify", planted_checkpoint, "--weights", "2:49:7", *QUICK, "--format", "jsonl", "--residency")
    assert ask(*words, "streamed") == ask(*words, "resident")


def test_find_verifies_what_it_finds(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    answer = ask("find", planted_checkpoint, "--verify", *QUICK[:4], "--out", out)
    assert answer.status == 0
    assert "1 super weight candidate in 1 set" in answer.out
    assert "needs 0 of 1 weights" in answer.out
    kinds = {each.type for each in read_records(out)[1]}
    assert {"candidate", "verdict", "measurement"} <= kinds


def test_nothing_found_is_nothing_to_verify(ask: Ask, random_checkpoint: Path) -> None:
    answer = ask("verify", random_checkpoint, *QUICK)
    assert answer.status == 1
    assert "there is nothing to verify" in answer.out
    assert ask("find", random_checkpoint, "--verify", *QUICK[:4]).status == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--weights", "9:1:1"), "the layers are 0 to 5"),
        (("--critical", "0.5"), "critical above 1"),
        (("--text", "heldot"), "Did you mean 'heldout'?"),
        (("--length", "100000"), "100000"),
        (("--windows", "0"), "0"),
    ],
)
def test_bad_input(ask: Ask, planted_checkpoint: Path, words: tuple[str, ...], message: str) -> None:
    answer = ask("verify", planted_checkpoint, *words)
    assert answer.status == 2
    assert message in answer.err


def test_a_text_shorter_than_a_window(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A few words.")
    answer = ask("verify", planted_checkpoint, "--text", tmp_path / "short.txt")
    assert answer.status == 2
    assert "short.txt" in answer.err
