"""The text form of a scheme, what it refuses, and what it costs."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from superweights.errors import UnknownNameError, UsageError
from superweights.quantization.scheme import _COMMON, Scheme

SIZES = st.integers(1, 4096)
SHAPES = st.one_of(
    st.tuples(st.sampled_from(["tensor", "row"]), st.just((0, 0))),
    st.tuples(st.just("group"), st.tuples(st.just(1), SIZES.filter(lambda size: size > 1))),
    st.tuples(st.sampled_from(["block", "tile"]), st.tuples(SIZES, SIZES).filter(lambda size: size != (1, 1))),
)


@given(st.integers(2, 8), SHAPES, st.sampled_from(["sym", "signed", "asym", "minmax"]))
def test_a_scheme_of_integers_comes_back_from_its_text(bits, shape, offset):
    scheme = Scheme("int", bits, *shape, offset)
    assert Scheme.parse(str(scheme)) == scheme


@given(st.integers(3, 4), SHAPES)
def test_a_normal_float_scheme_comes_back_from_its_text(bits, shape):
    scheme = Scheme("nf", bits, *shape)
    assert Scheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("int4-tensor", Scheme("int", 4, "tensor", (0, 0), "sym")),
        ("int8-row", Scheme("int", 8, "row", (0, 0), "sym")),
        ("int2-g64-asym", Scheme("int", 2, "group", (1, 64), "asym")),
        ("int4-block512x512-minmax", Scheme("int", 4, "block", (512, 512), "minmax")),
        ("int4-block512", Scheme("int", 4, "block", (1, 512), "sym")),
        ("int3-block512x1", Scheme("int", 3, "block", (512, 1), "sym")),
        ("int4-tile16x128", Scheme("int", 4, "tile", (16, 128), "sym")),
        ("nf3-g64", Scheme("nf", 3, "group", (1, 64), "sym")),
    ],
)
def test_what_the_text_says(text, scheme):
    assert Scheme.parse(text) == scheme
    assert str(scheme) == text


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("int4-g128-sym", "int4-g128"),
        (" INT4-G128 ", "int4-g128"),
        ("int4-block1x512", "int4-block512"),
        ("int4-tile128", "int4-tile1x128"),
        ("nf4-row-sym", "nf4-row"),
    ],
)
def test_other_ways_to_write_the_same(text, short):
    assert str(Scheme.parse(text)) == short


@pytest.mark.parametrize("text", _COMMON)
def test_suggested_schemes_exist(text):
    assert str(Scheme.parse(text)) == text


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("int4-g12b", "int4-g128"),
        ("int4_g128", "int4-g128"),
        ("in8-row", "int8-row"),
        ("nf4g64", "nf4-g64"),
        ("int4-block512*512-minmax", "int4-block512x512-minmax"),
        ("int4-tile128-128", "int4-tile128x128"),
    ],
)
def test_near_matches_of_a_typo(typo, meant):
    with pytest.raises(
        UnknownNameError, match=f"^There is no scheme {re.escape(repr(typo))}. Did you mean .*'{meant}'"
    ) as raised:
        Scheme.parse(typo)
    assert "Write int2 to int8, nf3 or nf4; then" in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "int4",
        "int4-",
        "int4-g",
        "int4-g-128",
        "int44-row",
        "fp4-row",
        "int4-rows",
        "int4-row-",
        "int4-g1x2",
    ],
)
def test_text_that_is_no_scheme(text):
    with pytest.raises(UnknownNameError, match="There is no scheme"):
        Scheme.parse(text)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("int1-row", "int has 2 to 8 bits"),
        ("int0-row", "int has 2 to 8 bits"),
        ("int9-row", "int has 2 to 8 bits"),
        ("nf2-g64", "nf 3 or 4"),
        ("nf5-g64", "nf 3 or 4"),
        ("int4-g0", "at least two weights share a scale"),
        ("int4-g1", "at least two weights share a scale"),
        ("int4-block1", "at least two weights share a scale"),
        ("int4-tile0x8", "at least two weights share a scale"),
        ("nf4-g64-asym", "nf has no offset"),
        ("nf3-row-minmax", "nf has no offset"),
    ],
)
def test_numbers_out_of_range(text, fault):
    with pytest.raises(UsageError, match=f"The scheme {text} cannot be: .*{fault}") as raised:
        Scheme.parse(text)
    assert type(raised.value) is UsageError


@pytest.mark.parametrize(
    ("text", "shape", "together"),
    [
        ("int4-tensor", (6, 10), 60),
        ("int4-row", (6, 10), 10),
        ("int4-g5", (6, 10), 5),
        ("int4-tile3x2", (6, 10), 6),
        ("int4-block3x5", (6, 10), 15),
        ("int4-block4x5", (6, 10), 20),
        ("int4-block7x5", (6, 10), 60),
        ("int4-block512x512", (6, 10), 60),
    ],
)
def test_how_many_weights_share_a_scale(text, shape, together):
    assert Scheme.parse(text).weights_per_scale(*shape) == together


@pytest.mark.parametrize(
    ("text", "shape", "scale_bits", "bits"),
    [
        ("int4-g128", (4096, 4096), 16, 4 + 16 / 128),
        ("int4-g128", (4096, 4096), 32, 4 + 32 / 128),
        ("int4-g128-asym", (4096, 4096), 16, 4 + (16 + 4) / 128),
        ("int8-g32-asym", (64, 64), 16, 8 + (16 + 8) / 32),
        ("int4-g128-minmax", (4096, 4096), 16, 4 + (16 + 16) / 128),
        ("nf3-g64", (64, 64), 16, 3 + 16 / 64),
        ("int8-row", (3, 100), 16, 8 + 16 / 100),
        ("int8-tensor", (10, 10), 16, 8 + 16 / 100),
        ("int4-block512x512-minmax", (1024, 1024), 16, 4 + 32 / 262144),
        ("int4-block512x512-minmax", (1024, 1000), 16, 4 + 32 / 1024000),
        ("int2-tile16x4", (32, 32), 16, 2 + 16 / 64),
    ],
)
def test_bits_per_weight_by_hand(text, shape, scale_bits, bits):
    assert Scheme.parse(text).bits_per_weight(*shape, scale_bits=scale_bits) == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize("text", ["int4-tensor", "int4-row", "int4-g20", "int4-tile5x40", "int4-block7x11", "nf4-g200"])
def test_what_fits(text):
    assert Scheme.parse(text).fault(100, 200) is None


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("int4-g128", "groups of 128 do not divide rows of 200; shorter ones do: 100, 50, 40"),
        ("int4-g400", "groups of 400 do not divide rows of 200; shorter ones do: 200, 100, 50"),
        ("int4-tile64x128", "tiles of 64 x 128 do not divide 100 x 200; these sizes do: 50, 25, 20 rows, 100, 50, 40 cols"),
        ("int4-tile3x3", "tiles of 3 x 3 do not divide 100 x 200; these sizes do: 2 rows, 2 cols"),
        ("int4-tile10x128", "tiles of 10 x 128 do not divide 100 x 200; these sizes do: 10, 5, 4 rows, 100, 50, 40 cols"),
    ],
)  # fmt: skip
def test_a_fault_names_what_divides(text, fault):
    assert Scheme.parse(text).fault(100, 200) == fault


def test_a_prime_has_no_shorter_group():
    assert (
        Scheme.parse("int4-g128").fault(3, 251)
        == "groups of 128 do not divide rows of 251; shorter ones do: none but 1"
    )
