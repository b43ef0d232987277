"""Codes out of the words they were packed in."""

import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the 4-bit float of the OCP microscaling formats, by code."""


def bit_string(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The codes of each row, which follow each other lowest bit first, over the borders of words.

    Args:
        packed: [rows, words], any dtype.
        bits: of a code, 1 to 8.
        count: codes of a row.

    Returns:
        uint8 [rows, count].

    Example:
        >>> bit_string(torch.tensor([[0x76543210]], dtype=torch.int32), 4, 8)
        tensor([[0, 1, 2, 3, 4, 5, 6, 7]], dtype=torch.uint8)
    """
    # Flat in between: of a single column torch calls any strides contiguous, and then refuses to see bytes in it.
    stored = packed.contiguous().flatten().view(torch.uint8).reshape(len(packed), -1)  # [rows, bytes]
    if bits == 8:
        return stored[:, :count].clone()
    eights = -(-count // 8)  # eight codes fill as many bytes as a code has bits
    missing = max(0, eights * bits - stored.shape[1])
    stored = torch.nn.functional.pad(stored, (0, missing))[:, : eights * bits].reshape(len(stored), eights, bits)
    codes = torch.empty(len(stored), eights, 8, dtype=torch.uint8)
    mask = (1 << bits) - 1
    for place in range(8):
        first, shift = divmod(place * bits, 8)
        code = stored[:, :, first] >> shift
        if shift + bits > 8:
            code = code | (stored[:, :, first + 1] << (8 - shift))
        codes[:, :, place] = code & mask
    return codes.reshape(len(stored), -1)[:, :count]


def separate_words(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Like `bit_string`, but a code never lies in two 32-bit words; their last bits stay empty."""
    shifts = torch.arange(32 // bits) * bits
    codes = (packed[:, :, None] >> shifts) & ((1 << bits) - 1)
    return codes.reshape(len(packed), -1)[:, :count].to(torch.uint8)


def high_half_first(packed: torch.Tensor) -> torch.Tensor:
    """Two 4-bit codes per byte, the upper half first.

    Returns:
        uint8 [codes].
    """
    stored = packed.contiguous().view(torch.uint8).flatten()
    return torch.stack((stored >> 4, stored & 15), 1).flatten()


def stacked(packed: torch.Tensor, bits: int, *, lowest_first: bool) -> torch.Tensor:
    """Codes whose rows were cut into pieces that share words: one piece in the lowest bits, the next above it, and so on.

    Args:
        packed: [rows, cols], uint8 or int32.
        bits: of a code.
        lowest_first: whether the first rows are in the lowest bits.

    Returns:
        uint8 [rows * codes per word, cols].
    """
    places = range(packed.dtype.itemsize * 8 // bits)
    mask = (1 << bits) - 1
    pieces = [((packed >> (place * bits)) & mask).to(torch.uint8) for place in places]
    return torch.cat(pieces if lowest_first else pieces[::-1])
