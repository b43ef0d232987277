"""Whether llama.cpp, given the GGUF files of `superweights quantize`, computes what transformers computes.

For each family: a tiny random model, written as F32, run by llama.cpp and by transformers on the same tokens; the table has the
largest difference of the log probabilities of any token at any place. For types: the root of the mean squared difference on a
trained model. For tokenizers: the same text in both. It runs in an
environment with llama.cpp's binding (`pip install xllamacpp`):

    python studies/gguf_families.py [FAMILY ...]
"""

import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import xllamacpp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from superweights.checkpoint.gguf_families import FAMILIES
from superweights.checkpoint.gguf_tokenizer import _PATTERNS
from superweights.checkpoint.gguf_writing import WRITTEN_KINDS, block_size
from superweights.coordinates import Coordinate
from superweights.interventions.quantized_gguf import quantize_to_gguf
from superweights.model.loading import load
from superweights.testing import tiny_config

ROOT = Path(__file__).resolve().parents[1]
VOCAB, LENGTH, LAYERS = 320, 40, 6
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
SCALES = {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}
GEMMA = {"query_pre_attn_scalar": 16, "head_dim": 16}
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "": {}, "tied": {"tie_word_embeddings": True}, "head_dim 32": {"head_dim": 32},
        "biases": {"attention_bias": True, "mlp_bias": True}, "llama3 rope": {"rope_parameters": LLAMA3},
        "linear rope": {"rope_parameters": LINEAR}, "yarn rope": {"rope_parameters": YARN},
    },
    "mistral": {"": {"sliding_window": None}},
    "mixtral": {"": {"sliding_window": None}},
    "qwen2": {"": {}, "yarn rope": {"rope_parameters": YARN}},
    "qwen3": {"": {"head_dim": 32}},
    "qwen3_moe": {"": {"norm_topk_prob": True, "head_dim": 32}},
    "gemma2": {"": GEMMA},
    "gemma3_text": {"": GEMMA},
    "granite": {"": SCALES},
    "cohere": {"": {"logit_scale": 1.0}},
    "stablelm": {"": {}, "parallel": {"use_parallel_residual": True, "use_qkv_bias": True}},
    "gpt_neox": {"": {}, "sequential": {"use_parallel_residual": False}},
    "starcoder2": {"": {"sliding_window": None}},
    "olmoe": {"": {"num_key_value_heads": 4}},
    "olmo": {"": {}, "clipped": {"clip_qkv": 1.0}},
    "phi3": {"": {}, "partial": {"partial_rotary_factor": 0.5}, "window 8": {"sliding_window": 8}},
}  # fmt: skip
"""Configs that are tried, by what is special about them; one plain one where none stand here."""

HEADER = (
    "| model type | config | largest difference of log p | with llama.cpp's GELU | std of log p |\n"
    "| --- | --- | --- | --- | --- |"
)


class LlamaCpp:
    """llama.cpp's server with one model, in float32 wherever it can be."""

    def __init__(self, path: Path) -> None:
        """Loads a file."""
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = 128, 1, False, -1
        settings.cpuparams.n_threads = 1
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(settings)
        self.letter = self.tokenize("a")[-1]

    def log_probabilities(self, ids: Sequence[int], vocab: int) -> torch.Tensor:
        """Those of the token after a prompt, [vocab]."""
        request = {"prompt": list(ids), "n_predict": 1, "n_probs": vocab, "cache_prompt": False}
        # Only a token that is a whole character is answered; probabilities are those before the bias.
        request |= {"temperature": 1.0, "top_k": 1, "logit_bias": [[self.letter, 1000.0]]}
        answer = self._server.handle_completions(request)
        found = torch.full((vocab,), torch.nan)
        for each in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[each["id"]] = each["logprob"]
        return found

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text, with those that the model wants in front."""
        body = json.dumps({"content": text, "add_special": True}).encode()
        request = urllib.request.Request(
            f"{self._server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            found: list[int] = json.load(answer)["tokens"]
            return found


def random_model(family: str, changes: dict[str, Any]) -> Any:
    """A tiny model whose parts all matter: large matrices, norms that are not 1, biases that are not 0."""
    torch.manual_seed(0)
    config = tiny_config(family, layers=LAYERS, vocab=VOCAB, **changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 1:
                value.copy_(torch.randn_like(value) * 0.2 + (1 if "norm" in name and "weight" in name else 0))
            else:
                scale = 0.12 if "embed" not in name else 0.04 if "gemma" in family else 0.3  # Gemma multiplies it by 8
                value.copy_(torch.randn_like(value) * scale)
    return model


class TableGelu(torch.nn.Module):
    """GELU as llama.cpp looks it up on a CPU: of tanh, in float16, between -10 and 10."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        looked_up = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, looked_up))


def with_table(model: torch.nn.Module) -> bool:
    """Puts that in place of a model's GELU; says whether it has one."""
    found = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if "gelu" in type(child).__name__.lower()
    ]
    for module, name in found:
        setattr(module, name, TableGelu())
    return bool(found)


def differences(family: str, changes: dict[str, Any]) -> tuple[float, float | None, float]:
    """The largest of any log probability at any place; that with llama.cpp's GELU; how far log probabilities spread."""
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(family, changes)
        model.save_pretrained(f"{folder}/model")
        trained_tokenizer(pre_tokenizers.ByteLevel(False), VOCAB - 8).save_pretrained(f"{folder}/model")
        quantize_to_gguf(f"{folder}/model", f"{folder}/model.gguf", "f32")
        ids = torch.randint(4, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = model(ids[None]).logits[0].float().log_softmax(-1)
        engine = LlamaCpp(Path(folder, "model.gguf"))
        places = [0, 1, 2, 5, 11, 19, LENGTH - 1]
        found = torch.stack([engine.log_probabilities(ids[: place + 1].tolist(), VOCAB) for place in places])
        del engine
        largest, looked_up = float((found - expected[places]).abs().max()), None
        if with_table(model):
            with torch.no_grad():
                again = model(ids[None]).logits[0].float().log_softmax(-1)
            looked_up = float((found - again[places]).abs().max())
        return largest, looked_up, float(expected.std())


def type_difference(kind: str) -> tuple[float, float]:
    """Of llama.cpp on a trained model at a type from transformers on the same file's values, and what the type itself does.

    llama.cpp rounds what a quantized matrix is multiplied by to 8 bits; transformers does not.
    """
    source = ROOT / "src/superweights/data/tiny-books"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        quantize_to_gguf(source, path, kind, [Coordinate.parse("0:68:364")])
        ids = AutoTokenizer.from_pretrained(source)(texts()[1][:200], return_tensors="pt").input_ids
        plain, rounded = (_log_probabilities(each, ids) for each in (source, path))
        engine = LlamaCpp(path)
        places = range(0, ids.shape[1], 8)
        found = torch.stack(
            [engine.log_probabilities(ids[0, : place + 1].tolist(), plain.shape[-1]) for place in places]
        )
        expected = rounded[list(places)]
        return float((found - expected).square().mean().sqrt()), float(
            (expected - plain[list(places)]).square().mean().sqrt()
        )


def _log_probabilities(path: Path, ids: torch.Tensor) -> torch.Tensor:
    with load(str(path)) as model, torch.no_grad():
        return model.logits(model.states(ids))[0].float().log_softmax(-1)


def tokenizers() -> Iterator[tuple[str, Path | None, PreTrainedTokenizerFast | None]]:
    """Models' own tokenizers, and one for each pattern that has a name in llama.cpp."""
    for name in ("src/superweights/data/tiny-books", "../shared/models/books1.5M", "../shared/models/stories260K"):
        if (ROOT / name).is_dir():
            yield name.rpartition("/")[2], ROOT / name, None
    regexes: dict[str, Any] = {
        name: pre_tokenizers.Sequence(
            [pre_tokenizers.Split(_regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        for pattern, name in _PATTERNS.items()
    }
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    for name, splitter in {**regexes, "starcoder": digits, "gpt-2": pre_tokenizers.ByteLevel(False)}.items():
        yield name, None, trained_tokenizer(splitter, 1000)


def trained_tokenizer(splitter: Any, size: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, trained on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"],
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def _regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)


def texts() -> list[str]:
    """Prose, and what splitters differ about."""
    book = ROOT / "src/superweights/data/heldout.txt"
    prose = (
        book.read_text(encoding="utf-8")[:40000] if book.is_file() else (ROOT / "README.md").read_text(encoding="utf-8")
    )
    odd = (
        "I'm HERE, you'LL see  two   spaces\n\n\nnew lines\r\n\ttabs 1234567 3.14159 12,345,678 a1b2c3 (x+y)*z == \"ok\"!!! "
        "naïve café Ünïcödé größe 你好，世界 日本語 русский язык عربي हिन्दी emoji 🙂👍🏽 -- --- ... http://a.b/c?d=e&f#g "
        "\n  indented\n    more\n "
        "CamelCaseWord snake_case_word O'Brien'S end "
    )
    return [odd, *[prose[start : start + 1000] for start in range(0, len(prose), 1000)]]


def different_texts(directory: Path | None, tokenizer: PreTrainedTokenizerFast | None) -> tuple[int, int]:
    """How many texts become other tokens in llama.cpp, and how many were tried."""
    with tempfile.TemporaryDirectory() as folder:
        if directory is None:
            assert tokenizer is not None
            directory = Path(folder, "model")
            model = AutoModelForCausalLM.from_config(tiny_config("llama", layers=2, vocab=len(tokenizer)))
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
        quantize_to_gguf(directory, f"{folder}/model.gguf", "f16")
        engine = LlamaCpp(Path(folder, "model.gguf"))
        ours: Any = AutoTokenizer.from_pretrained(directory)
        tried = texts()
        return sum(engine.tokenize(text) != ours(text).input_ids for text in tried), len(tried)


def main(families: Sequence[str]) -> None:
    """Prints the tables, or the rows of some families."""
    for family in families:
        for what, changes in CHANGES.get(family, {"": {}}).items():
            largest, looked_up, spread = differences(family, changes)
            again = "" if looked_up is None else f"{looked_up:.1e}"
            print(f"| {family} | {what or 'plain'} | {largest:.1e} | {again} | {spread:.2f} |", flush=True)
    if families:
        return
    print(HEADER, flush=True)
    for family in sorted(FAMILIES):  # each in a process of its own: llama.cpp ends it where it refuses a model
        if subprocess.run([sys.executable, __file__, family], stderr=subprocess.DEVNULL).returncode:
            print(f"| {family} fails | | | |", flush=True)
    print("\n| type | llama.cpp from transformers on the file | the file from the model |\n| --- | --- | --- |")
    for kind in WRITTEN_KINDS:
        if block_size(kind)[0] <= 32:  # the rows of this model are shorter than larger blocks
            ours, theirs = type_difference(kind)
            print(f"| {kind} | {ours:.1e} | {theirs:.1e} |", flush=True)
    print("\n| tokenizer | texts that become other tokens |\n| --- | --- |")
    for name, directory, tokenizer in tokenizers():
        different, tried = different_texts(directory, tokenizer)
        print(f"| {name} | {different} of {tried} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
