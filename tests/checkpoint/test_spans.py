from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from superweights.checkpoint.spans import merge, split, subtract

spans = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda pair: (min(pair), max(pair))), max_size=8)


def covered(each: list[tuple[int, int]]) -> set[int]:
    return {position for start, end in each for position in range(start, end)}


@given(spans)
@settings(database=None)
def test_merge_keeps_every_byte_and_no_other(given_spans: list[tuple[int, int]]) -> None:
    merged = merge(given_spans)
    assert covered(merged) == covered(given_spans)
    assert all(before[1] < after[0] for before, after in pairwise(merged))


@given(spans, st.integers(1, 20))
@settings(database=None)
def test_merge_bridges_gaps_up_to_the_given_one(given_spans: list[tuple[int, int]], gap: int) -> None:
    merged = merge(given_spans, gap=gap)
    assert covered(merged) >= covered(given_spans)
    assert all(before[1] + gap < after[0] for before, after in pairwise(merged))


@given(spans, spans)
@settings(database=None)
def test_subtract_is_the_difference_of_sets(wanted: list[tuple[int, int]], present: list[tuple[int, int]]) -> None:
    rest = subtract(wanted, present)
    assert covered(rest) == covered(wanted) - covered(present)
    assert rest == merge(rest)


@given(spans, st.integers(1, 9))
@settings(database=None)
def test_split_cuts_without_loss(given_spans: list[tuple[int, int]], size: int) -> None:
    pieces = list(split(merge(given_spans), size))
    assert covered(pieces) == covered(given_spans)
    assert all(0 < end - start <= size for start, end in pieces)
