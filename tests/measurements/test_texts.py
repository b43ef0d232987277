import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from superweights.errors import HubError, UnknownNameError, UsageError
from superweights.measurements.texts import DEFAULT_TEXT, KNOWN_TEXTS, Text, read_text

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def digest(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def written(tmp_path: Path, name: str, content: str | bytes) -> str:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_the_embedded_text_is_there_and_long_enough():
    text = read_text(DEFAULT_TEXT)
    assert (text.name, len(text.documents)) == ("heldout", 1)
    assert 90_000 < len(text.whole.encode()) < 110_000
    assert text.digest == digest(text.whole)
    assert DEFAULT_TEXT in KNOWN_TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.raw", "a", "a.json.md"])
def test_any_other_file_is_one_document_as_it_stands(tmp_path, name):
    content = " = Title = \r\n\r\nfirst\u2028second \n"
    source = written(tmp_path, name, content)
    assert read_text(source) == Text(source, digest(content), (content,))


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert read_text(written(tmp_path, "a.txt", b"\xef\xbb\xbfabc")).whole == "abc"


ROWS = ["one\u2028line", "", "two\n\nparagraphs"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps([{"text": row, "url": 1} for row in ROWS], indent=2)),
        ("a.jsonl", "\n".join(json.dumps({"text": row}, ensure_ascii=False) for row in ROWS)),
        ("a.JSONL", "\r\n".join(json.dumps({"text": row}) for row in ROWS) + "\r\n\r\n"),
        ("a.json", "\n\n" + "\n".join(map(json.dumps, ROWS))),
    ],
)
def test_json_in_every_form_gives_the_same_documents(tmp_path, name, content):
    text = read_text(written(tmp_path, name, content))
    assert text.documents == tuple(ROWS)
    assert text.whole == "one\u2028line\n\n\n\ntwo\n\nparagraphs"
    assert text.digest == digest(text.whole)


def test_another_field_can_be_chosen(tmp_path):
    source = written(tmp_path, "a.jsonl", '{"text": "no", "content": "yes"}')
    assert read_text(f"{source}::content") == Text(f"{source}::content", digest("yes"), ("yes",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "{} is empty."),
        ("a.jsonl", "", "{} is empty."),
        ("a.txt", " \n\t\n", "There is no text in {}: its documents (1) hold nothing but white space."),
        ("a.json", "[]", "There is no text in {}: its documents (0) hold nothing but white space."),
        ("a.txt", b"abc\xffd", "{} is not UTF-8: byte 0xff at offset 3 (invalid start byte). Convert it to UTF-8."),
        (
            "a.txt",
            "ab".encode("utf-16"),
            "{} is not UTF-8: byte 0xff at offset 0 (invalid start byte). Convert it to UTF-8.",
        ),
        (
            "a.jsonl",
            '{"text": "a"}\n\n{"text": ',
            "Line 3 of {} is not JSON: Expecting value, at column 10. The file must hold one array, or one string or object "
            "per line.",
        ),
        (
            "a.json",
            '[\n"a",\n"b"\n',
            "Line 4 of {} is not JSON: Expecting ',' delimiter, at column 1. The file must hold one array, or one string or "
            "object per line.",
        ),
        (
            "a.json",
            '["a", 3]',
            "Item 2 of {} is of type int. A row must be a string, or an object with a string in its field 'text'.",
        ),
        (
            "a.jsonl",
            '{"text": null}',
            "Line 1 of {} has a NoneType in its field 'text'. A row must be a string, or an object with a string in its "
            "field 'text'.",
        ),
        (
            "a.json",
            r'["a\ud800"]',
            r"The text of {} has '\ud800' as character 1: half of a surrogate pair. Write the whole character, or remove it.",
        ),
    ],
)
def test_a_broken_file_is_refused(tmp_path, name, content, message):
    source = written(tmp_path, name, content)
    with pytest.raises(UsageError) as caught:
        read_text(source)
    assert str(caught.value) == message.format(source)


@pytest.mark.parametrize("row", ["1" * 5000, "[" * 100_000])
def test_json_that_python_gives_up_on_is_refused(tmp_path, row):
    with pytest.raises(UsageError, match=r"cannot be read as JSON, at line 2 or after it"):
        read_text(written(tmp_path, "a.jsonl", f'"a"\n{{"text": {row}'))


def test_an_unknown_field_names_near_ones(tmp_path):
    source = written(tmp_path, "a.jsonl", '{"text": "a", "contents": "b"}\n')
    with pytest.raises(UnknownNameError) as caught:
        read_text(f"{source}::content")
    assert str(caught.value) == f"Line 1 of {source}: There is no field 'content'. Did you mean 'contents'?"


@pytest.mark.parametrize("name", ["a.txt", "a.json"])
def test_a_field_where_there_are_none_is_refused(tmp_path, name):
    with pytest.raises(UsageError, match=r"`::content` is for|in its field 'content'"):
        read_text(written(tmp_path, name, '["abc"]') + "::content")


def test_a_known_text_has_no_field():
    with pytest.raises(UsageError, match=r"heldout has no field to choose\. `::text` is for"):
        read_text("heldout::text")


@pytest.mark.parametrize(
    ("source", "ask"),
    [
        ("wikitxt2", "Did you mean 'wikitext2'?"),
        ("none/such.txt", "Known: 'c4', 'heldout', 'lambada', 'wikitext2'."),
        ("", "Known: 'c4', 'heldout', 'lambada', 'wikitext2'."),
    ],
)
def test_an_unknown_name_or_path_is_refused(source, ask):
    with pytest.raises(UnknownNameError) as caught:
        read_text(source)
    assert str(caught.value) == f"There is no file or known text {source!r}. {ask}"


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"is a directory\. Give a file of text"):
        read_text(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("wikitext2", {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"}),
        (
            "c4",
            {
                "path": "allenai/c4",
                "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
                "split": "validation[:1100]",
            },
        ),
        ("lambada", {"path": "EleutherAI/lambada_openai", "name": "default", "split": "test"}),
    ],
)
def test_a_data_set_of_the_hub_comes_through_datasets(monkeypatch, name, asked):
    def load_dataset(**request: Any) -> dict[str, list[str]]:
        assert request == asked
        return {"text": ["a", "", "b"]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_text(name) == Text(name, digest("a\n\n\n\nb"), ("a", "", "b"))


@pytest.mark.parametrize("error", [ConnectionError("no route.\nmore"), ValueError("no route"), KeyError("no route")])
def test_without_a_network_the_error_says_what_to_do(monkeypatch, error):
    def load_dataset(**_: Any) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(HubError) as caught:
        read_text("wikitext2")
    assert str(caught.value).replace("'", "") == (
        "Cannot fetch wikitext2 (Salesforce/wikitext, wikitext-2-raw-v1, test) from the Hub: no route. Check the network, or "
        "give the text as a local file (.txt, .json, .jsonl or .parquet)."
    )


@pytest.mark.parametrize(("source", "package"), [("wikitext2", "datasets"), ("a.parquet", "pyarrow")])
def test_a_missing_package_is_named(monkeypatch, tmp_path, source, package):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "a.parquet", "x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"needs the package {package}: .*`pip install superweights\[eval\]`"):
        read_text(source)


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow, of the extra eval, is not installed")
    arrow = pytest.importorskip("pyarrow")
    path = str(tmp_path / "a.parquet")
    parquet.write_table(arrow.table({"text": ["a", "b"], "other": ["c", "d"], "count": [1, 2]}), path)
    assert read_text(path).documents == ("a", "b")
    assert read_text(f"{path}::other").documents == ("c", "d")
    with pytest.raises(UnknownNameError, match=r"There is no column 'txt'\. Did you mean 'text'\?"):
        read_text(f"{path}::txt")
    with pytest.raises(UsageError, match=r"Row 1 of .* has a int in its field 'count'"):
        read_text(f"{path}::count")


def test_a_broken_parquet_file_is_refused(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow, of the extra eval, is not installed")
    with pytest.raises(UsageError, match="cannot be read as Parquet"):
        read_text(written(tmp_path, "a.parquet", "PAR1 and no more"))


@pytest.mark.skipif(not DATA.is_dir(), reason="there are no texts in ../shared/data")
@pytest.mark.parametrize(
    ("name", "documents"),
    [("wikitext2-test.raw", 1), ("c4-validation-700.jsonl", 700), ("tinystories-1000.json", 1000)],
)
def test_files_as_they_are_found_in_the_wild(name, documents):
    assert len(read_text(str(DATA / name)).documents) == documents
