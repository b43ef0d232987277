import re
import struct
from pathlib import Path

import pytest

from superweights.cli.demo import EMBEDDED
from superweights.results.records import CandidateRecord, PersistenceRecord, ResidualPeakRecord, VerdictRecord
from superweights.results.store import read_records

from .conftest import Answer, Ask


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def demo(folder: Path) -> Answer:
    """What `superweights demo` says in an empty folder; run once."""
    import contextlib
    import io

    from superweights.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["demo"])
    return Answer(status, out.getvalue(), err.getvalue())


def named(line: str) -> list[Path]:
    """The files that a line of the answer lists after its colon."""
    return [Path(each) for each in line.split(": ")[1].split(", ")]


def test_the_files_it_names_hold_pictures_and_records(demo: Answer, folder: Path) -> None:
    assert (demo.status, demo.err) == (0, "")
    pictures, records = (named(line) for line in demo.out.splitlines()[-2:])
    for picture in pictures:
        content = (folder / picture).read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        assert content[:8] == b"\x89PNG\r\n\x1a\n" and min(width, height) > 300
        assert len(content) > 20_000
    read = {each.stem: read_records(folder / each)[1] for each in records}
    synthetic = read["synthetic-llama-find"]
    assert [each.coordinate for each in synthetic if isinstance(each, CandidateRecord)] == ["2:49:7"]
    traced = read["synthetic-llama-trace"]
    assert {each.edit for each in traced if isinstance(each, ResidualPeakRecord)} == {"", "scale=0 on 2:49:7"}
    assert any(isinstance(each, PersistenceRecord) for each in traced)


def test_the_verdicts_are_about_what_was_found_in_the_trained_model(demo: Answer, folder: Path) -> None:
    records = {each.stem: read_records(folder / each)[1] for each in named(demo.out.splitlines()[-1])}
    found = [each.coordinate for each in records[f"{EMBEDDED}-find"] if isinstance(each, CandidateRecord)]
    judged = [each for each in records.get(f"{EMBEDDED}-verdicts", []) if isinstance(each, VerdictRecord)]
    assert [each.weights[0] for each in judged if each.kind == "single"] == found


def test_it_says_which_model_is_trained_and_which_is_synthetic(demo: Answer) -> None:
    first, *others = demo.out.splitlines()
    assert first.startswith("A small Llama, trained on books, in superweights-demo/tiny-books")
    assert any(
        each.startswith("Synthetic model in superweights-demo/synthetic-llama: random weights") for each in others
    )


def test_the_commands_it_prints_can_be_repeated(
    demo: Answer, folder: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    commands = [line.split()[2:] for line in demo.out.splitlines() if line.startswith("$ ")]
    assert {words[0] for words in commands} >= {"find", "trace"}
    for words in commands[-2:]:
        again = ask(*words)
        assert again.status == 0
        assert again.out in demo.out


def test_a_folder_that_cannot_be_made_is_one_line(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    answer = ask("demo", "--to", tmp_path / "file")
    assert (answer.status, answer.out) == (3, "")
    assert re.fullmatch(
        r"superweights: error: \[Errno 20\] Not a directory: '.*' \(-v gives the traceback\)\n", answer.err
    )
