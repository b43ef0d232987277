import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superweights.errors import UsageError
from superweights.measurements import windows
from superweights.measurements.texts import Text, read_text
from superweights.measurements.windows import check_length, default_bos, make_windows, window_length
from superweights.testing import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
VOCABULARY = 128


def text_of(*documents: str) -> Text:
    return Text.of("test", documents)


def expected(text: Text, length: int, bos: bool) -> list[list[int]]:
    """The windows, letter by letter: the tiny tokenizer has one token per character."""
    rows, row = [], []
    for character in "\n\n".join(text.documents):
        if bos and not row:
            row.append(TOKENIZER.bos_token_id)
        row.extend(TOKENIZER(character, add_special_tokens=False)["input_ids"])
        if len(row) == length:
            rows.append(row)
            row = []
    return rows


@given(
    documents=st.lists(st.text("ab .\n", max_size=30), min_size=1, max_size=4),
    length=st.integers(2, 9),
    bos=st.booleans(),
    limit=st.none() | st.integers(1, 12),
    piece=st.integers(1, 40),
)
@settings(deadline=None)
def test_windows_are_consecutive_and_the_rest_is_dropped(documents, length, bos, limit, piece):
    text = text_of("abcdefghij", *documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "_PIECE_CHARACTERS", piece)
        made = make_windows(text, TOKENIZER, length=length, limit=limit, bos=bos, vocabulary=VOCABULARY)
    assert made.ids.tolist() == expected(text, length, bos)[:limit]
    assert made.ids.dtype == torch.int64
    assert (made.text_name, made.length, made.bos) == ("test", length, bos)


@given(st.text("ab\n", max_size=60), st.integers(1, 20))
def test_pieces_are_whole_lines_and_hold_everything(text, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "_PIECE_CHARACTERS", piece)
        pieces = list(windows._pieces(text))
    assert "".join(pieces) == text
    assert all(each.endswith("\n") and len(each) > piece for each in pieces[:-1])


def test_a_few_windows_do_not_tokenise_everything(monkeypatch):
    lengths = []

    def tokenizer(text: str, **choices: bool) -> dict[str, list[int]]:
        lengths.append(len(text))
        return TOKENIZER(text, **choices)

    monkeypatch.setattr(windows, "_PIECE_CHARACTERS", 100)
    text = text_of("abcdefghi\n" * 1000)
    make_windows(text, tokenizer, length=50, limit=3, bos=False, vocabulary=VOCABULARY)
    assert lengths == [110, 110]


def test_the_digest_tells_windows_apart():
    text, other = text_of("ab" * 20), text_of("ab" * 19 + "\n\n")
    choices = [
        (text, 4, None, False),
        (text, 4, 9, False),
        (text, 4, None, True),
        (text, 5, None, False),
        (other, 4, 9, False),
    ]
    digests = {
        make_windows(each, TOKENIZER, length=length, limit=limit, bos=bos, vocabulary=VOCABULARY).digest
        for each, length, limit, bos in choices * 2
    }
    assert len(digests) == len(choices)
    assert all(each.startswith("sha256:") and len(each) == 71 for each in digests)


def test_long_sequences_raise_no_warning(caplog, monkeypatch):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 8
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="transformers"):
        make_windows(text_of("a" * 100), tokenizer, length=50, bos=False, vocabulary=VOCABULARY)
    assert caplog.text == ""


@pytest.mark.parametrize("bos", [True, False])
def test_a_text_of_exactly_one_window_is_enough(bos):
    made = make_windows(text_of("a" * (8 - bos)), TOKENIZER, length=8, bos=bos, vocabulary=VOCABULARY)
    assert made.ids.shape == (1, 8)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            {"length": 8, "bos": False},
            "test fills only 5 of the 8 tokens of one window. Use a length of at most 5, or a longer text.",
        ),
        (
            {"length": 8, "bos": True},
            "test fills only 6 of the 8 tokens of one window. Use a length of at most 6, or a longer text.",
        ),
        (
            {"length": 1, "bos": False},
            "The window length is 1; it must be 2 or more: the first token is never predicted.",
        ),
        ({"length": 4, "bos": False, "limit": 0}, "The limit is 0 windows; it must be 1 or more."),
        (
            {"length": 4, "bos": False, "vocabulary": 20},
            f"Tokenising test gives token id {TOKENIZER.convert_tokens_to_ids('d')} ('d'), but the model has ids 0 to 19. "
            "The tokenizer belongs to another model.",
        ),
        (
            {"length": 4, "bos": False, "tokenizer": None},
            "Measuring on test needs a tokenizer, and the model has none. Put its tokenizer.json beside config.json.",
        ),
    ],
)
def test_what_makes_no_window_is_refused(choices, message):
    given_choices = {"tokenizer": TOKENIZER, "vocabulary": VOCABULARY, **choices}
    with pytest.raises(UsageError) as caught:
        make_windows(text_of("abcde"), **given_choices)
    assert str(caught.value) == message


def test_the_suggested_length_works():
    text = text_of("abcde")
    assert make_windows(text, TOKENIZER, length=6, bos=True, vocabulary=VOCABULARY).ids.shape == (1, 6)


def test_a_text_of_one_token_asks_for_more():
    with pytest.raises(UsageError, match=r"fills only 1 of the 8 tokens of one window\. Give a longer text\."):
        make_windows(text_of("a"), TOKENIZER, length=8, bos=False, vocabulary=VOCABULARY)


def test_a_first_token_that_does_not_exist_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(UsageError, match=r"has no beginning-of-sequence token"):
        make_windows(text_of("abcde"), tokenizer, length=4, bos=True, vocabulary=VOCABULARY)


def test_the_tokenizers_own_habit():
    without = tiny_tokenizer()
    without.bos_token = None
    assert default_bos(TOKENIZER)
    assert not default_bos(without)
    assert not default_bos(None)


@pytest.mark.parametrize(
    ("limit", "wanted", "length"),
    [(None, None, 2048), (1024, None, 1024), (131_072, None, 2048), (1024, 512, 512), (1024, 4096, 4096), (None, 7, 7)],
)
def test_the_length_is_2048_or_the_models_limit(limit, wanted, length):
    assert window_length(limit, wanted) == length


def test_a_length_beyond_the_models_limit_is_refused():
    check_length(2, None, "tiny")
    check_length(512, 512, "tiny")
    with pytest.raises(UsageError) as caught:
        check_length(513, 512, "tiny")
    assert str(caught.value) == "The window length is 513, but tiny takes at most 512 tokens. Use 512 or less."


def test_the_embedded_text_fills_windows_of_the_default_length():
    tokenizer = tiny_tokenizer(260)
    made = make_windows(read_text("heldout"), tokenizer, length=2048, bos=True, vocabulary=260)
    assert len(made.ids) > 40
    assert (made.ids[:, 0] == tokenizer.bos_token_id).all()
