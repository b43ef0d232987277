import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from superweights.errors import RecordError
from superweights.results import store
from superweights.results.records import RECORD_CLASSES, SCHEMA_VERSION, Record, Run
from superweights.results.store import read_records, replace_file, write_records

SCHEMA_1, SCHEMA_2, SCHEMA_3 = (Path(__file__).with_name(f"schema-{version}.jsonl") for version in (1, 2, 3))


def test_a_file_survives_the_trip(tmp_path, run, records):
    path = tmp_path / "run.jsonl"
    write_records(path, run, iter(records))
    assert read_records(path) == (run, records)
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_records_give_the_same_bytes(tmp_path, run, records):
    for name in ("a.jsonl", "b.jsonl"):
        write_records(tmp_path / name, run, records)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_a_file_of_this_schema_is_read_and_written(tmp_path):
    run, records = read_records(SCHEMA_3)
    assert run.schema_version == SCHEMA_VERSION == 3
    assert [each.type for each in records] == list(RECORD_CLASSES)
    write_records(tmp_path / "again.jsonl", run, records)
    assert (tmp_path / "again.jsonl").read_bytes() == SCHEMA_3.read_bytes()


def test_a_file_of_schema_1_is_still_read_and_becomes_one_of_this(tmp_path):
    run, records = read_records(SCHEMA_1)
    assert run.schema_version == 1
    assert (records[-1].type, records[-1].condition, records[-1].subject) == ("measurement", "original", "")
    write_records(tmp_path / "again.jsonl", run, records)
    again, same = read_records(tmp_path / "again.jsonl")
    assert (again.schema_version, same) == (SCHEMA_VERSION, records)


def test_a_file_of_schema_2_is_still_read():
    run, records = read_records(SCHEMA_2)
    assert (run.schema_version, records[-1].type) == (2, "verdict")


def test_dash_is_stdout_and_stdin(monkeypatch, capfdbinary, run, records):
    write_records("-", run, records)
    written = capfdbinary.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(written), encoding="ascii"))
    assert read_records("-") == (run, records)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError])
def test_an_interrupted_experiment_leaves_the_old_file_alone(tmp_path, run, records, interruption):
    def interrupted() -> Iterator[Record]:
        yield records[0]
        raise interruption

    path = tmp_path / "run.jsonl"
    path.write_text("old")
    with pytest.raises(interruption):
        write_records(path, run, interrupted())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_the_old_file_alone(monkeypatch, tmp_path, interruption):
    def interrupted(descriptor: int) -> None:
        raise interruption

    monkeypatch.setattr(store.os, "fsync", interrupted)
    path = tmp_path / "run.jsonl"
    path.write_text("old")
    with pytest.raises((KeyboardInterrupt, RecordError)):
        replace_file(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_keeps_pointing(tmp_path):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    replace_file(tmp_path / "link.jsonl", b"new")
    assert (tmp_path / "link.jsonl").is_symlink()
    assert (tmp_path / "real.jsonl").read_bytes() == b"new"


def test_a_pipe_takes_the_bytes_and_stays_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        replace_file(pipe, b"new")
        assert os.read(reader, 10) == b"new"
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def test_a_folder_that_is_not_there_is_named(tmp_path, run):
    with pytest.raises(RecordError, match=r"Cannot write .*nowhere/run\.jsonl: No such file"):
        write_records(tmp_path / "nowhere" / "run.jsonl", run, [])


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path, run):
    with pytest.raises(RecordError, match="Is a directory"):
        write_records(tmp_path, run, [])
    with pytest.raises(RecordError, match="Is a directory"):
        read_records(tmp_path)


def lines_of(run: Run, records: list[Record]) -> list[str]:
    return [each.model_dump_json() for each in (run, *records)]


def read_text(tmp_path: Path, text: str) -> tuple[Run, list[Record]]:
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    return read_records(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sahre": 1}, r"run\.jsonl, line 3: field 'sahre': Extra inputs"),
        ({"layer": "two"}, r"run\.jsonl, line 3: field 'layer': Input should be a valid integer"),
        ({"layer": True}, r"field 'layer'"),
        ({"value": "big"}, r"field 'value'"),
        ({"persistence": 1.5}, r"field 'persistence'"),
        ({"coordinate": "2:1:1"}, r"line 3: .*'2:1:1' contradicts"),
        ({"type": None}, r"line 3: Input tag 'None'"),
    ],
)
def test_a_field_that_does_not_fit_is_named(tmp_path, run, records, change, message):
    lines = lines_of(run, records)
    lines[2] = json.dumps(json.loads(lines[2]) | change)
    with pytest.raises(RecordError, match=message):
        read_text(tmp_path, "\n".join(lines))


def test_a_missing_field_is_named(tmp_path, run, records):
    lines = lines_of(run, records)
    lines[2] = json.dumps({key: value for key, value in json.loads(lines[2]).items() if key != "rank"})
    with pytest.raises(RecordError, match=r"line 3: field 'rank': Field required"):
        read_text(tmp_path, "\n".join(lines))


def test_unknown_types_are_skipped_with_one_warning(tmp_path, run, records, caplog):
    lines = lines_of(run, records)
    lines[2:2] = ['{"type":"prophecy","label":"critical"}'] * 2
    with caplog.at_level(logging.WARNING):
        assert read_text(tmp_path, "\n".join(lines)) == (run, records)
    assert [each.getMessage().split(": ", 1)[1] for each in caplog.records] == [
        "skipped 2 of the unknown record type 'prophecy'; a newer version may know it"
    ]


def test_a_newer_schema_is_refused(tmp_path, run):
    line = json.dumps(json.loads(run.model_dump_json()) | {"schema_version": 4, "new": 1})
    with pytest.raises(RecordError, match=r"line 1: it has schema version 4, .* reads up to 3\. Use a newer"):
        read_text(tmp_path, line)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("\n\n", "it is empty"),
        ("{", "line 1: Invalid JSON"),
        ("[1, 2]", "line 1: Input should be an object"),
        ('{"type":"note","level":"info","text":"x"}', "line 1: field 'type'"),
        ('\n{"type":"run","schema_version":1}', "line 2: field 'command': Field required"),
        ("[" * 100_000, "line 1: Invalid JSON"),
    ],
)
def test_what_is_no_result_file_is_refused(tmp_path, text, message):
    with pytest.raises(RecordError, match=message):
        read_text(tmp_path, text)


def test_a_truncated_file_is_refused(tmp_path, run, records):
    text = "\n".join(lines_of(run, records))
    with pytest.raises(RecordError, match="line 4: Invalid JSON: EOF"):
        read_text(tmp_path, text[:-10])


def test_bytes_that_are_no_text_are_refused(tmp_path, run):
    path = tmp_path / "run.jsonl"
    path.write_bytes(run.model_dump_json().encode() + b"\n\xff\xfe\n")
    with pytest.raises(RecordError, match="line 2"):
        read_records(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RecordError, match=r"Cannot read the result file .*none\.jsonl: No such file"):
        read_records(tmp_path / "none.jsonl")
