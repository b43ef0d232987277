import json

import pytest
import torch
from broken_files import fields, raw_file
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from superweights.checkpoint import TensorEntry
from superweights.checkpoint.header import MAX_HEADER_BYTES, read_header
from superweights.errors import MalformedFileError


def parse(content: bytes) -> dict[str, TensorEntry]:
    return read_header(lambda start, end: content[start:end], file="weights.safetensors", size=len(content))


def test_entries_of_a_real_file() -> None:
    content = save({"b": torch.arange(6.0).reshape(2, 3), "a": torch.zeros(0, 4)}, metadata={"format": "pt"})
    entries = parse(content)
    entry = entries["b"]
    assert (entry.dtype, entry.shape, entry.numel, entry.itemsize, entry.nbytes) == ("F32", (2, 3), 6, 4, 24)
    assert torch.frombuffer(bytearray(content[entry.start : entry.end]), dtype=torch.float32).tolist() == list(range(6))
    assert entries["a"].nbytes == 0


def test_holes_and_spaces_are_allowed() -> None:
    text = json.dumps({"a": fields("U8", [2], 0, 2), "b": fields("U8", [2], 6, 8)}).encode() + b"   "
    assert set(parse(raw_file(text, bytes(10)))) == {"a", "b"}


def test_values_that_share_bytes_are_counted_in_bits() -> None:
    entry = parse(raw_file({"a": fields("F4", [2, 3], 0, 3)}, bytes(3)))["a"]
    assert (entry.nbytes, entry.itemsize) == (3, 0)


A = fields("U8", [4], 0, 4)
BROKEN = {
    "empty": (b"", "0 bytes"),
    "shorter than its length": (b"\0\0\0", "3 bytes"),
    "header beyond the file": ((1000).to_bytes(8, "little") + b"{}", "header of 1000 bytes"),
    "header beyond the format": ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "100000001"),
    "header of all bits": (b"\xff" * 64, "18446744073709551615"),
    "not JSON": (raw_file(b"{'a': 1}"), "not JSON"),
    "not UTF-8": (raw_file(b'{"\xff": 1}'), "not JSON in UTF-8"),
    "no header": (raw_file(b""), "not JSON"),
    "a list": (raw_file([]), "list"),
    "NaN": (raw_file(b"NaN"), "float"),
    "too deep": (raw_file(b'{"a":' * 100_000), "not JSON"),
    "endless number": (raw_file(b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
    "metadata not an object": (raw_file({"__metadata__": []}), "__metadata__"),
    "twice one name": (raw_file(b'{"a": 1, "a": 2}'), "'a' twice"),
    "twice one field": (raw_file(b'{"a": {"dtype": "U8", "dtype": "I8"}}'), "'dtype' twice"),
    "name not Unicode": (raw_file(b'{"\\ud800": {}}'), "not valid Unicode"),
    "tensor not an object": (raw_file({"a": [1]}), "'a' is described by a list"),
    "no dtype": (raw_file({"a": {"shape": [1], "data_offsets": [0, 1]}}), "dtype None"),
    "unknown dtype": (raw_file({"a": fields("BF17", [4], 0, 4)}, bytes(4)), "'BF17'.*Near: BF16"),
    "dtype not text": (raw_file({"a": fields(["U8"], [4], 0, 4)}, bytes(4)), "dtype"),
    "shape not a list": (raw_file({"a": fields("U8", 4, 0, 4)}, bytes(4)), "shape 4"),
    "shape of truth values": (raw_file({"a": fields("U8", [True], 0, 1)}, bytes(4)), "shape"),
    "shape of fractions": (raw_file({"a": fields("U8", [4.0], 0, 4)}, bytes(4)), "shape"),
    "negative shape": (raw_file({"a": fields("U8", [-2, -2], 0, 4)}, bytes(4)), r"\[-2, -2\]"),
    "huge length": (raw_file({"a": fields("U8", [2**63], 0, 4)}, bytes(4)), "9223372036854775808"),
    "huge product": (raw_file({"a": fields("F64", [2**40, 2**40], 0, 4)}, bytes(4)), r"more than 2\*\*63"),
    "long huge product": (raw_file({"a": fields("F64", [2**62] * 5000, 0, 4)}, bytes(4)), r"more than 2\*\*63"),
    "product that wraps to the right size": (raw_file({"a": fields("U8", [2**33, 2**31], 0, 0)}), r"2\*\*63"),
    "no offsets": (raw_file({"a": {"dtype": "U8", "shape": [1]}}), "data_offsets None"),
    "one offset": (raw_file({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}), "data_offsets"),
    "offsets reversed": (raw_file({"a": fields("U8", [4], 4, 0)}, bytes(4)), "data_offsets"),
    "negative offset": (raw_file({"a": fields("U8", [4], -4, 0)}, bytes(4)), "data_offsets"),
    "range too small": (raw_file({"a": fields("F32", [2, 3], 0, 20)}, bytes(24)), "needs 24 bytes.*has 20"),
    "range of half a byte": (raw_file({"a": fields("F4", [3], 0, 2)}, bytes(24)), r"needs 1.5 bytes"),
    "overlap": (raw_file({"a": A, "b": fields("U8", [4], 3, 7)}, bytes(9)), "'a'.*'b'.*overlap"),
    "overlap inside": (raw_file({"b": fields("U8", [1], 2, 3), "a": A}, bytes(9)), "'a'.*'b'.*overlap"),
    "truncated": (
        raw_file({"a": A, "b": fields("U8", [9], 4, 13)}, bytes(12)),
        "'b' ends at byte .*truncated|truncated",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_with_its_reason(case: str) -> None:
    content, words = BROKEN[case]
    with pytest.raises(MalformedFileError, match=words) as caught:
        parse(content)
    assert "weights.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_truncated_file_names_tensor_and_sizes() -> None:
    content = save({"first": torch.zeros(10), "last": torch.zeros(100)})
    with pytest.raises(MalformedFileError) as caught:
        parse(content[:-1])
    assert "'last'" in str(caught.value)
    assert f"ends at byte {len(content)}" in str(caught.value)
    assert f"has {len(content) - 1} bytes" in str(caught.value)


def accepts_or_refuses(content: bytes) -> None:
    """Whatever the bytes, either every entry lies inside the file or the one error is raised."""
    try:
        entries = parse(content)
    except MalformedFileError:
        return
    for entry in entries.values():
        assert 8 <= entry.start <= entry.end <= len(content)
        assert entry.numel * entry.storage.nbits == 8 * entry.nbytes


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
tensor_like = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "X"]) | json_values,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | json_values,
    },
)


@given(st.binary(max_size=200))
@example((2).to_bytes(8, "little") + b"{}")
@settings(database=None, deadline=None)
def test_random_bytes(content: bytes) -> None:
    accepts_or_refuses(content)


@given(st.dictionaries(st.text(max_size=5), tensor_like | json_values, max_size=4), st.integers(0, 40))
@settings(database=None, deadline=None)
def test_random_headers(header: dict[str, object], length: int) -> None:
    accepts_or_refuses(raw_file(header, bytes(length)))


@given(st.data())
@settings(database=None, deadline=None)
def test_a_real_file_with_bytes_changed_or_cut(data: st.DataObject) -> None:
    content = bytearray(save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(3, dtype=torch.bfloat16)}))
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=6)):
        content[position] = data.draw(st.integers(0, 255))
    accepts_or_refuses(bytes(content[: data.draw(st.integers(0, len(content)))]))


def test_reading_a_header_asks_for_nothing_else() -> None:
    content = save({"a": torch.zeros(1000)})
    asked: list[tuple[int, int]] = []

    def read(start: int, end: int) -> bytes:
        asked.append((start, end))
        return content[start:end]

    entry = read_header(read, file="a", size=len(content))["a"]
    assert max(end for _, end in asked) <= entry.start
