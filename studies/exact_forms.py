"""Measures what each way of keeping super weights costs and loses, and prints the tables of docs/quantization.md.

    python studies/exact_forms.py MODEL [--plant LAYER] [--scheme int4-g32] [--windows 32] [--length 128]

Writes the model in each form, loads it by transformers, with PEFT where there is an adapter, runs it in float32, and compares
weights and logits with the original and with matrices that are rounded by hand. Needs compressed-tensors and peft.
"""

import argparse
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig
from transformers.utils import logging

from superweights.checkpoint import Checkpoint
from superweights.checkpoint.stored_matrices import checkpoint_matrices
from superweights.coordinates import Coordinate
from superweights.detection.search import find
from superweights.interventions.conditions import QuantizeWeights
from superweights.interventions.quantized_checkpoint import (
    ADAPTER_FOLDER,
    KeepIn,
    QuantizedCheckpoint,
    quantize_checkpoint,
)
from superweights.interventions.weights import locate_stored
from superweights.measurements.model_windows import open_windows
from superweights.model.loading import load
from superweights.quantization.held_out import rounded
from superweights.quantization.scheme import Scheme
from superweights.testing import plant_super_weight

FORMS: tuple[KeepIn | None, ...] = (None, "plain", "adapter", "int8")


@dataclass(frozen=True)
class Original:
    """The model, and what to compare with."""

    directory: Path
    weights: tuple[Coordinate, ...]
    matrices: Mapping[str, torch.Tensor]
    places: Mapping[str, list[tuple[int, int]]]
    ids: torch.Tensor
    logits: torch.Tensor


def main() -> None:
    """Prints a row for each form."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--plant", type=int, metavar="LAYER", help="plant a super weight there first")
    parser.add_argument("--scheme", default="int4-g32")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        directory = asked.model if asked.plant is None else planted(asked.model, asked.plant, Path(folder) / "planted")
        original = opened(directory, asked.windows, asked.length)
        print(f"{asked.model.name}, {asked.scheme}; kept: {', '.join(map(str, original.weights))}")
        print(
            "| form | bytes | bits per weight | error of the kept weights | of their groups | KL, nats | to rounding by hand |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for form in FORMS:
            print(row(original, Scheme.parse(asked.scheme), form, Path(folder) / str(form)), flush=True)


def planted(model: Path, layer: int, to: Path) -> Path:
    """A copy of a model with a super weight."""
    loaded, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        AutoTokenizer.from_pretrained(model),
    )
    plant_super_weight(loaded, layer=layer, tokenizer=tokenizer)
    loaded.to(torch.bfloat16).save_pretrained(to)
    tokenizer.save_pretrained(to)
    return to


def opened(directory: Path, windows: int, length: int) -> Original:
    """Finds the super weights of a model, and runs it."""
    with load(directory) as model, Checkpoint.open(directory) as checkpoint:
        weights = tuple(each.coordinate for each in find(model).candidates)
        ids = open_windows(model, windows=windows, length=length).ids
        names = [each.tensor for each in checkpoint_matrices(checkpoint)]
        places: dict[str, list[tuple[int, int]]] = {}
        for each in weights:
            places.setdefault(locate_stored(checkpoint, each)[0], []).append((each.row, each.col))
    loaded = transformers_model(directory)
    matrices = {name: loaded.get_parameter(name).detach().clone() for name in names}
    return Original(directory, weights, matrices, places, ids, logits(loaded, ids))


@torch.no_grad()
def transformers_model(directory: Path, **options: Any) -> Any:
    """The model, unpacked in its own dtype as transformers does, and then in float32, which rounds nothing more."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", **options)
    model(torch.zeros((1, 1), dtype=torch.long))  # compressed-tensors unpacks in the first pass
    return torch.nn.Module.float(model)  # its own method refuses packed models, which this one no longer is


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """float32 [windows, tokens, vocabulary]."""
    return torch.cat([model(each[None]).logits for each in ids])


def row(original: Original, scheme: Scheme, form: KeepIn | None, to: Path) -> str:
    """One form: written, loaded and measured."""
    keep = () if form is None else original.weights
    plan = quantize_checkpoint(original.directory, to, [QuantizeWeights(scheme, keep=keep)], keep_in=form or "plain")
    check_plain_loading(to, original.ids)
    with loaded(to, form) as (model, matrix):
        found, values = logits(model, original.ids), {name: matrix(name) for name in original.places}
    expected = by_hand(original, plan, form)
    kl = torch.nn.functional.kl_div(
        found.log_softmax(-1), original.logits.log_softmax(-1), log_target=True, reduction="none"
    )
    cells = [
        "nothing kept" if form is None else f"`{form}`",
        f"{sum(each.stat().st_size for each in to.rglob('*.safetensors'))}",
        f"{plan.bits_per_weight:.3f}",
        f"{max_error(original, values):.2g}",
        f"{100 * group_error(original, values, scheme):.3g} %",
        f"{kl.sum(-1).mean():.5f}",
        f"{(found - expected).abs().max():.2g}",
    ]
    return f"| {' | '.join(cells)} |"


def check_plain_loading(to: Path, ids: torch.Tensor) -> None:
    """Packed and, where there is one scheme, unpacked on loading: both give the same logits."""
    packed = logits(transformers_model(to), ids[:2])
    groups = json.loads((to / "config.json").read_text())["quantization_config"]["config_groups"]
    if len(groups) == 1:
        unpack = CompressedTensorsConfig(dequantize=True)
        assert torch.equal(packed, logits(transformers_model(to, quantization_config=unpack), ids[:2]))


@contextmanager
def loaded(to: Path, form: KeepIn | None) -> Iterator[tuple[Any, Any]]:
    """The model as a user loads it, and its effective matrices."""
    if form != "adapter":
        model = transformers_model(to)
        yield model, lambda name: model.get_parameter(name).detach()
        return
    unpack = CompressedTensorsConfig(dequantize=True)
    model = peft.PeftModel.from_pretrained(transformers_model(to, quantization_config=unpack), to / ADAPTER_FOLDER)

    def matrix(name: str) -> torch.Tensor:
        layer = model.base_model.model.get_submodule(name.removesuffix(".weight"))
        return (layer.base_layer.weight + layer.get_delta_weight("default")).detach()

    yield model, matrix


def by_hand(original: Original, plan: QuantizedCheckpoint, form: KeepIn | None) -> torch.Tensor:
    """Logits of the original with each packed matrix rounded here, and kept weights put back."""
    model = transformers_model(original.directory)
    for name, scheme in plan.quantized.items():
        matrix = original.matrices[name]
        kept = [r * matrix.shape[1] + c for r, c in original.places.get(name, ())] if form == "adapter" else []
        with torch.no_grad():
            model.get_parameter(name).copy_(rounded(matrix.bfloat16(), scheme, kept=kept).float())
    return logits(model, original.ids)


def max_error(original: Original, values: Mapping[str, torch.Tensor]) -> float:
    """The largest relative error of a kept weight."""
    return max(
        abs(float(values[name][place] / original.matrices[name][place]) - 1)
        for name, places in original.places.items()
        for place in places
    )


def group_error(original: Original, values: Mapping[str, torch.Tensor], scheme: Scheme) -> float:
    """Root mean square error of the other weights that share a scale with a kept one, over their root mean square."""
    errors, sizes = 0.0, 0.0
    for name, places in original.places.items():
        cols = original.matrices[name].shape[1]
        size = scheme.weights_per_scale(*original.matrices[name].shape)
        for r, c in places:
            start = c - c % size
            others = [col for col in range(start, min(start + size, cols)) if (r, col) not in places]
            before, after = original.matrices[name][r, others], values[name][r, others]
            errors, sizes = errors + float((after - before).square().sum()), sizes + float(before.square().sum())
    return (errors / sizes) ** 0.5


if __name__ == "__main__":
    main()
