import math

import pytest

from superweights.errors import UsageError
from superweights.report.saving import save_chart
from superweights.report.stop_words import stop_words_chart

from .building import measurement, rows_of

PRUNED = "without super weights"


def probability(token, value, condition="original", **changes):
    return measurement("next_token_probability", value, condition, subject=token, unit="proportion", **changes)


@pytest.fixture
def probabilities():
    """Twelve tokens; the less likely a token, the more its probability grows."""
    return [
        probability(f" t{number}", value, condition)
        for number in range(12)
        for condition, value in (("original", 0.05 - 0.004 * number), (PRUNED, 0.05 + 0.01 * number))
    ]


def panels_of(chart):
    return chart.to_dict()["vconcat"]


def names_of(panel):
    return panel["layer"][0]["encoding"]["y"]["scale"]["domain"]


def test_the_ten_most_likely_and_the_others_that_change_most(probabilities):
    likely, changed = panels_of(stop_words_chart(probabilities[::-1], title="Stop words"))
    assert names_of(likely) == [f"␣t{number}" for number in range(10)]
    assert names_of(changed) == ["␣t11", "␣t10"]


def test_rows_are_in_percent_with_their_intervals():
    records = [probability(" the", 0.0349, interval=(0.03, 0.04)), probability(" the", 0.0739, PRUNED)]
    chart = stop_words_chart(records, title="")
    before, after = rows_of(chart, "condition")
    assert (before["place"], before["low"], before["high"]) == pytest.approx((3.49, 3.0, 4.0))
    assert (after["condition"], after["low"]) == (PRUNED, None)
    assert [row["text"] for row in rows_of(chart, "text")] == ["3.49 → 7.39 %"]
    assert [(row["from"], row["to"]) for row in rows_of(chart, "from")] == [pytest.approx((3.49, 7.39))]


def test_a_model_that_answers_nothing_is_told():
    chart = stop_words_chart([probability(".", 0.1), probability(".", math.nan, PRUNED)], title="")
    assert [row["text"] for row in rows_of(chart, "text")] == ["10.00 → nan %"]


def test_several_edits_share_a_row_and_have_a_legend(probabilities, tmp_path):
    more = [each.model_copy(update={"condition": "restored"}) for each in probabilities if each.condition == PRUNED]
    chart = stop_words_chart([*probabilities, *more], title="A title")
    assert not rows_of(chart, "text")
    save_chart(chart, tmp_path / "chart.svg")
    drawn = (tmp_path / "chart.svg").read_text()
    assert all(text in drawn for text in ("A title", "original", PRUNED, "restored", "·t11"))


def test_the_subtitle_has_the_mass_of_stop_words(probabilities):
    masses = [measurement("stop_word_mass", value, name) for name, value in (("original", 0.213), (PRUNED, 0.352))]
    subtitle = stop_words_chart([*probabilities, *masses], title="", model="tiny").to_dict()["title"]["subtitle"]
    assert subtitle == f"tiny · stop words: original 21.3 %, {PRUNED} 35.2 %"


def test_one_token_of_the_original_is_enough():
    (panel,) = panels_of(stop_words_chart([probability("\n", 0.0)], title=""))
    assert names_of(panel) == [r"\n"]


def test_nothing_to_draw():
    with pytest.raises(UsageError, match="superweights stopwords"):
        stop_words_chart([probability(" the", 0.1, PRUNED)], title="Stop words")
