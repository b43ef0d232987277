"""Measures a trained reference model and writes its card: `python describe.py DIR --corpus CORPUS`.

DIR is what `train.py --to` made. Perplexity on the test books, the candidates of `find` and the verdicts of `verify` go into
DIR/records.jsonl and, in words, into DIR/model/README.md.
"""

import argparse
import json
import platform
from dataclasses import asdict
from pathlib import Path

from superweights import find, load
from superweights.detection.candidates import DetectionSettings
from superweights.detection.recording import record_findings
from superweights.experiments.evaluation import evaluate
from superweights.experiments.verify import VerifySettings, verify
from superweights.interventions.conditions import ORIGINAL, removal
from superweights.measurements.intervals import perplexity
from superweights.measurements.texts import read_text
from superweights.measurements.windows import make_windows
from superweights.progress import RichProgress
from superweights.results.provenance import describe_run
from superweights.results.records import NoteRecord, Record
from superweights.results.store import write_records

WINDOWS = 96


def describe(directory: Path, corpus: Path, data: str, massive_ratio: float = 50.0) -> None:
    """Measures `directory/model`; writes records and card."""
    recipe = json.loads((directory / "recipe.json").read_text())
    log = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    settings = VerifySettings(null=50)
    run = describe_run(
        command=["python", "describe.py", directory.name],
        model=directory.name,
        storage_dtype="BF16",
        compute_dtype="float32",
        residency="resident",
        device="cpu",
        seed=settings.seed,
        settings={"recipe": recipe, "windows": WINDOWS, **asdict(settings)},
    )
    with load(directory / "model", compute="float32") as model:
        parameters = sum(each.numel for each in model.checkpoint.tensors.values()) if model.checkpoint else 0
        windows = make_windows(
            read_text(str(corpus / "gutenberg-test.txt")),
            model.tokenizer,
            length=recipe["sequence"],
            limit=WINDOWS,
            bos=True,
            vocabulary=recipe["vocabulary"],
        )
        findings = find(model, settings=DetectionSettings(massive_ratio=massive_ratio))
        records: list[Record] = list(record_findings(findings))
        weights = [each.coordinate for each in findings.candidates]
        lines = [
            f"With a bar of {massive_ratio:g} medians (`find --massive-ratio {massive_ratio:g}`; the default is 50):"
        ]
        removals = [removal([each], name=f"without {each}") for each in weights]
        removals += [removal(weights, name="without all of them")] if len(weights) > 1 else []
        measured = evaluate(model, windows, [ORIGINAL, *removals], progress=RichProgress())
        records += measured.records()
        for each in removals:
            ratio = measured.ratio(each)
            lines.append(f"- {each.name}: perplexity x{ratio.value:.4f} ({ratio.low:.4f} to {ratio.high:.4f})")
        if weights:
            found = verify(model, weights, windows, settings=settings, progress=RichProgress())
            records += found.verdicts
            lines += [f"- {', '.join(each.weights)}: **{each.label}**: {each.reason}." for each in found.verdicts]
            lines += found.notes
        lines.append(findings.reason)
        losses = measured.nll(ORIGINAL)
    interval = perplexity(losses)
    records.append(NoteRecord(level="info", text=f"trained {log[-1]['tokens']} tokens in {log[-1]['seconds']:.0f} s"))
    write_records(directory / "records.jsonl", run, records)
    card = _CARD.format(
        name=directory.name,
        parameters=parameters,
        tokens=log[-1]["tokens"],
        steps=log[-1]["step"],
        seconds=log[-1]["seconds"],
        machine=f"{platform.machine()}, {platform.system()}",
        validation=log[-1]["nll_nats"],
        perplexity=interval.value,
        low=interval.low,
        high=interval.high,
        count=interval.count,
        data=data,
        recipe="\n".join(f"{name} = {value}" for name, value in recipe.items()),
        found="\n\n".join(lines),
        **{each: recipe[each] for each in ("hidden", "layers", "intermediate", "heads", "vocabulary", "sequence")},
    )
    (directory / "model" / "README.md").write_text(card)


_CARD = """---
language: en
license: apache-2.0
library_name: transformers
tags: [super-weights, reference-model]
---
# {name}

A Llama of {parameters:,} parameters (hidden {hidden}, {layers} layers, intermediate {intermediate}, {heads} heads, vocabulary
{vocabulary}, sequences of {sequence} tokens that start with `<s>`), made to study super weights. Nothing in it was planted
and nothing was tuned after training.

| | |
| --- | --- |
| data | {data} |
| training | {steps:,} steps, {tokens:,} tokens, {seconds:,.0f} s ({machine}) |
| loss on validation books | {validation:.3f} nats per token |
| perplexity on test books | {perplexity:.4g} ({low:.4g} to {high:.4g}, {count} windows of {sequence} tokens) |

## What was found in it

{found}

## Recipe

```toml
{recipe}
```
"""


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--data", default="118 MB of public-domain books (Project Gutenberg), split by book")
    parser.add_argument("--massive-ratio", type=float, default=50.0, help="the bar of find, in medians")
    args = parser.parse_args()
    describe(args.directory, args.corpus, args.data, args.massive_ratio)


if __name__ == "__main__":
    main()
