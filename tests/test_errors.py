import inspect
import re

import pytest

from superweights import errors
from superweights.errors import SuperweightsError, UnknownNameError, UsageError

CLASSES = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, SuperweightsError)]


def drawn_tree() -> dict[str, tuple[str, int]]:
    """Parent and exit status of each error, as the module's docstring draws them."""
    parents, tree = ["Exception"], {}
    status = [3]
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"    ([│ ]*[├└]── )?(\w+Error)\b(.*)", line)
        if match is None:
            continue
        depth = len(match[1] or "") // 4
        found = re.search(r"exit status (\d)", match[3])
        del parents[depth + 1 :], status[depth + 1 :]
        status.append(int(found[1]) if found else status[-1])
        tree[match[2]] = (parents[depth], status[-1])
        parents.append(match[2])
    return tree


def test_the_docstring_draws_the_tree():
    assert drawn_tree() == {each.__name__: (each.__base__.__name__, each.exit_status) for each in CLASSES}
    assert len(CLASSES) > 10


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_says_what_it_is_for(kind):
    assert inspect.getdoc(kind)
    assert str(kind("a message")) == "a message"


def test_only_usage_errors_exit_with_2():
    assert {each for each in CLASSES if each.exit_status == 2} == {
        each for each in CLASSES if issubclass(each, UsageError)
    }


@pytest.mark.parametrize(
    ("name", "known", "message"),
    [
        ("papr", ["residual", "paper"], "There is no method 'papr'. Did you mean 'paper'?"),
        ("xyz", ["residual", "paper"], "There is no method 'xyz'. Known: 'paper', 'residual'."),
        ("pape", ["paper2", "paper1"], "There is no method 'pape'. Did you mean 'paper2', 'paper1'?"),
    ],
)
def test_an_unknown_name_is_answered_with_near_ones(name, known, message):
    assert str(UnknownNameError.among("method", name, known)) == message
