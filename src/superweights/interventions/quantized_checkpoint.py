"""Quantized weights as a checkpoint that other tools load: compressed-tensors, layout pack-quantized.

A kept weight is exact in one of three ways (`KeepIn`). By default its matrix stays as it is stored, readable by everyone, and
`ignore` in the config says so.
"""

import json
import math
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from superweights.checkpoint import Checkpoint, ModelReference
from superweights.checkpoint.converting import NewTensor, Replacement, convert_checkpoint
from superweights.checkpoint.stored_matrices import StoredMatrix, checkpoint_matrices
from superweights.checkpoint.stored_projection import model_type_of
from superweights.coordinates import Coordinate
from superweights.errors import NonFiniteWeightsError, UsageError
from superweights.interventions.adapter import QuantizedFiles, plan_adapter, write_adapter_files
from superweights.interventions.conditions import QuantizeWeights
from superweights.interventions.weights import check_fit, locate_stored
from superweights.model.loading import LoadedModel, load
from superweights.progress import NO_PROGRESS, Progress
from superweights.quantization.held_out import quantize_held_out
from superweights.quantization.packing import pack, packed_cols
from superweights.quantization.rounding import Quantized, quantize
from superweights.quantization.scheme import Scheme

KeepIn = Literal["plain", "adapter", "int8"]
"""How a kept weight is exact in the files.

plain: its matrix is not packed. adapter: every matrix is packed, a kept weight as 0, so that it sets no range; a LoRA in the
folder `ADAPTER_FOLDER` of the new one adds it. int8: its matrix is packed in 8 bits, signed, where the largest weight of a
group is on the grid to the bit.
"""
ADAPTER_FOLDER = "adapter"
"""Where an adapter lies in the folder of its model: readers of checkpoints look at the top level only."""
_PACKED_SHARINGS = ("row", "group")
_HEADS = (
    "lm_head", "lm_head.decoder", "generator_lm_head", "cls.predictions.decoder", "output_projection", "embed_out", "decoder",
    "proj_out", "head", "output",
)  # fmt: skip
"""What heads are called that a model may share with its embeddings and so not store."""
_ONE_EXPERT = re.compile(r"(?:^|\.)experts\.\d+\.")
"""In the names of routed experts that are stored one by one."""
_EXPERT_PATTERN = r"re:.*\bexperts\.\d+\..*"
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
    """Stored bits per weight of the matrices of the decoder layers, kept ones and an adapter included."""
    nbytes: int
    """Bytes of all tensors, an adapter's included."""
    keep_in: KeepIn = "plain"
    """How kept weights are exact."""
    keeping_nbytes: int = 0
    """How many of the bytes are there to keep weights exact: what would be saved if their matrices were packed like others."""
    bits_per_weight_without: float = 0.0
    """Bits per weight if their matrices were packed like others."""
    held: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Packed tensors, and the flat indices of their weights that are 0 there and come back by adapter."""


def quantize_checkpoint(
    source: ModelReference | str | Path,
    to: str | Path,
    how: Sequence[QuantizeWeights],
    *,
    keep_in: KeepIn = "plain",
    settings: Mapping[str, Any] | None = None,
    card: str | None = None,
    trust_remote_code: bool = False,
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
        keep_in: how kept weights are exact.
        settings: recorded in superweights.json.
        card: text of README.md.
        trust_remote_code: whether Python code that comes with the model may run; an adapter needs the names of its modules.
        overwrite: whether a model that is at `to` already may be replaced.
        threads: tensors worked on at once; default: one per core.
        progress: hears about each tensor.

    Raises:
        UsageError: a scheme cannot be packed or does not fit, a weight cannot be kept in this way, or `to` is taken.
        CoordinateError: a kept weight is not in this model.
        QuantizedCheckpointError: the weights are packed already.
        NonFiniteWeightsError: a weight is NaN or infinite.
        ModelError: for an adapter, the model cannot be built.
        RecordError: the files cannot be written; nothing is left of them.
    """
    with ExitStack() as stack:
        checkpoint = stack.enter_context(Checkpoint.open(source))
        plan = plan_quantized_checkpoint(checkpoint, how, keep_in=keep_in)
        finish = None
        if plan.held:
            weights = [each for each in _coordinates(how) if locate_stored(checkpoint, each)[0] in plan.held]
            reference = checkpoint.reference
            original = stack.enter_context(
                load(
                    reference.name,
                    revision=reference.revision,
                    residency="streamed",
                    trust_remote_code=trust_remote_code,
                )
            )
            finish = partial(_add_adapter, original, weights, str(to))
        if keep_in == "int8":
            _check_largest(checkpoint, plan, how)
        kept = {locate_stored(checkpoint, each)[0] for each in _coordinates(how)}
        replacements = {
            each.tensor: _replacement(checkpoint, each, plan, how, kept=each.tensor in kept)
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
            recipe=repr(([each.describe() for each in how], keep_in)),
            finish=finish,
            overwrite=overwrite,
            threads=threads,
            progress=progress,
        )
    return plan


def plan_quantized_checkpoint(
    checkpoint: Checkpoint, how: Sequence[QuantizeWeights], *, keep_in: KeepIn = "plain"
) -> QuantizedCheckpoint:
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
    packs = [name for name in quantized if matrices[name].experts is not None or matrices[name].transposed]
    for name in packs:  # no packed format holds several matrices in one tensor, or [cols, rows]
        del quantized[name]
    places = _places(checkpoint, matrices, how)
    alike = {name: quantized[name] for name in places if name in quantized}
    """How matrices with kept weights would be packed if these were like any others."""
    held: dict[str, tuple[int, ...]] = {}
    if keep_in == "adapter":
        _check_adaptable(checkpoint, how)
        held = {name: tuple(places[name]) for name in alike}
    elif keep_in == "int8":
        _check_fine(checkpoint, how, alike)
        quantized |= {name: replace(scheme, bits=8, offset="signed") for name, scheme in alike.items()}
    else:
        quantized = {name: scheme for name, scheme in quantized.items() if name not in alike}
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

    def size(name: str, scheme: Scheme) -> int:
        return sum(each.nbytes for each in _new_tensors(checkpoint, matrices[name], scheme))

    sizes = {name: entry.nbytes for name, entry in checkpoint.tensors.items()}
    sizes |= {name: size(name, scheme) for name, scheme in quantized.items()}
    rank = max(map(len, held.values()), default=0)
    adapter = sum(4 * rank * (matrices[name].rows + matrices[name].cols) for name in held)
    keeping = adapter + sum(sizes[name] - size(name, scheme) for name, scheme in alike.items())
    weights = sum(each.numel for each in matrices.values())
    stored = adapter + sum(sizes[name] for name in matrices)
    return QuantizedCheckpoint(
        quantized,
        tuple(name for name in matrices if name not in quantized),
        8 * stored / weights,
        adapter + sum(sizes.values()),
        keep_in,
        keeping,
        8 * (stored - keeping) / weights,
        held,
    )


def _coordinates(how: Sequence[QuantizeWeights]) -> tuple[Coordinate, ...]:
    return tuple(dict.fromkeys(coordinate for each in how for coordinate in each.keep))


def _places(
    checkpoint: Checkpoint, matrices: Mapping[str, StoredMatrix], how: Sequence[QuantizeWeights]
) -> dict[str, list[int]]:
    """Flat indices of the kept weights, row by row, by tensor."""
    found: dict[str, list[int]] = {}
    for coordinate in _coordinates(how):
        tensor, _ = locate_stored(checkpoint, coordinate)
        if tensor not in matrices:
            raise UsageError(
                f"Keeping {coordinate} of {checkpoint.reference}: {tensor} is not quantized. Leave it out."
            )
        found.setdefault(tensor, []).append(coordinate.row * matrices[tensor].cols + coordinate.col)
    return found


def _check_adaptable(checkpoint: Checkpoint, how: Sequence[QuantizeWeights]) -> None:
    """Refuses what an adapter does not restore."""
    for coordinate in _coordinates(how):
        if coordinate.expert is not None:
            raise UsageError(
                f"Keeping {coordinate} of {checkpoint.reference} in an adapter: it is of a routed expert, on which engines "
                "load no LoRA in one common form. Leave it out, or measure it (`--measure`)."
            )
    _check_amplify(checkpoint, how, "in an adapter")


def _check_fine(checkpoint: Checkpoint, how: Sequence[QuantizeWeights], alike: Mapping[str, Scheme]) -> None:
    """Refuses what would make a model that transformers cannot load: a second scheme beside one with zero points."""
    odd = next((name for name, scheme in alike.items() if scheme.offset == "asym"), None)
    if odd is not None:
        raise UsageError(
            f"Keeping weights of {checkpoint.reference} in int8: {odd} would be symmetric and others {alike[odd]}, and "
            "transformers loads no such mixture. Take a scheme without -asym, or keep them plain or in an adapter."
        )
    _check_amplify(checkpoint, how, "in int8")


def _check_amplify(checkpoint: Checkpoint, how: Sequence[QuantizeWeights], where: str) -> None:
    if any(each.amplify != 1 and each.keep for each in how):
        raise UsageError(
            f"Keeping weights of {checkpoint.reference} {where}: they keep their value there. Amplify them in the plain way."
        )


def _check_largest(checkpoint: Checkpoint, plan: QuantizedCheckpoint, how: Sequence[QuantizeWeights]) -> None:
    """Refuses a kept weight that is not on the 8-bit grid to the bit."""
    for coordinate in _coordinates(how):
        tensor = locate_stored(checkpoint, coordinate)[0]
        if tensor not in plan.quantized:
            continue
        checkpoint.fetch((tensor,))
        row = checkpoint.view(tensor)[coordinate.row : coordinate.row + 1]
        exact = row[0, coordinate.col].item()
        found = quantize(row, plan.quantized[tensor]).dequantized(row.dtype)[0, coordinate.col].item()
        if found != exact:
            raise UsageError(
                f"Keeping {coordinate} of {checkpoint.reference} in int8: it is {exact:g} and would be {found:g}, as only the "
                f"largest weight of a {plan.quantized[tensor].sharing} is exact there. Keep it plain or in an adapter."
            )


def _add_adapter(original: LoadedModel, weights: Sequence[Coordinate], to: str, folder: Path) -> None:
    """Writes into the folder of a new checkpoint what restores its kept weights."""
    target = folder / ADAPTER_FOLDER
    shutil.rmtree(target, ignore_errors=True)  # of an interrupted run
    with Checkpoint.open(folder) as checkpoint:
        found = plan_adapter(original, QuantizedFiles(checkpoint), weights)
    if found.matrices:
        write_adapter_files(replace(found, quantized=replace(found.quantized, name=to)), target)


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
    checkpoint: Checkpoint,
    matrix: StoredMatrix,
    plan: QuantizedCheckpoint,
    how: Sequence[QuantizeWeights],
    *,
    kept: bool,
) -> Replacement:
    scheme, held = plan.quantized[matrix.tensor], plan.held.get(matrix.tensor, ())
    clip = next(each.clip for each in reversed(how) if each.only is None or matrix.tensor in each.only)
    if plan.keep_in == "int8" and kept:
        clip = None  # what is kept is not cut off

    def make(weights: torch.Tensor) -> list[torch.Tensor]:
        try:
            return packed_tensors(quantize_held_out(weights, scheme, held, clip=clip))
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
    groups = _groups(plan)
    matrices = [
        name for name, entry in checkpoint.tensors.items() if len(entry.shape) == 2 and name.endswith(".weight")
    ]
    plain = [name.rpartition(".")[0] for name in matrices if name not in plan.quantized]
    kept = [_kept(checkpoint, coordinate, each.amplify, plan) for each in how for coordinate in each.keep]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(dict.fromkeys([*_HEADS, *plain])),
        "kv_cache_scheme": None,
        "super_weights": kept,
    }


def _groups(plan: QuantizedCheckpoint) -> dict[str, Any]:
    """The config_groups.

    With `dequantize=True`, transformers 5.23 decodes all dense layers by one group: the first without a pattern of experts. So
    experts get a group with a pattern, and the others go from wide to narrow: narrow codes read as wide ones are too few, and
    loading stops instead of giving wrong weights.
    """
    modules: dict[tuple[Scheme, bool], list[str]] = {}
    for name, scheme in plan.quantized.items():
        # Symmetric and signed files are read alike.
        read = replace(scheme, offset="sym") if scheme.offset == "signed" else scheme
        modules.setdefault((read, _ONE_EXPERT.search(name) is not None), []).append(name.rpartition(".")[0])
    if len({scheme for scheme, _ in modules}) == 1:
        modules = {(next(iter(modules))[0], False): ["Linear"]}
    ordered = sorted(modules.items(), key=lambda each: (not each[0][1], -each[0][0].bits, each[0][0].offset == "sym"))
    return {
        f"group_{number}": {
            "targets": [_EXPERT_PATTERN] if experts else names,
            "weights": _arguments(scheme),
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
        for number, ((scheme, experts), names) in enumerate(ordered)
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


def _kept(checkpoint: Checkpoint, coordinate: Coordinate, amplify: float, plan: QuantizedCheckpoint) -> dict[str, Any]:
    tensor, index = locate_stored(checkpoint, coordinate)
    dtype = getattr(torch, str(checkpoint.tensors[tensor].storage.torch))
    value = torch.tensor(checkpoint.read_scalar(tensor, index).value, dtype=dtype) * amplify
    if tensor in plan.held and not math.isfinite(value.item()):
        raise NonFiniteWeightsError(
            f"Keeping {coordinate} of {checkpoint.reference} in an adapter: it is {value.item():g}. Leave it out."
        )
    return {
        "coordinate": str(coordinate),
        "tensor": tensor,
        "row": coordinate.row,
        "col": coordinate.col,
        "value": value.item(),
        **({"keep_in": plan.keep_in} if plan.keep_in != "plain" and tensor in plan.quantized else {}),
    }
