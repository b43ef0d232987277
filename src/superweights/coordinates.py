"""Where a weight is: layer, optional expert, row (output channel) and col (input channel).

`W[row, col]` is always [hidden, intermediate], whatever way the checkpoint stores the matrix.
"""

import re
from dataclasses import dataclass
from typing import Self

from superweights.errors import CoordinateError

_TEXT = re.compile(r"(\d+)(?:/(\d+))?:(\d+):(\d+)")


@dataclass(frozen=True, slots=True)
class Coordinate:
    """One scalar of a down projection.

    Example:
        >>> Coordinate.parse("2:3968:7003")
        Coordinate(layer=2, expert=None, row=3968, col=7003)
        >>> str(Coordinate.parse("3/82:511:40"))
        '3/82:511:40'
    """

    layer: int
    """Decoder layer, from 0."""
    expert: int | None
    """Routed expert, from 0; None for a dense or shared-expert projection."""
    row: int
    """Output channel: a channel of the residual stream."""
    col: int
    """Input channel: an intermediate neuron."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `LAYER:ROW:COL` or `LAYER/EXPERT:ROW:COL`.

        Raises:
            CoordinateError: the text has another form.
        """
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            raise CoordinateError(
                f"{text!r} is no coordinate. Write LAYER:ROW:COL, or LAYER/EXPERT:ROW:COL for a routed expert, "
                "with row = output channel and col = input channel, for example 2:3968:7003."
            )
        layer, expert, row, col = match.groups()
        return cls(int(layer), None if expert is None else int(expert), int(row), int(col))

    def __lt__(self, other: "Coordinate") -> bool:
        return self._order < other._order

    @property
    def _order(self) -> tuple[int, int, int, int]:
        return self.layer, -1 if self.expert is None else self.expert, self.row, self.col

    def __str__(self) -> str:
        expert = "" if self.expert is None else f"/{self.expert}"
        return f"{self.layer}{expert}:{self.row}:{self.col}"
