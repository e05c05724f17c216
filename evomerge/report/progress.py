"""The progress bar of one long step.  It needs Rich alone; other reports import libraries that take long to load."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(soft_wrap=True, highlight=False)
LINE_SECONDS = 5.0  # between two lines where there is no terminal


def seconds_text(seconds: float) -> str:
    """A duration as text: 45s, 12m, 3h 20m."""
    if seconds < 90:
        return f"{seconds:.0f}s"
    if seconds < 5400:
        return f"{seconds / 60:.0f}m"
    return f"{seconds // 3600:.0f}h {seconds % 3600 // 60:.0f}m"


class Bar:
    """Shows one long step: a Rich bar with rate and time left, or without a terminal a line every few seconds.

    total: of the step, in units; in bytes if the unit is `MB`.
    unit: what is counted.
    """

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.scale = 1e6 if unit == "MB" else 1.0
        self.started = self.last_line = time.monotonic()
        self.progress: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn(title), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self.progress = Progress(*columns, console=console, transient=True)
            self.task = self.progress.add_task("", total=total)
            self.progress.start()

    def update(self, done: int) -> None:
        """Show how much is done, in units; in bytes if the unit is `MB`."""
        now = time.monotonic()
        rate = done / max(now - self.started, 1e-9)
        if self.progress is not None:
            text = f"{done / self.scale:.0f}/{self.total / self.scale:.0f} {self.unit}, {rate / self.scale:.1f}/s"
            self.progress.update(self.task, completed=done, description=text)
        elif now - self.last_line >= LINE_SECONDS:
            self.last_line = now
            left = seconds_text((self.total - done) / max(rate, 1e-9))
            counted = f"{done / self.scale:.0f} of {self.total / self.scale:.0f} {self.unit}"
            print(f"{self.title}: {counted}, {rate / self.scale:.1f}/s, {left} left", flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self.progress is not None:
            self.progress.stop()


class Steps:
    """Shows the batches of one step; the bar appears with the first batch.  unit: what is counted, as in `Bar`."""

    def __init__(self, title: str, unit: str = "batches") -> None:
        self.title, self.unit = title, unit
        self.bar: Bar | None = None

    def step(self, done: int, total: int) -> None:
        """Show how many batches are done."""
        self.bar = self.bar or Bar(self.title, total, self.unit)
        self.bar.update(done)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
