"""Layouts written by plain loops from their definitions: what no package writes here, and corners that fixtures leave out."""

import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from superweights.checkpoint import Checkpoint
from superweights.checkpoint.packed.reading import PackedMatrix, read_packed_matrix
from superweights.errors import MalformedFileError

MODULE = "model.layers.0.mlp.down_proj"
RANDOM = torch.Generator().manual_seed(0)


def codes_of(*shape: int, limit: int = 16) -> torch.Tensor:
    return torch.randint(0, limit, shape, generator=RANDOM)


def scales_of(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=RANDOM).half() + 0.5


def signed(word: int) -> int:
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


@pytest.fixture
def read(write_model):
    """Reads the module from tensors of it and settings of its quantizer."""

    def reader(parts: dict[str, torch.Tensor], hidden: int = 8, **settings: Any) -> PackedMatrix:
        tensors = {f"{MODULE}.{part}": each.contiguous() for part, each in parts.items()}
        config = {"quantization_config": settings} if settings else {}
        with Checkpoint.open(write_model(tensors, hidden_size=hidden, **config)) as checkpoint:
            found = read_packed_matrix(checkpoint, MODULE)
        assert found is not None
        return found

    return reader


# AWQ

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight channels is in which half byte of a word, from the lowest (AutoAWQ, WQLinear_GEMM.from_linear)."""


def awq_words(codes: torch.Tensor) -> torch.Tensor:
    """int32 [length, channels / 8] from [length, channels]."""
    return torch.tensor([
        [signed(sum(row[first + ORDER[place]] << (4 * place) for place in range(8))) for first in range(0, len(row), 8)]
        for row in codes.tolist()
    ], dtype=torch.int32)  # fmt: skip


@pytest.mark.parametrize("group", [4, 12, -1])
def test_awq(read, group):
    rows, cols = 16, 12
    groups = 1 if group < 0 else cols // group
    codes, zeros, scales = codes_of(cols, rows), codes_of(groups, rows), scales_of(groups, rows)
    found = read(
        {"qweight": awq_words(codes), "qzeros": awq_words(zeros), "scales": scales},
        quant_method="awq", bits=4, group_size=group, zero_point=True, version="gemm",
    )  # fmt: skip
    for row in range(rows):
        for col in range(cols):
            of_group = col // (cols // groups)
            scale = float(scales[of_group, row])
            assert found.weights[row, col] == scale * int(codes[col, row] - zeros[of_group, row])
            assert found.steps.expand(rows, cols)[row, col] == scale
            assert found.at_end[row, col] == (int(codes[col, row]) in (0, 15))
    assert found.shared == (1, cols // groups)


# GPTQ


def strings(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [rows, words]: each row of codes as one long number, the first code lowest."""
    rows = []
    for row in codes.tolist():
        number = sum(code << (place * bits) for place, code in enumerate(row))
        rows.append([signed(number >> start) for start in range(0, len(row) * bits, 32)])
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(read, bits, version, mixed):
    rows, cols, groups = 32, 64, 4
    codes = codes_of(rows, cols, limit=2**bits)
    zeros = codes_of(groups, rows, limit=2**bits - 1) + 1
    scales = scales_of(groups, rows)
    of_col = torch.arange(cols) // 16
    if mixed:
        of_col = of_col[torch.randperm(cols, generator=RANDOM)]
    stored = zeros - 1 if version == "gptq" else zeros
    found = read(
        {"qweight": strings(codes, bits).t(), "qzeros": strings(stored, bits), "scales": scales, "g_idx": of_col.int()},
        quant_method="gptq", bits=bits, group_size=16, desc_act=mixed, checkpoint_format=version,
    )  # fmt: skip
    for row in (0, 7, 31):
        for col in range(cols):
            group = int(of_col[col])
            assert found.weights[row, col] == float(scales[group, row]) * int(codes[row, col] - zeros[group, row])
            assert torch.equal(found.block(row, col)[row], of_col == group)
            assert int(found.block(row, col).sum()) == 16
    assert found.bits == bits


def test_gptq_modules_may_differ_from_the_config(read):
    """gptqmodel's `dynamic` gives some modules other bits and groups; their shapes say which."""
    codes, scales = codes_of(32, 64, limit=256), scales_of(4, 32)
    parts = {"qweight": strings(codes, 8).t(), "qzeros": strings(torch.full((4, 32), 127), 8), "scales": scales}
    found = read(
        parts, quant_method="gptq", bits=4, group_size=32, dynamic={"+:.*down.*": {"bits": 8, "group_size": 16}}
    )
    assert (found.bits, found.shared) == (8, (1, 16))
    assert torch.equal(found.weights, (codes - 128).float() * scales.t().float().repeat_interleave(16, 1))
    with pytest.raises(MalformedFileError, match="4 groups, where rows of 64 in groups of 32 make 2"):
        read(parts, quant_method="gptq", bits=4, group_size=32)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_gptq_zero_of_0_was_stored_by_borrowing(read, bits):
    """gptqmodel takes one from every code of a word at once, so a 0 borrows from the code above it."""
    zeros = torch.full((1, 32), 3)
    zeros[0, 5] = 0
    ones = sum(1 << shift for shift in range(0, 32, bits))
    words = torch.tensor([[signed(word - ones) for word in strings(zeros, bits)[0].tolist()]], dtype=torch.int32)
    codes = torch.zeros(32, 32, dtype=torch.int64)
    parts = {"qweight": strings(codes, bits).t(), "qzeros": words, "scales": torch.ones(1, 32).half()}
    found = read(parts, quant_method="gptq", bits=bits, group_size=32)
    assert torch.equal(found.weights[:, 0], -zeros[0].float())


# 8-bit floats


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("block", [(2, 3), (5, 7), (4, 4)])
def test_fp8_blocks_at_the_edges_are_smaller(read, block, dtype):
    rows, cols = 5, 7
    weight = torch.randn(rows, cols, generator=RANDOM).to(dtype)
    scales = torch.rand(math.ceil(rows / block[0]), math.ceil(cols / block[1]), generator=RANDOM) + 0.5
    found = read({"weight": weight, "weight_scale_inv": scales}, quant_method="fp8", weight_block_size=list(block))
    for row in range(rows):
        for col in range(cols):
            assert found.weights[row, col] == weight.float()[row, col] * scales[row // block[0], col // block[1]]
    high, wide = min(block[0], rows), min(block[1], cols)
    assert found.shared == (high, wide)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv"])
def test_fp8_with_one_scale(read, name, shape):
    weight = torch.tensor([[448.0, -448.0, 0.0, 1.0, 1.125, 2**-9]]).to(torch.float8_e4m3fn)
    found = read({"weight": weight, name: torch.full(shape, 0.5)}, quant_method="fp8", activation_scheme="static")
    assert found.weights.tolist() == [[224, -224, 0, 0.5, 0.5625, 2**-10]]
    assert found.at_end.tolist() == [[True, True, False, False, False, False]]
    # 1 lies between 0.9375 and 1.125; below 448 is 416; the smallest steps are 2^-9.
    assert found.steps.tolist() == [[16, 16, 2**-10, 0.0625, 0.0625, 2**-10]]


def test_fp8_with_4_bit_experts_is_not_read(read):
    with pytest.raises(Exception, match="two 4-bit floats per byte"):
        read(
            {"weight": torch.zeros(4, 8, dtype=torch.int8), "weight_scale_inv": torch.ones(4, 1)},
            quant_method="fp8", weight_block_size=[1, 32],
        )  # fmt: skip


# torchao


def write_torchao(folder: Any, parts: dict[str, torch.Tensor], kind: str, **about: Any) -> PackedMatrix:
    folder.mkdir(exist_ok=True)
    text = json.dumps(
        {"_type": kind, "_data": about, "_tensor_data_names": [each.removeprefix("_weight_") for each in parts]}
    )
    tensors = {f"{MODULE}.{part}": each.contiguous() for part, each in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={f"{MODULE}.weight": text})
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "torchao"}}))
    with Checkpoint.open(folder) as checkpoint:
        found = read_packed_matrix(checkpoint, MODULE)
    assert found is not None
    return found


def test_torchao_int4(tmp_path):
    """fbgemm's int4_row_quantize_zp and pack_int4: codes -8 to 7, low half first, value = scale * code + zero."""
    rows, cols, group = 3, 16, 8
    codes = codes_of(rows, cols) - 8
    packed = torch.tensor([
        [(row[first] & 15) | ((row[first + 1] & 15) << 4) for first in range(0, cols, 2)] for row in codes.tolist()
    ], dtype=torch.uint8).view(torch.int8)  # fmt: skip
    scales, zeros = scales_of(cols // group, rows).bfloat16(), scales_of(cols // group, rows).bfloat16()
    parts = {"_weight_qdata": packed, "_weight_scale": scales, "_weight_zero_point": zeros}
    found = write_torchao(tmp_path / "model", parts, "Int4Tensor", block_size=[1, group], shape=[rows, cols])
    for row in range(rows):
        for col in range(cols):
            scale, zero = float(scales[col // group, row]), float(zeros[col // group, row])
            assert found.weights[row, col] == torch.tensor(scale * int(codes[row, col])) + zero
            assert found.at_end[row, col] == (int(codes[row, col]) in (-8, 7))


@pytest.mark.parametrize(("block", "shape"), [([], ()), ([2, 4], (2, 2)), ([4, 8], (1, 1)), ([4, 8], ())])
def test_torchao_float8_tiles(tmp_path, block, shape):
    weight = torch.randn(4, 8, generator=RANDOM).to(torch.float8_e4m3fn)
    scale = torch.rand(shape, generator=RANDOM) + 0.5
    parts = {"_weight_qdata": weight, "_weight_scale": scale}
    found = write_torchao(tmp_path / "model", parts, "Float8Tensor", block_size=block)
    spread = scale.repeat_interleave(2, 0).repeat_interleave(4, 1) if shape == (2, 2) else scale.reshape(1, 1)
    assert torch.equal(found.weights, weight.float() * spread)


def test_torchao_int8_of_a_reduced_range(tmp_path):
    codes = torch.tensor([[-64, -63, 0, 63]], dtype=torch.int8)
    parts = {"_weight_qdata": codes, "_weight_scale": torch.ones(1, 1)}
    found = write_torchao(tmp_path / "model", parts, "Int8Tensor", block_size=[1, 4], reduce_range=True)
    assert found.bits == 7
    assert found.at_end.tolist() == [[True, False, False, True]]


def test_torchao_columns_that_are_rescaled_are_not_read(tmp_path):
    parts = {"_weight_qdata": torch.zeros(1, 4, dtype=torch.int8), "_weight_scale": torch.ones(1, 1),
             "_weight_act_pre_scale": torch.ones(4)}  # fmt: skip
    with pytest.raises(Exception, match="act_pre_scale"):
        write_torchao(tmp_path / "model", parts, "Int8Tensor", block_size=[1, 4])


# compressed-tensors


def group(**weights: Any) -> dict[str, Any]:
    groups = {"g": {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, **weights}}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_words_of_older_compressed_tensors_stand_alone(read, bits):
    """pack_to_int32 before codes ran over the end of a word: 32 // bits of them in each."""
    rows, cols, each = 2, 64, 32 // bits
    codes = codes_of(rows, cols, limit=2**bits)
    words = [
        [
            signed(sum(code << (place * bits) for place, code in enumerate(row[first : first + each])))
            for first in range(0, cols, each)
        ]
        for row in codes.tolist()
    ]
    parts = {"weight_packed": torch.tensor(words, dtype=torch.int32), "weight_shape": torch.tensor([rows, cols]),
             "weight_scale": torch.full((rows, 1), 0.5)}  # fmt: skip
    found = read(parts, **group(num_bits=bits, strategy="channel"))
    assert torch.equal(found.weights, 0.5 * (codes - 2 ** (bits - 1)).float())


@pytest.mark.parametrize("mixed", [False, True])
def test_zero_points_and_columns_in_another_order(read, mixed):
    rows, cols, groups = 8, 32, 4
    codes, zeros, scales = codes_of(rows, cols), codes_of(rows, groups), scales_of(rows, groups)
    of_col = torch.arange(cols) // 8
    if mixed:
        of_col = of_col[torch.randperm(cols, generator=RANDOM)]
    parts = {
        "weight_packed": strings(codes, 4), "weight_shape": torch.tensor([rows, cols]), "weight_scale": scales,
        "weight_zero_point": strings(zeros.t(), 4).t(), "weight_g_idx": of_col.int(),
    }  # fmt: skip
    found = read(parts, **group(num_bits=4, strategy="group", group_size=8, symmetric=False))
    for row in range(rows):
        for col in range(cols):
            at = int(of_col[col])
            assert found.weights[row, col] == float(scales[row, at]) * int(codes[row, col] - zeros[row, at])
        assert torch.equal(found.block(row, 9)[row], of_col == of_col[9])


def test_an_order_that_was_not_chosen(read):
    parts = {
        "weight_packed": strings(codes_of(8, 32), 4), "weight_shape": torch.tensor([8, 32]), "weight_scale": scales_of(8, 4),
        "weight_g_idx": torch.full((32,), -1, dtype=torch.int32),
    }  # fmt: skip
    assert read(parts, **group(num_bits=4, strategy="group", group_size=8)).blocks is None
    parts["weight_g_idx"][3] = 4
    with pytest.raises(MalformedFileError, match="groups -1 to 4 of 4"):
        read(parts, **group(num_bits=4, strategy="group", group_size=8))


def test_zero_points_that_are_not_packed(read):
    codes, zeros, scales = codes_of(4, 8, limit=256) - 128, codes_of(4, 1) - 8, scales_of(4, 1)
    parts = {"weight": codes.to(torch.int8), "weight_scale": scales, "weight_zero_point": zeros.to(torch.int8)}
    found = read(parts, **{**group(num_bits=8, strategy="channel", symmetric=False), "format": "int-quantized"})
    assert torch.equal(found.weights, scales.float() * (codes - zeros).float())


@pytest.mark.parametrize(("size", "shape"), [(None, (1,)), (-1, (4, 1)), (2, (4, 4))])
def test_a_strategy_may_follow_from_the_group_size(read, size, shape):
    codes = codes_of(4, 8)
    parts = {
        "weight_packed": strings(codes, 4),
        "weight_shape": torch.tensor([4, 8]),
        "weight_scale": torch.full(shape, 2.0),
    }
    assert torch.equal(read(parts, **group(num_bits=4, group_size=size)).weights, 2.0 * (codes - 8).float())


# bitsandbytes, quanto, hqq


def test_bitsandbytes_pads_an_odd_number_of_codes(read):
    rows, cols = 3, 5
    codes = codes_of(rows * cols)
    padded = [*codes.tolist(), 0]
    packed = torch.tensor([[padded[first] << 4 | padded[first + 1]] for first in range(0, 16, 2)], dtype=torch.uint8)
    state = json.dumps({"quant_type": "nf4", "blocksize": 4, "dtype": "float16", "shape": [rows, cols]})
    table, absmax = torch.linspace(-1, 1, 16), torch.rand(4, generator=RANDOM)
    parts = {
        "weight": packed, "weight.absmax": absmax, "weight.quant_map": table,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state.encode()), dtype=torch.uint8),
    }  # fmt: skip
    found = read(parts, quant_method="bitsandbytes", load_in_4bit=True)
    for place in range(rows * cols):
        assert found.weights.flatten()[place] == table[codes[place]] * absmax[place // 4]
    assert int(found.block(2, 4).sum()) == 3


@pytest.mark.parametrize("bits", [2, 4])
def test_quanto_with_whole_zeros(read, bits):
    """Older files: scale * (code - zero), the zero in int8 (optimum-quanto, tensor/qbits.py)."""
    rows, cols, size = 8, 64, 16
    groups, places = rows * cols // size, 8 // bits
    codes = codes_of(groups, size, limit=2**bits)
    packed = sum(
        codes[place * groups // places : (place + 1) * groups // places] << (place * bits) for place in range(places)
    )
    assert isinstance(packed, torch.Tensor)
    scales, zeros = scales_of(groups, 1), codes_of(groups, 1, limit=2**bits)
    parts = {
        "weight._data._data": packed.to(torch.uint8),
        "weight._scale": scales,
        "weight._shift": zeros.to(torch.int8),
    }
    found = read(parts, hidden=rows)
    assert torch.equal(found.weights, (scales.float() * (codes - zeros).float()).reshape(rows, cols))
    with pytest.raises(MalformedFileError, match="hidden size 7"):
        read(parts, hidden=7)


def test_hqq_groups_down_the_columns_take_every_so_many_rows(read):
    """Axis 0: W.reshape(size, -1), one scale per column of that; here 3 of 12 rows, 4 apart (hqq, Quantizer.quantize)."""
    rows, cols, size = 12, 5, 3
    groups = rows * cols // size
    codes, scales, zeros = codes_of(size, groups, limit=256), scales_of(1, groups), scales_of(1, groups)
    scalar = {"nbits": 8, "group_size": size, "axis": 0}
    parts = {
        "W_q": codes.to(torch.uint8), "scale": scales, "zero": zeros, "shape": torch.tensor([rows, cols]),
        "packing": torch.tensor(list(b"8bit_u8"), dtype=torch.uint8),
        **{name: torch.tensor(value, dtype=torch.int32) for name, value in scalar.items()},
    }  # fmt: skip
    found = read(parts, quant_method="hqq")
    wanted = ((codes.float() - zeros.float()) * scales.float()).reshape(rows, cols)
    assert torch.equal(found.weights, wanted)
    assert found.block(5, 2).nonzero().tolist() == [[1, 2], [5, 2], [9, 2]]
    assert found.shared == (3, 1)


def test_hqq_with_a_scale_per_row(read):
    codes, scales, zeros = codes_of(4, 6), scales_of(4, 1), scales_of(4, 1)
    parts = {
        "W_q": (codes[:2] << 4 | codes[2:]).to(torch.uint8), "scale": scales, "zero": zeros, "shape": torch.tensor([4, 6]),
        "packing": torch.tensor(list(b"4bit_u8"), dtype=torch.uint8), "nbits": torch.tensor(4, dtype=torch.int32),
        "axis": torch.tensor(1, dtype=torch.int32),
    }  # fmt: skip
    found = read(parts, quant_method="hqq")
    assert torch.equal(found.weights, (codes.float() - zeros.float()) * scales.float())
    assert found.shared == (1, 6)
    with pytest.raises(Exception, match="packing is '5bit'"):
        read({**parts, "packing": torch.tensor(list(b"5bit"), dtype=torch.uint8)}, quant_method="hqq")
    with pytest.raises(Exception, match="quant_scale"):
        read({**parts, "quant_scale": torch.tensor(1, dtype=torch.uint8)}, quant_method="hqq")
