"""superweights: find the super weights of large language models.

Example:
    >>> import superweights as sw
    >>> with sw.load(example_checkpoint) as model:
    ...     findings = sw.find(model)
    >>> [str(candidate.coordinate) for candidate in findings.candidates]
    ['2:49:7']
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from superweights.coordinates import Coordinate

if TYPE_CHECKING:
    from superweights.detection.candidates import Candidate, DetectionSettings
    from superweights.detection.search import Findings, find
    from superweights.model.loading import LoadedModel, load
    from superweights.model.prompts import Prompt, make_prompts
    from superweights.model.tracing import Trace, trace

__version__ = "0.1.0"

_HOMES = {
    "Candidate": "detection.candidates",
    "DetectionSettings": "detection.candidates",
    "Findings": "detection.search",
    "LoadedModel": "model.loading",
    "Prompt": "model.prompts",
    "Trace": "model.tracing",
    "find": "detection.search",
    "load": "model.loading",
    "make_prompts": "model.prompts",
    "trace": "model.tracing",
}
"""Public names that need torch, imported when first asked for."""

__all__ = [
    "Candidate",
    "Coordinate",
    "DetectionSettings",
    "Findings",
    "LoadedModel",
    "Prompt",
    "Trace",
    "find",
    "load",
    "make_prompts",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"superweights.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'superweights' has no attribute {name!r}")
