"""What `quantize` writes beside the weights: a model card, and all settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from superweights import __version__
from superweights.interventions.conditions import QuantizeWeights
from superweights.interventions.quantized_checkpoint import ADAPTER_FOLDER, KeepIn
from superweights.results.records import MeasurementRecord, NoteRecord, Record

_KEPT: dict[KeepIn, str] = {
    "plain": "The matrices that hold them are stored unrounded; `quantization_config` in config.json lists them under "
    "`ignore`.",
    "adapter": f"They are 0 in the packed files, so that they coarsen no other weight, and the LoRA in `{ADAPTER_FOLDER}/` "
    "adds their exact values. **Without it the model lacks them.** It fits these files only.",
    "int8": "The matrices that hold them are packed in 8 bits, signed, where each is exact as the largest of its group. "
    "transformers 5.23 loads the two schemes as they are, and not with `dequantize=True`.",
}
_LOADING = "Load it with `AutoModelForCausalLM.from_pretrained(FOLDER)` once `pip install compressed-tensors` is done."
_LOADING_BOTH = f"""Load both, in transformers once `pip install compressed-tensors peft` is done:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

unpack = CompressedTensorsConfig(dequantize=True)  # PEFT needs unpacked weights
model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto", quantization_config=unpack)
model = PeftModel.from_pretrained(model, FOLDER + "/{ADAPTER_FOLDER}")
```

In vLLM (not tested): `vllm serve FOLDER --enable-lora --lora-modules exact=FOLDER/{ADAPTER_FOLDER}`, and ask for the model
`exact`. Do not merge the adapter into packed weights: that rounds again."""


def settings_of(model: str, how: Sequence[QuantizeWeights], keep_in: KeepIn) -> dict[str, Any]:
    """How the model was quantized, as data; the same for the same request, so an interrupted run is known again."""
    return {
        "made_by": f"superweights {__version__}",
        "model": Path(model).name if Path(model).exists() else model,
        "interventions": [each.describe() for each in how],
        **({"keep_in": keep_in} if any(each.keep for each in how) else {}),
    }


def card_of(model: str, how: Sequence[QuantizeWeights], records: Sequence[Record], keep_in: KeepIn) -> str:
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
        f"Super weights kept: {', '.join(kept)} (layer:row:col of the down projection). {_KEPT[keep_in]} `super_weights` in "
        "config.json has their values."
        if kept
        else "No super weight was kept.",
        _LOADING_BOTH if kept and keep_in == "adapter" else _LOADING,
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
