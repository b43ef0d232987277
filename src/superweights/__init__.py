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
    from superweights.experiments.ablation import ablate
    from superweights.experiments.comparison import compare
    from superweights.experiments.evaluation import Evaluation, evaluate
    from superweights.experiments.repair import repair
    from superweights.experiments.scaling import scale
    from superweights.experiments.sinks import sinks
    from superweights.experiments.stop_words import stop_words
    from superweights.experiments.verify import Verification, VerifySettings, verify
    from superweights.interventions.conditions import Condition, QuantizeActivations, QuantizeWeights
    from superweights.interventions.edit_text import parse_edit
    from superweights.interventions.quantized_checkpoint import quantize_checkpoint
    from superweights.interventions.quantized_gguf import quantize_to_gguf
    from superweights.interventions.rewriting import rewrite_checkpoint
    from superweights.interventions.rows import applied
    from superweights.measurements.model_windows import open_windows
    from superweights.measurements.windows import Windows
    from superweights.model.loading import LoadedModel, load
    from superweights.model.prompts import Prompt, make_prompts
    from superweights.model.tracing import Trace, trace
    from superweights.quantization.clipping import Clip
    from superweights.quantization.held_out import rounded
    from superweights.quantization.scheme import Scheme

__version__ = "0.1.0"

_HOMES = {
    "Candidate": "detection.candidates",
    "Clip": "quantization.clipping",
    "Condition": "interventions.conditions",
    "DetectionSettings": "detection.candidates",
    "Evaluation": "experiments.evaluation",
    "Findings": "detection.search",
    "LoadedModel": "model.loading",
    "Prompt": "model.prompts",
    "QuantizeActivations": "interventions.conditions",
    "QuantizeWeights": "interventions.conditions",
    "Scheme": "quantization.scheme",
    "Trace": "model.tracing",
    "Verification": "experiments.verify",
    "VerifySettings": "experiments.verify",
    "Windows": "measurements.windows",
    "ablate": "experiments.ablation",
    "applied": "interventions.rows",
    "compare": "experiments.comparison",
    "evaluate": "experiments.evaluation",
    "find": "detection.search",
    "load": "model.loading",
    "make_prompts": "model.prompts",
    "open_windows": "measurements.model_windows",
    "parse_edit": "interventions.edit_text",
    "quantize_checkpoint": "interventions.quantized_checkpoint",
    "quantize_to_gguf": "interventions.quantized_gguf",
    "repair": "experiments.repair",
    "rewrite_checkpoint": "interventions.rewriting",
    "rounded": "quantization.held_out",
    "scale": "experiments.scaling",
    "sinks": "experiments.sinks",
    "stop_words": "experiments.stop_words",
    "trace": "model.tracing",
    "verify": "experiments.verify",
}
"""Public names that need torch, imported when first asked for."""

__all__ = [
    "Candidate",
    "Clip",
    "Condition",
    "Coordinate",
    "DetectionSettings",
    "Evaluation",
    "Findings",
    "LoadedModel",
    "Prompt",
    "QuantizeActivations",
    "QuantizeWeights",
    "Scheme",
    "Trace",
    "Verification",
    "VerifySettings",
    "Windows",
    "ablate",
    "applied",
    "compare",
    "evaluate",
    "find",
    "load",
    "make_prompts",
    "open_windows",
    "parse_edit",
    "quantize_checkpoint",
    "quantize_to_gguf",
    "repair",
    "rewrite_checkpoint",
    "rounded",
    "scale",
    "sinks",
    "stop_words",
    "trace",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"superweights.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'superweights' has no attribute {name!r}")
