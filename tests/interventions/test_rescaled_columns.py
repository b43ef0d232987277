import pytest
import torch

from superweights.interventions.rescaled_columns import column_factor, is_unrelated


def column(rows: int = 4096, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, generator=torch.Generator().manual_seed(seed))


def rounded(values: torch.Tensor, bits: int) -> torch.Tensor:
    step = values.abs().max() / (2 ** (bits - 1) - 1)
    return (values / step).round() * step


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("rows", [64, 128, 4096])
def test_rounding_is_no_factor(bits: int, rows: int) -> None:
    for seed in range(20):
        before = column(rows, seed)
        assert column_factor(before, rounded(before, bits)) == 1
        assert not is_unrelated(before, rounded(before, bits))


def test_clipping_and_a_lost_weight_are_no_factor() -> None:
    before = column()
    before[7] = 300.0
    after = rounded(before.clamp(-2.5, 2.5), 4)
    assert column_factor(before, after) == 1


@pytest.mark.parametrize("factor", [0.5, 0.94, 1.06, 1.25, 4.0])
def test_a_factor_is_found_behind_rounding(factor: float) -> None:
    before = column()
    assert column_factor(before, rounded(factor * before, 6)) == pytest.approx(factor, rel=0.02)


def test_few_rows_show_large_factors_only() -> None:
    before = column(128)
    assert column_factor(before, rounded(1.05 * before, 4)) == 1
    assert column_factor(before, rounded(1.6 * before, 4)) == pytest.approx(1.6, rel=0.1)


def test_mixed_columns_are_unrelated() -> None:
    assert is_unrelated(column(seed=1), column(seed=2))
    assert column_factor(column(seed=1), column(seed=2)) == 1


def test_a_super_weight_of_another_model_does_not_hide_it() -> None:
    other = column(64, seed=2)
    other[5] = 300.0
    assert is_unrelated(column(64, seed=1), other)


def test_what_is_rounded_away_tells_nothing() -> None:
    before = column()
    assert column_factor(before, torch.zeros_like(before)) == 1 and not is_unrelated(before, torch.zeros_like(before))
