"""Where a model keeps its decoder layers and down projections, read from its structure and never from its name.

The rules, each checked on every causal language model class of transformers (docs/architectures.md):

* the decoder layers are the `ModuleList` of the decoder with as many entries as the config has hidden layers;
* a feed-forward block is a part of a layer that is not told about other tokens: its forward takes no mask, no positions and
  no cache;
* its down projection is the weight with hidden-size outputs and other than hidden-size inputs that another feed-forward
  weight of the layer fills (hidden size to `cols`, or to twice `cols` where gate and up are fused);
* rows and cols follow from the class of the module: `nn.Linear` stores [rows, cols], `Conv1D` stores [cols, rows], packed
  experts say so themselves.
"""

import inspect
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from superweights.coordinates import Coordinate
from superweights.errors import CoordinateError, UnsupportedArchitectureError
from superweights.model import experts
from superweights.model.quirks import NOT_DOWN_PROJECTIONS

_SEES_OTHER_TOKENS = {
    "attention_mask", "position_embeddings", "position_ids", "past_key_value", "past_key_values", "layer_past",
    "cache_params", "cache_position", "alibi", "rotary_pos_emb",
}  # fmt: skip
_MIXER_CLASS = re.compile(r"Attention|Attn|Mamba|SSM|ShortConv|DeltaNet|LSTM")


@dataclass(frozen=True, slots=True)
class DownProjection:
    """One down projection of one decoder layer; packed experts count as one with `experts` matrices."""

    layer: int
    """Decoder layer, from 0."""
    module: str
    """Name of the module that holds the weight, as in `model.get_submodule`."""
    parameter: str
    """Name of the parameter inside the module."""
    rows: int
    """Output channels: the hidden size."""
    cols: int
    """Input channels: the intermediate size."""
    transposed: bool
    """Whether the parameter is stored [cols, rows]."""
    experts: int | None = None
    """How many routed experts the parameter packs; None for a plain matrix."""

    @property
    def name(self) -> str:
        """Full name of the parameter."""
        return f"{self.module}.{self.parameter}"

    def index(self, coordinate: Coordinate) -> tuple[int, ...]:
        """Where the scalar stands in the parameter as stored."""
        place = (coordinate.col, coordinate.row) if self.transposed else (coordinate.row, coordinate.col)
        return place if coordinate.expert is None else (coordinate.expert, *place)


@dataclass(frozen=True)
class Architecture:
    """The parts of a model that superweights needs to know."""

    decoder: str
    """Name of the module whose forward pass runs all decoder layers; "" for the model itself."""
    layers: str
    """Name of the `ModuleList` of decoder layers."""
    layer_count: int
    """How many decoder layers there are."""
    hidden_size: int
    """Channels of the residual stream."""
    down_projections: tuple[DownProjection, ...]
    """All down projections, by layer. A layer without a feed-forward block has none."""

    def layer_name(self, layer: int) -> str:
        """Name of one decoder layer."""
        return f"{self.layers}.{layer}"

    def in_layer(self, layer: int) -> tuple[DownProjection, ...]:
        """The down projections of one layer."""
        return tuple(each for each in self.down_projections if each.layer == layer)

    def locate(self, coordinate: Coordinate) -> DownProjection:
        """The down projection that holds a coordinate.

        Raises:
            CoordinateError: no such layer, expert, row or col; the message gives the valid range.
        """
        if not 0 <= coordinate.layer < self.layer_count:
            raise CoordinateError(
                f"{coordinate} names layer {coordinate.layer}; the layers are 0 to {self.layer_count - 1}."
            )
        here = self.in_layer(coordinate.layer)
        fitting = [each for each in here if (each.experts is None) == (coordinate.expert is None)]
        if not fitting:
            seen = "routed experts only: write LAYER/EXPERT:ROW:COL" if here else "no down projection"
            if here and coordinate.expert is not None:
                seen = "no routed experts: write LAYER:ROW:COL"
            raise CoordinateError(f"{coordinate} does not fit layer {coordinate.layer}, which has {seen}.")
        projection = fitting[0]
        if (
            coordinate.expert is not None
            and projection.experts is not None
            and not 0 <= coordinate.expert < projection.experts
        ):
            raise CoordinateError(
                f"{coordinate} names expert {coordinate.expert}; the experts are 0 to {projection.experts - 1}."
            )
        if not (0 <= coordinate.row < projection.rows and 0 <= coordinate.col < projection.cols):
            raise CoordinateError(
                f"{coordinate} is outside {projection.name}: rows are 0 to {projection.rows - 1}, "
                f"cols are 0 to {projection.cols - 1}."
            )
        return projection


def read_architecture(model: Any) -> Architecture:
    """Reads the structure of a transformers causal language model; its weights may be on `meta`.

    Raises:
        UnsupportedArchitectureError: the rules do not fit; says what was seen.
    """
    config = model.config.get_text_config(decoder=True)
    hidden_size, layer_count = getattr(config, "hidden_size", None), getattr(config, "num_hidden_layers", None)
    if hidden_size is None or layer_count is None:
        raise UnsupportedArchitectureError(
            f"{type(config).__name__} has no single hidden_size and num_hidden_layers: {type(model).__name__} is not one stack "
            "of decoder layers."
        )
    if layer_count < 1:
        raise UnsupportedArchitectureError(
            f"{type(config).__name__} gives {type(model).__name__} num_hidden_layers {layer_count}: there is no decoder layer "
            "to look at. Is config.json of another model?"
        )
    layers, decoder = _decoder_layers(model, layer_count)
    projections = [
        projection
        for layer, module in enumerate(model.get_submodule(layers))
        for projection in _down_projections(module, f"{layers}.{layer}", layer, hidden_size)
    ]
    for kind, number in Counter((each.layer, each.experts is None) for each in projections).items():
        if number > 1:  # a coordinate could not say which is meant
            names = [each.name for each in projections if (each.layer, each.experts is None) == kind]
            raise UnsupportedArchitectureError(
                f"{type(model).__name__} has {number} down projections in one layer: {names}."
            )
    if not projections:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} has {layer_count} decoder layers ({layers}) and none of them holds a down projection: no "
            f"feed-forward weight with {hidden_size} outputs. Layer 0 is made of: {_seen(model.get_submodule(layers)[0])}."
        )
    return Architecture(decoder, layers, layer_count, hidden_size, tuple(projections))


def _decoder_layers(model: Any, layer_count: int) -> tuple[str, str]:
    """Names of the list of decoder layers and of the smallest module that runs them from token ids."""
    lists = [(name, each) for name, each in model.named_modules() if isinstance(each, nn.ModuleList)]
    fitting = [name for name, each in lists if len(each) == layer_count]
    decoder = _name_of(model, model.get_decoder())
    inside = [name for name in fitting if name.startswith(f"{decoder}." if decoder else "")] or fitting
    depth = min((name.count(".") for name in inside), default=0)  # towers for images and sound sit deeper
    shallowest = [name for name in inside if name.count(".") == depth]
    if len(shallowest) != 1:
        seen = ", ".join(f"{name} ({len(each)})" for name, each in lists) or "none"
        raise UnsupportedArchitectureError(
            f"{type(model).__name__}: looked for one list of {layer_count} decoder layers and found {len(shallowest)}. "
            f"Module lists seen: {seen}."
        )
    layers = shallowest[0]
    runner = layers.rpartition(".")[0]
    while runner and "input_ids" not in inspect.signature(type(model.get_submodule(runner)).forward).parameters:
        runner = runner.rpartition(".")[0]
    return layers, runner


def _name_of(model: Any, module: Any) -> str:
    return next((name for name, each in model.named_modules() if each is module), "")


def _down_projections(
    layer_module: nn.Module, layer_name: str, layer: int, hidden_size: int
) -> Iterator[DownProjection]:
    """The down projections of one decoder layer, or an error: never a partial list."""
    for path, module in _feed_forward_modules(layer_module):
        name = f"{layer_name}.{path}"
        if experts.is_routed(module) or experts.is_batched(module):
            yield _packed(module, name, layer, hidden_size)
        elif _is_filled_down_projection(layer_module, path, module, hidden_size):
            if re.search(r"(^|\.)\d+\.", path):
                raise UnsupportedArchitectureError(
                    f"{name} ({type(module).__name__}) is one of several feed-forward modules in a list; which tokens reach it "
                    "cannot be read from the structure. Experts must be packed in one parameter."
                )
            rows, cols = _rows_and_cols(module)
            yield DownProjection(layer, name, "weight", rows, cols, transposed=isinstance(module, Conv1D))
        elif _is_unknown_packed(module, hidden_size):
            shapes = {each: tuple(parameter.shape) for each, parameter in module.named_parameters(recurse=False)}
            raise UnsupportedArchitectureError(
                f"{name} ({type(module).__name__}) packs matrices in a way the rules do not know: {shapes}."
            )


def _feed_forward_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules below that are not part of a sequence mixer, with their paths."""
    for name, child in module.named_children():
        if not _mixes_tokens(child):
            yield f"{path}{name}", child
            yield from _feed_forward_modules(child, f"{path}{name}.")


def _mixes_tokens(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear | Conv1D | nn.ModuleList | nn.ModuleDict):
        return False
    parameters = inspect.signature(type(module).forward).parameters
    return bool(_SEES_OTHER_TOKENS & set(parameters)) or bool(_MIXER_CLASS.search(type(module).__name__))


def _is_filled_down_projection(layer_module: nn.Module, path: str, module: nn.Module, hidden_size: int) -> bool:
    if not isinstance(module, nn.Linear | Conv1D) or any(re.search(quirk, path) for quirk in NOT_DOWN_PROJECTIONS):
        return False
    rows, cols = _rows_and_cols(module)
    neighbours = [each for _, each in _feed_forward_modules(layer_module) if isinstance(each, nn.Linear | Conv1D)]
    return (
        rows == hidden_size
        and cols != hidden_size
        and any(_rows_and_cols(each) in {(cols, hidden_size), (2 * cols, hidden_size)} for each in neighbours)
    )


def _rows_and_cols(module: nn.Linear | Conv1D) -> tuple[int, int]:
    first, second = module.weight.shape
    return (second, first) if isinstance(module, Conv1D) else (first, second)


def _packed(module: Any, name: str, layer: int, hidden_size: int) -> DownProjection:
    count, first, second = module.down_proj.shape
    transposed = bool(getattr(module, "is_transposed", True))  # batched experts (Llama 4) store [cols, rows]
    rows, cols = (second, first) if transposed else (first, second)
    if rows != hidden_size:
        raise UnsupportedArchitectureError(
            f"{name} packs {count} experts as {tuple(module.down_proj.shape)} ({transposed=}), which gives {rows} output "
            f"channels; the hidden size is {hidden_size}."
        )
    return DownProjection(layer, name, "down_proj", rows, cols, transposed, experts=count)


def _is_unknown_packed(module: nn.Module, hidden_size: int) -> bool:
    return any(parameter.ndim == 3 and hidden_size in parameter.shape[1:] and parameter.numel() > hidden_size * 8
               for parameter in module.parameters(recurse=False))  # fmt: skip


def _seen(layer: nn.Module) -> str:
    return ", ".join(
        f"{name} {type(module).__name__}{tuple(module.weight.shape)}"
        for name, module in layer.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
    )
