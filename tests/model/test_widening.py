from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from superweights.model import widening
from superweights.model.widening import WideProducts, install_wide_products, takes_wide_products

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LARGE = (2500, 640)  # [rows, cols]: three whole tiles of 819 rows and a last one of 43


@pytest.fixture(scope="module")
def products() -> Iterator[WideProducts]:
    products = WideProducts(2)
    yield products
    products.close()


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_is_the_product(found: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, *, transposed: bool) -> None:
    wide = weight.double() if transposed else weight.double().t()  # [cols, rows]
    assert found.dtype == torch.float32
    # A float32 sum of n terms is off by at most n roundings of the sum of their sizes.
    bound = inputs.shape[-1] * torch.finfo(torch.float32).eps * (inputs.double().abs() @ wide.abs())
    assert ((found.double() - inputs.double() @ wide).abs() <= bound).all()


@settings(max_examples=60, deadline=None)
@given(
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    leading=st.lists(st.integers(1, 3), max_size=2),
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    transposed=st.booleans(),
)
def test_small_products_are_float32_products(products, dtypes, leading, rows, cols, transposed):
    inputs = draw(*leading, cols, dtype=dtypes[0])
    weight = draw(cols, rows, dtype=dtypes[1], seed=1) if transposed else draw(rows, cols, dtype=dtypes[1], seed=1)
    found = products.product(inputs, weight, transposed=transposed)
    assert found.shape == (*leading, rows)
    assert_is_the_product(found, inputs, weight, transposed=transposed)


@settings(max_examples=12, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    tokens=st.integers(1, 5),
    rows=st.integers(1000, 2600),
    cols=st.integers(263, 700),
    transposed=st.booleans(),
)
def test_large_products_are_float32_products(products, dtype, tokens, rows, cols, transposed):
    """Above the size from which tiles and threads are used."""
    assert rows * cols > widening._SMALL
    inputs = draw(tokens, cols, dtype=torch.float32)
    weight = draw(cols, rows, dtype=dtype, seed=1) if transposed else draw(rows, cols, dtype=dtype, seed=1)
    assert_is_the_product(
        products.product(inputs, weight, transposed=transposed), inputs, weight, transposed=transposed
    )


@pytest.mark.parametrize("transposed", [False, True])
def test_any_thread_count_gives_the_same_bits(transposed):
    inputs, weight = draw(2, 3, LARGE[1], dtype=torch.float32), draw(*LARGE, dtype=torch.bfloat16, seed=1)
    stored = weight.t().contiguous() if transposed else weight
    found = []
    for threads in (1, 2, 3):
        products = WideProducts(threads)
        found.append(products.product(inputs, stored, transposed=transposed))
        products.close()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_row_does_not_depend_on_the_rows_around_it(products):
    """The first tile alone gives the bits that it gives as part of the whole."""
    inputs, weight = draw(4, LARGE[1], dtype=torch.float32), draw(*LARGE, dtype=torch.bfloat16, seed=1)
    whole = products.product(inputs, weight)
    assert torch.equal(products.product(inputs, weight[: 2 * 819])[:, :819], whole[:, :819])


def test_the_weight_is_left_as_it_is(products):
    weight = draw(*LARGE, dtype=torch.bfloat16)
    before = weight.clone()
    products.product(draw(1, LARGE[1], dtype=torch.float32), weight)
    assert torch.equal(weight, before)


def test_the_callers_thread_count_stays(products):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        products.product(draw(1, LARGE[1], dtype=torch.float32), draw(*LARGE, dtype=torch.bfloat16))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_products_outside_the_range_of_float16_are_finite(products):
    inputs, weight = torch.full((1, 8), 3e4), torch.full((2, 8), 3e4, dtype=torch.float16)
    assert products.product(inputs, weight).tolist() == [pytest.approx([8 * 9e8] * 2)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_installed_linear_multiplies_in_float32(products, dtype, bias):
    module = nn.Linear(6, 4, bias=bias).to(dtype)
    inputs = draw(2, 3, 6, dtype=torch.float32)
    reference = nn.functional.linear(
        inputs, module.weight.float(), None if module.bias is None else module.bias.float()
    )
    assert takes_wide_products(module)
    install_wide_products(module, products)
    found = module(inputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, reference)


def test_an_installed_conv1d_multiplies_in_float32(products):
    module = Conv1D(4, 6)
    nn.init.normal_(module.bias)
    inputs = draw(3, 6, dtype=torch.float32)
    reference = module(inputs)
    assert takes_wide_products(module)
    install_wide_products(module, products)
    torch.testing.assert_close(module(inputs), reference)


class _Doubling(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_a_linear_with_a_forward_of_its_own_is_left_alone():
    assert not takes_wide_products(_Doubling(2, 2))
    assert not takes_wide_products(nn.Embedding(2, 2))


def test_bfloat16_products_round_inputs_and_outputs_once():
    inputs, weight = draw(5, LARGE[1], dtype=torch.float32), draw(*LARGE, dtype=torch.bfloat16, seed=1)
    products = WideProducts(1, bfloat16=True)
    found = products.product(inputs, weight)
    exact = inputs.bfloat16().double() @ weight.double().t()
    products.close()
    assert found.dtype == torch.float32
    assert torch.equal(found, found.bfloat16().float())
    # One rounding to 8 bits, and the float32 sum's own.
    terms = LARGE[1] * torch.finfo(torch.float32).eps * (inputs.double().abs() @ weight.double().abs().t())
    assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + terms).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_are_never_multiplied_in_bfloat16(dtype):
    inputs, weight = draw(5, LARGE[1], dtype=torch.float32), draw(*LARGE, dtype=dtype, seed=1)
    one, other = WideProducts(1, bfloat16=True), WideProducts(1)
    assert torch.equal(one.product(inputs, weight), other.product(inputs, weight))
    one.close()
    other.close()


@pytest.mark.parametrize(
    ("bfloat16", "dtype", "rows", "rounded"),
    [
        (True, torch.bfloat16, 2500, True),
        (True, torch.bfloat16, 64, False),
        (True, torch.float16, 2500, False),
        (False, torch.bfloat16, 2500, False),
    ],
)
def test_it_says_which_products_it_rounds(bfloat16, dtype, rows, rounded):
    products = WideProducts(1, bfloat16=bfloat16)
    inputs, weight = draw(5, LARGE[1], dtype=torch.float32), draw(rows, LARGE[1], dtype=dtype, seed=1)
    found = products.product(inputs, weight)
    products.close()
    assert products.rounds(weight) is torch.equal(found, found.bfloat16().float()) is rounded
