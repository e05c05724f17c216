"""How far a long step is; apart from the rest of the reports, which need half a dozen libraries."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(soft_wrap=True, highlight=False)
PLAIN_EVERY = 5.0  # seconds between plain progress lines


def seconds_text(seconds: float) -> str:
    """A duration as a person says it: 45s, 12m, 3h 20m."""
    if seconds < 90:
        return f"{seconds:.0f}s"
    if seconds < 5400:
        return f"{seconds / 60:.0f}m"
    return f"{seconds // 3600:.0f}h {seconds % 3600 // 60:.0f}m"


class Bar:
    """One long step: a Rich bar with rate and time left, or a plain line every few seconds.

    unit: what is counted; counts of `MB` are given in bytes.
    """

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.scale = 1e6 if unit == "MB" else 1.0
        self.started = self.said = time.monotonic()
        self.progress: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn(title), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self.progress = Progress(*columns, console=console, transient=True)
            self.task = self.progress.add_task("", total=total)
            self.progress.start()

    def update(self, done: int) -> None:
        now = time.monotonic()
        rate = done / max(now - self.started, 1e-9)
        if self.progress is not None:
            text = f"{done / self.scale:.0f}/{self.total / self.scale:.0f} {self.unit}, {rate / self.scale:.1f}/s"
            self.progress.update(self.task, completed=done, description=text)
        elif now - self.said >= PLAIN_EVERY:
            self.said = now
            left = seconds_text((self.total - done) / max(rate, 1e-9))
            counted = f"{done / self.scale:.0f} of {self.total / self.scale:.0f} {self.unit}"
            print(f"{self.title}: {counted}, {rate / self.scale:.1f}/s, {left} left", flush=True)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()


class Steps:
    """Batches of one phase; their number is known with the first of them."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: Bar | None = None

    def step(self, done: int, total: int) -> None:
        self.bar = self.bar or Bar(self.title, total, "batches")
        self.bar.update(done)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
