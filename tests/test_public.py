"""The public list: every name is there and explained, and every example in a docstring is right."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType

import pytest

import superweights as sw

NAMES = [
    "superweights",
    *(each.name for each in pkgutil.walk_packages(sw.__path__, "superweights.") if "__main__" not in each.name),
]
EXAMPLE_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def test_the_list_is_sorted_and_has_no_name_twice():
    assert sw.__all__ == sorted(set(sw.__all__))


@pytest.mark.parametrize("name", sw.__all__)
def test_a_public_name_is_there_and_explained(name):
    found = getattr(sw, name)
    assert found.__name__ == name
    assert found.__module__.startswith("superweights.")
    assert len(inspect.getdoc(found) or "") > 20


@pytest.mark.parametrize("name", [each for each in sw.__all__ if inspect.isclass(getattr(sw, each))])
def test_a_public_class_explains_its_methods(name):
    public = [each for each in vars(getattr(sw, name)).items() if not each[0].startswith("_")]
    methods = [
        (key, value) for key, value in public if inspect.isroutine(value) or isinstance(value, property | classmethod)
    ]
    assert not [key for key, value in methods if not inspect.getdoc(getattr(value, "__func__", value))]


@pytest.mark.parametrize("name", [each for each in sw.__all__ if dataclasses.is_dataclass(getattr(sw, each))])
def test_a_public_dataclass_explains_its_fields(name):
    found = getattr(sw, name)
    [tree] = ast.parse(inspect.getsource(found)).body
    assert isinstance(tree, ast.ClassDef)
    explained = {
        field.target.id
        for field, after in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
    }  # fmt: skip
    assert {each.name for each in dataclasses.fields(found)} == explained


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'superweights' has no attribute 'fnd'"):
        _ = sw.fnd


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(sw.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    seen = {each.name for node in imports if (node.module or "").startswith("superweights.") for each in node.names}
    assert seen == set(sw.__all__)


def test_the_version_is_one():
    from importlib.metadata import version

    assert version("superweights") == sw.__version__


def examples(module: ModuleType) -> list[doctest.DocTest]:
    return [each for each in doctest.DocTestFinder().find(module) if each.examples]


@pytest.mark.parametrize("name", NAMES)
def test_docstring_examples_are_right(name, planted_checkpoint, tmp_path, monkeypatch):
    """An example may use `example_checkpoint`, a small llama with a super weight at 2:49:7."""
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=EXAMPLE_FLAGS)
    report: list[str] = []
    for each in examples(importlib.import_module(name)):
        each.globs["example_checkpoint"] = planted_checkpoint
        runner.run(each, out=report.append)
    assert not runner.failures, "".join(report)


def test_examples_are_found_at_all():
    assert sum(len(examples(importlib.import_module(name))) for name in NAMES) >= 8
