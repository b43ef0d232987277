"""How long work says how far it is: the library calls a `Progress`, the command line chooses which one.

Library code never draws. It takes a `Progress`, calls `start`, then `advance` once per step, and `finish` in a
`finally`.
"""

import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichBar


class Progress(Protocol):
    """Hears about one task at a time."""

    def start(self, task: str, *, total: int | None, unit: str) -> None:
        """Begins a task.

        Args:
            task: what is being done, such as "reading".
            total: steps to come; None when unknown.
            unit: what one step is, in the plural, such as "layers".
        """

    def advance(self, steps: int = 1, *, nbytes: int = 0) -> None:
        """Counts `steps` as done, and `nbytes` as read on the way."""

    def finish(self) -> None:
        """Ends the task, done or not; harmless when there is none."""


class SilentProgress:
    """Hears everything, shows nothing."""

    def start(self, task: str, *, total: int | None, unit: str) -> None:
        """Does nothing."""

    def advance(self, steps: int = 1, *, nbytes: int = 0) -> None:
        """Does nothing."""

    def finish(self) -> None:
        """Does nothing."""


NO_PROGRESS = SilentProgress()
"""The default everywhere."""


class RichProgress:
    """Draws a bar on stderr: task, steps, GB/s, elapsed and remaining time; silent when stderr is no terminal."""

    def __init__(self, console: "Console | None" = None) -> None:
        from rich.console import Console

        self._console = console or Console(stderr=True)
        self._bar: RichBar | None = None
        self._nbytes = 0
        self._started = 0.0

    def start(self, task: str, *, total: int | None, unit: str) -> None:
        """Draws the bar of a new task, in place of the one before."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichBar

        self.finish()
        # FORCE_COLOR makes rich take any file for a terminal, so the file itself is asked.
        if not self._console.file.isatty():
            return
        self._nbytes, self._started = 0, time.monotonic()
        self._bar = RichBar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}{task.fields[rate]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._bar.add_task(task, total=total, unit=unit, rate="")
        self._bar.start()

    def advance(self, steps: int = 1, *, nbytes: int = 0) -> None:
        """Moves the bar."""
        if self._bar is None:
            return
        self._nbytes += nbytes
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = f"  {self._nbytes / seconds / 1e9:.2f} GB/s" if self._nbytes else ""
        self._bar.update(self._bar.task_ids[0], advance=steps, rate=rate)

    def finish(self) -> None:
        """Stops drawing and leaves the last state on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
