"""One thread, quiet transformers, and a small llama with one super weight planted, for all tests."""

import os
from pathlib import Path

import pytest

os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(autouse=True, scope="session")
def _one_quiet_thread() -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def planted_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama checkpoint of 6 layers in float32 with a super weight at 2:49:7, and its tokenizer. Do not change it."""
    from superweights.testing import plant_super_weight, tiny_model, tiny_tokenizer

    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    assert str(plant_super_weight(model, layer=2, tokenizer=tokenizer)) == "2:49:7"
    directory = tmp_path_factory.mktemp("planted") / "llama"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
