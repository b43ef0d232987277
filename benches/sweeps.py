"""What do shared passes save? Twelve conditions as rows of one batch against twelve separate passes, side by side in one run.

    python benches/sweeps.py --dir /path/with/3/GB [--shape 1b] [--rounds 3]

`memory` is a random Llama of 12 layers and hidden size 768, held in memory; `streamed` is the checkpoint of benches/find.py, of
which every pass reads all layers. Conditions are the original, eight scalings of one weight of layer 2, its removal with the
super activation restored, and two random weights removed. Every time is the best of the rounds; the ratio is what counts.
The saved file has the largest difference of the losses between both ways, which must be rounding.
"""

import argparse
import json
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from find import COL, LAYER, ROW, make_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import superweights as sw
from superweights.coordinates import Coordinate
from superweights.interventions.conditions import ORIGINAL, Condition, RestoreSuperActivation, ScaleWeights, removal
from superweights.interventions.rows import condition_states

SUPER = Coordinate(LAYER, None, ROW, COL)
FACTORS = (0.0, 0.2, 0.5, 0.8, 1.2, 1.5, 2.0, 3.0)


def conditions() -> list[Condition]:
    return [
        ORIGINAL,
        *(Condition(f"scale {factor}", (ScaleWeights((SUPER,), factor),)) for factor in FACTORS),
        Condition("restored", (ScaleWeights((SUPER,)), RestoreSuperActivation((SUPER,)))),
        removal([Coordinate(LAYER, None, 5, 7)], name="random"),
        removal([Coordinate(LAYER, None, 9, 11)], name="another"),
    ]


def shared(model: sw.LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    return condition_states(model, ids, conditions())


def separate(model: sw.LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    states = []
    for condition in conditions():
        with sw.applied(model, condition):
            states.append(model.states(ids))
    return torch.stack(states)


def one(model: sw.LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    return model.states(ids)[None]


def best(work: Callable[[], torch.Tensor], rounds: int) -> tuple[float, torch.Tensor]:
    seconds, states = [], torch.empty(0)
    for _ in range(rounds):
        start = time.perf_counter()
        states = work()
        seconds.append(time.perf_counter() - start)
    return min(seconds), states


def measure(model: sw.LoadedModel, tokens: int, rounds: int) -> dict[str, float]:
    ids = torch.arange(tokens)[None] * 131 % 997 + 1
    single, _ = best(lambda: one(model, ids), rounds)
    together, rows = best(lambda: shared(model, ids), rounds)
    apart, expected = best(lambda: separate(model, ids), rounds)
    return {
        "tokens": tokens,
        "one_pass_s": round(single, 3),
        "shared_s": round(together, 3),
        "separate_s": round(apart, 3),
        "separate_over_shared": round(apart / together, 2),
        "shared_over_one": round(together / single, 2),
        "largest_difference": ((rows - expected).abs().max() / expected.abs().max()).item(),
    }


def memory_model() -> sw.LoadedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, vocab_size=1000
    )
    return sw.load(LlamaForCausalLM(config).eval())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--shape", choices=("toy", "1b", "7b"), default="1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[9, 64], help="window lengths of the streamed model")
    args = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {}
    with memory_model() as model:
        results["memory"] = [measure(model, tokens, args.rounds) for tokens in (16, 64, 256)]
    directory = args.dir / f"sweeps-{args.shape}"
    make_checkpoint(directory, args.shape)
    try:
        with sw.load(directory, residency="streamed") as model:
            results[f"streamed {args.shape}"] = [measure(model, tokens, args.rounds) for tokens in args.tokens]
    finally:
        shutil.rmtree(directory)
    for name, rows in results.items():
        for row in rows:
            print(name, json.dumps(row))
    saved = {
        "conditions": len(conditions()),
        "threads": torch.get_num_threads(),
        "machine": platform.processor(),
        **results,
    }
    path = Path(__file__).parent / "results" / f"sweeps-{args.shape}.json"
    path.write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    main()
