"""The pure functions of detection on traces made by hand: 6 layers, 4 tokens, 16 channels, median |stream| of 1."""

from collections.abc import Mapping
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from superweights.coordinates import Coordinate
from superweights.detection.candidates import (
    Bars,
    Candidate,
    DetectionSettings,
    explain_none,
    find_candidates,
    group_sets,
)
from superweights.errors import UsageError
from superweights.model.prompts import Prompt
from superweights.model.tracing import Jump, Term, Trace

LAYERS, TOKENS, CHANNELS = 6, 4, 16
PROMPT = Prompt("abcd", False, (4, 5, 6, 7), ("a", "b", "c", "d"))
DEFAULT = DetectionSettings()


def term(coordinate: str, product: float, *, factor: float = 100.0) -> Term:
    """A product made of an input of `factor`."""
    return Term(Coordinate.parse(coordinate), "layers.mlp.down", product / factor, factor, product)


def jump(
    layer: int = 1,
    *,
    position: int = 2,
    channel: int = 5,
    before: float = 1.0,
    after: float = 401.0,
    output: float = 400.0,
    output_median: float = 1.0,
    terms: tuple[Term, ...] | None = None,
) -> Jump:
    terms = (term(f"{layer}:{channel}:9", 400.0),) if terms is None else terms
    return Jump(layer, position, channel, before, after, output, output_median, terms)


def trace_of(*jumps: Jump, values: Mapping[tuple[int, int, int], float] | None = None, complete: bool = True) -> Trace:
    """A stream of ones in which every jump lasts to the end; `values` overrides [stage, position, channel]."""
    stream = torch.ones(LAYERS + 1, TOKENS, CHANNELS)
    for each in jumps:
        stream[: each.layer + 1, each.position, each.channel] = each.before
        stream[each.layer + 1 :, each.position, each.channel] = each.after
    for place, value in (values or {}).items():
        stream[place] = value
    return Trace((PROMPT,), tuple((0, token) for token in range(TOKENS)), stream, complete, (), jumps)


def found_in(trace: Trace, settings: DetectionSettings = DEFAULT) -> list[str]:
    return [str(each.coordinate) for each in find_candidates(trace, Bars.of(trace, settings), settings)]


def held(*later: float, layer: int = 0) -> Trace:
    """A jump in `layer` to 401, with these values after the layers that follow."""
    values = {(layer + 2 + stage, 2, 5): value for stage, value in enumerate(later)}
    return trace_of(jump(layer), values=values)


# The evidence.


def test_a_candidate_carries_its_evidence() -> None:
    trace = trace_of(jump(), values={(4, 2, 5): 500.0})
    (candidate,) = find_candidates(trace, Bars.of(trace, DEFAULT), DEFAULT, round_number=3)
    assert candidate == Candidate(
        coordinate=Coordinate(1, None, 5, 9),
        module="layers.mlp.down",
        value=4.0,
        input=100.0,
        output=400.0,
        share=1.0,
        super_activation=500.0,
        median=1.0,
        stream_share=0.8,
        persistence=1.0,
        prompt=0,
        token=2,
        round=3,
        rank=0,
        matrix_size=0,
    )


def test_a_weight_is_listed_once_where_its_product_is_largest() -> None:
    small = jump(position=1, after=301.0, output=300.0, terms=(term("1:5:9", 300.0, factor=75.0),))
    trace = trace_of(small, jump(position=2))
    (candidate,) = find_candidates(trace, Bars.of(trace, DEFAULT), DEFAULT)
    assert (candidate.token, candidate.input) == (2, 100.0)


def test_the_strongest_comes_first() -> None:
    weak = jump(channel=6, after=301.0, output=300.0, terms=(term("1:6:9", 300.0),))
    assert found_in(trace_of(weak, jump())) == ["1:5:9", "1:6:9"]


def test_no_jump_no_candidate() -> None:
    assert found_in(trace_of()) == []


# What must not matter.


@given(st.integers(-30, 30), st.sampled_from([0.2, 0.34, 0.36, 0.9]))
def test_the_scale_of_the_stream_does_not_matter(power: int, share: float) -> None:
    scale = 2.0**power
    plain = jump(terms=(term("1:5:9", 400 * share), term("1:5:3", 400 * (1 - share))))
    scaled = jump(
        before=scale,
        after=401 * scale,
        output=400 * scale,
        output_median=scale,
        terms=tuple(replace(each, weight=each.weight * scale, product=each.product * scale) for each in plain.terms),
    )
    big = trace_of(scaled)
    big = replace(big, stream=torch.where(big.stream == 1, scale, big.stream))
    one, other = (find_candidates(each, Bars.of(each, DEFAULT), DEFAULT) for each in (trace_of(plain), big))
    assert [(each.coordinate, each.share, each.persistence, each.stream_share) for each in one] == [
        (each.coordinate, each.share, each.persistence, each.stream_share) for each in other
    ]
    assert found_in(big) == found_in(trace_of(plain))


@pytest.mark.parametrize(("weight", "value"), [(-1, 1), (1, -1), (-1, -1)])
def test_signs_do_not_matter(weight: int, value: int) -> None:
    sign = weight * value
    made = Term(Coordinate.parse("1:5:9"), "down", 4.0 * weight, 100.0 * value, 400.0 * sign)
    trace = trace_of(jump(before=sign, after=401.0 * sign, output=400.0 * sign, terms=(made,)))
    (candidate,) = find_candidates(trace, Bars.of(trace, DEFAULT), DEFAULT)
    assert (candidate.value, candidate.input, candidate.share) == (4.0 * weight, 100.0 * value, 1.0)
    assert candidate.super_activation == 401.0 * sign


def test_a_term_of_the_other_sign_is_not_decisive() -> None:
    both = jump(terms=(term("1:5:9", 600.0), term("1:5:8", -200.0)))
    assert found_in(trace_of(both)) == ["1:5:9"]


# The thresholds, each on both sides of its boundary.


@pytest.mark.parametrize(("after", "found"), [(50.0, []), (50.5, ["1:5:9"])])
def test_massive_ratio(after: float, found: list[str]) -> None:
    assert found_in(trace_of(jump(after=after, output=after, terms=(term("1:5:9", after),)))) == found


@pytest.mark.parametrize(("peak", "found"), [(4010.0, []), (4000.0, ["1:5:9"])])
def test_peak_share(peak: float, found: list[str]) -> None:
    assert found_in(trace_of(jump(), values={(3, 0, 0): peak})) == found


def test_the_peak_in_the_models_last_layer_sets_no_bar() -> None:
    assert found_in(trace_of(jump(), values={(LAYERS, 0, 0): 1e6})) == ["1:5:9"]
    assert found_in(trace_of(jump(), values={(LAYERS, 0, 0): 1e6}, complete=False)) == []


@pytest.mark.parametrize(("before", "found"), [(300.0, ["1:5:9"]), (300.5, [])])
def test_layer_share(before: float, found: list[str]) -> None:
    assert found_in(trace_of(jump(before=before, after=400.0))) == found


def test_layer_share_is_taken_of_the_plateau_that_follows() -> None:
    assert found_in(trace_of(jump(), values={(4, 2, 5): 1700.0})) == []


@pytest.mark.parametrize(("product", "found"), [(140.0, ["1:5:9"]), (139.0, [])])
def test_term_share(product: float, found: list[str]) -> None:
    assert found_in(trace_of(jump(terms=(term("1:5:9", product),)))) == found


@pytest.mark.parametrize(("median", "found"), [(40.0, ["1:5:9"]), (40.5, [])])
def test_output_ratio(median: float, found: list[str]) -> None:
    assert found_in(trace_of(jump(output_median=median))) == found


@pytest.mark.parametrize(("later", "found"), [(200.5, ["0:5:9"]), (200.4, [])])
def test_hold(later: float, found: list[str]) -> None:
    assert found_in(held(later, later, 1.0, 1.0)) == found


@pytest.mark.parametrize(("later", "found"), [((401.0, 401.0, 1.0, 1.0), ["0:5:9"]), ((401.0, 1.0, 1.0, 1.0), [])])
def test_persistence(later: tuple[float, ...], found: list[str]) -> None:
    assert found_in(held(*later)) == found


def test_a_value_that_changes_sign_holds() -> None:
    assert found_in(held(-401.0, -401.0, -401.0, -401.0)) == ["0:5:9"]


@pytest.mark.parametrize(("layer", "complete", "found"), [(3, True, 1), (4, True, 0), (4, False, 1), (5, False, 0)])
def test_a_jump_needs_a_later_layer_that_is_not_the_models_last(layer: int, complete: bool, found: int) -> None:
    assert len(found_in(trace_of(jump(layer), complete=complete))) == found


def test_frozen_bars_keep_out_what_a_lower_peak_would_let_in() -> None:
    weak = trace_of(jump(after=101.0, output=100.0, terms=(term("1:5:9", 100.0),)))
    bars = Bars.of(trace_of(values={(3, 0, 0): 4000.0}), DEFAULT)
    assert found_in(weak) == ["1:5:9"]
    assert find_candidates(weak, bars, DEFAULT) == ()


# Sets.


def candidate_at(text: str) -> Candidate:
    trace = trace_of(jump())
    (found,) = find_candidates(trace, Bars.of(trace, DEFAULT), DEFAULT)
    return replace(found, coordinate=Coordinate.parse(text))


@pytest.mark.parametrize(
    ("texts", "sizes"),
    [
        ([], []),
        (["1:5:9"], [1]),
        (["1:5:9", "1:6:9", "1:7:9"], [3]),
        (["1:5:9", "1:5:8"], [2]),
        (["1:5:9", "1:6:8"], [1, 1]),
        (["1:5:9", "1:6:8", "1:5:8"], [3]),
        (["1:5:9", "2:5:9"], [1, 1]),
        (["1/0:5:9", "1/1:5:9"], [1, 1]),
        (["1/0:5:9", "1:5:9"], [1, 1]),
        (["1/2:5:9", "1/2:5:8"], [2]),
    ],
)
def test_sets_share_a_row_or_a_column_of_one_matrix(texts: list[str], sizes: list[int]) -> None:
    groups = group_sets(tuple(candidate_at(text) for text in texts))
    assert [len(group) for group in groups] == sizes
    assert sorted(str(each.coordinate) for group in groups for each in group) == sorted(texts)


# Why there is none.


def reason_for(trace: Trace, settings: DetectionSettings = DEFAULT) -> str:
    assert found_in(trace, settings) == []
    return explain_none(trace, Bars.of(trace, settings), settings)


def test_none_because_nothing_is_massive() -> None:
    assert reason_for(trace_of(values={(3, 1, 4): -30.0})) == (
        "No super activation: the largest value of the residual stream is -30 (channel 4 after layer 2, token 'b'), "
        "30 medians; the bar is 50 medians."
    )


def test_none_because_it_comes_with_the_embedding() -> None:
    reason = reason_for(trace_of(values={(stage, 1, 4): 300.0 - stage for stage in range(LAYERS + 1)}))
    assert reason.startswith("A super activation without a super weight: 300 at channel 4 of the embedding output")
    assert reason.endswith("it comes with the embedding, from attention, or bit by bit.")


def test_none_because_attention_made_it() -> None:
    reason = reason_for(trace_of(jump(output=5.0, output_median=1.0)))
    assert "401 at channel 5 after layer 1, token 'c', 401 medians; no single layer's down projection" in reason


@pytest.mark.parametrize("terms", [(), (term("1:5:9", 0.0),)])
def test_none_because_a_layer_whose_down_projection_gives_nothing_made_it(terms: tuple[Term, ...]) -> None:
    reason = reason_for(trace_of(jump(output=0.0, output_median=0.0, terms=terms)))
    assert "no single layer's down projection makes it" in reason


def test_none_because_the_stream_is_all_zeros() -> None:
    silent = trace_of()
    reason = reason_for(replace(silent, stream=torch.zeros_like(silent.stream)))
    assert reason.startswith("No super activation: the largest value of the residual stream is 0 ")


def test_none_because_it_does_not_persist() -> None:
    assert reason_for(held(1.0, 1.0, 1.0, 1.0)).endswith("it does not persist in later layers.")


def test_none_because_too_few_layers_ran() -> None:
    assert "run more layers" in reason_for(trace_of(jump(5), complete=False))


def test_more_layers_are_not_asked_for_where_all_ran() -> None:
    assert "run more layers" not in reason_for(trace_of(jump(4)))


def test_none_because_no_scalar_is_decisive() -> None:
    reason = reason_for(trace_of(jump(terms=(term("1:5:9", 100.0), term("1:5:8", 80.0)))))
    assert reason.endswith("no scalar is decisive: the largest share is 0.25 (1:5:9), the bar 0.35.")


def test_one_sentence_of_each_kind_names_the_settings_in_force() -> None:
    assert "the bar is 500 medians" in reason_for(trace_of(jump()), DetectionSettings(massive_ratio=500.0))
    assert "the bar 0.9" in reason_for(trace_of(jump(terms=(term("1:5:9", 300.0),))), DetectionSettings(term_share=0.9))


def test_none_where_two_tokens_have_the_same_share() -> None:
    one = jump(position=1, terms=(term("1:5:9", 100.0),))
    other = jump(position=2, output=200.0, terms=(term("1:5:8", 50.0),))
    assert "no scalar is decisive: the largest share is 0.25" in reason_for(trace_of(one, other))


# The settings.


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("massive_ratio", -1.0, "0 or more"),
        ("output_ratio", float("inf"), "0 or more"),
        ("peak_share", 1.5, "from 0 to 1"),
        ("layer_share", -0.1, "from 0 to 1"),
        ("term_share", float("nan"), "from 0 to 1"),
        ("hold", 2.0, "from 0 to 1"),
        ("persistence", -0.5, "from 0 to 1"),
        ("rounds", 0, "1 or more"),
    ],
)
def test_a_threshold_out_of_its_range_is_refused(name: str, value: float, allowed: str) -> None:
    with pytest.raises(UsageError, match=f"^The threshold {name} is {value:g}; it must be {allowed}\\.$"):
        DetectionSettings(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [each.name for each in fields(DetectionSettings)])
def test_every_threshold_has_a_range(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        DetectionSettings(**{name: -1})  # type: ignore[arg-type]
