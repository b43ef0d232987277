import json
from pathlib import Path

import pytest

from superweights.results.records import MeasurementRecord, NoteRecord
from superweights.results.store import read_records

from .conftest import Ask

QUICK = ("--weights", "2:49:7", "--windows", "6", "--length", "24")


def test_factors_a_best_one_and_whether_the_gain_is_real(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "run.jsonl", tmp_path / "plot.svg"
    answer = ask("scale", planted_checkpoint, *QUICK, "--factors", "0,0.5,1,2", "--out", out, "--plot", plot)
    assert (answer.status, answer.err) == (0, "")
    records = [each for each in read_records(out)[1] if isinstance(each, MeasurementRecord)]
    assert {"perplexity", "perplexity_ratio", "best_factor", "best_factor_gain"} <= {each.name for each in records}
    factors = {each.intervention.get("factor") for each in records if each.name == "perplexity_ratio"}
    assert factors - {None} >= {0.0, 0.5, 2.0}
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize("factors", ["", "x", "1,nan"])
def test_bad_factors(ask: Ask, planted_checkpoint: Path, factors: str) -> None:
    assert ask("scale", planted_checkpoint, *QUICK, f"--factors={factors}").status == 2


def test_the_table_has_a_row_for_each_factor_and_the_verdict(ask: Ask, planted_checkpoint: Path) -> None:
    answer = ask("scale", planted_checkpoint, *QUICK, "--factors=-1,2")
    lines = answer.out.splitlines()
    assert lines[0] == f"Super weights of {planted_checkpoint} scaled, on 6 windows of heldout."
    assert lines[2].split()[:4] == ["factor", "perplexity", "/", "original"]
    assert [line.split()[0] for line in lines[3:6]] == ["-1", "1", "2"]
    assert lines[7].startswith("Lowest mean loss at factor ")
    assert "gain" in lines[9]
    assert lines[11].startswith("6 windows are few")


def test_the_formats_hold_the_measurements(ask: Ask, planted_checkpoint: Path) -> None:
    words = ("scale", planted_checkpoint, *QUICK, "--factors", "0", "--format")
    lines = [json.loads(line) for line in ask(*words, "jsonl").out.splitlines()]
    assert lines == json.loads(ask(*words, "json").out)
    assert len([MeasurementRecord.model_validate_json(json.dumps(each)) for each in lines]) == 7


def test_nothing_found_scales_nothing_and_says_so(ask: Ask, random_checkpoint: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "run.jsonl", tmp_path / "plot.svg"
    answer = ask("scale", random_checkpoint, *QUICK[2:], "--out", out, "--plot", plot)
    said = "No super weight candidate was found, so nothing was scaled."
    assert (answer.status, answer.out, answer.err) == (0, f"\n{said}\n", "")
    assert read_records(out)[1] == [NoteRecord(level="warning", text=said)]
    assert not plot.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--weights", "31:3968:7003"), "the layers are 0 to 5"),
        (("--windows", "1"), "takes 2 windows or more"),
        (("--factors", "1"), "at least one other than 1"),
        (("--factors", "a,b"), "Write them with commas, as 0,0.5,1,2"),
        (("--plot", "plot.bmp"), "There is no chart format '.bmp'"),
    ],
)
def test_a_wrong_request_is_usage(words: tuple[str, ...], says: str, ask: Ask, planted_checkpoint: Path) -> None:
    answer = ask("scale", planted_checkpoint, "--length", "24", *words)
    assert (answer.status, answer.out) == (2, "")
    assert says in answer.err
