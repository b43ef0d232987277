"""Copies a checkpoint into a new folder with some bytes of its weight files changed: whole, or not at all.

Headers and layout stay as they are, so all that differs is the bytes that were handed in. The copy grows in a folder beside its
place and is renamed when it is on the disk.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from superweights.checkpoint.checkpoint import Checkpoint
from superweights.checkpoint.mapped import MappedFile
from superweights.checkpoint.remote import is_small
from superweights.checkpoint.spans import split
from superweights.errors import RecordError, UsageError
from superweights.progress import NO_PROGRESS, Progress

_BLOCK_BYTES = 128 << 20  # of a remote file: as much as all connections request at once

Pieces = Iterable[tuple[int, memoryview]]
"""Bytes that replace those of a file, each with the position of the first."""


def copy_checkpoint(
    checkpoint: Checkpoint,
    to: Path,
    changes: Callable[[str], Pieces],
    *,
    overwrite: bool = False,
    progress: Progress = NO_PROGRESS,
) -> None:
    """Copies config, tokenizer and weight files of a model, and changes bytes of the copy.

    Args:
        checkpoint: the model; its own files are only read.
        to: the new folder.
        changes: gives what replaces bytes of a weight file, by the file's name; asked once the file is copied.
        overwrite: whether a model that is at `to` already may be replaced.
        progress: hears about each block.

    Raises:
        UsageError: `to` is taken, or lies in the model's own folder or around it.
        RecordError: the copy cannot be written. What was at `to` is still there, and nothing else is.
        CheckpointError: the model's bytes cannot be had.
    """
    target = Path(to).expanduser().resolve()
    check_target(checkpoint, target, overwrite=overwrite)
    files = checkpoint.files
    blocks = {name: list(split([(0, file.size)], _BLOCK_BYTES)) for name, file in files.items()}
    progress.start("copying weights", total=sum(map(len, blocks.values())), unit="blocks")
    try:
        with new_folder(target) as folder:
            copy_small_files(checkpoint.directory, folder)
            _write_index(checkpoint, folder)
            for name, file in files.items():
                _copy_file(file, folder / name, blocks[name], changes(name), progress)
    except OSError as error:
        raise RecordError(
            f"Cannot write a copy of {checkpoint.reference} to {to}: {error.strerror}. Nothing was changed there. Give a "
            f"folder that you can write on a disk with {sum(file.size for file in files.values()) / 1e9:.3g} GB free."
        ) from error
    finally:
        progress.finish()


def check_target(checkpoint: Checkpoint, target: Path, *, overwrite: bool) -> None:
    """Refuses a place where nothing new can be written.

    Raises:
        UsageError: it is taken, or lies in the model's own folder or around it.
    """
    directory = checkpoint.directory.resolve()
    own = [directory, *(file.path.resolve() for file in checkpoint.files.values())]
    fault = None
    if directory in (target, *target.parents) or any(target in path.parents for path in own):
        fault = "the model itself lies there. Give a folder apart from it"
    elif target.exists() and not target.is_dir():
        fault = "that is a file. Give a folder"
    elif target.is_dir() and any(target.iterdir()):
        if not overwrite:
            fault = "the folder is not empty. Give another, or allow to overwrite it (--overwrite)"
        elif not (target / "config.json").is_file():
            fault = "the folder holds no model, so it is not overwritten. Give another"
    if fault:
        raise UsageError(f"Copying {checkpoint.reference} to {target}: {fault}.")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside the target that takes its place in the end, or is gone."""
    folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir()
    try:
        yield folder
        for each in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
            sync_folder(each)
        put_in_place(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(folder: Path, target: Path) -> None:
    """Renames a finished folder to its target; what was there stays until that is done."""
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    try:
        if target.exists():
            target.rename(old)
        folder.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_small_files(directory: Path, folder: Path, *, but: Container[str] = ()) -> None:
    """Config, tokenizer and chat templates; never other weights, which would be those of the unchanged model."""
    for path in [*directory.iterdir(), *directory.glob("additional_chat_templates/*")]:
        name = path.relative_to(directory).as_posix()
        if path.is_file() and is_small(name, path.stat().st_size) and name not in but:
            write_file(folder / name, [path.read_bytes()])


def _write_index(checkpoint: Checkpoint, folder: Path) -> None:
    if checkpoint.index_file is None:
        return
    path = checkpoint.directory / checkpoint.index_file
    weight_map = {name: entry.file for name, entry in checkpoint.tensors.items()}
    index = {"metadata": {"total_size": checkpoint.nbytes}, "weight_map": weight_map}
    write_file(
        folder / checkpoint.index_file, [path.read_bytes() if path.is_file() else json.dumps(index, indent=2).encode()]
    )


def _copy_file(
    file: MappedFile, path: Path, blocks: Iterable[tuple[int, int]], pieces: Pieces, progress: Progress
) -> None:
    def read() -> Iterator[bytes]:
        for start, end in blocks:
            yield file.read(start, end)
            progress.advance(nbytes=end - start)

    write_file(path, read(), pieces)


def write_file(path: Path, blocks: Iterable[bytes], pieces: Pieces = ()) -> None:
    """Writes a file, in place of one that an interrupted run left, and waits until it is on the disk.

    Args:
        path: the file; its folder is made.
        blocks: its bytes.
        pieces: what then replaces some of them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as copy:
        for block in blocks:
            copy.write(block)
        for position, piece in pieces:
            copy.seek(position)
            copy.write(piece)
        copy.flush()
        os.fsync(copy.fileno())
