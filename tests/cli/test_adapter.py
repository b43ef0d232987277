import csv
import io
import json
import sys
from pathlib import Path

import pytest

from superweights.checkpoint import Checkpoint
from superweights.interventions.adapter import check_adapter

from .conftest import Ask


@pytest.fixture(scope="module")
def clipped(tmp_path_factory: pytest.TempPathFactory, planted_checkpoint: Path) -> Path:
    """The planted model with its super weight cut off."""
    from superweights.cli import main

    to = tmp_path_factory.mktemp("clipped") / "q"
    words = ("--scheme", "int8-row", "--clip", "z=3", "--keep", "none", "--to", str(to))
    assert main(["quantize", str(planted_checkpoint), *words]) == 0
    return to


def test_super_weights_are_found_in_the_original_and_restored(
    ask: Ask, planted_checkpoint: Path, clipped: Path, tmp_path: Path
) -> None:
    to = tmp_path / "lora"
    answer = ask("adapter", clipped, "--original", planted_checkpoint, "--to", to)
    assert (answer.status, answer.err) == (0, "")
    assert f"{to} restores 1 of 1 super weights" in answer.out and "form peft, rank 1" in answer.out
    assert "2:49:7" in answer.out and "-64.0799" in answer.out
    with Checkpoint.open(clipped) as checkpoint:
        assert [str(each.coordinate) for each in check_adapter(to, checkpoint).weights] == ["2:49:7"]


def test_rows_say_what_is_restored_and_what_is_not(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    words = ("--scheme", "int4-g16", "--keep", "2:49:7", "--to", tmp_path / "q")
    assert ask("quantize", planted_checkpoint, *words).status == 0
    words = (
        "--original",
        planted_checkpoint,
        "--weights",
        "2:49:7,1:3:5",
        "--to",
        tmp_path / "lora",
        "--format",
        "csv",
    )
    answer = ask("adapter", tmp_path / "q", *words)
    assert answer.status == 0
    rows = {each["coordinate"]: each for each in csv.DictReader(io.StringIO(answer.out))}
    assert {name: each["restored"] for name, each in rows.items()} == {"1:3:5": "True", "2:49:7": "False"}
    assert float(rows["2:49:7"]["delta"]) == 0 != float(rows["1:3:5"]["delta"])


def test_nothing_to_restore_is_status_1(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    assert ask("quantize", planted_checkpoint, "--scheme", "int4-g16", "--to", tmp_path / "q").status == 0
    answer = ask("adapter", tmp_path / "q", "--original", planted_checkpoint, "--to", tmp_path / "lora")
    assert (answer.status, answer.err) == (1, "")
    assert "Nothing to restore at 2:49:7: model.layers.2.mlp.down_proj is stored unrounded." in answer.out
    assert "Nothing is written." in answer.out and not (tmp_path / "lora").exists()


def test_no_super_weight_is_status_1(ask: Ask, random_checkpoint: Path, tmp_path: Path) -> None:
    answer = ask("adapter", random_checkpoint, "--original", random_checkpoint, "--to", tmp_path / "lora")
    assert (answer.status, answer.err) == (1, "")
    assert "No super weight candidate" in answer.out and not list(tmp_path.iterdir())


def test_the_dtype_of_the_engine_is_recorded(ask: Ask, planted_checkpoint: Path, clipped: Path, tmp_path: Path) -> None:
    words = ("--original", planted_checkpoint, "--weights", "2:49:7", "--to", tmp_path / "lora", "--dtype", "bfloat16")
    assert ask("adapter", clipped, *words).status == 0
    record = json.loads((tmp_path / "lora" / "superweights.json").read_text())
    assert record["dtype"] == "bfloat16"
    with Checkpoint.open(planted_checkpoint) as before, Checkpoint.open(clipped) as after:
        assert (record["original"]["digest"], record["quantized"]["digest"]) == (before.digest, after.digest)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--weights", "2:700:7"), "rows are 0 to 63"),
        (("--weights", "2-49-7"), "neither auto, published nor a .jsonl file"),
        (("--weights", "2:49:7", "--form", "onnx"), '"peft", "gguf"'),
        (("--weights", "2:49:7", "--to", "TAKEN"), "the folder is not empty"),
        (("--weights", "2:49:7", "--form", "gguf"), "pip install superweights[gguf]"),
        (("--original", "OTHER", "--weights", "2:49:7"), "is not"),
    ],
)
def test_a_wrong_request_is_usage(
    words: tuple[str, ...],
    says: str,
    ask: Ask,
    planted_checkpoint: Path,
    clipped: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from superweights.testing import save_tiny_checkpoint

    monkeypatch.setitem(sys.modules, "gguf", None)
    places = {"TAKEN": tmp_path / "taken", "OTHER": tmp_path / "other"}
    (places["TAKEN"] / "mine").mkdir(parents=True)
    if "OTHER" in words:
        save_tiny_checkpoint("llama", places["OTHER"], layers=2)
    given = [str(places.get(each, each)) for each in words]
    defaults = [] if "--to" in words else ["--to", str(tmp_path / "lora")]
    defaults += [] if "--original" in words else ["--original", str(planted_checkpoint)]
    answer = ask("adapter", clipped, *given, *defaults)
    assert (answer.status, answer.out) == (2, "")
    assert says in answer.err
    assert not (tmp_path / "lora").exists() and [each.name for each in places["TAKEN"].iterdir()] == ["mine"]


def test_what_would_stop_it_shows_before_the_forward_pass(
    ask: Ask, planted_checkpoint: Path, clipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("superweights.cli.adapter.weights_of", None)
    answer = ask("adapter", clipped, "--original", planted_checkpoint, "--to", tmp_path / "lora", "--form", "gguf")
    assert answer.status == 2 and "superweights[gguf]" in answer.err


def test_a_gguf_file_gets_an_adapter_of_its_own_form(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="superweights[gguf] is optional")
    from safetensors.numpy import load_file

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(6)
    weights = load_file(planted_checkpoint / "model.safetensors")["model.layers.2.mlp.down_proj.weight"]
    weights[49, 7] = 0
    writer.add_tensor("blk.2.ffn_down.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    to = tmp_path / "lora"
    answer = ask("adapter", tmp_path / "model.gguf", "--original", planted_checkpoint, "--to", to)
    assert (answer.status, answer.err) == (0, "")
    assert "form gguf" in answer.out
    assert sorted(each.name for each in to.iterdir()) == ["adapter.gguf", "superweights.json"]
