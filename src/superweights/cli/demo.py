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
    model = to / "synthetic-llama"
    planted = save_planted_checkpoint(model)
    write_text(f"Synthetic model in {model}: random weights, one super weight planted at {planted}.\n\n$ find\n")
    records, peaks = to / "find.jsonl", to / "peaks.png"
    find(str(model), settings=FindSettings(out=str(records), plot=str(peaks)))
    curve, heat = to / "residual.png", to / "persistence.png"
    traced = TraceSettings(
        edit="scale=0", weights=str(records), out=str(to / "trace.jsonl"), plot=str(curve), plot_persistence=str(heat)
    )
    write_text("\n$ trace --edit scale=0\n")
    trace(str(model), settings=traced)
    write_text(f"\nPictures: {peaks}, {curve}, {heat}\nRecords: {records}, {to / 'trace.jsonl'}\n")
    return 0
