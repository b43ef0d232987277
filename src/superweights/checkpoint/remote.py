"""A remote weight file as a sparse local file that fills with the byte ranges somebody asked for.

A list beside the sparse file says which ranges are there, so that a later run fetches nothing twice. It is written only
after the bytes are on the disk: a range in the list is never a hole. Both carry the version of the remote file in
their names, so that two versions never mix.
"""

import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from superweights.checkpoint.mapped import MappedFile, close_files
from superweights.checkpoint.spans import Span, merge, split, subtract
from superweights.errors import CheckpointError

CONNECTIONS = 8
HEADER_GUESS_BYTES = 64 << 10
"""The first request of a file asks for so much: the length of the header and, nearly always, all of it."""
_REQUEST_BYTES = 16 << 20
_GAP_BYTES = 1 << 20  # one more request costs about as much time as so many bytes nobody asked for
_SMALL = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".bpe", ".vocab", ".py")
_SMALL_BYTES = 200_000_000
_ATTEMPTS = 6
_FIRST_WAIT_SECONDS = 0.5


class BrokenTransferError(Exception):
    """A transfer that stopped for a reason that may pass; it is tried again some times.

    Args:
        final: what to raise when the last attempt breaks too.
    """

    def __init__(self, final: CheckpointError) -> None:
        super().__init__(str(final))
        self.final = final


class RangeReader(Protocol):
    """Reads ranges of one version of a remote file; used by several threads at once."""

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """Gives the bytes from `start` to `end` in pieces, in order.

        Raises:
            BrokenTransferError: it may work when tried again.
            CheckpointError: it will not.
        """
        ...


@dataclass(frozen=True, slots=True)
class RemoteVersion:
    """What tells one version of a remote file from the next."""

    size: int
    """Its size, bytes."""
    identity: str
    """Its ETag, or what else the server says about it."""

    @property
    def key(self) -> str:
        """A short text for file names, so that two versions never share a file."""
        return hashlib.sha256(f"{self.size} {self.identity}".encode()).hexdigest()[:16]


class RemoteFile(MappedFile):
    """A remote file, mapped like a local one. What was not fetched yet reads as zeros in the map."""

    def __init__(
        self, reader: RangeReader, *, name: str, version: RemoteVersion, folder: Path, pool: ThreadPoolExecutor
    ) -> None:
        path = folder / f"{name}.{version.key}"
        self._reader = reader
        self._pool = pool
        self._list = path.with_name(path.name + ".ranges.json")
        self._present = _prepare(path, self._list, version.size)
        self._recorded = self._present
        self._pending: dict[Span, Future[None]] = {}
        self._stopped = threading.Event()
        self._state = threading.Lock()
        self._recording = threading.Lock()
        self._writer = os.open(path, os.O_WRONLY | getattr(os, "O_BINARY", 0))
        super().__init__(path, name=name)

    def read(self, start: int, end: int) -> bytes:
        """The file's bytes from `start` to `end`, requested first where they are not here."""
        self.finish_fetch(self.start_fetch([(start, end)]))
        return super().read(start, end)

    def start_fetch(self, spans: Iterable[Span]) -> list["Future[None]"]:
        """Requests the bytes that are neither here nor on their way.

        Returns:
            What to wait for: the new requests, and those of other threads for the same bytes.
        """
        with self._state:
            if self._stopped.is_set():
                raise ValueError(f"{self.name} is closed.")
            wanted = subtract(spans, self._present)
            coming = [span for span in self._pending if subtract([span], wanted) != [span]]
            bridged = merge(subtract(wanted, self._pending), gap=_GAP_BYTES)
            missing = subtract(bridged, [*self._present, *self._pending])
            new = list(split(missing, _REQUEST_BYTES))
            for span in new:
                self._pending[span] = self._pool.submit(self._transfer, span)
            return [self._pending[span] for span in (*coming, *new)]

    def finish_fetch(self, pieces: list["Future[None]"]) -> None:
        """Waits for requests and notes on disk which ranges are there now.

        Raises:
            CheckpointError: the bytes cannot be had.
        """
        try:
            for piece in pieces:
                piece.result()
        finally:
            if pieces:
                self._record()

    def stop(self) -> None:
        """Ends running transfers at their next block."""
        with self._state:
            self._stopped.set()

    def close(self) -> None:
        """Notes what is there and closes the files; no transfer may run any more."""
        self.stop()
        if self._writer >= 0:
            self._record()
            os.close(self._writer)
            self._writer = -1
        super().close()

    def _transfer(self, span: Span) -> None:
        position, end = span
        failures = 0
        try:
            while position < end:
                try:
                    for block in self._blocks(position, end):
                        self._write(position, block)
                        position += len(block)
                        failures = 0 if block else failures
                except BrokenTransferError as error:
                    failures += 1
                    if failures == _ATTEMPTS or self._stopped.wait(_FIRST_WAIT_SECONDS * 2**failures):
                        raise error.final from error
        finally:
            with self._state:
                self._present = merge([*self._present, (span[0], position)])
                self._pending.pop(span, None)

    def _blocks(self, position: int, end: int) -> Iterator[bytes]:
        """What the reader gives, counted, and never more or fewer bytes than asked for."""
        with self._state:
            self.requests += 1
        for block in self._reader.read(position, end):
            if self._stopped.is_set():
                raise CheckpointError(f"{self.name} was closed while it was being fetched.")
            with self._state:
                self.bytes_fetched += len(block)
            yield block[: end - position]
            position += len(block)
            if position >= end:
                return
        raise BrokenTransferError(
            CheckpointError(f"Cannot read {self.name}: the server stopped at byte {position} of {end}.")
        )

    def _write(self, position: int, block: bytes) -> None:
        try:
            _write_at(self._writer, block, position)
        except OSError as error:
            raise CheckpointError(
                f"Cannot keep bytes of {self.name} in {self.path.parent}: {error.strerror}. Free some space there, or "
                "set SUPERWEIGHTS_CACHE to another folder."
            ) from error

    def _record(self) -> None:
        with self._recording:
            with self._state:
                present = self._present
            if present == self._recorded:
                return
            os.fsync(self._writer)
            # Another process may fill the same file; both lists hold.
            write_beside(self._list, json.dumps(merge([*_read_list(self._list, self.size), *present])).encode())
            self._recorded = present


@contextmanager
def remote_files() -> Iterator[tuple[ThreadPoolExecutor, dict[str, RemoteFile]]]:
    """Threads that fetch and a place for the files they serve; both are closed when opening a model fails."""
    pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="fetch")
    files: dict[str, RemoteFile] = {}
    try:
        yield pool, files
    except BaseException:
        close_files(files.values(), pool)
        raise


def is_small(name: str, size: int | None) -> bool:
    """Whether a remote file can belong to the config or the tokenizer, which are copied whole.

    Example:
        >>> is_small("tokenizer.json", 2_000_000), is_small("model-00001-of-00002.safetensors", 9_000_000_000)
        (True, False)
    """
    top = "/" not in name or name.startswith("additional_chat_templates/")
    return top and name.endswith(_SMALL) and not name.endswith(".index.json") and (size or 0) <= _SMALL_BYTES


def fetch_headers(files: Iterable[RemoteFile]) -> None:
    """Requests the first bytes of all files at once, so that reading the headers does not wait for each in turn."""
    started = [(file, file.start_fetch([(0, min(HEADER_GUESS_BYTES, file.size))])) for file in files]
    for file, pieces in started:
        file.finish_fetch(pieces)


def cache_folder(chosen: Path | None) -> Path:
    """The folder for what is fetched: the chosen one, `$SUPERWEIGHTS_CACHE`, or one in the user's cache."""
    if chosen is not None:
        return chosen
    if own := os.environ.get("SUPERWEIGHTS_CACHE"):
        return Path(own).expanduser()
    users = os.environ.get("XDG_CACHE_HOME")
    return (Path(users) if users else Path.home() / ".cache") / "superweights"


def write_beside(path: Path, content: bytes) -> None:
    """Writes a whole file, so that a reader sees the old one or the new one and never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".new-", delete=False) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).replace(path)


def _prepare(path: Path, ranges: Path, size: int) -> list[Span]:
    """Makes the sparse file where it is missing and gives the ranges it holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:  # never replaced: another process may have it open
        if os.fstat(file.fileno()).st_size == size:
            return _read_list(ranges, size)
        ranges.unlink(missing_ok=True)
        file.truncate(size)
    return []


def _read_list(ranges: Path, size: int) -> list[Span]:
    """The ranges noted on disk; none where the note is missing or makes no sense, which only costs a new request."""
    try:
        return merge((start, end) for start, end in json.loads(ranges.read_bytes()) if 0 <= start < end <= size)
    except (FileNotFoundError, ValueError, TypeError):
        return []


def _write_at(descriptor: int, block: bytes, position: int) -> None:
    if hasattr(os, "pwrite"):
        while block:
            written = os.pwrite(descriptor, block, position)
            block, position = block[written:], position + written
        return
    with _POSITION_LOCK:
        os.lseek(descriptor, position, os.SEEK_SET)
        os.write(descriptor, block)


_POSITION_LOCK = threading.Lock()
