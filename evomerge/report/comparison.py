"""The output of `evomerge compare`."""

from collections.abc import Iterator

from evomerge.report.progress import console
from evomerge.report.terminal import print_tables
from evomerge.report.verdict_text import interval_text
from evomerge.search.verdict.across_runs import AcrossRuns, Judged
from evomerge.search.verdict.intervals import Interval


def print_comparison(found: AcrossRuns) -> None:
    """Print the table of the runs, and what they have in common in words."""
    tasks = list(dict.fromkeys(task for run in found.runs for task in run.tasks))
    rows = [list(cells(run, tasks)) for run in found.runs]
    print_tables(["run", "verdict", "holdout", "gain over the best baseline, 90%", "recommended"], tasks, rows)
    for sentence in found.sentences:
        console.print(sentence)


def cells(run: Judged, tasks: list[str]) -> Iterator[str]:
    """One row of the table."""
    yield run.run
    yield run.outcome or "none yet"
    yield "" if run.score is None else f"{run.score.value:.3f}"
    yield "" if run.gain is None else gain_text(run.gain)
    yield run.recommended or ""
    for task in tasks:
        yield f"{run.tasks[task]:.3f}" if task in run.tasks else "-"


def gain_text(gain: Interval) -> str:
    return interval_text({"value": gain.value, "low": gain.low, "high": gain.high}, signed=True)
