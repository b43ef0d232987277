"""What a reference model is made of: one TOML file per model, read into a frozen dataclass."""

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """Architecture, data and optimiser of one model: everything that decides its weights."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    vocabulary: int
    sequence: int
    """Tokens of one training sequence, the `<s>` at its start included; also the longest input of the model."""
    batch: int
    """Sequences of one step."""
    steps: int
    learning_rate: float
    weight_decay: float
    """AdamW's decoupled decay, of matrices only."""
    warmup: int = 300
    beta2: float = 0.99
    seed: int = 0


def read_recipe(name: str, **changes: object) -> Recipe:
    """The recipe `recipes/NAME.toml`, with fields replaced."""
    values = tomllib.loads((RECIPES / f"{name}.toml").read_text())
    return dataclasses.replace(Recipe(**values), **changes)
