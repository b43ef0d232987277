"""A trained model with one planted super weight, for studies that need a weight which carries something."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from superweights.coordinates import Coordinate
from superweights.testing import plant_super_weight


def plant(source: Path, to: Path, *, layer: int = 2) -> Coordinate:
    """Writes the model of `source` with a planted super weight, in the dtype that `source` has.

    In books1.5M this is 2:98:290 with the value 17.125.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    coordinate = plant_super_weight(model, layer=layer, tokenizer=tokenizer)
    model.to(AutoModelForCausalLM.from_pretrained(source).dtype).save_pretrained(to)
    tokenizer.save_pretrained(to)
    return coordinate
