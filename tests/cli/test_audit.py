import json
from pathlib import Path

import pytest

from superweights.results.records import AuditRecord, MeasurementRecord
from superweights.results.store import read_records

from .conftest import Ask

QUICK = ("--windows", "4", "--length", "24")


@pytest.fixture(scope="module")
def clipped(tmp_path_factory: pytest.TempPathFactory, planted_checkpoint: Path) -> Path:
    """The planted model with its super weight cut off."""
    from superweights.cli import main

    to = tmp_path_factory.mktemp("clipped") / "q"
    words = ("--scheme", "int8-row", "--clip", "z=3", "--keep", "none", "--to", str(to))
    assert main(["quantize", str(planted_checkpoint), *words]) == 0
    return to


def test_a_lost_weight_is_status_1(ask: Ask, planted_checkpoint: Path, clipped: Path, tmp_path: Path) -> None:
    out = tmp_path / "audit.jsonl"
    answer = ask("audit", clipped, "--original", planted_checkpoint, "--out", out, *QUICK)
    assert (answer.status, answer.err) == (1, "")
    assert "2:49:7" in answer.out and "lost" in answer.out and "quantized, super weights put back" in answer.out
    records = read_records(out)[1]
    assert [each.verdict for each in records if isinstance(each, AuditRecord)] == ["lost"]
    assert any(each.condition == "quantized" for each in records if isinstance(each, MeasurementRecord))


def test_a_kept_weight_is_status_0(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    assert ask("quantize", planted_checkpoint, "--scheme", "int4-g16", "--to", tmp_path / "q").status == 0
    answer = ask("audit", tmp_path / "q", "--original", planted_checkpoint, "--no-measure", "--format", "json")
    assert answer.status == 0
    assert [(row["verdict"], row["format"]) for row in json.loads(answer.out)] == [("kept", "plain")]


def test_without_the_original_weights_are_named_or_found(ask: Ask, clipped: Path) -> None:
    answer = ask("audit", clipped, "--weights", "2:49:7")
    assert answer.status == 0
    assert "unknown" in answer.out and "Give --original" in answer.out


def test_a_coordinate_out_of_range(ask: Ask, planted_checkpoint: Path, clipped: Path) -> None:
    answer = ask("audit", clipped, "--original", planted_checkpoint, "--weights", "2:700:7")
    assert answer.status == 2 and "rows are 0 to" in answer.err
