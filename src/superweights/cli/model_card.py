"""What `quantize` writes beside the weights: a model card, and all settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from superweights import __version__
from superweights.interventions.conditions import QuantizeWeights
from superweights.results.records import MeasurementRecord, NoteRecord, Record


def settings_of(model: str, how: Sequence[QuantizeWeights]) -> dict[str, Any]:
    """How the model was quantized, as data; the same for the same request, so an interrupted run is known again."""
    return {
        "made_by": f"superweights {__version__}",
        "model": Path(model).name if Path(model).exists() else model,
        "interventions": [each.describe() for each in how],
    }


def card_of(model: str, how: Sequence[QuantizeWeights], records: Sequence[Record]) -> str:
    """README.md of the quantized model."""
    name = Path(model).resolve().name if Path(model).exists() else model
    schemes = ", ".join(dict.fromkeys(str(each.scheme) for each in how))
    clips = ", ".join(dict.fromkeys(f"clipped by {each.clip}" for each in how if each.clip))
    kept = [str(coordinate) for each in how for coordinate in each.keep]
    front = f"---\nbase_model: {name}\nlibrary_name: transformers\ntags: [compressed-tensors, super-weights]\n---\n"
    lines = [
        f"# {name}, {schemes}",
        f"The weights of the linear layers of the decoder, rounded to nearest by `{schemes}`{f' ({clips})' if clips else ''} "
        f"with superweights {__version__}. Layout: compressed-tensors, pack-quantized.",
        f"Super weights kept: {', '.join(kept)} (layer:row:col of the down projection). The matrices that hold them are stored "
        "unrounded; `quantization_config` in config.json lists them under `ignore`, and the values under `super_weights`."
        if kept
        else "No super weight was kept.",
        "Load it with `AutoModelForCausalLM.from_pretrained(FOLDER)` once `pip install compressed-tensors` is done.",
        _measured(records),
        "All settings are in superweights.json.",
    ]
    return front + "\n\n".join(each for each in lines if each) + "\n"


def _measured(records: Sequence[Record]) -> str:
    shown = ("perplexity", "perplexity_ratio", "kl_to_original")
    found = [
        each for each in records if isinstance(each, MeasurementRecord) and each.name in shown and not each.subject
    ]
    if not found:
        return "\n\n".join(each.text for each in records if isinstance(each, NoteRecord))
    rows = [
        f"| {each.condition} | {each.name.replace('_', ' ')} | {each.value:.5g} | "
        f"{'' if each.interval is None else f'{each.interval[0]:.5g} to {each.interval[1]:.5g}'} |"
        for each in found
    ]
    head = (
        f"Measured on {found[0].count} windows of {found[0].dataset}:\n\n| condition | what | value | 95 % interval |\n"
    )
    return head + "| --- | --- | --- | --- |\n" + "\n".join(rows)
