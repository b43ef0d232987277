"""docs/architectures.md is what studies/architecture_table.py gives for the transformers it names."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import transformers

from superweights.testing import causal_lm_families

ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "docs" / "architectures.md").read_text()
ROWS = {
    line.split(" | ")[0].removeprefix("| "): line for line in DOCUMENT.splitlines() if re.match(r"\| [a-z0-9]", line)
}


def without_error(text: str) -> str:
    """Leaves out the float32 error, whose last bits depend on the processor."""
    return re.sub(r"\| \de[+-]\d\d \|", "|", text)


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    described = re.search(r"transformers (\d\S+),", DOCUMENT)
    assert described is not None
    if described[1] != transformers.__version__:
        pytest.skip(f"the table describes transformers {described[1]}, installed is {transformers.__version__}")
    return runpy.run_path(str(ROOT / "studies" / "architecture_table.py"))


def test_it_lists_every_family(study: dict[str, Any]) -> None:
    assert sorted(set(ROWS) - {"family"}) == causal_lm_families()


def test_its_totals_are_those_of_its_rows() -> None:
    works = [line for line in ROWS.values() if "| works |" in line]
    refused = [line for line in ROWS.values() if "Error: " in line]
    assert f"{len(works) + len(refused)} families: {len(works)} work, {len(refused)} are refused" in DOCUMENT
    found = sum(line.endswith("| found |") for line in works)
    cannot = sum(line.endswith("| cannot |") for line in works)
    assert found + cannot == len(works)  # none is missed
    assert f"{found} of {found}; {cannot} cannot be planted" in DOCUMENT
    assert all("| yes |" in line for line in works)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe", "bert", "mamba", "musicgen"])
def test_a_row_comes_out_the_same_again(study: dict[str, Any], family: str) -> None:
    assert without_error(ROWS[family]) in without_error(study["document"]([study["measure"](family)]))
