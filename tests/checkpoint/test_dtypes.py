import numpy as np
import pytest
import torch

from superweights.checkpoint.dtypes import STORAGE_TYPES
from superweights.errors import QuantizedCheckpointError

READABLE = [each for each in STORAGE_TYPES.values() if each.torch and hasattr(torch, each.torch) and each.name != "C64"]


@pytest.mark.parametrize("storage", READABLE, ids=lambda each: each.name)
def test_values_are_those_of_torch(storage) -> None:
    item = storage.nbits // 8
    if storage.name == "BOOL":
        raw = bytes([0, 1, 1, 0])
    elif item == 1:
        raw = bytes(range(256))
    else:
        raw = np.random.default_rng(0).integers(0, 256, 4096 * item, dtype=np.uint8).tobytes()
    expected = torch.frombuffer(bytearray(raw), dtype=getattr(torch, storage.torch)).float().numpy()
    np.testing.assert_array_equal(storage.floats(raw), expected)


@pytest.mark.parametrize("storage", READABLE, ids=lambda each: each.name)
def test_one_value_is_not_rounded(storage) -> None:
    raw = b"\1" if storage.name == "BOOL" else bytes([0, 0, 0, 0, 0, 0, 0xF1, 0x3F])[-(storage.nbits // 8) :]
    expected = torch.frombuffer(bytearray(raw), dtype=getattr(torch, storage.torch))[0].item()
    assert storage.value(raw) == float(expected)


@pytest.mark.parametrize("name", ["C64", "F4", "F6_E2M3", "F6_E3M2"])
def test_packed_and_complex_values_are_refused(name: str) -> None:
    with pytest.raises(QuantizedCheckpointError, match=name):
        STORAGE_TYPES[name].floats(bytes(8))


def test_the_parts_of_every_float_fill_its_bits() -> None:
    for storage in STORAGE_TYPES.values():
        if storage.exponent and storage.name != "F8_E8M0":
            assert 1 + storage.exponent + storage.mantissa == storage.nbits, storage.name
