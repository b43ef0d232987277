"""Quantized weights as a checkpoint that other tools load: compressed-tensors, layout pack-quantized.

A matrix that holds a kept weight stays as it is stored, exact and readable by everyone; `ignore` in the config says so.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from superweights.checkpoint import Checkpoint, ModelReference
from superweights.checkpoint.converting import NewTensor, Replacement, convert_checkpoint
from superweights.checkpoint.stored_matrices import StoredMatrix, checkpoint_matrices
from superweights.checkpoint.stored_projection import model_type_of
from superweights.coordinates import Coordinate
from superweights.errors import NonFiniteWeightsError, UsageError
from superweights.interventions.conditions import QuantizeWeights
from superweights.interventions.weights import check_fit, locate_stored
from superweights.progress import NO_PROGRESS, Progress
from superweights.quantization.packing import pack, packed_cols
from superweights.quantization.rounding import Quantized, quantize
from superweights.quantization.scheme import Scheme

_PACKED_SHARINGS = ("row", "group")
_HEADS = (
    "lm_head", "lm_head.decoder", "generator_lm_head", "cls.predictions.decoder", "output_projection", "embed_out", "decoder",
    "proj_out", "head", "output",
)  # fmt: skip
"""What heads are called that a model may share with its embeddings and so not store."""
_ONE_EXPERT = re.compile(r"(?:^|\.)experts\.\d+\.")
"""In the names of routed experts that are stored one by one."""
_UNPACKING_TYPES = {"llama4", "llama4_text"}
"""Model types whose packed experts transformers replaces by single ones when a model is quantized, and then does not find."""


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """What was written, or will be."""

    quantized: Mapping[str, Scheme]
    """Stored tensors that are packed, and how."""
    kept: tuple[str, ...]
    """Matrices that stay as they are stored because they hold a kept weight, or no packed format holds them."""
    bits_per_weight: float
    """Stored bits per weight of the matrices of the decoder layers, kept ones included."""
    nbytes: int
    """Bytes of all tensors."""


def quantize_checkpoint(
    source: ModelReference | str | Path,
    to: str | Path,
    how: Sequence[QuantizeWeights],
    *,
    settings: Mapping[str, Any] | None = None,
    card: str | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> QuantizedCheckpoint:
    """Writes a packed checkpoint of any size, a few tensors in memory at a time.

    Several threads take a tensor each; the bytes are the same whatever their number. An interrupted run goes on where it was.

    Args:
        source: a directory, a Hub name or a URL; it is only read.
        to: the new folder.
        how: the schemes; where there are several, each names its tensors.
        settings: recorded in superweights.json.
        card: text of README.md.
        overwrite: whether a model that is at `to` already may be replaced.
        threads: tensors worked on at once; default: one per core.
        progress: hears about each tensor.

    Raises:
        UsageError: a scheme cannot be packed or does not fit, or `to` is taken.
        CoordinateError: a kept weight is not in this model.
        QuantizedCheckpointError: the weights are packed already.
        NonFiniteWeightsError: a weight is NaN or infinite.
        RecordError: the files cannot be written; nothing is left of them.
    """
    with Checkpoint.open(source) as checkpoint:
        plan = plan_quantized_checkpoint(checkpoint, how)
        replacements = {
            each.tensor: _replacement(checkpoint, each, plan.quantized[each.tensor], how)
            for each in checkpoint_matrices(checkpoint)
            if each.tensor in plan.quantized
        }
        replacements.update(_amplified(checkpoint, how))
        config = {**checkpoint.config, "quantization_config": _quantization_config(checkpoint, plan, how)}
        files = {"config.json": json.dumps(config, indent=2) + "\n"}
        if settings is not None:
            files["superweights.json"] = json.dumps(settings, indent=2) + "\n"
        if card is not None:
            files["README.md"] = card
        convert_checkpoint(
            checkpoint,
            Path(to),
            replacements,
            files=files,
            recipe=repr([each.describe() for each in how]),
            overwrite=overwrite,
            threads=threads,
            progress=progress,
        )
    return plan


def plan_quantized_checkpoint(checkpoint: Checkpoint, how: Sequence[QuantizeWeights]) -> QuantizedCheckpoint:
    """What `quantize_checkpoint` would write; reads no weight.

    Raises: as `quantize_checkpoint`, but for what only weights and the disk can show.
    """
    checkpoint.require_plain("quantizing")
    matrices = {each.tensor: each for each in checkpoint_matrices(checkpoint)}
    quantized: dict[str, Scheme] = {}
    for each in how:
        _check_packable(checkpoint, each)
        strange = sorted(set(each.only or ()) - matrices.keys())
        if strange:
            raise UsageError(f"Quantizing {checkpoint.reference}: {strange[0]} is no matrix of its decoder layers.")
        quantized.update(dict.fromkeys(matrices if each.only is None else each.only, each.scheme))
    for coordinate in (coordinate for each in how for coordinate in each.keep):
        tensor, _ = locate_stored(checkpoint, coordinate)
        if tensor not in matrices:
            raise UsageError(
                f"Keeping {coordinate} of {checkpoint.reference}: {tensor} is not quantized. Leave it out."
            )
        quantized.pop(tensor, None)
    packs = [name for name in quantized if matrices[name].experts is not None or matrices[name].transposed]
    for name in packs:  # no packed format holds several matrices in one tensor, or [cols, rows]
        del quantized[name]
    if not quantized:
        what = (
            f"all matrices are like {packs[0]}, which no packed format holds"
            if packs
            else "no matrix is left to quantize"
        )
        raise UsageError(f"Quantizing {checkpoint.reference}: {what}. `--measure` evaluates it without writing.")
    _check_experts(checkpoint, matrices, quantized, packs)
    for name, scheme in quantized.items():
        check_fit(scheme, matrices[name], str(checkpoint.reference))
    old = {name: entry.nbytes for name, entry in checkpoint.tensors.items()}
    new = {
        name: sum(each.nbytes for each in _new_tensors(checkpoint, matrices[name], scheme))
        for name, scheme in quantized.items()
    }
    sizes = old | new
    weights = sum(each.numel for each in matrices.values())
    return QuantizedCheckpoint(
        quantized,
        tuple(name for name in matrices if name not in quantized),
        8 * sum(sizes[name] for name in matrices) / weights,
        sum(sizes.values()),
    )


def _check_packable(checkpoint: Checkpoint, how: QuantizeWeights) -> None:
    fault = None
    if how.scheme.kind != "int" or how.scheme.sharing not in _PACKED_SHARINGS or how.scheme.offset == "minmax":
        fault = "packed are int2 to int8, each row or group with its own scale, sym, signed or asym, such as int4-g128"
    elif how.largest:
        fault = "kept weights leave their whole matrix unpacked, so the largest of every matrix cannot be kept"
    elif how.factors:
        fault = "smoothed weights need their norms changed as well, which is only measured"
    if fault:
        raise UsageError(
            f"Quantizing {checkpoint.reference} by {how.scheme} into files: {fault}. `--measure` evaluates it without writing."
        )


def _check_experts(
    checkpoint: Checkpoint, matrices: Collection[str], quantized: Mapping[str, Scheme], packs: Sequence[str]
) -> None:
    """Refuses what transformers 5.23 would load without an error, or with one that says little, and with experts of noise.

    It merges routed experts that are stored one by one, and for that decodes them all by one scheme; plain ones get lost.
    """
    alone = [name for name in matrices if _ONE_EXPERT.search(name)]
    odd = next(
        (name for name in alone if quantized.get(name) != quantized.get(alone[0]) or name not in quantized), None
    )
    fault = None
    if odd is not None:
        how = f"be packed by {quantized[odd]}" if odd in quantized else "stay as it is stored"
        fault = f"{odd} would {how}, but transformers loads routed experts only where all are packed by one scheme"
    elif packs and model_type_of(checkpoint.config) in _UNPACKING_TYPES:
        fault = f"{packs[0]} would stay packed, but transformers loads experts of this model type only one by one"
    if fault:
        raise UsageError(f"Quantizing {checkpoint.reference}: {fault}. `--measure` evaluates it without writing.")


def _new_tensors(checkpoint: Checkpoint, matrix: StoredMatrix, scheme: Scheme) -> tuple[NewTensor, ...]:
    rows, cols = matrix.rows, matrix.cols
    groups = cols // scheme.weights_per_scale(rows, cols)
    found = [
        NewTensor(f"{matrix.tensor}_packed", "I32", (rows, packed_cols(cols, scheme.bits))),
        NewTensor(f"{matrix.tensor}_scale", checkpoint.tensors[matrix.tensor].dtype, (rows, groups)),
        NewTensor(f"{matrix.tensor}_shape", "I64", (2,)),
    ]
    if scheme.offset == "asym":
        found.append(NewTensor(f"{matrix.tensor}_zero_point", "I32", (packed_cols(rows, scheme.bits), groups)))
    return tuple(found)


def _replacement(
    checkpoint: Checkpoint, matrix: StoredMatrix, scheme: Scheme, how: Sequence[QuantizeWeights]
) -> Replacement:
    clip = next(each.clip for each in reversed(how) if each.only is None or matrix.tensor in each.only)

    def make(weights: torch.Tensor) -> list[torch.Tensor]:
        try:
            return packed_tensors(quantize(weights, scheme, clip=clip))
        except NonFiniteWeightsError as error:
            raise NonFiniteWeightsError(f"{checkpoint.reference}, {matrix.tensor}: {error}") from error

    return Replacement(_new_tensors(checkpoint, matrix, scheme), make)


def packed_tensors(quantized: Quantized) -> list[torch.Tensor]:
    """A quantized matrix as compressed-tensors stores it: packed codes, scales, shape, and zero points of asymmetric grids.

    Args:
        quantized: by rows or groups of rows, sym, signed or asym; its codes are used up.

    Returns:
        int32 [rows, words]; scales [rows, groups]; int64 [2]; for asym int32 [words, groups], packed along rows.
    """
    rows, cols = quantized.shape
    scheme = quantized.scheme
    codes = quantized.codes.view(rows, cols)
    if scheme.offset != "asym":
        codes = codes.view(torch.uint8).add_(1 << (scheme.bits - 1))  # wraps, as int8 did
    tensors = [
        pack(codes, scheme.bits),
        quantized.grids.scales.view(rows, -1),
        torch.tensor([rows, cols], dtype=torch.int64),
    ]
    if quantized.grids.offsets is not None:
        tensors.append(pack(quantized.grids.offsets.view(rows, -1).t(), scheme.bits).t().contiguous())
    return tensors


def _amplified(checkpoint: Checkpoint, how: Sequence[QuantizeWeights]) -> dict[str, Replacement]:
    """Kept matrices whose kept weights are multiplied."""
    factors: dict[str, dict[tuple[int, ...], float]] = {}
    for each in how:
        for coordinate in each.keep if each.amplify != 1 else ():
            tensor, index = locate_stored(checkpoint, coordinate)
            factors.setdefault(tensor, {})[index] = each.amplify
    same = {name: NewTensor(name, checkpoint.tensors[name].dtype, checkpoint.tensors[name].shape) for name in factors}
    return {name: Replacement((same[name],), partial(_multiplied, places)) for name, places in factors.items()}


def _multiplied(places: Mapping[tuple[int, ...], float], weights: torch.Tensor) -> list[torch.Tensor]:
    changed = weights.clone()
    for index, factor in places.items():
        changed[index] *= factor
    return [changed]


def _quantization_config(
    checkpoint: Checkpoint, plan: QuantizedCheckpoint, how: Sequence[QuantizeWeights]
) -> dict[str, Any]:
    """What transformers, vLLM and compressed-tensors read."""
    modules: dict[Scheme, list[str]] = {}
    # Experts first: transformers decodes them by the first group.
    for name, scheme in sorted(plan.quantized.items(), key=lambda each: _ONE_EXPERT.search(each[0]) is None):
        modules.setdefault(scheme, []).append(name.rpartition(".")[0])
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if len(modules) == 1 else names,
            "weights": _arguments(scheme),
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
        for number, (scheme, names) in enumerate(modules.items())
    }
    matrices = [
        name for name, entry in checkpoint.tensors.items() if len(entry.shape) == 2 and name.endswith(".weight")
    ]
    plain = [name.rpartition(".")[0] for name in matrices if name not in plan.quantized]
    kept = [_kept(checkpoint, coordinate, each.amplify) for each in how for coordinate in each.keep]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(dict.fromkeys([*_HEADS, *plain])),
        "kv_cache_scheme": None,
        "super_weights": kept,
    }


def _arguments(scheme: Scheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.offset != "asym",
        "strategy": "group" if scheme.sharing == "group" else "channel",
        "group_size": scheme.size[1] if scheme.sharing == "group" else None,
        "dynamic": False,
    }


def _kept(checkpoint: Checkpoint, coordinate: Coordinate, amplify: float) -> dict[str, Any]:
    tensor, index = locate_stored(checkpoint, coordinate)
    dtype = getattr(torch, str(checkpoint.tensors[tensor].storage.torch))
    value = torch.tensor(checkpoint.read_scalar(tensor, index).value, dtype=dtype) * amplify
    return {
        "coordinate": str(coordinate),
        "tensor": tensor,
        "row": coordinate.row,
        "col": coordinate.col,
        "value": value.item(),
    }
