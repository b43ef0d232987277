"""Where the text of a measurement comes from: the package, a file, or a data set of the Hub.

A text is read whole and known by the digest of its bytes. The embedded text needs neither network nor further packages and
is the default; the data sets of the literature are fetched only when they are asked for by name.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

from superweights.errors import HubError, UnknownNameError, UsageError

DEFAULT_TEXT = "heldout"
"""The embedded text: passages of public-domain books, about 100 KB."""

_HUB_TEXTS: dict[str, dict[str, Any]] = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"},
    "c4": {
        "path": "allenai/c4",
        "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
        "split": "validation[:1100]",
    },
    "lambada": {"path": "EleutherAI/lambada_openai", "name": "default", "split": "test"},
}

KNOWN_TEXTS = (DEFAULT_TEXT, *_HUB_TEXTS)
"""Texts that have a name."""


@dataclass(frozen=True, slots=True)
class Text:
    """Text to measure on."""

    name: str
    """How it was asked for: a known name, or a path with its field."""
    digest: str
    """"sha256:" and the SHA-256 of `whole` in UTF-8; of a plain text file, that is what `sha256sum` prints."""
    documents: tuple[str, ...]
    """Its documents, empty ones included; a plain text file is one."""

    @classmethod
    def of(cls, name: str, documents: Iterable[str]) -> Self:
        r"""Makes a text of documents at hand.

        Raises:
            UsageError: there is nothing but white space, or something that UTF-8 cannot hold.

        Example:
            >>> Text.of("two", ["a", "b"]).whole
            'a\n\nb'
        """
        documents = tuple(documents)
        whole = _join(documents)
        if not whole or whole.isspace():
            raise UsageError(
                f"There is no text in {name}: its documents ({len(documents)}) hold nothing but white space."
            )
        try:
            digest = sha256(whole.encode()).hexdigest()
        except UnicodeEncodeError as error:
            raise UsageError(
                f"The text of {name} has {whole[error.start]!r} as character {error.start}: half of a surrogate pair. "
                "Write the whole character, or remove it."
            ) from error
        return cls(name, f"sha256:{digest}", documents)

    @property
    def whole(self) -> str:
        """The documents, joined by blank lines."""
        return _join(self.documents)


def _join(documents: Iterable[str]) -> str:
    return "\n\n".join(documents)


def read_text(source: str) -> Text:
    """Reads the text that a name or a path stands for; a name comes before a file that is called so.

    | `source` | text |
    | --- | --- |
    | `heldout` | the embedded text |
    | `wikitext2` | WikiText-2, raw, test split: every row is a document, as in GPTQ's scripts |
    | `c4` | C4, the first 1100 documents of the first validation file; GPTQ's scripts join them by spaces, not blank lines |
    | `lambada` | LAMBADA as OpenAI made it, test split |
    | a `.json` or `.jsonl` path | an array, or one row per line, of strings or of objects with a field "text" |
    | a `.parquet` path | its column "text" |
    | any other path | the whole file, in UTF-8 |

    `path::field` takes another field or column than "text".

    Raises:
        UnknownNameError: no such name or file, or no such field.
        UsageError: a file that holds no text, or not in the form its name promises, or a package that is missing.
        HubError: the data set cannot be fetched.
    """
    name, _, field = source.partition("::")
    if name not in KNOWN_TEXTS:
        return Text.of(source, _read_file(name, field))
    if field:
        raise UsageError(f"{name} has no field to choose. `::{field}` is for .json, .jsonl and .parquet files.")
    return Text.of(name, [_embedded()] if name == DEFAULT_TEXT else _fetch(name))


def _embedded() -> str:
    return files("superweights").joinpath("data", "heldout.txt").read_text("utf-8")


def _fetch(name: str) -> list[str]:
    datasets = _extra("datasets", f"The text {name}")
    try:
        return list(datasets.load_dataset(**_HUB_TEXTS[name])["text"])
    except Exception as error:  # the client, its HTTP library and its parsers raise classes without a common base
        tried = ", ".join(str(each) for each in _HUB_TEXTS[name].values())
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise HubError(
            f"Cannot fetch {name} ({tried}) from the Hub: {reason}. Check the network, or give the text as a local file "
            "(.txt, .json, .jsonl or .parquet)."
        ) from error


def _extra(module: str, purpose: str) -> Any:
    """A module of a package that is not installed with superweights."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UsageError(
            f"{purpose} needs the package {module.partition('.')[0]}: {error}. Install it with "
            "`pip install superweights[eval]`, or give the text as a .txt or .jsonl file."
        ) from error


def _read_file(name: str, field: str) -> list[str]:
    path = Path(name).expanduser()
    if not name or not path.exists():
        raise UnknownNameError.among("file or known text", name, KNOWN_TEXTS)
    if path.is_dir():
        raise UsageError(f"{path} is a directory. Give a file of text.")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_documents(path, field or "text")
    text = _decode(path)
    if suffix in (".json", ".jsonl"):
        return [_document(row, field, where) for where, row in _json_rows(text, path)]
    if field:
        raise UsageError(f"{path} is read whole: `::{field}` is for .json, .jsonl and .parquet files.")
    return [text]


def _decode(path: Path) -> str:
    content = path.read_bytes()
    if not content:
        raise UsageError(f"{path} is empty.")
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start} ({error.reason}). "
            "Convert it to UTF-8."
        ) from error


def _json_rows(text: str, path: Path) -> Iterator[tuple[str, object]]:
    """Each row and where it stands; only a newline ends a line, since a string may hold Unicode's other line ends."""
    if text.lstrip().startswith("["):
        yield from ((f"Item {number} of {path}", row) for number, row in enumerate(_parse(text, path, 1), 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"Line {number} of {path}", _parse(line, path, number)


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"Line {first_line + error.lineno - 1} of {path} is not JSON: {error.msg}, at column {error.colno}. The file "
            "must hold one array, or one string or object per line."
        ) from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, or brackets as deep
        raise UsageError(f"{path} cannot be read as JSON, at line {first_line} or after it: {error}.") from error


def _document(row: object, field: str, where: str) -> str:
    """The text of one row; an empty `field` takes strings, and the field "text" of objects."""
    name = field or "text"
    if isinstance(row, str) and not field:
        return row
    found = f"is of type {type(row).__name__}"
    if isinstance(row, dict):
        if name not in row:
            raise UnknownNameError(f"{where}: {UnknownNameError.among('field', name, row)}")
        if isinstance(row[name], str):
            return str(row[name])
        found = f"has a {type(row[name]).__name__} in its field {name!r}"
    raise UsageError(f"{where} {found}. A row must be a string, or an object with a string in its field {name!r}.")


def _parquet_documents(path: Path, field: str) -> list[str]:
    parquet = _extra("pyarrow.parquet", f"Reading {path}")
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            values = file.read(columns=[field])[field].to_pylist() if field in columns else []
    except (OSError, ValueError, NotImplementedError) as error:
        raise UsageError(f"{path} cannot be read as Parquet: {error}") from error
    if field not in columns:
        raise UnknownNameError(f"{path}: {UnknownNameError.among('column', field, columns)}")
    return [_document({field: value}, field, f"Row {number} of {path}") for number, value in enumerate(values, 1)]
