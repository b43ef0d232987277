"""Every fixture that another package made reads as that package reads it, and broken ones are refused."""

import json
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import LocalHub
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from superweights.checkpoint import Checkpoint
from superweights.checkpoint.packed.reading import PackedMatrix, packed_format, read_packed_matrix
from superweights.errors import MalformedFileError, QuantizedCheckpointError

FIXTURES = Path(__file__).parent / "fixtures"
DOWN, QUERY, UP = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
PLANTED = (5, 77)
ROW = (1, 96)
EXPECTED: dict[str, tuple[str, float, tuple[int, int]]] = {
    "auto-round/auto-gptq-3bit": ("auto-round gptq", 3, (1, 32)),
    "auto-round/auto-gptq-4bit": ("auto-round gptq", 4, (1, 32)),
    "awq/auto-round": ("auto-round awq", 4, (1, 32)),
    "awq/gemm": ("awq", 4, (1, 32)),
    "bitsandbytes/fp4": ("bitsandbytes fp4", 4, (1, 64)),
    "bitsandbytes/fp4-double-in-bfloat16": ("bitsandbytes fp4", 4, (1, 64)),
    "bitsandbytes/int8": ("bitsandbytes int8", 8, (1, 128)),
    "bitsandbytes/nf4-double": ("bitsandbytes nf4", 4, (1, 64)),
    "bitsandbytes/nf4-over-rows": ("bitsandbytes nf4", 4, (1, 64)),
    "compressed-tensors/naive-float-block": ("compressed-tensors naive-quantized", 8, (32, 32)),
    "compressed-tensors/float-channel": ("compressed-tensors float-quantized", 8, ROW),
    "compressed-tensors/int-channel": ("compressed-tensors int-quantized", 8, ROW),
    "compressed-tensors/mxfp4": ("compressed-tensors mxfp4-pack-quantized", 4, (1, 32)),
    "compressed-tensors/mxfp8": ("compressed-tensors mxfp8-quantized", 8, (1, 32)),
    "compressed-tensors/naive-float-tensor": ("compressed-tensors naive-quantized", 8, (32, 96)),
    "compressed-tensors/nvfp4": ("compressed-tensors nvfp4-pack-quantized", 4, (1, 16)),
    "compressed-tensors/pack-3bit-channel-asym": ("compressed-tensors pack-quantized", 3, ROW),
    "compressed-tensors/pack-4bit-group": ("compressed-tensors pack-quantized", 4, (1, 32)),
    "compressed-tensors/pack-4bit-group-asym": ("compressed-tensors pack-quantized", 4, (1, 32)),
    "compressed-tensors/pack-8bit-tensor": ("compressed-tensors pack-quantized", 8, (32, 96)),
    "compressed-tensors/two-groups": ("compressed-tensors pack-quantized", 8, ROW),
    "fp8/block": ("fp8", 8, (16, 48)),
    "fp8/block-power-of-two": ("fp8", 8, (32, 32)),
    "fp8/matrix": ("fp8", 8, (32, 96)),
    "gptq/v1-2bit": ("gptq", 2, (1, 32)),
    "gptq/v1-3bit": ("gptq", 3, (1, 32)),
    "gptq/v1-4bit-act-order": ("gptq", 4, (1, 32)),
    "gptq/v1-8bit": ("gptq", 8, ROW),
    "gptq/v2-4bit": ("gptq_v2", 4, (1, 32)),
    "hqq/1bit": ("hqq", 1, (1, 32)),
    "hqq/2bit": ("hqq", 2, (1, 16)),
    "hqq/3bit": ("hqq", 3, (1, 32)),
    "hqq/4bit-as-float": ("hqq", 4, (1, 32)),
    "hqq/4bit-columns": ("hqq", 4, (16, 1)),
    "hqq/4bit-over-rows": ("hqq", 4, (1, 64)),
    "hqq/8bit": ("hqq", 8, (1, 32)),
    "quanto/float8": ("quanto float8", 8, ROW),
    "quanto/int2": ("quanto int2", 2, ROW),
    "quanto/int4": ("quanto int4", 4, ROW),
    "quanto/int4-group": ("quanto int4", 4, (1, 128)),
    "quanto/int8": ("quanto int8", 8, ROW),
    "torchao/float8-row": ("torchao float8", 8, ROW),
    "torchao/int3-row-asym": ("torchao int3", 3, ROW),
    "torchao/int4-group": ("torchao int4", 4, (1, 32)),
    "torchao/int8-activations-too": ("torchao int8", 8, ROW),
    "torchao/int8-group": ("torchao int8", 8, (1, 32)),
    "torchao/int8-row": ("torchao int8", 8, ROW),
}
"""Format, bits and what shares a scale, of the down projection of each fixture."""
ONE_EACH = (
    "gptq/v2-4bit", "awq/gemm", "auto-round/auto-gptq-4bit", "bitsandbytes/nf4-double", "bitsandbytes/int8", "fp8/block",
    "compressed-tensors/pack-4bit-group-asym", "compressed-tensors/int-channel", "torchao/int8-row", "hqq/8bit", "quanto/int4",
)  # fmt: skip
"""One fixture of each layout."""
NOT_NEAREST = {name for name in EXPECTED if name.startswith("gptq/")}
"""Packages that let later weights make up for the error of earlier ones."""


def read(directory: Path, module: str = DOWN) -> PackedMatrix | None:
    with Checkpoint.open(directory) as checkpoint:
        return read_packed_matrix(checkpoint, module)


@cache
def fixture(name: str, module: str = DOWN) -> PackedMatrix:
    found = read(FIXTURES / name, module)
    assert found is not None
    return found


def plain(cols: int) -> torch.Tensor:
    return load_file(FIXTURES / "plain" / "down_proj.safetensors")[str(cols)]


def test_every_fixture_is_tested():
    assert {f"{file.parent.parent.name}/{file.parent.name}" for file in FIXTURES.glob("*/*/config.json")} == set(
        EXPECTED
    )


@pytest.mark.parametrize("name", EXPECTED)
def test_weights_are_those_of_the_package_that_packed_them(name):
    for module, truth in load_file(FIXTURES / name / "dequantized.safetensors").items():
        found = fixture(name, module)
        assert found.module == module
        assert found.weights.dtype == torch.float32
        if truth.dtype == torch.float32:
            # At most three roundings of float32 are in another order (bitsandbytes multiplies by 1/127, quanto subtracts last).
            torch.testing.assert_close(found.weights, truth, rtol=4e-7, atol=4e-7 * float(truth.abs().max()))
        else:
            assert torch.equal(found.weights.to(truth.dtype), truth), "they round once, to 16 bits"


@pytest.mark.parametrize(("name", "expected"), EXPECTED.items())
def test_what_is_said_about_a_matrix(name, expected):
    found = fixture(name)
    assert (found.format, found.bits, found.shared) == expected
    shape = found.weights.shape
    assert found.steps.dtype == torch.float32
    assert (found.steps.expand(shape) > 0).all()
    assert found.at_end.dtype == torch.bool
    assert found.at_end.shape == shape
    if found.blocks is not None:
        assert not found.blocks.dtype.is_floating_point
        found.blocks.expand(shape)


@pytest.mark.parametrize("name", sorted(EXPECTED.keys() - NOT_NEAREST))
def test_inside_the_grid_nothing_is_off_by_more_than_half_a_step(name):
    found = fixture(name)
    before = plain(found.weights.shape[1])
    # The model was in bfloat16 or float16 when it was packed, and some round scales and zeros after choosing codes:
    # those of "double" to 8 bits, coarse beside the block with the weight of 2.
    slack = before.abs() * (0.1 if "double" in name else 2**-7) + 0.02 * found.steps
    off = (found.weights - before).abs()
    inside = ~found.at_end
    assert inside.any() or found.bits == 1
    assert (off[inside] <= (0.5 * found.steps + slack).expand(off.shape)[inside]).all()
    assert not (off <= (0.4 * found.steps).expand(off.shape))[inside].all() or found.bits == 1, (
        "and the steps are no wider"
    )


@pytest.mark.parametrize("name", sorted(EXPECTED.keys() - {"fp8/matrix"}))
def test_a_block_has_one_scale(name):
    found = fixture(name)
    rows, cols = found.weights.shape
    high, wide = found.shared
    for row, col in ((0, 0), PLANTED, (rows - 1, cols - 1)):
        block = found.block(row, col)
        assert block[row, col]
        assert int(block.sum()) == high * wide
        if not any(uneven in name for uneven in ("fp", "nf4", "float")):
            assert found.steps.expand(rows, cols)[block].unique().numel() == 1


def test_blocks_of_mixed_columns_are_those_of_their_group():
    found = fixture("gptq/v1-4bit-act-order")
    of_col = load_file(FIXTURES / "gptq" / "v1-4bit-act-order" / "model.safetensors")[f"{DOWN}.g_idx"]
    assert not torch.equal(of_col, torch.arange(96) // 32), "the fixture has its columns in another order"
    block = found.block(*PLANTED)
    assert block[5].tolist() == (of_col == of_col[77]).tolist()
    assert not block[[0, 4, 6, 31]].any()


def test_a_clipped_weight_is_at_the_end_of_its_grid():
    """Three symmetric bits reach -4 to 3 steps, and the step was chosen so that 2 is at 3.5 of them."""
    found = fixture("gptq/v1-3bit")
    assert found.at_end[PLANTED]
    assert 1.6 < float(found.weights[PLANTED]) < 1.8


def test_a_symmetric_grid_may_leave_its_lowest_code_out():
    found = fixture("bitsandbytes/int8")
    step = found.steps.expand(found.weights.shape)
    assert torch.equal(found.at_end, (found.weights / step).round().abs() == 127)
    assert found.at_end.any(1).all(), "the largest weight of each row sets its scale"


def test_modules_of_two_groups_are_read_by_their_own():
    assert fixture("compressed-tensors/two-groups").bits == 8
    assert (fixture("compressed-tensors/two-groups", QUERY).bits, fixture("compressed-tensors/two-groups", QUERY).shared) == (
        4, (1, 32),
    )  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_plain_and_absent_modules_are_none(name):
    assert read(FIXTURES / name, "model.norm") is None
    assert read(FIXTURES / name, "model.layers.7.mlp.down_proj") is None
    assert read(FIXTURES / name, "lm_head") is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ONE_EACH)
def test_a_plain_weight_beside_packed_ones_is_none(name, dtype, tmp_path):
    change(
        FIXTURES / name,
        tmp_path / "model",
        lambda tensors: tensors.update({"lm_head.weight": torch.ones(4, 4, dtype=dtype)}),
    )
    assert read(tmp_path / "model", "lm_head") is None
    assert read(tmp_path / "model") is not None


def test_formats_in_words():
    expected = {
        "gptq/v1-3bit": "gptq, 3 bits", "awq/gemm": "awq, 4 bits", "bitsandbytes/int8": "bitsandbytes, 8 bits",
        "fp8/block": "fp8", "quanto/int4": "quanto", "torchao/int8-row": "torchao", "hqq/8bit": "hqq",
        "compressed-tensors/nvfp4": "compressed-tensors, 4 bits",
    }  # fmt: skip
    for name, words in expected.items():
        with Checkpoint.open(FIXTURES / name) as checkpoint:
            assert packed_format(checkpoint) == words


def test_a_plain_checkpoint_has_no_format(write_model):
    with Checkpoint.open(write_model({f"{DOWN}.weight": torch.ones(2, 3)})) as checkpoint:
        assert packed_format(checkpoint) is None
        assert read_packed_matrix(checkpoint, DOWN) is None


@pytest.mark.parametrize("end", ["", "_blocks", "_packed"])
def test_experts_in_one_tensor_are_not_read_and_not_plain(write_model, end):
    experts = "model.layers.0.mlp.experts.down_proj"
    directory = write_model(
        {f"{experts}{end}": torch.zeros(2, 4, 4, dtype=torch.uint8)}, quantization_config={"quant_method": "mxfp4"}
    )
    with pytest.raises(QuantizedCheckpointError, match="packed together in one tensor"):
        read(directory, experts)


def test_what_was_read_outlives_the_files(tmp_path):
    shutil.copytree(FIXTURES / "torchao" / "int8-row", tmp_path / "model")
    with Checkpoint.open(tmp_path / "model") as checkpoint:
        found = read_packed_matrix(checkpoint, DOWN)
        assert found is not None
        # Nothing that was handed out is a view of the file: writing to it leaves the next reading alone.
        for each in (found.weights, found.steps, found.at_end):
            each.zero_()
        again = read_packed_matrix(checkpoint, DOWN)
    assert again is not None
    assert again.weights.any() and again.steps.all()


def test_the_memory_of_the_stored_tensors_is_given_back(monkeypatch):
    dropped: list[str] = []
    monkeypatch.setattr(Checkpoint, "drop", lambda self, names: dropped.extend(names))
    assert read(FIXTURES / "gptq" / "v2-4bit") is not None
    assert sorted(dropped) == sorted(parts("gptq/v2-4bit"))


def test_only_the_bytes_of_the_module_come_over_the_network(tmp_path, monkeypatch):
    shutil.copytree(FIXTURES / "gptq" / "v2-4bit", tmp_path / "model")

    def add_ballast(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = torch.zeros(1 << 20)

    change(FIXTURES / "gptq" / "v2-4bit", tmp_path / "large", add_ballast)
    with LocalHub({"acme/tiny": tmp_path / "large"}) as hub:
        hub.point_client_here(monkeypatch, tmp_path / "home")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        with Checkpoint.open("acme/tiny", cache_dir=tmp_path / "cache") as checkpoint:
            found = read_packed_matrix(checkpoint, DOWN)
            assert found is not None
            assert torch.equal(found.weights, fixture("gptq/v2-4bit").weights)
            assert checkpoint.bytes_fetched < 1 << 20
        from huggingface_hub.utils import close_session

        close_session()


# What is wrong with a file


def change(source: Path, to: Path, edit: Callable[[dict[str, torch.Tensor]], Any], **config: Any) -> Path:
    """A fixture with other tensors, or other settings of its quantizer; a setting of None is left out."""
    to.mkdir(exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    with safe_open(source / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    edit(tensors)
    save_file({name: each.contiguous() for name, each in tensors.items()}, to / "model.safetensors", metadata=metadata)
    content = json.loads((source / "config.json").read_text())
    settings = {**content.get("quantization_config", {}), **config}
    kept = {key: value for key, value in settings.items() if value is not None}
    content.pop("quantization_config", None)
    (to / "config.json").write_text(json.dumps(content | ({"quantization_config": kept} if kept else {})))
    return to


def unchanged(tensors: dict[str, torch.Tensor]) -> None:
    pass


def parts(name: str) -> list[str]:
    return [each for each in load_file(FIXTURES / name / "model.safetensors") if each.startswith(f"{DOWN}.")]


def refused(directory: Path, name: str) -> bool:
    """Whether a broken fixture is refused; where it is not, it must read as the whole one does."""
    try:
        found = read(directory)
    except (MalformedFileError, QuantizedCheckpointError) as error:
        assert DOWN in str(error) or "config.json" in str(error)
        return True
    assert found is not None
    whole = fixture(name).weights
    # What is not needed may be missing. Where only the codes say how many rows there are, fewer make a smaller matrix.
    assert torch.equal(found.weights, whole[: len(found.weights)])
    return False


@pytest.mark.parametrize("name", EXPECTED)
def test_a_missing_tensor_is_never_guessed(name, tmp_path):
    needed = [
        part
        for part in parts(name)
        if refused(change(FIXTURES / name, tmp_path / part, lambda tensors, part=part: tensors.pop(part)), name)
    ]
    assert len(needed) >= 2, "codes and scales"


@pytest.mark.parametrize("name", EXPECTED)
def test_a_tensor_of_another_length_is_never_guessed(name, tmp_path):
    def halve(tensors: dict[str, torch.Tensor], part: str) -> None:
        tensors[part] = tensors[part][: len(tensors[part]) // 2] if tensors[part].dim() else tensors[part].repeat(2)

    # Half of quanto's 4 bits is 2 bits, and nothing else says which of them it is.
    cut = [part for part in parts(name) if not part.endswith("weight._data._data")]
    assert any([refused(change(FIXTURES / name, tmp_path / part, partial(halve, part=part)), name) for part in cut])


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_tensor_of_another_dtype_is_never_guessed(name, tmp_path):
    for part in parts(name):
        directory = change(
            FIXTURES / name,
            tmp_path / part,
            lambda tensors, part=part: tensors.update({part: tensors[part].to(torch.complex64)}),
        )
        refused(directory, name)


JUNK: tuple[Any, ...] = (None, "x", -1, 0, [], {}, True)


def places(settings: dict[str, Any]) -> list[tuple[str, ...]]:
    """The ways to every value of nested objects."""
    return [
        (key, *rest)
        for key, value in settings.items()
        for rest in [(), *(places(value) if isinstance(value, dict) else [])]
    ]


@pytest.mark.parametrize("name", sorted({*ONE_EACH, "compressed-tensors/naive-float-block"} - {"quanto/int4"}))
def test_a_strange_setting_is_never_guessed(name, tmp_path):
    content = json.loads((FIXTURES / name / "config.json").read_text())
    shutil.copytree(FIXTURES / name, tmp_path / "model")
    for place in places(content["quantization_config"]):
        for junk in JUNK:
            changed = json.loads(json.dumps(content))
            inside = changed["quantization_config"]
            for key in place[:-1]:
                inside = inside[key]
            inside[place[-1]] = junk
            (tmp_path / "model" / "config.json").write_text(json.dumps(changed))
            refused(tmp_path / "model", name)


@pytest.mark.parametrize("junk", JUNK)
def test_a_strange_quant_state_is_never_guessed(junk, tmp_path):
    part = f"{DOWN}.weight.quant_state.bitsandbytes__nf4"
    source = FIXTURES / "bitsandbytes" / "nf4-double"
    state = json.loads(bytes(load_file(source / "model.safetensors")[part].tolist()))
    texts = [json.dumps({**state, key: junk}) for key in state if key != "nested_offset" or type(junk) is not int]
    for text in (*texts, json.dumps(junk), f"{json.dumps(state)} {junk}"):
        given = torch.tensor(list(text.encode()), dtype=torch.uint8)
        directory = change(source, tmp_path / "model", lambda tensors, given=given: tensors.update({part: given}))
        refused(directory, "bitsandbytes/nf4-double")


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("gptq/v2-4bit", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; read: 'gptq', 'gptq_v2'"),
        ("gptq/v2-4bit", {"checkpoint_format": "gptq_v3"}, "gptq_v3"),
        ("gptq/v2-4bit", {"checkpoint_format": None, "format": "gptq_p"}, "gptq_p"),
        ("gptq/v2-4bit", {"is_marlin_format": True}, "is_marlin_format"),
        ("gptq/v2-4bit", {"pack_dtype": "int16"}, "pack_dtype"),
        ("awq/gemm", {"version": "gemv"}, "version is 'gemv'"),
        ("awq/auto-round", {"packing_format": "auto_round:exllamav2"}, "packing_format"),
        ("compressed-tensors/pack-4bit-group", {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        (
            "compressed-tensors/pack-4bit-group",
            {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparse-24-bitmask",
        ),
        ("torchao/int8-row", {"quant_method": "torcho"}, "Did you mean 'torchao'?"),
        ("torchao/int8-row", {"quant_method": "bitnet"}, "Read are gptq, awq"),
        ("torchao/int8-row", {"quant_method": None}, "no quant_method"),
    ],
)
def test_what_is_not_read_says_what_is(name, config, message, tmp_path):
    with pytest.raises(QuantizedCheckpointError, match=r"docs/packed-formats\.md") as caught:
        read(change(FIXTURES / name, tmp_path / "model", unchanged, **config))
    assert message in str(caught.value)
    assert DOWN in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [("gptq/v2-4bit", "no quant_method"), ("hqq/8bit", "no quant_method"), ("bitsandbytes/int8", "no quant_method")],
)
def test_packed_tensors_without_settings_are_not_taken_for_plain(name, message, tmp_path):
    content = json.loads((FIXTURES / name / "config.json").read_text())
    directory = change(FIXTURES / name, tmp_path / "model", unchanged, **dict.fromkeys(content["quantization_config"]))
    with pytest.raises(QuantizedCheckpointError, match=message):
        read(directory)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"config_groups": {}}, "no target of the config"),
        ({"config_groups": None}, "config_groups None"),
        ({"config_groups": {"a": {"targets": ["re:.*q_proj"], "weights": {"num_bits": 4}}}}, "q_proj"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": None}}}, "weights None"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 9, "strategy": "group"}}}}, "num_bits 9"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group"}}}}, "of what size"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "token"}}}}, "token"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 5, "strategy": "tensor"}}}}, "5 bits"),
        ({"config_groups": {"a": {"targets": ["Linear"], "format": "int-quantized",
                                  "weights": {"num_bits": 4, "strategy": "tensor"}}}}, "int-quantized"),
        ({"config_groups": {"a": {"targets": ["Linear"], "format": "pack-quantised", "weights": {}}}}, "pack-quantised"),
        ({"ignore": ["re:.*down_proj"]}, "to ignore"),
        ({"ignore": ["re:("]}, "pattern"),
        ({"ignore": "lm_head"}, "names of modules"),
    ],
)  # fmt: skip
def test_groups_that_do_not_fit_their_modules(config, message, tmp_path):
    with pytest.raises((MalformedFileError, QuantizedCheckpointError)) as caught:
        read(change(FIXTURES / "compressed-tensors" / "pack-4bit-group", tmp_path / "model", unchanged, **config))
    assert message in str(caught.value)


def test_a_name_goes_before_a_pattern_and_a_pattern_before_the_class(tmp_path):
    source = FIXTURES / "compressed-tensors" / "pack-4bit-group"
    right = json.loads((source / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    wrong = {**right, "weights": {**right["weights"], "num_bits": 8}}
    for better, worse in ((DOWN, "re:.*down_proj"), (DOWN, "Linear"), ("re:.*down_proj", "Linear")):
        for groups in ([right, wrong], [wrong, right]):
            named = {
                str(place): {**each, "targets": [better if each is right else worse]}
                for place, each in enumerate(groups)
            }
            found = read(change(source, tmp_path / "model", unchanged, config_groups=named))
            assert found is not None and found.bits == 4


def test_block_sizes_come_from_the_config(tmp_path):
    for size in (None, [32], [0, 48], [32, 48], "128"):
        with pytest.raises(MalformedFileError):
            read(change(FIXTURES / "fp8" / "block", tmp_path / "model", unchanged, weight_block_size=size))


def test_settings_that_are_no_settings(write_model):
    directory = write_model({f"{DOWN}.qweight": torch.zeros(2, dtype=torch.int32)}, quantization_config="gptq")
    with pytest.raises(MalformedFileError, match="quantization_config 'gptq'"):
        read(directory)


def test_codes_without_scales_are_not_plain(write_model):
    for method in (
        "gptq",
        "awq",
        "bitsandbytes",
        "compressed-tensors",
        "fp8",
        "torchao",
        "hqq",
        "quanto",
        "auto-round",
    ):
        settings = {"quant_method": method, "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 8}}},
                    "format": "int-quantized"}  # fmt: skip
        directory = write_model({f"{DOWN}.weight": torch.zeros(2, 2, dtype=torch.int8)}, quantization_config=settings)
        with pytest.raises(MalformedFileError):
            read(directory)


def test_kinds_of_torchao_that_are_not_read(tmp_path):
    source = FIXTURES / "torchao" / "int8-row"
    tensors = load_file(source / "model.safetensors")
    shutil.copytree(source, tmp_path / "model")
    for text, message in (
        ('{"_type": "Int4TilePackedTo4dTensor", "_data": {}}', "Int4TilePackedTo4dTensor; read: Int8Tensor"),
        ('{"_type": "Int8Tensor"}', "metadata is"),
        ("{", "not JSON"),
        (
            '{"_type": "Int8Tensor", "_data": {"block_size": [1]}, "_tensor_data_names": ["qdata", "scale"]}',
            "block_size [1]",
        ),
        ('{"_type": "IntxUnpackedToInt8Tensor", "_data": {"block_size": [1, 96], "target_dtype": "int12"}}', "int12"),
    ):
        save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={f"{DOWN}.weight": text})
        with pytest.raises((MalformedFileError, QuantizedCheckpointError)) as caught:
            read(tmp_path / "model")
        assert message in str(caught.value)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(MalformedFileError, match="no file says"):
        read(tmp_path / "model")
