"""A model ready to run: its decoder, its architecture and its tokenizer, with the weights resident or streamed.

Residency says where weights live, not how the model computes: both give the same bits. A streamed model holds one decoder
layer and reads the next while it computes; a resident one holds all of them.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal, Self, get_args

import torch
from torch import nn

from superweights.checkpoint import Checkpoint, ModelReference
from superweights.checkpoint.opening import open_dequantized
from superweights.coordinates import Coordinate
from superweights.errors import (
    MalformedFileError,
    MissingTensorError,
    ModelError,
    RemoteCodeError,
    SuperweightsError,
    UnknownNameError,
    UsageError,
)
from superweights.model import experts
from superweights.model.architecture import Architecture, DownProjection, read_architecture
from superweights.model.streaming import NonFinite, StoredEdit, StreamedWeights
from superweights.model.widening import Compute, WideProducts
from superweights.progress import NO_PROGRESS, Progress

Residency = Literal["resident", "streamed"]


class LoadedModel:
    """A causal language model that can be traced and edited. The only stateful type; close it, or use it as a context.

    Attributes:
        name: how the model was named.
        model: the transformers model.
        architecture: where its parts are.
        tokenizer: its tokenizer, or None when there is none.
        checkpoint: where its weights come from; None for a model that was already in memory.
        weights: the traffic between checkpoint and model; None for a model that was already in memory.
        residency: "resident" or "streamed".
        pass_tokens: how many tokens each row of the running, or last, pass has.
        pass_mask: its attention mask, or None.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        architecture: Architecture,
        *,
        tokenizer: Any,
        weights: StreamedWeights | None,
        residency: Residency,
    ) -> None:
        self.name = name
        self.model = model
        self.architecture = architecture
        self.tokenizer = tokenizer
        self.weights = weights
        self.residency = residency
        self._streamed = weights if residency == "streamed" else None
        self._factors: list[tuple[Coordinate, float]] = []
        self._reader = ThreadPoolExecutor(1, "superweights-read")
        self._ahead: tuple[int, Future[None]] | None = None
        self._unread = set(range(architecture.layer_count))
        self._last_layer = architecture.layer_count - 1
        self.pass_tokens = 0
        self.pass_mask: torch.Tensor | None = None
        self._whole = False
        self._head_attached = weights is None
        self._output_class: Any = None
        self._progress: Progress = NO_PROGRESS
        self._hooks = [hook for layer in range(architecture.layer_count) for hook in self._hook_layer(layer)]
        self._products = weights.products if weights else WideProducts(1)
        self._watched = [] if weights else self._watch_experts()
        self._training = [module for module in model.modules() if module.training]
        model.eval()

    @property
    def checkpoint(self) -> Checkpoint | None:
        """Where the weights come from; None for a model that was already in memory."""
        return self.weights.checkpoint if self.weights else None

    @property
    def compute_dtype(self) -> str:
        """What the forward pass computes in, in words."""
        if self.weights is None:
            return str(self.model.dtype).removeprefix("torch.")
        matrices = (each[0] if each.ndim == 3 else each for each in self.decoder.parameters())  # packed: one by one
        return "float32 with bfloat16 products" if any(map(self._products.rounds, matrices)) else "float32"

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader of this model's numbers must know; passes add to it."""
        if self.weights is None:
            return ()
        found = [
            f"{count} NaN or infinite {'weight' if count == 1 else 'weights'} of {name} set to 0"
            for name, count in self.weights.zeroed.items()
        ]
        if self.weights.checkpoint.packing is not None:
            packed = self.weights.checkpoint.packing
            found.append(f"the weights are quantized ({packed}) and were dequantized to float32")
        count, stored = self.architecture.layer_count, self.weights.stored_layers
        if stored > count:
            found.append(
                f"config.json describes {count} decoder layers and the files hold {stored}: those from {count} on "
                "were left out. Layers that only predict further tokens stand there; any others mean that config.json is of "
                "another model."
            )
        return tuple(found)

    @property
    def decoder(self) -> Any:
        """The module whose forward pass runs all decoder layers."""
        return self.model.get_submodule(self.architecture.decoder)

    def layer(self, layer: int) -> nn.Module:
        """One decoder layer."""
        module: nn.Module = self.model.get_submodule(self.architecture.layer_name(layer))
        return module

    def run(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        last_layer: int | None = None,
        progress: Progress = NO_PROGRESS,
    ) -> Any:
        """Runs the decoder layers up to `last_layer` on [prompts, tokens]; hooks see what happens.

        Returns:
            What the decoder returns; None where it stops before its last layer.

        Raises:
            UsageError: the model has no such last layer.
            ModelError: the model's own code failed.
        """
        final = self.architecture.layer_count - 1
        self._last_layer = final if last_layer is None else last_layer
        if not 0 <= self._last_layer <= final:
            raise UsageError(f"Running {self.name} up to layer {last_layer}: its layers are 0 to {final}.")
        input_ids = input_ids.to(self.model.get_input_embeddings().weight.device)
        attention_mask = None if attention_mask is None else attention_mask.to(input_ids.device)
        self.pass_tokens = input_ids.shape[1]
        self.pass_mask = attention_mask
        self._progress = progress
        progress.start("forward pass", total=self._last_layer + 1, unit="layers")
        masked = {} if attention_mask is None else {"attention_mask": attention_mask}
        try:
            with torch.no_grad():
                return self.decoder(input_ids=input_ids, use_cache=False, **masked)
        except _LastLayerDone:
            return None
        except SuperweightsError:
            raise
        except Exception as error:
            if _is_out_of_memory(error):
                rows, tokens = input_ids.shape
                raise ModelError(
                    f"Running {self.name} on {rows} rows of {tokens} tokens: out of memory. Use shorter windows (--length) or "
                    "prompts, or hold one layer at a time (--residency streamed)."
                ) from error
            outside = [name for name, each in self.outside_layers() if each.is_meta]
            absent = f" The checkpoint has no tensor for {', '.join(outside[:5])}." if outside else ""
            raise ModelError(
                f"Running {self.name}: the forward pass of {type(self.decoder).__name__} failed with "
                f"{type(error).__name__}: {error}{absent}"
            ) from error
        finally:
            progress.finish()
            self._abandon_pass()

    def states(
        self,
        input_ids: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        progress: Progress = NO_PROGRESS,
    ) -> torch.Tensor:
        """Runs the whole decoder and gives its last states, [rows, tokens, hidden]; `logits` makes logits of them.

        Args:
            input_ids: token ids [rows, tokens].
            attention_mask: 1 for real tokens, 0 for padding, [rows, tokens]; None where all are real.
            progress: hears about each layer.

        Raises:
            ModelError: the model's own code failed.
        """
        self._whole = True
        try:
            output = self.run(input_ids, attention_mask=attention_mask, progress=progress)
        finally:
            self._whole = False
        self._output_class = type(output)
        states: torch.Tensor = output.last_hidden_state
        return states

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits of last states, by the model's own code behind its decoder: head, scaling, soft cap.

        The logits of a long window over a large vocabulary do not fit in memory: hand in a piece of the states at a time.

        Args:
            states: any part of what `states` gave, [rows, tokens, hidden].

        Returns:
            [rows, tokens, vocabulary], float32.

        Raises:
            ModelError: the model's own code failed.
        """
        if self.weights is not None and not self._head_attached:
            self.weights.attach_head()
            self._head_attached = True
        decoder, decoded = self.decoder, self._output_class(last_hidden_state=states)
        decoder.forward = lambda *_, **__: decoded
        try:
            with torch.no_grad():
                ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
                logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        except Exception as error:
            raise ModelError(
                f"Running {self.name}: {type(self.model).__name__} could not make logits of the states of its decoder: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            del decoder.forward
        return logits.float()

    def outside_layers(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The decoder's parameters outside its layers, by full name."""
        for name, value in self.decoder.named_parameters(prefix=self.architecture.decoder):
            if not name.startswith(f"{self.architecture.layers}."):
                yield name, value

    @contextmanager
    def edited(self, factors: Mapping[Coordinate, float]) -> Iterator[None]:
        """Multiplies weights by factors (0 removes) until the context ends; the original bits come back.

        Raises:
            CoordinateError: a coordinate is not in this model.
            UsageError: an edit changes nothing. A streamed model knows when the layer is read.
        """
        for coordinate in factors:
            self.architecture.locate(coordinate)
        before = self._factors
        originals: list[tuple[Coordinate, torch.Tensor]] = []
        try:
            for coordinate, factor in factors.items():
                if not self._streamed:
                    originals.append((coordinate, self._scale(coordinate, factor)))
                self._factors = [*self._factors, (coordinate, factor)]
            yield
        finally:
            self._factors = before
            for coordinate, original in reversed(originals):  # the parameter may be another one by now
                projection = self.architecture.locate(coordinate)
                self._parameter(projection)[projection.index(coordinate)] = original

    @contextmanager
    def stored_edited(self, edits: Mapping[str, StoredEdit]) -> Iterator[None]:
        """Edits tensors of decoder layers as they are stored, before they become parameters, until the context ends.

        Layers that are attached are attached again, with and then without the edits: what else was changed in their parameters
        by hand is lost. Factors of `edited` stay in force and come after, whichever context was entered first.

        Args:
            edits: what is done to each stored tensor, by its name in the checkpoint.

        Raises:
            UsageError: the model does not come from a checkpoint.
            MissingTensorError: no decoder layer is made of a tensor of that name.
        """
        weights = self.weights
        if weights is None:
            raise UsageError(f"Editing stored tensors of {self.name}: it was in memory already. Edit its parameters.")
        layers = [layer for layer, names in enumerate(weights.plan.layers) if edits.keys() & set(names)]
        strange = sorted(edits.keys() - {name for layer in layers for name in weights.plan.layers[layer]})
        if strange:
            raise MissingTensorError(
                f"Editing stored tensors of {self.name}: no decoder layer of {type(self.model).__name__} is made of "
                f"{', '.join(strange[:5])}. Edit weights of the decoder layers."
            )
        before = weights.edits
        try:
            weights.edits = (*before, edits)
            self._attach_again(weights, layers)
            yield
        finally:
            weights.edits = before
            self._attach_again(weights, layers)

    @contextmanager
    def attached(self, projection: DownProjection) -> Iterator[torch.Tensor]:
        """Gives the stored parameter of a down projection, loaded for as long as the context lasts."""
        try:
            if self._streamed:
                self._attach(self._streamed, projection.layer)
            yield self._parameter(projection)
        finally:
            if self._streamed:
                self._streamed.detach_layer(projection.layer)

    def matrix_row(self, projection: DownProjection, expert: int | None, row: int) -> torch.Tensor:
        """Gives W[row, :] of a projection whose layer is attached, in float32 [cols]."""
        parameter = self._parameter(projection)
        matrix = parameter if expert is None else parameter[expert]
        return (matrix[:, row] if projection.transposed else matrix[row]).float().cpu()

    def close(self) -> None:
        """Removes hooks, ends threads, closes files."""
        for hook in self._hooks:
            hook.remove()
        self._reader.shutdown()
        while self._watched:  # closing twice does no harm
            experts.remove_observed_experts(self._watched.pop())
        self._products.close()
        for module in self._training:
            module.training = True
        if self.weights is not None:
            self.weights.checkpoint.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _watch_experts(self) -> list[nn.Module]:
        """Makes the packed experts of a model in memory observable, until `close`."""
        packed = [each for each in self.model.modules() if experts.is_routed(each) or experts.is_batched(each)]
        for module in packed:
            experts.install_observed_experts(module, self._products)
        return packed

    def _hook_layer(self, layer: int) -> list[Any]:
        module = self.layer(layer)
        return [
            module.register_forward_pre_hook(lambda *_: self._before_layer(layer)),
            module.register_forward_hook(lambda *_: self._after_layer(layer)),
        ]

    def _before_layer(self, layer: int) -> None:
        if self._ahead is not None and self._ahead[0] == layer:
            self._ahead[1].result()
        if self.weights is None:
            return
        if self._streamed:
            self._attach(self._streamed, layer)
        after = layer + 1
        if layer < self._last_layer and (self._streamed or after in self._unread):
            self._unread.discard(after)  # a resident layer is read once
            names = self.weights.plan.layers[after]
            self._ahead = (after, self._reader.submit(self.weights.checkpoint.fetch, names))

    def _after_layer(self, layer: int) -> None:
        nbytes = 0
        if self._streamed:
            self._streamed.detach_layer(layer)
            nbytes = self._streamed.layer_bytes(layer)
        self._progress.advance(nbytes=nbytes)
        if self._last_layer <= layer and not self._whole:
            raise _LastLayerDone

    def _attach(self, weights: StreamedWeights, layer: int) -> None:
        if self._is_attached(layer):
            weights.detach_layer(layer)  # nothing is scaled twice
        weights.attach_layer(layer)
        for coordinate, factor in self._factors:
            if coordinate.layer == layer:
                self._scale(coordinate, factor)

    def _attach_again(self, weights: StreamedWeights, layers: Iterable[int]) -> None:
        """Brings the edits in force to the layers that are attached, or should be."""
        for layer in layers:
            if not self._streamed or self._is_attached(layer):
                self._attach(weights, layer)

    def _is_attached(self, layer: int) -> bool:
        return any(not each.is_meta for each in self.layer(layer).parameters())

    def _abandon_pass(self) -> None:
        """Leaves nothing attached and nothing being read, also after an error half-way."""
        ahead, self._ahead = self._ahead, None
        try:
            if ahead is not None:
                ahead[1].exception()
        finally:
            if self._streamed:
                for layer in range(self.architecture.layer_count):
                    if self._is_attached(layer):
                        self._streamed.detach_layer(layer)

    def weight_change(self, coordinate: Coordinate, factor: float) -> float:
        """What scaling adds to a weight of an attached layer, after rounding to its stored dtype; the weight stays.

        Raises:
            UsageError: scaling changes nothing.
        """
        projection = self.architecture.locate(coordinate)
        cell = self._parameter(projection)[projection.index(coordinate)].clone()[None]
        original = self._scale_at(projection, cell, (0,), coordinate, factor)
        return cell.item() - original.item()

    def _scale(self, coordinate: Coordinate, factor: float) -> torch.Tensor:
        """Scales an attached weight; gives its original value."""
        projection = self.architecture.locate(coordinate)
        return self._scale_at(projection, self._parameter(projection), projection.index(coordinate), coordinate, factor)

    def _scale_at(
        self,
        projection: DownProjection,
        tensor: torch.Tensor,
        index: tuple[int, ...],
        coordinate: Coordinate,
        factor: float,
    ) -> torch.Tensor:
        storage = self.weights.storage.get(projection.name) if self.weights else None
        return scale_weight(tensor, index, factor, storage=storage, what=f"{coordinate} of {self.name}")

    def _parameter(self, projection: DownProjection) -> torch.Tensor:
        parameter: torch.Tensor = self.model.get_parameter(projection.name).data
        return parameter


def scale_weight(
    tensor: torch.Tensor, index: tuple[int, ...], factor: float, *, storage: torch.dtype | None = None, what: str
) -> torch.Tensor:
    """Multiplies one weight in place, in float32, and rounds it to the dtype in which it is stored.

    Args:
        tensor: holds the weight.
        index: where.
        factor: what it is multiplied by.
        storage: the dtype in which the weight is stored, where the tensor is wider.
        what: the weight, for messages.

    Returns:
        The original value, a scalar of the tensor's dtype.

    Raises:
        UsageError: the weight stays as it is.
    """
    original = tensor[index].clone()
    scaled = (original.float() * factor).to(storage or tensor.dtype)
    if scaled.item() == original.item():
        raise UsageError(
            f"Scaling {what} by {factor:g} changes nothing: the weight is {original.item():g}. Choose another weight or factor."
        )
    tensor[index] = scaled
    return original


def _is_out_of_memory(error: Exception) -> bool:
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and "not enough memory" in str(error))


class _LastLayerDone(Exception):
    """Ends a forward pass after the last layer that was asked for."""


def load(
    model: Any,
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    residency: Residency = "resident",
    nonfinite: NonFinite = "refuse",
    compute: Compute = "auto",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Makes a model ready to be traced.

    Args:
        model: a directory, a .gguf file, a Hub name, an fsspec URL, or a transformers model that is already in memory.
            Of the options below, only `tokenizer` is for the latter: it stays where and as it is.
        tokenizer: replaces the checkpoint's own; needed for text prompts when `model` is already in memory.
        revision: branch, tag or commit of a Hub model.
        residency: "resident" keeps all layers attached, "streamed" one at a time. Both give the same bits.
        nonfinite: what to do with NaN and infinite weights: "refuse" raises when a forward pass meets them, "zero" puts zeros
            in their place and counts them in `model.weights.zeroed`.
        compute: "float32" makes every product in float32, whatever the weights are stored in. "auto" does the same, but leaves
            large bfloat16 matrices to a processor that multiplies bfloat16 itself: several times faster, with inputs and
            outputs of a product rounded to bfloat16. Sums and statistics are float32 in both.
        trust_remote_code: whether Python code that comes with the checkpoint may run.

    Raises:
        CheckpointError: the files cannot be used.
        ModelError: the model cannot be built.
        UnknownNameError: there is no such residency, nonfinite or compute.

    Example:
        >>> with load(example_checkpoint) as model:
        ...     model.architecture.layer_count
        6
    """
    for kind, chosen, choices in (
        ("residency", residency, Residency),
        ("nonfinite", nonfinite, NonFinite),
        ("compute", compute, Compute),
    ):
        if chosen not in get_args(choices):
            raise UnknownNameError.among(kind, chosen, get_args(choices))
    if isinstance(model, nn.Module):
        return _wrap(model, tokenizer)
    reference = ModelReference.parse(model, revision=revision)
    checkpoint = open_dequantized(reference)
    try:
        weights = StreamedWeights(checkpoint, nonfinite=nonfinite, compute=compute, trust_remote_code=trust_remote_code)
        tokenizer = tokenizer or _tokenizer(checkpoint, trust_remote_code=trust_remote_code)
        if residency == "resident":
            for layer in range(weights.architecture.layer_count):
                weights.attach_layer(layer, populate=False)
    except BaseException:
        checkpoint.close()
        raise
    return LoadedModel(
        reference.name,
        weights.model,
        weights.architecture,
        tokenizer=tokenizer,
        weights=weights,
        residency=residency,
    )


def _wrap(model: Any, tokenizer: Any) -> LoadedModel:
    name = model.config.name_or_path or type(model).__name__
    return LoadedModel(name, model, read_architecture(model), tokenizer=tokenizer, weights=None, residency="resident")


def _tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    if not checkpoint.has_tokenizer:
        return None
    directory, gguf_file = checkpoint.directory, checkpoint.gguf_file
    inside = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=trust_remote_code, **inside
        )
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise RemoteCodeError(
                f"The tokenizer in {directory} needs Python code of its own, which is not run unless you allow it: read that "
                "code, then pass --trust-remote-code (trust_remote_code=True in Python)."
            ) from error
        raise MalformedFileError(
            f"The tokenizer files in {directory / (gguf_file or '')} cannot be read: {type(error).__name__}: {error}. Replace "
            "them; without any tokenizer file, fixed token ids stand in for the prompts."
        ) from error
