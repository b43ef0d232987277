"""The training text as token ids: a byte-level BPE trained on the corpus, and the corpus encoded once into a file."""

import json
import lzma
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

START = "<s>"
PIECE = 1 << 20  # characters read at a time


def pieces(text: Path) -> Iterator[str]:
    """The text of a file, plain or xz, in pieces that end at a line's end; or the plain ASCII texts of a JSON array."""
    if text.suffix == ".json":
        yield from (each + "\n\n" for each in json.loads(text.read_text()) if each.isascii())
        return
    opening = lzma.open if text.suffix == ".xz" else open
    with opening(text, "rt", encoding="utf-8") as file:
        while piece := file.read(PIECE):
            yield piece + file.readline()


def train_tokenizer(text: Path, vocabulary: int, *, sample: int = 20 * PIECE) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the first `sample` characters; every sequence that it encodes starts with `<s>`, id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    taken = (piece for number, piece in enumerate(pieces(text)) if number * PIECE < sample)
    tokenizer.train_from_iterator(taken, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=START, eos_token=START)


def encode(text: Path, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Ids of a whole file, without `<s>`; uint16, [tokens]."""
    rust = tokenizer.backend_tokenizer
    parts = [np.array(rust.encode(piece, add_special_tokens=False).ids, dtype=np.uint16) for piece in pieces(text)]
    return np.concatenate(parts)


def prepare(text: Path, vocabulary: int, cache: Path) -> tuple[PreTrainedTokenizerFast, np.ndarray]:
    """Tokenizer and ids of the training text; made once, then read from `cache`."""
    folder = cache / f"{text.name}-{text.stat().st_size}-{vocabulary}"
    if not (folder / "done.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = train_tokenizer(text, vocabulary)
        tokenizer.save_pretrained(folder)
        ids = encode(text, tokenizer)
        np.save(folder / "ids.npy", ids)
        (folder / "done.json").write_text(json.dumps({"tokens": len(ids)}))
    return PreTrainedTokenizerFast.from_pretrained(folder), np.load(folder / "ids.npy", mmap_mode="r")


def validation_ids(text: Path, tokenizer: PreTrainedTokenizerFast, cache: Path) -> np.ndarray:
    """Ids of a held-out text; made once, then read from `cache`."""
    file = cache / f"{text.name}-{tokenizer.vocab_size}.npy"
    if not file.exists():
        np.save(file, encode(text, tokenizer))
    return np.load(file)


def sequences(ids: np.ndarray, length: int) -> np.ndarray:
    """Consecutive sequences of `length`, each `<s>` and then `length - 1` ids; int64, [sequences, length]."""
    count = len(ids) // (length - 1)
    body = np.asarray(ids[: count * (length - 1)], dtype=np.int64).reshape(count, length - 1)
    return np.pad(body, ((0, 0), (1, 0)))
