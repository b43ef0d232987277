"""Rows on stdout: a table for people, JSON, JSON lines or CSV for programs."""

import csv
import io
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cyclopts import Parameter

OutputFormat = Literal["table", "json", "jsonl", "csv"]
Row = Mapping[str, Any]

_NEVER_WRAPPED = 24
"""Columns whose cells are at most this wide are not wrapped, so a coordinate stays in one piece."""


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class OutputSettings:
    """How a verb prints; part of every verb."""

    format: OutputFormat = "table"
    """What to print: a table for people, or one JSON array, JSON lines or CSV with all fields."""


DEFAULT_OUTPUT = OutputSettings()
"""What a verb prints when nothing is said."""


def write_rows(rows: Sequence[Row], *, format: Literal["json", "jsonl", "csv"]) -> None:
    """Writes rows for programs: all fields; non-finite numbers as "inf", "-inf" and "nan"."""
    if format == "json":
        text = json.dumps([_plain(row) for row in rows], ensure_ascii=False, indent=2) + "\n"
    elif format == "jsonl":
        text = "".join(json.dumps(_plain(row), ensure_ascii=False) + "\n" for row in rows)
    else:
        text = _csv([_plain(row) for row in rows])
    sys.stdout.write(text)


def write_table(rows: Sequence[Row], *, title: str | None = None, headers: bool = True) -> None:
    """Writes rows for people: one column per field that has a value in any row; nothing is ever cut off.

    On a terminal long texts wrap; in a pipe every row is one line.
    """
    from rich.table import Table

    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = {column: [cell_text(row.get(column)) for row in rows] for column in columns}
    columns = [column for column in columns if any(cells[column])]
    table = Table(box=None, pad_edge=False, show_header=headers, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        widest = max(map(len, cells[column]))
        numeric = all(isinstance(row.get(column), int | float | None) for row in rows)
        table.add_column(
            column.replace("_", " "),
            justify="right" if numeric else "left",
            no_wrap=widest <= _NEVER_WRAPPED,
            overflow="fold",
        )
    for number in range(len(rows)):
        table.add_row(*(_literal(cells[column][number]) for column in columns))
    write_text(f"{title}\n" if title else "")
    if columns:
        write_text(("\n" if title else "") + _rendered(table))


def write_text(text: str) -> None:
    """Writes text as it is."""
    sys.stdout.write(text)


def cell_text(value: object) -> str:
    """A value as a table shows it: six digits of a float, nothing for None.

    Example:
        >>> cell_text(-0.273437512), cell_text(None), cell_text([1, 2])
        ('-0.273438', '', '1, 2')
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {cell_text(each)}" for key, each in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(cell_text(each) for each in value)
    return str(value)


def with_interval(value: float, interval: tuple[float, float] | None) -> str:
    """A measured value in four digits, with its 95 % interval in brackets where it has one.

    Example:
        >>> with_interval(5.67, (5.5, 5.9)), with_interval(4.125, None)
        ('5.67 (5.5 to 5.9)', '4.125')
    """
    return f"{value:.4g}" if interval is None else f"{value:.4g} ({interval[0]:.4g} to {interval[1]:.4g})"


def _rendered(table: Any) -> str:
    """A rich table as text: styled and fitted on a terminal, plain and as wide as needed in a pipe."""
    from rich.console import Console
    from rich.measure import Measurement

    terminal = sys.stdout.isatty()
    # Rich writes to a buffer: its own handling of a closed pipe would end the program with the status for "no".
    console = Console(file=io.StringIO(), force_terminal=terminal, width=1_000_000)
    needed = Measurement.get(console, console.options, table)
    width = max(shutil.get_terminal_size().columns, needed.minimum) if terminal else needed.maximum
    console.width = max(width, 1)
    with console.capture() as capture:
        console.print(table)
    return "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())


def _literal(text: str) -> Any:
    """Text that rich takes as it is: square brackets are no markup."""
    from rich.text import Text

    return Text(text)


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    columns = list(dict.fromkeys(column for row in rows for column in row))
    writer = csv.writer(text, lineterminator="\n")
    if columns:
        writer.writerow(columns)
    writer.writerows([_csv_cell(row.get(column)) for column in columns] for row in rows)
    return text.getvalue()


def _csv_cell(value: object) -> object:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def _plain(value: Any) -> Any:
    """Makes a value what JSON holds: lists and dicts, and texts for non-finite numbers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
