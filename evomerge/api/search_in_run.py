"""A search in its run folder, from the first trial to the report: signals, views, the user's function."""

import asyncio
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from evomerge.api.run import Run, Trial, reader_of_trials
from evomerge.printable import say
from evomerge.report.progress import Stages
from evomerge.search.budget.limits import Limits
from evomerge.search.interrupt import Interrupted, StopSignal
from evomerge.search.run import Run as RunFolder
from evomerge.search.run import only_driver
from evomerge.search.workers.worker_options import WorkerOptions

if TYPE_CHECKING:
    from evomerge.report.status import Status
    from evomerge.report.terminal import SearchView
    from evomerge.search.monitor.snapshot import Snapshot
    from evomerge.search.opened import Opened
    from evomerge.sources.open_models import Models

T = TypeVar("T")
OnTrial = Callable[[Trial], None]


class SearchStopped(KeyboardInterrupt):
    """The user stopped the search; everything that was finished is in its run.

    name, number: of the signal, SIGINT or SIGTERM.
    folder: the run folder.
    """

    def __init__(self, name: str, number: int, folder: Path) -> None:
        super().__init__(f"stopped by {name}; nothing finished is lost. Go on with: evomerge.resume({str(folder)!r})")
        self.name = name
        self.number = number
        self.folder = folder


def search_in(
    run: RunFolder,
    limits: Limits,
    workers: WorkerOptions,
    out: str | Path | None,
    on_trial: OnTrial | None,
    show: bool,
    opened: "Opened | None" = None,
) -> Run:
    """Search in a run folder to the verdict, write the report, and the model if `out` is given."""
    with Stages(show) as stages:
        stages.stage("loading the search")
        from evomerge.report.page import write_report
        from evomerge.report.terminal import SearchView, print_status
        from evomerge.search.monitor.monitor import Monitor
        from evomerge.search.session import search as run_session

    view, stop = SearchView() if show else None, Stop()
    where = None if out is None else Path(out)

    def work() -> "Status":
        with Monitor(run, run.config(), limits, SearchListener(run, view, on_trial)) as monitor:
            run_session(run, monitor, stop, workers, where, opened)
            monitor.phase("report")
            keep_conflicts(run, None if opened is None else opened.models)
            return write_report(run)

    is_main = threading.current_thread() is threading.main_thread()  # signals reach no other thread
    with only_driver(run), stop.installed() if is_main else nullcontext():
        try:
            status = outside_a_loop(work)
        except Interrupted as interrupt:
            number = stop.received or signal.SIGINT
            raise SearchStopped(str(interrupt), number, run.folder) from None
        finally:
            if view is not None:
                view.close()
    found = Run(run.folder)
    if show:
        print_status(status, timing=False)
        say(f"report: {run.report_file}")
    if where is not None:
        found.export(where, show=show)
    return found


def keep_conflicts(run: RunFolder, models: "Models | None") -> None:
    """Measure the conflicts between the sources for the report, which is written without them if that fails.

    models: None to open them.
    """
    from evomerge.search.verdict.conflicts import write_conflicts

    try:
        write_conflicts(run, models)
    except Exception as error:  # what the report shows beside the verdict is no reason to fail
        run.log(f"note: conflicts between the sources are not measured ({type(error).__name__}: {error})")


class Stop(StopSignal):
    """A `StopSignal` whose second SIGINT raises KeyboardInterrupt in an interactive session, where it must not kill."""

    def receive(self, number: int, frame: FrameType | None) -> None:
        super().receive(number, frame)
        if number == signal.SIGINT and hasattr(sys, "ps1"):
            signal.signal(number, signal.default_int_handler)


def outside_a_loop(work: Callable[[], T]) -> T:
    """Do the work, which runs an event loop of its own; where one runs already, as in a notebook, in another thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return work()
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result()


class SearchListener:
    """Passes what a search reports on to the view, if there is one, and finished trials to the user's function and to
    the report."""

    def __init__(self, run: RunFolder, view: "SearchView | None", on_trial: OnTrial | None) -> None:
        from evomerge.report.page import PageSoFar

        self.run = run
        self.view = view
        self.on_trial = on_trial
        self.page = PageSoFar(run)
        self.read: Callable[[int], Trial] | None = None

    def phase(self, text: str) -> None:
        if self.view is not None:
            self.view.phase(text)

    def say(self, text: str) -> None:
        if self.view is not None:
            self.view.say(text)

    def step(self, done: int, total: int, unit: str) -> None:
        if self.view is not None:
            self.view.step(done, total, unit)

    def trial(self, number: int, value: float | None, note: str, snapshot: "Snapshot") -> None:
        if self.view is not None:
            self.view.trial(number, value, note, snapshot)
        self.page.refresh()
        if self.on_trial is not None:
            self.read = self.read or reader_of_trials(self.run)
            self.on_trial(self.read(number))

    def show(self, snapshot: "Snapshot") -> None:
        if self.view is not None:
            self.view.show(snapshot)
