import torch

import superweights as sw
from superweights.experiments.evaluation import evaluate_in_parts
from superweights.interventions.conditions import ORIGINAL, removal


def test_references_hold_the_states_of_the_original_alone(own_text):
    references: list[torch.Tensor] = []
    conditions = [ORIGINAL, removal([own_text.weight], name="removed")]
    with sw.load(own_text.directory) as model:
        list(evaluate_in_parts(model, own_text.windows, conditions, references=references))
    assert all(each.untyped_storage().nbytes() == each.nbytes for each in references)
