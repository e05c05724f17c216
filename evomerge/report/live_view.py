"""The live view of a search: the same picture for the terminal that runs it and for one that watches."""

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
from evomerge.search.monitor.snapshot import SILENT, Snapshot, WorkerState, read_snapshot, silence

EIGHTHS = " ▁▂▃▄▅▆▇█"
HEIGHT = 4  # lines of the plot
WORKERS = 12  # that are listed one by one
UNKNOWN = "not running: there is nothing here that a search says of itself"


class Plot:
    """A curve that never falls, as filled columns.  points: (x, y) where it rises.  last: the x of the right edge."""

    def __init__(self, points: Sequence[tuple[int, float]], last: int) -> None:
        self.points = points
        self.last = max(last, points[-1][0])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        labels = [f"{y:.4f} " for y in (self.points[-1][1], self.points[0][1])]
        margin = max(map(len, labels))
        rows = columns(self.points, self.last, max(8, min(72, options.max_width - margin)))
        blocks = " ..::==##" if options.ascii_only else EIGHTHS
        for line in reversed(range(HEIGHT)):
            label = labels[0] if line == HEIGHT - 1 else labels[1] if line == 0 else ""
            bar = "".join(blocks[min(8, max(0, level - 8 * line))] for level in rows)
            yield Text.assemble((label.rjust(margin), "dim"), (bar, "cyan"))


def columns(points: Sequence[tuple[int, float]], last: int, width: int) -> list[int]:
    """Heights in eighths of a line, 1 to 8 HEIGHT, of `width` columns from x = 0 to `last`; 0 before any point."""
    low, high = points[0][1], points[-1][1]
    heights, k = [], -1
    for column in range(width):
        x = (column + 1) / width * last
        while k + 1 < len(points) and points[k + 1][0] <= x:
            k += 1
        share = 0.0 if high == low else (points[k][1] - low) / (high - low)
        heights.append(0 if k < 0 else 1 + round(share * (8 * HEIGHT - 1)))
    return heights


def render(snapshot: Snapshot, age: float = 0.0, gone: str | None = None) -> RenderableType:
    """The picture of a search.  age: seconds since the snapshot.  gone: why nobody writes another one."""
    s = snapshot
    computing = f", computed in {s.compute_dtype}" if s.compute_dtype else ""
    parts: list[RenderableType] = [Text.assemble((s.name, "bold"), f"  {s.title}{computing}")]
    if gone is not None:
        parts.append(Text(gone, style="bold" if gone == "finished" else "bold red"))
    else:
        doing = s.phase + (f" ({s.step[0]} of {s.step[1]} batches)" if s.step else "")
        parts.append(Text(doing, style="green"))
        if age > SILENT:
            parts.append(Text(f"no sign of life for {seconds_text(age)}: stopped, or a long step", style="yellow"))
    if s.limit:
        bar = Table.grid(padding=(0, 1))
        bar.add_row(ProgressBar(total=s.limit, completed=min(s.trials, s.limit), width=40), trials_text(s))
        parts.append(bar)
    else:
        parts.append(trials_text(s))
    parts.append(Text(", ".join(pace(s, age, gone)), style="dim"))
    if s.best is not None:
        named = f" ({s.best_name})" if s.best_name else ""
        aim = f", target {s.target:g}" if s.target is not None else ""
        wait = f", {s.since_best} trials since" + (f" (ends at {s.patience})" if s.patience else "")
        parts.append(Text.assemble("best ", (f"{s.best:.4f}", "bold"), f" by trial {s.best_trial}{named}{aim}{wait}"))
    if s.points:
        parts.append(Padding(Plot(s.points, s.trials), (0, 0, 0, 2)))
    if s.workers and gone is None:
        parts.append(workers_table(s.workers, age))
    for failure in s.failures:
        what = "broken" if failure.broken else "failed"
        parts.append(
            Text(f"trial {failure.trial} {what}: {failure.reason}", style="red", overflow="ellipsis", no_wrap=True)
        )
    price = (s.price[0], s.price[1]) if s.price else None
    parts.append(Text(usage_text(aged(Usage.from_dict(s.used), s, 0.0 if gone else age), price), style="dim"))
    return Group(*parts)


def aged(used: Usage, snapshot: Snapshot, age: float) -> Usage:
    """What has been used by now, if devices are still held."""
    return replace(used, seconds=used.seconds + age, device_seconds=used.device_seconds + age * len(snapshot.workers))


def trials_text(s: Snapshot) -> Text:
    of = f" of {s.limit}" if s.limit else ""
    endings = [
        f"{n} {what}" for n, what in ((s.partial, "stopped early"), (s.broken, "broken"), (s.failed, "failed")) if n
    ]
    return Text(", ".join([f"{s.trials}{of} trials", *endings]))


def pace(s: Snapshot, age: float, gone: str | None) -> Iterator[str]:
    """Rate and time left, as far as they are known."""
    if s.per_minute is not None:
        yield f"{s.per_minute:.1f} trials a minute"
    if s.left is not None and gone is None:
        yield f"{seconds_text(max(0.0, s.left - age))} left" + (
            f" ({seconds_text(s.reserved)} of it for the verdict)" if s.reserved else ""
        )


def workers_table(workers: Sequence[WorkerState], age: float) -> Table:
    """Every worker's state, or of many the first and how the others are."""
    table = Table.grid(padding=(0, 2))
    for w in workers[:WORKERS]:
        doing = f"trial {w.trial}" if w.trial is not None else w.state
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
    """Show a run's view, every second anew, until it no longer runs; returns why that is.

    Reads the run's snapshot alone, so that a study of thousands of trials costs nothing.
    """
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            now = time.time()
            snapshot = read_snapshot(folder)
            if snapshot is None:
                live.update(Text(UNKNOWN), refresh=True)
                return UNKNOWN
            gone = silence(snapshot, now)
            live.update(render(snapshot, max(0.0, now - snapshot.beat), gone), refresh=True)
            if gone is not None:
                return gone
            pause(1.0)
