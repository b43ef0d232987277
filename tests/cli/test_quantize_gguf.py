import json
import sys
from pathlib import Path

import pytest

import superweights as sw
from superweights.checkpoint import Checkpoint

from .conftest import Ask

gguf = pytest.importorskip("gguf", reason="superweights[gguf] is optional")
BOOKS = Path(sw.__file__).parent / "data" / "tiny-books"
KEPT = ("--keep", "0:68:364")


def test_a_file_is_written_with_its_super_weight(ask: Ask, planted_checkpoint: Path, tmp_path: Path) -> None:
    answer = ask("quantize", planted_checkpoint, "--scheme", "q8_0", "--to", tmp_path / "q.gguf")
    assert (answer.status, answer.err) == (0, "")
    assert "2:49:7" in answer.out and "blk.2.ffn_down.weight" in answer.out
    assert f"llama-server -m {tmp_path / 'q.gguf'}" in answer.out
    found = {each.name: each for each in gguf.GGUFReader(tmp_path / "q.gguf").tensors}
    assert found["blk.2.ffn_down.weight"].tensor_type.name == "F32"  # in float16 the value would not be exact
    assert found["blk.2.ffn_up.weight"].tensor_type.name == "Q8_0"
    with Checkpoint.open(planted_checkpoint) as checkpoint:
        expected = checkpoint.read_scalar("model.layers.2.mlp.down_proj.weight", (49, 7)).value
    assert found["blk.2.ffn_down.weight"].data[49, 7] == expected


def test_q4_0_is_the_default_and_a_file_is_a_source(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("superweights.cli.quantize_gguf.open_model", None)  # coordinates need no forward pass
    assert ask("quantize", BOOKS, "--scheme", "BF16", "--keep", "none", "--to", tmp_path / "plain.gguf").status == 0
    answer = ask("quantize", tmp_path / "plain.gguf", "--to", tmp_path / "q.gguf", *KEPT, "--format", "json")
    (row,) = json.loads(answer.out)
    assert (row["type"], row["architecture"], row["tensors"]) == ("Q4_0", "llama", "42 Q4_0, 13 F32, 1 F16")
    (kept,) = row["kept"]
    assert kept["value"] == kept["written"] and kept["error"] == "0 %"


def test_super_weights_are_found_in_a_gguf_file(ask: Ask, tmp_path: Path) -> None:
    assert ask("quantize", BOOKS, "--scheme", "f16", "--keep", "none", "--to", tmp_path / "plain.gguf").status == 0
    answer = ask("quantize", tmp_path / "plain.gguf", "--to", tmp_path / "q.gguf")
    assert answer.status == 0 and "nothing is kept" in answer.out


def test_the_kept_type_and_its_cost_are_said(ask: Ask, tmp_path: Path) -> None:
    answer = ask("quantize", BOOKS, "--to", tmp_path / "q.gguf", *KEPT, "--kept-type", "q8_0")
    assert answer.status == 0
    assert "42 Q4_0, 13 F32, 1 Q8_0" in answer.out and "24576 bytes, 3.07 %" in answer.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--scheme", "q4_00"), "Did you mean 'q4_0'"),
        (("--scheme", "q4_k_m", *KEPT), r"--tensor-type 'blk\.0\.ffn_down=f16'"),
        (("--keep", "9:0:0"), "the layers are 0 to 5"),
        (("--keep", "0:0:700"), "cols are 0 to 383"),
        (("--clip", "z=3"), "--clip does not go with a .gguf target"),
        (("--amplify", "2"), "--amplify does not go with a .gguf target"),
        (("--budget", "4.25"), "--budget does not go with a .gguf target"),
        (("--measure",), "superweights audit"),
        (("--out", "x.jsonl"), "--out does not go with a .gguf target"),
    ],
)
def test_what_does_not_go_with_a_gguf_file(
    ask: Ask, tmp_path: Path, words: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("superweights.cli.quantize_gguf.open_model", None)
    answer = ask("quantize", BOOKS, "--to", tmp_path / "q.gguf", *words)
    assert answer.status == 2 and says in answer.err
    assert not list(tmp_path.iterdir())


def test_a_taken_target_shows_before_the_forward_pass(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("superweights.cli.quantize_gguf.open_model", None)
    (tmp_path / "q.gguf").write_bytes(b"old")
    answer = ask("quantize", BOOKS, "--to", tmp_path / "q.gguf")
    assert answer.status == 2 and "--overwrite" in answer.err


def test_a_type_of_llama_cpp_in_a_folder_is_refused(ask: Ask, tmp_path: Path) -> None:
    answer = ask("quantize", BOOKS, "--to", tmp_path / "q", "--scheme", "q4_0")
    assert answer.status == 2 and f"name the target {tmp_path / 'q'}.gguf" in answer.err


def test_the_kept_type_is_about_gguf_files(ask: Ask, tmp_path: Path) -> None:
    answer = ask("quantize", BOOKS, "--to", tmp_path / "q", "--kept-type", "q8_0")
    assert answer.status == 2 and "--kept-type is about .gguf files" in answer.err


@pytest.mark.parametrize("words", [("--format", "gguf"), ("--format=compressed-tensors",)])
def test_who_takes_format_for_that_of_files_is_told(ask: Ask, tmp_path: Path, words: tuple[str, ...]) -> None:
    answer = ask("quantize", BOOKS, "--to", tmp_path / "q", *words)
    assert answer.status == 2 and "files follow --to" in answer.err


def test_without_the_package_it_says_how_to_get_it(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    answer = ask("quantize", BOOKS, "--to", tmp_path / "q.gguf")
    assert answer.status == 2 and "pip install superweights[gguf]" in answer.err
