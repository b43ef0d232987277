"""A checkpoint: its config and all headers at once, its bytes on request. It never runs the model.

The one idea: every shard is a file on the local disk behind a private memory map, whether it was there all along or is
a sparse copy that fills with the byte ranges that were asked for. So a tensor is always a view, and never a copy.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from superweights.checkpoint.header import TensorEntry, load_json, read_header
from superweights.checkpoint.local import WeightSource, directory_source
from superweights.checkpoint.quantized import quantization_of
from superweights.checkpoint.reference import ModelReference, no_such_path
from superweights.checkpoint.scalars import StoredScalar, block_span, decode_scalar
from superweights.checkpoint.shards import join_headers
from superweights.checkpoint.spans import Span
from superweights.errors import CoordinateError, MissingTensorError, QuantizedCheckpointError, UsageError

if TYPE_CHECKING:
    import torch

    from superweights.checkpoint.mapped import MappedFile
    from superweights.checkpoint.packed.grids import PackedMatrix

_CHUNK_BYTES = 16 << 20


class Checkpoint:
    """One model's files, opened; use it as a context manager, or call `close`.

    Example:
        >>> with Checkpoint.open("models/llama-7b") as checkpoint:  # doctest: +SKIP
        ...     print(checkpoint.read_scalar("model.layers.2.mlp.down_proj.weight", (3968, 7003)).value)
    """

    def __init__(
        self,
        reference: ModelReference,
        source: WeightSource,
        *,
        config: dict[str, Any],
        tensors: Mapping[str, TensorEntry],
    ) -> None:
        self.reference = reference
        self.directory = source.directory
        self.revision = source.revision
        self.config = config
        self.tensors: Mapping[str, TensorEntry] = MappingProxyType(dict(tensors))
        self._source = source
        self._files = source.files

    @staticmethod
    def open(
        reference: "str | Path | ModelReference",
        *,
        revision: str | None = None,
        cache_dir: Path | None = None,
    ) -> "Checkpoint":
        """Opens a model and reads its config and the headers of all shards.

        Args:
            reference: a directory, a .safetensors file beside its config.json, a Hub name, or a URL that fsspec knows.
            revision: branch, tag or commit of a Hub repository.
            cache_dir: where fetched byte ranges of remote weights are kept; by default a folder of the user's cache.

        Raises:
            NotACheckpointError: there is no such path, or no model at it.
            PickleCheckpointError: its weights are there only as pickles.
            MalformedFileError, MissingTensorError: its files contradict themselves or each other.
            HubError: the Hub cannot be reached, or refuses.
        """
        parsed = ModelReference.parse(reference, revision=revision)
        source = _open_source(parsed, cache_dir)
        try:
            config = _read_config(source.directory)
            headers = {name: read_header(file.read, file=name, size=file.size) for name, file in source.files.items()}
            return Checkpoint(parsed, source, config=config, tensors=join_headers(source.shards, headers))
        except BaseException:
            source.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files. Tensors from `view` stay valid; their memory goes with the last of them."""
        self._source.close()

    @property
    def packing(self) -> str | None:
        """What packed the matrices that are dequantized when they are viewed, in words; None where all are stored plain."""
        return None

    @property
    def gguf_file(self) -> str | None:
        """The file in `directory` that is config and tokenizer as well, for a GGUF model."""
        return None

    @property
    def has_tokenizer(self) -> bool:
        """Whether there are files of a tokenizer."""
        return any(any(self.directory.glob(each)) for each in ("tokenizer*", "vocab*", "*.model"))

    def is_packed(self, name: str) -> bool:
        """Whether a tensor has no bytes of its own that are its values: `view` makes it of what is stored."""
        return False

    def stored_as(self, name: str) -> str:
        """The number format, or the type of blocks, that a tensor has in the file, such as "BF16"."""
        return self.entry(name).dtype

    def packed_matrix(self, name: str) -> "PackedMatrix | None":
        """What a quantizer left of a matrix; None for one that is stored plain."""
        return None

    @property
    def files(self) -> Mapping[str, "MappedFile"]:
        """The weight files by name, in the order of the shards."""
        return MappingProxyType(self._files)

    @property
    def index_file(self) -> str | None:
        """Name of the file that says which tensor is in which shard; None where there is one shard without an index."""
        return self._source.shards.index

    @property
    def nbytes(self) -> int:
        """The size of all tensors, bytes."""
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def bytes_fetched(self) -> int:
        """Bytes of weight files that came over the network, headers included; 0 for local files."""
        return sum(file.bytes_fetched for file in self._files.values())

    @property
    def requests(self) -> int:
        """Range requests made for weight files."""
        return sum(file.requests for file in self._files.values())

    @property
    def digest(self) -> str:
        """Identity of the headers, not of every byte: two checkpoints that differ only in values can share it.

        It is the SHA-256, in hexadecimal, of every tensor's name, dtype and shape, of the sizes of the files, and of
        the commit for a model of the Hub.
        """
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            digest.update(repr((name, self.tensors[name].dtype, self.tensors[name].shape)).encode())
        for name in sorted(self._files):
            digest.update(repr((name, self._files[name].size)).encode())
        digest.update(repr(self.revision).encode())
        return digest.hexdigest()

    def entry(self, name: str) -> TensorEntry:
        """Where a tensor is.

        Raises:
            MissingTensorError: there is none of that name.
        """
        if name in self.tensors:
            return self.tensors[name]
        near = get_close_matches(name, self.tensors, n=3)
        hint = f"Did you mean {', '.join(map(repr, near))}?" if near else f"It has {len(self.tensors)} tensors."
        raise MissingTensorError(f"{self.reference} has no tensor {name!r}. {hint}")

    def require_plain(self, purpose: str) -> None:
        """Refuses a quantized checkpoint.

        Args:
            purpose: what needs plain weights, such as "running a forward pass".

        Raises:
            QuantizedCheckpointError: a quantizer packed the weights.
        """
        method = quantization_of(self.config)
        if method is not None:
            raise QuantizedCheckpointError(
                f"{purpose[:1].upper()}{purpose[1:]} needs plain weights, but those of {self.reference} are quantized "
                f"({method}). Give the checkpoint it was quantized from. Verbs that only run or read a model take this one."
            )

    def view(self, name: str) -> "torch.Tensor":
        """A tensor on the file's own bytes, without a copy.

        Remote bytes that were not fetched read as zeros, and as themselves once they are: call `fetch` before use.
        Writing to the tensor copies the touched page into memory and never changes the file; `drop` undoes it. A tensor
        that does not start at a multiple of its item size is the exception: it is a copy.

        Raises:
            MissingTensorError: there is no such tensor.
            QuantizedCheckpointError: torch has no plain dtype for it.
        """
        import torch

        entry = self.entry(name)
        dtype = getattr(torch, entry.storage.torch or "", None)
        if dtype is None:
            raise QuantizedCheckpointError(
                f"Tensor {name!r} is stored as {entry.dtype}, for which this torch has no plain dtype."
            )
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=dtype)
        file = self._files[entry.file]
        if entry.start % entry.itemsize:
            copied = bytearray(file.map[entry.start : entry.end])
            return torch.frombuffer(copied, dtype=dtype).reshape(entry.shape)
        return torch.frombuffer(file.map, dtype=dtype, count=entry.numel, offset=entry.start).reshape(entry.shape)

    def view_rows(self, name: str, rows: Sequence[int]) -> "torch.Tensor":
        """Some rows of a tensor as float32, without the others; `fetch_rows` brings them."""
        return self.view(name)[list(rows)].float()

    def stored_bytes(self, name: str) -> memoryview:
        """A tensor's bytes as the file holds them, without a copy; like `view`, but of any dtype.

        Raises:
            MissingTensorError: there is no such tensor.
        """
        entry = self.entry(name)
        return memoryview(self._files[entry.file].map)[entry.start : entry.end]

    def fetch(self, names: Iterable[str], *, populate: bool = True) -> None:
        """Brings tensors into memory and returns when they are there; safe to call from several threads.

        Local bytes are read from disk ahead of use; of remote ones, those that are not on this disk yet are requested.

        Args:
            names: which tensors.
            populate: False stops once the bytes are on this disk; they are read when they are first used.
        """
        self._fetch(self._spans(names), populate=populate)

    def fetch_rows(self, name: str, rows: Iterable[int]) -> None:
        """Brings single rows of a tensor into memory: what `fetch` does, for the embeddings of a prompt.

        Raises:
            CoordinateError: there is no such row.
        """
        entry = self.entry(name)
        self._fetch({entry.file: [block_span(entry, (row,)) for row in set(rows)]})

    def drop(self, names: Iterable[str]) -> None:
        """Gives the memory of tensors back. Edits made to their views are undone; neighbours keep theirs.

        Views stay valid and read the file again when they are used.
        """
        for file, spans in self._spans(names).items():
            self._files[file].discard(spans)

    def read_scalar(self, name: str, index: tuple[int, ...]) -> StoredScalar:
        """One element as the file holds it, from its own bytes alone; edits to views do not show.

        Raises:
            CoordinateError: the index does not fit the tensor's shape.
        """
        entry = self.entry(name)
        if len(index) != len(entry.shape):
            raise CoordinateError(
                f"{list(index)} is no element of tensor {name!r}, whose shape is {list(entry.shape)}."
            )
        start, end = block_span(entry, tuple(index))
        return decode_scalar(entry, start, self._files[entry.file].read(start, end))

    def read_row(self, name: str, prefix: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """The part of a tensor that leading indices select, as float32.

        Args:
            name: the tensor.
            prefix: leading indices: (row,) for a matrix, (expert, row) for packed experts.

        Returns:
            The values, of the shape that the indices leave.

        Raises:
            CoordinateError: the indices do not fit the tensor's shape.
        """
        entry = self.entry(name)
        raw = self._files[entry.file].read(*block_span(entry, tuple(prefix)))
        return entry.storage.floats(raw).reshape(entry.shape[len(prefix) :])

    def iter_rows(
        self, name: str, *, prefix: tuple[int, ...] = (), rows_per_chunk: int | None = None
    ) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """A whole matrix as float32 in chunks of rows, so that only one chunk is in memory.

        Args:
            name: the tensor.
            prefix: leading indices that select the matrix, such as (expert,) in packed experts.
            rows_per_chunk: how many rows at once; by default as many as fill 16 MB of the file.

        Yields:
            The first row's number and the rows, [rows, cols].
        """
        entry = self.entry(name)
        start, end = block_span(entry, tuple(prefix))
        shape = entry.shape[len(prefix) :]
        if not shape:
            raise CoordinateError(f"{list(prefix)} selects one element of {name!r}, which has no rows.")
        row_bytes = (end - start) // max(shape[0], 1)
        step = rows_per_chunk or max(1, _CHUNK_BYTES // max(row_bytes, 1))
        for first in range(0, shape[0], step):
            last = min(first + step, shape[0])
            raw = self._files[entry.file].read(start + first * row_bytes, start + last * row_bytes)
            yield first, entry.storage.floats(raw).reshape(last - first, *shape[1:])

    def _spans(self, names: Iterable[str]) -> dict[str, list[Span]]:
        spans = defaultdict(list)
        for name in names:
            entry = self.entry(name)
            spans[entry.file].append((entry.start, entry.end))
        return spans

    def _fetch(self, spans: Mapping[str, list[Span]], *, populate: bool = True) -> None:
        # All files' requests start before the first is waited for, so that the connections stay busy.
        started = {name: self._files[name].start_fetch(each) for name, each in spans.items()}
        for name, pieces in started.items():
            self._files[name].finish_fetch(pieces)
            if populate:
                self._files[name].populate(spans[name])


def _open_source(reference: ModelReference, cache_dir: Path | None) -> WeightSource:
    place = reference.place
    if place == "nowhere":
        raise no_such_path(reference)
    if place == "hub":
        from superweights.checkpoint.hub import hub_source

        return hub_source(reference, cache_dir)
    if reference.revision is not None:
        raise UsageError(f"A revision ({reference.revision}) is of a model on the Hub; {reference.name} is a {place}.")
    if place == "path":
        return directory_source(reference)
    from superweights.checkpoint.urls import url_source

    return url_source(reference, cache_dir)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    return load_json(path.read_bytes(), file=str(path))
