"""How fast is a model quantized to 4 bits, file to file? Ours beside other packages, each in a process of its own.

    python benches/quantize.py --dir /path/with/8/GB --shape 1b --peer torchao=/envs/torchao/bin/python --peer hqq=...

makes the Llama-shaped bf16 checkpoint of benches/find.py (2.5 GB for 1b), measures, saves the numbers in benches/results and
deletes the checkpoint; what a way wrote is deleted as soon as it is measured. The ways:

limit        read all bytes of the checkpoint and write as many as 4-bit codes with a 16-bit scale per 128 weights take
superweights superweights quantize MODEL --scheme int4-g128 --keep none --to DIR
NAME         a peer, by the Python that has it and superweights (pip install --no-deps and what it needs): round to nearest,
             groups of 128 or the nearest that it offers, then its own way to save. `--help` lists the names.

Seconds begin when the packages are imported and end when all files that were written are synced, whoever forgot to. Peers run
warm, with the checkpoint in the page cache; limit and superweights also cold, with its pages dropped. peak_rss_gb has mapped
files in it, peak_own_gb only memory of the process's own, and imports_gb how much of that was there when seconds began; the
table has the difference. bits is what was written beyond the tensors that stay in bf16, per quantized weight. What takes
longer than --limit-s is ended.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from threading import Timer
from typing import Any

import find

SHAPES = find.SHAPES | {
    "tiny": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4,
             "num_key_value_heads": 4, "vocab_size": 1000, "tie_word_embeddings": False},
}  # fmt: skip
OURS = ("limit", "superweights")
GROUP = 128


def make_checkpoint(directory: Path, shape: str) -> None:
    from superweights.testing import tiny_tokenizer

    find.SHAPES[shape] = SHAPES[shape]
    find.make_checkpoint(directory, shape)
    tiny_tokenizer().save_pretrained(directory)  # several peers refuse a model without one


def quantized_weights(shape: str) -> int:
    """Weights of the linear layers of all decoder layers."""
    size = SHAPES[shape]
    hidden, heads, shared = size["hidden_size"], size["num_attention_heads"], size["num_key_value_heads"]
    attention = 2 * hidden * hidden + 2 * hidden * hidden * shared // heads
    return size["num_hidden_layers"] * (attention + 3 * hidden * size["intermediate_size"])


def limit(source: Path, to: Path, weights: int) -> None:
    rest = find.read_files(source) - 2 * weights
    size = rest + weights // 2 + 2 * weights // GROUP
    with min(source.glob("*.safetensors")).open("rb") as file:
        block = file.read(16 << 20)  # of real weights: a disk might be quicker with zeros
    to.mkdir()
    with (to / "packed").open("wb", buffering=0) as file:
        while size:
            size -= file.write(block[:size])


def superweights(source: Path, to: Path) -> None:
    from superweights.cli import main

    status = main(["quantize", str(source), "--scheme", f"int4-g{GROUP}", "--keep", "none", "--to", str(to)])
    if status:
        sys.exit(status)


def quantized(name: str, source: Path) -> Any:
    import torch

    from superweights.integrations.peers import quantized_by

    return quantized_by(name, source, dtype=torch.bfloat16)


def torchao(source: Path, to: Path) -> None:
    import torch
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import AutoModelForCausalLM, TorchAoConfig

    # Only a model that transformers quantized can be saved with safetensors.
    config = TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP)))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(to)


def bitsandbytes(source: Path, to: Path) -> None:
    quantized("bitsandbytes", source).save_pretrained(to)


def hqq(source: Path, to: Path) -> None:
    from hqq.models.hf.base import AutoHQQHFModel

    AutoHQQHFModel.save_quantized(quantized("hqq", source), str(to))


def quanto(source: Path, to: Path) -> None:
    from safetensors.torch import save_file

    state = quantized("quanto", source).state_dict()
    to.mkdir()
    kept = {name: value.contiguous() for name, value in state.items() if name != "lm_head.weight" or not tied(source)}
    save_file(kept, to / "model.safetensors")


def tied(source: Path) -> bool:
    return json.loads((source / "config.json").read_text())["tie_word_embeddings"]


def llmcompressor(source: Path, to: Path) -> None:
    quantized("llmcompressor-rtn", source).save_pretrained(to, save_compressed=True)


def gptqmodel(source: Path, to: Path) -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # see superweights.integrations.peers
    import torch
    from gptqmodel import GPTQModel
    from gptqmodel.quantization.config import RTNConfig

    config = RTNConfig(bits=4, group_size=GROUP, device="cpu")
    model = GPTQModel.load(str(source), config, dtype=torch.bfloat16)
    model.quantize(None)
    model.save(str(to))


def auto_round(source: Path, to: Path) -> None:
    from auto_round import AutoRound

    # Compiling, its default, costs half a minute whatever the size.
    options = {"iters": 0, "disable_opt_rtn": True, "enable_torch_compile": False}
    made = AutoRound(str(source), scheme="W4A16", device_map="cpu", **options)
    made.quantize_and_save(str(to), format="auto_round")


def gguf(source: Path, to: Path) -> None:
    """Q4_0 by the reference code in Python: the bytes of a GGUF file without the metadata that llama.cpp wants."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize
    from safetensors import safe_open

    to.mkdir()
    writer = GGUFWriter(to / "model.gguf", "llama", use_temp_file=True)
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                value = file.get_tensor(name)
                inside = value.ndim == 2 and ".layers." in name
                kind = GGMLQuantizationType.Q4_0 if inside else GGMLQuantizationType.F16
                stored = quantize(value.float().numpy(), kind) if inside else value.half().numpy()
                writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


PEERS: dict[str, tuple[Callable[[Path, Path], None], str, str]] = {
    "torchao": (torchao, "torchao.quantization", "torchao"),
    "bitsandbytes": (bitsandbytes, "bitsandbytes", "bitsandbytes"),
    "hqq": (hqq, "hqq.models.hf.base", "hqq"),
    "quanto": (quanto, "optimum.quanto", "optimum-quanto"),
    "llmcompressor": (llmcompressor, "llmcompressor", "llmcompressor"),
    "gptqmodel": (gptqmodel, "gptqmodel", "gptqmodel"),
    "auto-round": (auto_round, "auto_round", "auto-round"),
    "gguf": (gguf, "gguf.quants", "gguf"),
}  # what it does, what to import before the clock starts, what pip calls it


def run_way(way: str, source: Path, to: Path, shape: str) -> dict[str, object]:
    """Runs in a process of its own; gives its seconds."""
    if way == "superweights":
        for module in ("cli.app", "cli.quantize", "interventions.quantized_checkpoint"):
            import_module(f"superweights.{module}")
    elif way in PEERS:
        for module in ("transformers.models.llama.modeling_llama", "superweights.integrations.peers", PEERS[way][1]):
            import_module(module)
    imports = own_memory(os.getpid())
    start = time.perf_counter()
    if way == "limit":
        limit(source, to, quantized_weights(shape))
    elif way == "superweights":
        superweights(source, to)
    else:
        PEERS[way][0](source, to)
    for path in files(to):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    seconds = round(time.perf_counter() - start, 2)
    used = [] if way == "limit" else ["torch", PEERS[way][2] if way in PEERS else way]
    return {
        "work_s": seconds, "imports_gb": round(imports / 2**20, 3), "versions": {each: version(each) for each in used},
    }  # fmt: skip


def files(directory: Path) -> list[Path]:
    return [each for each in directory.rglob("*") if each.is_file()]


def measure(way: str, python: str, source: Path, shape: str, cold: bool, limit_s: float) -> dict[str, object]:
    find.drop_pages(source) if cold else find.read_files(source)
    work = source.parent / "quantized"
    work.mkdir()  # what it leaves in its working directory goes too
    report = work / "report.json"
    command = [python, str(Path(__file__).resolve()), "--way", way, "--shape", shape, "--dir", str(source)]
    start = time.perf_counter()
    with (work / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            [*command, "--to", str(work / "model"), "--report", str(report)],
            stdout=output, stderr=output, cwd=work, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    timer = Timer(limit_s, process.kill)
    timer.start()
    own = 0
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        own = max(own, own_memory(process.pid))
        time.sleep(0.02)
    timer.cancel()
    wall = time.perf_counter() - start
    if status == 0:
        result = json.loads(report.read_text())
        written = sum(each.stat().st_size for each in files(work / "model"))
        weights = quantized_weights(shape)
        kept = find.read_files(source) - 2 * weights
        result |= {"bytes_written": written, "bits": round(8 * (written - kept) / weights, 3)}
    else:
        words = (work / "output.txt").read_text(errors="replace").split("\n")
        why = f"ended after {limit_s:g} s" if wall >= limit_s else " ".join(words[-4:])[-300:]
        result = {"failed": why}
    shutil.rmtree(work)
    return {
        "way": way, "cold": cold, "wall_s": round(wall, 2), "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss_gb": round(usage.ru_maxrss / 2**20, 3), "peak_own_gb": round(own / 2**20, 3), **result,
    }  # fmt: skip


def own_memory(pid: int) -> int:
    """Anonymous resident memory in KiB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=", ".join(PEERS))
    parser.add_argument("--ways", default=",".join(OURS), help="of limit, superweights; peers come on top")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=900)
    parser.add_argument("--keep", action="store_true", help="do not delete the checkpoint")
    parser.add_argument("--out", type=Path, help="the JSON file; by default benches/results/quantize-SHAPE.json")
    for hidden in ("--way", "--to", "--report"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way == "make":
        make_checkpoint(options.dir, options.shape)
        return
    if options.way:
        result = run_way(options.way, options.dir, Path(options.to), options.shape)
        Path(options.report).write_text(json.dumps(result))
        return
    peers = dict(each.split("=", 1) for each in options.peer)
    strange = sorted(peers.keys() - PEERS)
    if strange:
        parser.error(f"no such peer: {', '.join(strange)}; known: {', '.join(PEERS)}")
    source = options.dir.resolve() / f"synthetic-llama-{options.shape}"
    if not (source / "model.safetensors.index.json").exists():
        # In a process of its own: a child's peak memory starts at its parent's.
        subprocess.run(
            [sys.executable, __file__, "--way", "make", "--shape", options.shape, "--dir", source], check=True
        )
    runs = [(way, sys.executable, cold) for cold in (True, False) for way in options.ways.split(",")]
    runs += [(name, str(Path(python).absolute()), False) for name, python in peers.items()]
    rows = []
    for _ in range(options.rounds):
        for way, python, cold in runs:
            rows.append(measure(way, python, source, options.shape, cold, options.limit_s))
            print(rows[-1], file=sys.stderr)
    result = {"shape": options.shape, "bytes": find.read_files(source), "quantized_weights": quantized_weights(options.shape),
              "platform": platform.platform(), "cores": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS"),
              "rows": rows}  # fmt: skip
    target = options.out or Path(__file__).parent / "results" / f"quantize-{options.shape}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    show(rows)
    if not options.keep:
        shutil.rmtree(source)


def show(rows: list[dict[str, Any]]) -> None:
    """A table of the best of each way (the machine's noise only adds time) and its ratios within this run."""

    def best(way: str, cold: bool) -> float:
        mine = [row for row in rows if row["way"] == way and row["cold"] == cold]
        return min((row["work_s"] for row in mine if "work_s" in row), default=float("nan"))

    print("way           cold s  /limit   warm s  /limit  /ours   peak GB   own GB    bits")
    for way in dict.fromkeys(row["way"] for row in rows):
        cells = [f"{way:<13}"]
        for cold in (True, False):
            mine = best(way, cold)
            cells.append(f"{mine:6.2f} {mine / best('limit', cold):7.2f} ")
        mine = [row for row in rows if row["way"] == way]
        peak = max(row["peak_rss_gb"] for row in mine)
        own = max(row["peak_own_gb"] - row.get("imports_gb", float("nan")) for row in mine)
        cells.append(f"{best(way, False) / best('superweights', False):5.1f} {peak:9.2f} {own:8.2f}")
        print(" ".join(cells), f"{mine[0].get('bits', float('nan')):7.3f}", mine[0].get("failed", ""))


if __name__ == "__main__":
    main()
