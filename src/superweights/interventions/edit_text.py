"""The text form of a condition, as `--edit` takes it: steps joined by `+`, such as `scale=0+restore-sa`."""

import math
from collections.abc import Callable, Sequence

from superweights.coordinates import Coordinate
from superweights.errors import UnknownNameError, UsageError
from superweights.interventions.conditions import (
    Condition,
    EditSuperActivation,
    Intervention,
    PruneLargest,
    RestoreSuperActivation,
    ScaleWeights,
)

EDIT_HELP = (
    "scale=FACTOR (0 removes), restore-sa (put the super activation back), sa=FACTOR or sa=mean (edit the super activation "
    "itself), prune-largest=SHARE or COUNT (the largest other weights of every matrix)"
)
"""What can be written, for help and messages."""
_STEPS = ("scale", "restore-sa", "sa", "prune-largest")


def parse_edit(
    text: str, weights: Sequence[Coordinate], *, mean: Callable[[Coordinate], float] | None = None
) -> Condition:
    """Reads steps joined by `+`.

    Args:
        text: the steps.
        weights: the super weights that they are about.
        mean: gives the mean super activation of a weight; asked for by `sa=mean` alone.

    Returns:
        A condition named by its text and weights.

    Raises:
        UnknownNameError: there is no such step; names near matches.
        UsageError: a value is missing or is no number.

    Example:
        >>> parse_edit("scale=0", [Coordinate.parse("2:49:7")]).name
        'scale=0 on 2:49:7'
    """
    steps = [step for part in text.split("+") for step in _parse_step(part.strip(), text, tuple(weights), mean)]
    listed = ", ".join(map(str, weights))
    return Condition(f"{text} on {listed}" if listed else text, tuple(steps))


def _parse_step(
    part: str, text: str, weights: tuple[Coordinate, ...], mean: Callable[[Coordinate], float] | None
) -> Sequence[Intervention]:
    name, equals, value = part.partition("=")
    if name not in _STEPS:
        raise UnknownNameError(f"--edit {text}: {UnknownNameError.among('edit', name, _STEPS)} Write {EDIT_HELP}.")
    if name == "restore-sa" and not equals:
        return [RestoreSuperActivation(weights)]
    places = dict.fromkeys((each.layer, each.row) for each in weights)
    if name == "sa" and value == "mean" and mean is not None:
        values = {(each.layer, each.row): mean(each) for each in weights}
        return [EditSuperActivation(layer, row, value=values[layer, row]) for layer, row in places]
    number = _number(value)
    if number is not None and name == "scale":
        return [ScaleWeights(weights, number)]
    if number is not None and name == "sa":
        return [EditSuperActivation(layer, row, factor=number) for layer, row in places]
    if number is not None and name == "prune-largest" and number > 0:
        return [PruneLargest(int(value) if value.isdecimal() else number, keep=weights)]
    raise UsageError(f"--edit {text}: {part!r} has no value that fits. Write {EDIT_HELP}, joined by +.")


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
