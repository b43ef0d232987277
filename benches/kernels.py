"""How fast are packed linear layers? Side by side with bfloat16 `F.linear`, in one run.

    python benches/kernels.py [--rounds 5] [--threads 1] [--generate] [--peer torchao=PYTHON] [--peer bitsandbytes=PYTHON]

The layers are the seven linear ones of decoder layers of Llama-3.2-1B's shape (60.8 million weights each), random, with one
super weight in every down projection. Decode is one token through --layers of them, more than a cache holds; prefill is 512
tokens through one. The ways take turns in each round and the best pass counts: other programs only add time. A way whose pass
takes over 20 s has one turn. Results are kept by processor, in results/kernels-PROCESSOR.json. The ways:

bf16          F.linear with bfloat16 weights: what the ratios are to
int4-g128     PackedLinear, and with a super weight restored in each down projection
int8-row      PackedLinear
w8a8          PackedLinear with int8_inputs; and with the channel of a super activation
fbgemm        torch's deprecated dynamic int8 product: one scale for all tokens; 7 bits without VNNI, where 8 saturate
dequantize    int4 unpacked and dequantized at each pass, eagerly: what a layer without a kernel costs (decode only)

A peer is another quantizer in an environment of its own, by the path of its Python; it is run there with the same layers, and
its ratios are to bf16 in its own process. What a peer cannot do on this processor is said.

--generate measures whole models as well: a Llama of 284 million random parameters in bf16, and what `superweights quantize`
writes from it, by `load_packed`: 64 new tokens of `generate` after a prompt of 16, and a pass over 512 tokens.
"""

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import find
import torch
from torch import nn

SHAPES = ((2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192))
"""Rows and cols of the queries, keys, values and outputs of attention, gate, up and down projection."""
SUPER_ROW, SUPER_COL, SUPER_CHANNEL = 73, 101, 9
PREFILL = 512
PROMPT, NEW_TOKENS = 16, 64
LONG_S = 20
"""A way whose pass takes longer has one turn."""


def weights(layers: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)  # of its own: peers draw from the global one as they are made
    noise = (torch.randn(1 << 24, generator=generator) * 0.02).bfloat16()
    for _ in range(layers):
        for rows, cols in SHAPES:
            start = int(torch.randint(1 << 22, (1,), generator=generator))
            weight = torch.cat([noise[start:], noise])[: rows * cols].view(rows, cols).clone()
            if (rows, cols) == SHAPES[-1]:
                weight[SUPER_ROW, SUPER_COL] = 4
            yield weight


def plain(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def our_ways(layers: int) -> dict[str, list[nn.Module]]:
    from superweights.integrations.packed_linear import PackedLinear, Scheme

    int4, int8 = Scheme.parse("int4-g128"), Scheme.parse("int8-row")

    def stack(scheme: Scheme, *, super_weight: bool = False, **options: object) -> list[nn.Module]:
        return [
            PackedLinear.pack(
                each,
                scheme,
                held=[(SUPER_ROW, SUPER_COL)] if super_weight and each.shape == SHAPES[-1] else [],
                **options,
            )
            for each in weights(layers)
        ]

    return {
        "bf16": [plain(each) for each in weights(layers)],
        "int4-g128": stack(int4),
        "int4-g128 + super weight": stack(int4, super_weight=True),
        "int8-row": stack(int8),
        "w8a8": stack(int8, int8_inputs=True),
        "w8a8 + super activation": stack(int8, int8_inputs=True, channel=SUPER_CHANNEL),
        "fbgemm": [Fbgemm(each) for each in weights(layers)],
    }


class Fbgemm(nn.Module):
    """Int8 by row, activations in 8 bits, or 7."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.in_features, wide = weight.shape[1], weight.float()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch will remove its quantized tensors
            scales = wide.abs().amax(1).double() / 127
            held = torch.quantize_per_channel(wide, scales, torch.zeros(len(wide), dtype=torch.int64), 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(held, None)
        self.seven_bits = not torch.cpu._is_vnni_supported()

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.quantized.linear_dynamic(given.float(), self.packed, self.seven_bits)
        return found.to(given.dtype)


def without_kernel() -> list[nn.Module]:
    """Layers that were never prepared."""
    from superweights.integrations.packed_linear import PackedLinear, Scheme

    found: list[nn.Module] = []
    for each in weights(1):
        packed = PackedLinear.pack(each, Scheme.parse("int4-g128"))
        layer = PackedLinear(
            packed.in_features, packed.out_features, 4, groups=packed.groups, scale_dtype=torch.bfloat16
        )
        layer.load_state_dict(packed.state_dict())
        found.append(layer)
    return found


def peer_ways(peer: str, layers: int) -> dict[str, list[nn.Module] | str]:
    """Runs in the environment of the peer; a text says why a way does not run."""
    ways: dict[str, list[nn.Module] | str] = {"bf16": [plain(each) for each in weights(layers)]}
    makers = {"torchao": torchao_layers, "bitsandbytes": bitsandbytes_layers}[peer]()
    for name, make in makers.items():
        try:
            ways[name] = [make(each) for each in weights(layers)]
            run_stack(ways[name], inputs(1))
        except Exception as error:
            ways[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return ways


def torchao_layers() -> dict[str, Callable[[torch.Tensor], nn.Module]]:
    from torchao.quantization import (
        Int4WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    def make(config: object) -> Callable[[torch.Tensor], nn.Module]:
        def one(weight: torch.Tensor) -> nn.Module:
            held = nn.Sequential(plain(weight))
            quantize_(held, config)
            return held[0]

        return one

    return {
        "torchao int4 weight only": make(Int4WeightOnlyConfig(group_size=128)),
        "torchao int8 weight only": make(Int8WeightOnlyConfig()),
        "torchao int8 dynamic": make(Int8DynamicActivationInt8WeightConfig()),
    }


def bitsandbytes_layers() -> dict[str, Callable[[torch.Tensor], nn.Module]]:
    import bitsandbytes as bnb

    def make(kind: type[nn.Module], **options: object) -> Callable[[torch.Tensor], nn.Module]:
        def one(weight: torch.Tensor) -> nn.Module:
            layer = kind(weight.shape[1], weight.shape[0], bias=False, **options)
            layer.load_state_dict({"weight": weight}, strict=False)
            return layer.to("cpu").eval()

        return one

    return {
        "bitsandbytes nf4": make(bnb.nn.Linear4bit, compute_dtype=torch.bfloat16, quant_type="nf4"),
        "bitsandbytes int8": make(bnb.nn.Linear8bitLt, has_fp16_weights=False),
    }


def inputs(tokens: int) -> dict[int, torch.Tensor]:
    """Activations by their width, with a super activation in the first token."""
    generator = torch.Generator().manual_seed(1)
    found = {cols: torch.randn(tokens, cols, generator=generator).bfloat16() for cols in {cols for _, cols in SHAPES}}
    for each in found.values():
        each[0, SUPER_CHANNEL] = 300
    return found


def run_stack(layers: list[nn.Module], given: dict[int, torch.Tensor]) -> list[torch.Tensor]:
    return [layer(given[layer.in_features]) for layer in layers]


def best_pass(ways: dict[str, list[nn.Module]], tokens: int, rounds: int, passes: int) -> dict[str, float]:
    """Seconds of the best pass of each way."""
    given = inputs(tokens)
    return best_call(
        {name: lambda layers=layers: run_stack(layers, given) for name, layers in ways.items()}, rounds, passes
    )


def best_call(calls: dict[str, Callable[[], object]], rounds: int, times: int = 1) -> dict[str, float]:
    """Seconds of the best call of each; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            for _ in range(times):
                if max(seconds[name], default=0) < LONG_S:
                    start = time.perf_counter()
                    call()
                    seconds[name].append(time.perf_counter() - start)
    return {name: min(each) for name, each in seconds.items()}


def error(layers: list[nn.Module], tokens: int) -> float:
    """Relative to float32 products of the same weights, over the layers of one decoder layer; quantization included."""
    given = inputs(tokens)
    exact = [given[each.shape[1]].float() @ each.float().t() for each in weights(1)]
    found = run_stack(layers[: len(SHAPES)], given)
    differences = sum(float((one.float() - other).square().sum()) for one, other in zip(found, exact, strict=True))
    return (differences / sum(float(each.square().sum()) for each in exact)) ** 0.5


def super_weight_seconds(layer: nn.Module, tokens: int, rounds: int) -> float:
    """Of putting one super weight back, alone."""
    flat = inputs(tokens)[layer.in_features]
    outputs, times = torch.zeros(tokens, layer.out_features, dtype=torch.bfloat16), 1000
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(times):
            layer._add_super_weights(outputs, flat)
        seconds.append((time.perf_counter() - start) / times)
    return min(seconds)


def measure(ways: dict[str, list[nn.Module] | str], layers: int, rounds: int) -> list[dict[str, object]]:
    running = {name: each for name, each in ways.items() if not isinstance(each, str)}
    one = {name: each[: len(SHAPES)] for name, each in running.items()}
    decode = best_pass(running, 1, rounds, 10)
    prefill = best_pass(one, PREFILL, rounds, 1)
    rows: list[dict[str, object]] = [
        {
            "way": name,
            "decode_ms_per_layer": round(1e3 * decode[name] / layers, 3),
            "decode_over_bf16": round(decode["bf16"] / decode[name], 2),
            "prefill_ms_per_layer": round(1e3 * prefill[name], 1),
            "prefill_over_bf16": round(prefill["bf16"] / prefill[name], 2),
            "error": round(error(running[name], 32), 5),
        }
        for name in running
    ]
    return rows + [{"way": name, "does_not_run": each} for name, each in ways.items() if isinstance(each, str)]


def ask_peer(peer: str, python: str, options: argparse.Namespace) -> list[dict[str, object]]:
    command = [python, __file__, "--as-peer", peer, "--rounds", str(options.rounds), "--threads", str(options.threads)]
    done = subprocess.run([*command, "--layers", str(options.layers)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return [{"way": peer, "does_not_run": f"its process ended with status {done.returncode}; stderr says why"}]
    return [{**each, "process": peer} for each in json.loads(done.stdout.splitlines()[-1])]


def generate(rounds: int) -> list[dict[str, object]]:
    """Whole models: bf16, and what was written from it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from superweights.integrations.transformers_quantizer import PackedLinear, load_packed

    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        find.make_checkpoint(source, "300m")
        models = {"bf16": AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)}
        for scheme in ("int4-g128", "int8-row"):
            keep = f"{find.LAYER}:{find.ROW}:{find.COL}"
            command = f"quantize {source} --scheme {scheme} --keep {keep} --to {source}-{scheme}"
            subprocess.run(
                [sys.executable, "-m", "superweights", *command.split()], check=True, stdout=subprocess.DEVNULL
            )
            models[scheme] = load_packed(f"{source}-{scheme}", dtype=torch.bfloat16)
        packed = [name for name, each in models["int8-row"].named_modules() if isinstance(each, PackedLinear)]
        models["w8a8"] = load_packed(f"{source}-int8-row", dtype=torch.bfloat16, int8_inputs=dict.fromkeys(packed))
    ids = torch.randint(3, 32000, (1, PREFILL), generator=torch.Generator().manual_seed(0))
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "pad_token_id": 0}
    new = best_call(
        {name: lambda model=model: model.generate(ids[:, :PROMPT], **options) for name, model in models.items()}, rounds
    )
    prefill = best_call(
        {name: lambda model=model: model(ids, logits_to_keep=1) for name, model in models.items()}, rounds
    )
    return [
        {
            "way": name,
            "generated_tokens_per_s": round(NEW_TOKENS / new[name], 1),
            "generated_over_bf16": round(new["bf16"] / new[name], 2),
            "prefill_tokens_per_s": round(PREFILL / prefill[name]),
            "prefill_over_bf16": round(prefill["bf16"] / prefill[name], 2),
        }
        for name in models
    ]


def processor() -> str:
    """What decides which products are fast."""
    from superweights.model.widening import multiplies_bfloat16

    return torch.backends.cpu.get_cpu_capability().lower() + ("-bf16" if multiplies_bfloat16() else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=3, help="decoder layers of a decode pass")
    parser.add_argument("--generate", action="store_true", help="measure whole models as well")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--as-peer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    if options.as_peer:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)  # bitsandbytes warns in each pass
        print(json.dumps(measure(peer_ways(options.as_peer, options.layers), options.layers, options.rounds)))
        return
    load = [round(os.getloadavg()[0], 1)]
    ways = our_ways(options.layers)
    rows = measure(ways, options.layers, options.rounds)
    bf16 = rows[0]["decode_ms_per_layer"]
    slow = 1e3 * best_pass({"dequantize": without_kernel()}, 1, 2, 1)["dequantize"]
    rows.append({"way": "dequantize", "decode_ms_per_layer": round(slow, 3), "decode_over_bf16": round(bf16 / slow, 2)})
    down = ways["int4-g128 + super weight"][len(SHAPES) - 1]
    term = super_weight_seconds(down, 1, options.rounds)
    alone = best_pass({"down": [down]}, 1, options.rounds, 10)["down"]
    fast = next(each["decode_ms_per_layer"] for each in rows if each["way"] == "int4-g128")
    for peer, _, python in (each.partition("=") for each in options.peer):
        rows += ask_peer(peer, python, options)
    del ways, down
    models = generate(options.rounds) if options.generate else []
    load.append(round(os.getloadavg()[0], 1))
    result = {
        "machine": {
            "platform": platform.platform(), "cores": os.cpu_count(), "processor": processor(),
            "vnni": torch.cpu._is_vnni_supported(), "torch": torch.__version__,
            "threads": options.threads, "load_before_and_after": load,
        },
        "rounds": options.rounds, "decode_layers": options.layers, "prefill_tokens": PREFILL, "rows": rows,
        "prompt_tokens": PROMPT, "generated_tokens": NEW_TOKENS, "models": models,
        "super_weight": {
            "microseconds": round(1e6 * term, 2), "share_of_decoder_layer": round(1e3 * term / fast, 5),
            "share_of_down_projection": round(term / alone, 5),
        },
    }  # fmt: skip
    target = Path(__file__).parent / "results" / f"kernels-{processor()}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    report(result)


def report(result: dict[str, object]) -> None:
    print(f"{'way':<28} decode ms  / bf16  prefill ms  / bf16   error")
    for row in result["rows"]:
        if "does_not_run" in row:
            print(f"{row['way']:<28} does not run: {row['does_not_run']}")
            continue
        cells = [row.get(key, float("nan")) for key in ("prefill_ms_per_layer", "prefill_over_bf16", "error")]
        print(
            f"{row['way']:<28} {row['decode_ms_per_layer']:9.2f} {row['decode_over_bf16']:6.2f} "
            f"{cells[0]:11.1f} {cells[1]:7.2f} {cells[2]:7.4f}"
        )
    for row in result["models"]:
        print("whole model:", row)
    print("one super weight:", result["super_weight"], "load:", result["machine"]["load_before_and_after"])


if __name__ == "__main__":
    sys.exit(main())
