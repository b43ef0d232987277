"""Other quantizers, run through their own packages, and scored as our own models are.

One function for each way to quantize: it reads a directory of Hugging Face, lets the package round the linear layers to
4 bits, leaves embedding and head alone, and gives a transformers model that runs on the CPU. What a package needs beyond
that is said where it is done. None of them is a dependency: several pin other versions of torch or transformers, so each is
best installed in an environment of its own, beside superweights.
"""

# mypy: disable-error-code="import-not-found"

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from superweights.errors import ModelError, UnknownNameError, UsageError
from superweights.experiments.evaluation import TOKENS_PER_PASS, Evaluation, evaluate_in_parts, measurement
from superweights.interventions.conditions import ORIGINAL, Condition, LoadWeights
from superweights.measurements.intervals import exact
from superweights.measurements.scores import Scores, score_states
from superweights.measurements.windows import DEFAULT_LENGTH, Windows
from superweights.model.loading import LoadedModel
from superweights.results.records import MeasurementRecord

GROUP = 128
"""Weights of a row that share a scale, where the package lets us choose."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One way in which another package quantizes a model to 4 bits."""

    name: str
    """What it is called here."""
    package: str
    """What pip installs."""
    module: str
    """What Python imports."""
    does: str
    """The method in words."""
    bits_per_weight: float
    """Stored bits of a quantized weight of a 16-bit checkpoint, with its share of scales and zero points."""
    calibrated: bool
    """Whether it needs text."""
    quantize: "Quantize"
    """Gives the quantized model of a directory."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a peer quantizes."""

    directory: Path
    """Holds config.json, weights and tokenizer."""
    dtype: torch.dtype
    """What weights are read as, and products are made in."""
    rows: tuple[list[int], ...]
    """Token ids of each calibration text."""

    def model(self, **options: Any) -> Any:
        """The transformers model, not yet quantized unless the options say so."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.directory, dtype=self.dtype, **options).eval()

    def tokenizer(self) -> Any:
        """Its tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.directory)


Quantize = Callable[[Source], Any]


def quantized_by(
    name: str,
    model: LoadedModel | Path,
    *,
    calibration: Sequence[str] | torch.Tensor = (),
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Lets another package quantize the decoder layers of a model to 4 bits.

    Args:
        name: which of `PEERS`.
        model: a local directory with config.json, weights and tokenizer, or a model that was loaded from one. Edits of a loaded
            model are not seen.
        calibration: texts, or token ids [texts, tokens], for the peers that are calibrated; others ignore it. A text that is
            longer than 2048 tokens loses its end.
        dtype: what weights are read as, and products are made in. float32, which is what a loaded model computes in, leaves
            quantization as the only difference; scales and zero points are then float32 too, where the package does not fix
            their dtype.

    Returns:
        A transformers model in evaluation mode, on the CPU.

    Raises:
        UnknownNameError: there is no such peer.
        UsageError: the package is not installed, calibration is missing, or the weights are not in a local directory.
        ModelError: the package refuses this model.
    """
    if name not in PEERS:
        raise UnknownNameError.among("peer", name, PEERS)
    peer = PEERS[name]
    directory = _directory(model)
    if peer.calibrated and not len(calibration):
        raise UsageError(f"Quantizing {directory} by {name} needs text to calibrate with: pass calibration.")
    try:
        import_module(peer.module)
    except ImportError as error:
        raise UsageError(
            f"Quantizing by {name} needs {peer.module}, which cannot be imported: {error}. `pip install {peer.package}`, best "
            "in an environment of its own beside superweights."
        ) from error
    try:
        made: nn.Module = peer.quantize(Source(directory, dtype, _rows(directory, calibration)))
    except Exception as error:
        raise ModelError(
            f"Quantizing {directory} by {name} ({peer.does}): {type(error).__name__}: {error}. See what {peer.module} says of "
            "models that it takes; groups must divide the width of every linear layer."
        ) from error
    return made.eval()


def score_peer(peer: nn.Module, original: LoadedModel, windows: Windows) -> Scores:
    """Scores a quantized model against the original, with the definitions of `evaluate`.

    Args:
        peer: a transformers model with the modules of the original, whatever its linear layers have become.
        original: the model before it was quantized, without edits.
        windows: the text.

    Returns:
        One condition, the peer: [1, windows] each.

    Raises:
        UsageError: the peer has other modules than the original.
        ModelError: the code of either model failed.
    """
    architecture = original.architecture
    modules = dict(peer.named_modules())
    absent = [each for each in (architecture.decoder, architecture.layers) if each not in modules]
    if absent:
        raise UsageError(
            f"Scoring {type(peer).__name__} against {original.name}: it has no module {' and no module '.join(absent)}. Give "
            "the transformers model itself, quantized from this original."
        )
    rows = max(1, TOKENS_PER_PASS // windows.length)
    wrapped = LoadedModel(
        f"{original.name}, quantized", peer, architecture, tokenizer=None, weights=None, residency="resident"
    )
    with wrapped:
        parts = [
            score_states(wrapped, wrapped.states(ids)[None], ids, original.states(ids), reference_model=original)
            for ids in torch.split(windows.ids, rows)
        ]
    return Scores.joined(parts, dim=1)


def peer_records(
    name: str, original: LoadedModel, windows: Windows, calibration: torch.Tensor
) -> Iterator[MeasurementRecord]:
    """Perplexity, KL, agreement and bits per weight of what a peer makes of a model.

    Args:
        name: which of `PEERS`.
        original: the model, from a local directory.
        windows: the text that is scored.
        calibration: token ids [texts, tokens] of other text.

    Raises:
        UnknownNameError, UsageError, ModelError: see `quantized_by` and `score_peer`.
    """
    peer = PEERS[name]
    made = quantized_by(name, original, calibration=calibration)
    condition = Condition(f"{name}, peer", (LoadWeights(f"{peer.package}: {peer.does}", lambda _: None),))
    before = Scores.joined(list(evaluate_in_parts(original, windows, [ORIGINAL])), dim=1)
    scores = Scores.joined([before, score_peer(made, original, windows)], dim=0)
    yield from Evaluation((ORIGINAL, condition), scores, windows).records_of(condition)
    yield measurement("bits_per_weight", exact(peer.bits_per_weight), unit="bits", condition=condition)


def _directory(model: LoadedModel | Path) -> Path:
    if isinstance(model, Path):
        return model
    checkpoint = model.checkpoint
    if checkpoint is None or checkpoint.reference.place != "path":
        raise UsageError(
            f"Quantizing {model.name} by another package: its weights are not in a local directory. Save it to one with "
            "save_pretrained, its tokenizer too, and give that."
        )
    return checkpoint.directory


def _rows(directory: Path, calibration: Sequence[str] | torch.Tensor) -> tuple[list[int], ...]:
    if isinstance(calibration, torch.Tensor):
        return tuple(calibration.tolist())
    if not calibration:
        return ()
    tokenizer = Source(directory, torch.float32, ()).tokenizer()
    return tuple(tokenizer(each, verbose=False)["input_ids"][:DEFAULT_LENGTH] for each in calibration)


def _head(model: Any) -> list[str]:
    """Name of the layer that makes logits, which stays as it is."""
    return [name for name, each in model.named_modules() if each is model.get_output_embeddings()]


def _torchao(source: Source) -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    model = source.model()
    head = _head(model)
    # Int4WeightOnlyConfig packs, but needs kernels that are not in the package; this one runs anywhere.
    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))  # type: ignore[attr-defined]
    quantize_(model, config, filter_fn=lambda each, name: isinstance(each, nn.Linear) and name not in head)
    return model


def _bitsandbytes(source: Source) -> Any:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=source.dtype)
    return source.model(quantization_config=config, device_map="cpu")


def _hqq(source: Source) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig
    from hqq.models.hf.base import AutoHQQHFModel

    model = source.model()
    config = BaseQuantizeConfig(nbits=4, group_size=GROUP, axis=1)
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=source.dtype, device="cpu")
    return model


def _quanto(source: Source) -> Any:
    from optimum.quanto import freeze, qint4, quantize

    model = source.model()
    quantize(model, weights=qint4, exclude=_head(model))
    freeze(model)
    return model


def _llmcompressor_rtn(source: Source) -> Any:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return _compressed(source, QuantizationModifier)


def _llmcompressor_gptq(source: Source) -> Any:
    from llmcompressor.modifiers.quantization import GPTQModifier

    return _compressed(source, GPTQModifier)


def _llmcompressor_awq(source: Source) -> Any:
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if torch.accelerator.is_available():
        return _compressed(source, QuantizationModifier, AWQModifier())
    # It pins activations for the way to an accelerator even where there is none, which torch refuses.
    with patch.object(IntermediatesCache, "pin_memory", lambda *_: None):
        return _compressed(source, QuantizationModifier, AWQModifier())


def _compressed(source: Source, rounding: Any, *before: Any) -> Any:
    """What llm-compressor makes of a model with its scheme W4A16: symmetric, groups of 128."""
    from llmcompressor import oneshot

    model = source.model()
    text = {}
    if source.rows:
        from datasets import Dataset

        rows = {"input_ids": source.rows, "attention_mask": [[1] * len(each) for each in source.rows]}
        text = {
            "dataset": Dataset.from_dict(rows),
            "num_calibration_samples": len(source.rows),
            "max_seq_length": max(map(len, source.rows)),
        }
    oneshot(model=model, recipe=[*before, rounding(targets="Linear", scheme="W4A16", ignore=_head(model))], **text)
    return model


def _gptqmodel_rtn(source: Source) -> Any:
    from gptqmodel.quantization.config import RTNConfig

    return _repacked(source, RTNConfig, None)


def _gptqmodel_gptq(source: Source) -> Any:
    from gptqmodel import QuantizeConfig

    return _repacked(
        source, QuantizeConfig, [{"input_ids": each, "attention_mask": [1] * len(each)} for each in source.rows]
    )


def _repacked(source: Source, config: Any, rows: Any) -> Any:
    """What GPT-QModel makes of a model: its layers compute rightly only after they were saved and loaded again."""
    # Two workers load layers, but it starts one where there are two cores, and then refuses to work.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import BACKEND, GPTQModel

    made = GPTQModel.load(str(source.directory), config(bits=4, group_size=GROUP, device="cpu"), dtype=source.dtype)
    made.quantize(rows, batch_size=1)
    with TemporaryDirectory() as directory:
        made.save(directory)
        model = GPTQModel.load(directory, device="cpu", backend=BACKEND.TORCH).model
    if source.dtype in (torch.bfloat16, torch.float16):
        return model
    # Its kernels for the CPU take 16-bit activations only.
    for name, layer in [each for each in model.named_modules() if hasattr(each[1], "dequantize_weight")]:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight.data = layer.dequantize_weight().T.contiguous()
        if layer.bias is not None:
            plain.bias.data = layer.bias
        model.set_submodule(name, plain)
    return model.to(source.dtype)


def _auto_round_rtn(source: Source) -> Any:
    return _auto_rounded(source, iters=0, disable_opt_rtn=True)


def _auto_round(source: Source) -> Any:
    rows = [torch.tensor([each]) for each in source.rows]
    length = min(map(len, source.rows))
    return _auto_rounded(source, dataset=rows, nsamples=len(rows), seqlen=length, batch_size=min(8, len(rows)))


def _auto_rounded(source: Source, **options: Any) -> Any:
    """What auto-round makes of a model with its scheme W4A16: symmetric, groups of 128."""
    from auto_round import AutoRound

    model = source.model()
    quantizer = AutoRound(
        model, tokenizer=source.tokenizer(), scheme="W4A16", device_map="cpu", enable_torch_compile=False, **options
    )
    quantizer.quantize()
    return model.to(source.dtype)


def _gguf(source: Source) -> Any:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    model = source.model()
    head = _head(model)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name not in head:
            stored = quantize(layer.weight.detach().float().numpy(), GGMLQuantizationType.Q4_0)
            layer.weight.data = torch.from_numpy(dequantize(stored, GGMLQuantizationType.Q4_0)).to(source.dtype)
    return model


_ROWS = (
    Peer("torchao", "torchao", "torchao", "RTN int4 held in int8, group 128", 8.1875, False, _torchao),
    Peer("bitsandbytes", "bitsandbytes accelerate", "bitsandbytes", "nf4, blocks of 64", 4.5, False, _bitsandbytes),
    Peer("hqq", "hqq", "hqq", "half-quadratic int4 with zero point, group 128", 4.25, False, _hqq),
    Peer("quanto", "optimum-quanto", "optimum.quanto", "RTN int4 with zero point, group 128", 4.25, False, _quanto),
    Peer("llmcompressor-rtn", "llmcompressor", "llmcompressor", "RTN int4, group 128", 4.125, False, _llmcompressor_rtn),
    Peer("llmcompressor-gptq", "llmcompressor", "llmcompressor", "GPTQ int4, group 128", 4.125, True, _llmcompressor_gptq),
    Peer("llmcompressor-awq", "llmcompressor", "llmcompressor", "AWQ int4, group 128", 4.125, True, _llmcompressor_awq),
    Peer("gptqmodel-rtn", "gptqmodel", "gptqmodel", "RTN int4, group 128", 4.15625, False, _gptqmodel_rtn),
    Peer("gptqmodel-gptq", "gptqmodel", "gptqmodel", "GPTQ int4, group 128", 4.15625, True, _gptqmodel_gptq),
    Peer("auto-round-rtn", "auto-round", "auto_round", "RTN int4, group 128", 4.15625, False, _auto_round_rtn),
    Peer("auto-round", "auto-round", "auto_round", "SignRound int4, group 128, 200 steps", 4.15625, True, _auto_round),
    Peer("gguf-q4_0", "gguf", "gguf", "llama.cpp's Q4_0: RTN int4, group 32", 4.5, False, _gguf),
)  # fmt: skip

PEERS: Mapping[str, Peer] = MappingProxyType({each.name: each for each in _ROWS})
"""The ways to quantize, by name."""
