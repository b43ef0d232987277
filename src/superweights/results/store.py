"""Result files: JSON lines, the run first, then one record per line.

A file is whole or not there: it is written beside its place and renamed. Reading names the file, the line and the field
of whatever does not fit; a record type that this version does not know is skipped with a warning.
"""

import logging
import os
import secrets
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from superweights.errors import RecordError
from superweights.results.records import SCHEMA_VERSION, Record, Run

STANDARD_STREAM = "-"
"""The path that means stdin or stdout."""

_FIRST_LINE = "A result file starts with a line that describes its run."
_log = logging.getLogger(__name__)
_RECORD: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="type")])


class _Header(BaseModel):
    """What every schema version has in its first line."""

    type: Literal["run"]
    schema_version: int


def write_records(path: str | Path, run: Run, records: Iterable[Record]) -> None:
    """Writes a result file, whole or not at all.

    Args:
        path: where to; "-" is stdout.
        run: the first line.
        records: the other lines; may be a generator. When it raises, nothing is written.

    Raises:
        RecordError: the file cannot be written.
    """
    content = "".join(encode_lines(run, records)).encode()
    if str(path) == STANDARD_STREAM:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    else:
        replace_file(path, content)


def read_records(path: str | Path) -> tuple[Run, list[Record]]:
    """The run and the records of a result file.

    Args:
        path: where from; "-" is stdin.

    Raises:
        RecordError: the file cannot be read, or a line does not fit the schema.
    """
    if str(path) == STANDARD_STREAM:
        return decode_lines(sys.stdin.buffer, source="stdin")
    try:
        with Path(path).open("rb") as file:
            return decode_lines(file, source=str(path))
    except OSError as error:
        raise RecordError(
            f"Cannot read the result file {path}: {error.strerror}. Give a file that a command wrote with --out."
        ) from error


def encode_lines(run: Run, records: Iterable[Record]) -> Iterator[str]:
    """The lines of a result file, each with its newline; of this schema version, whatever version they were read from."""
    yield run.model_copy(update={"schema_version": SCHEMA_VERSION}).model_dump_json() + "\n"
    for record in records:
        yield record.model_dump_json() + "\n"


def decode_lines(lines: Iterable[bytes], *, source: str) -> tuple[Run, list[Record]]:
    """The run and the records in the lines of a result file.

    Args:
        lines: one JSON object each; blank ones are skipped.
        source: the file's name, for messages.

    Raises:
        RecordError: a line does not fit the schema.
    """
    numbered = [(f"{source}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise RecordError(f"Cannot read {source}: it is empty. {_FIRST_LINE}")
    run = _decode_run(numbered[0][1], place=numbered[0][0])
    unknown: Counter[str] = Counter()
    found = [_decode_record(line, place=place, unknown=unknown) for place, line in numbered[1:]]
    for name, count in unknown.items():
        _log.warning("%s: skipped %d of the unknown record type %r; a newer version may know it", source, count, name)
    return run, [record for record in found if record is not None]


def replace_file(path: str | Path, content: bytes) -> None:
    """Puts `content` in the place of whatever was at `path`, in one step.

    Raises:
        RecordError: the file cannot be written; what was at `path` is still there.
    """
    target = Path(path)
    try:
        if target.exists() and not target.is_file():  # a device or a pipe takes bytes, and must not be renamed over
            target.write_bytes(content)
        else:
            _write_beside(target.resolve(), content)
    except OSError as error:
        raise RecordError(
            f"Cannot write {path}: {error.strerror}. Give a file in a folder that you can write."
        ) from error


def _write_beside(target: Path, content: bytes) -> None:
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def _decode_run(line: bytes, *, place: str) -> Run:
    try:
        version = _Header.model_validate_json(line).schema_version
        if version > SCHEMA_VERSION:
            raise RecordError(
                f"Cannot read {place}: it has schema version {version}, and this superweights reads up to "
                f"{SCHEMA_VERSION}. Use a newer superweights."
            )
        return Run.model_validate_json(line)
    except ValidationError as error:
        raise RecordError(f"Cannot read {place}: {_faults(error)}. {_FIRST_LINE}") from error


def _decode_record(line: bytes, *, place: str, unknown: Counter[str]) -> Record | None:
    """The record of a line; None, counted in `unknown`, where its type is not known."""
    try:
        return _RECORD.validate_json(line)
    except ValidationError as error:
        fault = error.errors()[0]
        if fault["type"] == "union_tag_invalid" and isinstance(fault["input"]["type"], str):
            unknown[fault["input"]["type"]] += 1
            return None
        raise RecordError(
            f"Cannot read {place}: {_faults(error, skip=1)}. docs/file-formats.md lists the fields."
        ) from error


def _faults(error: ValidationError, *, skip: int = 0) -> str:
    """What does not fit, field by field; `skip` drops the record type that leads each location."""
    return "; ".join(_fault(".".join(map(str, each["loc"][skip:])), each["msg"]) for each in error.errors())


def _fault(field: str, message: str) -> str:
    return f"field {field!r}: {message}" if field else message
