import csv
import io
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from superweights.progress import RichProgress
from superweights.results.records import (
    ActivationPeakRecord,
    CandidateRecord,
    NoteRecord,
    PromptRecord,
    ResidualPeakRecord,
    Run,
)
from superweights.results.store import decode_lines, read_records

from .conftest import Answer, Ask

PLANTED = "2:49:7"


def candidates(answer: Answer) -> list[dict[str, Any]]:
    """What `--format jsonl` gave."""
    return [json.loads(line) for line in answer.out.splitlines()]


@pytest.fixture
def during_pass(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Does something after the given number of layers."""

    def arrange(layers: int, happen: Callable[[], None]) -> None:
        done: list[int] = []

        def advance(self: RichProgress, steps: int = 1, *, nbytes: int = 0) -> None:
            done.append(nbytes)
            if len(done) == layers:
                happen()

        monkeypatch.setattr(RichProgress, "advance", advance)

    return arrange


def test_the_table_names_what_was_planted(ask: Ask, planted_checkpoint: Path) -> None:
    answer = ask("find", planted_checkpoint)
    assert (answer.status, answer.err) == (0, "")
    headline, _, header, row, _, reason, *legend = answer.out.splitlines()
    assert headline == f"1 super weight candidate in 1 set in {planted_checkpoint} (2 forward passes)."
    columns = ["coordinate", "value", "|W| rank", "x", "y", "share", "super activation", "medians", "stream share",
               "persists", "token", "prompt", "set", "round"]  # fmt: skip
    places = [header.index(column) for column in columns]
    assert places == sorted(places)
    assert row.startswith(PLANTED) and "1 of 7168" in row and "'n' at 8" in row
    assert reason.startswith("With these removed: no super activation")
    explained = " ".join(legend)
    for column in ("x, y:", "share:", "stream share:", "medians:", "persists:", "set:", "round:"):
        assert column in explained


def test_the_formats_hold_the_same_candidate(ask: Ask, planted_checkpoint: Path) -> None:
    [line] = candidates(ask("find", planted_checkpoint, "--format", "jsonl"))
    [entry] = json.loads(ask("find", planted_checkpoint, "--format", "json").out)
    [row] = csv.DictReader(io.StringIO(ask("find", planted_checkpoint, "--format", "csv").out))
    assert line == entry
    assert CandidateRecord.model_validate(line).coordinate == PLANTED
    assert (row["coordinate"], float(row["value"]), row["rank"]) == (PLANTED, line["value"], "1")
    assert list(row) == list(line)


def test_out_is_a_result_file_with_the_run_and_all_evidence(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    answer = ask("find", planted_checkpoint, "--out", out, "--term-share", "0.4", "--prompt", "Hello")
    assert PLANTED in answer.out
    run, records = read_records(out)
    assert (run.model, run.residency, run.compute_dtype) == (str(planted_checkpoint), "streamed", "float32")
    assert run.settings == {
        "method": "residual", "massive_ratio": 50.0, "peak_share": 0.1, "layer_share": 0.25, "term_share": 0.4,
        "output_ratio": 10.0, "hold": 0.5, "persistence": 0.5, "rounds": 6, "layers": None, "nonfinite": "refuse",
        "compute": "auto",
    }  # fmt: skip
    assert run.warnings == ()
    kinds = {kind: [each for each in records if isinstance(each, kind)] for kind in {type(each) for each in records}}
    assert {kind: len(of) for kind, of in kinds.items()} == {
        PromptRecord: 8,
        ActivationPeakRecord: 2 * 6,
        ResidualPeakRecord: 1 + 6,
        CandidateRecord: 1,
        NoteRecord: 1,
    }
    assert [each.name for each in tmp_path.iterdir()] == ["run.jsonl"]


def test_a_hyphen_writes_the_records_to_stdout_and_nothing_else(
    capfdbinary: pytest.CaptureFixture[bytes], planted_checkpoint: Path
) -> None:
    from superweights.cli import main

    assert main(["find", str(planted_checkpoint), "--out", "-"]) == 0
    captured = capfdbinary.readouterr()
    run, records = decode_lines(captured.out.splitlines(), source="stdout")
    assert isinstance(run, Run)
    assert [each.coordinate for each in records if isinstance(each, CandidateRecord)] == [PLANTED]
    assert captured.err == b""


@pytest.mark.parametrize(
    ("suffix", "start"),
    [(".html", b"<!DOCTYPE html>"), (".svg", b"<svg"), (".png", b"\x89PNG"), (".pdf", b"%PDF"), (".json", b"{")],
)
def test_a_plot_of_each_kind(suffix: str, start: bytes, ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    plot = tmp_path / f"peaks{suffix}"
    assert ask("find", planted_checkpoint, "--plot", plot).status == 0
    content = plot.read_bytes()
    assert content.startswith(start)
    assert len(content) > 4000
    if suffix in (".html", ".svg", ".json"):
        assert PLANTED.encode() in content


def test_the_plot_of_nothing_found(ask: Ask, random_checkpoint: Path, tmp_path: Path) -> None:
    assert ask("find", random_checkpoint, "--plot", tmp_path / "peaks.svg").status == 0
    assert "max |input|" in (tmp_path / "peaks.svg").read_text()


def test_none_found_is_an_answer_with_its_reason(ask: Ask, random_checkpoint: Path, tmp_path: Path) -> None:
    answer = ask("find", random_checkpoint, "--out", tmp_path / "run.jsonl")
    assert (answer.status, answer.err) == (0, "")
    headline, _, reason = answer.out.splitlines()
    assert headline == f"No super weight candidate in {random_checkpoint} (1 forward pass)."
    assert reason.startswith("No super activation: the largest value") and "the bar is 50 medians" in reason
    assert [each.text for each in read_records(tmp_path / "run.jsonl")[1] if isinstance(each, NoteRecord)] == [reason]
    assert ask("find", random_checkpoint, "--format", "json").out == "[]\n"
    assert ask("find", random_checkpoint, "--format", "csv").out == ""


def test_the_paper_method_has_no_stream_evidence(
    ask: Ask, planted_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = ask("find", planted_checkpoint, "--method", "paper")
    assert "beyond the paper's threshold of 50" in answer.out
    monkeypatch.setattr("superweights.detection.paper.SPIKE", 0.05)
    found = candidates(ask("find", planted_checkpoint, "--method", "paper", "--format", "jsonl"))
    assert found[0]["coordinate"] == PLANTED  # the largest output leads
    assert {each["method"] for each in found} == {"paper"}
    assert {each["stream_share"] for each in found} == {None}
    table = ask("find", planted_checkpoint, "--method", "paper").out
    assert "persists" not in table.splitlines()[2]


@pytest.mark.parametrize("layers", ["0:4", ":4", "0:6"])
def test_the_first_layers_are_enough(layers: str, ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    answer = ask("find", planted_checkpoint, "--layers", layers, "--format", "jsonl", "--out", tmp_path / "run.jsonl")
    assert [each["coordinate"] for each in candidates(answer)] == [PLANTED]
    run, records = read_records(tmp_path / "run.jsonl")
    assert run.settings["layers"] == layers
    seen = {each.layer for each in records if isinstance(each, ActivationPeakRecord)}
    assert seen == set(range(int(layers[-1])))


@pytest.mark.parametrize(
    ("layers", "says"),
    [("0:3", "it appears in layer 2, after which no layer ran: run more layers"), ("0:2", "the bar is")],
)
def test_too_few_layers_find_nothing_and_say_so(layers: str, says: str, ask: Ask, planted_checkpoint: Path) -> None:
    answer = ask("find", planted_checkpoint, "--layers", layers)
    assert (answer.status, answer.out.splitlines()[0][:29]) == (0, "No super weight candidate in ")
    assert says in answer.out


def test_a_prompt_is_added_to_the_built_in_ones(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    ask("find", planted_checkpoint, "--prompt", "one [red]", "--prompt=-two", "--out", tmp_path / "run.jsonl")
    prompts = [each for each in read_records(tmp_path / "run.jsonl")[1] if isinstance(each, PromptRecord)]
    assert [(each.text, each.bos) for each in prompts[-4:]] == [
        ("one [red]", False),
        ("one [red]", True),
        ("-two", False),
        ("-two", True),
    ]
    assert len(prompts) == 6 + 4


@pytest.mark.parametrize("words", [("--massive-ratio", "1000"), ("--term-share", "1.5"), ("--output-ratio", "1e6")])
def test_a_threshold_from_the_command_line_counts(words: tuple[str, ...], ask: Ask, planted_checkpoint: Path) -> None:
    assert candidates(ask("find", planted_checkpoint, "--format", "jsonl", *words)) == []


def test_residencies_give_the_same_bytes(ask: Ask, planted_checkpoint: Path) -> None:
    answers = [ask("find", planted_checkpoint, "--residency", each) for each in ("streamed", "resident")]
    assert answers[0] == answers[1]
    lines = [
        ask("find", planted_checkpoint, "--residency", each, "--format", "jsonl").out
        for each in ("streamed", "resident")
    ]
    assert lines[0] == lines[1]


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX pseudo-terminal")
def test_a_terminal_sees_a_bar_with_layers_and_speed(
    planted_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from superweights.cli import main

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    ours, theirs = os.openpty()
    drawn: list[bytes] = []

    def listen() -> None:
        try:
            while block := os.read(ours, 4096):
                drawn.append(block)
        except OSError:  # Linux's way to say that the other end is closed
            pass

    listener = threading.Thread(target=listen)
    listener.start()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert main(["find", str(planted_checkpoint)]) == 0
    listener.join()
    os.close(ours)
    screen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", b"".join(drawn).decode())
    assert "forward pass" in screen
    assert "6/6 layers" in screen
    assert "GB/s" in screen
    assert "6/6" not in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="raises a POSIX signal")
def test_ctrl_c_in_the_middle_leaves_no_file(
    ask: Ask, planted_checkpoint: Path, tmp_path: Path, during_pass: Callable[..., None]
) -> None:
    during_pass(3, lambda: signal.raise_signal(signal.SIGINT))
    answer = ask("find", planted_checkpoint, "--out", tmp_path / "run.jsonl", "--plot", tmp_path / "peaks.svg")
    assert (answer.status, answer.out, answer.err) == (130, "", "superweights: interrupted\n")
    assert list(tmp_path.iterdir()) == []
    assert ask("find", planted_checkpoint).status == 0  # nothing is left attached or locked


def test_ctrl_c_while_writing_keeps_the_file_before(
    ask: Ask, planted_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run.jsonl"
    out.write_text("from yesterday\n")

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    assert ask("find", planted_checkpoint, "--out", out).status == 130
    assert [each.name for each in tmp_path.iterdir()] == ["run.jsonl"]
    assert out.read_text() == "from yesterday\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_line_and_does_not_cost_the_answer(ask: Ask, planted_checkpoint: Path) -> None:
    answer = ask("find", planted_checkpoint, "--out", "/dev/full")
    assert answer.status == 3
    assert answer.err.startswith("superweights: error: Cannot write /dev/full: No space left on device.")
    assert answer.err.count("\n") == 1
    assert PLANTED in answer.out
