import csv
import io
import json
import math

from superweights.results.records import RECORD_CLASSES, NoteRecord
from superweights.results.tables import SCREEN_COLUMNS, to_csv, to_json, to_rows


def test_screen_columns_are_fields_of_every_record_type():
    assert list(SCREEN_COLUMNS) == list(RECORD_CLASSES)
    for name, columns in SCREEN_COLUMNS.items():
        assert set(columns) <= set(RECORD_CLASSES[name].model_fields)


def test_rows_keep_numbers(candidate):
    (row,) = to_rows([candidate.model_copy(update={"value": math.inf})])
    assert row["value"] == math.inf
    assert list(row) == list(type(candidate).model_fields)


def test_csv_of_mixed_records_is_read_back(records):
    text = to_csv(records)
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [row["type"] for row in rows] == ["prompt", "candidate", "note"]
    assert json.loads(rows[0]["token_texts"]) == ["<s>", "\n\u2028"]
    assert rows[1]["token_text"] == "\n\u2028"
    assert float(rows[1]["value"]) == -1.25
    assert rows[1]["expert"] == ""
    assert rows[0]["coordinate"] == ""
    assert rows[2]["level"] == "warning"


def test_csv_writes_non_finite_numbers_as_the_file_does(candidate):
    text = to_csv([candidate.model_copy(update={"value": -math.inf})])
    assert next(csv.DictReader(io.StringIO(text)))["value"] == "-inf"


def test_csv_of_nothing_is_empty():
    assert to_csv([]) == ""


def test_json_is_one_array_of_the_run_and_the_records(run, candidate):
    note = NoteRecord(level="info", text="мир")
    text = to_json(run, [candidate.model_copy(update={"value": math.nan}), note])
    lines = json.loads(text, parse_constant=lambda constant: constant == "no bare NaN")
    assert [each["type"] for each in lines] == ["run", "candidate", "note"]
    assert lines[1]["value"] == "nan"
    assert "мир" in text
