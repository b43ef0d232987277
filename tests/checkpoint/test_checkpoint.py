import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from broken_files import fields, raw_file

from superweights.checkpoint import Checkpoint, ModelReference
from superweights.checkpoint.dtypes import STORAGE_TYPES
from superweights.errors import (
    CoordinateError,
    MalformedFileError,
    MissingTensorError,
    NotACheckpointError,
    QuantizedCheckpointError,
    UsageError,
)

WriteModel = Callable[..., Path]

IN_TORCH = [each for each in STORAGE_TYPES.values() if each.torch and hasattr(torch, each.torch)]


def matrix(rows: int = 3000, cols: int = 5) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("storage", IN_TORCH, ids=lambda each: each.name)
def test_a_view_has_the_saved_values(write_model: WriteModel, storage: Any) -> None:
    saved = (matrix(7, 3) * 3).to(getattr(torch, storage.torch))
    with Checkpoint.open(write_model({"first": torch.zeros(1), "w": saved})) as checkpoint:
        assert checkpoint.tensors["w"].dtype == storage.name
        view = checkpoint.view("w")
        assert view.dtype == saved.dtype
        assert torch.equal(view.view(torch.uint8), saved.view(torch.uint8))
        if storage.name != "C64":
            expected = saved.float().numpy()
            np.testing.assert_array_equal(checkpoint.read_row("w", ()), expected)
            np.testing.assert_array_equal(checkpoint.read_row("w", (2,)), expected[2])
            assert checkpoint.read_scalar("w", (4, 1)).value == saved[4, 1].to(torch.float64).item()


def test_views_of_several_shards_with_an_index(sharded: Path) -> None:
    with Checkpoint.open(sharded) as checkpoint:
        assert len(checkpoint.tensors) == 6
        assert checkpoint.nbytes == 6 * 1024 * 768 * 2
        checkpoint.fetch(checkpoint.tensors)
        from safetensors.torch import load_file

        for file in sharded.glob("*.safetensors"):
            assert all(torch.equal(checkpoint.view(name), saved) for name, saved in load_file(file).items())
        assert (checkpoint.bytes_fetched, checkpoint.requests, checkpoint.revision) == (0, 0, None)


def test_an_edit_stays_in_memory_and_drop_undoes_it(write_model: WriteModel) -> None:
    saved = {"a": matrix(), "b": matrix(), "c": matrix()}
    directory = write_model(saved)
    stored = (directory / "model.safetensors").read_bytes()
    with Checkpoint.open(directory) as checkpoint:
        views = {name: checkpoint.view(name) for name in saved}
        for view in views.values():
            view[0, 0] = view[1500, 2] = view[-1, -1] = 77.0
        assert (directory / "model.safetensors").read_bytes() == stored
        assert checkpoint.read_scalar("b", (0, 0)).value == saved["b"][0, 0].item()
        assert checkpoint.view("b")[0, 0] == 77.0
        checkpoint.drop(["b"])
        assert torch.equal(views["b"], saved["b"])
        for neighbour in ("a", "c"):
            assert (views[neighbour] == 77.0).sum() == 3
        checkpoint.drop(["a", "c"])
        assert all(torch.equal(views[name], saved[name]) for name in saved)


def test_drop_undoes_edits_of_tensors_smaller_than_a_page(write_model: WriteModel) -> None:
    saved = {name: torch.full((3,), 1.0) for name in "abc"}
    with Checkpoint.open(write_model(saved)) as checkpoint:
        for name in saved:
            checkpoint.view(name).fill_(5.0)
        checkpoint.drop(["b"])
        assert [checkpoint.view(name)[0].item() for name in "abc"] == [5.0, 1.0, 5.0]


def test_drop_before_anything_was_mapped_does_nothing(write_model: WriteModel) -> None:
    with Checkpoint.open(write_model({"w": matrix()})) as checkpoint:
        checkpoint.drop(["w"])
        assert torch.equal(checkpoint.view("w"), matrix())


def test_views_outlive_the_checkpoint(write_model: WriteModel) -> None:
    with Checkpoint.open(write_model({"w": matrix()})) as checkpoint:
        view = checkpoint.view("w")
    assert torch.equal(view, matrix())
    for use in (checkpoint.view, lambda name: checkpoint.read_row(name, ()), lambda name: checkpoint.fetch([name])):
        with pytest.raises(ValueError, match="closed"):
            use("w")


def test_a_tensor_that_is_not_aligned_is_copied(write_model: WriteModel) -> None:
    values = np.arange(4, dtype="<f4").tobytes()
    header = json.dumps({"odd": fields("U8", [1], 0, 1), "w": fields("F32", [2, 2], 1, 17)}).encode()
    padded = header + b" " * (-len(header) % 8)
    with Checkpoint.open(write_model(raw_file(padded, b"\7" + values))) as checkpoint:
        assert checkpoint.tensors["w"].start % 4 == 1
        assert checkpoint.view("w").tolist() == [[0.0, 1.0], [2.0, 3.0]]


def test_tensors_without_elements(write_model: WriteModel) -> None:
    with Checkpoint.open(write_model({"none": torch.zeros(0, 4), "scalar": torch.tensor(2.5)})) as checkpoint:
        assert checkpoint.view("none").shape == (0, 4)
        assert checkpoint.view("scalar").item() == 2.5
        assert checkpoint.read_scalar("scalar", ()).value == 2.5
        checkpoint.fetch(["none", "scalar"])
        checkpoint.drop(["none", "scalar"])
        assert list(checkpoint.iter_rows("none")) == []


def test_formats_that_torch_lacks_are_refused_by_view_only(write_model: WriteModel) -> None:
    with Checkpoint.open(write_model(raw_file({"w": fields("F6_E2M3", [4], 0, 3)}, bytes(3)))) as checkpoint:
        checkpoint.fetch(["w"])
        with pytest.raises(QuantizedCheckpointError, match="F6_E2M3"):
            checkpoint.view("w")


@pytest.mark.parametrize("rows_per_chunk", [1, 7, 3000, 5000, None])
def test_rows_come_in_chunks(write_model: WriteModel, rows_per_chunk: int | None) -> None:
    with Checkpoint.open(write_model({"w": matrix().bfloat16()})) as checkpoint:
        chunks = list(checkpoint.iter_rows("w", rows_per_chunk=rows_per_chunk))
        assert [first for first, _ in chunks] == list(range(0, 3000, rows_per_chunk or 3000))
        whole = np.concatenate([rows for _, rows in chunks])
        np.testing.assert_array_equal(whole, matrix().bfloat16().float().numpy())


def test_packed_experts_are_read_by_leading_indices(write_model: WriteModel) -> None:
    packed = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    with Checkpoint.open(write_model({"w": packed})) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read_row("w", (2, 1)), packed[2, 1].numpy())
        ((first, rows),) = checkpoint.iter_rows("w", prefix=(1,))
        assert first == 0
        np.testing.assert_array_equal(rows, packed[1].numpy())
        assert checkpoint.read_scalar("w", (2, 3, 4)).value == packed[2, 3, 4].item()


def test_where_a_scalar_lies_in_the_file(write_model: WriteModel) -> None:
    directory = write_model({"w": matrix(20).bfloat16()})
    with Checkpoint.open(directory) as checkpoint:
        scalar = checkpoint.read_scalar("w", (7, 3))
    raw = (directory / scalar.file).read_bytes()[scalar.offset : scalar.offset + 2]
    assert int.from_bytes(raw, "little") == scalar.bits


@pytest.mark.parametrize("index", [(20, 0), (0, 5), (-1, 0), (0,), (0, 0, 0), ()])
def test_an_index_that_does_not_fit(write_model: WriteModel, index: tuple[int, ...]) -> None:
    with Checkpoint.open(write_model({"w": matrix(20)})) as checkpoint, pytest.raises(CoordinateError, match="'w'"):
        checkpoint.read_scalar("w", index)


def test_an_unknown_tensor_names_near_ones(sharded: Path) -> None:
    with Checkpoint.open(sharded) as checkpoint:
        for use in (checkpoint.view, checkpoint.entry, lambda name: checkpoint.fetch([name])):
            with pytest.raises(MissingTensorError, match=r"Did you mean 'layer\.\d\.down'"):
                use("layers.2.down")


def test_the_digest_is_of_headers_sizes_and_commit(write_model: WriteModel) -> None:
    def digest(tensors: dict[str, torch.Tensor], folder: str) -> str:
        with Checkpoint.open(write_model(tensors, folder=folder)) as checkpoint:
            return checkpoint.digest

    same = digest({"w": torch.zeros(4)}, "a")
    assert same == digest({"w": torch.ones(4)}, "b")
    assert len(same) == 64
    assert len({same, digest({"v": torch.zeros(4)}, "c"), digest({"w": torch.zeros(2, 2)}, "d")}) == 3


def test_a_file_that_shrinks_while_open_is_named(write_model: WriteModel) -> None:
    directory = write_model({"w": torch.zeros(100_000)})
    with Checkpoint.open(directory) as checkpoint:
        checkpoint.view("w")
        with (directory / "model.safetensors").open("r+b") as file:
            file.truncate(5000)
        uses = [lambda: checkpoint.read_row("w", ()), lambda: checkpoint.view("w"), lambda: checkpoint.fetch(["w"])]
        for use in [*uses, lambda: checkpoint.drop(["w"])]:
            with pytest.raises(MalformedFileError, match="it has 5000 bytes"):
                use()


def test_a_quantized_checkpoint_is_refused_by_name_and_still_opens(write_model: WriteModel) -> None:
    directory = write_model({"w": matrix(4)}, quantization_config={"quant_method": "gptq", "bits": 4})
    with Checkpoint.open(directory) as checkpoint:
        with pytest.raises(QuantizedCheckpointError, match=r"Running it needs .*gptq, 4 bits.*only run or read"):
            checkpoint.require_plain("running it")
        assert checkpoint.read_scalar("w", (0, 0)).value == matrix(4)[0, 0].item()
    with Checkpoint.open(write_model({"w": matrix(4)}, folder="plain")) as checkpoint:
        checkpoint.require_plain("running it")


def test_a_config_that_is_no_object(write_model: WriteModel) -> None:
    directory = write_model({"w": matrix(4)})
    for text in ("{", "[]", '{"a": 1, "a": 2}', "\udcff"):
        (directory / "config.json").write_text(text, errors="surrogateescape")
        with pytest.raises(MalformedFileError, match=r"config\.json"):
            Checkpoint.open(directory)


def test_a_name_that_leads_nowhere() -> None:
    with pytest.raises(NotACheckpointError, match=r"no such path: \./missing/model"):
        Checkpoint.open("./missing/model")


def test_a_revision_is_only_for_the_hub(write_model: WriteModel) -> None:
    with pytest.raises(UsageError, match="v1"):
        Checkpoint.open(ModelReference(str(write_model({"w": matrix(4)})), "v1"))


def test_reading_imports_no_torch(write_model: WriteModel) -> None:
    directory = write_model({"w": matrix(4)})
    code = (
        "import sys\n"
        "from superweights.checkpoint import Checkpoint\n"
        f"with Checkpoint.open({str(directory)!r}) as checkpoint:\n"
        "    checkpoint.fetch(['w']); checkpoint.drop(['w'])\n"
        "    checkpoint.read_scalar('w', (1, 2)); checkpoint.read_row('w', (1,)); list(checkpoint.iter_rows('w'))\n"
        "print([name for name in ('torch', 'transformers', 'huggingface_hub', 'fsspec') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
