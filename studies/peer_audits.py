"""What other packages do to super weights: one model, quantized by each of them, and audited by its files.

    python studies/peer_audits.py MODEL --dir DIR [--plant] [--peer NAME=PYTHON ...] [--out NAME]

quantizes the model in every way that a given environment has, runs `superweights audit` on each result, prints a table and
writes NAME.md and NAME.json. With --plant it first plants a super weight in layer 2 and audits that one alone; else it audits
the candidates that `find` names. An environment is one directory and needs none of ours in it:

    python3 -m venv /envs/NAME
    /envs/NAME/bin/pip install torch==2.13.0        # first, for a build without CUDA where that is what you have
    /envs/NAME/bin/pip install ...

    NAME           ...
    bitsandbytes   bitsandbytes accelerate transformers==5.23.0
    llmcompressor  llmcompressor transformers==5.17.0       (it takes no newer one)
    torchao        torchao accelerate transformers==5.23.0
    auto-round     auto-round transformers==5.23.0
    gptqmodel      gptqmodel transformers==5.23.0
    superweights   this repository; always there

Packages that are calibrated get the windows of the text behind those that are measured. KL is that of the weights: what a
format rounds of the inputs is not in it. A package that fails has its last words in the table. Ways that are already in
NAME.json and whose environment is not given stay as they are, so that environments can come and go one by one. Half an hour
on one core for all of them and a model of 1.5 M parameters; nothing is downloaded.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

GROUP = 128
CALIBRATION_WINDOWS = 8
Rows = list[list[int]]
CONDITIONS = ("errors of the super weights alone", "quantized", "quantized, super weights put back")
COLUMNS = ("way", "weight", "verdict", "stored (original)", "error", "steps", "cut off", "neighbours' error", "column x",
           "KL of its error alone, millinats", "KL of all, millinats", "KL put back, millinats")  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One way to quantize, and the environment that has it."""

    environment: str
    package: str
    does: str
    make: Callable[[Path, Path, Rows], None]


def loaded(source: Path, **options: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **options).eval()


def bitsandbytes(**settings: Any) -> Callable[[Path, Path, Rows], None]:
    def make(source: Path, to: Path, _: Rows) -> None:
        from transformers import BitsAndBytesConfig

        loaded(source, quantization_config=BitsAndBytesConfig(**settings), device_map="cpu").save_pretrained(to)

    return make


def llmcompressor(scheme: str, method: str) -> Callable[[Path, Path, Rows], None]:
    def make(source: Path, to: Path, rows: Rows) -> None:
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier
        from llmcompressor.pipelines.cache import IntermediatesCache

        # It pins activations for the way to an accelerator even where there is none, which torch refuses.
        IntermediatesCache.pin_memory = lambda *_: None
        rounding = GPTQModifier if method == "GPTQ" else QuantizationModifier
        recipe = [AWQModifier()] if method == "AWQ" else []
        recipe.append(rounding(targets="Linear", scheme=scheme, ignore=["lm_head"]))
        text = {}
        if method != "RTN":
            data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(each) for each in rows]})
            text = {"dataset": data, "num_calibration_samples": len(rows), "max_seq_length": len(rows[0])}
        model = loaded(source)
        oneshot(model=model, recipe=recipe, **text)
        model.save_pretrained(to, save_compressed=True)

    return make


def torchao(bits: int) -> Callable[[Path, Path, Rows], None]:
    def make(source: Path, to: Path, _: Rows) -> None:
        import torch
        import torchao.quantization as ao
        from transformers import TorchAoConfig

        kind = getattr(torch, f"int{bits}")
        sharing = ao.PerGroup(GROUP) if bits == 4 else ao.PerAxis(0)
        config = TorchAoConfig(ao.IntxWeightOnlyConfig(weight_dtype=kind, granularity=sharing))
        loaded(source, quantization_config=config).save_pretrained(to)

    return make


def auto_round(steps: int, packing: str) -> Callable[[Path, Path, Rows], None]:
    def make(source: Path, to: Path, rows: Rows) -> None:
        import torch
        from auto_round import AutoRound
        from transformers import AutoTokenizer

        options: dict[str, Any] = {"iters": steps, "disable_opt_rtn": True}
        if steps:
            text = [torch.tensor([each]) for each in rows]
            options = {"iters": steps, "dataset": text, "nsamples": len(rows), "seqlen": len(rows[0]), "batch_size": 4}
        rounding = AutoRound(
            loaded(source), tokenizer=AutoTokenizer.from_pretrained(source), scheme="W4A16", device_map="cpu",
            enable_torch_compile=False, **options,
        )  # fmt: skip
        rounding.quantize_and_save(str(to), format=packing)

    return make


def gptqmodel(source: Path, to: Path, rows: Rows) -> None:
    # Two workers load layers, but it starts one where there are two cores, and then refuses to work.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=4, group_size=GROUP, offload_to_disk=False)
    model = GPTQModel.load(str(source), config, device="cpu", dtype=torch.bfloat16)
    model.quantize([{"input_ids": each, "attention_mask": [1] * len(each)} for each in rows], batch_size=1)
    model.save(str(to))


def ours(*arguments: str) -> Callable[[Path, Path, Rows], None]:
    def make(source: Path, to: Path, _: Rows) -> None:
        from superweights.cli import main as run

        if run(["quantize", str(source), *arguments, "--to", str(to)]):
            raise SystemExit("superweights quantize failed")

    return make


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
WAYS = {
    "bitsandbytes nf4": Way("bitsandbytes", "bitsandbytes", "blocks of 64", bitsandbytes(**NF4)),
    "bitsandbytes int8": Way("bitsandbytes", "bitsandbytes", "by row", bitsandbytes(load_in_8bit=True)),
    "llm-compressor W4A16": Way("llmcompressor", "llmcompressor", "RTN, groups of 128", llmcompressor("W4A16", "RTN")),
    "llm-compressor W4A16 GPTQ": Way("llmcompressor", "llmcompressor", "groups of 128", llmcompressor("W4A16", "GPTQ")),
    "llm-compressor W4A16 AWQ": Way("llmcompressor", "llmcompressor", "groups of 128", llmcompressor("W4A16", "AWQ")),
    "llm-compressor W8A8": Way("llmcompressor", "llmcompressor", "RTN, by row", llmcompressor("W8A8", "RTN")),
    "torchao int4": Way("torchao", "torchao", "RTN, groups of 128", torchao(4)),
    "torchao int8": Way("torchao", "torchao", "RTN, by row", torchao(8)),
    "GPT-QModel GPTQ": Way("gptqmodel", "gptqmodel", "4 bits, groups of 128", gptqmodel),
    "auto-round": Way("auto-round", "auto-round", "4 bits, groups of 128, 200 steps", auto_round(200, "auto_round")),
    "auto-round RTN, packed as AWQ": Way(
        "auto-round", "auto-round", "4 bits, groups of 128", auto_round(0, "auto_round:auto_awq")
    ),
    "ours int4-g128": Way("superweights", "superweights", "RTN", ours("--scheme", f"int4-g{GROUP}", "--keep", "none")),
    "ours int4-g128, clip z=9": Way(
        "superweights", "superweights", "clipped, RTN",
        ours("--scheme", f"int4-g{GROUP}", "--clip", "z=9", "--keep", "none"),
    ),
    "ours int4-g128, clip z=3": Way(
        "superweights", "superweights", "clipped, RTN",
        ours("--scheme", f"int4-g{GROUP}", "--clip", "z=3", "--keep", "none"),
    ),
    "ours int4-g128, kept": Way(
        "superweights", "superweights", "super weights held out", ours("--scheme", f"int4-g{GROUP}")
    ),
}  # fmt: skip


def make_in_own_process(way: str, python: str, source: Path, work: Path) -> str | None:
    """Lets an environment quantize; gives its last words where it failed."""
    command = [python, str(Path(__file__).resolve()), str(source), "--way", way, "--dir", str(work)]
    log = work / "output.txt"
    with log.open("wb") as output:
        done = subprocess.run(
            command, stdout=output, stderr=output, cwd=work, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False
        )
    if done.returncode == 0:
        return None
    return next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "no output")


def audited(quantized: Path, source: Path, weights: str, windows: int, to: Path) -> dict[str, Any]:
    """What the verb says, from its result file."""
    from superweights.cli import main as run
    from superweights.results.records import AuditRecord, MeasurementRecord
    from superweights.results.store import read_records

    arguments = ["audit", str(quantized), "--original", str(source), "--weights", weights, "--windows", str(windows)]
    run([*arguments, "--out", str(to)])
    _, records = read_records(to)
    kl = [each for each in records if isinstance(each, MeasurementRecord) and each.name == "kl_to_original"]
    ratios = [each for each in records if isinstance(each, MeasurementRecord) and each.name == "perplexity_ratio"]
    return {
        "weights": [each.model_dump(mode="json") for each in records if isinstance(each, AuditRecord)],
        "kl_nats": {each.condition: [each.value, each.interval] for each in kl},
        "perplexity_ratio": {each.condition: [each.value, each.interval] for each in ratios},
    }


def write_calibration(source: Path, windows: int, to: Path) -> None:
    """Token ids of the windows of the text behind those that are measured."""
    from superweights.measurements.model_windows import open_windows
    from superweights.model.loading import load

    with load(source) as model:
        ids = open_windows(model, "heldout", windows=windows + CALIBRATION_WINDOWS).ids[windows:]
    if not len(ids):
        raise SystemExit(f"The text has no window behind the first {windows}: measure fewer.")
    to.write_text(json.dumps(ids.tolist()))


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each weight of each way."""
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    for row in rows:
        name = f"{row['way']} ({row['does']})"
        if "failed" in row:
            lines.append(f"| {name} | failed: {row['failed']} |" + " |" * (len(COLUMNS) - 2))
        for number, each in enumerate(row.get("weights", ())):
            kl = ["" if number else _kl(row["kl_nats"], condition) for condition in CONDITIONS]
            cells = [
                "" if number else name, each["coordinate"], f"**{each['verdict']}**",
                f"{each['stored']:.5g} ({each['original']:.5g})", _or_blank(each["error"], "{:+.2%}"),
                _or_blank(each["error_steps"], "{:+.2f}"), {True: "yes", False: "no", None: ""}[each["clipped"]],
                _or_blank(each["block_error"], "{:.1%}"),
                "" if each["column_scale"] == 1 else f"{each['column_scale']:.3g}", *kl,
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _or_blank(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _kl(measured: dict[str, Any], condition: str) -> str:
    """Millinats per token, and the 95 % interval."""
    if condition not in measured:
        return "exact"
    value, interval = measured[condition]
    low, high = (f"{1000 * each:.3g}" for each in interval)
    return f"{1000 * value:.3g} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dir", type=Path, required=True, help="for the quantized models, which stay there")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--plant", action="store_true", help="plant a super weight first")
    parser.add_argument("--windows", type=int, default=16, help="measure on so many windows of the embedded text")
    parser.add_argument("--out", type=Path, help="writes this file with .md and .json behind its name")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    work = options.dir.resolve()
    if options.way:
        rows = json.loads((work / "rows.json").read_text())
        WAYS[options.way].make(options.model, work / "model", rows)
        (work / "version").write_text(version(WAYS[options.way].package))
        return
    pythons = {"superweights": sys.executable} | dict(each.split("=", 1) for each in options.peer)
    if strange := sorted(pythons.keys() - {each.environment for each in WAYS.values()}):
        parser.error(f"no such peer: {', '.join(strange)}")
    source, weights = options.model.resolve(), "auto"
    work.mkdir(parents=True, exist_ok=True)
    if options.plant:
        from planted import plant

        weights = str(plant(source, work / "planted"))
        source = work / "planted"
    write_calibration(source, options.windows, work / "rows.json")
    report = {"model": options.model.name, "planted": options.plant, "weights": weights, "windows": options.windows}
    results = earlier(options.out, report)
    for name, way in WAYS.items():
        if way.environment in pythons:
            results[name] = run_way(name, pythons[way.environment], source, weights, options.windows, work)
            print(markdown([results[name]]), file=sys.stderr)
    rows = [results[name] for name in WAYS if name in results]
    print(markdown(rows))
    if options.out:
        Path(f"{options.out}.md").write_text(markdown(rows) + "\n")
        Path(f"{options.out}.json").write_text(json.dumps(report | {"ways": rows}, indent=1) + "\n")


def earlier(out: Path | None, report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of an earlier run on the same model and text."""
    file = Path(f"{out}.json")
    if out is None or not file.exists():
        return {}
    known = json.loads(file.read_text())
    if {key: known.get(key) for key in report} != report:
        raise SystemExit(f"{file} is of another model or text: give --out another name.")
    return {each["way"]: each for each in known["ways"]}


def run_way(name: str, python: str, source: Path, weights: str, windows: int, work: Path) -> dict[str, Any]:
    folder = work / name.replace(" ", "-").replace(",", "").replace("=", "")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(work / "rows.json", folder)
    row: dict[str, Any] = {"way": name, "does": WAYS[name].does, "package": WAYS[name].package}
    if failed := make_in_own_process(name, python, source, folder):
        return row | {"failed": failed}
    made = next((folder / "model").rglob("config.json")).parent
    row["version"] = (folder / "version").read_text()
    return row | audited(made, source, weights, windows, folder / "audit.jsonl")


if __name__ == "__main__":
    main()
