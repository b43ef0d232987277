"""Packed products against plain products of the dequantized weights, and super weights against plain float arithmetic.

Why the bound. A kernel rounds its activations, its scales and its result to bfloat16, whose rounding is 2^-9 of a value; adding
a super weight and a bias rounds twice more where the model is bfloat16. So |difference| <= n * 2^-9 * sum |x| |w| with n = 5;
sums are float32 and add nothing that shows. By dequantized tiles in float32, n is 2 at most, of rounding the result.
"""

import copy
import logging

import pytest
import torch

from superweights.errors import CoordinateError, MalformedFileError, UsageError
from superweights.integrations import packed_linear
from superweights.integrations.packed_linear import MANY_TOKENS, MANY_TOKENS_INT8, PackedLinear, kernel_for
from superweights.interventions.quantized_checkpoint import packed_tensors
from superweights.quantization.activations import rounded_activations
from superweights.quantization.held_out import quantize_held_out
from superweights.quantization.scheme import Scheme

ULP = 2.0**-9
"""Of bfloat16: how far rounding moves a value, at most, of its size."""
ROWS, COLS, ROW, COL = 112, 256, 3, 130
SCHEMES = ["int4-g32", "int4-g128", "int4-row", "int3-g64", "int2-g32", "int8-row", "int6-row", "int8-g64", "int4-g16"]
FLOATS = [torch.float32, torch.bfloat16]
TOKENS = [1, 5, MANY_TOKENS_INT8 + 3, MANY_TOKENS + 3]


def matrix(rows: int = ROWS, cols: int = COLS, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    found = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows * cols)) * 0.02
    found[ROW, min(COL, cols - 1)] = 1.7
    return found.to(dtype)


def inputs(tokens: int, cols: int = COLS, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def packed(scheme: str, weight: torch.Tensor | None = None, **options: object) -> PackedLinear:
    return PackedLinear.pack(matrix() if weight is None else weight, Scheme.parse(scheme), **options)


def assert_near(found: torch.Tensor, layer: PackedLinear, given: torch.Tensor, *, roundings: float) -> None:
    weight, exact = layer.dequantized().double(), given.double()
    bias = torch.zeros(len(weight), dtype=torch.float64) if layer.bias is None else layer.bias.double()
    expected = exact @ weight.t() + bias
    bound = exact.abs() @ weight.abs().t() + bias.abs()
    assert ((found.double() - expected).abs() <= roundings * ULP * bound + 1e-6).all()


@pytest.mark.parametrize(
    ("case", "kernel"),
    [
        ((4, 4096, 4096, 32, "cpu"), "int4"),
        ((4, 4096, 4096, 8, "cpu"), "int4"),  # groups of 512 are two of 256
        ((4, 4096, 4096, 1, "cpu"), "int4"),
        ((2, 48, 64, 2, "cpu"), "int4"),
        ((4, 40, 64, 2, "cpu"), "dequantize"),
        ((4, 40, 64, 1, "cpu"), "int8"),
        ((4, 48, 64, 4, "cpu"), "dequantize"),
        ((8, 7, 64, 1, "cpu"), "int8"),
        ((8, 7, 72, 1, "cpu"), "dequantize"),
        ((8, 48, 64, 2, "cpu"), "dequantize"),
        ((4, 48, 64, 1, "meta"), "dequantize"),
    ],
)
def test_which_kernel(case, kernel):
    assert kernel_for(*case) == kernel


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_are_those_of_the_dequantized_weights(scheme, dtype, tokens):
    layer = packed(scheme, matrix(dtype=dtype), held=[(ROW, COL)], bias=inputs(1, ROWS)[0].to(dtype))
    given = inputs(tokens, dtype=dtype)
    found = layer(given)
    assert (found.dtype, found.shape) == (dtype, (tokens, ROWS))
    exact = dtype == torch.float32 and (tokens >= MANY_TOKENS or layer.kernel == "dequantize")
    assert_near(found, layer, given, roundings=0.01 if exact else 5)


@pytest.mark.parametrize(("rows", "cols"), [(16, 32), (48, 64), (80, 96), (144, 160), (33, 64), (1, 32), (5, 40)])
@pytest.mark.parametrize("scheme", ["int4-g32", "int8-row"])
def test_any_shape(scheme, rows, cols):
    """Shapes with a rest of a block, and shapes that a kernel would compute wrongly or crash on."""
    cols = 32 if cols == 40 and scheme == "int4-g32" else cols
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(1))
    layer = packed(scheme, weight)
    for tokens in TOKENS:
        assert_near(layer(inputs(tokens, cols)), layer, inputs(tokens, cols), roundings=5)
    stored = packed_tensors(quantize_held_out(weight, Scheme.parse(scheme), []))
    assert torch.equal(layer.state_dict()["weight_packed"], stored[0])


@pytest.mark.parametrize(("scheme", "cols"), [("int4-g512", 1536), ("int4-g96", 288)])
def test_a_longer_group_is_several_of_the_kernel(scheme, cols):
    layer = packed(scheme, matrix(48, cols) * torch.linspace(1, 3, cols))
    assert layer.kernel == "int4"
    for tokens in TOKENS:
        assert_near(layer(inputs(tokens, cols)), layer, inputs(tokens, cols), roundings=5)


@pytest.mark.parametrize("scheme", ["int4-g32", "int8-row", "int8-g64"])
def test_many_pieces_give_what_one_gives(scheme, monkeypatch):
    held, given = [(3, COL), (70, 1), (ROWS - 1, 0)], inputs(TOKENS[-1])
    one = packed(scheme, held=held)
    expected = one(given), one.dequantized(), one.state_dict()["weight_packed"]
    monkeypatch.setattr(packed_linear, "_TILE", 1)
    monkeypatch.setattr(packed_linear, "_PACK_ROWS", 64)
    layer = packed(scheme, held=held)
    found = layer(given), layer.dequantized(), layer.state_dict()["weight_packed"]
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-6)  # another split of a sum
    assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2])


def test_leading_dimensions_and_no_tokens():
    layer = packed("int4-g32")
    given = inputs(6)
    assert torch.equal(layer(given.view(2, 3, COLS)), layer(given).view(2, 3, ROWS))
    assert torch.equal(layer(given[0]), layer(given)[0])
    assert layer(given[:0]).shape == (0, ROWS)


@pytest.mark.parametrize("scheme", ["int4-g32", "int8-row"])
def test_views_at_odd_addresses(scheme):
    """Torch's int8 kernel crashes on these."""
    layer = packed(scheme)
    together = inputs(4, COLS + 3, dtype=torch.bfloat16)
    for given in (together[:1, 3:], together[:, 1:-2], together[:, ::1][:, :COLS], together.t()[:COLS].t()):
        assert torch.equal(layer(given), layer(given.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_state_is_the_stored_layout_to_the_bit(scheme, dtype):
    weight = matrix(dtype=dtype)
    layer = packed(scheme, weight, held=[(ROW, COL)])
    quantized = quantize_held_out(weight, Scheme.parse(scheme), [ROW * COLS + COL])
    expected = quantized.dequantized()
    expected[ROW, COL] = weight[ROW, COL]
    assert torch.equal(layer.dequantized(), expected)
    stored = dict(zip(("weight_packed", "weight_scale", "weight_shape"), packed_tensors(quantized), strict=True))
    for _ in range(2):
        state = layer.state_dict()
        assert state.keys() == stored.keys()
        assert all(
            torch.equal(state[name], stored[name]) and state[name].dtype == stored[name].dtype for name in stored
        )
        layer.load_state_dict(state)  # out of the kernel's layout, and back into it
    assert torch.equal(layer.prepare().dequantized(), expected)


def test_no_layout_is_held_beside_the_other():
    layer = packed("int4-g128", matrix(1024, 1024, dtype=torch.bfloat16))
    nbytes = sum(each.nbytes for each in layer.buffers())
    assert (
        nbytes < 1024 * 1024 / 2 * 1.12
    )  # codes; scales of 2 bytes for 64 of codes, and as the kernel wants them, of 4


def test_copies_and_casts_keep_codes_and_scales():
    layer = packed("int4-g32", held=[(ROW, COL)], bias=inputs(1, ROWS)[0])
    given = inputs(3)
    assert torch.equal(copy.deepcopy(layer)(given), layer(given))
    half = copy.deepcopy(layer).to(torch.float16)
    assert (half.weight_scale.dtype, half.kernel_scales.dtype) == (torch.float32, torch.bfloat16)
    assert half.bias is not None and half.bias.dtype == torch.float16
    assert torch.equal(half.dequantized(), layer.dequantized())
    moved = copy.deepcopy(layer).to("meta")
    assert moved.kernel is None and moved.weight_packed.shape == (ROWS, COLS // 8)


@pytest.mark.parametrize("scheme", ["int4-g32", "int8-row"])
def test_a_super_weight_is_plain_float_arithmetic_on_top(scheme):
    """Whatever its code says: here it is rounded with its neighbours first, and then restored."""
    given = inputs(7)
    layer = packed(scheme)
    without = layer(given)
    kernels = layer.dequantized()[ROW, COL].item()
    if scheme == "int4-g32":  # the kernel has scales in bfloat16
        scale = layer.weight_scale[ROW, COL // 32]
        kernels = round(kernels / scale.item()) * scale.bfloat16().item()
    else:
        kernels = round(kernels / layer.weight_scale[ROW, 0].item()) * layer.weight_scale[ROW, 0].bfloat16().item()
    layer.restore(ROW, COL, 123.25)
    expected = without.clone()
    expected[:, ROW] = (without[:, ROW].double() + (123.25 - kernels) * given[:, COL].double()).float()
    found = layer(given)
    torch.testing.assert_close(found, expected, rtol=2**-23, atol=0)  # float32 rounds the factor, then the sum
    assert torch.equal(found[:, :ROW], without[:, :ROW]) and torch.equal(found[:, ROW + 1 :], without[:, ROW + 1 :])
    assert (found[:, ROW] != without[:, ROW]).all()
    assert layer.dequantized()[ROW, COL] == 123.25


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("scheme", ["int4-g32", "int8-row", "int8-g64"])
def test_several_super_weights_of_one_row_and_col(scheme, tokens):
    places = [(ROW, COL), (ROW, 5), (9, COL), (9, 6)]
    weight = matrix()
    for place, value in zip(places, (30.0, -20.0, 7.5, 0.001), strict=True):
        weight[place] = value
    layer = packed(scheme, weight, held=places)
    assert all(layer.dequantized()[place] == weight[place] for place in places)
    given = inputs(tokens)
    held = layer.dequantized()
    for place in places:
        weight[place] = 0
    found, plain = layer(given), packed(scheme, weight)(given)
    for row in (ROW, 9):
        exact = sum(given[:, col].double() * held[at, col].item() for at, col in places if at == row)
        torch.testing.assert_close((found - plain)[:, row].double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("int8_units", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("held", [[], [(ROW, COL)], [(ROW, 9)]])
def test_w8a8_is_rounding_with_the_super_activation_kept(tokens, held, int8_units, monkeypatch):
    """As in `rounded_activations`, which replaces it by the token's median and restores it after."""
    monkeypatch.setattr(packed_linear, "multiplies_int8", lambda: int8_units)
    weight = matrix(dtype=torch.bfloat16)
    weight[ROW, 9] = 2.5
    layer = packed("int8-row", weight, held=held, int8_inputs=True, channel=9)
    given = inputs(tokens)
    given[:, 9] *= 500
    places = torch.tensor([[token, 9] for token in range(tokens)])
    expected = rounded_activations(given, places=places)
    exact = layer.dequantized().double()
    reference = expected.double() @ exact.t()
    # A super weight multiplies the exact activation, a little nearer to the truth than the rounded one.
    for row, col in held:
        reference[:, row] += exact[row, col] * (given - expected)[:, col].double()
    found = layer(given).double()
    assert ((found - reference).abs() <= 2 * ULP * (expected.double().abs() @ exact.abs().t())).all()
    plain = packed("int8-row", weight, held=held, int8_inputs=True)(given).double()
    truth = given.double() @ exact.t()
    rest = [row for row in range(ROWS) if row != ROW]
    assert (plain - truth)[:, rest].norm() > 10 * (found - truth)[:, rest].norm()


def test_w8a8_of_tokens_without_anything():
    layer = packed("int8-row", int8_inputs=True, channel=9)
    given = torch.zeros(3, COLS)
    given[1, 9] = 4.0
    found = layer(given)
    assert torch.equal(found[[0, 2]], torch.zeros(2, ROWS))
    scale = layer.weight_scale[:, 0]
    column = (layer.dequantized()[:, 9] / scale).round() * scale.bfloat16().float()
    torch.testing.assert_close(found[1], 4 * column, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", ["int4-g32", "int3-g64", "int2-g32"])
def test_a_layout_that_nothing_reads(scheme, monkeypatch):
    """As on a processor that packs in another way: codes then come back from products with ones."""
    given = inputs(5)
    known = packed(scheme, held=[(ROW, COL)])
    monkeypatch.setattr(packed_linear, "_layout_is_known", lambda *_: False)
    unknown = packed(scheme, held=[(ROW, COL)])
    assert torch.equal(unknown(given), known(given))
    assert torch.equal(unknown.dequantized(), known.dequantized())
    assert torch.equal(unknown.state_dict()["weight_packed"], known.state_dict()["weight_packed"])
    many = inputs(TOKENS[-1])
    assert_near(unknown(many), unknown, many, roundings=5)


def test_the_layout_is_known_here():
    assert packed_linear._layout_is_known(48 % packed_linear._block_rows(), 96)


@pytest.mark.parametrize("scheme", ["int4-g32", "int8-row"])
def test_tiles_in_bfloat16(scheme, monkeypatch):
    """As on a processor that multiplies bfloat16 itself."""
    monkeypatch.setattr(packed_linear, "multiplies_bfloat16", lambda: True)
    given = inputs(TOKENS[-1])
    layer = packed(scheme, held=[(ROW, COL)])
    assert_near(layer(given), layer, given, roundings=5)
    rounding = packed("int8-row", int8_inputs=True)
    expected, weight = rounded_activations(given), rounding.dequantized()
    assert ((rounding(given) - expected @ weight.t()).abs() <= 2 * ULP * expected.abs() @ weight.abs().t()).all()


def test_from_when_on_tokens_are_many(monkeypatch):
    """A processor that multiplies bfloat16 has fast tiles, and those of 8-bit codes are made for little."""
    monkeypatch.setattr(packed_linear, "multiplies_bfloat16", lambda: True)
    many = {(kind, dtype): packed(kind)._many_tokens(dtype) for kind in ("int4-g32", "int8-row") for dtype in FLOATS}
    assert many == dict.fromkeys(many, MANY_TOKENS) | {("int8-row", torch.bfloat16): MANY_TOKENS_INT8}
    layer, given = packed("int8-row"), inputs(MANY_TOKENS_INT8, dtype=torch.bfloat16)
    assert torch.equal(layer(given), layer._tiled_product(given))
    assert torch.equal(layer(given[1:]), layer._packed_product(given[1:]))
    monkeypatch.setattr(packed_linear, "multiplies_bfloat16", lambda: False)
    assert packed("int8-row")._many_tokens(torch.bfloat16) == MANY_TOKENS


def test_what_the_cuda_kernel_would_be_given(monkeypatch):
    """There is no such device here: its two ops are played by their documented formulas."""

    def convert(pairs: torch.Tensor, inner: int) -> torch.Tensor:
        assert (pairs.dtype, pairs.shape, inner) == (torch.uint8, (ROWS, COLS // 2), 8)
        return torch.stack([pairs >> 4, pairs & 15], 2).view(ROWS, COLS).int()

    def multiply(given: torch.Tensor, codes: torch.Tensor, group: int, scales: torch.Tensor) -> torch.Tensor:
        assert (given.dtype, scales.dtype, scales.shape) == (torch.bfloat16, torch.bfloat16, (COLS // group, ROWS, 2))
        by_row = scales.float().permute(2, 1, 0).repeat_interleave(group, 2)
        return (given.float() @ ((codes - 8) * by_row[0] + by_row[1]).t()).bfloat16()

    expected = packed("int4-g64", held=[(ROW, COL)])
    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", convert)
    monkeypatch.setattr(torch, "_weight_int4pack_mm", multiply)
    monkeypatch.setattr(packed_linear, "kernel_for", lambda *_, **__: "int4-cuda")
    layer = packed("int4-g64", held=[(ROW, COL)])
    for tokens in TOKENS:
        assert_near(layer(inputs(tokens)), layer, inputs(tokens), roundings=5)
    assert torch.equal(layer.state_dict()["weight_packed"], expected.state_dict()["weight_packed"])


@pytest.mark.parametrize(
    ("scheme", "options"), [("int4-g32", {}), ("int8-row", {}), ("int8-row", {"int8_inputs": True, "channel": 9})]
)
def test_one_graph_under_compile(scheme, options):
    """The backend needs no compiler; with the default one, which does, the same three layers were compiled by hand."""
    layer = packed(scheme, held=[(ROW, COL)], bias=inputs(1, ROWS)[0], **options)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for given in (inputs(2), inputs(TOKENS[-1])):
            assert torch.equal(compiled(given), layer(given))


def test_a_slow_layer_says_so_once(caplog):
    packed_linear._say_slow.cache_clear()
    with caplog.at_level(logging.WARNING):
        for rows in (10, 20, 30):
            packed("int4-g32", matrix(rows, 64))
        packed("int4-g32", matrix(32, 64))
    [record] = caplog.records
    assert "No kernel takes 4 bits with groups of 32" in record.getMessage()


def test_a_plain_layer_of_it():
    layer = packed("int4-g32", held=[(ROW, COL)], bias=inputs(1, ROWS)[0])
    linear = layer.to_linear(torch.bfloat16)
    assert torch.equal(linear.weight, layer.dequantized().bfloat16())
    assert layer.bias is not None and torch.equal(linear.bias, layer.bias.bfloat16())


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: PackedLinear(64, 64, 9), UsageError, "2 to 8 bits"),
        (lambda: PackedLinear(64, 64, 4, groups=3), UsageError, "scales that divide a row"),
        (lambda: PackedLinear(64, 64, 8, groups=2, int8_inputs=True), UsageError, "one scale per row"),
        (lambda: PackedLinear(64, 64, 8, int8_inputs=True, channel=64), CoordinateError, "none of 0 to 63"),
        (lambda: PackedLinear(64, 64, 8, channel=3), CoordinateError, "inputs are not rounded"),
        (lambda: packed("int4-g32-asym"), UsageError, "symmetric"),
        (lambda: packed("int4-tensor"), UsageError, "by row or group"),
        (lambda: packed("nf4-g32"), UsageError, "int2 to int8"),
        (lambda: packed("int4-g32", held=[(ROWS, 0)]), CoordinateError, f"rows are 0 to {ROWS - 1}"),
        (lambda: packed("int4-g32", held=[(ROW, COL)]).restore(ROW, COL, 1), CoordinateError, "restored already"),
        (lambda: packed("int4-g32").restore(0, -1, 1), CoordinateError, f"cols are 0 to {COLS - 1}"),
        (lambda: packed("int8-row", matrix(8, 24), int8_inputs=True), UsageError, "cols that divide by 16"),
    ],
)
def test_what_is_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_tensors_of_another_matrix_are_refused():
    state = packed("int4-g32").state_dict()
    state["weight_shape"] = torch.tensor([ROWS, COLS - 1])
    layer = PackedLinear(COLS, ROWS, 4, groups=8, scale_dtype=torch.float32)
    layer.load_state_dict(state)
    with pytest.raises(MalformedFileError, match=r"112 x 256 weights got tensors of a matrix of \[112, 255\]"):
        layer.prepare()
