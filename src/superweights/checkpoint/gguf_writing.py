"""Writes a GGUF file: settings, then one tensor after another, whole or not at all.

The file grows beside its place and is renamed when it is on the disk. The package gguf lays it out and encodes blocks; rows are
encoded by several threads, a piece each, so that little more than one tensor is in memory.
"""

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from superweights.checkpoint.copying import sync_folder
from superweights.checkpoint.dtypes import FLOAT16_MAX
from superweights.checkpoint.gguf_header import Metadata
from superweights.checkpoint.packed.gguf import gguf_package
from superweights.errors import NonFiniteWeightsError, RecordError, UnknownNameError, UsageError
from superweights.progress import NO_PROGRESS, Progress

WRITTEN_KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32", "TQ1_0", "TQ2_0", "MXFP4")
"""Types that the package gguf can make out of values."""
_FILE_TYPES = {
    "F32": "ALL_F32",
    "MXFP4": "MOSTLY_MXFP4_MOE",
}
"""What a file of mostly one type is called, where it is not MOSTLY_ and the type."""
_PIECE = 1 << 20
"""Weights that one thread encodes at once."""


@dataclass(frozen=True, slots=True)
class NewGgufTensor:
    """A tensor to come."""

    name: str
    """Its name in llama.cpp."""
    kind: str
    """Its type, such as Q4_0."""
    shape: tuple[int, ...]
    """[.., rows, cols]."""

    @property
    def numel(self) -> int:
        """How many weights it has."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its size, bytes."""
        return gguf_nbytes(self.kind, self.shape)


def gguf_nbytes(kind: str, shape: Sequence[int]) -> int:
    """The size of a tensor of a type, bytes."""
    size, nbytes = block_size(kind)
    return prod(shape) // size * nbytes


def block_size(kind: str) -> tuple[int, int]:
    """Weights of a block of a type, and its bytes."""
    package = gguf_package()
    size, nbytes = package.GGML_QUANT_SIZES[package.GGMLQuantizationType[kind]]
    return int(size), int(nbytes)


def written_kind(text: str, layers: Sequence[int] = ()) -> str:
    """A type that can be written, by its name in any case.

    Args:
        text: the name.
        layers: those with a super weight, for the message.

    Raises:
        UnknownNameError: GGUF has no such type.
        UsageError: it has, but only llama.cpp writes it.
    """
    kind = text.strip().upper()
    if kind in WRITTEN_KINDS:
        return kind
    known = gguf_package().GGMLQuantizationType.__members__
    mixture = kind.rpartition("_")[0] if kind.endswith(("_S", "_M", "_L")) else kind
    if kind not in known and mixture not in known:
        raise UnknownNameError.among("GGUF type", text, [each.lower() for each in WRITTEN_KINDS])
    alone = " ".join(f"--tensor-type 'blk\\.{layer}\\.ffn_down=f16'" for layer in map(str, sorted(set(layers)) or "N"))
    raise UsageError(
        f"{text} is a GGUF type that only llama.cpp writes. Write F16 here (--scheme f16), and quantize that file with the "
        f"super weight's tensor left alone: llama-quantize {alone} f16.gguf out.gguf {kind}"
        f"{'' if layers else ', with its layer in place of N'}. Written here: {', '.join(map(str.lower, WRITTEN_KINDS))}."
    )


def file_type(kind: str) -> int:
    """The number by which `general.file_type` says which type most tensors have."""
    return int(gguf_package().LlamaFileType[_FILE_TYPES.get(kind, f"MOSTLY_{kind}")])


def encode(
    values: npt.NDArray[np.float32], kind: str, *, what: str, threads: int | None = None
) -> npt.NDArray[np.uint8]:
    """Values as blocks.

    Args:
        values: float32 [.., cols].
        kind: the type.
        what: the tensor, for messages.
        threads: pieces encoded at once; default: one per core.

    Returns:
        uint8 [.., bytes of a row].

    Raises:
        NonFiniteWeightsError: a value is NaN or infinite.
        UsageError: a value is too large for the type.
    """
    rows = values.reshape(-1, values.shape[-1])
    step = max(1, _PIECE // rows.shape[1])
    with ThreadPoolExecutor(threads or os.cpu_count() or 1, "superweights-gguf") as pool:
        pieces = pool.map(lambda start: _encode_rows(rows[start : start + step], kind, what), range(0, len(rows), step))
        blocks = np.concatenate(list(pieces))
    return blocks.reshape(*values.shape[:-1], -1)


def _encode_rows(rows: npt.NDArray[np.float32], kind: str, what: str) -> npt.NDArray[np.uint8]:
    package = gguf_package()
    largest = float(np.abs(rows).max(initial=0))
    if not np.isfinite(largest):
        bad = int(np.count_nonzero(~np.isfinite(rows)))
        raise NonFiniteWeightsError(
            f"{what}: {bad} of {rows.size} weights are NaN or infinite, and no GGUF type rounds those. Repair the model first."
        )
    if largest > FLOAT16_MAX and kind not in ("F32", "BF16"):
        raise UsageError(
            f"{what} holds {largest:g}, which is beyond float16, in which {kind} keeps values or scales. Write this model as "
            "bf16 or f32; for a tensor of a super weight, --kept-type bf16 or f32."
        )
    with np.errstate(all="ignore"):
        found = package.quantize(np.ascontiguousarray(rows, dtype=np.float32), package.GGMLQuantizationType[kind])
    blocks: npt.NDArray[np.uint8] = np.ascontiguousarray(found).view(np.uint8)
    return blocks


def check_file_target(target: Path, *, overwrite: bool, but: Iterable[Path] = ()) -> None:
    """Refuses a place where no new file can be written.

    Args:
        target: the new file.
        overwrite: whether a .gguf file that is there may be replaced.
        but: files of the source, which stay.

    Raises:
        UsageError: it is taken, or part of the source.
    """
    fault = None
    if target.resolve() in {path.resolve() for path in but}:
        fault = "that is the model itself. Give another file"
    elif target.is_dir():
        fault = "that is a folder. Give a file"
    elif target.exists() and not overwrite:
        fault = "that file exists. Give another, or allow to overwrite it (--overwrite)"
    if fault:
        raise UsageError(f"Writing {target}: {fault}.")


def write_gguf(
    target: Path,
    architecture: str,
    metadata: Metadata,
    tensors: Sequence[NewGgufTensor],
    make: Callable[[int], npt.NDArray[np.uint8]],
    *,
    progress: Progress = NO_PROGRESS,
) -> None:
    """Writes a file; after an error or an interruption nothing new is there.

    Args:
        target: the file.
        architecture: what llama.cpp calls it.
        metadata: all settings.
        tensors: all tensors, in order.
        make: gives the blocks of a tensor by its number; asked in order, from another thread.
        progress: hears about each tensor.

    Raises:
        RecordError: the file cannot be written.
    """
    nbytes = sum(each.nbytes for each in tensors)
    growing = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    progress.start("writing", total=len(tensors), unit="tensors")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _writer(growing, architecture, metadata, tensors) as writer, ThreadPoolExecutor(1) as ahead:
            for each, blocks in zip(tensors, _one_ahead(ahead, make, len(tensors)), strict=True):
                writer.write_tensor_data(blocks)
                progress.advance(nbytes=each.nbytes)
            writer.flush()
            os.fsync(writer.fout[0].fileno())
        growing.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        raise RecordError(
            f"Cannot write {target}: {error.strerror or error}. Nothing was changed there. Give a file on a disk with "
            f"{nbytes / 1e9:.3g} GB free."
        ) from error
    finally:
        with suppress(OSError):  # a name or folder that cannot be has been said already
            growing.unlink(missing_ok=True)
        progress.finish()


def _one_ahead(
    pool: ThreadPoolExecutor, make: Callable[[int], npt.NDArray[np.uint8]], count: int
) -> Iterator[npt.NDArray[np.uint8]]:
    """What `make` makes of each number; the next is made while one is used."""
    following = pool.submit(make, 0) if count else None
    for number in range(1, count + 1):
        assert following is not None
        made = following.result()
        following = pool.submit(make, number) if number < count else None
        yield made


@contextmanager
def _writer(path: Path, architecture: str, metadata: Metadata, tensors: Sequence[NewGgufTensor]) -> Iterator[Any]:
    """The package's writer of a file whose settings and layout are written."""
    package = gguf_package()
    writer = package.GGUFWriter(path, architecture)
    try:
        _add_metadata(writer, {key: each for key, each in metadata.items() if key != "general.architecture"})
        for each in tensors:
            kind = package.GGMLQuantizationType[each.kind]
            writer.add_tensor_info(each.name, each.shape, np.dtype(np.float32), each.nbytes, raw_dtype=kind)
        if (alignment := metadata.get("general.alignment")) is not None:
            writer.data_alignment = int(alignment.value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        yield writer
    finally:
        writer.close()


def _add_metadata(writer: Any, metadata: Metadata) -> None:
    """Hands settings to the package's writer; empty lists are left out, which it cannot write."""
    kinds = gguf_package().GGUFValueType
    for key, each in metadata.items():
        if each.kind == "ARRAY" and not each.value:
            continue
        writer.add_key_value(key, each.value, kinds[each.kind], kinds[each.of] if each.of else None)
