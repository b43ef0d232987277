import pytest

import superweights as sw
from superweights.errors import UsageError
from superweights.experiments.evaluation import evaluate
from superweights.experiments.quantization_budget import allocate
from superweights.interventions.conditions import ORIGINAL, Condition, QuantizeWeights
from superweights.quantization.scheme import Scheme

from .conftest import OwnText

SCHEME = Scheme.parse("int3-g16")


@pytest.fixture(scope="module")
def allocated(own_text: OwnText):
    with sw.load(own_text.directory) as model:
        found = allocate(model, own_text.windows, [own_text.weight], SCHEME, budget=7, fine=Scheme.parse("int8-g16"))
        uniform = Condition("uniform", (QuantizeWeights(SCHEME),))
        made = Condition("made", found.how([own_text.weight]))
        return found, evaluate(model, own_text.windows, [ORIGINAL, uniform, made])


def test_the_budget_is_kept_and_used(allocated) -> None:
    found, _ = allocated
    assert 6 < found.bits_per_weight <= 7


def test_more_bits_where_they_count_are_better_than_few_everywhere(allocated) -> None:
    _, evaluation = allocated
    _, uniform, made = evaluation.conditions
    assert evaluation.kl(made).value < 0.5 * evaluation.kl(uniform).value


def test_super_weights_come_first(own_text: OwnText) -> None:
    """With room for little more than one matrix as it is stored, that matrix holds the super weight."""
    with sw.load(own_text.directory) as model:
        found = allocate(model, own_text.windows, [own_text.weight], SCHEME, budget=6.0)
    left = [each for each in found.choices if each.scheme is None]
    assert [each.holds for each in left] == [(own_text.weight,)]
    assert found.how([own_text.weight])[0].keep == (own_text.weight,)


def test_a_budget_below_the_scheme_is_refused(own_text: OwnText) -> None:
    with (
        sw.load(own_text.directory) as model,
        pytest.raises(UsageError, match=r"int3-g16 alone takes 5"),
    ):
        allocate(model, own_text.windows, [], SCHEME, budget=3)
