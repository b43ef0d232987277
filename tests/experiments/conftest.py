"""A model that predicts its own text, and for which one planted weight is everything."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from superweights.coordinates import Coordinate
from superweights.measurements.windows import Windows
from superweights.testing import plant_super_weight, tiny_model, tiny_tokenizer


@dataclass(frozen=True)
class OwnText:
    """A checkpoint, the weight planted in it, and windows of text that it wrote itself."""

    directory: Path
    weight: Coordinate
    windows: Windows


@pytest.fixture(scope="session")
def own_text(tmp_path_factory: pytest.TempPathFactory) -> OwnText:
    """Logits made large, so that the model is sure of what it writes; a model without its weight writes something else."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    weight = plant_super_weight(model, layer=2, tokenizer=tokenizer)
    with torch.no_grad():
        model.lm_head.weight *= 40
    torch.manual_seed(0)
    start = torch.randint(10, 100, (24, 1))
    ids = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        top_k=0,
        min_new_tokens=20,
        max_new_tokens=20,
        pad_token_id=0,
    )
    directory = tmp_path_factory.mktemp("own-text") / "llama"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return OwnText(directory, weight, Windows(ids, "own text", "sha256:0", ids.shape[1], False))
