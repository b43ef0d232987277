"""What every verb that runs zero-shot tasks asks, how it runs them, and the table that it shows."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from superweights.cli.output import write_table, write_text
from superweights.interventions.conditions import Condition
from superweights.model.loading import LoadedModel
from superweights.progress import RichProgress
from superweights.results.records import MeasurementRecord


@Parameter(name="*", negative=())
@dataclass(frozen=True, slots=True)
class TaskOptions:
    """Which tasks run."""

    tasks: Annotated[str | None, Parameter(metavar="NAMES")] = None
    """Zero-shot tasks as well, separated by commas, or all for the paper's seven: arc_challenge, arc_easy, hellaswag,
    lambada_openai, piqa, sciq, winogrande. Needs `pip install superweights[eval]`."""
    tasks_data: Path | None = None
    """Folder with the tasks as NAME.jsonl files, to run without a network."""
    limit: int | None = None
    """At most so many items of each task, the first ones."""

    def described(self) -> dict[str, Any]:
        """The options as the settings of a run."""
        return {**asdict(self), "tasks_data": str(self.tasks_data or "")}


DEFAULT_TASK_OPTIONS = TaskOptions()
"""No tasks."""


def task_records(
    loaded: LoadedModel, options: TaskOptions, conditions: Iterable[Condition], progress: RichProgress
) -> Iterator[MeasurementRecord]:
    """The tasks under every condition; nothing where none is asked for."""
    if not options.tasks:
        return
    from superweights.integrations.lm_eval import TASKS, run_tasks

    names = TASKS if options.tasks == "all" else options.tasks.split(",")
    for condition in conditions:
        yield from run_tasks(
            loaded, names, data=options.tasks_data, limit=options.limit, condition=condition, progress=progress
        )


def write_tasks(scores: Sequence[MeasurementRecord]) -> None:
    """Writes a table of tasks, a row for each condition; nothing where no task ran."""
    if not scores:
        return
    names = dict.fromkeys(each.condition for each in scores)
    write_text("\n")
    rows = [_row(name, [each for each in scores if each.condition == name]) for name in names]
    write_table(rows, title="Zero-shot tasks: acc, with its standard error.")


def _row(condition: str, measured: Sequence[MeasurementRecord]) -> dict[str, object]:
    """The headline score of each task, and their mean."""
    from superweights.integrations.lm_eval import headline

    scores = [each for each in measured if each.name == headline(each.subject)]
    cells = {each.subject: f"{each.value:.4f} ± {each.standard_error or 0:.4f}" for each in scores}
    return {"condition": condition, **cells, "mean": round(sum(each.value for each in scores) / len(scores), 4)}
