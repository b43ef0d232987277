"""Bytes on disk, on the Hub or behind a URL: headers, scalars, tensors. No forward pass, no torch at import."""

from superweights.checkpoint.checkpoint import Checkpoint
from superweights.checkpoint.header import TensorEntry
from superweights.checkpoint.quantized import quantization_of
from superweights.checkpoint.reference import ModelReference
from superweights.checkpoint.scalars import StoredScalar

__all__ = ["Checkpoint", "ModelReference", "StoredScalar", "TensorEntry", "quantization_of"]
