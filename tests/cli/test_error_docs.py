import inspect
import re
from pathlib import Path

import pytest

from superweights import errors

TEXT = (Path(__file__).parents[2] / "docs" / "errors.md").read_text("utf-8")
CLASSES = {
    name: each
    for name, each in inspect.getmembers(errors, inspect.isclass)
    if issubclass(each, errors.SuperweightsError)
}
STATUS = {
    name: int(status)
    for section in TEXT.split("\n## ")
    for status in re.findall(r"^.*exit status (\d)$", section, re.MULTILINE)[:1]
    for name in re.findall(r"^### (\w+)$", section, re.MULTILINE)
}


def test_every_error_has_an_entry_and_every_entry_is_an_error() -> None:
    assert set(re.findall(r"^###? (\w*Error)$", TEXT, re.MULTILINE)) == set(CLASSES)


@pytest.mark.parametrize("name", sorted(STATUS))
def test_an_entry_stands_under_its_exit_status(name: str) -> None:
    assert CLASSES[name].exit_status == STATUS[name]


@pytest.mark.parametrize("name", sorted(name for name in CLASSES if not CLASSES[name].__subclasses__()))
def test_an_entry_says_cause_and_fix(name: str) -> None:
    entry = TEXT.split(f"### {name}\n")[1].split("\n##")[0]
    assert "**Cause.**" in entry and "**Fix.**" in entry


def test_the_tree_of_the_module_names_every_error() -> None:
    assert errors.__doc__ is not None
    assert set(re.findall(r"\w+Error", errors.__doc__)) == set(CLASSES)
