"""Interventions as data, and conditions: named sets of interventions that a sweep compares.

Nothing here touches a model. `weights` and `outputs` carry interventions out; results record them as data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from superweights.coordinates import Coordinate


@dataclass(frozen=True, slots=True)
class ScaleWeights:
    """Multiplies weights by a factor; 0 removes them."""

    weights: tuple[Coordinate, ...]
    """Which weights."""
    factor: float = 0.0
    """What they are multiplied by."""

    def describe(self) -> dict[str, Any]:
        """The intervention as data."""
        return {"kind": "scale", "factor": self.factor, "weights": [str(each) for each in self.weights]}


@dataclass(frozen=True, slots=True)
class AddToWeights:
    """Adds to each weight a value of its own, in float32: what is stored would be rounded."""

    weights: tuple[Coordinate, ...]
    """Which weights."""
    values: tuple[float, ...]
    """What is added to each."""

    def describe(self) -> dict[str, Any]:
        """The intervention as data."""
        return {"kind": "add", "weights": [str(each) for each in self.weights], "values": list(self.values)}


@dataclass(frozen=True, slots=True)
class PruneLargest:
    """Sets the largest |weights| of every matrix of the decoder layers to zero: the paper's control.

    Source:
        arXiv 2411.07191, table 1, "Prune Non-SW".
    """

    amount: float | int
    """A float is the share of each matrix, rounded down; an int is how many weights of each matrix."""
    keep: tuple[Coordinate, ...] = ()
    """Weights that stay and count as not there, such as the super weights."""

    def describe(self) -> dict[str, Any]:
        """The intervention as data."""
        kept = [str(each) for each in self.keep]
        return {"kind": "prune largest", "amount": self.amount, "keep": kept}


@dataclass(frozen=True, slots=True)
class RestoreSuperActivation:
    """Puts back the one value per sequence that removed weights took from the output of their down projection.

    In each sequence, the token where the untouched output is largest in the weight's row keeps its untouched value; all
    other tokens stay as the edit leaves them.

    Source:
        arXiv 2411.07191, table 1, "Prune SW, +SA".
    """

    weights: tuple[Coordinate, ...]
    """The removed weights; only layer, expert and row matter."""

    def describe(self) -> dict[str, Any]:
        """The intervention as data."""
        return {"kind": "restore super activation", "weights": [str(each) for each in self.weights]}


@dataclass(frozen=True, slots=True)
class EditSuperActivation:
    """Changes one value of the residual stream per sequence: the largest of a channel after a decoder layer.

    Source:
        Sun et al., arXiv 2402.17762, section 3: set massive activations to zero or to their mean.
    """

    layer: int
    """Decoder layer after which the stream is edited."""
    channel: int
    """Channel of the stream."""
    factor: float = 0.0
    """What the value is multiplied by; 0 removes it."""
    value: float | None = None
    """What the value becomes; replaces `factor`."""

    def describe(self) -> dict[str, Any]:
        """The intervention as data."""
        change = {"factor": self.factor} if self.value is None else {"value": self.value}
        return {"kind": "edit super activation", "layer": self.layer, "channel": self.channel, **change}


Intervention = ScaleWeights | AddToWeights | PruneLargest | RestoreSuperActivation | EditSuperActivation


@dataclass(frozen=True, slots=True)
class Condition:
    """A named state of a model: what is done to it, in order."""

    name: str
    """How tables and plots name it."""
    interventions: tuple[Intervention, ...] = ()
    """What is done; nothing for the original."""

    def describe(self) -> dict[str, Any]:
        """The condition as data; empty for the original."""
        steps = [each.describe() for each in self.interventions]
        return {} if not steps else steps[0] if len(steps) == 1 else {"kind": "several", "steps": steps}


ORIGINAL = Condition("original")
"""The unedited model."""


def removal(weights: Sequence[Coordinate], *, name: str) -> Condition:
    """The condition in which these weights are removed."""
    return Condition(name, (ScaleWeights(tuple(weights)),))


def weights_removed(weights: Sequence[Coordinate]) -> Condition:
    """The condition "weights removed"."""
    return removal(weights, name="weights removed")


def super_activation_restored(weights: Sequence[Coordinate]) -> Condition:
    """The condition "removed, super activation restored": the weights are gone, what they made at one token is put back."""
    weights = tuple(weights)
    return Condition("removed, super activation restored", (ScaleWeights(weights), RestoreSuperActivation(weights)))


def with_and_without(weights: Sequence[Coordinate]) -> tuple[Condition, ...]:
    """The original, and both conditions above; the original alone where there are no weights."""
    weights = tuple(dict.fromkeys(weights))
    return (ORIGINAL, weights_removed(weights), super_activation_restored(weights)) if weights else (ORIGINAL,)
