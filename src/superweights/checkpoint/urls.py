"""Opens a model behind a URL that fsspec knows (s3, gs, http, memory ...), and fetches only byte ranges of its weights."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from superweights.checkpoint.header import load_json
from superweights.checkpoint.local import WeightSource
from superweights.checkpoint.reference import ModelReference
from superweights.checkpoint.remote import (
    RemoteFile,
    RemoteVersion,
    cache_folder,
    fetch_headers,
    is_small,
    remote_files,
    write_beside,
)
from superweights.checkpoint.shards import choose_shards
from superweights.errors import CheckpointError, NotACheckpointError, SuperweightsError

_PROBED = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
"""What is asked for by name on a web server, which has no listing."""


def url_source(reference: ModelReference, cache_dir: Path | None) -> WeightSource:
    """Opens a folder behind a URL.

    Raises:
        CheckpointError: the URL cannot be read; NotACheckpointError, PickleCheckpointError and MissingTensorError say
            what the folder lacks.
    """
    url = reference.name
    with _url_errors(url):
        filesystem, root = _filesystem(url)
        listing = _listing(filesystem, root)
    if "config.json" not in listing:
        found = ", ".join(sorted(listing)[:8]) or "nothing"
        raise NotACheckpointError(f"{url} is not a model: it has no config.json. Found: {found}.")

    def read_small(name: str) -> bytes:
        with _url_errors(url):
            content: bytes = filesystem.cat_file(_join(root, name))
            return content

    shards = choose_shards(listing, read_small, where=url)
    folder = cache_folder(cache_dir) / "urls" / hashlib.sha256(url.encode()).hexdigest()[:24]
    small = sorted(name for name, version in listing.items() if is_small(name, version.size))
    with remote_files() as (pool, files):
        versions = json.dumps([(name, listing[name].key) for name in small])
        directory = folder / hashlib.sha256(versions.encode()).hexdigest()[:16]
        missing = [name for name in small if not (directory / name).is_file()]
        for name, content in zip(missing, pool.map(read_small, missing), strict=True):
            write_beside(directory / name, content)
        for name in shards.files:
            reader = UrlReader(filesystem, _join(root, name), url=url)
            files[name] = RemoteFile(reader, name=name, version=listing[name], folder=folder, pool=pool)
        fetch_headers(files.values())
        return WeightSource(directory, None, shards, files, pool)


class UrlReader:
    """Reads ranges of one file of an fsspec filesystem."""

    def __init__(self, filesystem: Any, path: str, *, url: str) -> None:
        self._filesystem = filesystem
        self._path = path
        self._url = url

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """Gives the bytes from `start` to `end` in one piece; the filesystem tries again by itself."""
        with _url_errors(self._url):
            content = self._filesystem.cat_file(self._path, start=start, end=end)
        if len(content) != end - start:
            raise CheckpointError(
                f"Cannot read {self._path}: asked for bytes {start} to {end}, got {len(content)} bytes. The server does "
                "not serve parts of a file, or the file has changed. Download the model and give its directory."
            )
        yield content


def _filesystem(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        filesystem, root = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise CheckpointError(
            f"Cannot open {url}: {error}. Install what it asks for, or give a local directory."
        ) from error
    return filesystem, root.rstrip("/")


def _listing(filesystem: Any, root: str) -> dict[str, RemoteVersion]:
    """The files of a folder and of folders below it, with what tells their versions apart."""
    if "http" in filesystem.protocol:
        return _probed(filesystem, root)
    found = filesystem.find(root, maxdepth=2, detail=True)
    base = PurePosixPath(root)
    return {PurePosixPath(path).relative_to(base).as_posix(): _version(info) for path, info in found.items()}


def _probed(filesystem: Any, root: str) -> dict[str, RemoteVersion]:
    listing = dict(_existing(filesystem, root, _PROBED))
    index = "model.safetensors.index.json"
    if index in listing and "model.safetensors" not in listing:
        weight_map = load_json(filesystem.cat_file(_join(root, index)), file=_join(root, index)).get("weight_map")
        files = {str(file) for file in weight_map.values()} if isinstance(weight_map, dict) else set()
        listing |= _existing(filesystem, root, sorted(files))
    return listing


def _existing(filesystem: Any, root: str, names: "tuple[str, ...] | list[str]") -> Iterator[tuple[str, RemoteVersion]]:
    for name in names:
        try:
            yield name, _version(filesystem.info(_join(root, name)))
        except FileNotFoundError:
            continue


def _join(root: str, name: str) -> str:
    return f"{root}/{name}" if root else name


def _version(info: dict[str, Any]) -> RemoteVersion:
    about = {key: value for key, value in info.items() if key != "name"}
    return RemoteVersion(int(info["size"] or 0), json.dumps(about, sort_keys=True, default=str))


@contextmanager
def _url_errors(url: str) -> Iterator[None]:
    """Turns whatever a filesystem raises into one line; each kind has its own errors."""
    try:
        yield
    except SuperweightsError:
        raise
    except FileNotFoundError as error:
        raise NotACheckpointError(f"There is nothing at {url}: {error}. Check the address.") from error
    except Exception as error:
        text = " ".join(str(error).split()) or "no reason given"
        raise CheckpointError(
            f"Cannot read {url}: {type(error).__name__}: {text}. Check the address and the credentials."
        ) from error
