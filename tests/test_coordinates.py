import pytest
from hypothesis import given
from hypothesis import strategies as st

from superweights.coordinates import Coordinate
from superweights.errors import CoordinateError

NUMBERS = st.integers(0, 10**9)


@given(layer=NUMBERS, expert=st.none() | NUMBERS, row=NUMBERS, col=NUMBERS)
def test_text_round_trip(layer, expert, row, col):
    coordinate = Coordinate(layer, expert, row, col)
    assert Coordinate.parse(str(coordinate)) == coordinate


@pytest.mark.parametrize(
    ("text", "coordinate"),
    [
        ("2:3968:7003", Coordinate(layer=2, expert=None, row=3968, col=7003)),
        ("3/82:511:40", Coordinate(layer=3, expert=82, row=511, col=40)),
        ("0/0:0:0", Coordinate(layer=0, expert=0, row=0, col=0)),
        (" 2:1:3\n", Coordinate(layer=2, expert=None, row=1, col=3)),
    ],
)
def test_parsed(text, coordinate):
    assert Coordinate.parse(text) == coordinate


@pytest.mark.parametrize(
    "text",
    ["", "2", "2:3", "2:3:4:5", "-1:3:4", "2:-3:4", "2:3:x", "2/:3:4", "/2:3:4", "2 : 3 : 4", "2.0:3:4", "2:3:4,", "2/1/1:3:4"],
)  # fmt: skip
def test_other_text_is_refused_with_both_forms(text):
    with pytest.raises(CoordinateError) as caught:
        Coordinate.parse(text)
    assert str(caught.value).startswith(f"{text!r} is no coordinate. Write LAYER:ROW:COL, or LAYER/EXPERT:ROW:COL ")


def test_can_be_a_key_and_be_sorted():
    coordinates = [Coordinate.parse(text) for text in ("10:0:0", "2:5:1", "2:0:7")]
    assert [str(each) for each in sorted(coordinates)] == ["2:0:7", "2:5:1", "10:0:0"]
    assert len({*coordinates, Coordinate.parse("2:5:1")}) == 3


def test_dense_and_routed_coordinates_of_one_layer_sort():
    """A layer with a shared expert beside routed ones can have candidates in both."""
    coordinates = [Coordinate.parse(text) for text in ("2/1:5:1", "2:5:1", "2/0:5:1", "1/3:0:0")]
    assert [str(each) for each in sorted(coordinates)] == ["1/3:0:0", "2:5:1", "2/0:5:1", "2/1:5:1"]
