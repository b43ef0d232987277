"""Float32 products with weights that stay in 16 bits.

A forward pass over a short prompt is bound by reading weights, so weights stay as they are stored and only activations are
float32. Where the processor has no fast 16-bit product of a few rows, the cure is a tile: widen a piece of the weight that
fits in cache, multiply it there, go on. Tiles are cut by shape alone, so the result is the same bits on any thread count.
Where the processor multiplies bfloat16 itself, that is several times faster and rounds each input and output of a product to
bfloat16, as the model's own code in its own dtype does.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

_TILE_BYTES = 2 << 20
"""Float32 bytes of one tile: two cores' worth stays inside a usual level-2 cache; 1 to 4 MB measured alike."""
_SMALL = 1 << 18
"""Weights of fewer elements are widened whole: threads would cost more than they save."""


Compute = Literal["auto", "float32"]


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for bfloat16 products (AVX512-BF16 or AMX)."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in asked)


class WideProducts:
    """Matrix products of float32 activations with 16-bit weights.

    Args:
        threads: how many tiles to work on at once; default: torch's thread count.
        bfloat16: let the processor multiply large bfloat16 weights itself.
    """

    def __init__(self, threads: int | None = None, *, bfloat16: bool = False) -> None:
        self.bfloat16 = bfloat16
        self._threads = threads or torch.get_num_threads()
        self._pool = ThreadPoolExecutor(
            self._threads, "superweights-tile", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._buffers = threading.local()

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()
        # A worker's thread count of 1 is also what torch would give to threads that start later.
        torch.set_num_threads(torch.get_num_threads())

    def product(
        self, inputs: torch.Tensor, weight: torch.Tensor, *, transposed: bool = False, exact: bool = False
    ) -> torch.Tensor:
        """Gives `inputs @ weight.T`, or `inputs @ weight` for a transposed weight, as float32.

        Args:
            inputs: [..., cols], any floating dtype.
            weight: [rows, cols], or [cols, rows] when transposed.
            transposed: whether the weight is stored [cols, rows].
            exact: never leave the product to the processor's bfloat16 units.

        Returns:
            [..., rows], float32.
        """
        rows_first = weight.t() if transposed else weight  # [rows, cols]
        flat = inputs.reshape(-1, inputs.shape[-1]).float()  # [tokens, cols]
        if weight.dtype == torch.float32 or weight.device.type != "cpu" or weight.numel() < _SMALL:
            outputs = flat @ rows_first.float().t()
        elif self.rounds(weight) and not exact:
            outputs = torch.nn.functional.linear(flat.bfloat16(), rows_first).float()
        else:
            outputs = self._tiled(flat, rows_first)
        return outputs.reshape(*inputs.shape[:-1], rows_first.shape[0])

    def rounds(self, weight: torch.Tensor) -> bool:
        """Whether the processor multiplies this matrix itself, which rounds inputs and outputs to bfloat16."""
        return self.bfloat16 and weight.dtype == torch.bfloat16 and weight.numel() >= _SMALL

    def _tiled(self, flat: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows, cols = weight.shape
        tile_rows = max(1, _TILE_BYTES // 4 // cols)
        starts = range(0, rows, tile_rows)
        outputs = torch.empty(flat.shape[0], rows)
        shares = [
            self._pool.submit(self._multiply_tiles, flat, weight, outputs, starts[first :: self._threads], tile_rows)
            for first in range(min(self._threads, len(starts)))
        ]
        for share in shares:
            share.result()
        return outputs

    def _multiply_tiles(
        self, flat: torch.Tensor, weight: torch.Tensor, outputs: torch.Tensor, starts: range, tile_rows: int
    ) -> None:
        buffer = self._buffer(tile_rows * weight.shape[1])
        with torch.no_grad():  # grad mode is per thread
            for start in starts:
                piece = weight[start : start + tile_rows]
                tile = buffer[: piece.numel()].view(piece.shape)
                tile.copy_(piece)
                outputs[:, start : start + tile_rows] = flat @ tile.t()

    def _buffer(self, numel: int) -> torch.Tensor:
        buffer: torch.Tensor | None = getattr(self._buffers, "tile", None)
        if buffer is None or buffer.numel() < numel:
            buffer = self._buffers.tile = torch.empty(numel)
        return buffer


def takes_wide_products(module: nn.Module) -> bool:
    """Whether the module is a plain linear layer whose product can be replaced."""
    return type(module).forward is nn.Linear.forward or type(module).forward is Conv1D.forward


def install_wide_products(module: nn.Module, products: WideProducts, *, exact: bool = False) -> None:
    """Makes this linear layer multiply in float32 whatever dtype its weight has; `exact` as in `WideProducts.product`."""
    module.forward = partial(_wide_linear, module, products, exact)


def _wide_linear(module: Any, products: WideProducts, exact: bool, inputs: torch.Tensor) -> torch.Tensor:
    outputs = products.product(inputs, module.weight, transposed=isinstance(module, Conv1D), exact=exact)
    return outputs if module.bias is None else outputs + module.bias
