from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superweights.report.labels import assign_lanes, spread

POSITIONS = st.lists(st.floats(-1000, 1000), min_size=1, max_size=8)


@given(st.lists(st.tuples(st.floats(0, 500), st.floats(1, 100)), max_size=12))
def test_spans_of_one_lane_keep_their_gap(starts_and_widths):
    spans = sorted((start, start + width) for start, width in starts_and_widths)
    lanes = assign_lanes(spans, gap=5)
    for lane in lanes:
        own = [span for span, number in zip(spans, lanes, strict=True) if number == lane]
        assert all(right[0] - left[1] >= 5 for left, right in pairwise(own))


def test_spans_far_apart_share_a_lane():
    assert assign_lanes([(0, 10), (20, 30), (40, 50)], gap=5) == [0, 0, 0]


@given(POSITIONS)
def test_spread_keeps_gap_order_and_middle(positions):
    placed = spread(positions, gap=10)
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    for low, high in pairwise(order):
        assert placed[high] - placed[low] >= 10 - 1e-6
    assert sum(placed) == pytest.approx(sum(positions), abs=1e-6)


def test_spread_leaves_what_is_apart():
    assert spread([50.0, 0.0, 20.0], gap=10) == [50.0, 0.0, 20.0]
