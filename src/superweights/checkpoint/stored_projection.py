"""The stored tensors of a decoder layer and its down projection among them: from names, shapes and config, without torch.

The model itself is the better authority, but asking it needs transformers. A checkpoint's header is enough where its names
are known and its shapes leave one reading. On any doubt these functions refuse, and the caller may name the tensor.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from superweights.coordinates import Coordinate
from superweights.errors import CoordinateError, UnsupportedArchitectureError

Shapes = Mapping[str, tuple[int, ...]]

_NAMES = (
    "down_proj", "c_proj", "fc2", "dense_4h_to_h", "fc_out", "w2", "wo", "ff_out", "output_linear", "proj", "lin2", "linear2",
    "linear_fc2", "layer_2", "output.dense", "ffn.2", "feed_forward.value", "feed_forward.output", "w_out", "proj_down",
)  # fmt: skip
"""Last parts of the names under which causal language models store a down projection."""
CONV1D_TYPES = {"gpt2", "gpt-sw3", "openai-gpt", "imagegpt", "decision_transformer"}
"""Model types whose linear layers are transformers' Conv1D, stored [inputs, outputs]."""
TRANSPOSED_EXPERT_TYPES = {"gpt_oss", "llama4", "llama4_text", "aria", "aria_text"}
"""Model types whose packed experts are stored [experts, inputs, outputs]."""
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
_HIDDEN_SIZES = ("hidden_size", "n_embd", "d_model", "dim", "embed_dim")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_NUMBERED = re.compile(r"(?:(?P<list>.*?)\.)??(?P<number>\d+)\.(?P<path>.+)")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_OTHER_TOWER = re.compile(r"vision|visual|audio|image|speech", re.IGNORECASE)
_EXPERT = re.compile(r"experts\.(\d+)\.")
_WAY_OUT = "Only `show` can be told the tensor: --tensor NAME, with --transposed if it is stored [cols, rows]."


@dataclass(frozen=True, slots=True)
class StoredProjection:
    """A down projection as it lies in a checkpoint."""

    tensor: str
    """Name of the stored tensor."""
    rows: int
    """Output channels: the hidden size."""
    cols: int
    """Input channels: the intermediate size."""
    transposed: bool
    """Whether the tensor is stored [.., cols, rows]."""
    expert: int | None = None
    """The routed expert that the tensor belongs to; None for a dense, shared or packed one."""
    experts: int | None = None
    """How many routed experts the tensor packs on its first axis; None for a plain matrix."""

    def index(self, coordinate: Coordinate) -> tuple[int, ...]:
        """Where a scalar stands in the stored tensor.

        Raises:
            CoordinateError: its row or col is outside; the message gives the valid range.

        Example:
            >>> packed = StoredProjection("experts.down_proj", rows=8, cols=24, transposed=True, experts=4)
            >>> packed.index(Coordinate.parse("0/3:5:20"))
            (3, 20, 5)
        """
        if coordinate.row >= self.rows or coordinate.col >= self.cols:
            raise CoordinateError(
                f"{coordinate} is outside {self.tensor}: rows are 0 to {self.rows - 1}, cols are 0 to {self.cols - 1}."
            )
        place = (coordinate.col, coordinate.row) if self.transposed else (coordinate.row, coordinate.col)
        return place if self.experts is None or coordinate.expert is None else (coordinate.expert, *place)


def find_stored_projection(shapes: Shapes, config: Mapping[str, Any], *, coordinate: Coordinate) -> StoredProjection:
    """The down projection of a coordinate's layer and expert.

    Args:
        shapes: shape of every tensor in the checkpoint, by name.
        config: the model's config.json.
        coordinate: the scalar that is looked for.

    Raises:
        CoordinateError: no such layer or expert; the message gives the valid range.
        UnsupportedArchitectureError: names and shapes leave no reading, or more than one.
    """
    text = text_config(config)
    hidden_size = _first_number(text, _HIDDEN_SIZES)
    layers = _layers(shapes, _first_number(text, _LAYER_COUNTS))
    if coordinate.layer not in layers:
        raise CoordinateError(
            f"There is no decoder layer {coordinate.layer} in this checkpoint; the layers are 0 to {max(layers)}."
        )
    names = layers[coordinate.layer]
    model_type = model_type_of(config)
    read = [
        _read(names[path], path, shapes[names[path]], hidden_size=hidden_size, model_type=model_type) for path in names
    ]
    found = [each for each in read if each is not None]
    fitting = _for_expert(found, coordinate)
    if len(fitting) == 1:
        return fitting[0]
    seen = ", ".join(f"{name} {list(shapes[name])}" for name in names.values() if len(shapes[name]) > 1)
    raise UnsupportedArchitectureError(
        f"Looked for the down projection of layer {coordinate.layer} by names and shapes, with hidden size {hidden_size}, and "
        f"found {len(fitting)}. Matrices of the layer: {_shortened(seen) or 'none'}. {_WAY_OUT}"
    )


def named_stored_projection(
    tensor: str, shape: tuple[int, ...], *, transposed: bool, coordinate: Coordinate
) -> StoredProjection:
    """The down projection in a tensor that the caller names.

    Args:
        tensor: full name of the tensor.
        shape: its shape as stored.
        transposed: whether it is stored [.., cols, rows].
        coordinate: the scalar that is looked for; its layer is not looked at.

    Raises:
        CoordinateError: an expert is missing or out of range.
        UnsupportedArchitectureError: the tensor has neither two axes nor three.
    """
    if len(shape) not in (2, 3):
        raise UnsupportedArchitectureError(
            f"Tensor {tensor} has the shape {list(shape)}. A down projection has two axes, or three where experts are packed."
        )
    found = _stored(tensor, shape, transposed=transposed, expert=coordinate.expert if len(shape) == 2 else None)
    return _for_expert([found], coordinate)[0]


def layer_tensors(shapes: Shapes, config: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """The names of the tensors of each decoder layer; layers beyond the config's count are left out.

    Args:
        shapes: shape of every tensor in the checkpoint, by name.
        config: the model's config.json.

    Raises:
        UnsupportedArchitectureError: the names leave no reading, or more than one.

    Example:
        >>> shapes = {"embed.weight": (128, 8), "layers.0.up.weight": (24, 8), "layers.1.up.weight": (24, 8)}
        >>> layer_tensors(shapes, {"num_hidden_layers": 2})
        (('layers.0.up.weight',), ('layers.1.up.weight',))
    """
    return tuple(tuple(paths.values()) for paths in _decoder_layers(shapes, config).values())


def layer_places(shapes: Shapes, config: Mapping[str, Any]) -> dict[tuple[int, str], str]:
    """The tensors of decoder layers by layer and the part of the name after its number: the same whatever stands before it.

    Args, Raises: as for `layer_tensors`.

    Example:
        >>> layer_places({"h.0.mlp.up.weight": (24, 8), "h.1.mlp.up.weight": (24, 8)}, {"num_hidden_layers": 1})
        {(0, 'mlp.up.weight'): 'h.0.mlp.up.weight'}
    """
    layers = _decoder_layers(shapes, config)
    return {(layer, path): name for layer, paths in layers.items() for path, name in paths.items()}


def _decoder_layers(shapes: Shapes, config: Mapping[str, Any]) -> dict[int, dict[str, str]]:
    count = _first_number(text_config(config), _LAYER_COUNTS)
    layers = _layers(shapes, count)
    return {layer: layers[layer] for layer in sorted(layers) if count is None or layer < count}


def _layers(shapes: Shapes, layer_count: int | None) -> dict[int, dict[str, str]]:
    """The tensors of the decoder by layer: name by the part of the name after the layer's number."""
    lists: defaultdict[str, defaultdict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for name in shapes:
        match = _NUMBERED.fullmatch(name)
        if match and not _OTHER_TOWER.search(match["list"] or ""):
            lists[match["list"] or ""][int(match["number"])][match["path"]] = name
    if not lists:
        raise UnsupportedArchitectureError(
            f"No tensor has a layer number in its name. Names seen: {_shortened(', '.join(shapes))}. {_WAY_OUT}"
        )
    return lists[_decoder_list({name: len(layers) for name, layers in lists.items()}, layer_count)]


def _decoder_list(lengths: Mapping[str, int], layer_count: int | None) -> str:
    """The name of the decoder's list of layers, which has the config's length, or is the longest."""
    # A longer list than the config says has prediction layers at its end (DeepSeek-V3).
    fitting = [name for name, length in lengths.items() if length == layer_count]
    fitting = fitting or [name for name, length in lengths.items() if length == max(lengths.values())]
    if len(fitting) > 1:
        fitting = [name for name in fitting if "decoder" in name]
    if len(fitting) != 1:
        seen = ", ".join(f"{name} ({length})" for name, length in lengths.items())
        raise UnsupportedArchitectureError(
            f"Looked for one list of {layer_count or 'the'} decoder layers in the names of the tensors and found: "
            f"{_shortened(seen)}. {_WAY_OUT}"
        )
    return fitting[0]


def _read(
    name: str, path: str, shape: tuple[int, ...], *, hidden_size: int | None, model_type: str
) -> StoredProjection | None:
    """The down projection that a tensor holds, or None if it holds none."""
    stem = f".{path.removesuffix('.weight')}".lower()
    if not stem.endswith(tuple(f".{known}" for known in _NAMES)) or _ATTENTION.search(path):
        return None
    if len(shape) == 3 and "shared" in path:  # a coordinate has no place for one of several shared experts
        return None
    in_rows, in_cols = (size == hidden_size for size in shape[-2:]) if len(shape) in (2, 3) else (False, False)
    if len(shape) == 3:
        # The shape decides where it can; the model type only where hidden and intermediate size are equal.
        transposed = in_cols and (not in_rows or model_type in TRANSPOSED_EXPERT_TYPES)
    else:
        transposed = model_type in CONV1D_TYPES
    if not (in_cols if transposed else in_rows):
        return None
    expert = _EXPERT.search(path)
    return _stored(name, shape, transposed=transposed, expert=int(expert[1]) if expert else None)


def _stored(name: str, shape: tuple[int, ...], *, transposed: bool, expert: int | None) -> StoredProjection:
    rows, cols = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
    return StoredProjection(name, rows, cols, transposed, expert, shape[0] if len(shape) == 3 else None)


def _for_expert(found: Sequence[StoredProjection], coordinate: Coordinate) -> list[StoredProjection]:
    """Those of the layer's down projections that belong to the coordinate's expert, or to none if it names none."""
    dense = [each for each in found if each.expert is None and each.experts is None]
    experts = {each.expert for each in found if each.expert is not None}
    experts.update(number for each in found for number in range(each.experts or 0))
    if coordinate.expert is None:
        if experts and not dense:
            raise CoordinateError(
                f"{coordinate} names no expert, and layer {coordinate.layer} has only routed experts, 0 to {max(experts)}. "
                "Write LAYER/EXPERT:ROW:COL."
            )
        return dense
    if found and not experts:
        raise CoordinateError(
            f"{coordinate} names an expert, and layer {coordinate.layer} has no routed experts. Write LAYER:ROW:COL."
        )
    if found and coordinate.expert not in experts:
        raise CoordinateError(f"{coordinate} names expert {coordinate.expert}; the experts are 0 to {max(experts)}.")
    return [each for each in found if coordinate.expert == each.expert or each.experts is not None]


def model_type_of(config: Mapping[str, Any]) -> str:
    """The model type of the language model."""
    return str(text_config(config).get("model_type", config.get("model_type")))


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model: all of it, unless there are other towers."""
    return next((config[key] for key in _TEXT_CONFIGS if isinstance(config.get(key), Mapping)), config)


def _first_number(config: Mapping[str, Any], keys: Sequence[str]) -> int | None:
    return next((config[key] for key in keys if isinstance(config.get(key), int)), None)


def _shortened(text: str) -> str:
    return text if len(text) <= 600 else f"{text[:600]}..."
