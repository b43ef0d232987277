"""Opens any model that can be read, quantized or not, as a checkpoint whose matrices are values.

Plain safetensors need neither torch nor transformers for that.
"""

from pathlib import Path

from superweights.checkpoint.checkpoint import Checkpoint
from superweights.checkpoint.quantized import packing_of
from superweights.checkpoint.reference import ModelReference


def open_dequantized(reference: str | Path | ModelReference, *, revision: str | None = None) -> Checkpoint:
    """Opens a model; packed matrices are dequantized when they are viewed.

    Args:
        reference: what `Checkpoint.open` takes, or a .gguf file.
        revision: branch, tag or commit of a Hub repository.

    Raises:
        CheckpointError: its files cannot be used, or its packed format is not read.
        UsageError: a .gguf file needs the package gguf, which is not installed.
    """
    parsed = ModelReference.parse(reference, revision=revision)
    if parsed.place == "path" and parsed.path.suffix.lower() == ".gguf" and parsed.path.is_file():
        from superweights.checkpoint.gguf_file import open_gguf

        return open_gguf(parsed)
    checkpoint = Checkpoint.open(parsed)
    if packing_of(checkpoint.config, checkpoint.tensors) is None:
        return checkpoint
    try:
        from superweights.checkpoint.packed.unpacked import UnpackedCheckpoint

        return UnpackedCheckpoint(checkpoint)
    except BaseException:
        checkpoint.close()
        raise
