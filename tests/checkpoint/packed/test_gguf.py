"""The grids of GGUF's types, against the package's own rounding and against plain arithmetic on codes."""

import numpy as np
import pytest
import torch

from superweights.checkpoint.packed.grids import PackedMatrix
from superweights.errors import QuantizedCheckpointError

gguf = pytest.importorskip("gguf")

from superweights.checkpoint.packed import gguf as ours  # noqa: E402

WRITABLE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ1_0", "TQ2_0"]
EVEN = [name for name, layout in ours._TYPES.items() if layout.codes]
UNEVEN = [name for name in ours._TYPES if name not in EVEN]
HALVES = {
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "MXFP4": (), "NVFP4": (),
}  # fmt: skip
"""Where a block holds half floats; at its start where nothing is said."""


def normal(rows: int = 8, cols: int = 512) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, cols)).astype(np.float32)


def random_blocks(kind: str, rows: int = 8, cols: int = 512) -> np.ndarray:
    """Random codes and scales of ordinary size: the bytes of half floats that are no codes are those of 0.01 to 1."""
    generator = np.random.default_rng(1)
    numbered = gguf.GGMLQuantizationType[kind]
    blocks = generator.integers(0, 256, gguf.quant_shape_to_byte_shape((rows, cols), numbered), dtype=np.uint8)
    by_block = blocks.reshape(-1, gguf.GGML_QUANT_SIZES[numbered][1])
    for start in HALVES.get(kind, (0,)):
        by_block[:, start + 1] = 0x20 + generator.integers(0, 28, len(by_block), dtype=np.uint8)
    if kind == "MXFP4":
        by_block[:, 0] = 110 + generator.integers(0, 28, len(by_block), dtype=np.uint8)  # powers of two
    return blocks


def read(blocks: np.ndarray, kind: str) -> PackedMatrix:
    return ours.read_blocks(blocks, kind, module="m")


@pytest.mark.parametrize("kind", WRITABLE)
def test_rounding_is_off_by_half_a_step(kind):
    weights = normal()
    found = read(gguf.quantize(weights, gguf.GGMLQuantizationType[kind]), kind)
    off = (found.weights - torch.from_numpy(weights)).abs()
    inside = ~found.at_end
    assert inside.float().mean() > 0.5
    assert (off <= (0.501 * found.steps + 2e-3))[inside].all()  # scales are half floats


@pytest.mark.parametrize("kind", EVEN)
def test_weights_of_a_block_lie_whole_steps_apart(kind):
    ternary = kind.startswith("TQ")  # of which random bytes are no codes
    found = read(gguf.quantize(normal(), gguf.GGMLQuantizationType[kind]) if ternary else random_blocks(kind), kind)
    layout = ours._TYPES[kind]
    assert found.shared == (1, layout.shared)
    values = found.weights.double().view(-1, layout.shared)
    steps = found.steps.double().view(-1, layout.shared)
    assert (steps == steps[:, :1]).all()
    at_end = found.at_end.view(-1, layout.shared)
    values, steps, at_end = (each[steps[:, 0] > 0] for each in (values, steps, at_end))
    apart = (values - values[:, :1]) / steps
    assert (apart - apart.round()).abs().max() < 1e-3
    codes = apart.round() - apart.round().amin(1, keepdim=True)
    assert layout.codes / 2 <= codes.max() < layout.codes + (kind == "Q8_0")  # random bytes hold -128 too
    spans = codes.amax(1) == layout.codes - 1
    if kind != "Q8_0":
        assert spans.any()
        assert torch.equal(at_end[spans], ((codes == 0) | (codes == layout.codes - 1))[spans])


@pytest.mark.parametrize("kind", UNEVEN)
def test_the_step_of_an_uneven_grid_is_the_wider_gap(kind):
    blocks = random_blocks(kind, rows=1, cols=256)
    found = read(blocks, kind)
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    (start, end), *_ = ours._TYPES[kind].spans
    grids, looked_at = [], 0
    for code in range(16):
        filled = blocks.reshape(-1, size).copy()
        filled[:, start:end] = code | code << 4
        grids.append(gguf.dequantize(filled.reshape(blocks.shape), gguf.GGMLQuantizationType[kind])[0])
    for place in range(256):
        grid = sorted({float(values[place]) for values in grids})
        if len(grid) < 2 or not np.isfinite(grid).all():  # a scale of 0, or none
            continue
        at = grid.index(float(found.weights[0, place]))
        near = grid[max(at - 1, 0) : at + 2]
        assert float(found.steps[0, place]) == pytest.approx(max(np.diff(near)), rel=1e-5)
        assert bool(found.at_end[0, place]) == (at in (0, len(grid) - 1))
        looked_at += 1
    assert looked_at > 100


@pytest.mark.parametrize("kind", list(ours._CODEBOOKS))
def test_codes_for_several_weights_have_values_and_no_grid(kind):
    blocks = random_blocks(kind)
    found = read(blocks, kind)
    assert np.array_equal(found.weights.numpy(), gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]))
    assert found.steps.isnan().all() and not found.at_end.any()
    assert 8 * gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1] / 256 == found.bits


def test_threads_give_what_one_gives(monkeypatch):
    blocks = random_blocks("Q6_K", rows=37)
    expected = read(blocks, "Q6_K")
    monkeypatch.setattr(ours, "_PIECE_BYTES", 5 * blocks.shape[1])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    found = read(blocks, "Q6_K")
    assert torch.equal(found.weights, expected.weights) and torch.equal(found.steps, expected.steps)


def test_an_unknown_type_is_named():
    with pytest.raises(QuantizedCheckpointError, match="Q8_1"):
        read(np.zeros((1, 40), np.uint8), "Q8_1")


@pytest.mark.parametrize("scale", [np.inf, np.nan])
@pytest.mark.parametrize(("kind", "place"), [("Q4_0", 0), ("Q5_1", 0), ("Q5_1", 2), ("IQ4_NL", 0)])
def test_a_scale_that_is_no_number_shows_in_the_values_alone(kind, place, scale):
    """Also as the minimum of a block, where the ends of its grid are infinite both."""
    blocks = random_blocks(kind)
    by_block = blocks.reshape(-1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1])
    by_block[0, place : place + 2] = np.array([scale], np.float16).view(np.uint8)
    found = read(blocks, kind)
    assert not found.weights.flatten()[:32].isfinite().all() and found.weights.flatten()[32:].isfinite().all()
