from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from lively_models import lively_model

from superweights.testing import tiny_tokenizer

SaveFamily = Callable[..., Path]


@pytest.fixture(scope="session")
def save_family(tmp_path_factory: pytest.TempPathFactory) -> SaveFamily:
    """Saves a lively tiny model of a family, once per choice; gives the directory, which must not be changed."""

    @cache
    def save(family: str, *, dtype: torch.dtype = torch.bfloat16, shards: bool = False) -> Path:
        model = lively_model(family, dtype=dtype)
        directory = tmp_path_factory.mktemp("families") / family
        model.save_pretrained(directory, max_shard_size=100_000 if shards else 10**9)
        tiny_tokenizer().save_pretrained(directory)
        return directory

    return save
