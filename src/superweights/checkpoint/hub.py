"""Opens a model of the Hugging Face Hub through the Hub's own client, and fetches only byte ranges of its weights.

The client gives the addresses, the token and the connections, and honours HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE. The
config and the tokenizer go into the client's cache as usual. A model that is whole in that cache needs no network.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from superweights.checkpoint.local import WeightSource, find_shards, open_directory
from superweights.checkpoint.reference import ModelReference, no_such_path
from superweights.checkpoint.remote import (
    BrokenTransferError,
    RemoteFile,
    RemoteVersion,
    cache_folder,
    fetch_headers,
    is_small,
    remote_files,
)
from superweights.checkpoint.shards import choose_shards
from superweights.errors import CheckpointError, HubError, NotACheckpointError

_METADATA_SECONDS = 15.0
_RANGE_SECONDS = 60.0
_BLOCK_BYTES = 1 << 20
_RETRIED = (408, 429, 500, 502, 503, 504)
_EXPIRED = (401, 403, 404, 410)


def hub_source(reference: ModelReference, cache_dir: Path | None) -> WeightSource:
    """Opens a repository of the Hub, from the client's cache where the whole model is there.

    Raises:
        HubError: no network, or the Hub refuses.
        NotACheckpointError, PickleCheckpointError, MissingTensorError: the repository holds no usable weights.
    """
    return _whole_in_cache(reference) or _ranges(reference, cache_dir)


def _whole_in_cache(reference: ModelReference) -> WeightSource | None:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(reference.name, "config.json", revision=reference.revision)
    if not isinstance(config, str):
        return None
    directory = Path(config).parent
    try:
        shards = find_shards(directory)
    except CheckpointError:  # some shards are not there: the usual state of a model that was never downloaded whole
        return None
    return open_directory(directory, shards, revision=directory.name)


def _ranges(reference: ModelReference, cache_dir: Path | None) -> WeightSource:
    from huggingface_hub import HfApi

    with _hub_errors(reference):
        info = HfApi().model_info(
            reference.name, revision=reference.revision, files_metadata=True, timeout=_METADATA_SECONDS
        )
    siblings = {each.rfilename: each for each in info.siblings or ()}
    pinned = ModelReference(reference.name, info.sha)
    where = f"{reference} on the Hub"
    shards = choose_shards(siblings, lambda name: _download(pinned, name).read_bytes(), where=where)
    if "config.json" not in siblings:
        raise NotACheckpointError(f"{where} is not a model: it has no config.json.")
    folder = cache_folder(cache_dir) / "hub" / reference.name.replace("/", "--") / info.sha
    with remote_files() as (pool, files):
        small = [name for name, each in siblings.items() if is_small(name, each.size)]
        copies = dict(zip(small, pool.map(partial(_download, pinned), small), strict=True))
        for name in shards.files:
            reader = HubReader(pinned, name, version=_listed_version(siblings[name]))
            files[name] = RemoteFile(reader, name=name, version=reader.version, folder=folder, pool=pool)
        fetch_headers(files.values())
        return WeightSource(copies["config.json"].parent, info.sha, shards, files, pool)


def _download(pinned: ModelReference, name: str) -> Path:
    """One small file, in the client's cache."""
    from huggingface_hub import hf_hub_download

    with _hub_errors(pinned):
        return Path(hf_hub_download(pinned.name, name, revision=pinned.revision, tqdm_class=_silent_bar()))


@cache
def _silent_bar() -> Any:
    from huggingface_hub.utils import tqdm

    def start(bar: Any, *values: Any, **settings: Any) -> None:
        tqdm.__init__(bar, *values, **{**settings, "disable": True})

    return type("SilentBar", (tqdm,), {"__init__": start})


def _listed_version(sibling: Any) -> RemoteVersion | None:
    """Size and ETag by the repository's listing; None where a mirror leaves them out."""
    etag = sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id
    return None if sibling.size is None or etag is None else RemoteVersion(sibling.size, etag)


class HubReader:
    """Reads ranges of one file of a repository at one commit.

    The Hub redirects a weight file to a signed address of its storage. It is asked once for that address, which is used
    until the storage refuses it.
    """

    def __init__(self, pinned: ModelReference, name: str, *, version: RemoteVersion | None) -> None:
        from huggingface_hub import hf_hub_url

        self._pinned = pinned
        self._name = name
        self._url = hf_hub_url(pinned.name, name, revision=pinned.revision)
        self._address: str | None = None
        self._lock = threading.Lock()
        self.version = version or self._locate()

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """Gives the bytes from `start` to `end`; asks for a new address once where the old one is refused."""
        address = self._resolve(refused=None)
        with self._request(address, start, end) as response:
            if response.status_code not in _EXPIRED:
                yield from self._content(response, start, end)
                return
        with self._request(self._resolve(refused=address), start, end) as response:
            yield from self._content(response, start, end)

    def _resolve(self, *, refused: str | None) -> str:
        with self._lock:
            if self._address is None or self._address == refused:
                found = self._locate()
                if found != self.version:
                    raise self._failure(f"says it is {found}, but the repository lists {self.version}")
            return str(self._address)

    def _locate(self) -> RemoteVersion:
        """Asks the Hub for the file's address, size and ETag."""
        from huggingface_hub import get_hf_file_metadata

        with _hub_errors(self._pinned):
            metadata = get_hf_file_metadata(self._url, timeout=_METADATA_SECONDS)
        if metadata.commit_hash not in (None, self._pinned.revision):
            raise self._failure(f"answers for commit {metadata.commit_hash}")
        if metadata.size is None or metadata.etag is None:
            raise self._failure("names no size or no ETag of it")
        self._address = metadata.location
        return RemoteVersion(metadata.size, metadata.etag)

    @contextmanager
    def _request(self, address: str, start: int, end: int) -> Iterator[Any]:
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
        from huggingface_hub.utils import build_hf_headers, get_session

        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        if urlsplit(address)[:2] == urlsplit(self._url)[:2]:  # the token never goes to another server
            headers |= build_hf_headers()
        try:
            with get_session().stream("GET", address, headers=headers, timeout=_RANGE_SECONDS) as response:
                yield response
        except OfflineModeIsEnabled as error:
            raise _explained(self._pinned, error) from error
        except HfHubHTTPError.__bases__ as error:  # the HTTP library's own errors, whichever library the client uses
            raise BrokenTransferError(_explained(self._pinned, error)) from error

    def _content(self, response: Any, start: int, end: int) -> Iterator[bytes]:
        from huggingface_hub.utils import hf_raise_for_status

        if response.status_code in _RETRIED:
            raise BrokenTransferError(self._failure(f"answers with status {response.status_code}"))
        if response.status_code != 206:
            response.close()  # not read: a server that ignores ranges sends the whole file
            with _hub_errors(self._pinned):
                hf_raise_for_status(response)
            raise self._failure("does not answer requests for a part of a file")
        expected = f"bytes {start}-{end - 1}/{self.version.size}"
        if response.headers.get("Content-Range") != expected:
            raise self._failure(f"sent {response.headers.get('Content-Range')!r} where {expected!r} was asked for")
        yield from response.iter_bytes(_BLOCK_BYTES)

    def _failure(self, what: str) -> HubError:
        return HubError(
            f"Cannot read {self._name} of {self._pinned}: the server {what}. Try again, or download the model."
        )


@contextmanager
def _hub_errors(reference: ModelReference) -> Iterator[None]:
    """Turns every error of the client into one of ours with one clear line."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except (HFValidationError, *HfHubHTTPError.__bases__) as error:  # the bases: OSError and the HTTP library's errors
        raise _explained(reference, error) from error


def _explained(reference: ModelReference, error: BaseException) -> CheckpointError:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return _explained(reference, error.__cause__)
    name, page = reference.name, f"{constants.ENDPOINT}/{reference.name}"
    if isinstance(error, errors.HFValidationError):
        return no_such_path(reference)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubError(
            f"Cannot open {name}: it is no local path, it is not whole in the Hub's cache {constants.HF_HUB_CACHE}, and "
            "HF_HUB_OFFLINE forbids the network. Give a local directory, or unset HF_HUB_OFFLINE."
        )
    if isinstance(error, errors.GatedRepoError):
        return HubError(
            f"{name} is gated: its owner decides who may read it. Ask for access at {page}, then log in with "
            "`hf auth login` or set HF_TOKEN."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"{name} is no local path, and the Hub shows no such repository: the name is wrong, or the repository is "
            "private or gated. Check the name; for a private or gated one log in with `hf auth login` or set HF_TOKEN."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(
            f"{name} has no revision {reference.revision!r}. See its branches and tags at {page}/tree/main."
        )
    if isinstance(error, errors.HfHubHTTPError):
        return HubError(f"The Hub refuses {reference} with status {error.response.status_code}: {_line(error)}")
    return HubError(
        f"Cannot reach the Hub at {constants.ENDPOINT} for {name}: {_line(error)}. Check the network, or give a local "
        "directory."
    )


def _line(error: BaseException) -> str:
    """The first line of a message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
