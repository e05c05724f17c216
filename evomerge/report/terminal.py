"""The output of `search`, `resume`, `status` and `evaluate`."""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.trial import TrialState
from rich.console import RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from evomerge.printable import say
from evomerge.report.gradient_steps import steps_text
from evomerge.report.live_view import NARROW, NO_SNAPSHOT, rate_and_time_left, render, task_table, watch
from evomerge.report.progress import Lines, Screen, console, seconds_text
from evomerge.report.status import Status
from evomerge.report.usage_text import usage_text
from evomerge.report.verdict_text import GAIN, GAIN_MEANS, candidate_title, difference_text, remarks
from evomerge.search.monitor.monitor import BATCHES
from evomerge.search.monitor.snapshot import Snapshot
from evomerge.search.run import Run
from evomerge.search.verdict.front import Front, spread_along

SHOWN = 8  # trials of the front
ANY_WIDTH = 10**4  # of a table where there is no terminal

if TYPE_CHECKING:
    from evomerge.evaluate.clock import Clock
    from evomerge.evaluate.standalone import TaskResult


class SearchView:
    """Shows a running search: the live view in a terminal; elsewhere lines for phases, long steps and trials."""

    def __init__(self) -> None:
        self.screen = Screen()
        self.live: Live | None = None
        self.snapshot: Snapshot | None = None
        self.current_phase = ""
        self.lines = Lines()

    def phase(self, text: str) -> None:
        """A new phase of the search begins."""
        if not self.screen.is_terminal and text != self.current_phase:
            self.current_phase, self.lines = text, Lines()
            say(f"{text} ...")

    def say(self, text: str) -> None:
        """Show one line, above the live view if there is one."""
        self.screen.print(text, soft_wrap=not self.screen.is_terminal)

    def step(self, done: int, total: int, unit: str) -> None:
        """How much of this phase, or of its present model, is done; without a terminal lines (`Lines`)."""
        if not self.screen.is_terminal and self.lines.due(done >= total and unit != BATCHES):
            say(f"{self.current_phase}: {done} of {total} {unit}")

    def trial(self, number: int, value: float | None, note: str, snapshot: Snapshot) -> None:
        """A trial has finished.

        value: None if the trial failed.  note: what is special about it.  snapshot: the search with it.
        """
        if self.screen.is_terminal:
            return
        shown = "failed" if value is None else f"{value:.4f}"
        best = "-" if snapshot.best is None else f"{snapshot.best:.4f}"
        of = f" of {snapshot.limit}" if snapshot.limit else ""
        pace = "".join(f", {text}" for text in rate_and_time_left(snapshot, 0.0))
        extra = f"  {note}" if note else ""
        say(f"trial {number}  {shown}  best {best}  ({snapshot.trials}{of} finished{pace}){extra}")

    def show(self, snapshot: Snapshot) -> None:
        """Show the latest state; it is redrawn between two snapshots, so that shown times advance."""
        self.snapshot = snapshot
        if self.screen.is_terminal and self.live is None and snapshot.ended is None:
            self.live = Live(console=self.screen, get_renderable=self.live_view, refresh_per_second=2)
            self.live.start()

    def live_view(self) -> RenderableType:
        """The live view of the latest snapshot."""
        assert self.snapshot is not None, "a snapshot is there before the view is drawn"
        return render(self.snapshot, time.time() - self.snapshot.beat, self.snapshot.ended)

    def close(self) -> None:
        """Stop the live view."""
        if self.live is not None:
            self.live.stop()
            self.live = None


def print_status(status: Status, timing: bool) -> None:
    """Print the output of `evomerge status`.  timing: with the table of mean times of a trial."""
    config = status.config
    what = f": {config.method} of {len(config.sources)} sources, {config.sampler.name}"
    console.print(Text.assemble((config.name, "bold"), what))
    if status.choice is not None:
        console.print(f"method: {status.choice.sentence}")
    if status.compute_dtype is not None:
        console.print(f"weights in {config.dtype}, computed in {status.compute_dtype}")
    planned = f" of {config.budget.most}" if config.budget.most else ""
    running = status.count(TrialState.RUNNING)
    console.print(f"trials: {status.finished}{planned} finished{status.endings}, {running} running")
    if status.best is not None:
        name = status.baselines.get(status.best.number)
        also = f" ({name})" if name else ""
        meaning = "; 0 is the base, 1 the best parent of each task" if status.relative else ""
        console.print(f"best: {status.best.value:.4f} by trial {status.best.number}{also}{meaning}")
    if status.tasks:
        console.print("on the search items:")
        console.print(task_table(status.tasks, console.width >= NARROW))
    if status.climbs:
        console.print(steps_text(status.climbs, status.used))
    for found in status.agreements:
        console.print(found.sentence, style="bold" if found.disagrees else None)
    if status.front is not None:
        print_front(status.front)
    if status.seconds:
        console.print(f"rate: {60 / status.seconds:.1f} trials per minute ({status.seconds:.2f} s each)")
    if status.seconds_left is not None:
        console.print(f"time left: about {seconds_text(status.seconds_left)}")
    if status.used.seconds:
        console.print(f"used: {usage_text(status.used, status.price)}")
    if timing:
        print_timing(status.timing)
    if status.verdict is not None:
        print_verdict(status.verdict)
    elif status.best is not None:
        console.print("no verdict yet: the search has not ended")


def watch_run(run: Run) -> None:
    """Show the live view until the run ends or the user presses Ctrl-C, then the verdict if there is one."""
    try:
        end = watch(run.folder, Screen())
    except KeyboardInterrupt:
        return
    if end in ("finished", NO_SNAPSHOT) and (verdict := run.verdict()) is not None:
        print_verdict(verdict)
    else:
        say(f"go on with: evomerge resume {run.folder}")


def print_timing(timing: dict[str, float]) -> None:
    """Print the mean time of each part of a trial.  timing: seconds by part."""
    total = sum(timing.values())
    if not total:
        console.print("timing: no trial has finished yet")
        return
    table = Table("part of a trial", "seconds", "share", title="Mean time of a trial")
    for part, seconds in timing.items():
        table.add_row(part, f"{seconds:.4f}", f"{seconds / total:.1%}")
    table.add_row("outside model forwards", f"{total - timing['forward']:.4f}", f"{1 - timing['forward'] / total:.1%}")
    console.print(table)


def print_front(front: Front) -> None:
    """Print the size of the front, and the values of at most SHOWN trials along it."""
    console.print(front.sentence)
    chosen = sorted(spread_along(np.array([m.values for m in front.members]), SHOWN))
    rows = [
        [member.name, *(f"{value:.3f}" for value in member.values)] for member in (front.members[i] for i in chosen)
    ]
    print_tables(["front"], front.tasks, rows)


def print_verdict(verdict: dict[str, Any]) -> None:
    """Print the verdict: its sentence, its table and the remarks."""
    console.print(f"\n{verdict['sentence']}", style="bold")
    tasks = list(verdict["tasks"])
    title = candidate_title(verdict)
    rows = [[title, f"{verdict['score']['value']:.3f}", "", *cells(verdict["holdout"]["winner"], tasks)]]
    for c in verdict["comparisons"]:
        rows.append([c["name"], f"{c['score']:.3f}", difference_text(c), *cells(verdict["holdout"][c["name"]], tasks)])
    print_tables(["holdout", "mean", GAIN], tasks, rows)
    console.print(f"{GAIN_MEANS}.")
    for line in remarks(verdict):
        console.print(line)


def print_tables(first: Sequence[str], tasks: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows whose last columns are tasks: one table if the terminal is wide enough, else several.

    first: the titles of the columns before the tasks; the first of them names the row, and is in every table.
    """
    titles = [*first, *tasks]
    widths = [max(len(row[k]) for row in [titles, *rows]) + 3 for k in range(len(titles))]
    room = max(console.width if console.is_terminal else ANY_WIDTH, *(widths[0] + w + 1 for w in widths[1:]))
    for columns in fitting(widths, len(first), room):
        table = Table(*(titles[k] for k in columns))
        for row in rows:
            table.add_row(*(row[k] for k in columns))
        Screen(width=room, file=sys.stdout).print(table)


def fitting(widths: Sequence[int], first: int, room: int) -> list[list[int]]:
    """Columns in as few tables as fit; column 0 is in each, and the first ones are in one table if they can be.

    widths: of the columns with their edges.  first: how many come before the tasks.  room: of a table.
    """
    found: list[list[int]] = [[0]]
    for k in range(1, len(widths)):
        alone = k == first and sum(widths) + 1 > room  # tasks begin a table of their own
        if len(found[-1]) > 1 and (alone or sum(widths[c] for c in found[-1]) + widths[k] + 1 > room):
            found.append([0])
        found[-1].append(k)
    return found


def cells(row: dict[str, dict[str, float]], tasks: list[str]) -> list[str]:
    """The values of one model by task."""
    return [f"{row[t]['value']:.3f}" for t in tasks]


def print_results(results: Sequence["TaskResult"], clock: "Clock") -> None:
    """Print the output of `evomerge evaluate`."""
    table = Table("task", "items", "metric", "value")
    for result in results:
        for metric, value in result.metrics.items():
            table.add_row(result.task, str(result.items), metric, f"{value:.4f}")
    console.print(table)
    console.print(", ".join(f"{part} {seconds:.1f} s" for part, seconds in clock.seconds.items()))


def print_answers(results: Sequence["TaskResult"], count: int) -> None:
    """Print the first answers to each task.  count: of each."""
    for result in results:
        for number, answer in enumerate(result.answers[:count]):
            scores = ", ".join(f"{metric} {score_text(values[number])}" for metric, values in result.raw.items())
            taken = "" if answer.taken == answer.text else f" -> {answer.taken!r}"
            say(f"\n{result.task} {number + 1}: {scores}\n{answer.prompt}")
            say(f"  answer {answer.text!r}{taken}\n  gold   {answer.gold!r}")


def score_text(value: Any) -> str:
    """One item's value of a metric; some of lm-eval's are no numbers."""
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)
