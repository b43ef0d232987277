"""Trains one reference model; started again, it goes on where it stopped.

    python train.py tiny --corpus CORPUS --to DIR

CORPUS holds gutenberg-train.txt.xz (or .txt), gutenberg-val.txt and gutenberg-test.txt. DIR gets `log.jsonl`, one record for
every probed step, and at the end `model`: weights in bfloat16, config and tokenizer.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import encode, prepare, sequences, validation_ids
from probe import probe
from recipe import Recipe, read_recipe
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from superweights.progress import RichProgress

PROBE_TOKENS = 3072


def build(recipe: Recipe) -> Any:
    """The model at step 0."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=recipe.sequence,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def make_optimiser(model: Any, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; norm gains are not decayed."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, recipe.beta2))


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a linear fall to a tenth at the last step."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    left = 1 - (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * (0.1 + 0.9 * left)


def batch_at(ids: np.ndarray, recipe: Recipe, step: int) -> torch.Tensor:
    """The sequences of one step, known from its number alone [batch, sequence]; every epoch has an order of its own."""
    body = recipe.sequence - 1
    per_epoch = len(ids) // body // recipe.batch
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng((recipe.seed, epoch)).permutation(per_epoch * recipe.batch)
    chosen = order[place * recipe.batch : (place + 1) * recipe.batch]
    rows = np.stack([ids[each * body : (each + 1) * body] for each in chosen]).astype(np.int64)
    return torch.from_numpy(np.pad(rows, ((0, 0), (1, 0))))  # `<s>` is id 0


def is_probed(step: int, steps: int) -> bool:
    """Step 0, the powers of two, and every 5 %."""
    return step & (step - 1) == 0 or step == steps or step % max(1, steps // 20) == 0


def train(recipe: Recipe, corpus: Path, to: Path, cache: Path, start: Path | None, text: Path | None) -> None:
    """Trains, or goes on; leaves log and model in `to`. `start` is a model to fine-tune, `text` replaces the corpus."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if start is None:
        tokenizer, ids = prepare(next(corpus.glob("gutenberg-train.txt*")), recipe.vocabulary, cache)
        model = build(recipe).to(device)
    else:
        tokenizer = AutoTokenizer.from_pretrained(start)
        model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).to(device)
    if text is not None:
        ids = encode(text, tokenizer)
    held_out = validation_ids(corpus / "gutenberg-val.txt", tokenizer, cache)
    windows = torch.from_numpy(sequences(held_out[:PROBE_TOKENS], recipe.sequence)).to(device)
    optimiser = make_optimiser(model, recipe)
    to.mkdir(parents=True, exist_ok=True)
    first = _resume(to / "state.pt", recipe, model, optimiser)
    began = time.perf_counter()
    progress = RichProgress()
    progress.start("training", total=recipe.steps, unit="steps")
    progress.advance(first)
    for step in range(first, recipe.steps + 1):
        if step == 0 or (step != first and is_probed(step, recipe.steps)):
            record = {
                "step": step,
                "tokens": step * recipe.batch * recipe.sequence,
                "seconds": time.perf_counter() - began,
            }
            with (to / "log.jsonl").open("a") as log:
                log.write(json.dumps(record | probe(model, windows)) + "\n")
            _keep(to / "state.pt", step, recipe, model, optimiser)
            model.train()
        if step == recipe.steps:
            break
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(recipe, step)
        tokens = batch_at(ids, recipe, step).to(device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        progress.advance()
    progress.finish()
    model.to(torch.bfloat16).save_pretrained(to / "model")
    tokenizer.save_pretrained(to / "model")
    (to / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe), indent=1) + "\n")


def _keep(path: Path, step: int, recipe: Recipe, model: Any, optimiser: torch.optim.AdamW) -> None:
    state = {"step": step, "recipe": dataclasses.asdict(recipe)}
    state |= {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
    beside = path.with_suffix(".new")
    torch.save(state, beside)
    beside.replace(path)


def _resume(path: Path, recipe: Recipe, model: Any, optimiser: torch.optim.AdamW) -> int:
    """The step to go on from; 0 where there is no state."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state["recipe"] != dataclasses.asdict(recipe):
        raise SystemExit(f"{path} is of another recipe: {state['recipe']}. Give another --to, or remove it.")
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    step: int = state["step"]
    return step


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="name of a file in recipes/, without .toml")
    parser.add_argument("--corpus", type=Path, required=True, help="folder with the text")
    parser.add_argument("--to", type=Path, required=True, help="folder for the log, the state and the model")
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="folder for tokenizers and encoded text")
    parser.add_argument("--start", type=Path, help="fine-tune this model")
    parser.add_argument(
        "--text", type=Path, help="train on this text, or this JSON array of texts, in place of the corpus"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of the recipe"
    )
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    changes = {name: json.loads(value) for name, value in (each.split("=") for each in args.set)}
    train(read_recipe(args.recipe, **changes), args.corpus, args.to, args.cache, args.start, args.text)


if __name__ == "__main__":
    main()
