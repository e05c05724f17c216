"""What the terminal shows: a live bar where there is a terminal, plain lines where there is none."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from optuna.trial import TrialState
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from evomerge.evaluate.clock import Clock
from evomerge.evaluate.standalone import TaskResult
from evomerge.report.status import Status

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


class SearchView:
    """Shows a search: phases as lines, trials as a bar with rate and time left (or a line each)."""

    def __init__(self) -> None:
        self.live = console.is_terminal
        self.progress: Progress | None = None
        self.bar: TaskID | None = None
        self.steps: Bar | None = None
        self.title = ""
        self.started = time.monotonic()
        self.seen = 0

    def phase(self, text: str) -> None:
        self.close()
        self.title = text
        console.print(f"[dim]{text} ...[/dim]")

    def step(self, done: int, total: int) -> None:
        """Batches of the phase in hand."""
        self.steps = self.steps or Bar(self.title, total, "batches")
        self.steps.update(done)

    def trial(self, number: int, total: int | None, value: float | None, best: float | None, note: str) -> None:
        self.seen += 1
        shown = "failed" if value is None else f"{value:.4f}"
        best_text = "-" if best is None else f"{best:.4f}"
        if not self.live:
            rate = self.seen / max(time.monotonic() - self.started, 1e-9)
            left = f", {seconds_text((total - number - 1) / rate)} left" if total and total > number + 1 else ""
            of = f"/{total}" if total else ""
            extra = f"  {note}" if note else ""
            print(
                f"trial {number + 1}{of}  {shown}  best {best_text}  {rate * 60:.1f}/min{left}{extra}",
                flush=True,
            )
            return
        if self.progress is None:
            self.progress = Progress(
                SpinnerColumn(),
                TextColumn("trials"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self.progress.start()
            self.bar = self.progress.add_task("", total=total, completed=number)
        assert self.bar is not None, "the bar is made with the progress"
        rate = self.seen / max(time.monotonic() - self.started, 1e-9) * 60
        self.progress.update(
            self.bar, completed=number + 1, description=f"best {best_text}  last {shown}  {rate:.1f}/min"
        )

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
        if self.steps is not None:
            self.steps.close()
            self.steps = None
        self.started, self.seen = time.monotonic(), 0


def print_status(status: Status, timing: bool) -> None:
    """The page of `evomerge status`."""
    config = status.config
    console.print(
        f"[bold]{config.name}[/bold]: {config.method} of {len(config.sources)} sources, {config.sampler.name}"
    )
    planned = f" of {config.budget.trials}" if config.budget.trials else ""
    running = status.count(TrialState.RUNNING)
    console.print(f"trials: {status.finished}{planned} finished{status.endings}, {running} in hand")
    if status.best is not None:
        name = status.baselines.get(status.best.number)
        also = f" ({name})" if name else ""
        console.print(f"best: {status.best.value:.4f} by trial {status.best.number}{also}")
    if status.seconds:
        console.print(f"rate: {60 / status.seconds:.1f} trials a minute ({status.seconds:.2f} s each)")
    if status.left is not None:
        console.print(f"time left: about {seconds_text(status.left)}")
    if timing:
        print_timing(status.timing)
    if status.verdict is not None:
        print_verdict(status.verdict)
    elif status.best is not None:
        console.print("no verdict yet: the search is not at its end")


def print_timing(timing: dict[str, float]) -> None:
    total = sum(timing.values())
    if not total:
        console.print("timing: no trial is finished yet")
        return
    table = Table("part of a trial", "seconds", "share", title="Mean time of a trial")
    for part, seconds in timing.items():
        table.add_row(part, f"{seconds:.4f}", f"{seconds / total:.1%}")
    table.add_row("outside model forwards", f"{total - timing['forward']:.4f}", f"{1 - timing['forward'] / total:.1%}")
    console.print(table)


def print_verdict(verdict: dict[str, Any]) -> None:
    """The verdict's sentence and its table."""
    console.print(f"\n[bold]{verdict['sentence']}[/bold]")
    tasks = list(verdict["tasks"])
    table = Table("holdout", "mean", "winner minus this, 95%", *tasks)
    score = verdict["score"]
    row = verdict["holdout"]["winner"]
    table.add_row("winner" if verdict["winner"] else "candidate", f"{score['value']:.3f}", "", *cells(row, tasks))
    for c in verdict["comparisons"]:
        d = c["difference"]
        span = f"{d['value']:+.3f}  [{d['low']:+.3f}, {d['high']:+.3f}]"
        table.add_row(c["name"], f"{c['score']:.3f}", span, *cells(verdict["holdout"][c["name"]], tasks))
    Console(width=max(console.width, 60 + 9 * len(tasks)), file=sys.stdout, highlight=False, markup=False).print(table)
    console.print(verdict.get("greedy_soup", ""))
    if verdict["holdout_uses"] > 1:
        console.print(
            f"The holdout items have judged {verdict['holdout_uses']} candidates of this run; the intervals flatter."
        )


def cells(row: dict[str, dict[str, float]], tasks: list[str]) -> list[str]:
    return [f"{row[t]['value']:.3f}" for t in tasks]


def print_results(results: Sequence[TaskResult], clock: Clock) -> None:
    """The table of `evomerge evaluate`."""
    table = Table("task", "items", "metric", "value")
    for result in results:
        for metric, value in result.metrics.items():
            table.add_row(result.task, str(result.items), metric, f"{value:.4f}")
    console.print(table)
    console.print(", ".join(f"{part} {seconds:.1f} s" for part, seconds in clock.seconds.items()))
