"""How fast are GGUF files read and written? Side by side with safetensors, each way in a process of its own.

    python benches/gguf_files.py --shape 1b --dir /path/with/10/GB [--rounds 3]

makes a Llama-shaped bf16 checkpoint (see find.py), writes it as GGUF at each type, and runs one streamed pass of nine tokens
over each. Saves the numbers in benches/results and deletes the files. The ways:

read TYPE     read the bytes of the file in order into a buffer, nothing else: the limit of a pass
pass TYPE     superweights.load(residency="streamed") and one trace; safetensors is the bf16 checkpoint
write TYPE    superweights.quantize_to_gguf; the limit is read of the checkpoint and a write and fsync of as many bytes

Files are in the page cache. Seconds begin when torch and transformers are imported.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from find import SHAPES, make_checkpoint

TYPES = ("q4_0", "q8_0", "f16")
PROMPT = list(range(3, 12))


def read_seconds(paths: list[Path]) -> float:
    started = time.perf_counter()
    buffer = bytearray(16 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def pass_seconds(model: Path) -> float:
    import torch

    import superweights as sw

    started = time.perf_counter()
    with sw.load(model, residency="streamed") as loaded:
        loaded.run(torch.tensor([PROMPT]))
    return time.perf_counter() - started


def write_seconds(source: Path, kind: str, to: Path) -> float:
    import superweights as sw

    started = time.perf_counter()
    sw.quantize_to_gguf(source, to, kind, overwrite=True)
    return time.perf_counter() - started


def limit_of_writing(source: Path, size: int, to: Path) -> float:
    seconds = read_seconds(sorted(source.glob("*.safetensors")))
    started = time.perf_counter()
    with to.open("wb") as file:
        piece = bytes(16 << 20)
        for _ in range(0, size, len(piece)):
            file.write(piece)
        os.fsync(file.fileno())
    to.unlink()
    return seconds + time.perf_counter() - started


def run_one(way: str, directory: Path) -> float:
    what, _, kind = way.partition(" ")
    checkpoint, file = directory / "checkpoint", directory / f"{kind}.gguf"
    if what == "read":
        return read_seconds(sorted(checkpoint.glob("*.safetensors")) if kind == "safetensors" else [file])
    if what == "pass":
        return pass_seconds(checkpoint if kind == "safetensors" else file)
    if what == "write":
        return write_seconds(checkpoint, kind, file)
    return limit_of_writing(checkpoint, file.stat().st_size, directory / "limit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one")
    options = parser.parse_args()
    if options.one:
        import torch  # noqa: F401
        import transformers  # noqa: F401

        print(run_one(options.one, options.dir))
        return
    options.dir.mkdir(parents=True, exist_ok=True)
    make_checkpoint(options.dir / "checkpoint", options.shape)
    ways = [f"{what} {kind}" for kind in TYPES for what in ("write", "limit", "read", "pass")]
    ways += ["read safetensors", "pass safetensors"]
    best: dict[str, float] = {}
    for _ in range(options.rounds):
        for way in ways:
            command = [sys.executable, "-W", "ignore", __file__, "--dir", str(options.dir), "--one", way]
            seconds = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
            best[way] = min(best.get(way, seconds), seconds)
    sizes = {kind: (options.dir / f"{kind}.gguf").stat().st_size for kind in TYPES}
    found = {
        "command": f"python benches/gguf_files.py --shape {options.shape} --rounds {options.rounds}",
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "bytes": sizes,
        "seconds": best,
    }
    path = Path(__file__).parent / "results" / f"gguf-{options.shape}.json"
    path.write_text(json.dumps(found, indent=2) + "\n")
    for way, seconds in best.items():
        print(f"{way:20} {seconds:8.2f} s")
    for file in [*options.dir.glob("*.gguf"), *(options.dir / "checkpoint").iterdir()]:
        file.unlink()


if __name__ == "__main__":
    main()
