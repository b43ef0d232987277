import json

import pytest

from superweights.checkpoint import TensorEntry
from superweights.checkpoint.shards import Shards, choose_shards, join_headers
from superweights.errors import (
    CheckpointError,
    MalformedFileError,
    MissingTensorError,
    NotACheckpointError,
    PickleCheckpointError,
)

INDEX = "model.safetensors.index.json"
TWO = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def choose(names: list[str], index: object = None) -> Shards:
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    return choose_shards(names, lambda name: text, where="the model")


def indexed(files: list[object]) -> dict[str, object]:
    return {"weight_map": {f"tensor{number}": file for number, file in enumerate(files)}}


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (["config.json", "model.safetensors"], ["model.safetensors"]),
        (["model.safetensors", INDEX, *TWO], ["model.safetensors"]),
        ([INDEX, *TWO, "consolidated.safetensors", "pytorch_model.bin"], TWO),
        (["other.safetensors.index.json", *TWO], TWO),
        (TWO, TWO),
        (["weights.safetensors"], ["weights.safetensors"]),
        (["weights.safetensors", "adapter_model.safetensors"], ["weights.safetensors"]),
        (["weights.safetensors", "adapter/adapter_model.safetensors"], ["weights.safetensors"]),
        (["model.safetensors", "adapter/adapter_model.safetensors"], ["model.safetensors"]),
        (["consolidated.safetensors"], ["consolidated.safetensors"]),
        (["model-00001-of-00001.safetensors"], ["model-00001-of-00001.safetensors"]),
    ],
)
def test_the_files_that_count(names: list[str], files: list[str]) -> None:
    assert list(choose(names, indexed(list(TWO))).files) == files


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        (["config.json"], NotACheckpointError, r"holds no \.safetensors weights\. Found: config\.json"),
        ([], NotACheckpointError, "Found: nothing"),
        (["pytorch_model-00001-of-00002.bin"], PickleCheckpointError, "never loaded"),
        (["model.ckpt"], PickleCheckpointError, "model.ckpt"),
        (["training_args.bin"], NotACheckpointError, "no .safetensors"),
        (["model.Q4_K_M.gguf"], NotACheckpointError, "GGUF"),
        (["tf_model.h5"], NotACheckpointError, "TensorFlow"),
        (["adapter_model.safetensors"], NotACheckpointError, "only an adapter"),
        (["a.safetensors", "b.safetensors"], NotACheckpointError, "not one set of shards"),
        (TWO[1:], MissingTensorError, "lacks model-00001-of-00002"),
    ],
)
def test_files_that_are_no_weights(names: list[str], error: type[CheckpointError], words: str) -> None:
    with pytest.raises(error, match=words):
        choose(names)


@pytest.mark.parametrize(
    ("index", "error", "words"),
    [
        (b"{", MalformedFileError, "not JSON"),
        ([], MalformedFileError, "list"),
        ({}, MalformedFileError, "no weight_map"),
        ({"weight_map": [1]}, MalformedFileError, "no weight_map"),
        (indexed([3]), MalformedFileError, "no weight_map"),
        (indexed([]), NotACheckpointError, "lists no tensor"),
        (indexed(["../secret.safetensors"]), MalformedFileError, "outside the checkpoint"),
        (indexed(["a/../../secret.safetensors"]), MalformedFileError, "outside the checkpoint"),
        (indexed(["/etc/secret.safetensors"]), MalformedFileError, "outside the checkpoint"),
        (indexed(["C:\\secret.safetensors"]), MalformedFileError, "outside the checkpoint"),
        (indexed(["..\\secret.safetensors"]), MalformedFileError, "outside the checkpoint"),
        (indexed([*TWO, "model-00003-of-00003.safetensors"]), MissingTensorError, "1 of 3 shards"),
    ],
)
def test_a_broken_index(index: object, error: type[CheckpointError], words: str) -> None:
    with pytest.raises(error, match=words):
        choose([INDEX, *TWO], index)


def entries(file: str, *names: str) -> dict[str, TensorEntry]:
    return {name: TensorEntry(name, file, "U8", (1,), 8, 9) for name in names}


def test_an_index_that_names_a_tensor_its_file_lacks() -> None:
    shards = Shards(("a", "b"), {"x": "a", "y": "b"}, INDEX)
    with pytest.raises(MissingTensorError, match=r"'y' is in b, which does not hold it \(1 such"):
        join_headers(shards, {"a": entries("a", "x", "y"), "b": entries("b", "z")})


def test_the_index_decides_between_two_files() -> None:
    shards = Shards(("a", "b"), {"x": "b"}, INDEX)
    joined = join_headers(shards, {"a": entries("a", "x", "extra"), "b": entries("b", "x")})
    assert {name: entry.file for name, entry in joined.items()} == {"x": "b", "extra": "a"}


def test_one_tensor_in_two_files_without_an_index() -> None:
    with pytest.raises(MalformedFileError, match="'x' is in a and in b"):
        join_headers(Shards(("a", "b")), {"a": entries("a", "x"), "b": entries("b", "x")})
