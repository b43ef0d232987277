"""The paper's way: largest input and largest output of each down projection, each on its own."""

import pytest
import torch
from building import TOKENIZER, quiet_llama

from superweights.coordinates import Coordinate
from superweights.detection.paper import SPIKE, find_by_peaks
from superweights.model.loading import load
from superweights.model.prompts import Prompt
from superweights.model.tracing import ActivationPeak, Trace
from superweights.testing import tiny_model

PROMPTS = (Prompt("ab", False, (4, 5), ("a", "b")), Prompt("cd", False, (6, 7), ("c", "d")))


def peaks(layer: int, spike_in: float, spike_out: float, *, expert: int | None = None) -> list[ActivationPeak]:
    """Input on channel 7 at prompt 0, token 0; output on channel 20 at prompt 1, token 1."""
    module = f"model.layers.{layer}.mlp.{'down_proj' if expert is None else 'experts'}"
    return [
        ActivationPeak(layer, expert, module, "input", spike_in, 7, 0, 0),
        ActivationPeak(layer, expert, module, "output", spike_out, 20, 1, 1),
    ]


def found_in(*pairs: list[ActivationPeak], family: str = "llama") -> tuple:
    every = tuple(peak for pair in pairs for peak in pair)
    trace = Trace(PROMPTS, ((0, 0), (0, 1), (1, 0), (1, 1)), torch.ones(7, 4, 64), True, every, ())
    with load(tiny_model(family), tokenizer=TOKENIZER) as model:
        return find_by_peaks(model, trace)


def test_the_threshold_is_that_of_the_papers_code() -> None:
    assert SPIKE == 50


@pytest.mark.parametrize(
    ("spike_in", "spike_out", "found"),
    [(51, 51, 1), (-51, 51, 1), (51, -51, 1), (-51, -51, 1), (50, 51, 0), (51, 50, 0), (-50, -50, 0), (1e5, 49, 0)],
)
def test_both_sides_must_exceed_it(spike_in: float, spike_out: float, found: int) -> None:
    assert len(found_in(peaks(2, spike_in, spike_out))) == found


def test_row_from_the_output_and_col_from_the_input_whatever_their_tokens() -> None:
    (candidate,) = found_in(peaks(2, -100, 400))
    assert candidate.coordinate == Coordinate(2, None, 20, 7)
    assert (candidate.input, candidate.output) == (-100, 400)
    assert (candidate.prompt, candidate.token) == (1, 1)  # that of the output
    weight = tiny_model("llama").model.layers[2].mlp.down_proj.weight[20, 7].item()
    assert candidate.value == weight
    assert candidate.share == pytest.approx(weight * -100 / 400)


def test_what_it_does_not_look_at_is_none() -> None:
    (candidate,) = found_in(peaks(2, 100, 400))
    assert (candidate.super_activation, candidate.median, candidate.stream_share, candidate.persistence) == (None,) * 4
    assert candidate.round == 0


def test_the_largest_output_comes_first() -> None:
    found = found_in(peaks(1, 900, 60), peaks(4, 60, -900), peaks(5, 60, 300))
    assert [each.coordinate.layer for each in found] == [4, 5, 1]


def test_experts_are_paired_one_by_one() -> None:
    found = found_in(
        peaks(1, 100, 40, expert=0), peaks(1, 40, 100, expert=1), peaks(1, 100, 100, expert=3), family="mixtral"
    )
    assert [str(each.coordinate) for each in found] == ["1/3:20:7"]


def test_it_does_not_leave_out_the_last_layer() -> None:
    """Its known fault, kept: removers and final spikes pass."""
    assert [each.coordinate.layer for each in found_in(peaks(5, 100, 100))] == [5]


def test_nothing_beyond_the_threshold() -> None:
    assert found_in(peaks(2, 3, 4)) == ()
    with load(quiet_llama(), tokenizer=TOKENIZER) as model:
        assert find_by_peaks(model, Trace(PROMPTS, (), torch.ones(7, 0, 64), True, (), ())) == ()
