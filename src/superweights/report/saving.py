"""Charts as files. A page holds all it needs: it opens without a network."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import altair as alt
import vl_convert

from superweights.errors import UnknownNameError
from superweights.results.store import replace_file

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>superweights</title>
<style>body {{ margin: 0 }}</style>
<script>{library}</script>
</head>
<body>
<div id="chart"></div>
<script>
vegaEmbed("#chart", {chart}, {options}).catch(console.error);
</script>
</body>
</html>
"""
_OPTIONS = {"renderer": "svg", "actions": {"export": True, "source": False, "compiled": False, "editor": False}}
"""Sharp at any zoom; a menu that saves the picture, and nothing that leads to a web site."""


def save_chart(chart: alt.TopLevelMixin, path: str | Path) -> None:
    """Writes a chart in the format of the path's suffix: .html, .svg, .png (two pixels per unit), .pdf or .json.

    Raises:
        UnknownNameError: another suffix.
        RecordError: the file cannot be written.
    """
    replace_file(path, _RENDERERS[checked_suffix(path)](chart))


def checked_suffix(path: str | Path) -> str:
    """The suffix of a chart's path, in lower case; lets a command refuse a path before the work starts.

    Raises:
        UnknownNameError: no chart is written with that suffix.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _RENDERERS:
        raise UnknownNameError.among("chart format", suffix, _RENDERERS)
    return suffix


def _html(chart: alt.TopLevelMixin) -> bytes:
    page = _PAGE.format(
        library=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=_vega_lite_version()),
        chart=_script_json(chart.to_dict()),
        options=_script_json(_OPTIONS),
    )
    return page.encode()


def _script_json(data: object) -> str:
    """JSON that may stand in a script: a prompt or a token may well hold the text that would close the script."""
    return json.dumps(data).replace("<", "\\u003c")


def _vega_lite_version() -> str:
    """Major and minor version of the grammar in which altair writes charts."""
    major, minor, *_ = alt.SCHEMA_VERSION.removeprefix("v").split(".")
    return f"{major}.{minor}"


def _svg(chart: alt.TopLevelMixin) -> bytes:
    text = io.StringIO()
    chart.save(text, format="svg")
    return text.getvalue().encode()


def _png(chart: alt.TopLevelMixin) -> bytes:
    picture = io.BytesIO()
    chart.save(picture, format="png", scale_factor=2)
    return picture.getvalue()


def _pdf(chart: alt.TopLevelMixin) -> bytes:
    document = io.BytesIO()
    chart.save(document, format="pdf")
    return document.getvalue()


def _json(chart: alt.TopLevelMixin) -> bytes:
    text: str = chart.to_json()
    return (text + "\n").encode()


_RENDERERS: dict[str, Callable[[alt.TopLevelMixin], bytes]] = {
    ".html": _html,
    ".svg": _svg,
    ".png": _png,
    ".pdf": _pdf,
    ".json": _json,
}
