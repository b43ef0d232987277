import subprocess
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from superweights.errors import UnknownNameError, UsageError
from superweights.measurements.stop_words import STOP_WORDS, STOP_WORDS_VERSION, stop_word_ids


def tokenizer_of(tokens, *, decoder):
    made = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, [], unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoder
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def byte_level(words):
    """Words as byte-level tokens: a space is Ġ, and ü is two other letters."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [split.pre_tokenize_str(word)[0][0] for word in words]


@pytest.mark.parametrize("language", STOP_WORDS)
def test_the_lists_are_closed_classes_of_a_readable_size(language):
    words = STOP_WORDS[language]
    assert 100 < len(words) < 160
    assert all(each == each.lower() == each.strip() and "’" not in each for each in words)
    assert {".", ",", "?"} <= words
    assert STOP_WORDS_VERSION == 1


@pytest.mark.parametrize(("language", "word"), [("en", "the"), ("de", "für"), ("fr", "à"), ("es", "¿"), ("en", "n't")])
def test_each_language_has_its_own(language, word):
    assert word in STOP_WORDS[language]


def test_byte_level_tokens():
    words = ["<unk>", " the", "The", "THE ", "cat", " für", "für", ".", "…", " ", "n’t", "them", "thes"]
    tokenizer = tokenizer_of(["<unk>", *byte_level(words[1:])], decoder=decoders.ByteLevel())
    assert [words[each] for each in stop_word_ids(tokenizer)] == [" the", "The", "THE ", ".", "…", "n’t", "them"]
    assert [words[each] for each in stop_word_ids(tokenizer, "de")] == [" für", "für", ".", "…"]


def test_sentencepiece_tokens():
    tokens = ["<unk>", "▁the", "the", "▁The", "▁", "▁cat", ",", "▁l", "▁à", "<0x2E>", "<0xC3>"]
    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer = tokenizer_of(tokens, decoder=decoder)
    assert [tokens[each] for each in stop_word_ids(tokenizer)] == ["▁the", "the", "▁The", ",", "<0x2E>"]
    assert [tokens[each] for each in stop_word_ids(tokenizer, "fr")] == [",", "▁à", "<0x2E>"]


def test_what_cannot_be_looked_up():
    tokenizer = tokenizer_of(["<unk>", "cat"], decoder=decoders.ByteLevel())
    with pytest.raises(UnknownNameError, match=r"no language of stop words 'eng'\. Did you mean 'en'"):
        stop_word_ids(tokenizer, "eng")
    with pytest.raises(UsageError, match="None of the 2 tokens of the tokenizer is a stop word of 'en'"):
        stop_word_ids(tokenizer)
    with pytest.raises(UsageError, match="the model has none"):
        stop_word_ids(None)


def test_the_lists_need_no_torch():
    code = "import sys, superweights.measurements.stop_words; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
