import mmap
import sys
from pathlib import Path

import pytest

from superweights.checkpoint import mapped
from superweights.checkpoint.mapped import MappedFile

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
