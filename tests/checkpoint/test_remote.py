import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from superweights.checkpoint import remote as remote_module
from superweights.checkpoint.remote import (
    BrokenTransferError,
    RemoteFile,
    RemoteVersion,
    cache_folder,
    is_small,
    write_beside,
)
from superweights.errors import CheckpointError

CONTENT = bytes(range(256)) * 40_000  # 10 MB
MEGABYTE = 1 << 20


class MemoryReader:
    """Serves CONTENT and notes what was asked for; `answer` may replace what it gives."""

    def __init__(self, answer: Callable[[int, int], Iterator[bytes]] | None = None) -> None:
        self.asked: list[tuple[int, int]] = []
        self._answer = answer or (lambda start, end: iter([CONTENT[start:end]]))

    def read(self, start: int, end: int) -> Iterator[bytes]:
        self.asked.append((start, end))
        return self._answer(start, end)


OpenFile = Callable[..., RemoteFile]


@pytest.fixture
def open_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenFile]:
    monkeypatch.setattr(remote_module, "_FIRST_WAIT_SECONDS", 0.0)
    pool = ThreadPoolExecutor(4)
    opened: list[RemoteFile] = []

    def open_one(reader: MemoryReader, identity: str = "v1") -> RemoteFile:
        version = RemoteVersion(len(CONTENT), identity)
        opened.append(RemoteFile(reader, name="sub/w", version=version, folder=tmp_path / "cache", pool=pool))
        return opened[-1]

    yield open_one
    for file in opened:
        file.stop()
    pool.shutdown()
    for file in opened:
        file.close()


def fetch(file: RemoteFile, *spans: tuple[int, int]) -> None:
    file.finish_fetch(file.start_fetch(spans))


def test_near_spans_become_one_request_and_far_ones_do_not(open_file: OpenFile) -> None:
    reader = MemoryReader()
    file = open_file(reader)
    fetch(file, (0, 100), (MEGABYTE, MEGABYTE + 100), (5 * MEGABYTE, 5 * MEGABYTE + 1))
    assert sorted(reader.asked) == [(0, MEGABYTE + 100), (5 * MEGABYTE, 5 * MEGABYTE + 1)]
    assert file.map[: MEGABYTE + 100] == CONTENT[: MEGABYTE + 100]


def test_a_gap_between_present_spans_is_not_asked_for(open_file: OpenFile) -> None:
    reader = MemoryReader()
    file = open_file(reader)
    fetch(file, (0, 100))
    fetch(file, (200, 300))
    fetch(file, (0, 100), (200, 300))
    fetch(file, (50, 250))
    assert reader.asked == [(0, 100), (200, 300), (100, 200)]
    assert file.read(0, 300) == CONTENT[:300]


def test_a_span_on_its_way_is_waited_for_and_not_asked_for_again(open_file: OpenFile) -> None:
    go = Event()

    def wait(start: int, end: int) -> Iterator[bytes]:
        assert go.wait(30)
        yield CONTENT[start:end]

    reader = MemoryReader(wait)
    file = open_file(reader)
    first = file.start_fetch([(0, 1000)])
    second = file.start_fetch([(500, 600)])
    assert first == second
    third = file.start_fetch([(500, 1500)])
    go.set()
    file.finish_fetch([*second, *third])
    assert sorted(reader.asked) == [(0, 1000), (1000, 1500)]
    assert file.map[:1500] == CONTENT[:1500]


def test_a_broken_transfer_continues_where_it_stopped(open_file: OpenFile) -> None:
    def halves(start: int, end: int) -> Iterator[bytes]:
        yield CONTENT[start : (start + end + 1) // 2]
        if end - start > 1:
            raise BrokenTransferError(CheckpointError("broken"))

    reader = MemoryReader(halves)
    file = open_file(reader)
    fetch(file, (0, 1000))
    assert file.map[:1000] == CONTENT[:1000]
    assert file.bytes_fetched == 1000
    assert file.requests == len(reader.asked) > 5


@pytest.mark.parametrize("give", [0, 400])
def test_a_reader_that_gives_too_little_for_ever_fails(open_file: OpenFile, give: int) -> None:
    file = open_file(MemoryReader(lambda start, end: iter([CONTENT[start : min(start + 1, give)]])))
    with pytest.raises(CheckpointError, match=f"stopped at byte {give} of 1000"):
        fetch(file, (0, 1000))
    assert file.read(0, give) == CONTENT[:give]


def test_a_reader_that_gives_too_much_harms_no_neighbour(open_file: OpenFile) -> None:
    file = open_file(MemoryReader(lambda start, end: iter([b"x" * 5000, b"y" * 5000])))
    fetch(file, (100, 200))
    assert file.map[:300] == bytes(100) + b"x" * 100 + bytes(100)


def test_a_failed_span_is_asked_for_again(open_file: OpenFile) -> None:
    broken = [True]

    def answer(start: int, end: int) -> Iterator[bytes]:
        if broken[0]:
            raise CheckpointError("refused")
        yield CONTENT[start:end]

    file = open_file(MemoryReader(answer))
    with pytest.raises(CheckpointError, match="refused"):
        fetch(file, (0, 10))
    broken[0] = False
    assert file.read(0, 10) == CONTENT[:10]


def test_what_was_fetched_is_there_for_the_next_run(open_file: OpenFile) -> None:
    fetch(open_file(MemoryReader()), (10, 20))
    reader = MemoryReader()
    again = open_file(reader)
    assert again.read(10, 20) == CONTENT[10:20]
    assert reader.asked == []


def test_two_runs_at_once_keep_each_others_ranges(open_file: OpenFile) -> None:
    one, two = open_file(MemoryReader()), open_file(MemoryReader())
    fetch(one, (0, 10))
    fetch(two, (MEGABYTE, MEGABYTE + 10))
    reader = MemoryReader()
    assert open_file(reader).read(0, 10) == CONTENT[:10]
    assert open_file(reader).read(MEGABYTE, MEGABYTE + 10) == CONTENT[MEGABYTE : MEGABYTE + 10]
    assert reader.asked == []


def test_another_version_shares_nothing(open_file: OpenFile) -> None:
    fetch(open_file(MemoryReader(), "v1"), (0, 10))
    reader = MemoryReader()
    fetch(open_file(reader, "v2"), (0, 10))
    assert reader.asked == [(0, 10)]


@pytest.mark.parametrize("damage", ["list lost", "list broken", "list of lies", "bytes lost", "bytes cut"])
def test_a_damaged_cache_is_fetched_again(open_file: OpenFile, tmp_path: Path, damage: str) -> None:
    file = open_file(MemoryReader())
    fetch(file, (0, 10))
    file.close()
    (ranges,) = tmp_path.rglob("*.ranges.json")
    if damage == "list lost":
        ranges.unlink()
    elif damage == "list broken":
        ranges.write_text("{")
    elif damage == "list of lies":
        ranges.write_text(json.dumps([[-5, 10], [0, len(CONTENT) + 1], [9, 3]]))
    elif damage == "bytes lost":
        file.path.unlink()
    else:
        with file.path.open("r+b") as stored:
            stored.truncate(5)
    reader = MemoryReader()
    assert open_file(reader).read(0, 10) == CONTENT[:10]
    assert reader.asked == [(0, 10)]


def test_bytes_are_on_disk_before_they_are_listed(open_file: OpenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    synced = remote_module.os.fsync
    monkeypatch.setattr(remote_module.os, "fsync", lambda descriptor: (steps.append("sync"), synced(descriptor)))
    monkeypatch.setattr(remote_module, "write_beside", lambda path, content: steps.append("list"))
    fetch(open_file(MemoryReader()), (0, 10))
    assert steps == ["sync", "list"]


def test_a_full_disk_is_named(open_file: OpenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    file = open_file(MemoryReader())
    monkeypatch.setattr(remote_module, "_write_at", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*SUPERWEIGHTS_CACHE"):
        fetch(file, (0, 10))


def test_stop_ends_a_running_transfer(open_file: OpenFile) -> None:
    started = Event()
    file: RemoteFile

    def endless(start: int, end: int) -> Iterator[bytes]:
        while True:
            started.set()
            yield b"x"

    file = open_file(MemoryReader(endless))
    pieces = file.start_fetch([(0, len(CONTENT))])
    assert started.wait(30)
    file.stop()
    with pytest.raises(CheckpointError, match="closed while"):
        file.finish_fetch(pieces)
    with pytest.raises(ValueError, match="closed"):
        file.start_fetch([(0, 1)])


def test_a_sparse_file_takes_no_room(open_file: OpenFile) -> None:
    file = open_file(MemoryReader())
    fetch(file, (0, 10))
    assert file.path.stat().st_size == len(CONTENT)
    assert file.path.stat().st_blocks * 512 < MEGABYTE


def test_write_beside_leaves_one_file(tmp_path: Path) -> None:
    for content in (b"old", b"new"):
        write_beside(tmp_path / "folder" / "list", content)
    assert [path.read_bytes() for path in (tmp_path / "folder").iterdir()] == [b"new"]


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("SUPERWEIGHTS_CACHE", raising=False)
    assert cache_folder(None) == Path.home() / ".cache" / "superweights"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(None) == tmp_path / "xdg" / "superweights"
    monkeypatch.setenv("SUPERWEIGHTS_CACHE", str(tmp_path / "own"))
    assert cache_folder(None) == tmp_path / "own"
    assert cache_folder(tmp_path / "chosen") == tmp_path / "chosen"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "merges.txt", "chat_template.jinja"])
def test_small_files_are_those_of_config_and_tokenizer(name: str) -> None:
    assert is_small(name, 1000)
    assert not is_small(name, 10**10)
    assert not is_small(f"original/{name}", 1000)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "a.gguf"])
def test_weights_are_not_small_files(name: str) -> None:
    assert not is_small(name, 1000)
