import csv
import io
import json
import math
import os
import re
from typing import Any

import pytest

from superweights.cli.output import write_rows, write_table

ROWS: list[dict[str, Any]] = [
    {"coordinate": "2:3968:7003", "value": -0.2734375, "sources": ["a, b", "c"], "note": None},
    {"coordinate": "13/127:12345:123456", "value": math.inf, "sources": [], "note": 'says "no" [bold]here[/bold]'},
]
PLAIN = [ROWS[0], ROWS[1] | {"value": "inf"}]


def test_json_is_one_array(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(ROWS, format="json")
    assert json.loads(capsys.readouterr().out) == PLAIN


def test_json_lines_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(ROWS, format="jsonl")
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == PLAIN


def test_csv_has_a_header_and_json_in_its_lists(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(ROWS, format="csv")
    first, second = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (first["coordinate"], first["value"], first["note"]) == ("2:3968:7003", "-0.2734375", "")
    assert (second["value"], second["note"]) == ("inf", ROWS[1]["note"])
    assert json.loads(first["sources"]) == ["a, b", "c"]


@pytest.mark.parametrize(("format", "text"), [("json", "[]\n"), ("jsonl", ""), ("csv", "")])
def test_no_rows_are_written_as_none(format: Any, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows([], format=format)
    assert capsys.readouterr().out == text


def test_a_table_in_a_pipe_has_one_line_a_row_and_cuts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"coordinate": "2:3968:7003", "note": "long " * 60}, {"coordinate": "3/82:511:40", "note": "[b]short[/b]"}]
    write_table(rows)
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["coordinate", "note"]
    assert first == "2:3968:7003  " + ("long " * 60).rstrip()
    assert second == "3/82:511:40  [b]short[/b]"


def test_a_table_leaves_out_columns_without_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    write_table([{"layer": 0, "expert": None, "top_token": "a"}])
    assert capsys.readouterr().out.split() == ["layer", "top", "token", "0", "a"]


def test_an_empty_table_is_its_title(capsys: pytest.CaptureFixture[str]) -> None:
    write_table([], title="None found.")
    assert capsys.readouterr().out == "None found.\n"


def test_a_coordinate_stays_whole_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((20, 24)))
    write_table([{"coordinate": "13/127:12345:123456", "note": "many words that do not fit at all"}])
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    assert any(line.startswith("13/127:12345:123456") for line in lines)
    assert "".join("".join(line[19:].split()) for line in lines) == "note" + "manywordsthatdonotfitatall"
