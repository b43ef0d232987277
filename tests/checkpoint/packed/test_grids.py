"""Grids and the blocks that share their scales."""

import math

import pytest
import torch

from superweights.checkpoint.packed.grids import Scales, even_grid, runs, signed_ends, spread, table_grid, tiles

ONE = Scales(torch.ones(1, 1), (1, 4))


@pytest.mark.parametrize("block", [(1, 3), (2, 3), (4, 1), (5, 7), (3, 2)])
def test_each_weight_gets_the_value_of_its_block(block):
    rows, cols = 5, 7
    high, wide = block
    values = torch.rand(math.ceil(rows / high), math.ceil(cols / wide))
    found = spread(values, (rows, cols), block).expand(rows, cols)
    for row in range(rows):
        for col in range(cols):
            assert found[row, col] == values[row // high, col // wide]


@pytest.mark.parametrize("size", [1, 3, 4, 6, 12, 24, 5, 8, 30])
def test_runs_of_weights_share_a_scale(size):
    rows, cols = 5, 6
    values = torch.rand(math.ceil(rows * cols / size))
    found = runs(values, (rows, cols), size)
    matrix = even_grid("m", "f", 4, torch.zeros(rows, cols, dtype=torch.uint8), found, ends=(0, 15))
    for row in range(rows):
        for col in range(cols):
            number = (row * cols + col) // size
            assert found.values.expand(rows, cols)[row, col] == values[number]
            block = matrix.block(row, col).flatten().nonzero().flatten().tolist()
            assert block == list(range(number * size, min((number + 1) * size, rows * cols)))


def test_the_last_tiles_are_smaller():
    scales = tiles(torch.ones(2, 2), (5, 7), (3, 4))
    found = even_grid("m", "f", 8, torch.zeros(5, 7, dtype=torch.int8), scales, ends=(-128, 127))
    assert int(found.block(0, 0).sum()) == 12
    assert int(found.block(4, 6).sum()) == 2 * 3
    assert found.block(4, 6)[3:, 4:].all()


def test_an_even_grid():
    codes = torch.tensor([[0, 1, 14, 15]], dtype=torch.uint8)
    found = even_grid(
        "m", "f", 4, codes, Scales(torch.tensor([[0.5]]), (1, 4)), zeros=torch.tensor([[8.0]]), ends=(0, 15)
    )
    assert found.weights.tolist() == [[-4, -3.5, 3, 3.5]]
    assert found.steps.tolist() == [[0.5]]
    assert found.at_end.tolist() == [[True, False, False, True]]
    turned = even_grid("m", "f", 4, codes, Scales(torch.tensor([[-0.5]]), (1, 4)), ends=(0, 15))
    assert turned.steps.tolist() == [[0.5]], "a distance, whatever the sign of the scale"


def test_an_uneven_grid_has_the_wider_of_two_gaps():
    table = torch.tensor([4.0, -1.0, 0.0, math.nan, 1.0, -0.0, math.inf])
    codes = torch.tensor([[0, 1, 2, 4, 5]], dtype=torch.uint8)
    found = table_grid("m", "f", 3, codes, Scales(torch.tensor([[2.0]]), (1, 4)), table=table)
    assert found.weights.tolist() == [[8, -2, 0, 2, 0]]
    assert found.steps.tolist() == [[6, 2, 2, 6, 2]]
    assert found.at_end.tolist() == [[True, True, False, False, False]]
    strange = table_grid("m", "f", 3, torch.tensor([[3, 6]], dtype=torch.uint8), ONE, table=table)
    assert strange.steps.isnan().all()
    assert not strange.at_end.any()


def test_codes_above_127_are_no_masks_and_no_negatives():
    table = torch.arange(256.0)
    codes = torch.tensor([[200, 255, 0, 1]], dtype=torch.uint8)
    assert table_grid("m", "f", 8, codes, ONE, table=table).weights.tolist() == [[200, 255, 0, 1]]


@pytest.mark.parametrize(
    ("codes", "bits", "symmetric", "ends"),
    [([-7, 7], 4, True, (-7, 7)), ([-8, 0], 4, True, (-8, 7)), ([-7, 7], 4, False, (-8, 7)), ([0], 8, True, (-127, 127)),
     ([0], 1, False, (-1, 0))],
)  # fmt: skip
def test_ends_of_signed_grids(codes, bits, symmetric, ends):
    assert signed_ends(torch.tensor(codes), bits, symmetric=symmetric) == ends
