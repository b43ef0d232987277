"""Stop words by language, and the tokens of a tokenizer that are one.

The lists hold closed-class words - articles, pronouns, prepositions, conjunctions, auxiliaries and a few adverbs of the same
kind - and punctuation. A number measured with them names their version, since another list gives another number.
"""

from typing import Any

from superweights.errors import UnknownNameError, UsageError

STOP_WORDS_VERSION = 1
"""Grows whenever a list changes."""

_PUNCTUATION = "! \" ' ( ) , - . / : ; ? – — …"
_WORDS = {
    "en": """
        a an the this that these those some any no every each all both either neither such
        i me my you your he him his she her it its we us our they them their who whom whose which what
        of to in on at by for from with without into onto about over under between through after before against during upon
        and or but nor so yet if because while although than as when where how why
        am is are was were be been being have has had do does did will would shall should can could may might must
        not there here then too also very just only
        's 't n't 're 've 'll 'd 'm “ ” ‘
    """,
    "de": """
        der die das den dem des ein eine einen einem einer eines kein keine keinen keiner
        ich mich mir mein meine du dich dir dein deine er ihn ihm sein seine sie ihr ihre es wir uns unser unsere euch sich man
        dieser diese dieses diesem diesen jeder jede jedes alle wer was welche welcher
        in im an am auf aus bei beim mit nach von vom zu zum zur über unter vor für durch gegen ohne um bis seit zwischen
        und oder aber denn sondern dass daß weil wenn als wie ob damit obwohl wo warum
        bin bist ist sind war waren sei habe hat haben hatte hatten wird werden wurde wurden kann können konnte muss müssen soll
        nicht auch nur noch schon so da dann hier sehr
        „ “ ‚ ‘ » «
    """,
    "fr": """
        le la les l' un une des du de d' au aux ce cet cette ces mon ma mes ton ta tes son sa ses notre nos votre vos leur leurs
        je j' me m' moi tu te t' toi il elle on nous vous ils elles lui se s' soi eux en y qui que qu' quoi dont où
        à dans par pour sur sous avec sans chez vers entre depuis pendant contre avant après
        et ou mais ni car donc si comme quand lorsque parce puisque
        est sont était étaient être été suis es sommes êtes ai as a avons avez ont avait avaient avoir eu fait peut
        ne n' pas plus c' tout tous toute toutes quel quelle très aussi bien
        « » “ ”
    """,
    "es": """
        el la los las un una unos unas lo al del este esta estos estas ese esa esos esas aquel aquella
        mi mis tu tus su sus nuestro nuestra yo me tú te él ella ello nosotros nos vosotros os ellos ellas usted ustedes
        se le les que qué quien quién cual cuyo de a en por para con sin sobre entre hasta desde hacia bajo contra tras durante
        y e o u pero sino ni si porque como cuando donde aunque mientras
        es son era eran fue fueron ser sido está están estaba estar ha han había haber he hay tiene
        no más muy ya también así todo toda todos todas
        ¿ ¡ « » “ ”
    """,
}

STOP_WORDS = {language: frozenset(f"{words} {_PUNCTUATION}".split()) for language, words in _WORDS.items()}
"""Words and punctuation by language, in lower case, with a straight apostrophe."""


def stop_word_ids(tokenizer: Any, language: str = "en") -> list[int]:
    """The tokens whose text is a stop word, whatever its case and the white space around it; ascending ids.

    A token without a space in front counts as well: it starts a text, though it may stand inside a word too.

    Args:
        tokenizer: a transformers tokenizer.
        language: a key of `STOP_WORDS`.

    Raises:
        UnknownNameError: there is no list for the language.
        UsageError: there is no tokenizer, or none of its tokens is a stop word.
    """
    if language not in STOP_WORDS:
        raise UnknownNameError.among("language of stop words", language, STOP_WORDS)
    if tokenizer is None:
        raise UsageError(
            "Stop words are looked up in a tokenizer, and the model has none. Put its tokenizer.json beside it."
        )
    words = STOP_WORDS[language]
    texts = tokenizer.batch_decode([[each] for each in range(len(tokenizer))], clean_up_tokenization_spaces=False)
    found = [number for number, text in enumerate(texts) if text.strip().lower().replace("’", "'") in words]
    if not found:
        raise UsageError(f"None of the {len(tokenizer)} tokens of the tokenizer is a stop word of {language!r}.")
    return found
