import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from superweights.checkpoint import mapped
from superweights.checkpoint.mapped import MappedFile
from superweights.errors import MalformedFileError

PAGE = mmap.PAGESIZE


@pytest.fixture
def file(tmp_path: Path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * (10 * PAGE // 256) + b"tail")
    opened = MappedFile(path, name="weights")
    yield opened
    opened.close()


@pytest.fixture(params=["madvise", "no madvise"])
def advice(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no madvise":
        monkeypatch.setattr(mapped, "_madvise", lambda: None)
    return str(request.param)


@pytest.mark.parametrize("span", [(0, 1), (5, 3 * PAGE + 5), (PAGE, 2 * PAGE), (9 * PAGE + 7, 10 * PAGE + 4)])
def test_discard_undoes_edits_inside_a_span_and_nowhere_else(
    file: MappedFile, advice: str, span: tuple[int, int]
) -> None:
    stored = file.read(0, file.size)
    file.map[:] = b"\xee" * file.size
    file.discard([span])
    start, end = span
    assert file.map[start:end] == stored[start:end]
    assert set(file.map[:start] + file.map[end:]) <= {0xEE}
    assert file.read(0, file.size) == stored


def test_populate_reads_whole_spans_and_keeps_edits(file: MappedFile, advice: str) -> None:
    file.map[PAGE] = 0xEE
    file.populate([(10, 5 * PAGE + 3), (file.size - 1, file.size)])
    assert file.map[PAGE] == 0xEE


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the call that reads pages ahead and waits")
def test_populate_asks_for_pages_in_bounded_pieces(file: MappedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []

    def advise(advice: int, start: int, end: int) -> bool:
        asked.append((advice, start, end))
        return True

    monkeypatch.setattr(mapped, "_POPULATE_BYTES", 2 * PAGE)
    monkeypatch.setattr(file, "_advise", advise)
    file.populate([(PAGE + 100, 5 * PAGE)])
    assert [advice for advice, _, _ in asked] == [22] * len(asked)
    assert all(start % PAGE == 0 and end - start <= 3 * PAGE for _, start, end in asked)
    assert asked[0][1] == PAGE and asked[-1][2] == 5 * PAGE


@pytest.mark.skipif(sys.platform != "linux", reason="resident pages are counted through /proc")
def test_populate_makes_pages_resident_and_discard_gives_them_back(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(4 << 20))

    def resident_kilobytes() -> int:
        lines = Path("/proc/self/smaps").read_text().splitlines()
        at = next(number for number, line in enumerate(lines) if line.endswith(str(path)))
        return int(next(line for line in lines[at:] if line.startswith("Rss:")).split()[1])

    opened = MappedFile(path, name="large")
    try:
        assert len(opened.map) == 4 << 20
        assert resident_kilobytes() == 0
        opened.populate([(0, 2 << 20)])
        assert 2048 <= resident_kilobytes() < 4096
        opened.discard([(0, 4 << 20)])
        assert resident_kilobytes() == 0
    finally:
        opened.close()


def test_a_closed_file_maps_no_more(file: MappedFile) -> None:
    file.close()
    file.close()
    with pytest.raises(ValueError, match="closed"):
        _ = file.map


USES: dict[str, Callable[[MappedFile], object]] = {
    "map": lambda file: file.map,
    "populate": lambda file: file.populate([(0, file.size)]),
    "discard": lambda file: file.discard([(5, file.size - 5)]),
    "read": lambda file: file.read(0, file.size),
}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not shorten a file that is open or mapped")
@pytest.mark.parametrize("mapped_before", [False, True])
@pytest.mark.parametrize("left", [0, 5, PAGE, 10 * PAGE + 3])
@pytest.mark.parametrize("use", USES)
def test_a_file_that_shrank_is_refused_and_not_touched(
    file: MappedFile, advice: str, use: str, left: int, mapped_before: bool
) -> None:
    if mapped_before:
        file.map[PAGE] = 0xEE
    os.truncate(file.path, left)
    if use == "discard" and not mapped_before:
        return file.discard([(5, file.size - 5)])  # there is nothing to give back
    with pytest.raises(MalformedFileError, match=rf"had {file.size} bytes .*it has {left} bytes"):
        USES[use](file)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not shorten a file that is open or mapped")
def test_a_file_that_shrinks_right_before_its_pages_are_read_is_refused(
    file: MappedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    advise = mapped._madvise()
    if advise is None:
        pytest.skip("only Linux has the call that reads pages ahead and says what went wrong")

    def shrink_first(*arguments: int) -> int:
        os.truncate(file.path, 0)
        return int(advise(*arguments))

    monkeypatch.setattr(mapped, "_madvise", lambda: shrink_first)
    with pytest.raises(MalformedFileError, match="it has 0 bytes"):
        file.populate([(0, file.size)])


def test_a_file_that_grew_is_mapped_as_it_was_opened(file: MappedFile) -> None:
    with file.path.open("ab") as grown:
        grown.write(bytes(3 * PAGE))
    assert len(file.map) == file.size
    assert bytes(file.map[-4:]) == b"tail"
    file.populate([(0, file.size)])
    file.discard([(0, file.size)])
