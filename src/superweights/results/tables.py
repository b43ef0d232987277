"""Records as plain rows and as text that other programs read. What a terminal shows belongs to the command line."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from superweights.results.records import Record, Run

SCREEN_COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": ("index", "bos", "text"),
    "activation_peak": ("layer", "expert", "side", "value", "channel", "prompt", "token", "token_text", "round"),
    "residual_peak": ("layer", "value", "channel", "median", "prompt", "token", "token_text", "edit"),
    "persistence": ("prompt_text", "layer", "channel", "value", "token", "token_text"),
    "candidate": (
        "coordinate",
        "value",
        "rank",
        "input_peak",
        "output_peak",
        "share",
        "stream_share",
        "persistence",
        "super_activation",
        "prompt",
        "token",
        "token_text",
        "round",
        "set",
    ),
    "note": ("level", "text"),
    "measurement": ("condition", "name", "subject", "value", "unit", "standard_error", "interval", "count", "dataset"),
    "verdict": ("weights", "label", "ratio", "interval", "without", "null_maximum", "count"),
    "audit": (
        "coordinate",
        "verdict",
        "format",
        "original",
        "stored",
        "error",
        "error_steps",
        "clipped",
        "block_error",
    ),
}
"""The fields of each record type that a narrow table shows, in reading order."""


def to_rows(records: Iterable[Record]) -> list[dict[str, Any]]:
    """One dict per record: every field, in the order of the schema, numbers as numbers."""
    return [record.model_dump() for record in records]


def to_csv(records: Iterable[Record]) -> str:
    """CSV with a header; mixed record types share the columns that they have in common.

    None is an empty cell; a list or a dict is written as JSON.
    """
    rows = [record.model_dump(mode="json") for record in records]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if columns:
        writer.writerow(columns)
    writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)
    return text.getvalue()


def to_json(run: Run, records: Sequence[Record]) -> str:
    """One JSON array: the run, then the records."""
    lines = [each.model_dump(mode="json") for each in (run, *records)]
    return json.dumps(lines, ensure_ascii=False, indent=2) + "\n"


def _cell(value: object) -> object:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
