"""A Hugging Face Hub on this machine: the few addresses that the real client asks for, with everything counted.

Like the real one it redirects weight files to a storage server under addresses that expire, and answers with the
headers and error codes that the client decides by.
"""

import hashlib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Served:
    """One request that was answered."""

    method: str
    path: str
    range: str | None
    status: int
    authorized: bool
    storage: bool


class LocalHub:
    """Serves directories as model repositories while the context is open.

    Args:
        repositories: repository name to directory; every repository has one commit, which is also `main`.
        gated: names of repositories whose files are refused.
        listed: whether the listing gives sizes and hashes, which some mirrors leave out.
    """

    def __init__(self, repositories: Mapping[str, Path], *, gated: Iterable[str] = (), listed: bool = True) -> None:
        self.repositories = dict(repositories)
        self.gated = frozenset(gated)
        self.listed = listed
        self.served: list[Served] = []
        self.bytes_sent: Counter[str] = Counter()
        self.ignore_ranges = False
        self.failures_left = 0
        self.failure_status: int | None = None
        self._generation = 0
        self._lock = threading.Lock()
        self._hub = self._start(_HubHandler)
        self._storage = self._start(_StorageHandler)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for server in (self._hub, self._storage):
            server.shutdown()
            server.server_close()

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT must be."""
        return f"http://127.0.0.1:{self._hub.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """The variables that send a child process to this Hub, with caches under `home`."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home / "hf"), "SUPERWEIGHTS_CACHE": str(home / "ranges")}

    def point_client_here(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """Sends the client of this process to this Hub, with caches under `home`."""
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hf" / "hub"))
        monkeypatch.setenv("SUPERWEIGHTS_CACHE", str(home / "ranges"))

    def expire_addresses(self) -> None:
        """Makes the storage refuse the addresses it was asked under so far."""
        with self._lock:
            self._generation += 1

    def fail(self, times: int, *, status: int | None = None) -> None:
        """Makes the storage fail the next requests: by an HTTP status, or by hanging up in the middle."""
        with self._lock:
            self.failures_left, self.failure_status = times, status

    def weight_bytes(self) -> int:
        """How many bytes the storage has sent."""
        return sum(self.bytes_sent.values())

    def weight_requests(self) -> list[Served]:
        """The range requests that reached the storage."""
        return [each for each in self.served if each.storage]

    def commit(self, name: str) -> str:
        """The commit of a repository: it changes when a file does."""
        digest = hashlib.sha1(name.encode(), usedforsecurity=False)
        for path in self.files(name).values():
            digest.update(self.etag(path).encode())
        return digest.hexdigest()

    def files(self, name: str) -> dict[str, Path]:
        """The files of a repository."""
        root = self.repositories[name]
        return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}

    def etag(self, path: Path) -> str:
        """Stands for the hash of a file, without reading it."""
        status = path.stat()
        return hashlib.sha256(f"{path} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()

    def _start(self, handler: type["_Handler"]) -> ThreadingHTTPServer:
        server = _Server(("127.0.0.1", 0), type("Bound", (handler,), {"hub": self}))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing: a client that hangs up early is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"
    storage = False

    def log_message(self, format: str, *values: Any) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        raise NotImplementedError

    def reply(self, status: int, headers: Mapping[str, str], *, length: int) -> None:
        with self.hub._lock:
            self.hub.served.append(
                Served(
                    self.command,
                    urlsplit(self.path).path,
                    self.headers.get("Range"),
                    status,
                    "Authorization" in self.headers,
                    self.storage,
                )
            )
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def send_file(self, path: Path, headers: Mapping[str, str], *, hang_up: bool = False) -> int:
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, end, status = 0, size, 200
        if asked and not (self.storage and self.hub.ignore_ranges):
            start, end, status = int(asked[1]), min(int(asked[2]) + 1, size), 206
            headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{size}"}
        self.reply(status, headers, length=end - start)
        if self.command == "HEAD":
            return 0
        if hang_up:
            end = start + (end - start) // 2
            self.close_connection = True
        descriptor = os.open(path, os.O_RDONLY)
        try:
            for position in range(start, end, _BLOCK):
                self.wfile.write(os.pread(descriptor, min(_BLOCK, end - position), position))
        finally:
            os.close(descriptor)
        return end - start


class _HubHandler(_Handler):
    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/(?P<name>[^/]+/[^/]+|[^/]+)(/revision/(?P<revision>.+))?", path):
            self.listing(match["name"], match["revision"])
        elif match := re.fullmatch(r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>.+)", path):
            self.tree(match["name"], match["revision"])
        elif match := re.fullmatch(r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", path):
            self.file(match["name"], match["revision"], match["file"])
        else:
            self.refuse(404, "")

    def send_json(self, content: Any) -> None:
        body = json.dumps(content).encode()
        self.reply(200, {"Content-Type": "application/json"}, length=len(body))
        self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.reply(status, {"X-Error-Code": code} if code else {}, length=0)

    def known(self, name: str, revision: str | None) -> bool:
        if name not in self.hub.repositories:
            self.refuse(401, "RepoNotFound")
            return False
        if revision not in (None, "main", self.hub.commit(name)):
            self.refuse(404, "RevisionNotFound")
            return False
        return True

    def listing(self, name: str, revision: str | None) -> None:
        if not self.known(name, revision):
            return
        siblings: list[dict[str, Any]] = []
        for file, path in self.hub.files(name).items():
            sibling: dict[str, Any] = {"rfilename": file}
            if self.hub.listed:
                size = path.stat().st_size
                sibling |= {"size": size, "blobId": self.hub.etag(path)}
                if file.endswith((".safetensors", ".bin")):
                    sibling["lfs"] = {"sha256": self.hub.etag(path), "size": size, "pointerSize": 134}
            siblings.append(sibling)
        self.send_json({"id": name, "modelId": name, "sha": self.hub.commit(name), "siblings": siblings})

    def tree(self, name: str, revision: str) -> None:
        if self.known(name, revision):
            files = self.hub.files(name).items()
            self.send_json(
                [
                    {"type": "file", "path": file, "size": path.stat().st_size, "oid": self.hub.etag(path)}
                    for file, path in files
                ]
            )

    def file(self, name: str, revision: str, file: str) -> None:
        if not self.known(name, revision):
            return
        if name in self.hub.gated:
            self.refuse(403, "GatedRepo")
            return
        if file not in self.hub.files(name):
            self.refuse(404, "EntryNotFound")
            return
        path = self.hub.files(name)[file]
        headers = {"X-Repo-Commit": self.hub.commit(name)}
        if not file.endswith((".safetensors", ".bin")):
            self.send_file(path, {**headers, "ETag": f'"{self.hub.etag(path)}"'})
            return
        address = f"http://127.0.0.1:{self.hub._storage.server_port}/{name}/{file}?generation={self.hub._generation}"
        linked = {"X-Linked-Size": str(path.stat().st_size), "X-Linked-ETag": f'"{self.hub.etag(path)}"'}
        self.reply(302, {**headers, **linked, "Location": address}, length=0)


class _StorageHandler(_Handler):
    storage = True

    def answer(self) -> None:
        address = urlsplit(self.path)
        owner, name, file = unquote(address.path).lstrip("/").split("/", 2)
        with self.hub._lock:
            expired = parse_qs(address.query)["generation"] != [str(self.hub._generation)]
            failing = not expired and self.hub.failures_left > 0
            self.hub.failures_left -= failing
        if expired:
            self.reply(403, {}, length=0)
        elif failing and self.hub.failure_status is not None:
            self.reply(self.hub.failure_status, {}, length=0)
        else:
            sent = self.send_file(self.hub.repositories[f"{owner}/{name}"] / file, {}, hang_up=failing)
            with self.hub._lock:
                self.hub.bytes_sent[f"{owner}/{name}/{file}"] += sent
