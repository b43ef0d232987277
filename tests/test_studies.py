"""The tables of studies that other packages take part in, and what of them runs without these packages."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "studies"))
import adapters
import peer_audits

ROOT = Path(__file__).parents[1]
AUDITS = sorted((ROOT / "docs" / "studies").glob("peer-audits-*.json"))


@pytest.mark.parametrize("file", AUDITS, ids=lambda each: each.stem)
def test_the_table_of_audits_is_what_the_study_makes_of_its_numbers(file: Path) -> None:
    rows = json.loads(file.read_text())["ways"]
    assert [each["way"] for each in rows] == list(peer_audits.WAYS)
    assert file.with_suffix(".md").read_text() == peer_audits.markdown(rows) + "\n"


def test_the_documented_audits_are_those_of_the_study() -> None:
    """Every number of the shortened table of docs/audit.md stands in the whole one."""
    whole = [set(line.split(" | ")) for line in (ROOT / "docs/studies/peer-audits-planted.md").read_text().splitlines()]
    text = (ROOT / "docs" / "audit.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in text[text.index("| way |") :].splitlines()[2:]]
    rows = lines[: next(number for number, cells in enumerate(lines) if len(cells) < 3)]
    assert len(rows) == len(peer_audits.WAYS)
    for cells in rows:
        assert any(set(cells) - {""} <= {each.strip("| ") for each in full} for full in whole), cells


def test_a_peer_that_failed_has_its_words_in_the_table() -> None:
    row = {"way": "a", "does": "b", "failed": "no such kernel"}
    lines = peer_audits.markdown([row]).splitlines()
    assert "failed: no such kernel" in lines[2]
    assert len({line.count("|") for line in lines}) == 1


def test_rows_of_another_model_are_not_mixed_in(tmp_path: Path) -> None:
    out = tmp_path / "table"
    known = {"model": "a", "ways": [{"way": "x"}]}
    Path(f"{out}.json").write_text(json.dumps(known))
    assert peer_audits.earlier(out, {"model": "a"}) == {"x": {"way": "x"}}
    with pytest.raises(SystemExit, match="another model"):
        peer_audits.earlier(out, {"model": "b"})


def test_kl_of_a_known_pair() -> None:
    before, after = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    assert adapters.kl(before, before) == 0
    assert adapters.kl(before, after) == pytest.approx(0.1438, abs=1e-4)
