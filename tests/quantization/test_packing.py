"""Codes as strings of bits: a plain loop says which, and they come back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superweights.quantization import packing
from superweights.quantization.packing import pack, packed_cols, unpack

BITS = range(2, 9)
COLS = [1, 2, 3, 4, 5, 7, 8, 10, 11, 16, 31, 32, 33, 64, 100]


def codes_of(rows: int, cols: int, bits: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**bits, (rows, cols), generator=torch.Generator().manual_seed(seed))


def loop_words(codes: list[int], bits: int) -> list[int]:
    """One row as one long number, the first code lowest, cut into signed words of 32 bits."""
    string = sum(code << (place * bits) for place, code in enumerate(codes))
    words = [(string >> start) & 0xFFFFFFFF for start in range(0, len(codes) * bits, 32)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cols", COLS)
def test_words_are_those_of_a_plain_loop(cols, bits):
    codes = codes_of(3, cols, bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (3, packed_cols(cols, bits))
    assert packed.tolist() == [loop_words(row, bits) for row in codes.tolist()]


@given(st.integers(2, 8), st.integers(0, 3), st.integers(1, 70), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_codes_come_back(bits, rows, cols, seed):
    codes = codes_of(rows, cols, bits, seed=seed)
    found = unpack(pack(codes, bits), bits, cols)
    assert found.dtype == torch.uint8
    assert torch.equal(found.long(), codes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("bits", BITS)
def test_codes_of_any_integer_dtype(bits, dtype):
    codes = codes_of(2, 24, bits)
    if dtype == torch.int8 and bits == 8:
        codes = codes % 128
    narrow = codes.to(dtype)
    assert torch.equal(pack(narrow, bits), pack(codes, bits))
    assert torch.equal(narrow.long(), codes), "codes are only read"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("bits", BITS)
def test_codes_that_lie_across_or_inside_others(bits, dtype):
    codes = codes_of(3, 16, bits)
    expected = pack(codes, bits)
    wide = torch.zeros(3, 19, dtype=dtype)
    wide[:, 1:17] = codes
    flat = torch.zeros(49, dtype=dtype)
    flat[1:] = codes.flatten()
    for same in (codes.to(dtype).t().contiguous().t(), wide[:, 1:17], flat[1:].view(3, 16)):
        assert torch.equal(same.long(), codes)
        assert torch.equal(pack(same, bits), expected)


@pytest.mark.parametrize("piece", [1, 50, 100])
@pytest.mark.parametrize("bits", BITS)
def test_the_size_of_a_piece_changes_nothing(bits, piece, monkeypatch):
    codes = codes_of(7, 24, bits)
    expected = pack(codes, bits)
    monkeypatch.setattr(packing, "_PIECE", piece)
    assert torch.equal(pack(codes, bits), expected)


@pytest.mark.parametrize("bits", BITS)
def test_packed_words_that_lie_inside_others(bits):
    codes = codes_of(3, 40, bits)
    wide = torch.cat([torch.full((3, 1), -1, dtype=torch.int32), pack(codes, bits)], 1)
    assert torch.equal(unpack(wide[:, 1:], bits, 40).long(), codes)


@pytest.mark.parametrize("bits", BITS)
def test_the_rest_of_the_last_word_is_zero(bits):
    assert pack(torch.full((1, 1), 2**bits - 1), bits).tolist() == [[2**bits - 1]]


@pytest.mark.parametrize(
    ("cols", "bits", "words"),
    [(1, 2, 1), (16, 2, 1), (17, 2, 2), (10, 3, 1), (11, 3, 2), (128, 4, 16), (7, 5, 2), (4096, 8, 1024)],
)
def test_words_of_a_row(cols, bits, words):
    assert packed_cols(cols, bits) == words
