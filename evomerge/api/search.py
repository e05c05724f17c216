"""Search: start a run or resume one, with the same checks, run folder and limits as the command line."""

import asyncio
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from evomerge.api.on_finish import content_of, telling_the_end
from evomerge.api.read_config import read_config
from evomerge.api.run import Run, Trial, reader_of_trials
from evomerge.config.config_file import write_config
from evomerge.config.paths import pin
from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError
from evomerge.files import refuse_full
from evomerge.printable import say
from evomerge.report.progress import Stages, console
from evomerge.search.agreements import agree, task_code
from evomerge.search.budget.limits import Limits, limits_of, with_budget
from evomerge.search.interrupt import Interrupted, StopSignal
from evomerge.search.monitor.trackers import refuse_missing
from evomerge.search.run import Run as RunFolder
from evomerge.search.run import only_driver, refuse_existing
from evomerge.search.workers.worker_options import WorkerOptions, parse_worker_options

if TYPE_CHECKING:
    from evomerge.report.status import Status
    from evomerge.report.terminal import SearchView
    from evomerge.search.monitor.snapshot import Snapshot
    from evomerge.search.opened import Opened
    from evomerge.sources.open_models import Models

LOADING = "loading PyTorch and transformers"
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


def search(
    config: SearchConfig | Mapping[str, Any] | str | Path,
    *,
    run: str | Path | None = None,
    trials: int | None = None,
    timeout: str | float | None = None,
    until: str | None = None,
    target: float | None = None,
    patience: int | None = None,
    simplify: float | None = None,
    workers: int | str | None = None,
    ray: str | None = None,
    out: str | Path | None = None,
    check: bool = False,
    on_trial: OnTrial | None = None,
    show: bool = True,
) -> Run:
    """Start a search and wait for its verdict, as `evomerge search` does.

    config: a configuration file, its content as a dict (relative paths count from the working directory), or a
        `SearchConfig`.
    run: the run folder (default: runs/NAME).
    trials: end after this many trials, the baselines included.
    timeout: have the result after this much time, in seconds or as `8h`, `90m`, `1h30m`.
    until: have the result at this local time, `07:00`.
    target: end when the best score is this high or higher.
    patience: end when this many sampled trials in a row brought no better score.
    simplify: recommend fewer sources and coefficients, if that loses at most so much of the mean metric.
    workers: how many workers; `auto`: one on each accelerator (default: 1, with `ray` auto).
    ray: put the workers on a Ray cluster: its address, or `local` to start one.
    out: at the end write the recommended model into this folder; it must be new or empty.
    check: first look at the search as `evomerge.check` does, print what it finds, and go on.
    on_trial: called with each trial when it has finished, in the order in which they finish.  What it raises ends the
        search, which can be resumed.
    show: whether to print progress and the result: a live view in a terminal, plain lines elsewhere.

    Returns the run.  Raises EvomergeError for wrong input, before a run folder is made, and when ten trials in a row
    fail; KeyboardInterrupt after Ctrl-C, which leaves a run that can be resumed.
    """
    loaded, origin = read_config(config)
    loaded = with_margin(with_budget(loaded, trials, timeout, target, patience), simplify)
    limits, worker_options = limits_of(loaded.budget, until), options_of(workers, ray)
    folder = Path(run) if run is not None else Path("runs") / loaded.name
    refuse_existing(folder)
    refuse_missing(loaded)
    if out is not None:
        refuse_full(Path(out))
    # What the configuration alone shows is said before seconds go into imports, the rest before there is a run folder.
    with Stages(show) as stages:
        stages.stage(LOADING)
        from evomerge.search.inputs import create_run
        from evomerge.search.space.start_points import read_start, refuse_seen_items

        loaded = pin(loaded, {})
        opened = open_inputs(loaded, show, stages.stage, stages.download)
        if loaded.start_from is not None:
            stages.stage("opening what the search starts from")
            read_start(loaded)
            refuse_seen_items(loaded, opened.task_set)
    if check:
        look(opened, worker_options, limits)
    with Stages(show) as stages:
        stages.stage("hashing the files of the models")
        created = create_run(loaded, opened.task_set, origin or RunFolder(folder).config_file, folder)
    if show:
        say(f"run folder: {folder}")
    if loaded.on_finish is not None:
        agree(content_of(loaded.on_finish), folder)
    if code := task_code(loaded):
        agree(code, folder)
    with telling_the_end(created, show):
        return search_in(created, limits, worker_options, out, on_trial, show, opened)


def open_inputs(
    config: SearchConfig,
    show: bool,
    stage: Callable[[str], None] = lambda text: None,
    download: Callable[[int, int], None] | None = None,
) -> "Opened":
    """The models and tasks of a search, opened and checked.

    config: with the versions of its models pinned.  show: whether to print what to know about the models.
    stage: told what happens now.  download: told how many bytes of a download have come, and of how many.

    Raises EvomergeError for whatever a search cannot use.
    """
    from evomerge.merge.output.load_check import check_loads
    from evomerge.merge.recipe.layout import build_layout
    from evomerge.search.evaluation.task_set import (
        check_chat_templates,
        check_language,
        check_statistics,
        open_task_set,
    )
    from evomerge.search.models import open_config_models
    from evomerge.search.opened import Opened
    from evomerge.search.space.layer_assembly import build_assembly

    def check(models: "Models") -> list[str]:
        build_assembly(config, models)
        return check_loads(build_layout(models), models.base)

    stage("opening the models")
    models = open_config_models(config, progress=download, check=check)
    for note in check(models):
        if show:
            say(f"note: {note}", error=True)
    stage("opening the tasks")
    task_set = open_task_set(config)
    check_language(models, task_set)
    check_chat_templates(models, task_set)
    check_statistics(config, models, task_set)
    return Opened(config, models, task_set)


def look(opened: "Opened", workers: WorkerOptions, limits: Limits) -> None:
    """Print what a check finds; a search begins in any case."""
    from evomerge.report.check_text import check_text
    from evomerge.search.check.check import BRIEF, check_search

    keep = workers.ray is None and workers.count == 1
    try:
        with Stages() as stages:
            stages.stage("preparing a look at the search")
            found = check_search(opened, BRIEF, stages.log, workers.planned, limits, keep)
        console.print(check_text(found, examples=False))
    except EvomergeError as error:
        say(f"note: no check: {error}", error=True)


def resume(
    run: Run | str | Path,
    *,
    trials: int | None = None,
    timeout: str | float | None = None,
    until: str | None = None,
    target: float | None = None,
    patience: int | None = None,
    simplify: float | None = None,
    workers: int | str | None = None,
    ray: str | None = None,
    out: str | Path | None = None,
    accept_changes: bool = False,
    allow_task_code: bool = False,
    on_finish: bool = False,
    on_trial: OnTrial | None = None,
    show: bool = True,
) -> Run:
    """Resume a search that was stopped, or go on with a larger budget after its end, as `evomerge resume` does.

    run: a `Run` or its folder.
    accept_changes: go on although the configuration or a model has changed.
    allow_task_code: agree to the Python code of the run's tasks, if the search was started elsewhere.
    on_finish: agree to what the run's configuration says under `on_finish`, if the search was started elsewhere.

    The other arguments, the result and what is raised are those of `search`; limits and a margin that are not given
    stay as they are in the run, `until` excepted.
    """
    worker_options = options_of(workers, ray)
    files = (run if isinstance(run, Run) else Run(run)).files
    if out is not None:
        refuse_full(Path(out))
    with Stages(show) as stages:
        stages.stage(LOADING)
        from evomerge.search.inputs import check_unchanged

        if allow_task_code and (code := task_code(files.config())):
            agree(code, files.folder)
        stages.stage("comparing models and tasks with those that the search began with")
        config = check_unchanged(files, accept_changes)
    changed = with_margin(with_budget(config, trials, timeout, target, patience), simplify)
    limits = limits_of(changed.budget, until)
    if changed is not config:
        write_config(files.config_file, changed)
    if changed.on_finish is not None and on_finish:
        agree(content_of(changed.on_finish), files.folder)
    with telling_the_end(files, show):
        return search_in(files, limits, worker_options, out, on_trial, show)


def with_margin(config: SearchConfig, simplify: float | None) -> SearchConfig:
    """The configuration with the margin of `simplify`, if one is given.  EvomergeError if it is no margin."""
    if simplify is None:
        return config
    if not 0 < simplify < float("inf"):
        raise EvomergeError(f"--simplify: {simplify:g} is not a margin; give the largest loss, for instance 0.02")
    return config.model_copy(update={"simplify": float(simplify)})


def options_of(workers: int | str | None, ray: str | None) -> WorkerOptions:
    return parse_worker_options(None if workers is None else str(workers), ray)


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
        from evomerge.search.verdict.conflicts import write_conflicts

    view, stop = SearchView() if show else None, Stop()
    where = None if out is None else Path(out)

    def work() -> "Status":
        with Monitor(run, run.config(), limits, SearchListener(run, view, on_trial)) as monitor:
            run_session(run, monitor, stop, workers, where, opened)
            monitor.phase("report")
            try:
                write_conflicts(run, None if opened is None else opened.models)
            except Exception as error:  # what the report shows beside the verdict is no reason to fail
                run.log(f"note: conflicts between the sources are not measured ({type(error).__name__}: {error})")
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
