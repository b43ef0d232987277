"""Where to cut a group of weights off before it is rounded, so that a few large weights do not set the step of all others."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from superweights.errors import UnknownNameError, UsageError

Method = Literal["z", "signed-z", "block-fraction", "tensor-fraction", "iqr", "mse"]
CLIP_HELP = (
    "z=Z (the paper's code: mean of |w| plus Z standard deviations of |w|), signed-z=Z (mean of w plus and minus Z standard "
    "deviations), block-fraction=F or tensor-fraction=F (that share of the largest |w|), iqr=K (the upper quartile of |w| plus "
    "K times the distance of its quartiles), mse (whatever makes the squared error of a group least)"
)
"""What can be written, for help and messages."""
SquaredError = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The squared error of rounding float32 groups [groups, size] whose |weights| are cut off at [groups]: [groups]."""
_SHRINK_STEPS = 40
"""Cuts that `mse` tries: 100 %, 98 %, ... 22 % of the largest |weight|."""


@dataclass(frozen=True, slots=True)
class Clip:
    """One way to clip; every group of weights that shares a scale is cut by itself.

    Source:
        arXiv 2411.07191, section 4.2, and the paper's code for z, block-fraction, tensor-fraction and iqr; of a tensor, and of
        blocks that do not divide it, that code cuts one weight less than the share.

    Example:
        >>> str(Clip.parse("z=9"))
        'z=9'
    """

    method: Method
    """How the cut is found; see `CLIP_HELP`."""
    amount: float = 0.0
    """Standard deviations, a share, or a multiple of the quartiles' distance; nothing for mse."""

    @classmethod
    def parse(cls, text: str) -> "Clip":
        """Reads the text form.

        Raises:
            UnknownNameError: there is no such method.
            UsageError: the amount is missing or out of range.
        """
        method, _, amount = text.strip().partition("=")
        if method not in get_args(Method):
            raise UnknownNameError(
                f"{UnknownNameError.among('way to clip', method, get_args(Method))} Write {CLIP_HELP}."
            )
        try:
            return cls(method, float(amount or "0"))  # type: ignore[arg-type]
        except ValueError as error:
            raise UsageError(f"Clipping by {text}: {amount!r} is no number. Write {CLIP_HELP}.") from error

    def __post_init__(self) -> None:
        fits = {"mse": self.amount == 0, "block-fraction": 0 < self.amount < 1, "tensor-fraction": 0 < self.amount < 1}
        if not fits.get(self.method, 0 < self.amount < torch.inf):
            raise UsageError(f"Clipping by {self}: the amount is out of range. Write {CLIP_HELP}.")

    def __str__(self) -> str:
        return self.method if self.method == "mse" else f"{self.method}={self.amount!r}".removesuffix(".0")


def thresholds(groups: torch.Tensor, clip: Clip, error: SquaredError) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each group is cut, below and above.

    Args:
        groups: weights [groups, size].
        clip: how.
        error: what rounding costs after a cut; for mse.

    Returns:
        Lower and upper bounds, float32 [groups] each, the lower at most the upper.
    """
    if clip.method == "tensor-fraction":
        top = _largest_kept(groups.reshape(1, -1).float().abs(), clip.amount).expand(len(groups))
        return -top, top
    found = [_cut(piece.float(), clip, error) for piece in torch.split(groups, max(1, (1 << 20) // groups.shape[1]))]
    return torch.cat([low for low, _ in found]), torch.cat([high for _, high in found])


def _cut(groups: torch.Tensor, clip: Clip, error: SquaredError) -> tuple[torch.Tensor, torch.Tensor]:
    if clip.method == "z":
        sizes = groups.abs()
        top = sizes.mean(1) + clip.amount * _std(sizes)
    elif clip.method == "signed-z":
        mean, reach = groups.mean(1), clip.amount * _std(groups)
        return mean - reach, mean + reach
    elif clip.method == "iqr":
        ordered = groups.abs().sort(1).values
        lower, upper = _quantile(ordered, 0.25), _quantile(ordered, 0.75)
        top = upper + clip.amount * (upper - lower)
    elif clip.method == "block-fraction":
        top = _largest_kept(groups.abs(), clip.amount)
    else:
        top = _least_error(groups, error)
    return -top, top


def _std(groups: torch.Tensor) -> torch.Tensor:
    """With Bessel's correction, [groups]; 0 of a single weight."""
    return groups.std(1, correction=min(1, groups.shape[1] - 1))


def _quantile(ordered: torch.Tensor, share: float) -> torch.Tensor:
    """Linear interpolation between ordered values [groups, size], as numpy's; torch's own stops at 16 million values."""
    place = share * (ordered.shape[1] - 1)
    below = int(place)
    above = min(below + 1, ordered.shape[1] - 1)
    return torch.lerp(ordered[:, below], ordered[:, above], place - below)


def _largest_kept(sizes: torch.Tensor, share: float) -> torch.Tensor:
    """The largest |weight| that is not among that share of the largest, [groups]."""
    count = min(int(share * sizes.shape[1]), sizes.shape[1] - 1)
    return sizes.topk(count + 1, dim=1).values[:, -1]


def _least_error(groups: torch.Tensor, error: SquaredError) -> torch.Tensor:
    """The cut of |weights| with the least squared error, [groups]; the largest of equally good ones."""
    largest = groups.abs().amax(1)
    best, least = largest.clone(), torch.full_like(largest, torch.inf)
    for step in range(_SHRINK_STEPS):
        cut = largest * (1 - 0.02 * step)
        found = error(groups, cut)
        better = found < least
        best, least = torch.where(better, cut, best), torch.where(better, found, least)
    return best
