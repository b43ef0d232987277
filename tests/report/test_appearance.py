import pytest
from hypothesis import given
from hypothesis import strategies as st

from superweights.report.appearance import describe_source, layer_ticks, log_domain, log_ticks, shorten, show_token

from .conftest import activation_peak, prompt


@given(st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=3))
def test_a_log_axis_has_some_ticks_and_not_too_many(values):
    ticks = log_ticks(log_domain(values))
    assert 1 <= len(ticks) <= 26
    assert ticks == sorted(ticks)


@pytest.mark.parametrize("layers", [range(4), range(-1, 4), range(-1, 32), range(80), range(-1, 80), range(2, 5), [7]])
def test_layer_ticks_are_layers_and_few(layers):
    ticks = layer_ticks(layers)
    assert set(ticks) <= set(layers)
    assert 1 <= len(ticks) <= 26
    assert ticks[0] == layers[0]


@pytest.mark.parametrize(
    ("text", "shown"), [(" a\n", r"␣a\n"), ("\x00", r"\x00"), ("\u200b", r"\u200b"), ("мир", "мир")]
)
def test_tokens_are_shown_on_one_line(text, shown):
    assert show_token(text) == shown


def test_long_text_is_cut():
    assert shorten("abcdef", length=4) == "abc…"
    assert shorten("abcd", length=4) == "abcd"


def test_the_subtitle_counts_prompts_once():
    records = [prompt(0, "a", bos=True), activation_peak(0, "input", 1), activation_peak(0, "input", 1, prompt=4)]
    assert describe_source(records, model="tiny") == "tiny · 2 prompts"
    assert describe_source(records[:1], model="", more="1 candidate") == "1 prompt · 1 candidate"
