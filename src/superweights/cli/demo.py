"""The verb `demo`: the main job on the small trained model that comes with the package, and on a synthetic one."""

import shutil
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from cyclopts import Parameter

from superweights.cli.find import FindSettings, find
from superweights.cli.output import write_text
from superweights.cli.trace import TraceSettings, trace
from superweights.cli.verify import VerdictSettings, verify
from superweights.detection.candidates import DetectionSettings
from superweights.testing import save_planted_checkpoint

EMBEDDED = "tiny-books"
"""The trained model in the package's data."""


@Parameter(name="*", negative=())
@dataclass(frozen=True, slots=True)
class DemoSettings:
    """Where `demo` writes."""

    to: Path = Path("superweights-demo")
    """Folder for the models, the pictures and the records."""


_DEFAULT_SETTINGS = DemoSettings()


def demo(*, settings: DemoSettings = _DEFAULT_SETTINGS) -> int:
    """Finds, traces and verifies super weights in two small models, and draws what it sees.

    The first was trained on books and comes with the package: what is there is real, and the verdicts say how much the
    model needs it. The second is made on the spot, a tiny Llama with random weights in which one super weight was planted: it
    shows the tool, not a fact about trained models.
    """
    trained, synthetic = settings.to / EMBEDDED, settings.to / "synthetic-llama"
    with as_file(files("superweights").joinpath("data", EMBEDDED)) as embedded:
        shutil.copytree(embedded, trained, dirs_exist_ok=True)
    write_text(
        f"A small Llama, trained on books, in {trained}; its README.md is the model card. Its largest stream value stays just "
        "below the default bar of 50 medians, so the bar is lowered here to look at it.\n"
    )
    pictures, records = _look(trained, settings.to, massive_ratio=40)
    verdicts, drawn = settings.to / f"{EMBEDDED}-verdicts.jsonl", settings.to / f"{EMBEDDED}-verdicts.png"
    found = settings.to / f"{EMBEDDED}-find.jsonl"
    write_text(f"\n$ superweights verify {trained} --weights {found} --out {verdicts} --plot {drawn}\n")
    verify(str(trained), settings=VerdictSettings(weights=str(found), out=str(verdicts), plot=str(drawn)))
    pictures += [drawn] if drawn.exists() else []  # nothing found is nothing to draw
    planted = save_planted_checkpoint(synthetic)
    write_text(f"\nSynthetic model in {synthetic}: random weights, one super weight planted at {planted}.\n")
    more_pictures, more_records = _look(synthetic, settings.to)
    write_text(
        f"\nPictures: {', '.join(map(str, [*pictures, *more_pictures]))}\n"
        f"Records: {', '.join(map(str, [*records, verdicts, *more_records]))}\n"
    )
    return 0


def _look(model: Path, to: Path, *, massive_ratio: float | None = None) -> tuple[list[Path], list[Path]]:
    """Finds and traces; gives the pictures and the records."""
    name = model.name
    found, traced = to / f"{name}-find.jsonl", to / f"{name}-trace.jsonl"
    peaks, residual, persistence = (to / f"{name}-{part}.png" for part in ("peaks", "residual", "persistence"))
    bar = "" if massive_ratio is None else f" --massive-ratio {massive_ratio:g}"
    write_text(f"\n$ superweights find {model}{bar} --out {found} --plot {peaks}\n")
    detection = DetectionSettings() if massive_ratio is None else DetectionSettings(massive_ratio=massive_ratio)
    find(str(model), settings=FindSettings(out=str(found), plot=str(peaks)), detection=detection)
    write_text(
        f"\n$ superweights trace {model} --edit scale=0 --weights {found} --out {traced} --plot {residual} "
        f"--plot-persistence {persistence}\n"
    )
    edited = TraceSettings(
        edit=("scale=0",),
        weights=str(found),
        out=str(traced),
        plot=str(residual),
        plot_persistence=str(persistence),
    )
    trace(str(model), settings=edited)
    return [peaks, residual, persistence], [found, traced]
