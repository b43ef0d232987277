"""A tokenizer in llama.cpp's words.

Two kinds are written, read off the fast tokenizer that transformers makes of any folder: byte-level BPE, which llama.cpp calls
"gpt2", and BPE with a token for each byte it has no other for, which it calls "llama". llama.cpp splits text by rules of its
own that a file names (`tokenizer.ggml.pre`), so the splitter's pattern has to be one of those it knows.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from superweights.checkpoint.gguf_header import Metadata, MetadataValue

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
"""llama.cpp's types of tokens."""
_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_PATTERNS = {
    _CONTRACTED + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST: "llama-bpe",
    _CONTRACTED + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST: "qwen2",
    rf"{_UPPER}*{_LOWER}+{_CONTRACTED}?|{_UPPER}+{_LOWER}*{_CONTRACTED}?|\p{{N}}{{1,3}}|{_REST_SLASH}": "gpt-4o",
    rf"{_UPPER}*{_LOWER}+|{_UPPER}+{_LOWER}*|\p{{N}}|{_REST_SLASH}": "tekken",
}
"""Patterns of splitters, and what llama.cpp calls them."""
_SPECIALS = ("bos", "eos", "unk", "sep", "pad", "mask")
_KEYS = {"unk": "unknown", "sep": "seperator", "pad": "padding"}
"""What GGUF calls a special token otherwise; the spelling is its own."""


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """What is written of a tokenizer, and what cannot be."""

    metadata: Metadata
    """The settings."""
    notes: tuple[str, ...] = ()
    """What llama.cpp does otherwise."""


def gguf_tokenizer(directory: Path, vocab_size: int) -> GgufTokenizer:
    """The tokenizer of a model's folder; none, with a note, where there is none that llama.cpp has.

    Args:
        directory: config and tokenizer of the model.
        vocab_size: rows of its embedding; tokens that are short of that are written as unused.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        parsed = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # whatever a folder's tokenizer is, or lacks
        return _none(f"transformers makes no fast tokenizer of the model's folder ({type(error).__name__})")
    model = parsed["model"]
    tokens = tokenizer.get_vocab()
    if model["type"] != "BPE":
        return _none(f"llama.cpp is given BPE tokenizers only, and this one is {model['type']}")
    if not model["merges"]:
        return _none("llama.cpp takes no BPE tokenizer without merges")
    beyond = sorted(token for token, number in tokens.items() if number >= vocab_size)
    tokens = {token: number for token, number in tokens.items() if number < vocab_size}
    made = (_sentencepiece if model.get("byte_fallback") else _byte_level)(parsed, tokens, vocab_size)
    found = {**made.metadata, **_specials(tokenizer, vocab_size)}
    notes = made.notes
    if beyond:
        notes += (
            f"Left out of the tokenizer: {len(beyond)} tokens, such as {beyond[0]!r}, without a row in the embedding.",
        )
    return GgufTokenizer({f"tokenizer.{key}": value for key, value in found.items()}, notes)


def _none(why: str) -> GgufTokenizer:
    return GgufTokenizer(
        {"tokenizer.ggml.model": MetadataValue("none", "STRING")},
        (f"No tokenizer is written, so the file takes token numbers only: {why}.",),
    )


def _byte_level(parsed: Mapping[str, Any], tokens: Mapping[str, int], size: int) -> GgufTokenizer:
    splitter, note = _splitter(parsed.get("pre_tokenizer"))
    merges = [" ".join(part.replace(" ", "Ġ") for part in _pair(merge)) for merge in parsed["model"]["merges"]]
    listed, kinds = _listed(parsed, tokens, size)
    return GgufTokenizer(
        {
            "ggml.model": MetadataValue("gpt2", "STRING"),
            "ggml.pre": MetadataValue(splitter, "STRING"),
            "ggml.tokens": MetadataValue(listed, "ARRAY", "STRING"),
            "ggml.token_type": MetadataValue(kinds, "ARRAY", "INT32"),
            "ggml.merges": MetadataValue(merges, "ARRAY", "STRING"),
        },
        (note,) if note else (),
    )


def _sentencepiece(parsed: Mapping[str, Any], tokens: Mapping[str, int], size: int) -> GgufTokenizer:
    """llama.cpp joins the pair with the highest score first: the earlier a merge, the higher that of what it makes."""
    listed, kinds = _listed(parsed, tokens, size)
    made: dict[str, int] = {}
    for rank, merge in enumerate(parsed["model"]["merges"]):
        made.setdefault("".join(_pair(merge)), rank)
    last = len(parsed["model"]["merges"])
    scores = [
        -float(made.get(token, last)) if kind == _NORMAL else 0.0 for token, kind in zip(listed, kinds, strict=True)
    ]
    return GgufTokenizer(
        {
            "ggml.model": MetadataValue("llama", "STRING"),
            "ggml.pre": MetadataValue("default", "STRING"),
            "ggml.tokens": MetadataValue(listed, "ARRAY", "STRING"),
            "ggml.scores": MetadataValue(scores, "ARRAY", "FLOAT32"),
            "ggml.token_type": MetadataValue(kinds, "ARRAY", "INT32"),
            "ggml.add_space_prefix": MetadataValue(_prepends(parsed), "BOOL"),
        }
    )


def _listed(parsed: Mapping[str, Any], tokens: Mapping[str, int], size: int) -> tuple[list[str], list[int]]:
    """All tokens by their numbers, and their types."""
    added = {each["content"]: each["special"] for each in parsed["added_tokens"]}
    unknown, falls_back = parsed["model"].get("unk_token"), parsed["model"].get("byte_fallback")
    listed = [f"[PAD{number}]" for number in range(size)]
    kinds = [_UNUSED] * size
    for token, number in tokens.items():
        listed[number] = token
        if falls_back and token == unknown:
            kinds[number] = _UNKNOWN
        elif token in added:
            kinds[number] = _CONTROL if added[token] else _USER
        else:
            is_byte = falls_back and len(token) == 6 and token.startswith("<0x")
            kinds[number] = _BYTE if is_byte else _NORMAL
    return listed, kinds


def _pair(merge: str | Sequence[str]) -> Sequence[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _prepends(parsed: Mapping[str, Any]) -> bool:
    """Whether a text gets a space in front."""
    parts = [*_flat(parsed.get("normalizer")), *_flat(parsed.get("pre_tokenizer"))]
    return any(each["type"] == "Prepend" or each.get("prepend_scheme") in ("first", "always") for each in parts)


def _flat(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or splitter, which may be a sequence."""
    if part is None:
        return []
    steps = part.get("normalizers") or part.get("pretokenizers")
    return [step for each in steps for step in _flat(each)] if part["type"] == "Sequence" and steps else [part]


def _splitter(part: Mapping[str, Any] | None) -> tuple[str, str | None]:
    """What llama.cpp calls a splitter of text, and a note where it knows none such."""
    steps = _flat(part)
    kinds = [each["type"] for each in steps]
    pattern = next((each["pattern"].get("Regex") for each in steps if each["type"] == "Split"), None)
    plain = bool(steps) and not steps[-1].get("add_prefix_space", False)
    if plain and kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2", None
    if plain and kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        return "starcoder", None
    if plain and kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True) and pattern in _PATTERNS:
        return _PATTERNS[pattern], None
    return "default", (
        f"llama.cpp knows no splitter of text like this one ({' + '.join(kinds) or 'none'}), so `default` is named and some "
        "text becomes other tokens: give token numbers, or set tokenizer.ggml.pre."
    )


def _specials(tokenizer: Any, size: int) -> dict[str, MetadataValue]:
    found: dict[str, MetadataValue] = {}
    for name in _SPECIALS:
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None and number < size:
            found[f"ggml.{_KEYS.get(name, name)}_token_id"] = MetadataValue(int(number), "UINT32")
    ids = tokenizer("a").input_ids
    found["ggml.add_bos_token"] = MetadataValue(len(ids) > 1 and ids[0] == tokenizer.bos_token_id, "BOOL")
    found["ggml.add_eos_token"] = MetadataValue(len(ids) > 1 and ids[-1] == tokenizer.eos_token_id, "BOOL")
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if template:
        found["chat_template"] = MetadataValue(template, "STRING")
    return found
