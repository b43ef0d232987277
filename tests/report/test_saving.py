import json
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from superweights.errors import RecordError, UnknownNameError
from superweights.report import saving
from superweights.report.peaks import peaks_chart
from superweights.report.persistence import persistence_chart
from superweights.report.residual import residual_chart
from superweights.report.saving import checked_suffix, save_chart

from .conftest import candidate, persistence

STARTS = {".png": b"\x89PNG\r\n\x1a\n", ".pdf": b"%PDF-", ".svg": b"<svg ", ".json": b"{", ".html": b"<!DOCTYPE html>"}


@pytest.fixture
def chart(peaks):
    return peaks_chart([*peaks, candidate()], title="Peaks of мир", model="tiny")


@pytest.mark.parametrize("suffix", STARTS)
def test_the_suffix_chooses_the_format(tmp_path, chart, suffix):
    save_chart(chart, tmp_path / f"peaks{suffix.upper()}")
    assert (tmp_path / f"peaks{suffix.upper()}").read_bytes().startswith(STARTS[suffix])
    assert len(list(tmp_path.iterdir())) == 1


def test_an_svg_holds_title_and_coordinate(tmp_path, chart):
    save_chart(chart, tmp_path / "peaks.svg")
    texts = {element.text for element in ElementTree.parse(tmp_path / "peaks.svg").iter() if element.text}
    assert {"Peaks of мир", "1:3:7", "max |input|", "max |output|", "decoder layer"} <= texts


@pytest.mark.parametrize("draw", [residual_chart, persistence_chart])
def test_the_other_charts_are_drawn(tmp_path, residuals, persistences, draw):
    save_chart(draw([*residuals, *persistences], title="A title"), tmp_path / "chart.svg")
    assert "A title" in (tmp_path / "chart.svg").read_text()


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str | None] = []
        self.scripts: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag, attrs):
        self._inside = tag
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data


def test_a_page_holds_all_it_needs_and_no_text_can_leave_its_script(tmp_path):
    texts = ["</script><script>alert(1)</script>", "<!-- <script>"]
    chart = persistence_chart(
        [persistence(number, 0, 1.0, text) for number, text in enumerate(texts)], title="</script>"
    )
    save_chart(chart, tmp_path / "page.html")
    page = Page()
    page.feed((tmp_path / "page.html").read_text())
    assert page.links == []
    library, drawing = page.scripts
    assert "vegaEmbed=" in library
    start = drawing.index("{")
    specification, _ = json.JSONDecoder().raw_decode(drawing[start:])
    assert specification == chart.to_dict()


def test_another_suffix_is_refused_before_anything_is_drawn(tmp_path):
    with pytest.raises(UnknownNameError, match=r"There is no chart format '\.gif'.*'\.svg'"):
        checked_suffix("peaks.gif")
    with pytest.raises(UnknownNameError):
        save_chart(None, tmp_path / "peaks")


def test_a_failed_drawing_leaves_the_old_file_alone(tmp_path, chart, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(saving._RENDERERS, ".svg", interrupted)
    (tmp_path / "peaks.svg").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        save_chart(chart, tmp_path / "peaks.svg")
    assert (tmp_path / "peaks.svg").read_text() == "old"


def test_a_folder_that_is_not_there_is_named(tmp_path, chart):
    with pytest.raises(RecordError, match="Cannot write"):
        save_chart(chart, tmp_path / "none" / "peaks.json")
