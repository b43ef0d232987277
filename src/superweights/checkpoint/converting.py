"""Writes a checkpoint anew, some of its tensors replaced by others: streamed, whole or not at all, and resumable.

The size of everything is known before anything is read, so each shard is laid out first and several threads fill it, a tensor
each. Shards grow in a folder beside the target, which takes the target's place in the end. An interrupted run leaves that
folder, and the same run goes on from its last whole shard; an error leaves nothing.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from superweights.checkpoint.checkpoint import Checkpoint
from superweights.checkpoint.copying import check_target, copy_small_files, put_in_place, sync_folder, write_file
from superweights.checkpoint.dtypes import STORAGE_TYPES
from superweights.checkpoint.mapped import MappedFile
from superweights.errors import RecordError, UsageError
from superweights.progress import NO_PROGRESS, Progress

if TYPE_CHECKING:
    import torch

_COPY_BYTES = 32 << 20
_SYNC_BYTES = 256 << 20
"""Bytes read between two starts of writing to the disk."""
_IDENTITY = "superweights-partial.txt"


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to come."""

    name: str
    """Its name in the new checkpoint."""
    dtype: str
    """The name of its number format in safetensors, such as I32."""
    shape: tuple[int, ...]
    """Its shape."""

    @property
    def nbytes(self) -> int:
        """Its size, bytes."""
        return prod(self.shape) * STORAGE_TYPES[self.dtype].nbits // 8


@dataclass(frozen=True, slots=True)
class Replacement:
    """What takes the place of one tensor."""

    tensors: tuple[NewTensor, ...]
    """The new tensors."""
    make: "Callable[[torch.Tensor], Sequence[torch.Tensor]]"
    """Makes them of the old one, in the same order; called on any thread, once or, after an interruption, again."""


def convert_checkpoint(
    checkpoint: Checkpoint,
    to: Path,
    replacements: Mapping[str, Replacement],
    *,
    files: Mapping[str, str],
    recipe: str = "",
    finish: Callable[[Path], None] | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress = NO_PROGRESS,
) -> int:
    """Writes a new checkpoint in which some tensors are replaced; shards keep their names.

    Args:
        checkpoint: the model; its own files are only read.
        to: the new folder.
        replacements: what replaces tensors, by their names; all others are copied.
        files: texts of further files by name, such as config.json; they replace the model's own. With the checkpoint and the
            recipe they say what is being made: a run is resumed where these are the same.
        recipe: what `files` do not tell of how tensors are made.
        finish: called with the folder that holds the whole new checkpoint, before it takes its place. What it adds there comes
            along; after an interruption it is called again, and may find what it left.
        overwrite: whether a model that is at `to` already may be replaced.
        threads: tensors worked on at once; default: one per core.
        progress: hears about each tensor.

    Returns:
        Bytes of the new weight files.

    Raises:
        UsageError: `to` is taken, or lies in the model's own folder or around it, or what lies where an interrupted run would
            leave its rest is not one.
        RecordError: the new files cannot be written. What was at `to` is still there, and nothing else is.
        CheckpointError: the model's bytes cannot be had, or not be made into what is asked.
    """
    target = Path(to).expanduser().resolve()
    check_target(checkpoint, target, overwrite=overwrite)
    folder = target.with_name(f".{target.name}.partial")
    _check_rest(folder)
    shards = {name: _Shard.of(checkpoint, name, replacements) for name in checkpoint.files}
    progress.start("writing", total=len(checkpoint.tensors), unit="tensors")
    try:
        _begin(folder, _identity(checkpoint, shards, files, recipe))
        for name, shard in shards.items():
            _fill(checkpoint, shard, folder / name, threads, progress)
        copy_small_files(checkpoint.directory, folder, but=files)
        _write_texts(checkpoint, folder, shards, files)
        if finish is not None:
            finish(folder)
        for each in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
            sync_folder(each)
        (folder / _IDENTITY).unlink()  # so late that an interruption before finds it
        put_in_place(folder, target)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        needed = sum(shard.nbytes for shard in shards.values())
        raise RecordError(
            f"Cannot write {to}: {error.strerror}. Nothing was changed there. Give a folder that you can write on a disk with "
            f"{needed / 1e9:.3g} GB free."
        ) from error
    except Exception:  # but not an interruption, after which the same run goes on
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        progress.finish()
    return sum(shard.nbytes for shard in shards.values())


@dataclass(frozen=True)
class _Shard:
    """One new weight file, laid out."""

    header: bytes
    """Its first bytes."""
    places: dict[str, int]
    """Where each new tensor starts in the file."""
    sources: dict[str, Replacement | None]
    """The old tensors, and what replaces them."""
    nbytes: int
    """Its size."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, name: str, replacements: Mapping[str, Replacement]) -> "_Shard":
        """Lays out the file; wide formats come first, so that each tensor starts at a multiple of its item size."""
        sources = {each: replacements.get(each) for each, entry in checkpoint.tensors.items() if entry.file == name}
        tensors = [
            tensor
            for each, replaced in sources.items()
            for tensor in (replaced.tensors if replaced else (_same(checkpoint, each),))
        ]
        tensors.sort(key=lambda each: -STORAGE_TYPES[each.dtype].nbits)
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        places, start = {}, 0
        for each in tensors:
            entries[each.name] = {
                "dtype": each.dtype, "shape": list(each.shape), "data_offsets": [start, start + each.nbytes]
            }  # fmt: skip
            places[each.name] = start
            start += each.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        places = {each: len(header) + place for each, place in places.items()}
        return cls(header, places, sources, len(header) + start)


def _same(checkpoint: Checkpoint, name: str) -> NewTensor:
    entry = checkpoint.tensors[name]
    return NewTensor(name, entry.dtype, entry.shape)


def _identity(checkpoint: Checkpoint, shards: Mapping[str, _Shard], files: Mapping[str, str], recipe: str) -> str:
    # The checkpoint's digest is of its headers. Other values show by a file's time, or by the name of a remote file's copy.
    versions = [
        file.path.stat().st_mtime_ns if type(file) is MappedFile else file.path.name
        for file in checkpoint.files.values()
    ]
    source = (checkpoint.digest, str(checkpoint.directory.resolve()), versions)
    digest = hashlib.sha256(repr((source, sorted(files.items()), recipe)).encode())
    for shard in shards.values():
        digest.update(shard.header)
    return digest.hexdigest()


def _check_rest(folder: Path) -> None:
    """Refuses a folder that no run left behind."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _IDENTITY).is_file():
        raise UsageError(f"{folder} is not a folder of an interrupted run. Move it away, or give another target.")


def _begin(folder: Path, identity: str) -> None:
    """Makes the folder, or keeps what the same run left in it."""
    if folder.is_dir():
        named = folder / _IDENTITY
        if named.is_file() and named.read_text() == identity:
            return
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / _IDENTITY).write_text(identity)


@contextmanager
def _threads(count: int | None) -> Iterator[ThreadPoolExecutor]:
    """Threads that work on a tensor each, with torch's own threads off; waits for them in the end."""
    import torch

    name = "superweights-convert"
    pool = ThreadPoolExecutor(count or os.cpu_count() or 1, name, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        # A worker's thread count of 1 is also what torch would give to threads that start later.
        torch.set_num_threads(torch.get_num_threads())


def _fill(checkpoint: Checkpoint, shard: _Shard, path: Path, threads: int | None, progress: Progress) -> None:
    if path.exists():  # whole: it got its name when it was on the disk
        progress.advance(len(shard.sources))
        return
    growing = path.with_name(f"{path.name}.part")
    growing.parent.mkdir(parents=True, exist_ok=True)
    with growing.open("wb") as file:
        _reserve(file.fileno(), shard.nbytes)
        _write_at(file.fileno(), shard.header, 0)
        # The disk writes while the cores round. Both wait for their threads: none may write once the file is closed.
        with ThreadPoolExecutor(1, "superweights-sync") as disk, _threads(threads) as pool:
            unsynced, syncing = 0, disk.submit(os.fsync, file.fileno())
            for nbytes in pool.map(partial(_convert, checkpoint, shard, file.fileno()), shard.sources):
                progress.advance(nbytes=nbytes)
                unsynced += nbytes
                if unsynced >= _SYNC_BYTES and syncing.done():
                    syncing.result()
                    unsynced, syncing = 0, disk.submit(os.fsync, file.fileno())
            syncing.result()
        os.fsync(file.fileno())
    growing.rename(path)


def _reserve(descriptor: int, nbytes: int) -> None:
    """Takes the room now, so that a full disk shows before the work; where the file system can."""
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        os.truncate(descriptor, nbytes)


def _convert(checkpoint: Checkpoint, shard: _Shard, descriptor: int, name: str) -> int:
    """Writes what becomes of one tensor; gives the bytes read."""
    replaced = shard.sources[name]
    entry = checkpoint.tensors[name]
    checkpoint.fetch((name,))
    if replaced is None:
        _write_at(descriptor, checkpoint.stored_bytes(name), shard.places[name])
    else:
        import torch

        for new, tensor in zip(replaced.tensors, replaced.make(checkpoint.view(name)), strict=True):
            data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
            assert data.nbytes == new.nbytes, (new, tensor.shape, tensor.dtype)
            _write_at(descriptor, data, shard.places[new.name])
    checkpoint.drop((name,))
    return entry.nbytes


def _write_at(descriptor: int, data: "bytes | memoryview", position: int) -> None:
    view = memoryview(data)
    for start in range(0, len(view), _COPY_BYTES):
        piece = view[start : start + _COPY_BYTES]
        done = 0
        while done < len(piece):
            done += os.pwrite(descriptor, piece[done:], position + start + done)


def _write_texts(checkpoint: Checkpoint, folder: Path, shards: Mapping[str, _Shard], files: Mapping[str, str]) -> None:
    texts = dict(files)
    if checkpoint.index_file is not None:
        weight_map = {tensor: name for name, shard in shards.items() for tensor in shard.places}
        size = sum(shard.nbytes - len(shard.header) for shard in shards.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        texts[checkpoint.index_file] = json.dumps(index, indent=2) + "\n"
    for name, text in texts.items():
        write_file(folder / name, [text.encode()])
