"""Codes in as few bytes as they need: the layout `pack-quantized` of compressed-tensors.

The codes of a row follow each other as a string of bits, lowest bit first, in little-endian 32-bit words; each row starts a
new word. A symmetric code c is stored as c + 2^(bits-1).

Source:
    compressed-tensors 0.20, compressors/pack_quantized.
"""

import math

import torch

_PIECE = 1 << 18
"""Codes that are packed together, so that what lies between stays in cache."""


def packed_cols(cols: int, bits: int) -> int:
    """32-bit words of a row.

    Example:
        >>> packed_cols(128, 4)
        16
    """
    return math.ceil(cols * bits / 32)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs unsigned codes.

    Args:
        codes: [rows, cols], an integer dtype, 0 to 2^bits - 1.
        bits: 2 to 8.

    Returns:
        int32 [rows, packed_cols(cols, bits)].

    Example:
        >>> [hex(word) for word in pack(torch.arange(8)[None], 4)[0].tolist()]
        ['0x76543210']
    """
    rows, cols = codes.shape
    words = packed_cols(cols, bits)
    packed = torch.empty(rows, words, dtype=torch.int32)
    together = max(1, _PIECE // cols)
    for first in range(0, rows, together):
        packed[first : first + together] = _pack_rows(codes[first : first + together], bits, words)
    return packed


def _pack_rows(codes: torch.Tensor, bits: int, words: int) -> torch.Tensor:
    rows, cols = codes.shape
    packed = torch.zeros(rows, words * 4, dtype=torch.uint8)
    if bits == 8:
        packed[:, :cols] = codes
    elif bits in (2, 4) and cols % (8 // bits) == 0:
        # Always a copy: bytes inside another tensor need not lie as two-byte numbers must.
        pairs = codes.to(torch.uint8, copy=True, memory_format=torch.contiguous_format)
        for width in (2, 4)[(bits == 4) :]:  # twice the width, half the count
            joined = pairs.view(torch.int16)
            pairs = (joined | (joined >> (8 - width))).to(torch.uint8)
        packed[:, : cols * bits // 8] = pairs
    else:
        positions = torch.arange(bits)
        string = (codes.to(torch.int16)[:, :, None] >> positions) & 1  # [rows, cols, bits]
        filled = torch.zeros(rows, words * 32, dtype=torch.uint8)
        filled[:, : cols * bits] = string.reshape(rows, -1).to(torch.uint8)
        packed = (filled.view(rows, -1, 8) << torch.arange(8, dtype=torch.uint8)).sum(2, dtype=torch.uint8)
    return packed.view(torch.int32)


def unpack(packed: torch.Tensor, bits: int, cols: int) -> torch.Tensor:
    """Unpacks what `pack` packed.

    Args:
        packed: int32 [rows, words].
        bits: 2 to 8.
        cols: codes of a row.

    Returns:
        uint8 [rows, cols].
    """
    stored = packed.contiguous().view(torch.uint8)  # [rows, bytes]
    string = (stored[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    string = string.reshape(len(packed), packed.shape[1] * 32)[:, : cols * bits].reshape(len(packed), cols, bits)
    return (string << torch.arange(bits, dtype=torch.uint8)).sum(2, dtype=torch.uint8)
