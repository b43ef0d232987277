"""Measures how far detection can be trusted, and prints the tables of docs/detection.md.

    python studies/calibration.py [--seeds N] [--families a,b] [--out FILE.json]

Tiny models of every family that can be planted, with several seeds, layers and sizes of the planted super weight; the same
models with nothing planted; every threshold at half and at double its value; trained models where `../shared/models` is
there. Nothing is downloaded. Some minutes on one core.
"""

import argparse
import json
import platform
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers.utils import logging

import superweights
from superweights.detection.candidates import DetectionSettings
from superweights.detection.search import Findings, find
from superweights.errors import ModelError, UsageError
from superweights.model.architecture import read_architecture
from superweights.model.loading import load
from superweights.progress import RichProgress
from superweights.testing import PROMISED_FAMILIES, causal_lm_families, plant_super_weight, tiny_model, tiny_tokenizer

LAYERS = (1, 2)
RATIO = 200.0
RATIOS = (20.0, 40.0, 60.0, 100.0, 200.0, 1000.0)
"""Sizes of a planted super activation, in medians of the stream."""
NEAR_RATIO = 60.0
"""A planted size just above the default bar: here a threshold shows its effect first."""
THRESHOLDS = tuple(each.name for each in fields(DetectionSettings) if each.name != "rounds")
FACTORS = (0.5, 2.0)
TRAINED = Path(__file__).parents[2] / "shared" / "models"

Verdict = Literal["exact", "missed", "extra", "not planted"]


@dataclass(frozen=True)
class Case:
    """One tiny model; `layer` None where nothing is planted."""

    family: str
    seed: int
    layer: int | None = None
    routed: bool = True
    ratio: float = RATIO


@dataclass(frozen=True)
class Outcome:
    """What a search said about one case."""

    case: Case
    verdict: Verdict
    """"exact": the planted weight and no other; "extra": others as well, or any where nothing is planted."""
    found: tuple[str, ...]
    share: float | None = None
    persistence: float | None = None
    largest_ratio: float | None = None
    """Largest |stream| over its median, the model's last layer left out; of models with nothing planted."""
    note: str = ""


def main() -> None:
    """Runs all parts, prints the tables, writes the outcomes where asked."""
    arguments = _arguments()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    started = time.monotonic()
    families = arguments.families.split(",") if arguments.families else runnable_families()
    near = [each for each in families if each in PROMISED_FAMILIES] or families
    seeds = range(arguments.seeds)
    plain = run([Case(family, seed) for family in families for seed in seeds], "nothing planted")
    planted = run(list(planted_cases(families, seeds)), "planted")
    sizes = run(
        [Case(family, seed, 1, ratio=ratio) for ratio in RATIOS for family in near for seed in seeds], "planted sizes"
    )
    sensitivity = measure_sensitivity(near, seeds)
    trained = {path.name: trained_candidates(path) for path in trained_models()}
    report = {
        "versions": versions(),
        "seconds": round(time.monotonic() - started),
        "settings": asdict(DetectionSettings()),
        "plain": [asdict(each) for each in plain],
        "planted": [asdict(each) for each in planted],
        "sizes": [asdict(each) for each in sizes],
        "sensitivity": sensitivity,
        "trained": trained,
    }
    print(f"{json.dumps(report['versions'])}, {report['seconds']} s\n")
    print(recall_table(plain, planted), size_table(sizes), sensitivity_table(sensitivity), sep="\n")
    print(trained_table(trained))
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="models per family (default: 3)")
    parser.add_argument("--families", default="", help="comma-separated model types; default: all that run")
    parser.add_argument("--out", type=Path, help="also write every outcome to this JSON file")
    return parser.parse_args()


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    return {
        "superweights": superweights.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def runnable_families() -> list[str]:
    """The families that the structural rules carry and whose stream can be read."""
    return [family for family in causal_lm_families() if _runs(family)]


def _runs(family: str) -> bool:
    try:
        with load(tiny_model(family), tokenizer=tiny_tokenizer()) as model:
            find(model, settings=DetectionSettings(rounds=1))
    except (ModelError, AttributeError):  # AttributeError: transformers' own class does not build
        return False
    return True


def planted_cases(families: Iterable[str], seeds: Iterable[int]) -> Iterator[Case]:
    """Both layers, and both kinds of projection where a layer has routed experts beside a plain one."""
    for family in families:
        architecture = read_architecture(tiny_model(family))
        for layer in LAYERS:
            kinds = {each.experts is not None for each in architecture.in_layer(layer)}
            yield from (Case(family, seed, layer, routed) for routed in kinds for seed in seeds)


def run(cases: Sequence[Case], task: str) -> list[Outcome]:
    """Searches one model a case with the default settings."""
    return [outcomes[0] for outcomes in run_each(cases, task, [DetectionSettings()])]


def run_each(cases: Sequence[Case], task: str, settings: Sequence[DetectionSettings]) -> list[list[Outcome]]:
    """Searches one model a case, once for each of the settings."""
    progress = RichProgress()
    progress.start(task, total=len(cases), unit="models")
    outcomes = []
    try:
        for case in cases:
            outcomes.append(judge(case, settings))
            progress.advance()
    finally:
        progress.finish()
    return outcomes


def judge(case: Case, settings: Sequence[DetectionSettings]) -> list[Outcome]:
    """Builds the model of a case, plants, searches with each of the settings and compares."""
    model, tokenizer = tiny_model(case.family, seed=case.seed), tiny_tokenizer()
    expected = []
    if case.layer is not None:
        try:
            planted = plant_super_weight(
                model, layer=case.layer, tokenizer=tokenizer, routed=case.routed, ratio=case.ratio, seed=case.seed
            )
        except UsageError as error:
            return [Outcome(case, "not planted", (), note=str(error))] * len(settings)
        expected = [str(planted)]
    with load(model, tokenizer=tokenizer) as loaded:
        return [compare(case, find(loaded, settings=each), expected) for each in settings]


def compare(case: Case, findings: Findings, expected: list[str]) -> Outcome:
    """Sets what was found against what was planted."""
    found = tuple(str(each.coordinate) for each in findings.candidates)
    verdict: Verdict = "missed" if set(expected) - set(found) else "extra" if set(found) - set(expected) else "exact"
    own = [each for each in findings.candidates if str(each.coordinate) in expected]
    return Outcome(
        case,
        verdict,
        found,
        share=own[0].share if own else None,
        persistence=own[0].persistence if own else None,
        largest_ratio=None if expected else _largest_ratio(findings),
        note=findings.reason if verdict == "missed" else "",
    )


def _largest_ratio(findings: Findings) -> float:
    trace = findings.traces[0]
    return (trace.stream[:-1].abs().flatten(1).amax(dim=1) / trace.medians[:-1]).max().item()


def measure_sensitivity(families: Sequence[str], seeds: Iterable[int]) -> list[dict[str, Any]]:
    """Recall and false positives with each threshold at half and double its value, one moved at a time."""
    moves = [("", 1.0), *((name, factor) for name in THRESHOLDS for factor in FACTORS)]
    settings = [moved(name, factor) for name, factor in moves]
    pairs = [(family, seed) for family in families for seed in seeds]
    random = run_each([Case(*pair) for pair in pairs], "thresholds, nothing planted", settings)
    planted = {
        ratio: run_each([Case(*pair, 1, ratio=ratio) for pair in pairs], f"thresholds, planted at {ratio:g}", settings)
        for ratio in (NEAR_RATIO, RATIO)
    }
    return [
        {
            "threshold": name or "none moved",
            "value": getattr(settings[place], name) if name else None,
            "planted": {
                str(ratio): dict(Counter(each[place].verdict for each in outcomes))
                for ratio, outcomes in planted.items()
            },
            "random_with_candidates": sum(each[place].verdict == "extra" for each in random),
            "random": len(random),
            "trained": {
                path.name: [each["coordinate"] for each in trained_candidates(path, settings[place])]
                for path in trained_models()
            },
        }
        for place, (name, _) in enumerate(moves)
    ]


def trained_models() -> list[Path]:
    """The trained models that are here; none in a checkout alone."""
    return sorted(path.parent for path in TRAINED.glob("*/config.json"))


def moved(name: str, factor: float) -> DetectionSettings:
    """The default settings with one threshold multiplied; shares stop at 1."""
    settings = DetectionSettings()
    if not name:
        return settings
    value = getattr(settings, name) * factor
    return replace(settings, **{name: value if name.endswith("ratio") else min(value, 1.0)})


def trained_candidates(path: Path, settings: DetectionSettings | None = None) -> list[dict[str, Any]]:
    """What a trained model holds."""
    with load(path) as model:
        findings = find(model, settings=settings)
    return [{**asdict(each), "coordinate": str(each.coordinate)} for each in findings.candidates]


def recall_table(plain: Sequence[Outcome], planted: Sequence[Outcome]) -> str:
    """Planted and unplanted models in figures."""
    tried = [each for each in planted if each.verdict != "not planted"]
    verdicts = Counter(each.verdict for each in tried)
    unplantable = sorted({each.case.family for each in planted} - {each.case.family for each in tried})
    routed = sum("/" in text for each in tried for text in each.found)
    shares = [each.share for each in tried if each.share is not None]
    persistences = [each.persistence for each in tried if each.persistence is not None]
    ratios = [each.largest_ratio for each in plain if each.largest_ratio is not None]
    rows = [
        ("random models with nothing planted", f"{len(plain)} of {len({each.case.family for each in plain})} families"),
        ("... with a candidate (false positives)", str(sum(each.verdict == "extra" for each in plain))),
        (
            "... largest stream value, in medians: median over models, largest",
            f"{statistics.median(ratios):.3g}, {max(ratios):.3g}",
        ),
        ("planted models", f"{len(tried)} of {len({each.case.family for each in tried})} families ({routed} routed)"),
        ("... found exactly", f"{verdicts['exact']} ({verdicts['exact'] / max(len(tried), 1):.1%})"),
        ("... missed", str(verdicts["missed"])),
        ("... found with a false positive beside", str(verdicts["extra"])),
        ("... smallest share, smallest persistence", f"{min(shares):.2f}, {min(persistences):.2f}"),
        ("families that run and cannot be planted", f"{len(unplantable)}: {', '.join(unplantable)}"),
    ]
    faults = [
        f"- {each.verdict}: {each.case}: found {list(each.found)}. {each.note}"
        for each in [*plain, *tried]
        if each.verdict in ("missed", "extra")
    ]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {text} |" for name, text in rows), *faults, ""])


def size_table(sizes: Sequence[Outcome]) -> str:
    """Where detection begins."""
    lines = [
        "| planted size (medians) | planted | found exactly | missed | false positive beside |",
        "| --- " * 5 + "|",
    ]
    for ratio in RATIOS:
        counts = Counter(each.verdict for each in sizes if each.case.ratio == ratio)
        tried = sum(counts.values()) - counts["not planted"]
        lines.append(f"| {ratio:g} | {tried} | {counts['exact']} | {counts['missed']} | {counts['extra']} |")
    return "\n".join([*lines, ""])


def sensitivity_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a threshold and value."""
    names = list(rows[0]["trained"])
    head = [
        "threshold",
        "value",
        f"recall at {NEAR_RATIO:g}",
        f"recall at {RATIO:g}",
        "extra",
        "random with candidates",
    ]
    lines = ["| " + " | ".join([*head, *names]) + " |", "| --- " * (len(head) + len(names)) + "|"]
    for row in rows:
        counts = [row["planted"][str(ratio)] for ratio in (NEAR_RATIO, RATIO)]
        recalls = [
            f"{(each.get('exact', 0) + each.get('extra', 0)) / max(sum(each.values()) - each.get('not planted', 0), 1):.0%}"
            for each in counts
        ]
        value = "" if row["value"] is None else f"{row['value']:g}"
        cells = [row["threshold"], value, *recalls, str(sum(each.get("extra", 0) for each in counts))]
        cells += [f"{row['random_with_candidates']} of {row['random']}"]
        cells += [" ".join(row["trained"][name]) or "none" for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def trained_table(trained: dict[str, list[dict[str, Any]]]) -> str:
    """The candidates of the trained models."""
    lines = ["| model | candidate | W | input | share | super activation | persistence | round |", "| --- " * 8 + "|"]
    for name, candidates in trained.items():
        lines += [
            f"| {name} | {each['coordinate']} | {each['value']:.3g} | {each['input']:.3g} | {each['share']:.2f} | "
            f"{each['super_activation']:.4g} = {abs(each['super_activation']) / each['median']:.3g} medians | "
            f"{each['persistence']:.2f} | {each['round']} |"
            for each in candidates
        ] or [f"| {name} | none | | | | | | |"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
