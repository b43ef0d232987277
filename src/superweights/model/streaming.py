"""Builds a transformers model whose weights stay in the checkpoint, and attaches them layer by layer.

The model is transformers' own class with its parameters on `meta`; its own forward pass runs, so masks, positions and norms
are never written a second time. Which checkpoint tensors feed which parameter, and how, is transformers' own conversion
table. This is the only file that touches the internals of transformers' loader.
"""

import inspect
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import ContextManagers, LoadStateDictConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from superweights.checkpoint import Checkpoint
from superweights.errors import (
    MalformedFileError,
    MissingTensorError,
    NonFiniteWeightsError,
    RemoteCodeError,
    UnsupportedArchitectureError,
    WeightMismatchError,
)
from superweights.model import experts
from superweights.model.architecture import Architecture, read_architecture
from superweights.model.widening import (
    Compute,
    WideProducts,
    install_wide_products,
    multiplies_bfloat16,
    takes_wide_products,
)

NonFinite = Literal["refuse", "zero"]
StoredEdit = Callable[[torch.Tensor], None]
"""Changes a tensor in place, as it is stored."""
_SIXTEEN_BITS = {"BF16": torch.bfloat16, "F16": torch.float16}
_NUMBERED = re.compile(r"(?P<head>(?:.*?\.)??)(?P<number>\d+)(?P<rest>\..+)")


@dataclass(frozen=True)
class WeightPlan:
    """Which checkpoint tensors each part of the decoder needs."""

    layers: tuple[tuple[str, ...], ...]
    """Tensor names by decoder layer."""
    outside: tuple[str, ...]
    """Tensors of the decoder outside its layers, but for the token embedding: norms, position embeddings."""
    embedding: str
    """The token embedding, of which only the prompt's rows are read."""
    head: tuple[str, ...]
    """Tensors behind the decoder, which turn its last states into logits; a tied one is `embedding` itself."""


class StreamedWeights:
    """A model on `meta` beside its checkpoint, and the traffic between the two.

    Args:
        checkpoint: where the weights are.
        nonfinite: "zero" puts zeros in the place of NaN and infinite weights; "refuse" leaves them for a pass to meet.
        compute: see `load`.
        trust_remote_code: whether Python code that comes with the checkpoint may run.

    Attributes:
        zeroed: how many weights of each parameter were zeroed for being NaN or infinite.
        stored_layers: how many decoder layers the files hold; the config may have fewer.
        storage: the dtype in which the weights of each parameter are stored; they may be wider in the model.
        edits: what is done to stored tensors of decoder layers, by name, before they become parameters, one after the other.

    Raises:
        UnsupportedArchitectureError: transformers has no causal language model of this type, or the rules do not fit it.
        RemoteCodeError: the checkpoint needs its own code and that was not allowed.
        MissingTensorError: a decoder layer has no tensors in the checkpoint.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        nonfinite: NonFinite = "refuse",
        compute: Compute = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.zeroed: dict[str, int] = {}
        self.edits: tuple[Mapping[str, StoredEdit], ...] = ()
        self._touched: set[str] = set()
        self._nonfinite = nonfinite
        self.model = _build_on_meta(checkpoint, trust_remote_code=trust_remote_code)
        self.architecture: Architecture = read_architecture(self.model)
        self.products = WideProducts(bfloat16=compute == "auto" and multiplies_bfloat16())
        self._mapping = get_model_conversion_mapping(self.model)
        targets = _targets(self.model, self._mapping, checkpoint)
        self.storage = {
            target: getattr(torch, checkpoint.tensors[name].storage.torch or "", None)
            for name, target in targets.items()
        }
        self.plan = _plan(self.model, self.architecture, targets, checkpoint)
        self.stored_layers = _stored_layers(checkpoint.tensors, self.plan)
        _keep_sixteen_bits(self.model, self.architecture, targets, checkpoint, self.products)
        self._embedding_names = _names_of(self.model, self.model.get_input_embeddings().weight)
        self._on_meta = dict(self.model.named_parameters(remove_duplicate=False))
        self._attach(self.plan.outside)
        self._zero_nonfinite(targets[name] for name in self.plan.outside)
        self._attach_embedding()

    def attach_layer(self, layer: int, *, populate: bool = True) -> None:
        """Gives one decoder layer its weights; zero-copy views of the files where no conversion is needed.

        Args:
            layer: decoder layer, from 0.
            populate: read the weights into memory now; else when they are first used.

        Raises:
            WeightMismatchError: a tensor has another shape than its parameter, or a parameter has no tensor.
        """
        self._attach(self.plan.layers[layer], populate=populate)
        name = self.architecture.layer_name(layer)
        empty = [each for each, value in self.model.get_submodule(name).named_parameters() if value.is_meta]
        if empty:
            raise WeightMismatchError(
                f"Loading decoder layer {layer} of {self.checkpoint.reference.name}: the checkpoint has no tensor for "
                f"{len(empty)} of its parameters: {', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}. "
                "Is config.json of another model?"
            )
        self._zero_nonfinite(f"{name}.{each}" for each, _ in self.model.get_submodule(name).named_parameters())

    def detach_layer(self, layer: int) -> None:
        """Takes the weights of one decoder layer away and lets their pages go; edits in place are lost."""
        prefix = self.architecture.layer_name(layer)
        for name, _ in list(self.model.get_submodule(prefix).named_parameters(remove_duplicate=False)):
            _set_parameter(self.model, f"{prefix}.{name}", self._on_meta[f"{prefix}.{name}"])
        self.checkpoint.drop(self.plan.layers[layer])
        self._touched.difference_update(self.plan.layers[layer])

    def attach_head(self) -> None:
        """Gives what stands behind the decoder its weights; a matrix that is tied to the embedding is read from there.

        Raises:
            WeightMismatchError: a parameter has no tensor.
        """
        self._attach(self.plan.head)
        for name, value in self._outside_decoder():
            if value.is_meta and name in self._embedding_names:
                self._attach_tied_embedding(name)
            elif value.is_meta and (source := self.model.all_tied_weights_keys.get(name)):
                _set_parameter(self.model, name, self.model.get_parameter(source))
        empty = [name for name, value in self._outside_decoder() if value.is_meta]
        if empty:
            raise WeightMismatchError(
                f"Loading the head of {self.checkpoint.reference.name}: the checkpoint has no tensor for "
                f"{', '.join(empty[:5])}. Is config.json of another model?"
            )

    def _outside_decoder(self) -> list[tuple[str, nn.Parameter]]:
        named = self.model.named_parameters(remove_duplicate=False)
        return [(name, value) for name, value in named if not _is_inside(name, self.architecture.decoder)]

    def _attach_tied_embedding(self, name: str) -> None:
        """The whole embedding as the head's matrix, as it is stored where the head can multiply it so."""
        self.checkpoint.fetch((self.plan.embedding,))
        stored = self.checkpoint.view(self.plan.embedding)  # [vocabulary, channels]
        module = self.model.get_submodule(name.rpartition(".")[0])
        wide = stored.dtype in _SIXTEEN_BITS.values() and takes_wide_products(module)
        if wide:
            install_wide_products(module, self.products, exact=True)
        _set_parameter(self.model, name, nn.Parameter(stored if wide else stored.float(), requires_grad=False))

    def layer_bytes(self, layer: int) -> int:
        """Stored bytes of one decoder layer."""
        return sum(self.checkpoint.tensors[name].nbytes for name in self.plan.layers[layer])

    def _attach(self, names: tuple[str, ...], *, populate: bool = True) -> None:
        self.checkpoint.drop(self._touched.intersection(names))  # an edit never meets what the last one left
        self._touched.difference_update(names)
        self.checkpoint.fetch(names, populate=populate)
        tensors = {name: self.checkpoint.view(name) for name in names}
        for name, tensor in tensors.items():
            for edits in self.edits:
                if name in edits:
                    self._touched.add(name)
                    edits[name](tensor)
        with _quiet_serial_loading():
            info, _ = convert_and_load_state_dict_in_model(
                self.model, tensors, LoadStateDictConfig(weight_mapping=self._mapping)
            )
        if info.mismatched_keys:
            name, found, expected = min(info.mismatched_keys)
            raise WeightMismatchError(
                f"Loading {self.checkpoint.reference.name}: {name} has shape {list(found)} in the checkpoint and "
                f"{list(expected)} in {type(self.model).__name__} as config.json describes it "
                f"({len(info.mismatched_keys)} such tensors). Do config.json and the weights belong together?"
            )
        if info.conversion_errors:
            name, reason = min((str(key), str(value)) for key, value in info.conversion_errors.items())
            raise WeightMismatchError(
                f"Loading {self.checkpoint.reference.name}: transformers could not assemble {name}: "
                f"{reason.strip().splitlines()[-1]}"
            )

    def _zero_nonfinite(self, names: Iterable[str]) -> None:
        for name in names if self._nonfinite == "zero" else ():
            value = self.model.get_parameter_or_buffer(name).data
            bad = ~value.isfinite()
            if bool(bad.any()):
                self.zeroed[name] = int(bad.sum())
                value[bad] = 0

    def _attach_embedding(self) -> None:
        """Fills the token embedding row by row, as prompts name tokens: its other rows are never read."""
        module = self.model.get_input_embeddings()
        entry = self.checkpoint.entry(self.plan.embedding)  # [vocabulary, channels]
        if entry.shape != tuple(module.weight.shape):
            raise WeightMismatchError(
                f"Loading {self.checkpoint.reference.name}: {self.plan.embedding} has shape {list(entry.shape)} in the "
                f"checkpoint and {list(module.weight.shape)} by config.json. Do config.json and the weights belong together?"
            )
        viewed = entry.dtype == "F32" and not self.checkpoint.is_packed(self.plan.embedding)
        rows = self.checkpoint.view(self.plan.embedding) if viewed else _unbacked_zeros(torch.Size(entry.shape))
        module.weight = nn.Parameter(rows, requires_grad=False)
        filled: set[int] = set()

        def fill(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            new = sorted(set(torch.unique(inputs[0]).tolist()) - filled)
            self.checkpoint.fetch_rows(self.plan.embedding, new)
            if not viewed:
                rows[new] = self.checkpoint.view_rows(self.plan.embedding, new)
            bad = ~rows[new].isfinite()
            if bool(bad.any()) and self._nonfinite == "refuse":
                raise NonFiniteWeightsError(
                    f"{self.checkpoint.reference.name}: {self.plan.embedding} has {int(bad.sum())} NaN or infinite weights in "
                    "the rows of the prompts' tokens. The checkpoint is damaged. To go on with zeros in their place, pass "
                    "--nonfinite zero."
                )
            if bool(bad.any()):
                self.zeroed[self.plan.embedding] = self.zeroed.get(self.plan.embedding, 0) + int(bad.sum())
                rows[new] = rows[new].nan_to_num(0, 0, 0)
            filled.update(new)

        module.register_forward_pre_hook(fill)


def _unbacked_zeros(shape: torch.Size) -> torch.Tensor:
    """Float32 zeros that take memory only where they are written."""
    return torch.frombuffer(mmap.mmap(-1, max(4 * shape.numel(), 1)), dtype=torch.float32, count=shape.numel()).view(
        shape
    )


def _build_on_meta(checkpoint: Checkpoint, *, trust_remote_code: bool) -> Any:
    model_class, config = _model_class(checkpoint, trust_remote_code=trust_remote_code)
    for part in (config, config.get_text_config(decoder=True)):
        part.dtype = torch.float32
    try:
        with ContextManagers(model_class.get_init_context(torch.float32, False, False, None)):
            model = model_class(config)
    except Exception as error:
        raise UnsupportedArchitectureError(
            f"{checkpoint.reference.name}: transformers cannot build {model_class.__name__} from config.json: "
            f"{type(error).__name__}: {error}"
        ) from error
    for name, buffer in list(model.named_non_persistent_buffers()):
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    stored_buffers = {name for name, _ in model.named_buffers()} - {
        name for name, _ in model.named_non_persistent_buffers()
    }
    for name, value in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        if isinstance(value, nn.Parameter) or name in stored_buffers:
            value._is_hf_initialized = True
    model.initialize_weights()  # fills the computed buffers only: everything stored is marked as initialised
    return model.eval().requires_grad_(False)


def _model_class(checkpoint: Checkpoint, *, trust_remote_code: bool) -> tuple[Any, Any]:
    name, model_type = checkpoint.reference.name, checkpoint.config.get("model_type")
    auto_map = checkpoint.config.get("auto_map")
    remote = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else None
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    if not known and not (remote and trust_remote_code):
        if remote:
            raise _remote_code_error(name, remote)
        raise UnsupportedArchitectureError(
            f"{name} is of type {model_type!r}, which the installed transformers does not know. Upgrade transformers, or "
            "convert the checkpoint to a supported type."
        )
    try:
        if checkpoint.gguf_file is not None:
            config = CONFIG_MAPPING[model_type].from_dict(checkpoint.config)
        else:
            config = AutoConfig.from_pretrained(
                checkpoint.directory, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        file = checkpoint.directory / (checkpoint.gguf_file or "config.json")
        raise MalformedFileError(
            f"{file}: transformers refuses it as a config of type {model_type!r}: {error}"
        ) from error
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config
    if remote and trust_remote_code:
        return get_class_from_dynamic_module(remote, checkpoint.directory, local_files_only=True), config
    if remote:
        raise _remote_code_error(name, remote)
    raise UnsupportedArchitectureError(
        f"{name} is of type {model_type!r}, for which transformers has no causal language model."
    )


def _remote_code_error(name: str, remote: str) -> RemoteCodeError:
    return RemoteCodeError(
        f"{name} runs only with Python code of its own ({remote}), which is not run unless you allow it: read that code, "
        "then pass --trust-remote-code (trust_remote_code=True in Python)."
    )


def _targets(model: Any, mapping: list[Any], checkpoint: Checkpoint) -> dict[str, str]:
    """Checkpoint tensor name -> name of the (first) parameter or buffer it feeds."""
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    state = model.state_dict()
    targets = {}
    for name in checkpoint.tensors:
        target, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target = name
        if target in state:
            targets[name] = target
    return targets


def _plan(model: Any, architecture: Architecture, targets: Mapping[str, str], checkpoint: Checkpoint) -> WeightPlan:
    embedding_names = _names_of(model, model.get_input_embeddings().weight)
    layers: list[list[str]] = [[] for _ in range(architecture.layer_count)]
    outside: list[str] = []
    head: list[str] = []
    embedding: str | None = None
    for name, target in targets.items():
        layer = _layer_of(target, architecture.layers)
        if layer is not None:
            layers[layer].append(name)
        elif target in embedding_names:
            embedding = name
        elif target.startswith(f"{architecture.decoder}." if architecture.decoder else ""):
            outside.append(name)
        else:
            head.append(name)
    bare = [str(layer) for layer, names in enumerate(layers) if not names]
    if bare or embedding is None:
        what = f"decoder layers {', '.join(bare)}" if bare else f"the token embedding {min(embedding_names)}"
        raise MissingTensorError(
            f"Planning to load {checkpoint.reference.name} as {type(model).__name__}: the checkpoint has no tensors for "
            f"{what}. Its first tensors are: {', '.join(list(checkpoint.tensors)[:4])}. Do config.json and the weights belong "
            "together?"
        )
    return WeightPlan(tuple(tuple(names) for names in layers), tuple(outside), embedding, tuple(head))


def _stored_layers(names: Iterable[str], plan: WeightPlan) -> int:
    """How many decoder layers the files hold: numbers beyond the plan's count where the rest of the name is layer 0's."""
    first = set(plan.layers[0])
    numbered = [match for match in map(_NUMBERED.fullmatch, names) if match]
    return max(
        [len(plan.layers)] + [int(each["number"]) + 1 for each in numbered if f"{each['head']}0{each['rest']}" in first]
    )


def _names_of(model: Any, parameter: nn.Parameter) -> set[str]:
    """The parameter's names, and those of the parameters tied to it: a checkpoint stores one of them."""
    names = {name for name, each in model.named_parameters(remove_duplicate=False) if each is parameter}
    ties = [{target, source} for target, source in model.all_tied_weights_keys.items()]
    return names.union(*(tie for tie in ties if tie & names))


def _layer_of(target: str, layers: str) -> int | None:
    head, _, _ = target.removeprefix(f"{layers}.").partition(".")
    return int(head) if target.startswith(f"{layers}.") and head.isdigit() else None


def _keep_sixteen_bits(
    model: Any, architecture: Architecture, targets: Mapping[str, str], checkpoint: Checkpoint, products: WideProducts
) -> None:
    """Leaves the matrices of plain linear layers and packed experts as stored; all else is widened when loaded."""
    stored = {target: checkpoint.tensors[name].dtype for name, target in targets.items()}
    for path, module in model.named_modules():
        if experts.is_routed(module) or experts.is_batched(module):
            experts.install_observed_experts(module, products)
            matrices = [name for name in ("gate_up_proj", "up_proj", "down_proj") if hasattr(module, name)]
        elif takes_wide_products(module) and not _weight_is_read_directly(model, path):
            # Probabilities are read off the head, where a rounded product would show.
            install_wide_products(module, products, exact=not _is_inside(path, architecture.decoder))
            matrices = ["weight"]
        else:
            continue
        for name in matrices:
            dtype = _SIXTEEN_BITS.get(stored.get(f"{path}.{name}", ""))
            if dtype is not None:
                value = torch.empty_like(getattr(module, name), dtype=dtype)
                setattr(module, name, nn.Parameter(value, requires_grad=False))


def _weight_is_read_directly(model: Any, path: str) -> bool:
    """Whether the parent's code names the layer's weight: to multiply by it, or to cast activations to its dtype."""
    parent, _, name = path.rpartition(".")
    parent_class: Any = type(model.get_submodule(parent))
    source = _source(parent_class)
    return source is None or re.search(rf"\b{re.escape(name)}\.weight\b", source) is not None


@cache
def _source(of: Any) -> str | None:
    try:
        return inspect.getsource(of)
    except OSError:
        return None


def _is_inside(path: str, module: str) -> bool:
    return f"{path}.".startswith(f"{module}.")


def _set_parameter(model: Any, name: str, value: nn.Parameter) -> None:
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._parameters[leaf] = value


@contextmanager
def _quiet_serial_loading() -> Iterator[None]:
    """No thread pool and no progress bar for a load of one layer."""
    variable, bar_shown = "HF_DEACTIVATE_ASYNC_LOAD", transformers_logging.is_progress_bar_enabled()
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
        if bar_shown:
            transformers_logging.enable_progress_bar()
