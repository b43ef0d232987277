import os
from datetime import UTC, datetime
from importlib.metadata import version

import pytest
from pydantic import ValidationError

from superweights import __version__
from superweights.results.provenance import describe_run, software_versions
from superweights.results.records import Run


def describe(**changes: object) -> Run:
    fields: dict[str, object] = {
        "command": ["superweights", "find", "tiny"],
        "model": "tiny",
        "storage_dtype": "bfloat16",
        "compute_dtype": "bfloat16",
        "residency": "streamed",
        "device": "cpu",
    }
    return describe_run(**(fields | changes))  # type: ignore[arg-type]


def test_versions_and_time_are_filled_in():
    run = describe(settings={"prompts": ("a", "b")}, warnings=["cast"])
    assert run.versions["superweights"] == __version__
    assert run.versions["torch"] == version("torch")
    assert set(software_versions()) == {"superweights", "torch", "transformers", "python", "platform"}
    assert 0 <= (datetime.now(UTC) - run.started).total_seconds() < 3600
    assert run.settings == {"prompts": ["a", "b"]}
    assert run.warnings == ("cast",)


def test_a_run_survives_json():
    run = describe(seed=3, revision="abc", digest="sha256:1")
    assert Run.model_validate_json(run.model_dump_json()) == run
    assert run.model_dump(mode="json")["started"].endswith("Z")


def test_a_path_that_is_not_utf8_can_be_written():
    path = os.fsdecode(b"/models/caf\xe9")
    run = describe(command=["superweights", "find", path], model=path)
    assert run.model == "/models/caf\ufffd"
    assert run.command[2] == run.model
    run.model_dump_json()


def test_settings_that_json_cannot_hold_are_refused():
    with pytest.raises(ValidationError):
        describe(settings={"where": object()})
