"""A model ready to run: its decoder, its architecture and its tokenizer, with the weights resident or streamed.

Residency says where weights live, not how the model computes: both give the same bits. A streamed model holds one decoder
layer and reads the next while it computes; a resident one holds all of them.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import nn

from superweights.checkpoint import Checkpoint, ModelReference
from superweights.coordinates import Coordinate
from superweights.errors import (
    MalformedFileError,
    ModelError,
    RemoteCodeError,
    SuperweightsError,
    UnknownNameError,
    UsageError,
)
from superweights.model import experts
from superweights.model.architecture import Architecture, DownProjection, read_architecture
from superweights.model.streaming import NonFinite, StreamedWeights
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
    ) -> None:
        """Runs the decoder layers up to `last_layer` on [prompts, tokens]; hooks see what happens, nothing is returned.

        Raises:
            UsageError: the model has no such last layer.
            ModelError: the model's own code failed.
        """
        final = self.architecture.layer_count - 1
        self._last_layer = final if last_layer is None else last_layer
        if not 0 <= self._last_layer <= final:
            raise UsageError(f"Running {self.name} up to layer {last_layer}: its layers are 0 to {final}.")
        self._progress = progress
        progress.start("forward pass", total=self._last_layer + 1, unit="layers")
        masked = {} if attention_mask is None else {"attention_mask": attention_mask}
        try:
            with torch.no_grad():
                self.decoder(input_ids=input_ids, use_cache=False, **masked)
        except _LastLayerDone:
            pass
        except SuperweightsError:
            raise
        except Exception as error:
            outside = [name for name, each in self.outside_layers() if each.is_meta]
            absent = f" The checkpoint has no tensor for {', '.join(outside[:5])}." if outside else ""
            raise ModelError(
                f"Running {self.name}: the forward pass of {type(self.decoder).__name__} failed with "
                f"{type(error).__name__}: {error}{absent}"
            ) from error
        finally:
            progress.finish()
            self._abandon_pass()

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
        originals: list[tuple[torch.Tensor, tuple[int, ...], torch.Tensor]] = []
        try:
            if self._streamed:
                self._factors = [*before, *factors.items()]
            else:
                for coordinate, factor in factors.items():
                    originals.append(self._scale(coordinate, factor))
            yield
        finally:
            self._factors = before
            for parameter, index, original in reversed(originals):
                parameter[index] = original

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
        if layer >= self._last_layer:
            raise _LastLayerDone

    def _attach(self, weights: StreamedWeights, layer: int) -> None:
        weights.attach_layer(layer)
        for coordinate, factor in self._factors:
            if coordinate.layer == layer:
                self._scale(coordinate, factor)

    def _abandon_pass(self) -> None:
        """Leaves nothing attached and nothing being read, also after an error half-way."""
        ahead, self._ahead = self._ahead, None
        try:
            if ahead is not None:
                ahead[1].exception()
        finally:
            if self._streamed:
                for layer in range(self.architecture.layer_count):
                    if any(not each.is_meta for each in self.layer(layer).parameters()):
                        self._streamed.detach_layer(layer)

    def _scale(self, coordinate: Coordinate, factor: float) -> tuple[torch.Tensor, tuple[int, ...], torch.Tensor]:
        """Scales an attached weight; gives its parameter, its index and its original value."""
        projection = self.architecture.locate(coordinate)
        parameter, index = self._parameter(projection), projection.index(coordinate)
        original = parameter[index].clone()
        parameter[index] *= factor
        if torch.equal(parameter[index], original):
            raise UsageError(
                f"Scaling {coordinate} of {self.name} by {factor:g} changes nothing: the weight is {original.item():g}. "
                "Choose another weight or factor."
            )
        return parameter, index, original

    def _parameter(self, projection: DownProjection) -> torch.Tensor:
        parameter: torch.Tensor = self.model.get_parameter(projection.name).data
        return parameter


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
        model: a directory, a Hub name, an fsspec URL, or a transformers model that is already in memory.
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
    checkpoint = Checkpoint.open(reference)
    try:
        weights = StreamedWeights(checkpoint, nonfinite=nonfinite, compute=compute, trust_remote_code=trust_remote_code)
        tokenizer = tokenizer or _tokenizer(checkpoint.directory, trust_remote_code=trust_remote_code)
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


def _tokenizer(directory: Path, *, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    if (
        not any(directory.glob("tokenizer*"))
        and not any(directory.glob("vocab*"))
        and not any(directory.glob("*.model"))
    ):
        return None
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise RemoteCodeError(
                f"The tokenizer in {directory} needs Python code of its own, which is not run unless you allow it: read that "
                "code, then pass --trust-remote-code (trust_remote_code=True in Python)."
            ) from error
        raise MalformedFileError(
            f"The tokenizer files in {directory} cannot be read: {type(error).__name__}: {error}. Replace them; without any "
            "tokenizer file, fixed token ids stand in for the prompts."
        ) from error
