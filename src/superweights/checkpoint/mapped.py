"""One weight file on the local disk: plain reads, and a private memory map that tensors share without a copy.

The map is copy-on-write: writing to a tensor copies one page into memory and never touches the file.
"""

import ctypes
import errno
import mmap
import os
import sys
import threading
from collections.abc import Collection, Iterable
from concurrent.futures import Executor, Future
from functools import cache
from pathlib import Path
from typing import Any

from superweights.checkpoint.spans import Span, merge, split
from superweights.errors import MalformedFileError

_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14; Python's mmap does not name it
_DONTNEED = 4  # MADV_DONTNEED of Linux, the one that discards private pages
_POPULATE_BYTES = 32 << 20
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class MappedFile:
    """A file of weights, opened for reading and mapped on first use."""

    bytes_fetched = 0
    """Bytes that came over the network."""
    requests = 0
    """Range requests made."""

    def __init__(self, path: Path, *, name: str) -> None:
        self.path = path
        self.name = name
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self.size = os.fstat(self._descriptor).st_size
        self._map: mmap.mmap | None = None
        self._lock = threading.Lock()

    @property
    def map(self) -> mmap.mmap:
        """The file, as long as it was when it was opened, as a writable buffer whose changes stay in memory.

        Raises:
            MalformedFileError: the file is shorter than it was.
        """
        with self._lock:
            # Touching a page beyond the end of a file ends the process (SIGBUS), so every new use looks at the size first.
            if os.fstat(self._open_descriptor).st_size < self.size:
                raise self._shrunk()
            if self._map is None:
                self._map = _private_map(self._open_descriptor, self.size)
            return self._map

    def read(self, start: int, end: int) -> bytes:
        """The file's own bytes from `start` to `end`; edits made through the map do not show.

        Raises:
            MalformedFileError: the file is shorter than it was.
        """
        pieces = []
        while start < end:
            piece = _read_at(self._open_descriptor, end - start, start)
            if not piece:
                raise self._shrunk()
            pieces.append(piece)
            start += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def start_fetch(self, spans: Iterable[Span]) -> list["Future[None]"]:
        """Starts to bring bytes to this disk; here they already are."""
        return []

    def finish_fetch(self, pieces: list["Future[None]"]) -> None:
        """Waits for what `start_fetch` started."""

    def populate(self, spans: Iterable[Span]) -> None:
        """Reads spans into memory and waits for it, as far as the system has a call for that.

        Raises:
            MalformedFileError: the file is shorter than it was.
        """
        for start, end in split(merge(spans), _POPULATE_BYTES):
            first = start - start % mmap.PAGESIZE
            if not self._advise(_POPULATE_READ, first, end) and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._open_descriptor, first, end - first, os.POSIX_FADV_WILLNEED)

    def discard(self, spans: Iterable[Span]) -> None:
        """Gives the memory of spans back and undoes edits in them; the bytes around them keep theirs.

        Only whole pages inside a span can be given back. In the pages that a span shares with its neighbours, its own
        bytes are compared with the file and put back where they differ.

        Raises:
            MalformedFileError: the file is shorter than it was.
        """
        if self._map is None:
            return
        for start, end in merge(spans):
            first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end - end % mmap.PAGESIZE
            if first >= last or not self._advise(_DONTNEED, first, last):
                first = last = end
            for left, right in ((start, first), (last, end)):
                self._restore(left, right)

    def stop(self) -> None:
        """Ends running transfers; a local file has none."""

    def close(self) -> None:
        """Closes the file. The map goes when the last tensor on it does."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
            self._descriptor, self._map = -1, None

    @property
    def _open_descriptor(self) -> int:
        if self._descriptor < 0:
            raise ValueError(f"{self.name} is closed.")
        return self._descriptor

    def _restore(self, start: int, end: int) -> None:
        for left, right in split([(start, end)], _POPULATE_BYTES):
            stored = self.read(left, right)
            if self.map[left:right] != stored:
                self.map[left:right] = stored

    def _advise(self, advice: int, start: int, end: int) -> bool:
        """Calls madvise without holding the interpreter's lock; False where the system does not know the advice."""
        mapped = self.map  # held, so that closing the file meanwhile does not unmap it
        madvise = _madvise()
        if madvise is None:
            return False
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        while madvise(address + start, end - start, advice) != 0:
            code = ctypes.get_errno()
            if code == errno.EINVAL:
                return False
            if code == errno.EFAULT:
                raise self._shrunk()
            if code not in (errno.EINTR, errno.EAGAIN):
                raise OSError(code, f"{os.strerror(code)} while reading {self.path}")
        return True

    def _shrunk(self) -> MalformedFileError:
        size = self.path.stat().st_size if self.path.exists() else 0
        return MalformedFileError(
            f"{self.path} had {self.size} bytes when it was opened and cannot be read to its end now "
            f"(it has {size} bytes). Do not change a checkpoint while it is in use."
        )


def close_files(files: Collection[MappedFile], pool: Executor | None) -> None:
    """Ends running transfers and closes files and the threads they share."""
    for file in files:
        file.stop()
    if pool is not None:
        pool.shutdown(cancel_futures=True)
    for file in files:
        file.close()


def _private_map(descriptor: int, size: int) -> mmap.mmap:
    if sys.platform != "linux":
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
    # Without NORESERVE the kernel refuses a writable private map that is larger than memory and swap.
    flags = mmap.MAP_PRIVATE | _NORESERVE
    return mmap.mmap(descriptor, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _read_at(descriptor: int, length: int, start: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(descriptor, length, start)
    with _POSITION_LOCK:
        os.lseek(descriptor, start, os.SEEK_SET)
        return os.read(descriptor, length)


_POSITION_LOCK = threading.Lock()


@cache
def _madvise() -> Any:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
