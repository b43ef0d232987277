import pytest

from superweights.errors import UsageError
from superweights.report.activation_quantization import activation_quantization_chart
from superweights.report.saving import save_chart

from .building import measurement, rows_of

RECORDS = [
    measurement("perplexity", 5.0),
    measurement("kl_to_original", 0.01, "naive W8A8", interval=(0.009, 0.011)),
    measurement("perplexity_ratio", 1.02, "naive W8A8", interval=(1.01, 1.03)),
    measurement("kl_to_original", 0.004, "super activation kept", interval=(0.003, 0.005)),
    measurement("perplexity_ratio", 1.01, "super activation kept", interval=(1.0, 1.02)),
    measurement("kl_over_naive", 0.4, "super activation kept", interval=(0.35, 0.45)),
]


def test_a_row_for_each_condition_and_the_ratio_to_naive_in_words(tmp_path) -> None:
    chart = activation_quantization_chart(RECORDS, title="W8A8", model="tiny")
    rows = rows_of(chart, "name", "place", "text")
    assert [(row["name"], row["value"], row["text"]) for row in rows] == [
        ("naive W8A8", "0.01", ""),
        ("super activation kept", "0.004", "× 0.4"),
        ("naive W8A8", "1.02", ""),
        ("super activation kept", "1.01", ""),
    ]
    save_chart(chart, tmp_path / "chart.png")


def test_nothing_to_draw_says_what_to_run() -> None:
    with pytest.raises(UsageError, match="--activations"):
        activation_quantization_chart(RECORDS[:1], title="")
