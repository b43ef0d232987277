import re
import struct
from pathlib import Path

import pytest

from superweights.results.records import CandidateRecord, PersistenceRecord, ResidualPeakRecord
from superweights.results.store import read_records

from .conftest import Answer, Ask


@pytest.fixture
def demo(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Answer:
    """What `superweights demo` says in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return ask("demo")


def named(line: str) -> list[Path]:
    """The files that a line of the answer lists after its colon."""
    return [Path(each) for each in line.split(": ")[1].split(", ")]


def test_the_files_it_names_hold_pictures_and_records(demo: Answer) -> None:
    assert (demo.status, demo.err) == (0, "")
    pictures, records = (named(line) for line in demo.out.splitlines()[-2:])
    assert [each.name for each in pictures] == ["peaks.png", "residual.png", "persistence.png"]
    for picture in pictures:
        content = picture.read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        assert content[:8] == b"\x89PNG\r\n\x1a\n" and min(width, height) > 500
        assert len(content) > 20_000
    assert [each.name for each in records] == ["find.jsonl", "trace.jsonl"]
    found, traced = (read_records(each)[1] for each in records)
    assert [each.coordinate for each in found if isinstance(each, CandidateRecord)] == ["2:49:7"]
    assert {each.edit for each in traced if isinstance(each, ResidualPeakRecord)} == {"", "scale=0 on 2:49:7"}
    assert any(isinstance(each, PersistenceRecord) for each in traced)


def test_it_says_that_the_model_is_synthetic_and_what_was_planted(demo: Answer) -> None:
    first, *others = demo.out.splitlines()
    assert first.startswith(
        "Synthetic model in superweights-demo/synthetic-llama: random weights, one super weight planted"
    )
    assert first.endswith("2:49:7.")
    assert others[1].startswith("$ superweights find ")
    assert others[2].startswith("1 super weight candidate")


def test_the_commands_it_prints_can_be_repeated(demo: Answer, ask: Ask) -> None:
    commands = [line.split()[2:] for line in demo.out.splitlines() if line.startswith("$ ")]
    assert [words[0] for words in commands] == ["find", "trace"]
    for words in commands:
        again = ask(*words)
        assert again.status == 0
        assert again.out in demo.out


def test_the_folder_can_be_chosen_and_used_twice(ask: Ask, tmp_path: Path) -> None:
    first, second = (ask("demo", "--to", tmp_path / "a b") for _ in range(2))
    assert first == second
    assert first.status == 0
    assert (tmp_path / "a b" / "peaks.png").is_file()


def test_a_folder_that_cannot_be_made_is_one_line(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    answer = ask("demo", "--to", tmp_path / "file")
    assert (answer.status, answer.out) == (3, "")
    assert re.fullmatch(
        r"superweights: error: \[Errno 20\] Not a directory: '.*' \(-v gives the traceback\)\n", answer.err
    )
