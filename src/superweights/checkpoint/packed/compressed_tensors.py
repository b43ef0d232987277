"""compressed-tensors: what llm-compressor, auto-round and this package write, and vLLM reads.

    pack-quantized        weight_packed int32 [rows, words], weight_shape [2], weight_scale, weight_zero_point, weight_g_idx
    int-quantized         weight int8 [rows, cols], weight_scale, weight_zero_point
    float-quantized       weight float8 [rows, cols], weight_scale
    naive-quantized       one of these two
    mxfp8-quantized       weight float8, weight_scale uint8: the exponent of two, plus 127
    nvfp4-pack-quantized  weight_packed uint8 [rows, cols / 2], weight_scale float8, weight_global_scale that divides it
    mxfp4-pack-quantized  weight_packed as before, weight_scale uint8: the exponent of two, plus 127

Which weights share a scale is said by the group of the config that a module belongs to. Packed integers are stored plus
2^(bits-1). In older versions no code ran over the end of a word, which shows for 3, 5, 6 and 7 bits.

Source:
    compressed-tensors 0.20, compressors/, quantization/lifecycle/forward.py and utils/match.py.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from superweights.checkpoint.packed.codes import E2M1, bit_string, separate_words
from superweights.checkpoint.packed.grids import PackedMatrix, Scales, even_grid, signed_ends, spread, table_grid, tiles
from superweights.checkpoint.packed.stored import FLOAT8, FLOATS, StoredModule

_WHOLE = ("int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized")
_HALVES = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
FORMATS = ("pack-quantized", *_WHOLE, *_HALVES)
"""The layouts that are read."""
_EXPONENT_BIAS = 127
_STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")
_LINEAR = "Linear"
"""The class that packed modules have. Other classes are not told from names; they hold no packed matrix."""


@dataclass(frozen=True)
class _Scheme:
    """How the group of a module says that its weights are stored."""

    format: str
    bits: int
    symmetric: bool
    strategy: str
    size: tuple[int, int] | None
    """Rows and cols that share a scale, where the strategy leaves that open."""


def read(stored: StoredModule) -> PackedMatrix | None:
    """Reads a module; None where it is plain."""
    if not stored.has("weight_packed") and (stored.dtype("weight") in (None, "F32", "F16", "BF16", "F64")):
        if not stored.has("weight") and stored.has("weight_scale"):
            raise stored.malformed("it has weight_scale but neither weight nor weight_packed")
        return None
    for key in ("transform_config", "sparsity_config"):
        found = stored.settings.get(key)
        if isinstance(found, dict) and found and found.get("format") != "dense":
            raise stored.unread(f"its weights are changed or thinned out before they are packed ({key} {found!r:.80})")
    scheme = _scheme(stored)
    if not stored.has("weight_scale"):
        raise stored.malformed("it has no weight_scale")
    if scheme.format in _HALVES:
        return _read_halves(stored, scheme)
    if stored.has("weight_packed"):
        return _read_packed(stored, scheme)
    return _read_whole(stored, scheme)


def _read_packed(stored: StoredModule, scheme: _Scheme) -> PackedMatrix:
    if scheme.format != "pack-quantized":
        raise stored.malformed(f"it has weight_packed, but the config says {scheme.format}")
    rows, cols = (int(each) for each in stored.tensor("weight_shape", ("I64", "I32"), (2,)).tolist())
    packed = stored.tensor("weight_packed", ("I32",), (rows, None))
    codes = _signed(stored, packed, cols, scheme)
    scales = _scales(stored, scheme, (rows, cols))
    zeros = _zeros(stored, scheme, (rows, cols), packed=True)
    return _even(stored, scheme, codes, scales, zeros)


def _read_whole(stored: StoredModule, scheme: _Scheme) -> PackedMatrix:
    if scheme.format not in _WHOLE:
        raise stored.malformed(f"its weight is stored as {stored.dtype('weight')}, but the config says {scheme.format}")
    if stored.dtype("weight") not in FLOAT8:
        codes = stored.tensor("weight", ("I8",), (None, None))
        shape = (codes.shape[0], codes.shape[1])
        return _even(stored, scheme, codes, _scales(stored, scheme, shape), _zeros(stored, scheme, shape, packed=False))
    codes, table = stored.float8("weight", (None, None))
    scales = _scales(stored, scheme, (codes.shape[0], codes.shape[1]))
    return table_grid(stored.name, _words(scheme), scheme.bits, codes, scales, table=table)


def _read_halves(stored: StoredModule, scheme: _Scheme) -> PackedMatrix:
    packed = stored.tensor("weight_packed", ("U8",), (None, None))
    shape = (packed.shape[0], packed.shape[1] * 2)
    scales = _scales(stored, scheme, shape)
    if scheme.format.startswith("nvfp4"):
        total = stored.tensor("weight_global_scale", ("F32",), (1,))
        scales = Scales(scales.values / total.reshape(1, 1), scales.shared)
    codes = bit_string(packed, 4, shape[1])
    return table_grid(stored.name, _words(scheme), 4, codes, scales, table=torch.tensor(E2M1))


def _even(
    stored: StoredModule, scheme: _Scheme, codes: torch.Tensor, scales: Scales, zeros: torch.Tensor | None
) -> PackedMatrix:
    ends = signed_ends(codes, scheme.bits, symmetric=zeros is None)
    return even_grid(stored.name, _words(scheme), scheme.bits, codes, scales, zeros=zeros, ends=ends)


def _words(scheme: _Scheme) -> str:
    return f"compressed-tensors {scheme.format}"


def _signed(stored: StoredModule, packed: torch.Tensor, count: int, scheme: _Scheme) -> torch.Tensor:
    """int8 [rows, count]."""
    words, bits = packed.shape[1], scheme.bits
    if words == math.ceil(count * bits / 32):
        codes = bit_string(packed, bits, count)
    elif words == math.ceil(count / (32 // bits)):
        codes = separate_words(packed, bits, count)
    else:
        raise stored.malformed(f"{count} codes of {bits} bits do not fill the {words} words that are stored for them")
    return (codes.short() - (1 << (bits - 1))).to(torch.int8)


def _scales(stored: StoredModule, scheme: _Scheme, shape: tuple[int, int]) -> Scales:
    dtypes = (*FLOATS, "U8", "F8_E8M0", "F8_E4M3")
    block = _block(stored, scheme, shape)
    grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    scales = stored.tensor("weight_scale", dtypes, None if scheme.strategy == "tensor" else grid)
    if scales.numel() != math.prod(grid):
        raise stored.malformed(f"weight_scale has {scales.numel()} values for the whole matrix")
    values = (scales.float() - _EXPONENT_BIAS).exp2() if scales.dtype == torch.uint8 else scales.float()
    found = tiles(values.reshape(grid), shape, block)
    order = _order(stored, shape[1], grid[1])
    if order is None:
        return found
    blocks = order.int() + grid[1] * torch.arange(shape[0], dtype=torch.int32)[:, None]
    return Scales(values.reshape(grid)[:, order], found.shared, blocks)


def _zeros(stored: StoredModule, scheme: _Scheme, shape: tuple[int, int], *, packed: bool) -> torch.Tensor | None:
    if scheme.symmetric and not stored.has("weight_zero_point"):
        return None
    block = _block(stored, scheme, shape)
    grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    if packed and stored.dtype("weight_zero_point") == "I32":
        stacked = stored.tensor("weight_zero_point", ("I32",), (None, grid[1]))
        zeros = _signed(stored, stacked.t().contiguous(), grid[0], scheme).t()
    else:
        zeros = stored.tensor("weight_zero_point", ("I8", "I16", "I32", "I64", *FLOATS))
        if zeros.numel() != math.prod(grid):
            raise stored.malformed(
                f"weight_zero_point has the shape {list(zeros.shape)}, where {list(grid)} is expected"
            )
        zeros = zeros.reshape(grid)
    if scheme.symmetric:  # some versions store the zeros of a symmetric grid
        if bool(zeros.any()):
            raise stored.malformed("the config says that its grid is symmetric, but it has zero points that are not 0")
        return None
    order = _order(stored, shape[1], grid[1])
    return spread(zeros.float(), shape, block) if order is None else zeros[:, order].float()


def _order(stored: StoredModule, cols: int, groups: int) -> torch.Tensor | None:
    """The group of each column, where they are mixed."""
    if not stored.has("weight_g_idx"):
        return None
    order = stored.tensor("weight_g_idx", ("I32", "I64"), (cols,)).long()
    if int(order.max()) < 0:  # all -1: no order was chosen
        return None
    if int(order.min()) < 0 or int(order.max()) >= groups:
        raise stored.malformed(f"weight_g_idx names groups {int(order.min())} to {int(order.max())} of {groups}")
    return None if torch.equal(order, torch.arange(cols) // -(-cols // groups)) else order


def _block(stored: StoredModule, scheme: _Scheme, shape: tuple[int, int]) -> tuple[int, int]:
    known = {"tensor": shape, "channel": (1, shape[1])}
    block = known.get(scheme.strategy, scheme.size)
    if block is None:
        raise stored.malformed(f"its scales are per {scheme.strategy}, but the config does not say of what size")
    return block


def _scheme(stored: StoredModule) -> _Scheme:
    groups = stored.settings.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(each, dict) for each in groups.values()):
        raise stored.malformed(f"the config has the config_groups {groups!r:.80}")
    targets = {target: group for group in groups.values() for target in _texts(stored, group.get("targets"))}
    chosen = next((each for each in sorted(targets, key=_rank) if each == _LINEAR or _names(stored, each)), None)
    if chosen is None:
        raise stored.malformed(
            f"it is packed, but no target of the config is this module: {', '.join(targets) or 'none'}"
        )
    if any(_names(stored, each) for each in _texts(stored, stored.settings.get("ignore"))):
        raise stored.malformed("it is packed, but the config names it among those to ignore")
    return _read_scheme(stored, targets[chosen])


def _texts(stored: StoredModule, given: object) -> list[str]:
    if given is not None and not (isinstance(given, list) and all(isinstance(each, str) for each in given)):
        raise stored.malformed(f"the config has {given!r:.80} where names of modules are expected")
    return given or []


def _rank(target: str) -> tuple[bool, bool, str]:
    """Names go before patterns, and these before the class."""
    return target == _LINEAR, target.startswith("re:"), target


def _names(stored: StoredModule, target: str) -> bool:
    if not target.startswith("re:"):
        return target == stored.name
    try:
        return re.match(target.removeprefix("re:"), stored.name) is not None
    except re.error as error:
        raise stored.malformed(f"the config has the pattern {target!r}, which is none ({error})") from error


def _read_scheme(stored: StoredModule, group: Mapping[str, Any]) -> _Scheme:
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise stored.malformed(f"the config says of its weights {weights!r:.80}")
    format = group.get("format") or stored.settings.get("format")
    if format not in FORMATS:
        raise stored.unread(f"its layout is {format!r}; read: {', '.join(FORMATS)}")
    bits, symmetric = weights.get("num_bits"), weights.get("symmetric", True)
    if type(bits) is not int or not 1 <= bits <= 8 or not isinstance(symmetric, bool):
        raise stored.malformed(f"the config says num_bits {bits!r} and symmetric {symmetric!r}")
    strategy = _strategy(weights)
    if strategy not in _STRATEGIES:
        raise stored.unread(f"its scales are per {strategy!r}; read: {', '.join(_STRATEGIES)}")
    return _Scheme(format, bits, symmetric, strategy, _size(strategy, weights))


def _strategy(weights: Mapping[str, Any]) -> Any:
    """What shares a scale; where that is not said it follows from the group size."""
    named, size = weights.get("strategy"), weights.get("group_size")
    if named is not None:
        return named
    return "tensor" if size is None else "channel" if size == -1 else "group"


def _size(strategy: str, weights: Mapping[str, Any]) -> tuple[int, int] | None:
    if strategy == "block":
        size = weights.get("block_structure")
        size = size.split("x") if isinstance(size, str) else size  # older files have "128x128"
    else:
        size = [1, weights.get("group_size")]
    if (
        not isinstance(size, list)
        or len(size) != 2
        or not all(str(each).isdecimal() and int(each) > 0 for each in size)
    ):
        return None
    return int(size[0]), int(size[1])
