"""Records of experiments by hand, and the rows that a chart holds."""

from collections.abc import Iterator
from typing import Any

import altair as alt

from superweights.results.records import MeasurementRecord, VerdictRecord


def measurement(name: str, value: float, condition: str = "original", **changes: Any) -> MeasurementRecord:
    fields = {
        "unit": "1",
        "standard_error": None,
        "interval": None,
        "count": 40,
        "dataset": "heldout",
        "dataset_digest": None,
        "intervention": {},
    }
    return MeasurementRecord(name=name, value=value, condition=condition, **(fields | changes))


def score(task: str, value: float, condition: str = "original", **changes: Any) -> MeasurementRecord:
    fields = {"subject": task, "unit": "proportion", "standard_error": 0.03}
    return measurement("acc", value, condition, **(fields | changes))


def verdict(*weights: str, **changes: Any) -> VerdictRecord:
    fields = {
        "kind": "single",
        "label": "critical alone",
        "ratio": 100.0,
        "interval": (80.0, 120.0),
        "without": None,
        "null_maximum": 1.1,
        "null_count": 20,
        "count": 40,
        "tokens": 20440,
        "dataset": "heldout",
        "dataset_digest": "sha256:0",
        "reason": "removal multiplies the perplexity by 100",
    }
    return VerdictRecord(weights=weights, **(fields | changes))


def rows_of(chart: alt.TopLevelMixin, *fields: str) -> list[dict[str, Any]]:
    """All different rows of the data of a chart that have these fields, in order."""
    found: list[dict[str, Any]] = []
    for rows in _values(chart.to_dict()):
        found += [row for row in rows if row not in found and row.keys() >= set(fields)]
    return found


def _values(part: object) -> Iterator[list[dict[str, Any]]]:
    for key, each in part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ():
        if key == "values" and each and isinstance(each[0], dict):
            yield each
        else:
            yield from _values(each)
