import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from superweights.results.records import RECORD_CLASSES, AuditRecord, CandidateRecord, MeasurementRecord, Record, Run

ROOT = Path(__file__).parents[2]

NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
INDICES = st.integers(0, 10**6)


def strategy_for(annotation: Any) -> st.SearchStrategy[Any]:
    """What may stand in a field, from its annotation."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return strategy_for(arguments[0])
    if origin is UnionType or str(origin) == "typing.Union":
        return st.one_of(*(strategy_for(each) for each in arguments))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return st.lists(strategy_for(arguments[0]), max_size=3).map(tuple)
        return st.tuples(*(strategy_for(each) for each in arguments))
    if origin is dict:
        values = st.one_of(st.none(), st.booleans(), INDICES, NUMBERS, TEXTS, st.lists(NUMBERS, max_size=2))
        return st.dictionaries(TEXTS, values, max_size=3)
    return {float: NUMBERS, int: INDICES, str: TEXTS, bool: st.booleans(), NoneType: st.none()}[annotation]


@st.composite
def records(draw: st.DrawFn) -> Record:
    record_class = draw(st.sampled_from(list(RECORD_CLASSES.values())))
    hints = get_type_hints(record_class, include_extras=True)
    fields = {name: draw(strategy_for(hints[name])) for name in record_class.model_fields}
    if record_class is CandidateRecord:
        expert = "" if fields["expert"] is None else f"/{fields['expert']}"
        fields["coordinate"] = f"{fields['layer']}{expert}:{fields['row']}:{fields['col']}"
        fields["rank"], fields["matrix_size"] = fields["rank"] + 1, fields["matrix_size"] + 1
        fields["persistence"] = draw(st.none() | st.floats(0, 1))
    if record_class is AuditRecord:
        fields["coordinate"] = "2/1:3:4"
        fields["block_size"] += 1
    return record_class(**fields)


@given(records())
def test_records_survive_json(record):
    line = record.model_dump_json()
    again = type(record).model_validate_json(line)
    assert again.model_dump_json() == line
    assert repr(again) == repr(record)  # unlike ==, equal for nan too
    json.loads(line, parse_constant=pytest.fail)  # strict JSON: no bare NaN or Infinity


def measurement(**changes: Any) -> MeasurementRecord:
    fields: dict[str, Any] = {
        "name": "perplexity",
        "unit": "1",
        "value": 5.5,
        "standard_error": None,
        "interval": None,
        "count": 10,
        "dataset": None,
        "dataset_digest": None,
        "intervention": {},
    }
    return MeasurementRecord(**(fields | changes))


def test_non_finite_numbers_are_texts_in_json_and_floats_in_python():
    record = measurement(value=math.inf, standard_error=math.nan, interval=(-math.inf, 1.0))
    line = json.loads(record.model_dump_json())
    assert (line["value"], line["standard_error"], line["interval"]) == ("inf", "nan", ["-inf", 1.0])
    again = MeasurementRecord.model_validate(line | {"interval": (line["interval"][0], 1.0)})
    assert again.value == math.inf
    assert again.standard_error is not None and math.isnan(again.standard_error)
    assert again.interval == (-math.inf, 1.0)


def test_free_form_data_is_held_as_json_gives_it_back():
    record = measurement(intervention={"scale": math.inf, "weights": ("2:3:4",)})
    assert record.intervention == {"scale": "inf", "weights": ["2:3:4"]}


@pytest.mark.parametrize("text", ["1.5", "Infinity", "", "-nan"])
def test_other_texts_are_no_numbers(text):
    with pytest.raises(ValidationError):
        measurement(value=text)


def test_records_are_frozen_and_closed():
    record = measurement()
    with pytest.raises(ValidationError):
        record.value = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError):
        measurement(valeu=1.0)


def test_a_candidate_cannot_name_two_weights(candidate):
    with pytest.raises(ValidationError, match=re.escape("contradicts layer, expert, row and col (2:3968:7003)")):
        CandidateRecord(**(candidate.model_dump() | {"coordinate": "2:7003:3968"}))


def test_every_type_and_field_is_documented():
    text = (ROOT / "docs/file-formats.md").read_text()
    for record_class in (Run, *RECORD_CLASSES.values()):
        name = record_class.model_fields["type"].default
        section = re.search(rf"^### `{name}`\n(.*?)(?=^##|\Z)", text, flags=re.M | re.S)
        assert section, f"docs/file-formats.md has no section {name}"
        documented = re.findall(r"^\| `(\w+)` \|", section[1], flags=re.M)
        assert documented == [field for field in record_class.model_fields if field != "type"]


def test_every_field_has_a_docstring():
    source = (ROOT / "src/superweights/results/records.py").read_text()
    bare = re.findall(r"^    (?!type:|model_config)(\w+): .*\n(?!    \"\"\")", source, flags=re.M)
    assert bare == []


def test_the_union_reads_every_class():
    adapter: TypeAdapter[Record] = TypeAdapter(Record)
    line = measurement().model_dump_json()
    assert isinstance(adapter.validate_json(line), MeasurementRecord)
    assert all(issubclass(each, BaseModel) for each in RECORD_CLASSES.values())


def test_results_import_neither_torch_nor_transformers():
    code = (
        "import sys, superweights.results.store, superweights.results.tables, superweights.results.provenance as p\n"
        "p.software_versions()\n"
        "sys.exit(bool({'torch', 'transformers', 'altair'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
