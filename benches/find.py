"""How fast is one detection pass? Side by side on a synthetic checkpoint, each way in a process of its own.

    python benches/find.py --shape 7b --dir /path/with/14/GB

makes a Llama-shaped bf16 checkpoint with a planted super weight (13.5 GB, or 2.5 GB for 1b), measures, saves the numbers in
benches/results and deletes the checkpoint. The ways:

read        read the same bytes of the files in order into a buffer, nothing else
paper       from_pretrained, hooks on the down projections, one forward pass: the paper's code
resident    superweights.load(residency="resident") and one trace
streamed    superweights.load(residency="streamed") and one trace
streamed4   the same, first four decoder layers
find        superweights.find, streamed: six prompts, removal and a second pass
find4       the same, first four decoder layers

paper to streamed4 run one prompt of nine tokens. Cold means that the files' pages were dropped from the page cache first.
The seconds of the table begin when torch and transformers are imported, which every way but the first must do; wall_s in the
saved file is the whole process.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "300m": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16,
             "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": True},
    "toy": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4,
            "num_key_value_heads": 4, "vocab_size": 1000, "tie_word_embeddings": False},
}  # fmt: skip
WAYS = ("read", "paper", "resident", "streamed", "streamed4", "find", "find4")
LAYER, ROW, COL = 2, 73, 101
SHARD_BYTES = 2 << 30


def make_checkpoint(directory: Path, shape: str) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=2048, dtype="bfloat16", architectures=["LlamaForCausalLM"]
    )
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).named_parameters()}
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    torch.manual_seed(0)
    noise = (torch.randn(1 << 26) * 0.02).to(torch.bfloat16)

    def weights(name: str, size: torch.Size) -> torch.Tensor:
        if len(size) == 1:
            return torch.ones(size, dtype=torch.bfloat16)
        start = int(torch.randint(1 << 20, (1,)))
        need = size.numel()
        value = torch.cat([noise[start:]] + [noise] * (need // len(noise) + 1))[:need].view(size).clone()
        if name.startswith(f"model.layers.{LAYER}.mlp."):
            if "down" in name:
                value[ROW, COL] = 64
            else:
                value[COL] *= 8  # the neuron that feeds the super weight
        return value

    index, shard, held, number = {}, {}, 0, 0
    for name, size in [*shapes.items(), ("", torch.Size())]:
        if shard and (not name or held + 2 * size.numel() > SHARD_BYTES):
            number += 1
            file = f"model-{number:05d}.safetensors"
            save_file(shard, directory / file, metadata={"format": "pt"})
            index |= dict.fromkeys(shard, file)
            shard, held = {}, 0
        if name:
            shard[name] = weights(name, size)
            held += 2 * size.numel()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def prompt_ids(vocabulary: int, prompts: int, tokens: int) -> list[list[int]]:
    return [[(7 * prompt + 131 * token + 1) % vocabulary for token in range(tokens)] for prompt in range(prompts)]


def run_way(way: str, directory: Path) -> dict[str, object]:
    """Runs in a process of its own; gives what it found, to show that every way did the work, and its seconds."""
    if way == "paper":
        import transformers.models.llama.modeling_llama  # noqa: F401
    elif way != "read":
        import superweights.model.loading  # noqa: F401
    start = time.perf_counter()
    return {**do(way, directory), "work_s": round(time.perf_counter() - start, 2)}


def do(way: str, directory: Path) -> dict[str, object]:
    vocabulary = json.loads((directory / "config.json").read_text())["vocab_size"]
    if way == "read":
        return {"bytes": read_files(directory)}
    if way == "paper":
        return {"found": paper_way(directory, prompt_ids(vocabulary, 1, 9))}
    import superweights as sw

    last_layer = 3 if way.endswith("4") else None
    ids = prompt_ids(vocabulary, 6, 10) if way.startswith("find") else prompt_ids(vocabulary, 1, 9)
    prompts = [sw.Prompt("", False, tuple(each), tuple(map(str, each))) for each in ids]
    with sw.load(directory, residency="resident" if way == "resident" else "streamed") as model:
        if way.startswith("find"):
            return {
                "found": [
                    str(each.coordinate) for each in sw.find(model, prompts=prompts, last_layer=last_layer).candidates
                ]
            }
        peaks = [each for each in sw.trace(model, prompts, last_layer=last_layer).peaks if each.layer == LAYER]
        return {"found": {each.side: each.channel for each in peaks}}


def read_files(directory: Path) -> int:
    buffer, total = bytearray(16 << 20), 0
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def paper_way(directory: Path, ids: list[list[int]]) -> dict[str, int]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    seen: dict[str, list[int]] = {"input": [], "output": []}

    def hook(module: object, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        for side, value in (("input", inputs[0]), ("output", output)):
            seen[side].append(int(value.abs().argmax()) % value.shape[-1])

    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(hook)
    with torch.no_grad():
        model(torch.tensor(ids))
    return {side: channels[LAYER] for side, channels in seen.items()}


def drop_pages(directory: Path) -> None:
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(way: str, directory: Path, cold: bool) -> dict[str, object]:
    if cold:
        drop_pages(directory)
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, __file__, "--way", way, "--dir", str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    result = json.loads(output) if status == 0 else {"failed": status}
    return {
        "way": way, "cold": cold, "wall_s": round(wall, 2), "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss_gb": round(usage.ru_maxrss / 2**20, 2), **result,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--keep", action="store_true", help="do not delete the checkpoint")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way == "make":
        make_checkpoint(options.dir, options.shape)
        return
    if options.way:
        print(json.dumps(run_way(options.way, options.dir)))
        return
    directory = options.dir / f"synthetic-llama-{options.shape}"
    if not (directory / "model.safetensors.index.json").exists():
        # In a process of its own: a child's peak memory starts at its parent's.
        subprocess.run(
            [sys.executable, __file__, "--way", "make", "--shape", options.shape, "--dir", directory], check=True
        )
    rows = []
    for _ in range(options.rounds):
        for cold in (True, False):
            for way in options.ways.split(","):
                rows.append(measure(way, directory, cold))
                print(rows[-1], file=sys.stderr)
    result = {"shape": options.shape, "bytes": read_files(directory), "platform": platform.platform(), "cores": os.cpu_count(),
              "rows": rows}  # fmt: skip
    target = Path(__file__).parent / "results" / f"find-{options.shape}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    report(rows)
    if not options.keep:
        shutil.rmtree(directory)


def report(rows: list[dict[str, object]]) -> None:
    """A table of the best of each way (the machine's noise only adds time) and its ratios within this run."""

    def best(way: str, cold: bool) -> float:
        mine = [row for row in rows if row["way"] == way and row["cold"] == cold]
        return min((row["work_s"] for row in mine if "work_s" in row), default=float("nan"))

    print("way        cold s  /read  paper/  warm s  /read  paper/  peak GB")
    for way in dict.fromkeys(row["way"] for row in rows):
        cells = [f"{way:<10}"]
        for cold in (True, False):
            mine = best(way, cold)
            cells.append(f"{mine:6.1f} {mine / best('read', cold):6.2f} {best('paper', cold) / mine:7.2f}")
        print("  ".join(cells), f"{max(row['peak_rss_gb'] for row in rows if row['way'] == way):7.2f}")


if __name__ == "__main__":
    main()
