"""The families that must work, and what the structural rules must read from a tiny model of each."""

from dataclasses import dataclass

HIDDEN = 64
LAYERS = 6


@dataclass(frozen=True)
class Shape:
    """One down projection, without its layer."""

    path: str
    cols: int = 112
    transposed: bool = False
    experts: int | None = None

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        matrix = (self.cols, HIDDEN) if self.transposed else (HIDDEN, self.cols)
        return matrix if self.experts is None else (self.experts, *matrix)


@dataclass(frozen=True)
class Expected:
    """Where one family keeps its decoder layers, and the down projections of layer 0 and of all others."""

    decoder: str
    layers: str
    first: tuple[Shape, ...]
    rest: tuple[Shape, ...]


def uniform(decoder: str, layers: str, *shapes: Shape) -> Expected:
    return Expected(decoder, f"{decoder}.{layers}", shapes, shapes)


_LIKE_LLAMA = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "phi3", "stablelm", "granite",
    "cohere",
)  # fmt: skip
_LLAMA = uniform("model", "layers", Shape("mlp.down_proj.weight"))
_ROUTED = Shape("mlp.experts.down_proj", 48, experts=4)

EXPECTED = {
    **dict.fromkeys(_LIKE_LLAMA, _LLAMA),
    "phi": uniform("model", "layers", Shape("mlp.fc2.weight")),
    "gpt2": uniform("transformer", "h", Shape("mlp.c_proj.weight", transposed=True)),
    "gpt_neox": uniform("gpt_neox", "layers", Shape("mlp.dense_4h_to_h.weight")),
    "gptj": uniform("transformer", "h", Shape("mlp.fc_out.weight")),
    "opt": uniform("model.decoder", "layers", Shape("fc2.weight")),
    "falcon": uniform("transformer", "h", Shape("mlp.dense_4h_to_h.weight")),
    "bloom": uniform("transformer", "h", Shape("mlp.dense_4h_to_h.weight", 4 * HIDDEN)),
    "mpt": uniform("transformer", "blocks", Shape("ffn.down_proj.weight", 4 * HIDDEN)),
    "mixtral": uniform("model", "layers", Shape("mlp.experts.down_proj", experts=4)),
    "olmoe": uniform("model", "layers", Shape("mlp.experts.down_proj", experts=4)),
    "qwen2_moe": uniform("model", "layers", _ROUTED, Shape("mlp.shared_expert.down_proj.weight", 80)),
    "qwen3_moe": uniform("model", "layers", _ROUTED),
    "deepseek_v3": Expected(
        "model",
        "model.layers",
        (Shape("mlp.down_proj.weight"),),
        (_ROUTED, Shape("mlp.shared_experts.down_proj.weight", 48)),
    ),
    "gpt_oss": uniform("model", "layers", Shape("mlp.experts.down_proj", transposed=True, experts=4)),
    "llama4_text": uniform(
        "model",
        "layers",
        Shape("feed_forward.experts.down_proj", transposed=True, experts=4),
        Shape("feed_forward.shared_expert.down_proj.weight"),
    ),
}
