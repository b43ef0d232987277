"""The verb `demo`: the main job on a small model that is made on the spot."""

from dataclasses import dataclass
from pathlib import Path

from cyclopts import Parameter

from superweights.cli.find import FindSettings, find
from superweights.cli.output import write_text
from superweights.cli.trace import TraceSettings, trace
from superweights.testing import save_planted_checkpoint


@Parameter(name="*", negative=())
@dataclass(frozen=True, slots=True)
class DemoSettings:
    """Where `demo` writes."""

    to: Path = Path("superweights-demo")
    """Folder for the model, the pictures and the records."""


_DEFAULT_SETTINGS = DemoSettings()


def demo(*, settings: DemoSettings = _DEFAULT_SETTINGS) -> int:
    """Finds and traces a super weight in a synthetic model, and draws what it sees.

    The model is a tiny Llama with random weights in which one super weight was planted: it shows the tool, not a fact about
    trained models.
    """
    to = settings.to
    model, found, traced = to / "synthetic-llama", to / "find.jsonl", to / "trace.jsonl"
    peaks, residual, persistence = to / "peaks.png", to / "residual.png", to / "persistence.png"
    planted = save_planted_checkpoint(model)
    write_text(f"Synthetic model in {model}: random weights, one super weight planted at {planted}.\n")
    write_text(f"\n$ superweights find {model} --out {found} --plot {peaks}\n")
    find(str(model), settings=FindSettings(out=str(found), plot=str(peaks)))
    write_text(
        f"\n$ superweights trace {model} --edit scale=0 --weights {found} --out {traced} --plot {residual} "
        f"--plot-persistence {persistence}\n"
    )
    edited = TraceSettings(
        edit="scale=0",
        weights=str(found),
        out=str(traced),
        plot=str(residual),
        plot_persistence=str(persistence),
    )
    trace(str(model), settings=edited)
    write_text(f"\nPictures: {peaks}, {residual}, {persistence}\nRecords: {found}, {traced}\n")
    return 0
