"""Packed checkpoints in transformers on the kernels of `packed_linear`: importing this file registers `superweights`.

A folder whose `quantization_config` has the quant_method "superweights" is then loaded by `from_pretrained`, saved by
`save_pretrained` and turned into plain layers by `model.dequantize()`. Tensors, names and keys are those of compressed-tensors,
which is also what `superweights quantize` writes: without this import, transformers only warns of a quant_method that it does
not know, and fills the linear layers with noise. `load_packed` runs such a folder on the same kernels without a change to it.

Nothing is guessed: what the config says is compared with the headers of the files before a weight is read.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from superweights.checkpoint.header import TensorEntry, read_header
from superweights.errors import MalformedFileError, MissingTensorError, QuantizedCheckpointError, UsageError
from superweights.integrations.packed_linear import PackedLinear, SuperWeight
from superweights.quantization.packing import packed_cols

METHOD = "superweights"
WRITTEN_METHOD = "compressed-tensors"
"""What `superweights quantize` writes, and what every other reader knows."""

_KNOWN = {
    *("quant_method", "config_groups", "format", "quantization_status", "ignore", "kv_cache_scheme", "version"),
    *("global_compression_ratio", "super_weights", "int8_inputs", "saved_method"),
}
"""Keys of a config that this file understands; any other may mean another layout, where it says something."""
_KNOWN_OF_WEIGHTS = {
    *(
        "num_bits",
        "type",
        "symmetric",
        "strategy",
        "group_size",
        "dynamic",
        "observer",
        "observer_kwargs",
        "scale_dtype",
    ),
}
_TENSORS = ("weight_packed", "weight_scale", "weight_shape")
_FOREIGN = ("weight_zero_point", "weight_g_idx", "weight_global_scale")
_LOADING_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
    "revision",
    "trust_remote_code",
    "subfolder",
)


@dataclass(frozen=True, slots=True)
class PackedGroup:
    """Modules that are packed in one way."""

    targets: tuple[str, ...]
    """Names of modules, names of their classes, or regular expressions after `re:`."""
    bits: int
    group: int | None
    """Weights of a row that share a scale; None for all."""


@register_quantization_config(METHOD)
class SuperweightsConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a packed checkpoint, as it is stored.

    Args:
        stored: its keys; `quant_method` is ours. Of our own are `super_weights`, with tensor, row, col and value of each;
            `int8_inputs`, which names modules whose activations are rounded to 8 bits and for each the channel of its super
            activation or null; and `saved_method`, the quant_method under which it is saved.

    Raises:
        QuantizedCheckpointError: it says something that this version does not run: what, and what does.
    """

    def __init__(self, **stored: Any) -> None:
        self.quant_method = METHOD
        self.groups = _groups(stored)
        self.ignore = tuple(stored.get("ignore") or ())
        self.super_weights = _super_weights(stored.get("super_weights") or ())
        self.int8_inputs: dict[str, int | None] = dict(stored.get("int8_inputs") or {})
        self._stored = {**stored, "quant_method": stored.get("saved_method", METHOD)}
        self._stored.pop("saved_method", None)

    def to_dict(self) -> dict[str, Any]:
        """What is saved."""
        return dict(self._stored)

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved: nothing of it is a default."""
        return self.to_dict()

    def group_of(self, name: str, module: nn.Module) -> PackedGroup | None:
        """How a module is packed; None where it is not. Names go before expressions, and those before classes."""
        if any(_matches(each, name, module) for each in self.ignore):
            return None
        found = [
            (_matches(target, name, module), -number, group)
            for number, group in enumerate(self.groups)
            for target in group.targets
        ]
        rank, _, best = max(found, key=lambda each: each[:2])
        return best if rank else None


@register_quantizer(METHOD)
class SuperweightsQuantizer(HfQuantizer):  # type: ignore[misc]
    """What `from_pretrained` does with such a checkpoint."""

    requires_calibration = True
    quantization_config: SuperweightsConfig

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuses layers on disk, which have no kernel."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise UsageError("Loading a packed checkpoint: the device map puts layers on disk, where no kernel runs.")

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        if checkpoint_files is None:
            raise UsageError("Loading a packed checkpoint: give the folder; tensors in memory cannot be checked.")
        entries, config = _entries(checkpoint_files), self.quantization_config
        linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        stored = {name: _stored_name(name, entries, model.base_model_prefix) for name in linear}
        groups = {name: config.group_of(stored[name], module) for name, module in linear.items()}
        packed = {name: stored[name] for name, group in groups.items() if group is not None}
        _check_tensors(packed, entries)
        _check_inputs(packed, config)
        _check_super_weights(config.super_weights, entries)
        self._super_weights = {name: config.super_weights.get(f"{each}.weight", ()) for name, each in packed.items()}
        for name, group in groups.items():
            if group is not None:
                tensors = {each: entries[f"{stored[name]}.{each}"] for each in _TENSORS}
                self._replace(model, name, linear[name], group, tensors)

    def _replace(
        self,
        model: PreTrainedModel,
        name: str,
        module: nn.Linear,
        group: PackedGroup,
        entries: Mapping[str, TensorEntry],
    ) -> None:
        rows, cols = module.out_features, module.in_features
        groups = 1 if group.group is None else cols // group.group
        wanted = {
            "weight_packed": (rows, packed_cols(cols, group.bits)),
            "weight_scale": (rows, groups),
            "weight_shape": (2,),
        }
        for each, shape in wanted.items():
            if entries[each].shape != shape:
                raise MalformedFileError(
                    f"{entries[each].file}: {name}.{each} has the shape {list(entries[each].shape)}; {group.bits} bits of "
                    f"{rows} x {cols} weights with {groups} scales per row need {list(shape)}."
                )
        bias = module.bias
        layer = PackedLinear(
            cols,
            rows,
            group.bits,
            groups=groups,
            bias=bias is not None,
            int8_inputs=name in self.quantization_config.int8_inputs,
            channel=self.quantization_config.int8_inputs.get(name),
            dtype=None if bias is None else bias.dtype,
            scale_dtype=getattr(torch, str(entries["weight_scale"].storage.torch)),
            device="meta",
        )
        model.set_submodule(name, layer)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                module.prepare()
                for each in self._super_weights[name]:
                    module.restore(*each)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # transformers passes the dtype of the config, which is a text once the model was saved.
        found = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear)]
        for name, module in layers:
            model.set_submodule(name, module.to_linear(found))
        return model

    def is_serializable(self) -> bool:
        """Always: the state of a packed layer is what is stored."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Never: `dequantize()` first."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The kernels are ops that torch.compile knows."""
        return True


def load_packed(
    model: str | Path, *, int8_inputs: Mapping[str, int | None] | None = None, **options: Any
) -> PreTrainedModel:
    """Loads a packed checkpoint onto the packed kernels: what `superweights quantize` writes, as it is.

    Args:
        model: a folder or a Hub name, with quant_method compressed-tensors (format pack-quantized, symmetric) or superweights.
        int8_inputs: linear layers whose activations are rounded to 8 bits by token as well, and for each the channel of its
            super activation, or None; `superweights.measurements.linear_inputs` finds them. Weights need one scale per row.
        options: for `AutoModelForCausalLM.from_pretrained`, such as dtype. bfloat16 is fastest.

    Raises:
        UsageError: the weights are not packed, or `int8_inputs` names no packed layer.
        QuantizedCheckpointError: they are packed in a way that this version does not run.
        CheckpointError: config and files contradict each other.
    """
    config = AutoConfig.from_pretrained(model, **{key: options[key] for key in _LOADING_OPTIONS if key in options})
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        raise UsageError(f"{model} has plain weights. `superweights quantize {model} --to DIR` packs them.")
    method = stored.get("quant_method")
    if method not in (METHOD, WRITTEN_METHOD):
        raise QuantizedCheckpointError(f"{model} is packed by {method}: load it by `from_pretrained`.")
    config.quantization_config = {"saved_method": method, **stored, "quant_method": METHOD}
    if int8_inputs is not None:
        config.quantization_config["int8_inputs"] = dict(int8_inputs)
    return AutoModelForCausalLM.from_pretrained(model, config=config, **options)


def _groups(stored: Mapping[str, Any]) -> tuple[PackedGroup, ...]:
    groups = stored.get("config_groups")
    faults = [
        f"{key} {stored[key]!r}"
        for key, right in (("format", "pack-quantized"), ("quantization_status", "compressed"))
        if stored.get(key) not in (right, None)
    ]
    faults += [f"the key {key!r}, unknown here" for key in sorted(stored.keys() - _KNOWN) if stored[key]]
    faults += ["a quantized cache"] if stored.get("kv_cache_scheme") else []
    faults += [] if isinstance(groups, dict) and groups else ["no config_groups"]
    faults += (
        [] if _are_texts(stored.get("ignore") or []) else [f"ignore {stored['ignore']!r}, which is no list of names"]
    )
    if faults:
        raise _refused(faults)
    assert isinstance(groups, dict)
    return tuple(_group(each) for each in groups.values())


def _are_texts(found: object) -> bool:
    return isinstance(found, list) and all(isinstance(each, str) for each in found)


def _group(stored: Any) -> PackedGroup:
    weights = stored.get("weights") if isinstance(stored, dict) else None
    if not isinstance(weights, dict) or not stored.get("targets") or not _are_texts(stored["targets"]):
        raise _refused(
            [f"the group {stored!r}, which has no targets (a list of names) and weights (how they are packed)"]
        )
    bits, strategy, size = weights.get("num_bits"), weights.get("strategy"), weights.get("group_size")
    faults = []
    if stored.get("input_activations") or stored.get("output_activations"):
        faults.append("activations quantized by the config (`int8_inputs` is the key for that)")
    if weights.get("type") != "int" or bits not in range(2, 9):
        faults.append(f"weights of {bits} bits of type {weights.get('type')!r} (integers of 2 to 8 bits run)")
    if weights.get("symmetric") is not True:
        faults.append("asymmetric weights")
    known = {"group": isinstance(size, int) and size > 0, "channel": size is None}
    if not known.get(str(strategy)) or weights.get("dynamic"):
        faults.append(f"scales by {strategy!r} of {size} (channel and group run)")
    if stored.get("format") not in ("pack-quantized", None):
        faults.append(f"format {stored['format']!r}")
    faults += [f"the key {key!r} of weights" for key in sorted(weights.keys() - _KNOWN_OF_WEIGHTS) if weights[key]]
    if faults:
        raise _refused(faults)
    return PackedGroup(tuple(stored["targets"]), weights["num_bits"], size)


def _super_weights(stored: Sequence[Mapping[str, Any]]) -> dict[str, tuple[SuperWeight, ...]]:
    """By the stored tensor that holds them."""
    found: dict[str, tuple[SuperWeight, ...]] = {}
    for each in stored:
        try:
            tensor, row, col, value = each["tensor"], int(each["row"]), int(each["col"]), float(each["value"])
        except (KeyError, TypeError, ValueError) as error:
            raise _refused([f"the super weight {each!r}, which has no tensor, row, col and value"]) from error
        found[tensor] = (*found.get(tensor, ()), SuperWeight(row, col, value))
    return found


def _refused(faults: Sequence[str]) -> QuantizedCheckpointError:
    return QuantizedCheckpointError(
        f"Loading a packed checkpoint: its quantization_config has {'; '.join(faults)}. Packed kernels run symmetric "
        "pack-quantized integers by row or group, as `superweights quantize` writes them. Load it by `from_pretrained` with "
        "compressed-tensors, or update superweights if it is newer than this."
    )


def _matches(target: str, name: str, module: nn.Module) -> int:
    """0 where a target does not mean a module, and more the more narrowly it does."""
    if target.startswith("re:"):
        return 2 if re.match(target.removeprefix("re:"), name) else 0
    return 3 if target == name else int(any(each.__name__ == target for each in type(module).__mro__))


def _entries(files: Sequence[str]) -> dict[str, TensorEntry]:
    """The tensors of safetensors files, from their headers alone."""
    found: dict[str, TensorEntry] = {}
    for each in files:
        path = Path(each)
        with path.open("rb") as file:

            def read(start: int, end: int, file: Any = file) -> bytes:
                file.seek(start)
                return bytes(file.read(end - start))

            found.update(read_header(read, file=path.name, size=path.stat().st_size))
    return found


def _stored_name(name: str, entries: Mapping[str, TensorEntry], prefix: str) -> str:
    """What a module is called in the files, and so in the config.

    transformers loads files of a model without its head into one with a head, and the other way round.
    """
    names = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
    return next((each for each in names if f"{each}.weight_packed" in entries or f"{each}.weight" in entries), name)


def _check_tensors(packed: Mapping[str, str], entries: Mapping[str, TensorEntry]) -> None:
    """Refuses whatever is packed by the config or in the files only."""
    missing = [each for each in packed.values() if f"{each}.weight_packed" not in entries]
    if missing:
        raise MissingTensorError(
            f"Loading a packed checkpoint: by its config {missing[0]} is packed{_more(missing)}, but the files have no "
            f"{missing[0]}.weight_packed. Get the files again, or name it in `ignore` if it is plain."
        )
    in_files = {name.removesuffix(".weight_packed") for name in entries if name.endswith(".weight_packed")}
    strange = sorted(in_files - set(packed.values()))
    if strange:
        raise QuantizedCheckpointError(
            f"Loading a packed checkpoint: {strange[0]} is packed in the files{_more(strange)}, but this model has no linear "
            "layer of that name that its config packs. Routed experts that are stored one by one, and names that transformers "
            "changes, have no packed layer here: load it by `from_pretrained` with compressed-tensors and dequantize=True."
        )
    for each in packed.values():
        for tensor in _TENSORS:
            if f"{each}.{tensor}" not in entries:
                raise MissingTensorError(
                    f"Loading a packed checkpoint: {each}.{tensor} is missing. Get the files again."
                )
        foreign = [tensor for tensor in _FOREIGN if f"{each}.{tensor}" in entries]
        if foreign:
            raise _refused([f"the tensor {each}.{foreign[0]} beside it"])


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _check_inputs(packed: Mapping[str, str], config: SuperweightsConfig) -> None:
    strange = sorted(config.int8_inputs.keys() - packed.keys())
    if strange:
        raise UsageError(
            f"Rounding inputs to 8 bits: {strange[0]} is no packed layer of this model{_more(strange)}. A layer "
            "whose matrix holds a super weight may be plain."
        )


def _check_super_weights(tensors: Iterable[str], entries: Mapping[str, TensorEntry]) -> None:
    """Refuses a super weight that would be lost in silence, its matrix being nowhere."""
    missing = [each for each in tensors if not {each, f"{each.removesuffix('.weight')}.weight_packed"} & entries.keys()]
    if missing:
        raise MissingTensorError(
            f"Loading a packed checkpoint: its config has a super weight of {missing[0]}{_more(missing)}, but the files have "
            "no such matrix, packed or plain. Get config and files again, from one source."
        )
