"""The live view of a search, redrawn every second: by `search` and `resume`, and by `status --watch`."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from evomerge.report.progress import seconds_text
from evomerge.report.usage_text import usage_text
from evomerge.search.budget.usage import Usage
from evomerge.search.monitor.snapshot import (
    SILENT,
    STATE,
    Coefficients,
    Snapshot,
    TaskScore,
    WorkerState,
    read_snapshot,
    why_ended,
)

EIGHTHS = " ▁▂▃▄▅▆▇█"
HEIGHT = 4  # lines of the plot
WORKERS = 12  # at most that are listed one by one
TASKS, SOURCES = 16, 12  # at most of the incumbent
NARROW, WIDE = 70, 120  # columns: with the names of the metrics; with two halves side by side
NO_SNAPSHOT = f"not running: the run folder has no {STATE} that can be read"


class Plot:
    """Draws a curve that never falls, as filled columns.

    points: (x, y) where it rises.
    last: the x of the right edge.
    """

    def __init__(self, points: Sequence[tuple[int, float]], last: int) -> None:
        self.points = points
        self.last = max(last, points[-1][0])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        labels = [f"{y:.4f} " for y in (self.points[-1][1], self.points[0][1])]
        margin = max(map(len, labels))
        rows = columns(self.points, self.last, max(8, options.max_width - margin))
        blocks = " ..::==##" if options.ascii_only else EIGHTHS
        for line in reversed(range(HEIGHT)):
            label = labels[0] if line == HEIGHT - 1 else labels[1] if line == 0 else ""
            bar = "".join(blocks[min(8, max(0, level - 8 * line))] for level in rows)
            yield Text.assemble((label.rjust(margin), "dim"), (bar, "cyan"))


def columns(points: Sequence[tuple[int, float]], last: int, width: int) -> list[int]:
    """Heights of `width` columns from x = 0 to `last`, in eighths of a line; 0 before the first point."""
    low, high = points[0][1], points[-1][1]
    heights, k = [], -1
    for column in range(width):
        x = (column + 1) / width * last
        while k + 1 < len(points) and points[k + 1][0] <= x:
            k += 1
        share = 0.0 if high == low else min(1.0, max(0.0, (points[k][1] - low) / (high - low)))
        heights.append(0 if k < 0 else 1 + round(share * (8 * HEIGHT - 1)))
    return heights


def render(snapshot: Snapshot, age: float = 0.0, ended: str | None = None) -> RenderableType:
    """Draw a search.

    age: seconds since the snapshot.
    ended: why the search ended; None while it runs.
    """
    s = snapshot
    computing = f", computed in {s.compute_dtype}" if s.compute_dtype else ""
    parts: list[RenderableType] = [Text.assemble((s.name, "bold"), f"  {s.title}{computing}")]
    if ended is not None:
        parts.append(Text(ended, style="bold" if ended == "finished" else "bold red"))
    else:
        parts.append(Text(doing_text(s), style="green"))
        if age > SILENT:
            parts.append(
                Text(f"no news for {seconds_text(age)}: the process is stopped, or one step takes long", style="yellow")
            )
    parts.append(Progress(s))
    if ended is None and (speed := ", ".join(rate_and_time_left(s, age))):
        parts.append(Text(speed, style="dim"))
    if s.best is not None:
        named = f" ({s.best_name})" if s.best_name else ""
        aim = f", target {s.target:g}" if s.target is not None else ""
        wait = f", {s.since_best} trials since" + (f" (ends at {s.patience})" if s.patience else "")
        parts.append(Text.assemble("best ", (f"{s.best:.4f}", "bold"), f" by trial {s.best_trial}{named}{aim}{wait}"))
    parts.append(Body(s, age, ended is None))
    for failure in s.failures:
        what = "broken" if failure.broken else "failed"
        parts.append(
            Text(f"trial {failure.trial} {what}: {failure.reason}", style="red", overflow="ellipsis", no_wrap=True)
        )
    price = (s.price[0], s.price[1]) if s.price else None
    parts.append(Text(usage_text(used_now(Usage.from_dict(s.used), s, 0.0 if ended else age), price), style="dim"))
    return Group(*parts)


class Progress:
    """How many trials have finished, with a bar if there is a limit."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        s = self.snapshot
        if not s.limit:
            yield trials_text(s)
            return
        bar = Table.grid(padding=(0, 1))
        width = min(80, options.max_width // 2)
        bar.add_row(ProgressBar(total=s.limit, completed=min(s.trials, s.limit), width=width), trials_text(s))
        yield bar


class Body:
    """The plot and the workers, with the incumbent's scores and coefficients; side by side where there is room.

    age: seconds since the snapshot.  running: whether the search runs.
    """

    def __init__(self, snapshot: Snapshot, age: float, running: bool) -> None:
        self.snapshot, self.age, self.running = snapshot, age, running

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        s = self.snapshot
        wide = options.max_width >= WIDE
        left: list[RenderableType] = []
        right: list[RenderableType] = []
        if s.points:
            left.append(Padding(Plot(s.points, s.trials), (0, 0, 0, 2)))
        if s.tasks:
            right.append(task_table(s.tasks, options.max_width >= NARROW))
        if s.coefficients:
            right += coefficient_lines(s.coefficients)
        if s.workers and self.running:
            left.append(workers_table(s.workers, self.age))
        if not (wide and left and right):
            yield Group(*left[:1], *right, *left[1:])
            return
        sides = Table.grid(padding=(0, 3))
        sides.add_column(width=(options.max_width - 3) // 2)
        sides.add_column(width=(options.max_width - 3) // 2)
        sides.add_row(Group(*left), Group(*right))
        yield sides


def doing_text(s: Snapshot) -> str:
    """What the search does now, and how much of it is done."""
    text = s.phase
    if s.parts and s.parts[0] < s.parts[1]:
        text += f", {s.parts[0]} of {s.parts[1]} {s.unit} done"
    if s.step and s.step[0] < s.step[1]:
        text += f" ({s.step[0]} of {s.step[1]} batches)"
    return text


def task_table(tasks: Sequence[TaskScore], named: bool) -> Table:
    """The incumbent's scores beside those of each task's best parent and of the base.  named: with the metrics."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
    table.add_column("task", overflow="ellipsis", no_wrap=True)
    if named:
        table.add_column("by", style="dim", overflow="ellipsis", no_wrap=True)
    for title in ("best trial", "best parent", "", "base"):
        table.add_column(title, justify="left" if not title else "right", no_wrap=True)
    for t in tasks[:TASKS]:
        style = "" if t.parent is None or t.value == t.parent else "green" if t.value > t.parent else "yellow"
        values = (Text(f"{t.value:.3f}", style), number_text(t.parent), t.parent_name or "", number_text(t.base))
        table.add_row(t.task, *[t.by] * named, *values)
    if len(tasks) > TASKS:
        table.add_row(f"and {len(tasks) - TASKS} more")
    return table


def number_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def coefficient_lines(coefficients: Sequence[Coefficients]) -> Iterator[Text]:
    """The mean of each knob by source, with its least and greatest value where the layers or components differ."""
    for knob in dict.fromkeys(c.knob for c in coefficients):
        line = Text(f"{knob}  ", "dim")
        own = [c for c in coefficients if c.knob == knob]
        for number, c in enumerate(own[:SOURCES]):
            line.append(f"{', ' if number else ''}{c.source + ' ' if c.source else ''}", "default")
            line.append(f"{c.mean:.3g}", "bold")
            if c.low < c.high:
                line.append(f" ({c.low:.2g} to {c.high:.2g})")
        if len(own) > SOURCES:
            line.append(f", and {len(own) - SOURCES} more")
        yield line


def used_now(used: Usage, snapshot: Snapshot, age: float) -> Usage:
    """What the search has used by now, if its workers have held their devices since the snapshot."""
    return replace(used, seconds=used.seconds + age, device_seconds=used.device_seconds + age * len(snapshot.workers))


def trials_text(s: Snapshot) -> Text:
    """How many trials have finished, and how many of these were not scored on all items."""
    of = f" of {s.limit}" if s.limit else ""
    endings = [
        f"{n} {what}" for n, what in ((s.partial, "stopped early"), (s.broken, "broken"), (s.failed, "failed")) if n
    ]
    return Text(", ".join([f"{s.trials}{of} trials", *endings]))


def rate_and_time_left(s: Snapshot, age: float) -> Iterator[str]:
    """Trials per minute and time left, where they are known."""
    if s.per_minute is not None:
        yield f"{s.per_minute:.1f} trials per minute"
    if s.left is not None:
        judging = f" ({seconds_text(s.reserved)} of it for judging the finalists)" if 0 < s.reserved <= s.left else ""
        yield f"about {seconds_text(max(0.0, s.left - age))} left{judging}"


def workers_table(workers: Sequence[WorkerState], age: float) -> Table:
    """The state of every worker; of many workers the first ones, and how many others are in each state."""
    table = Table.grid(padding=(0, 2))
    for w in workers[:WORKERS]:
        doing = f"trial {w.trial}" if w.trial is not None else w.doing or w.state
        since = f"since {seconds_text(w.since_seconds + age)}" if w.since_seconds else ""
        again = f"{w.restarts} restarts" if w.restarts else ""
        style = {"dead": "red", "restarting": "yellow", "starting": "yellow", "idle": "dim"}.get(w.state, "")
        table.add_row(f"worker {w.name}", w.device, Text(doing, style=style), since, Text(again, style="yellow"))
    rest = [w.state for w in workers[WORKERS:]]
    if rest:
        counts = ", ".join(f"{rest.count(state)} {state}" for state in sorted(set(rest)))
        table.add_row(f"and {len(rest)} more", "", counts)
    return table


def watch(folder: Path, console: Console, pause: Callable[[float], None] = time.sleep) -> str:
    """Show a run until it has ended, redrawn every second; return why it ended.

    Only the snapshot is read, which takes no longer for a study of thousands of trials.

    pause: waits for so many seconds.
    """
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            now = time.time()
            snapshot = read_snapshot(folder)
            if snapshot is None:
                live.update(Text(NO_SNAPSHOT), refresh=True)
                return NO_SNAPSHOT
            ended = why_ended(snapshot, now)
            live.update(render(snapshot, max(0.0, now - snapshot.beat), ended), refresh=True)
            if ended is not None:
                return ended
            pause(1.0)
