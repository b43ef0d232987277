"""Which files of a model hold its weights, decided from names and the index file alone.

One rule serves a local directory, a Hub repository and a URL: each gives the names of its files and a way to read one.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import PurePosixPath

from superweights.checkpoint.header import TensorEntry, load_json
from superweights.errors import (
    CheckpointError,
    MalformedFileError,
    MissingTensorError,
    NotACheckpointError,
    PickleCheckpointError,
)

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OTHER_FORMATS = {".gguf": "GGUF", ".h5": "TensorFlow", ".msgpack": "Flax", ".onnx": "ONNX"}


@dataclass(frozen=True, slots=True)
class Shards:
    """The weight files of one model."""

    files: tuple[str, ...]
    """Their names, sorted."""
    weight_map: dict[str, str] | None = None
    """Which file holds which tensor, where an index says so."""
    index: str | None = None
    """The name of that index."""


def choose_shards(names: Collection[str], read: Callable[[str], bytes], *, where: str) -> Shards:
    """Finds the weight files among `names`, in the order of preference of transformers.

    Args:
        names: the files beside config.json.
        read: gives the content of one of them.
        where: the model, for messages.

    Raises:
        NotACheckpointError: no weights, or weights of another kind.
        PickleCheckpointError: the weights are there only as pickles.
        MalformedFileError, MissingTensorError: the index is broken or names a file that is not there.
    """
    if _WHOLE in names:
        return Shards((_WHOLE,))
    indices = sorted(name for name in names if name.endswith(".safetensors.index.json"))
    if _INDEX in names or len(indices) == 1:
        return _indexed(_INDEX if _INDEX in names else indices[0], names, read, where)
    plain = sorted(name for name in names if name.endswith(".safetensors"))
    models = [name for name in plain if not name.startswith(("adapter", "consolidated"))] or plain
    if models == ["adapter_model.safetensors"]:
        raise NotACheckpointError(
            f"{where} holds only an adapter (adapter_model.safetensors). Merge it into its model and save that."
        )
    if len(models) == 1 and not _NUMBERED.fullmatch(models[0]):
        return Shards((models[0],))
    if models:
        return _numbered(models, where)
    raise _no_weights(names, where)


def is_one_of_many(name: str) -> bool:
    """Whether a file's name says that it is one shard of several.

    Example:
        >>> is_one_of_many("model-00001-of-00002.safetensors")
        True
    """
    match = _NUMBERED.fullmatch(name)
    return match is not None and int(match["count"]) > 1


def join_headers(shards: Shards, headers: dict[str, dict[str, TensorEntry]]) -> dict[str, TensorEntry]:
    """Puts the headers of all shards together and checks them against the index.

    Args:
        shards: the files and their index.
        headers: the tensors of each file.

    Raises:
        MissingTensorError: the index names a tensor that its file does not hold.
        MalformedFileError: two files hold one tensor and no index says which counts.
    """
    tensors: dict[str, TensorEntry] = {}
    chosen = shards.weight_map or {}
    for file in shards.files:
        for name, entry in headers[file].items():
            if name in tensors and name not in chosen:
                raise MalformedFileError(
                    f"Tensor {name!r} is in {tensors[name].file} and in {file}. Remove one of them."
                )
            if chosen.get(name, file) == file:
                tensors[name] = entry
    missing = [name for name in chosen if name not in tensors]
    if missing:
        raise MissingTensorError(
            f"{shards.index} says that tensor {missing[0]!r} is in {chosen[missing[0]]}, which does not hold it "
            f"({len(missing)} such tensors). The files are of different versions; download them again."
        )
    return tensors


def _indexed(index: str, names: Collection[str], read: Callable[[str], bytes], where: str) -> Shards:
    content = load_json(read(index), file=f"{where}: {index}")
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise MalformedFileError(f"{where}: {index} has no weight_map from tensor names to file names.")
    files = sorted(set(weight_map.values()))
    for file in files:
        if not _stays_inside(file):
            raise MalformedFileError(
                f"{where}: {index} names the file {file!r}, which lies outside the checkpoint. It is not followed."
            )
    absent = [file for file in files if file not in names]
    if absent:
        raise MissingTensorError(
            f"{where}: {index} names {absent[0]}, which is not there ({len(absent)} of {len(files)} shards are "
            "missing). Download the missing files."
        )
    if not files:
        raise NotACheckpointError(f"{where}: {index} lists no tensor.")
    return Shards(tuple(files), weight_map, index)


def _stays_inside(file: str) -> bool:
    path = PurePosixPath(file)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in file and ":" not in file


def _numbered(names: list[str], where: str) -> Shards:
    matches = [_NUMBERED.fullmatch(name) for name in names]
    sets = {(match["stem"], match["count"]) for match in matches if match}
    if len(sets) != 1 or None in matches:
        raise NotACheckpointError(
            f"{where} has no {_INDEX}, and its .safetensors files are not one set of shards: {', '.join(names[:5])}. "
            "Give the one file that is the model."
        )
    stem, count = sets.pop()
    wanted = [f"{stem}-{number:05d}-of-{count}.safetensors" for number in range(1, int(count) + 1)]
    absent = [name for name in wanted if name not in names]
    if absent:
        raise MissingTensorError(
            f"{where} lacks {absent[0]} ({len(absent)} of {int(count)} shards are missing). Download the missing files."
        )
    return Shards(tuple(wanted))


def _no_weights(names: Collection[str], where: str) -> CheckpointError:
    pickles = sorted(name for name in names if name.endswith(_PICKLES) and not name.startswith("training_args"))
    if pickles:
        return PickleCheckpointError(
            f"{where} has its weights only as pickles ({', '.join(pickles[:3])}), which can run code when loaded and "
            "are never loaded here. Convert them: where you trust the file, load the model with transformers and call "
            "save_pretrained(folder), or use the Hub's space safetensors/convert; then give the result."
        )
    for ending, kind in _OTHER_FORMATS.items():
        others = sorted(name for name in names if name.endswith(ending))
        if others and kind == "GGUF":
            return NotACheckpointError(
                f"{where} holds GGUF weights ({', '.join(others[:3])}) and no .safetensors. Give the .gguf file itself; one on "
                "the Hub has to be downloaded first."
            )
        if others:
            return NotACheckpointError(
                f"{where} holds {kind} weights ({others[0]}) and no .safetensors. "
                "Give the safetensors checkpoint it was made from."
            )
    return NotACheckpointError(
        f"{where} holds no .safetensors weights. Found: {', '.join(sorted(names)[:8]) or 'nothing'}."
    )
