"""Super weights put back by adapter, in the engines that load one: the tables of docs/adapter.md.

    python studies/adapters.py MODEL --dir DIR [--parts peft,llama.cpp] [--out FILE.json]

for a small Llama such as books1.5M, in an environment that has this package and

    torch==2.13.0 transformers==5.23.0 peft bitsandbytes compressed-tensors accelerate gguf xllamacpp

The candidates of the model and one planted super weight are quantized in several ways, with and without being held out, and put
back by `superweights adapter`. "Put back" is the model with the weights that the engine unpacks, in which exactly these scalars
have their original values. Some minutes on one core; nothing is downloaded.
"""

import argparse
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from planted import plant
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import superweights as sw
from superweights.cli import main as superweights
from superweights.interventions.conditions import ScaleWeights
from superweights.interventions.rewriting import rewrite_checkpoint
from superweights.measurements.model_windows import open_windows
from superweights.model.loading import load

WINDOWS, LENGTH = 32, 128
PROMPTS, PROMPT_TOKENS = 48, 64
Weights = tuple[sw.Coordinate, ...]


@dataclass(frozen=True)
class Models:
    """What all cases start from."""

    plain: Path
    planted: Path
    held_out: Path
    """The planted model with all its weights at 0."""
    candidates: Weights
    """Of the plain model."""
    weights: Weights
    """The planted one and the candidates."""


def prepare(model: Path, work: Path) -> Models:
    """Plants, finds and holds out."""
    with load(model) as opened:
        candidates = tuple(each.coordinate for each in sw.find(opened).candidates)
    coordinate = plant(model, work / "planted")
    weights = (coordinate, *(each for each in candidates if each != coordinate))
    rewrite_checkpoint(work / "planted", work / "held-out", [ScaleWeights(weights, 0.0)])
    return Models(model, work / "planted", work / "held-out", candidates, weights)


def text(model: Path, windows: int, length: int) -> Tensor:
    """Token ids of the embedded text, [windows, length]."""
    with load(model) as opened:
        return open_windows(opened, windows=windows, length=length).ids


def run(*arguments: str) -> None:
    if superweights(list(arguments)):
        raise SystemExit(f"superweights {' '.join(arguments)} failed")


def write_adapter(quantized: Path, original: Path, weights: Weights, to: Path) -> Path:
    listed = ",".join(map(str, weights))
    superweights(["adapter", str(quantized), "--original", str(original), "--weights", listed, "--to", str(to)])
    return to


def as_plain(path: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def put_back(model: nn.Module, original: nn.Module, weights: Weights) -> nn.Module:
    """Sets exactly these scalars to their original values, in place."""
    for each in weights:
        name = f"model.layers.{each.layer}.mlp.down_proj.weight"
        value = original.get_parameter(name).data[each.row, each.col]
        model.get_parameter(name).data[each.row, each.col] = value
    return model


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(each).logits for each in ids.split(4)])


def kl(before: Tensor, after: Tensor) -> float:
    """Nats per token, of log probabilities or logits."""
    before, after = before.double().log_softmax(-1), after.double().log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


# The adapter in PEFT


def peft_rows(models: Models, work: Path) -> Iterator[dict[str, Any]]:
    ids = text(models.plain, WINDOWS, LENGTH)
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    cases: list[tuple[str, Path, Path, Weights, Callable[[Path, Path], None]]] = [
        ("as it is, int4-g32", models.plain, models.plain, models.candidates, ours("int4-g32")),
        ("as it is, int3-g32, clip z=2", models.plain, models.plain, models.candidates, ours("int3-g32", "z=2")),
        ("planted, int8-row, clip z=6", models.planted, models.planted, models.weights, ours("int8-row", "z=6")),
        ("planted, all held out, int4-g32", models.planted, models.held_out, models.weights, ours("int4-g32")),
        ("planted, all held out, bitsandbytes nf4", models.planted, models.held_out, models.weights, bitsandbytes(nf4)),
        ("planted, all held out, bitsandbytes int8", models.planted, models.held_out, models.weights,
         bitsandbytes({"load_in_8bit": True})),
    ]  # fmt: skip
    for number, (name, original, source, weights, quantize) in enumerate(cases):
        folder = work / f"peft-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        quantize(source, folder / "q")
        lora = write_adapter(folder / "q", original, weights, folder / "lora")
        yield {"model": name, **compare_peft(original, folder / "q", lora, weights, ids)}


def ours(scheme: str, clip: str | None = None) -> Callable[[Path, Path], None]:
    def quantize(source: Path, to: Path) -> None:
        clipping = ["--clip", clip] if clip else []
        run("quantize", str(source), "--scheme", scheme, *clipping, "--keep", "none", "--to", str(to))

    return quantize


def bitsandbytes(settings: dict[str, Any]) -> Callable[[Path, Path], None]:
    def quantize(source: Path, to: Path) -> None:
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(**settings)
        made = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, quantization_config=config, device_map="cpu"
        )
        made.save_pretrained(to)

    return quantize


def compare_peft(original: Path, quantized: Path, lora: Path, weights: Weights, ids: Tensor) -> dict[str, Any]:
    from peft import PeftModel

    plain = as_plain(original)
    before, without = logits(plain, ids), logits(packed(quantized), ids)
    unpacked = as_plain(original)
    for name, weight in unpacked_weights(packed(quantized)).items():
        unpacked.get_submodule(name).weight.data = weight
    engine = float((logits(unpacked, ids) - without).abs().max())
    restored = logits(put_back(unpacked, plain, weights), ids)
    adapted = logits(PeftModel.from_pretrained(packed(quantized), lora).eval(), ids)
    return {
        "weights": [str(each) for each in weights],
        "largest logit": float(before.abs().max()),
        "max logit difference, adapter to put back": float((adapted - restored).abs().max()),
        "max logit difference, without adapter to put back": float((without - restored).abs().max()),
        "max logit difference, engine to its own unpacked weights": engine,
        "KL without": kl(before, without),
        "KL with": kl(before, adapted),
        "KL put back": kl(before, restored),
    }


def packed(quantized: Path) -> Any:
    """The quantized model as transformers runs it; compressed-tensors unpacked, as PEFT needs it."""
    from transformers import CompressedTensorsConfig

    config = json.loads((quantized / "config.json").read_text())
    ours = config["quantization_config"]["quant_method"] == "compressed-tensors"
    how = {"quantization_config": CompressedTensorsConfig(run_compressed=False)} if ours else {"device_map": "cpu"}
    return AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.float32, **how).eval()


def unpacked_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of linear layers, as the engine itself unpacks them."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            found[name] = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        elif isinstance(module, Linear8bitLt):
            state = module.state
            scales = state.SCB if state.SCB is not None else module.weight.SCB
            found[name] = int8_vectorwise_dequant(module.weight.data, scales).float()
        elif isinstance(module, nn.Linear):
            found[name] = module.weight.data.float()
    return found


# The adapter in llama.cpp


def llama_rows(models: Models, work: Path) -> Iterator[dict[str, Any]]:
    prompts = text(models.plain, PROMPTS, PROMPT_TOKENS)
    work = work / "gguf"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    files = {}
    for name, source in (("original", models.planted), ("held-out", models.held_out)):
        for kind in ("F32", "Q4_0"):
            files[name, kind] = work / f"{name}-{kind}.gguf"
            sw.quantize_to_gguf(source, files[name, kind], kind)
    lora = {
        kind: write_adapter(files["held-out", kind], models.planted, models.weights, work / kind) / "adapter.gguf"
        for kind in ("F32", "Q4_0")
    }
    held_out = {kind: llama_cpp(files["held-out", kind], prompts) for kind in ("F32", "Q4_0")}
    adapted = {kind: llama_cpp(files["held-out", kind], prompts, lora[kind]) for kind in ("F32", "Q4_0")}
    original = {kind: llama_cpp(files["original", kind], prompts) for kind in ("F32", "Q4_0")}
    torch_model = from_gguf(files["held-out", "Q4_0"])
    dequantized = last_log_probabilities(torch_model, prompts)
    plain = as_plain(models.planted)
    restored = last_log_probabilities(put_back(torch_model, plain, models.weights), prompts)
    for name, before, after in (
        ("F32: original in torch to llama.cpp", last_log_probabilities(plain, prompts), original["F32"]),
        ("F32: original to held out + adapter", original["F32"], adapted["F32"]),
        ("F32: original to held out", original["F32"], held_out["F32"]),
        ("Q4_0: dequantized and put back in torch, to llama.cpp + adapter", restored, adapted["Q4_0"]),
        ("Q4_0: dequantized in torch, to llama.cpp, both without", dequantized, held_out["Q4_0"]),
        ("Q4_0: dequantized and put back in torch, to llama.cpp without adapter", restored, held_out["Q4_0"]),
        ("F32 original to Q4_0 of the original", original["F32"], original["Q4_0"]),
        ("F32 original to Q4_0 held out + adapter", original["F32"], adapted["Q4_0"]),
    ):
        yield {
            "compared": name,
            "max difference of log p": float((before - after).abs().max()),
            "KL": kl(before, after),
        }


def last_log_probabilities(model: nn.Module, prompts: Tensor) -> Tensor:
    return logits(model, prompts)[:, -1].double().log_softmax(-1)


def llama_cpp(file: Path, prompts: Tensor, lora: Path | None = None) -> Tensor:
    """Log probabilities of all tokens after each prompt, [prompts, tokens]."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 512, 1, False
    parameters.verbosity = 0
    parameters.cpuparams.n_threads = 1
    if lora:
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    server = xllamacpp.Server(parameters)
    rows = []
    for ids in prompts.tolist():
        asked = {"prompt": ids, "n_predict": 1, "n_probs": VOCABULARY, "temperature": 0, "cache_prompt": False}
        answer = server.handle_completions(asked)
        row = torch.full((VOCABULARY,), float("nan"), dtype=torch.float64)
        for each in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[each["id"]] = each["logprob"]
        rows.append(row)
    return torch.stack(rows)


VOCABULARY = 2048


def from_gguf(file: Path) -> nn.Module:
    """The model in torch, its weights dequantized from a GGUF file by transformers."""
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


PARTS: dict[str, tuple[Callable[[Models, Path], Iterator[dict[str, Any]]], tuple[str, ...]]] = {
    "peft": (peft_rows, ("peft", "bitsandbytes", "compressed-tensors")),
    "llama.cpp": (llama_rows, ("xllamacpp", "gguf")),
}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = [each for each in rows[0] if each != "weights"]
    cells = [
        [f"{row[each]:.3g}" if isinstance(row[each], float) else str(row[each]) for each in columns] for row in rows
    ]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dir", type=Path, required=True, help="for models and adapters, which stay there")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shutil.rmtree(options.dir, ignore_errors=True)
    options.dir.mkdir(parents=True)
    models = prepare(options.model, options.dir)
    report: dict[str, Any] = {"versions": {each: version(each) for each in ("torch", "transformers")}}
    for part in options.parts.split(","):
        measure, packages = PARTS[part]
        report["versions"] |= {each: version(each) for each in packages}
        report[part] = list(measure(models, options.dir))
        print(f"{markdown(report[part])}\n")
    print(report["versions"])
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
