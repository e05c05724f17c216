"""The progress bar of one long step.  It needs Rich alone; other reports import libraries that take long to load."""

import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment

from evomerge.printable import printable, say

FIRST_SECONDS, LINE_SECONDS = 5.0, 30.0  # before the first line where there is no terminal; between two of them


class Screen(Console):
    """A terminal, or a file, that shows texts of others as they are: no markup, nothing that acts on a terminal."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**({"highlight": False, "markup": False, "emoji": False} | options))

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """The pieces of what is shown, with every character that acts on a terminal written as Python writes it."""
        for piece in super().render(renderable, options):
            yield piece if piece.control else Segment(printable(piece.text), piece.style)


console = Screen(soft_wrap=not sys.stdout.isatty())  # lines of a file are not broken


def seconds_text(seconds: float) -> str:
    """A duration as text: 45s, 12m, 3h 20m."""
    if seconds < 90:
        return f"{seconds:.0f}s"
    if seconds < 5400:
        return f"{seconds / 60:.0f}m"
    return f"{seconds // 3600:.0f}h {seconds % 3600 // 60:.0f}m"


class Lines:
    """When to print a line about one count where there is no terminal.

    The first comes after FIRST_SECONDS, so that short steps print none; then at most one every LINE_SECONDS, so that a
    night's file stays short; and the last one if there were others.
    """

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.printed: float | None = None

    def due(self, last: bool) -> bool:
        """Whether to print a line now.  last: whether all is done."""
        now = time.monotonic()
        first, before = self.printed is None, self.printed or self.began
        due = now - before >= (FIRST_SECONDS if first else LINE_SECONDS) or (last and not first)
        self.printed = now if due else self.printed
        return due


class Stages:
    """Says what happens before a search has its live view: a line for each stage, in a terminal with its seconds.

    show: False says nothing.
    """

    def __init__(self, show: bool = True) -> None:
        self.show = show
        self.status: Progress | None = None
        self.steps: Steps | None = None

    def __enter__(self) -> "Stages":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def stage(self, text: str) -> None:
        """A new stage begins."""
        if not self.show:
            return
        self.close()
        if not console.is_terminal:
            say(f"{text} ...")
            return
        columns = (TextColumn("{task.description} ...", markup=False), TimeElapsedColumn())
        self.status = Progress(*columns, console=console, transient=True, refresh_per_second=2)
        self.status.add_task(text, total=None)
        self.status.start()

    def log(self, text: str) -> None:
        """A note stays; any other line is a stage."""
        if text.startswith("note:"):
            self.close()
            if self.show:
                say(text)
        else:
            self.stage(text)

    def download(self, done: int, total: int) -> None:
        """Show how many bytes of a download have come."""
        if self.show:
            if self.steps is None:
                self.close()  # a terminal shows one thing that moves
                self.steps = Steps("downloading", "MB")
            self.steps.step(done, total)

    def close(self) -> None:
        """The stage has ended."""
        if self.status is not None:
            self.status.stop()
            self.status = None
        if self.steps is not None:
            self.steps.close()
            self.steps = None


class Bar:
    """Shows one long step: a Rich bar with rate and time left, or without a terminal lines (`Lines`).

    total: of the step, in units; in bytes if the unit is `MB`.  It grows if more is done.
    unit: what is counted.
    done: how much was done when the bar appeared; it does not count in the rate.
    """

    def __init__(self, title: str, total: int, unit: str, done: int = 0) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.first = done
        self.scale = 1e6 if unit == "MB" else 1.0
        self.started = time.monotonic()
        self.lines = Lines()
        self.progress: Progress | None = None
        if console.is_terminal:
            description = TextColumn("{task.description}", markup=False)
            columns = (
                TextColumn("{task.fields[title]}", markup=False),
                BarColumn(),
                description,
                TimeRemainingColumn(),
            )
            self.progress = Progress(*columns, console=console, transient=True)
            self.task = self.progress.add_task("", total=total, title=title)
            self.progress.start()

    def update(self, done: int) -> None:
        """Show how much is done, in units; in bytes if the unit is `MB`."""
        now = time.monotonic()
        self.total = max(self.total, done)
        rate = (done - self.first) / max(now - self.started, 1e-9)
        pace = f", {rate / self.scale:.1f}/s" if rate > 0 else ""
        if self.progress is not None:
            text = f"{done / self.scale:.0f}/{self.total / self.scale:.0f} {self.unit}{pace}"
            self.progress.update(self.task, completed=done, total=self.total, description=text)
        elif self.lines.due(done >= self.total):
            left = f", {seconds_text((self.total - done) / rate)} left" if rate > 0 else ""
            counted = f"{done / self.scale:.0f} of {self.total / self.scale:.0f} {self.unit}"
            say(f"{self.title}: {counted}{pace}{left}")

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
        if self.bar is None:
            self.bar = Bar(self.title, total, self.unit, done)
        self.bar.total = total
        self.bar.update(done)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
