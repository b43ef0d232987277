"""Finds who packed a checkpoint, and reads one matrix of it."""

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from superweights.checkpoint.checkpoint import Checkpoint
from superweights.checkpoint.packed import awq, bitsandbytes, compressed_tensors, fp8, gptq, hqq, quanto, torchao
from superweights.checkpoint.packed.grids import PackedMatrix
from superweights.checkpoint.packed.stored import PLAIN, StoredModule
from superweights.checkpoint.quantized import QUANTO_MARKS, packing_of, stored_settings
from superweights.errors import MalformedFileError, QuantizedCheckpointError

__all__ = ["PackedMatrix", "packed_format", "read_packed_matrix"]

_Reader = Callable[[StoredModule], PackedMatrix | None]
_MARKS = (
    "qweight", "weight_packed", "W_q", "SCB", "weight.absmax", "weight_scale_inv", "_weight_qdata", *QUANTO_MARKS,
)  # fmt: skip
"""Tensors that only packed modules have."""


def packed_format(checkpoint: Checkpoint) -> str | None:
    """What packed a checkpoint's weights, in words such as "gptq, 4 bits"; None where they are plain.

    It is what the config says (for quanto, the names of the tensors); whether it can be read, `read_packed_matrix` tells.
    """
    return packing_of(checkpoint.config, checkpoint.tensors)


def read_packed_matrix(checkpoint: Checkpoint, module: str) -> PackedMatrix | None:
    """The matrix of a linear layer as the quantizer left it.

    Args:
        checkpoint: any checkpoint; only the module's own tensors are read.
        module: such as model.layers.2.mlp.down_proj.

    Returns:
        The matrix; None where the module's weight is stored plain, or the checkpoint has no such module.

    Raises:
        QuantizedCheckpointError: the format, or this version of it, is not read.
        MalformedFileError: tensors are missing, or contradict each other or the config.
    """
    settings = _settings(checkpoint)
    method = _method(settings) if settings else "quanto" if _marked(checkpoint, module, QUANTO_MARKS) else ""
    stored = StoredModule(checkpoint, module, method or "an unnamed quantizer", settings)
    if any(checkpoint.tensors[name].dtype not in PLAIN for name in _packs(module) if name in checkpoint.tensors):
        raise stored.unread("its experts are packed together in one tensor; read: a module for each")
    if not settings and not _marked(checkpoint, module, _MARKS):
        stored.plain()
        return None
    try:
        return _reader(stored, method)(stored)
    finally:
        prefix = f"{module}."
        checkpoint.drop(name for name in checkpoint.tensors if name.startswith(prefix))


def _reader(stored: StoredModule, method: str) -> _Reader:
    if method in _READERS:
        return _READERS[method]
    near = get_close_matches(method, _READERS, n=2)
    hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"Read are {', '.join(_READERS)}."
    named = f"quant_method {method!r}" if method else "no quant_method in config.json"
    raise QuantizedCheckpointError(
        f"Reading {stored.name} of {stored.checkpoint.reference}: its weights are packed, with {named}. {hint} "
        "docs/packed-formats.md says more."
    )


def _read_auto_round(stored: StoredModule) -> PackedMatrix | None:
    """auto-round packs as AutoAWQ does, or as the first version of GPTQ; what else it wrote once is not read."""
    if not stored.packed_as("qweight", "qzeros", "scales"):
        stored.plain()
        return None
    packing = stored.setting("packing_format", ("auto_round:auto_gptq", "auto_round:auto_awq"), None)
    if packing == "auto_round:auto_awq":
        return awq.read_layout(stored, "auto-round awq")
    return gptq.read_layout(stored, "auto-round gptq", less_one=True)


_READERS: Mapping[str, _Reader] = {
    "gptq": gptq.read,
    "awq": awq.read,
    "auto-round": _read_auto_round,
    "bitsandbytes": bitsandbytes.read,
    "compressed-tensors": compressed_tensors.read,
    "fp8": fp8.read,
    "torchao": torchao.read,
    "hqq": hqq.read,
    "quanto": quanto.read,
}


def _marked(checkpoint: Checkpoint, module: str, marks: Iterable[str]) -> bool:
    return any(f"{module}.{each}" in checkpoint.tensors for each in marks)


def _packs(module: str) -> tuple[str, ...]:
    """Tensors under which the experts of a layer are stored as one, if `module` means all of them."""
    return module, f"{module}_blocks", f"{module}_packed"


def _settings(checkpoint: Checkpoint) -> Mapping[str, Any]:
    key, found = next(stored_settings(checkpoint.config), ("", {}))
    if not isinstance(found, dict):
        raise MalformedFileError(f"config.json of {checkpoint.reference} has the {key} {found!r:.80}.")
    return found


def _method(settings: Mapping[str, Any]) -> str:
    method = settings.get("quant_method")
    if isinstance(method, str):
        return method.removeprefix("intel/")
    if "load_in_4bit" in settings or "load_in_8bit" in settings:
        return "bitsandbytes"
    return "compressed-tensors" if "config_groups" in settings else ""
