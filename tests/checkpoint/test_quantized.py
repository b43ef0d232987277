from typing import Any

import pytest

from superweights.checkpoint import quantization_of


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq, 4 bits"),
        ({"quant_method": "awq", "w_bit": 4}, "awq, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ({"load_in_4bit": True}, "bitsandbytes, 4 bits"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 4}}}},
         "compressed-tensors, 4 bits"),
        ({"bits": 3}, "an unnamed quantizer, 3 bits"),
    ],
)  # fmt: skip
def test_the_quantizer_is_named(settings: dict[str, Any], expected: str) -> None:
    assert quantization_of({"quantization_config": settings}) == expected
    assert quantization_of({"text_config": {"quantization_config": settings}}) == expected


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {}}, {"text_config": 3}])
def test_plain_weights_have_none(config: dict[str, Any]) -> None:
    assert quantization_of(config) is None


@pytest.mark.parametrize(
    "settings", [{"bits": "four"}, {"config_groups": [1]}, {"config_groups": {"a": {"weights": 1}}}]
)
def test_strange_settings_do_not_break_it(settings: dict[str, Any]) -> None:
    assert quantization_of({"quantization_config": settings}) == "an unnamed quantizer"
