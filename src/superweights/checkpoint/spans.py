"""Arithmetic on byte spans of one file: half-open pairs (start, end), pure functions.

A sorted list of spans that neither touch nor overlap is called merged.
"""

from collections.abc import Iterable, Iterator

Span = tuple[int, int]


def merge(spans: Iterable[Span], *, gap: int = 0) -> list[Span]:
    """Sorts spans and joins those that overlap or lie at most `gap` bytes apart; empty spans vanish.

    Example:
        >>> merge([(10, 20), (0, 4), (5, 10)])
        [(0, 4), (5, 20)]
        >>> merge([(10, 20), (0, 4)], gap=6)
        [(0, 20)]
    """
    merged: list[Span] = []
    for start, end in sorted(span for span in spans if span[0] < span[1]):
        if merged and start <= merged[-1][1] + gap:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def subtract(wanted: Iterable[Span], present: Iterable[Span]) -> list[Span]:
    """The parts of `wanted` that no span of `present` covers, merged.

    Example:
        >>> subtract([(0, 10)], [(2, 4), (8, 20)])
        [(0, 2), (4, 8)]
    """
    have = merge(present)
    rest: list[Span] = []
    position = 0
    for start, end in merge(wanted):
        while position < len(have) and have[position][1] <= start:
            position += 1
        for left, right in have[position:]:
            if left >= end:
                break
            rest.append((start, left))
            start = max(start, right)
        rest.append((start, end))
    return merge(rest)


def split(spans: Iterable[Span], size: int) -> Iterator[Span]:
    """Cuts each span into pieces of at most `size` bytes.

    Example:
        >>> list(split([(0, 5), (8, 10)], 2))
        [(0, 2), (2, 4), (4, 5), (8, 10)]
    """
    for start, end in spans:
        for left in range(start, end, size):
            yield left, min(left + size, end)
