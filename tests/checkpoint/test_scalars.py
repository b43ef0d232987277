import pytest

from superweights.checkpoint import TensorEntry
from superweights.checkpoint.scalars import StoredScalar, block_span, decode_scalar
from superweights.errors import CoordinateError, QuantizedCheckpointError

MATRIX = TensorEntry("w", "f", "BF16", (3, 4), 100, 124)


@pytest.mark.parametrize(
    ("prefix", "span"), [((), (100, 124)), ((0,), (100, 108)), ((2,), (116, 124)), ((1, 3), (114, 116))]
)
def test_leading_indices_select_bytes(prefix: tuple[int, ...], span: tuple[int, int]) -> None:
    assert block_span(MATRIX, prefix) == span


@pytest.mark.parametrize(
    ("prefix", "words"),
    [((3,), "valid are 0 to 2"), ((0, 4), "axis 1.*0 to 3"), ((-1, 0), "Index -1"), ((0, 0, 0), "3 indices")],
)
def test_an_index_outside_the_shape_names_the_range(prefix: tuple[int, ...], words: str) -> None:
    with pytest.raises(CoordinateError, match=words):
        block_span(MATRIX, prefix)


def test_an_empty_axis_has_no_index() -> None:
    with pytest.raises(CoordinateError, match="empty"):
        block_span(TensorEntry("w", "f", "F32", (0, 4), 100, 100), (0,))


def test_values_that_share_bytes_have_no_address() -> None:
    with pytest.raises(QuantizedCheckpointError, match="F4"):
        block_span(TensorEntry("w", "f", "F4", (2, 2), 100, 102), (0, 0))


@pytest.mark.parametrize(
    ("dtype", "raw", "value", "text"),
    [
        ("BF16", "c0bf", -1.5, "1 01111111 1000000"),
        ("F16", "003e", 1.5, "0 01111 1000000000"),
        ("F32", "0000c03f", 1.5, "0 01111111 10000000000000000000000"),
        ("F8_E4M3", "3c", 1.5, "0 0111 100"),
        ("F8_E8M0", "80", 2.0, "10000000"),
        ("I8", "ff", -1.0, "11111111"),
    ],
)
def test_bits_are_shown_by_their_parts(dtype: str, raw: str, value: float, text: str) -> None:
    scalar = decode_scalar(TensorEntry("w", "f", dtype, (1,), 8, 16), 8, bytes.fromhex(raw))
    assert (scalar.value, scalar.bits_text, scalar.file, scalar.offset) == (value, text, "f", 8)


def test_a_double_keeps_all_its_digits() -> None:
    raw = (0.1).hex()
    scalar = decode_scalar(TensorEntry("w", "f", "F64", (1,), 8, 16), 8, bytes.fromhex("9a9999999999b93f"))
    assert scalar.value.hex() == raw
    assert isinstance(scalar, StoredScalar)
