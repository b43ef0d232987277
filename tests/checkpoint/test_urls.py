import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import pytest
import torch

from superweights.checkpoint import Checkpoint
from superweights.errors import CheckpointError, NotACheckpointError, PickleCheckpointError

HEADER_BYTES = 2 * (64 << 10)


@pytest.fixture
def url(sharded: Path) -> Iterator[str]:
    """The sharded model in fsspec's memory."""
    memory = fsspec.filesystem("memory")
    memory.put(f"{sharded}/", "/acme/tiny", recursive=True)
    yield "memory://acme/tiny"
    memory.rm("/acme", recursive=True)


def equal_to_local(checkpoint: Checkpoint, local: Path, names: list[str]) -> bool:
    with Checkpoint.open(local) as expected:
        return all(torch.equal(checkpoint.view(name), expected.view(name)) for name in names)


@pytest.mark.parametrize("ending", ["", "/"])
def test_only_ranges_are_fetched_and_only_once(url: str, ending: str, sharded: Path, tmp_path: Path) -> None:
    with Checkpoint.open(url + ending, cache_dir=tmp_path / "cache") as checkpoint:
        assert checkpoint.bytes_fetched == HEADER_BYTES
        checkpoint.fetch(["layer.1.down"])
        assert checkpoint.bytes_fetched == HEADER_BYTES + checkpoint.tensors["layer.1.down"].nbytes
        assert equal_to_local(checkpoint, sharded, ["layer.1.down"])
        assert {path.name for path in checkpoint.directory.iterdir()} == {"config.json", "tokenizer.json"}
    with Checkpoint.open(url + ending, cache_dir=tmp_path / "cache") as checkpoint:
        checkpoint.fetch(["layer.1.down"])
        assert equal_to_local(checkpoint, sharded, ["layer.1.down"])
        assert checkpoint.bytes_fetched == 0


def test_a_changed_file_is_fetched_anew(url: str, sharded: Path, tmp_path: Path) -> None:
    shard = "model-00001-of-00002.safetensors"
    with Checkpoint.open(url, cache_dir=tmp_path / "cache") as checkpoint:
        checkpoint.fetch(["layer.1.down"])
    content = (sharded / shard).read_bytes()
    (sharded / shard).write_bytes(content[:-5000] + bytes(5000))
    fsspec.filesystem("memory").put(str(sharded / shard), f"/acme/tiny/{shard}")
    with Checkpoint.open(url, cache_dir=tmp_path / "cache") as checkpoint:
        checkpoint.fetch(["layer.1.down"])
        assert equal_to_local(checkpoint, sharded, ["layer.1.down"])


def test_a_changed_config_is_copied_anew(url: str, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for size in (8, 16):
        memory.pipe_file("/acme/tiny/config.json", b'{"hidden_size": %d}' % size)
        with Checkpoint.open(url, cache_dir=tmp_path / "cache") as checkpoint:
            assert checkpoint.config == {"hidden_size": size}


@pytest.mark.parametrize("folder", ["tiny", ""])
def test_an_archive_is_a_filesystem_too(sharded: Path, tmp_path: Path, folder: str) -> None:
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        for file in sharded.iterdir():
            archive.write(file, Path(folder, file.name))
    with Checkpoint.open(
        f"zip://{folder}::file://{tmp_path / 'model.zip'}", cache_dir=tmp_path / "cache"
    ) as checkpoint:
        checkpoint.fetch(["head"])
        assert equal_to_local(checkpoint, sharded, ["head"])


def test_a_url_with_nothing_behind_it(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpointError, match="memory://no/model"):
        Checkpoint.open("memory://no/model", cache_dir=tmp_path)


def test_pickles_behind_a_url_are_refused(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/pickled/config.json": b"{}", "/pickled/pytorch_model.bin": b"x"})
    with pytest.raises(PickleCheckpointError, match="memory://pickled"):
        Checkpoint.open("memory://pickled", cache_dir=tmp_path)
    memory.rm("/pickled", recursive=True)


def test_an_unknown_protocol_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nonsense://bucket/model") as caught:
        Checkpoint.open("nonsense://bucket/model", cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_filesystem_that_fails_is_one_line(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> bytes:
        raise RuntimeError("SignatureDoesNotMatch\n(key)")

    with Checkpoint.open(url, cache_dir=tmp_path) as checkpoint:
        monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", refuse)
        with pytest.raises(CheckpointError, match=r"RuntimeError: SignatureDoesNotMatch \(key\)"):
            checkpoint.fetch(["head"])


def test_a_filesystem_that_gives_other_lengths_is_refused(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpoint.open(url, cache_dir=tmp_path) as checkpoint:
        monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", lambda *_, **__: b"short")
        with pytest.raises(CheckpointError, match="got 5 bytes"):
            checkpoint.fetch(["head"])


class RangeHandler(SimpleHTTPRequestHandler):
    """A plain web server that serves ranges and no listing."""

    def log_message(self, format: str, *values: Any) -> None:
        """Says nothing."""

    def list_directory(self, path: Any) -> None:
        self.send_error(404)

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if asked is None or not path.is_file():
            super().do_GET()
            return
        first, last = map(int, asked.removeprefix("bytes=").split("-"))
        content = path.read_bytes()
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        self.wfile.write(content[first : last + 1])


def test_a_web_server_without_listing(sharded: Path, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads http through aiohttp, which is not installed")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RangeHandler, directory=str(sharded)))
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        with Checkpoint.open(f"http://127.0.0.1:{server.server_port}", cache_dir=tmp_path / "cache") as checkpoint:
            checkpoint.fetch(["head"])
            assert equal_to_local(checkpoint, sharded, ["head"])
            assert checkpoint.bytes_fetched == (64 << 10) + checkpoint.tensors["head"].end
    finally:
        server.shutdown()
        server.server_close()
