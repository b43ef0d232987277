"""Every error that superweights raises on purpose.

A message says what was being done, to what, what was found and what to do next. The tree::

    SuperweightsError
    ├── UsageError                      the request itself is wrong (exit status 2)
    │   ├── CoordinateError             text that is no coordinate, or one outside its matrix
    │   └── UnknownNameError            a name that does not exist, with near matches
    ├── CheckpointError                 the files cannot be used (exit status 3)
    │   ├── NotACheckpointError         no such path, or no model there
    │   ├── PickleCheckpointError       weights only as pickles, which are never loaded
    │   ├── MalformedFileError          a truncated or lying safetensors, index or config file
    │   ├── MissingTensorError          an index or a caller names a tensor or shard that is not there
    │   ├── NonFiniteWeightsError       NaN or infinite weights
    │   ├── QuantizedCheckpointError    packed weights where plain ones are needed
    │   └── HubError                    offline, gated, or missing repository or revision
    ├── ModelError                      the model cannot be run (exit status 3)
    │   ├── UnsupportedArchitectureError  the structural rules do not fit; says what was seen
    │   ├── RemoteCodeError             the model needs its own Python code
    │   └── WeightMismatchError         tensors that do not fit the model's parameters
    └── RecordError                     a file that cannot be read as records, or written (exit status 3)
"""

from collections.abc import Iterable
from difflib import get_close_matches


class SuperweightsError(Exception):
    """Base of all errors raised on purpose; `exit_status` is the command line's."""

    exit_status = 3


class UsageError(SuperweightsError):
    """The request itself is wrong."""

    exit_status = 2


class CoordinateError(UsageError):
    """Text that is no coordinate, or a coordinate outside its matrix."""


class UnknownNameError(UsageError):
    """A name that does not exist."""

    @classmethod
    def among(cls, kind: str, name: str, known: Iterable[str]) -> "UnknownNameError":
        """Names the near matches of `name`, or all known names when none is near.

        Example:
            >>> print(UnknownNameError.among("method", "papr", ["paper", "residual"]))
            There is no method 'papr'. Did you mean 'paper'?
        """
        names = sorted(known)
        near = get_close_matches(name, names, n=3)
        listed = ", ".join(repr(each) for each in near or names)
        ask = f"Did you mean {listed}?" if near else f"Known: {listed}."
        return cls(f"There is no {kind} {name!r}. {ask}")


class CheckpointError(SuperweightsError):
    """The checkpoint's files cannot be used."""


class NotACheckpointError(CheckpointError):
    """There is no such path, or no model at it."""


class PickleCheckpointError(CheckpointError):
    """The weights are there only as pickles, which are never loaded."""


class MalformedFileError(CheckpointError):
    """A file is truncated or contradicts itself."""


class MissingTensorError(CheckpointError):
    """A tensor or shard that is named somewhere is not there."""


class NonFiniteWeightsError(CheckpointError):
    """Weights are NaN or infinite."""


class QuantizedCheckpointError(CheckpointError):
    """The weights are packed by a quantizer and plain ones are needed."""


class HubError(CheckpointError):
    """The Hub cannot be reached, or refuses the repository or the revision."""


class ModelError(SuperweightsError):
    """The model cannot be built or run."""


class UnsupportedArchitectureError(ModelError):
    """The structural rules do not fit this model."""


class RemoteCodeError(ModelError):
    """The model needs Python code of its own, which was not allowed."""


class WeightMismatchError(ModelError):
    """The checkpoint's tensors do not fit the model's parameters."""


class RecordError(SuperweightsError):
    """A result file cannot be read, or an output file cannot be written."""
