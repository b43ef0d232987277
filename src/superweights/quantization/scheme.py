"""How weights are rounded: to which values, and how many of them share a scale.

A scheme has a text form, which the command line, the records and the names of conditions use: FORMAT-SHARING[-OFFSET].
"""

import re
from dataclasses import dataclass
from typing import Literal, Self

from superweights.errors import UnknownNameError, UsageError

Kind = Literal["int", "nf"]
Sharing = Literal["tensor", "row", "group", "block", "tile"]
Offset = Literal["sym", "signed", "asym", "minmax"]

SCHEME_HELP = (
    "int2 to int8, nf3 or nf4; then what shares a scale: -tensor, -row, -gN (N weights of a row), -blockN or -blockRxC (the "
    "paper's: that many consecutive weights), -tileRxC (true two-dimensional tiles); then -signed (all 2^bits values: the sign "
    "of the scale puts the largest |weight| at the lowest), -asym (integer zero point) or -minmax (the paper's: from the least "
    "to the largest weight)"
)
"""What can be written, for help and messages."""
_TEXT = re.compile(
    r"(?P<kind>int|nf)(?P<bits>\d)-(?:(?P<whole>tensor|row)|g(?P<group>\d+)|(?P<shape>block|tile)(?P<first>\d+)(?:x(?P<second>\d+))?)"
    r"(?:-(?P<offset>sym|signed|asym|minmax))?"
)
_COMMON = (
    "int4-g128", "int4-g128-signed", "int4-g64", "int4-g32", "int4-g128-asym", "int4-row", "int4-tensor",
    "int4-block512x512-minmax", "int4-tile128x128", "int8-row", "int8-tensor", "int8-g128", "int3-g128", "int2-g64",
    "nf4-g64", "nf3-g64",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to round a matrix.

    Example:
        >>> Scheme.parse("int4-g128")
        Scheme(kind='int', bits=4, sharing='group', size=(1, 128), offset='sym')
        >>> str(Scheme.parse("int4-block512x512-minmax"))
        'int4-block512x512-minmax'
    """

    kind: Kind
    """int: equal steps. nf: NormalFloat, steps with equal shares of a normal distribution (arXiv 2305.14314)."""
    bits: int
    """Bits of a code: 2 to 8 for int, 3 or 4 for nf."""
    sharing: Sharing
    """Which weights share a scale."""
    size: tuple[int, int] = (0, 0)
    """Rows and cols of a group, block or tile; (0, 0) for a tensor or a row. A block is only their product: so many consecutive
    weights, row by row."""
    offset: Offset = "sym"
    """sym: the grid is symmetric about 0, from -(2^(bits-1) - 1) to 2^(bits-1) - 1 steps, so the largest |weight| is on it.
    signed: from -2^(bits-1) to 2^(bits-1) - 1 steps; the scale has the sign that puts the largest |weight| at the lowest, as in
    llama.cpp's Q4_0, and steps are smaller (an eighth at 4 bits). asym: 2^bits values from the least to the largest weight (and
    0 among them), with an integer zero point. minmax: the same without rounding the zero point, as in the paper's code; no file
    format holds it."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads the text form.

        Raises:
            UnknownNameError: it is none; names near matches.
            UsageError: its numbers are out of range.
        """
        found = _TEXT.fullmatch(text.strip().lower())
        if found is None:
            raise UnknownNameError(f"{UnknownNameError.among('scheme', text, _COMMON)} Write {SCHEME_HELP}.")
        if found["group"]:
            sharing, size = "group", (1, int(found["group"]))
        elif found["shape"]:
            sharing, size = found["shape"], _pair(found["first"], found["second"])
        else:
            sharing, size = found["whole"], (0, 0)
        return cls(found["kind"], int(found["bits"]), sharing, size, found["offset"] or "sym")  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        fault = None
        if not (2 <= self.bits <= 8 if self.kind == "int" else 3 <= self.bits <= 4):
            fault = "int has 2 to 8 bits, nf 3 or 4"
        elif self.sharing not in ("tensor", "row") and self.size[0] * self.size[1] < 2:
            fault = "at least two weights share a scale"
        elif self.kind == "nf" and self.offset != "sym":
            fault = "nf has no offset: its values are symmetric in rank"
        if fault:
            raise UsageError(f"The scheme {self} cannot be: {fault}. Write {SCHEME_HELP}.")

    def __str__(self) -> str:
        rows, cols = self.size
        shared = {"group": f"g{cols}", "block": f"block{rows}x{cols}" if rows > 1 else f"block{cols}"}
        shared["tile"] = f"tile{rows}x{cols}"
        offset = "" if self.offset == "sym" else f"-{self.offset}"
        return f"{self.kind}{self.bits}-{shared.get(self.sharing, self.sharing)}{offset}"

    def weights_per_scale(self, rows: int, cols: int) -> int:
        """How many weights of a [rows, cols] matrix share a scale."""
        if self.sharing == "tensor":
            return rows * cols
        if self.sharing == "row":
            return cols
        together = self.size[0] * self.size[1]
        return rows * cols if self.sharing == "block" and rows * cols % together else together

    def bits_per_weight(self, rows: int, cols: int, *, scale_bits: int = 16) -> float:
        """Stored bits per weight of a [rows, cols] matrix: code, and a share of scale and offset.

        Example:
            >>> Scheme.parse("int4-g128").bits_per_weight(4096, 4096)
            4.125
        """
        offset_bits = {"sym": 0, "signed": 0, "asym": self.bits, "minmax": scale_bits}[self.offset]
        return self.bits + (scale_bits + offset_bits) / self.weights_per_scale(rows, cols)

    def fault(self, rows: int, cols: int) -> str | None:
        """Why the scheme does not fit a [rows, cols] matrix; None where it does.

        Blocks that do not divide the matrix give way to one scale for all of it, as in the paper's code; groups and tiles are
        never padded.
        """
        if self.sharing == "group" and cols % self.size[1]:
            return f"groups of {self.size[1]} do not divide rows of {cols}; shorter ones do: {_divisors(cols, self.size[1])}"
        if self.sharing == "tile" and (rows % self.size[0] or cols % self.size[1]):
            high, wide = self.size
            fitting = f"{_divisors(rows, high)} rows, {_divisors(cols, wide)} cols"
            return f"tiles of {high} x {wide} do not divide {rows} x {cols}; these sizes do: {fitting}"
        return None


def _pair(first: str, second: str | None) -> tuple[int, int]:
    return (int(first), int(second)) if second else (1, int(first))


def _divisors(number: int, at_most: int) -> str:
    """The largest divisors up to a bound, in words."""
    found = [each for each in range(min(at_most, number), 1, -1) if number % each == 0][:3]
    return ", ".join(map(str, found)) or "none but 1"
