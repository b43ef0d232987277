import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from superweights.cli import main

sys.path.append(str(Path(__file__).parents[1] / "checkpoint"))  # hub_server


@dataclass(frozen=True)
class Answer:
    status: int
    out: str
    err: str


Ask = Callable[..., Answer]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """Runs one command line in this process."""

    def run(*words: object) -> Answer:
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Answer(status, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama checkpoint of 6 layers with random weights and a tokenizer, without any super weight. Do not change it."""
    from superweights.testing import save_tiny_checkpoint

    return save_tiny_checkpoint("llama", tmp_path_factory.mktemp("random") / "llama")
