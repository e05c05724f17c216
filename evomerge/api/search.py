"""Search: start a run or resume one, with the same checks, run folder and limits as the command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.api.check import look
from evomerge.api.on_finish import content_of, telling_the_end
from evomerge.api.open_inputs import LOADING, open_inputs
from evomerge.api.read_config import read_config
from evomerge.api.run import Run
from evomerge.api.search_in_run import OnTrial, search_in
from evomerge.config.config_file import write_config
from evomerge.config.paths import pin
from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError
from evomerge.files.new_folder import refuse_full
from evomerge.printable import say
from evomerge.report.progress import Stages
from evomerge.search.agreements import agree, task_code
from evomerge.search.budget.limits import limits_of, with_budget
from evomerge.search.monitor.trackers import refuse_missing
from evomerge.search.run import Run as RunFolder
from evomerge.search.run import refuse_existing
from evomerge.search.workers.worker_options import parse_worker_options

if TYPE_CHECKING:
    from evomerge.search.opened import Opened


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
    limits, worker_options = limits_of(loaded.budget, until), parse_worker_options(workers, ray)
    folder = Path(run) if run is not None else Path("runs") / loaded.name
    refuse_existing(folder)
    refuse_missing(loaded)
    if out is not None:
        refuse_full(Path(out))
    # What the configuration alone shows is said before seconds go into imports, the rest before there is a run folder.
    opened = open_search(loaded, show)
    if check:
        look(opened, worker_options, limits)
    with Stages(show) as stages:
        stages.stage("hashing the files of the models")
        from evomerge.search.inputs import create_run

        created = create_run(opened.config, opened.task_set, origin or RunFolder(folder).config_file, folder)
    if show:
        say(f"run folder: {folder}")
    if loaded.on_finish is not None:
        agree(content_of(loaded.on_finish), folder)
    if code := task_code(opened.config):
        agree(code, folder)
    with telling_the_end(created, show):
        return search_in(created, limits, worker_options, out, on_trial, show, opened)


def open_search(config: SearchConfig, show: bool) -> "Opened":
    """The models and tasks of a new search, whose versions are pinned here, and a look at what it starts from.

    Raises EvomergeError for whatever a search cannot use.
    """
    with Stages(show) as stages:
        stages.stage(LOADING)
        from evomerge.search.space.start_points import read_start, refuse_seen_items

        opened = open_inputs(pin(config, {}), show, stages.stage, stages.download)
        if opened.config.start_from is not None:
            stages.stage("opening what the search starts from")
            read_start(opened.config)
            refuse_seen_items(opened.config, opened.task_set)
    return opened


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
    worker_options = parse_worker_options(workers, ray)
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
