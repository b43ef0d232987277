import io
import subprocess
import sys

import pytest
from rich.console import Console

from superweights.progress import NO_PROGRESS, Progress, RichProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def report(progress: Progress) -> None:
    progress.start("reading [layers]", total=4, unit="layers")
    for _ in range(3):
        progress.advance(nbytes=10**9)
    progress.finish()
    progress.finish()


def drawn(file: io.StringIO) -> str:
    report(RichProgress(Console(file=file, force_terminal=True, width=120, color_system=None)))
    return file.getvalue()


def test_a_terminal_shows_task_steps_and_rate():
    text = drawn(Terminal())
    for part in ("reading [layers]", "3/4", "layers", "GB/s", "eta"):
        assert part in text


def test_no_rate_without_bytes():
    file = Terminal()
    progress = RichProgress(Console(file=file, force_terminal=True, width=120))
    progress.start("searching", total=None, unit="rounds")
    progress.advance()
    progress.finish()
    assert "1/?" in file.getvalue()
    assert "GB/s" not in file.getvalue()


def test_a_file_stays_empty_even_when_colours_are_forced(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert drawn(io.StringIO()) == ""


def test_a_second_task_takes_the_place_of_the_first():
    file = Terminal()
    progress = RichProgress(Console(file=file, force_terminal=True, width=120))
    progress.start("first", total=1, unit="layers")
    progress.start("second", total=7, unit="layers")
    progress.advance(5)
    progress.finish()
    assert "5/7" in file.getvalue()


@pytest.mark.parametrize("progress", [NO_PROGRESS, RichProgress(Console(file=io.StringIO()))])
def test_silence(progress, capsys):
    report(progress)
    assert capsys.readouterr() == ("", "")


def test_importing_imports_no_rich():
    code = "import sys, superweights.progress; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
