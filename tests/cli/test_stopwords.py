import json
from pathlib import Path

import pytest

from superweights.results.records import MeasurementRecord, NoteRecord
from superweights.results.store import read_records

from .conftest import Ask

QUICK = ("--weights", "2:49:7", "--count", "6", "--prompt-tokens", "12")


def test_a_table_in_percent(ask: Ask, planted_checkpoint: Path) -> None:
    answer = ask("stopwords", planted_checkpoint, *QUICK, "--top", "3")
    assert (answer.status, answer.err) == (0, "")
    title, _, header, masses, *_ = answer.out.splitlines()
    assert title == f"Mean next-token probability in {planted_checkpoint}, over 6 prompts of heldout, in percent."
    assert header.split("  ")[0] == "token" and header.endswith("removed, super activation restored")
    assert masses.startswith("all stop words") and 5 < float(masses.split()[3]) < 30
    assert "Stop words, weights removed minus original: " in answer.out
    assert "After 'Summer is hot. Winter is ':" in answer.out
    assert answer.out.endswith("\nStop words: 16 of 128 tokens, by the list of 'en', version 1.\n")


def test_records_and_a_picture(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "run.jsonl", tmp_path / "plot.svg"
    assert ask("stopwords", planted_checkpoint, *QUICK, "--out", out, "--plot", plot).status == 0
    run, records = read_records(out)
    assert (run.settings["text"], run.settings["count"], run.settings["weights"]) == ("heldout", 6, "2:49:7")
    names = {each.name for each in records if isinstance(each, MeasurementRecord)}
    assert names == {"stop_word_mass", "stop_word_mass_change", "next_token_probability", "case_probability"}
    assert "What the model says next" in plot.read_text()


def test_the_weights_are_found_first(ask: Ask, planted_checkpoint: Path) -> None:
    words = ("stopwords", planted_checkpoint, *QUICK[2:])
    assert ask(*words) == ask(*words, "--weights", "2:49:7")


def test_nothing_found_removes_nothing_and_says_so(ask: Ask, random_checkpoint: Path, tmp_path: Path) -> None:
    answer = ask("stopwords", random_checkpoint, *QUICK[2:], "--out", tmp_path / "run.jsonl")
    assert answer.status == 0
    assert answer.out.endswith("\nNo super weight candidate was found, so nothing was removed.\n")
    records = read_records(tmp_path / "run.jsonl")[1]
    assert [each.level for each in records if isinstance(each, NoteRecord)] == ["info", "warning"]
    assert {each.condition for each in records if isinstance(each, MeasurementRecord)} == {"original"}


def test_documents_without_their_last_word(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "documents.jsonl"
    text.write_text("".join(json.dumps({"text": f"Document {number} ends here."}) + "\n" for number in range(21)))
    answer = ask(
        "stopwords", planted_checkpoint, "--weights", "2:49:7", "--text", text, "--format", "jsonl", "--case", ""
    )
    rows = [json.loads(line) for line in answer.out.splitlines()]
    assert {(row["count"], row["dataset"]) for row in rows} == {(21, str(text))}
    assert "case_probability" not in {row["name"] for row in rows}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--language", "eng"), "Did you mean 'en'"),
        (("--text", "lamda"), "Did you mean 'lambada'"),
        (("--count", "0"), "must be 2 or more, the others 1 or more"),
        (("--weights", "2:49:112"), "cols are 0 to 111"),
        (("--plot", "a.gif"), "chart format '.gif'"),
    ],
)
def test_a_wrong_request_is_usage(words: tuple[str, ...], says: str, ask: Ask, planted_checkpoint: Path) -> None:
    answer = ask("stopwords", planted_checkpoint, *words)
    assert (answer.status, answer.out) == (2, "")
    assert says in answer.err
