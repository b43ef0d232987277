"""Codes come out of words as a plain loop finds them."""

import pytest
import torch

from superweights.checkpoint.packed.codes import bit_string, high_half_first, separate_words, stacked


def random(shape: tuple[int, ...], limit: int) -> torch.Tensor:
    return torch.randint(0, limit, shape, generator=torch.Generator().manual_seed(0))


def signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 9, 31, 32, 33, 100])
def test_a_string_of_bits_runs_over_the_borders_of_words(bits, count):
    codes = random((3, count), 2**bits)
    words = []
    for row in codes.tolist():
        string = sum(code << (place * bits) for place, code in enumerate(row))
        words.append([signed((string >> start) & 0xFFFFFFFF) for start in range(0, count * bits, 32)])
    packed = torch.tensor(words, dtype=torch.int32)
    found = bit_string(packed, bits, count)
    assert found.dtype == torch.uint8
    assert torch.equal(found.long(), codes)
    turned = packed.t().contiguous().t()
    assert torch.equal(bit_string(turned, bits, count).long(), codes), "also where rows are no rows in memory"


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_that_stand_alone(bits):
    each = 32 // bits
    codes = random((3, 50), 2**bits)
    words = [
        [
            signed(sum(code << (place * bits) for place, code in enumerate(row[first : first + each])))
            for first in range(0, 50, each)
        ]
        for row in codes.tolist()
    ]
    assert torch.equal(separate_words(torch.tensor(words, dtype=torch.int32), bits, 50).long(), codes)


def test_the_upper_half_of_a_byte_comes_first():
    assert high_half_first(torch.tensor([[0x12, 0xF0]], dtype=torch.uint8)).tolist() == [1, 2, 15, 0]


@pytest.mark.parametrize("lowest_first", [True, False])
@pytest.mark.parametrize(("bits", "dtype"), [(1, torch.uint8), (2, torch.uint8), (4, torch.uint8), (3, torch.int32)])
def test_pieces_that_share_words(bits, dtype, lowest_first):
    places = 8 * dtype.itemsize // bits
    codes = random((places * 2, 5), 2**bits)
    words = torch.zeros(2, 5, dtype=torch.int64)
    for place in range(places):
        piece = codes[2 * place : 2 * place + 2]
        words += piece << bits * (place if lowest_first else places - 1 - place)
    assert torch.equal(stacked(words.to(dtype), bits, lowest_first=lowest_first).long(), codes)
