"""Linear layers that multiply packed weights, with super weights put back exactly.

One layer holds one matrix in the layout `pack-quantized` of compressed-tensors, or, once it is prepared, in the layout of the
torch kernel that fits; never both, and `state_dict` always gives the first. The one idea: a kernel needs to know nothing of
super weights. `y[..., row] += delta * x[..., col]` puts one back on top of any product, and one super activation per token is
taken out of an 8-bit product in the same way.

Which kernel: codes of up to 4 bits in groups run on torch's int4 kernel, rows of up to 8 bits on its int8 kernel, both with
bfloat16 activations, in which alone they are fast. Many tokens at once are multiplied by dequantized tiles, which beats both,
and 8-bit activations by the processor's 8-bit products where it has them. What fits neither kernel is dequantized at each pass:
right, slow, and said once in the log.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import nn
from torch.nn import functional

from superweights.errors import CoordinateError, MalformedFileError, UsageError
from superweights.interventions.quantized_checkpoint import packed_tensors
from superweights.model.widening import multiplies_bfloat16
from superweights.quantization.clipping import Clip
from superweights.quantization.held_out import quantize_held_out
from superweights.quantization.packing import pack, packed_cols, unpack
from superweights.quantization.scheme import Scheme

Kernel = Literal["int4", "int8", "int4-cuda", "dequantize"]
"""int4, int8: torch's kernels on the CPU. int4-cuda: its tinygemm kernel. dequantize: none fits."""

MANY_TOKENS = 64
"""From so many tokens on, dequantizing a tile costs less than what the float product of torch saves over its packed kernels."""
MANY_TOKENS_INT8 = 16
"""The same for 8-bit codes where the processor multiplies bfloat16 or 8-bit integers itself; measured with AVX512."""
_TILE = 1 << 20
"""Weights that are dequantized together."""
_PACK_ROWS = 1024
"""Rows that are brought into a kernel's layout together; whole blocks of every processor's layout."""
_INT4_GROUPS = (256, 128, 64, 32)
"""Weights that share a scale in the int4 kernels; a longer group is several with the same scale."""
_ALIGNED = 32
"""Torch's int8 kernel crashes on activations whose address does not divide by 32 bytes: a view must start at so many values."""
_TOP = 127

_LOG = logging.getLogger(__name__)


class SuperWeight(NamedTuple):
    """One weight that a layer holds exactly, whatever its codes say."""

    row: int
    col: int
    value: float


def kernel_for(
    bits: int, rows: int, cols: int, groups: int, device: torch.device | str, *, int8_inputs: bool = False
) -> Kernel:
    """Which kernel multiplies a matrix of symmetric codes.

    Args:
        bits: of a code, 2 to 8.
        rows: output channels.
        cols: input channels.
        groups: scales of a row.
        device: where the matrix lies.
        int8_inputs: whether activations are rounded to 8 bits as well.

    Example:
        >>> kernel_for(4, 4096, 11008, 86, "cpu"), kernel_for(8, 4096, 11008, 1, "cpu"), kernel_for(8, 4096, 11008, 86, "cpu")
        ('int4', 'int8', 'dequantize')
    """
    device = torch.device(device)
    row_scales = groups == 1 and cols % 16 == 0  # the kernel reads 16 codes at once, past the end of other rows
    if device.type == "cpu":
        if bits <= 4 and rows % 16 == 0 and _int4_group(cols // groups) and not int8_inputs:
            return "int4"
        return "int8" if row_scales else "dequantize"
    if int8_inputs:
        return "int8" if device.type == "cuda" and row_scales and rows % 8 == 0 else "dequantize"
    fits = bits <= 4 and rows % 8 == 0 and cols % 32 == 0 and _int4_group(cols // groups)
    return "int4-cuda" if fits and _has_tinygemm(device) else "dequantize"


def _int4_group(size: int) -> int | None:
    return next((each for each in _INT4_GROUPS if size % each == 0), None)


def _has_tinygemm(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def multiplies_int8() -> bool:
    """Whether this processor has instructions for products of 8-bit integers (VNNI); without, `torch._int_mm` is slow."""
    return bool(getattr(torch.cpu, "_is_vnni_supported", bool)())


@cache
def _say_slow(codes: str) -> None:
    _LOG.warning(
        "No kernel takes %s: such matrices are dequantized at each pass, which is slow. Kernels take up to 4 bits in groups of "
        "32, 64, 128 or a multiple of 256, rows in sixteens, and up to 8 bits with one scale per row, cols in sixteens.",
        codes,
    )


class PackedLinear(nn.Module):
    """A linear layer over symmetric integer codes, for inference.

    Made on its own it is empty: `load_state_dict` fills it, then `prepare` chooses the kernel. `pack` does all of it.

    Args:
        cols: input channels.
        rows: output channels.
        bits: of a code, 2 to 8.
        groups: scales of a row; they divide `cols`.
        bias: whether there is one.
        int8_inputs: round activations to 8 bits by token as well (W8A8); needs one scale per row.
        channel: input channel of a super activation, which is then not rounded and sets no token's scale.
        dtype: of the bias.
        scale_dtype: of the scales.
        device: where the tensors lie.

    Raises:
        UsageError: bits, groups or the activations' bits do not fit.
        CoordinateError: there is no such channel.

    Example:
        >>> weight = torch.randn(64, 64)
        >>> layer = PackedLinear.pack(weight, Scheme.parse("int4-g32"), held=[(3, 5)])
        >>> layer(torch.ones(2, 7, 64)).shape
        torch.Size([2, 7, 64])
        >>> bool(layer.dequantized()[3, 5] == weight[3, 5])
        True
    """

    weight_packed: torch.Tensor
    weight_scale: torch.Tensor
    weight_shape: torch.Tensor
    kernel_codes: torch.Tensor
    kernel_scales: torch.Tensor
    places: torch.Tensor
    tail_places: torch.Tensor

    def __init__(
        self,
        cols: int,
        rows: int,
        bits: int,
        *,
        groups: int = 1,
        bias: bool = False,
        int8_inputs: bool = False,
        channel: int | None = None,
        dtype: torch.dtype | None = None,
        scale_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        what = f"A packed layer of {rows} x {cols} weights in {bits} bits"
        if not 2 <= bits <= 8 or cols % groups:
            raise UsageError(
                f"{what} with {groups} scales per row cannot be: 2 to 8 bits, and scales that divide a row."
            )
        if int8_inputs and groups != 1:
            raise UsageError(
                f"{what} with {groups} scales per row cannot take 8-bit inputs: that needs one scale per row."
            )
        if channel is not None and not (int8_inputs and 0 <= channel < cols):
            raise CoordinateError(f"{what}: channel {channel} is none of 0 to {cols - 1}, or inputs are not rounded.")
        self.in_features, self.out_features = cols, rows
        self.bits, self.groups = bits, groups
        self.int8_inputs, self.channel = int8_inputs, channel
        self.kernel: Kernel | None = None
        self._reads_layout = True
        self.super_weights: tuple[SuperWeight, ...] = ()
        self._deltas: tuple[float, ...] = ()
        self._wide: torch.dtype | None = torch.float32
        self._int8_units = False
        self._hold("weight_packed", torch.empty(rows, packed_cols(cols, bits), dtype=torch.int32, device=device))
        scale_dtype = scale_dtype or torch.get_default_dtype()
        self._hold("weight_scale", torch.empty(rows, groups, dtype=scale_dtype, device=device))
        self._hold("weight_shape", torch.tensor([rows, cols], device=device))
        self.bias = nn.Parameter(torch.empty(rows, dtype=dtype, device=device), requires_grad=False) if bias else None

    @classmethod
    def pack(
        cls,
        weight: torch.Tensor,
        scheme: Scheme,
        *,
        bias: torch.Tensor | None = None,
        clip: Clip | None = None,
        held: Sequence[tuple[int, int]] = (),
        int8_inputs: bool = False,
        channel: int | None = None,
    ) -> Self:
        """Rounds a matrix and prepares its layer.

        Args:
            weight: [rows, cols]; it is only read.
            scheme: int2 to int8 by row or group, symmetric.
            bias: [rows].
            clip: what is cut off before ranges are taken.
            held: row and col of weights that are held out of rounding and exact in the layer.
            int8_inputs: see the class.
            channel: see the class.

        Raises:
            UsageError: the scheme is another, or does not fit the matrix.
            CoordinateError: a held weight or the channel is outside.
        """
        rows, cols = weight.shape
        if scheme.kind != "int" or scheme.sharing not in ("row", "group") or scheme.offset not in ("sym", "signed"):
            raise UsageError(f"Packing by {scheme}: a packed layer holds int2 to int8 by row or group, symmetric.")
        for row, col in held:
            _check_inside(row, col, rows, cols)
        places = [row * cols + col for row, col in held]
        packed, scale, shape = packed_tensors(quantize_held_out(weight, scheme, places, clip=clip))
        layer = cls(
            cols,
            rows,
            scheme.bits,
            groups=scale.shape[1],
            bias=bias is not None,
            int8_inputs=int8_inputs,
            channel=channel,
            dtype=None if bias is None else bias.dtype,
            scale_dtype=scale.dtype,
        )
        state = {"weight_packed": packed, "weight_scale": scale, "weight_shape": shape}
        layer.load_state_dict(state if bias is None else {**state, "bias": bias})
        layer.super_weights = tuple(SuperWeight(row, col, weight[row, col].item()) for row, col in held)
        return layer.prepare()

    def restore(self, row: int, col: int, value: float) -> None:
        """Makes one weight exact, whatever its code says.

        Raises:
            CoordinateError: it is outside, or restored already.
        """
        _check_inside(row, col, self.out_features, self.in_features)
        if any((each.row, each.col) == (row, col) for each in self.super_weights):
            raise CoordinateError(f"Weight {row}:{col} of a packed layer is restored already.")
        self.super_weights += (SuperWeight(row, col, value),)
        self._set_deltas()

    def prepare(self) -> Self:
        """Chooses the kernel for where the layer lies, and brings the codes into its layout.

        Raises:
            MalformedFileError: the stored shape is another.
        """
        self._out_of_layout()
        rows, cols = self.out_features, self.in_features
        if self.weight_shape.tolist() != [rows, cols]:
            raise MalformedFileError(
                f"A packed layer of {rows} x {cols} weights got tensors of a matrix of {self.weight_shape.tolist()}."
            )
        device = self.weight_packed.device
        kernel = kernel_for(self.bits, rows, cols, self.groups, device, int8_inputs=self.int8_inputs)
        if self.int8_inputs and kernel != "int8":
            raise UsageError(
                f"8-bit inputs of {rows} x {cols} weights on {device.type}: they run on the CPU and on CUDA, and need cols "
                "that divide by 16 (and on CUDA rows that divide by 8)."
            )
        if kernel == "dequantize":
            shared = "one scale per row" if self.groups == 1 else f"groups of {cols // self.groups}"
            _say_slow(f"{self.bits} bits with {shared} in this shape on {device.type}")
        else:
            self._into_layout(kernel)
        self.kernel = kernel
        self._reads_layout = kernel != "int4-cuda" and (
            kernel != "int4" or _layout_is_known(rows % _block_rows(), cols)
        )
        self._wide = self._wide_dtype(device)
        self._int8_units = device.type == "cpu" and multiplies_int8()
        self._set_deltas()
        return self

    def _into_layout(self, kernel: Kernel) -> None:
        rows, cols = self.out_features, self.in_features
        codes = (each for _, _, each in self._pieces(_PACK_ROWS))
        if kernel == "int8":
            held = torch.cat(list(codes))
        elif kernel == "int4":
            held = torch.cat([torch._convert_weight_to_int4pack_for_cpu(each.int() + 8, 1) for each in codes])
            block = _block_rows()
            self._hold("places", _slots(block).argsort(), persistent=False)
            self._hold("tail_places", _slots(rows % block).argsort(), persistent=False)
        else:
            pairs = torch.cat(list(codes)).add(8).view(rows, -1, 2)
            inner = next(each for each in (8, 4, 2) if cols % (16 * each) == 0)
            held = torch._convert_weight_to_int4pack((pairs[..., 0] << 4 | pairs[..., 1]).to(torch.uint8), inner)
        scales = self.weight_scale.to(torch.bfloat16)
        if kernel == "int8":
            scales = scales[:, 0].contiguous()
        else:
            scales = scales.repeat_interleave(cols // self.groups // self._kernel_group, 1).t()
            scales = torch.stack([scales, torch.zeros_like(scales)], 2).contiguous()  # [groups, rows, scale and zero]
        self._hold("kernel_codes", held, persistent=False)
        self._hold("kernel_scales", scales, persistent=False)
        del self.weight_packed, self.weight_shape

    def _out_of_layout(self) -> None:
        """The stored layout again."""
        if self.kernel in ("int4", "int8", "int4-cuda"):
            stored = self._stored()
            for name in ("kernel_codes", "kernel_scales", "places", "tail_places"):
                self._buffers.pop(name, None)
                self._non_persistent_buffers_set.discard(name)
            self._hold("weight_packed", stored["weight_packed"])
            self._hold("weight_shape", stored["weight_shape"])
        self.kernel, self._reads_layout = None, True

    def _stored(self) -> dict[str, torch.Tensor]:
        """The tensors of the stored layout, to the bit."""
        if self.kernel in (None, "dequantize"):
            return {
                "weight_packed": self.weight_packed,
                "weight_scale": self.weight_scale,
                "weight_shape": self.weight_shape,
            }
        unsigned = (each.view(torch.uint8) + (1 << (self.bits - 1)) for _, _, each in self._pieces(_PACK_ROWS))
        device = self.kernel_codes.device
        return {
            "weight_packed": torch.cat([pack(each.cpu(), self.bits) for each in unsigned]).to(device),
            "weight_scale": self.weight_scale,
            "weight_shape": torch.tensor([self.out_features, self.in_features], device=device),
        }

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights that the codes stand for, and the super weights: [rows, cols], rounded once to `dtype`."""
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.weight_scale.device)
        for first, last, codes in self._pieces():
            weight[first:last] = self._weights(first, last, codes, torch.float32)
        return weight

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """A plain layer with the dequantized weights."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dequantized(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True))
        return linear

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Gives [..., rows] of [..., cols], in the dtype of the inputs."""
        flat = inputs.reshape(-1, self.in_features)  # [tokens, cols]
        if len(flat) == 0:
            outputs = flat.new_zeros(0, self.out_features)
        elif self.int8_inputs:
            outputs = self._int8_product(flat).to(inputs.dtype)
            self._add_super_weights(outputs, flat)
        elif self.kernel in (None, "dequantize") or (
            self._wide is not None and len(flat) >= self._many_tokens(flat.dtype)
        ):
            outputs = self._tiled_product(flat).to(inputs.dtype)
        else:
            outputs = self._packed_product(flat.bfloat16()).to(inputs.dtype)
            self._add_super_weights(outputs, flat)
        if self.bias is not None:
            outputs = outputs + self.bias.to(inputs.dtype)
        return outputs.view(*inputs.shape[:-1], self.out_features)

    def _many_tokens(self, dtype: torch.dtype) -> int:
        """From how many tokens of this dtype on tiles are faster."""
        fast_tiles = self.kernel == "int8" and self._wide == torch.bfloat16 and dtype != torch.float32
        return MANY_TOKENS_INT8 if fast_tiles else MANY_TOKENS

    def _add_super_weights(self, outputs: torch.Tensor, flat: torch.Tensor) -> None:
        for (row, col, _), delta in zip(self.super_weights, self._deltas, strict=True):
            outputs[:, row].add_(flat[:, col], alpha=delta)

    def _packed_product(self, flat: torch.Tensor) -> torch.Tensor:
        """Of bfloat16 activations, in bfloat16."""
        flat = flat.contiguous()
        if self.kernel == "int8":
            if torch.compiler.is_compiling() or flat.storage_offset() % _ALIGNED:
                flat = flat.clone()
            return torch._weight_int8pack_mm(flat, self.kernel_codes, self.kernel_scales)
        multiply = torch._weight_int4pack_mm_for_cpu if self.kernel == "int4" else torch._weight_int4pack_mm
        return multiply(flat, self.kernel_codes, self._kernel_group, self.kernel_scales)

    def _tiled_product(self, flat: torch.Tensor) -> torch.Tensor:
        """By dequantized tiles, in which super weights have their place."""
        wide = torch.float32 if flat.dtype == torch.float32 else self._wide or flat.dtype
        flat = flat.to(wide)
        outputs = torch.empty(len(flat), self.out_features, dtype=wide, device=flat.device)
        for first, last, codes in self._pieces():
            outputs[:, first:last] = functional.linear(flat, self._weights(first, last, codes, wide))
        return outputs

    def _int8_product(self, flat: torch.Tensor) -> torch.Tensor:
        """Of activations in 8 bits by token, in float32; the channel of the super activation joins unrounded.

        Replacing a super activation by 0 gives what replacing it by its token's median, rounding and restoring gives: neither
        sets the token's scale, and the restored value is the exact one.
        """
        wide = flat.to(torch.float32, copy=True)
        if self.channel is not None:
            taken = wide[:, self.channel].clone()
            wide[:, self.channel] = 0
        steps = wide.abs().amax(1, keepdim=True) / _TOP
        steps = steps.masked_fill(steps == 0, 1)
        outputs = self._integer_product(wide.div_(steps).round_()).mul_(steps)
        if self.channel is not None:
            outputs.addr_(taken, self._column(self.channel))
        return outputs

    def _integer_product(self, integers: torch.Tensor) -> torch.Tensor:
        """Of integers -127 to 127 in float32, in float32."""
        tokens = len(integers)
        on_cuda = integers.device.type == "cuda"
        if on_cuda:  # cuBLAS wants more than 16 rows
            integers = functional.pad(integers, (0, 0, 0, math.ceil(max(tokens, 17) / 32) * 32 - tokens))
        # For two tokens and more torch brings the codes into another order first, which few tokens do not earn back.
        if on_cuda or (self._int8_units and not 1 < tokens < MANY_TOKENS_INT8):
            products = torch._int_mm(integers.to(torch.int8), self.kernel_codes.t())[:tokens]
            return products.float().mul_(self.kernel_scales.float())
        wide = self._wide
        if tokens < MANY_TOKENS or wide is None:
            return self._packed_product(integers.bfloat16()).float()  # exact in bfloat16, but for the result
        integers = integers.to(wide)
        outputs = torch.cat([functional.linear(integers, codes.to(wide)) for _, _, codes in self._pieces()], 1)
        return outputs.float().mul_(self.kernel_scales.float())

    def _column(self, col: int) -> torch.Tensor:
        """Dequantized weights of one input channel, float32 [rows]."""
        return self.kernel_codes[:, col].float() * self.kernel_scales.float()

    def _weights(self, first: int, last: int, codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What the codes of some rows stand for, and super weights."""
        grouped = codes.to(dtype).view(last - first, self.groups, -1)
        weights = grouped.mul_(self.weight_scale[first:last, :, None].to(dtype)).view(last - first, -1)
        for row, col, value in self.super_weights:
            if first <= row < last:
                weights[row - first, col] = value
        return weights

    def _pieces(self, rows: int | None = None) -> Iterator[tuple[int, int, torch.Tensor]]:
        """First row, end and signed codes, int8 [rows, cols], of some rows at a time."""
        rows = rows or max(1, _TILE // self.in_features // 64) * 64  # whole blocks of every layout
        ones = None if self._reads_layout else torch.eye(self.in_features, device=self.kernel_codes.device)
        whole = None if ones is None else self._codes_by_products(ones)
        for first in range(0, self.out_features, rows):
            last = min(first + rows, self.out_features)
            yield first, last, self._codes(first, last) if whole is None else whole[first:last]

    def _codes(self, first: int, last: int) -> torch.Tensor:
        if self.kernel == "int8":
            return self.kernel_codes[first:last]
        if self.kernel == "int4":
            block = len(self.places)
            whole = first + (last - first) // block * block
            found = [
                _from_blocks(self.kernel_codes[first:whole], self.places),
                _from_blocks(self.kernel_codes[whole:last], self.tail_places),
            ]
            return torch.cat(found).view(torch.int8).sub_(8)
        return _unpacked(self.weight_packed[first:last], self.bits, self.in_features)

    def _codes_by_products(self, ones: torch.Tensor) -> torch.Tensor:
        """Signed codes of the columns that have a one, int8 [rows, columns], out of an int4 layout that nothing else reads."""
        scales = torch.zeros_like(self.kernel_scales)
        scales[..., 0] = 1
        multiply = torch._weight_int4pack_mm_for_cpu if self.kernel == "int4" else torch._weight_int4pack_mm
        return multiply(ones.bfloat16(), self.kernel_codes, self._kernel_group, scales).t().to(torch.int8)

    @property
    def _kernel_group(self) -> int:
        return _int4_group(self.in_features // self.groups) or 0

    def _wide_dtype(self, device: torch.device) -> torch.dtype | None:
        """What tiles are multiplied in, but for float32 inputs; None where they are not worth it, or in the inputs' dtype."""
        if device.type != "cpu" or not self._reads_layout:
            return None
        return torch.bfloat16 if multiplies_bfloat16() else torch.float32

    def _set_deltas(self) -> None:
        self._deltas = tuple(value - self._kernel_value(row, col) for row, col, value in self.super_weights)

    def _kernel_value(self, row: int, col: int) -> float:
        """What a packed product multiplies by at this place."""
        if self._reads_layout:
            first = row // 64 * 64
            code = self._codes(first, min(first + 64, self.out_features))[row - first, col]
        else:
            ones = torch.zeros(1, self.in_features, device=self.kernel_codes.device)
            ones[0, col] = 1
            code = self._codes_by_products(ones)[row, 0]
        scale = self.weight_scale[row, col * self.groups // self.in_features].bfloat16()
        return int(code) * scale.item()

    def _hold(self, name: str, value: torch.Tensor, *, persistent: bool = True) -> None:
        self.register_buffer(name, value, persistent=persistent)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({f"{prefix}{name}": value for name, value in self._stored().items()})

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        was = self.kernel
        self._out_of_layout()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if was is not None:
            self.prepare()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Moves the layer; codes and scales keep their bits whatever dtype the model is cast to."""
        device = self.weight_scale.device
        was, moves = self.kernel, fn(torch.empty(0, dtype=torch.int8, device=device)).device.type != device.type
        if moves:
            self._out_of_layout()
        held = {name: self._buffers.pop(name) for name in list(self._buffers)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in held.items():
            assert value is not None
            as_integers = _INTEGERS.get(value.dtype, value.dtype)
            self._buffers[name] = fn(value.view(as_integers)).view(value.dtype)
        if moves and was is not None and self.weight_scale.device.type != "meta":
            self.prepare()
        return self

    def extra_repr(self) -> str:
        """What `print` shows."""
        inputs = "" if not self.int8_inputs else f", int8_inputs=True, channel={self.channel}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, groups={self.groups}, "
            f"kernel={self.kernel}, super_weights={len(self.super_weights)}, bias={self.bias is not None}{inputs}"
        )


_INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def _check_inside(row: int, col: int, rows: int, cols: int) -> None:
    if not (0 <= row < rows and 0 <= col < cols):
        raise CoordinateError(f"Weight {row}:{col} is outside: rows are 0 to {rows - 1}, cols are 0 to {cols - 1}.")


def _unpacked(packed: torch.Tensor, bits: int, cols: int) -> torch.Tensor:
    """Signed codes of the stored layout, int8 [rows, cols]."""
    if bits == 8:
        codes = packed.contiguous().view(torch.uint8)[:, :cols]
    elif bits == 4:
        stored = packed.contiguous().view(torch.uint8)
        codes = torch.stack([stored & 15, stored >> 4], -1).view(len(packed), -1)[:, :cols]
    else:
        codes = unpack(packed.cpu(), bits, cols).to(packed.device)
    return (codes - (1 << (bits - 1))).view(torch.int8)  # wraps, as uint8 does


def _from_blocks(blocks: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Codes of whole blocks in the int4 layout of this processor, uint8 [rows, cols].

    Args:
        blocks: uint8 [rows, cols / 2], bytes as the kernel has them: a block of rows at a time, and in it column by column.
        places: where in a column each row of a block is.
    """
    rows, cols = blocks.shape[0], blocks.shape[1] * 2
    if rows == 0:
        return blocks.new_empty(0, cols)
    columns = blocks.view(-1, cols, len(places) // 2).transpose(1, 2).contiguous()
    codes = torch.stack([columns & 15, columns >> 4], 2).view(-1, len(places), cols)
    return codes.index_select(1, places).view(rows, cols)


@cache
def _slots(rows: int) -> torch.Tensor:
    """Which row lies in each 4-bit slot of the first column of a block, as this processor's kernel packs it."""
    if rows == 0:
        return torch.empty(0, dtype=torch.int64)
    numbers = torch.arange(rows, dtype=torch.int32)[:, None].repeat(1, 32)
    found = torch.zeros(rows, dtype=torch.int64)
    for shift in (0, 4):
        packed = torch._convert_weight_to_int4pack_for_cpu((numbers >> shift) & 15, 1).flatten()[: rows // 2]
        found |= torch.stack([packed & 15, packed >> 4], 1).flatten().long() << shift
    return found


@cache
def _block_rows() -> int:
    """Rows of a block of the int4 kernel's layout: 64 with AVX512, 32 with AVX2."""
    return next((each for each in (64, 32) if _slots(each).sort().values.equal(torch.arange(each))), 16)


@cache
def _layout_is_known(tail: int, cols: int) -> bool:
    """Whether codes come back from the int4 kernel's layout, tried on rows of this length."""
    block = _block_rows()
    codes = torch.randint(16, (2 * block + tail, cols), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    whole = _from_blocks(packed[: 2 * block], _slots(block).argsort())
    return torch.cat([whole, _from_blocks(packed[2 * block :], _slots(tail).argsort())]).equal(codes.to(torch.uint8))
