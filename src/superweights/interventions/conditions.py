"""Interventions as data, and conditions: named sets of interventions that a sweep compares.

Nothing here touches a model. `weights` and `outputs` carry interventions out; results record them as data.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from superweights.coordinates import Coordinate
from superweights.quantization.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from superweights.quantization.activations import Span
    from superweights.quantization.clipping import Clip
    from superweights.quantization.held_out import Keep


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


@dataclass(frozen=True, slots=True)
class QuantizeWeights:
    """Rounds the matrices of linear layers of the decoder layers, and dequantizes them to the dtype they are stored in.

    Source:
        arXiv 2411.07191, section 4.2.
    """

    scheme: Scheme
    """To which values."""
    clip: "Clip | None" = None
    """What is cut off before."""
    keep: tuple[Coordinate, ...] = ()
    """Weights that keep their value to the bit, such as the super weights."""
    keep_by: "Keep" = "hold-out"
    """Whether kept weights take part in the range of their group."""
    largest: int = 0
    """How many of the largest |weights| of each matrix are kept as well."""
    amplify: float = 1.0
    """What the weights of `keep` are multiplied by once they are back."""
    only: tuple[str, ...] | None = None
    """Stored tensors to round; None for all matrices."""
    factors: "Mapping[str, torch.Tensor]" = field(default_factory=dict, compare=False)
    """By module: what its input channels are multiplied by before rounding, [cols]; their inputs are divided by the same."""

    def describe(self) -> dict[str, Any]:
        """The intervention as data."""
        found = {"kind": "quantize weights", "scheme": str(self.scheme)}
        more = {
            "clip": self.clip and str(self.clip),
            "keep": [str(each) for each in self.keep],
            "keep_by": self.keep_by if self.keep or self.largest else None,
            "largest": self.largest,
            "amplify": None if self.amplify == 1 else self.amplify,
            "only": self.only and list(self.only),
            "smoothed": sorted(self.factors),
        }
        return {**found, **{key: value for key, value in more.items() if value}}


@dataclass(frozen=True, slots=True)
class LoadWeights:
    """Takes the weights of the decoder layers from elsewhere, such as from a quantized checkpoint of the same model."""

    source: str
    """Where they come from, in words."""
    read: "Callable[[str], torch.Tensor | None]" = field(compare=False)
    """Gives what stands for a stored tensor, in its shape, by name; None leaves the model's own."""
    keep: tuple[Coordinate, ...] = ()
    """Weights that keep the model's own value."""

    def describe(self) -> dict[str, Any]:
        """The intervention as data."""
        kept = {"keep": [str(each) for each in self.keep]} if self.keep else {}
        return {"kind": "load weights", "source": self.source, **kept}


@dataclass(frozen=True, slots=True)
class RoundedInput:
    """How the input of one linear layer is rounded."""

    module: str
    """Name of the linear layer."""
    channel: int | None = None
    """Channel of its super activation, which is replaced before and restored after rounding; None for none."""
    scale: float | None = None
    """What a step is worth, from a calibration; None takes it from each input."""


@dataclass(frozen=True, slots=True)
class QuantizeActivations:
    """Rounds what goes into linear layers, and dequantizes it.

    In each sequence the super activation of an input is the largest |value| of its channel.

    Source:
        arXiv 2411.07191, section 4.1.
    """

    inputs: tuple[RoundedInput, ...]
    """Which inputs, and what is special about each."""
    bits: int = 8
    """Bits of an activation."""
    span: "Span" = "token"
    """Whether each token has a scale of its own, or a sequence has one."""
    median: "Span" = "token"
    """Of what a super activation takes the median while others are rounded."""
    attention: bool = False
    """Whether queries, keys, values and probabilities of attention are rounded too."""
    factors: "Mapping[str, torch.Tensor]" = field(default_factory=dict, compare=False)
    """By module: what its input channels are divided by, [channels]; see `QuantizeWeights.factors`."""

    def describe(self) -> dict[str, Any]:
        """The intervention as data."""
        channels = {each.module: each.channel for each in self.inputs if each.channel is not None}
        scales = {each.module: each.scale for each in self.inputs if each.scale is not None}
        found = {"kind": "quantize activations", "bits": self.bits, "span": self.span, "inputs": len(self.inputs)}
        more = {
            "super_activations": channels,
            "median": self.median if channels else None,
            "scales": scales,
            "attention": self.attention,
            "smoothed": sorted(self.factors),
        }
        return {**found, **{key: value for key, value in more.items() if value}}


Intervention = (
    ScaleWeights
    | AddToWeights
    | PruneLargest
    | RestoreSuperActivation
    | EditSuperActivation
    | QuantizeWeights
    | QuantizeActivations
    | LoadWeights
)


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

    @property
    def needs_own_pass(self) -> bool:
        """Whether it cannot run beside other conditions, as rows of one batch."""
        in_rows = ScaleWeights | AddToWeights | RestoreSuperActivation | EditSuperActivation
        return not all(isinstance(each, in_rows) for each in self.interventions)


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
