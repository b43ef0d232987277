"""Where direct labels go so that none covers another. Pixels and numbers only, no charts."""

from collections.abc import Sequence


def assign_lanes(spans: Sequence[tuple[float, float]], *, gap: float) -> list[int]:
    """A lane for each span so that spans of one lane keep `gap` between them; lane 0 fills first.

    Args:
        spans: left and right end of each label, ordered by left end.
        gap: least distance between neighbours.

    Example:
        >>> assign_lanes([(0, 50), (30, 80), (60, 110)], gap=5)
        [0, 1, 0]
    """
    ends: list[float] = []
    lanes: list[int] = []
    for left, right in spans:
        lane = next((number for number, end in enumerate(ends) if end + gap <= left), len(ends))
        ends[lane : lane + 1] = [right]
        lanes.append(lane)
    return lanes


def spread(positions: Sequence[float], *, gap: float) -> list[float]:
    """The positions, moved apart until neighbours keep `gap`; the order stays, the middle of a cluster too.

    Example:
        >>> spread([10.0, 12.0, 50.0], gap=10)
        [6.0, 16.0, 50.0]
    """
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    clusters: list[tuple[float, int]] = []  # middle, size
    for index in order:
        clusters.append((positions[index], 1))
        while len(clusters) > 1 and _overlap(clusters[-2], clusters[-1], gap):
            clusters[-2:] = [_merge(clusters[-2], clusters[-1])]
    placed = [middle + (place - (size - 1) / 2) * gap for middle, size in clusters for place in range(size)]
    return [place for _, place in sorted(zip(order, placed, strict=True))]


def _overlap(low: tuple[float, int], high: tuple[float, int], gap: float) -> bool:
    return high[0] - low[0] < gap * (low[1] + high[1]) / 2


def _merge(low: tuple[float, int], high: tuple[float, int]) -> tuple[float, int]:
    size = low[1] + high[1]
    return (low[0] * low[1] + high[0] * high[1]) / size, size
