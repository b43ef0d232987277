import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from .conftest import Ask

H, INNER = 8, 24
NAME = "model.layers.1.mlp.down_proj.weight"
Array = npt.NDArray[Any]
Write = Callable[..., Path]


def matrix(rows: int = H, cols: int = INNER) -> Array:
    return np.random.default_rng(0).normal(0, 0.02, (rows, cols)).astype(np.float16)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a checkpoint of two layers."""

    def write(second: Array, *, name: str = NAME, **config: Any) -> Path:
        first = name.replace(".1.", ".0.")
        save_file(
            {first: matrix(), name: second, "model.norm.weight": np.ones(H, np.float16)}, tmp_path / "model.safetensors"
        )
        settings = {"model_type": "llama", "hidden_size": H, "num_hidden_layers": 2, **config}
        (tmp_path / "config.json").write_text(json.dumps(settings))
        return tmp_path

    return write


def row(ask: Ask, *words: object) -> dict[str, Any]:
    answer = ask("show", *words, "--format", "json")
    assert (answer.status, answer.err) == (0, "")
    [only] = json.loads(answer.out)
    return dict(only)


def test_a_planted_weight_is_read_with_its_surroundings(write: Write, ask: Ask) -> None:
    weights = matrix()
    weights[5, 20] = -1.5
    shown = row(ask, write(weights), "1:5:20")
    numbers = weights.astype(np.float64)
    assert (shown["coordinate"], shown["value"], shown["dtype"]) == ("1:5:20", -1.5, "F16")
    assert shown["bits"] == "1 01111 1000000000"
    assert (shown["rank"], shown["count"], shown["largest"], shown["non_finite"]) == (1, H * INNER, 1.5, 0)
    assert shown["z_score"] == pytest.approx((-1.5 - numbers.mean()) / numbers.std())
    assert shown["row_neighbours"] == {str(col): numbers[5, col] for col in range(17, 24)}
    assert shown["col_neighbours"] == {str(each): numbers[each, 20] for each in range(2, 8)}
    assert (shown["tensor"], shown["index"], shown["file"]) == (NAME, [5, 20], "model.safetensors")


def test_the_byte_offset_leads_to_the_value(write: Write, ask: Ask) -> None:
    weights = matrix()
    model = write(weights)
    shown = row(ask, model, "1:3:7")
    found = np.frombuffer((model / shown["file"]).read_bytes(), dtype="<f2", count=1, offset=shown["offset"])
    assert found[0] == weights[3, 7]


@pytest.mark.parametrize("place", [(0, 0), (7, 23), (4, 11)])
def test_the_rank_counts_the_larger_weights(place: tuple[int, int], write: Write, ask: Ask) -> None:
    weights = matrix()
    larger = sum(abs(each) > abs(weights[place]) for each in weights.ravel())
    assert row(ask, write(weights), f"1:{place[0]}:{place[1]}")["rank"] == 1 + larger


def test_transposed_storage_gives_the_same_weight(write: Write, ask: Ask) -> None:
    weights = matrix()
    weights[5, 20] = 2.5
    model = write(np.ascontiguousarray(weights.T), name="h.1.mlp.c_proj.weight", model_type="gpt2")
    shown = row(ask, model, "1:5:20")
    assert (shown["value"], shown["index"], shown["transposed"]) == (2.5, [20, 5], True)
    assert shown["row_neighbours"] == {str(col): float(weights[5, col]) for col in range(17, 24)}


def test_a_packed_expert_is_compared_with_its_own_matrix(write: Write, ask: Ask) -> None:
    packed = np.stack([matrix(INNER, H) * (expert + 1) for expert in range(4)]).astype(np.float16)
    packed[2, 20, 5] = 9.0
    model = write(packed, name="model.layers.1.mlp.experts.down_proj", model_type="gpt_oss")
    shown = row(ask, model, "1/2:5:20")
    assert (shown["value"], shown["rank"], shown["count"], shown["index"]) == (9.0, 1, H * INNER, [2, 20, 5])
    other = row(ask, model, "1/3:5:20")
    assert other["largest"] == float(np.abs(packed[3]).max())


def test_bfloat16_bits_are_the_bits_of_the_file(tmp_path: Path, ask: Ask) -> None:
    bits = (matrix().astype(np.float32).view(np.uint32) >> 16).astype("<u2")
    bits[5, 20] = 0xBE8C  # -0.2734375
    tensor = {"dtype": "BF16", "shape": [H, INNER], "data_offsets": [0, bits.nbytes]}
    header = json.dumps({"model.layers.0.mlp.down_proj.weight": tensor}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bits.tobytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": H, "num_hidden_layers": 1}))
    shown = row(ask, tmp_path, "0:5:20")
    assert (shown["value"], shown["bits"], shown["dtype"]) == (-0.2734375, "1 01111101 0001100", "BF16")


def test_weights_that_are_no_numbers_are_counted_and_left_out(write: Write, ask: Ask) -> None:
    weights = matrix()
    weights[0, 0], weights[0, 1] = np.nan, np.inf
    model = write(weights)
    shown = row(ask, model, "1:5:20")
    assert shown["non_finite"] == 2
    assert shown["largest"] == float(np.abs(weights[np.isfinite(weights)]).max())
    nan = row(ask, model, "1:0:0")
    assert (nan["value"], nan["rank"], nan["z_score"]) == ("nan", None, None)
    assert "2 weights of the matrix are NaN or infinite" in ask("show", model, "1:5:20").out


def test_the_table_says_all_of_it(write: Write, ask: Ask) -> None:
    weights = matrix()
    weights[5, 20] = -1.5
    lines = dict(line.split("  ", 1) for line in ask("show", write(weights), "1:5:20").out.splitlines())
    assert lines["weight"].strip() == "1:5:20"
    assert lines["value"].strip() == "-1.5"
    assert lines["bits"].strip() == "1 01111 1000000000 (F16, 0xbe00)"
    assert lines["rank"].strip() == "1 of 192 by absolute value"
    assert lines["size"].strip().startswith("1 of the largest absolute value, 1.5, -")
    assert "cols 17 to 23: " in lines["row 5"] and "[-1.5]" in lines["row 5"]
    assert "rows 2 to 7: " in lines["col 20"] and "[-1.5]" in lines["col 20"]
    assert lines["tensor"].strip() == f"{NAME}, 8 rows, 24 cols, stored [rows, cols]"


def test_several_coordinates_are_several_rows(write: Write, ask: Ask) -> None:
    model = write(matrix())
    answer = ask("show", model, "0:1:2", "1:3:4", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(answer.out)))
    assert [each["coordinate"] for each in rows] == ["0:1:2", "1:3:4"]
    lines = [json.loads(line) for line in ask("show", model, "0:1:2", "1:3:4", "--format", "jsonl").out.splitlines()]
    assert [each["tensor"] for each in lines] == [NAME.replace(".1.", ".0."), NAME]


def test_a_published_coordinate_is_named_as_such(write: Write, ask: Ask) -> None:
    settings = {"model_type": "gpt2", "hidden_size": 448, "_name_or_path": "OpenAI-Community/gpt2"}
    model = write(np.ones((667, 448), np.float16), name="h.2.mlp.c_proj.weight", **settings)
    assert row(ask, model, "2:446:666")["published"] == []
    [published] = row(ask, model, "2:447:666")["published"]
    assert published.startswith("detected-not-loadbearing for openai-community/gpt2: github rinkaSA/")
    assert published in ask("show", model, "2:447:666").out


def test_an_unrecognised_model_is_shown_by_the_name_of_the_tensor(write: Write, ask: Ask) -> None:
    weights = matrix()
    model = write(np.ascontiguousarray(weights.T), name="blocks.1.odd.weight")
    refused = ask("show", model, "1:5:20")
    assert refused.status == 3
    assert "blocks.1.odd.weight [24, 8]" in refused.err and "--tensor NAME" in refused.err
    shown = row(ask, model, "1:5:20", "--tensor", "blocks.1.odd.weight", "--transposed")
    assert (shown["value"], shown["index"]) == (float(weights[5, 20]), [20, 5])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("1:8:0",), "rows are 0 to 7, cols are 0 to 23"),
        (("1:0:24",), "rows are 0 to 7, cols are 0 to 23"),
        (("2:0:0",), "the layers are 0 to 1"),
        (("1/0:0:0",), "no routed experts"),
        (("1:2",), "'1:2' is no coordinate"),
        ((), "at least one coordinate"),
        (("1:0:0", "--transposed"), "--tensor"),
    ],
)
def test_a_wrong_request_is_usage(words: tuple[str, ...], says: str, write: Write, ask: Ask) -> None:
    answer = ask("show", write(matrix()), *words)
    assert (answer.status, answer.out) == (2, "")
    assert says in answer.err


def test_an_unknown_tensor_names_the_near_ones(write: Write, ask: Ask) -> None:
    answer = ask("show", write(matrix()), "1:0:0", "--tensor", "model.layers.1.mlp.down_proj.weigt")
    assert answer.status == 3
    assert f"Did you mean {NAME!r}" in answer.err


@pytest.mark.parametrize(
    ("weights", "name", "config", "says"),
    [
        (np.zeros((3, H), np.int32), NAME.replace("weight", "qweight"), {"quant_method": "gptq", "bits": 4}, "no qzeros"),
        (np.zeros((H, INNER), np.int8), NAME, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "without the scales"),
        (np.zeros((H, INNER), np.int8), NAME, {"quant_method": "aqlm"}, "quant_method 'aqlm'"),
    ],
)  # fmt: skip
def test_packed_weights_that_cannot_be_read_are_refused(
    weights: Array, name: str, config: dict[str, Any], says: str, write: Write, ask: Ask
) -> None:
    answer = ask("show", write(weights, name=name, quantization_config=config), "1:0:0")
    assert (answer.status, answer.out) == (3, "")
    assert says in answer.err


def test_a_packed_weight_is_what_its_code_stands_for(planted_checkpoint: Path, tmp_path: Path, ask: Ask) -> None:
    quantized = tmp_path / "q"
    assert ask("quantize", planted_checkpoint, "--scheme", "int4-g16", "--keep", "none", "--to", quantized).status == 0
    found = json.loads(ask("show", quantized, "2:49:7", "--format", "json").out)[0]
    assert (found["bits"], found["format"], found["sharing"]) == (None, "compressed-tensors pack-quantized", 16)
    assert found["rank"] == 1 and found["row_neighbours"]["7"] == found["value"]
    assert abs(found["value"] + 64) <= found["step"] / 2 and found["value"] / found["step"] == pytest.approx(
        -7, abs=0.01
    )
    assert "at the end of its grid" in ask("show", quantized, "2:49:7").out


def test_no_such_path(tmp_path: Path, ask: Ask) -> None:
    answer = ask("show", tmp_path / "nowhere", "0:0:0")
    assert (answer.status, answer.out) == (3, "")
    assert answer.err.count("\n") == 1 and "nowhere" in answer.err
