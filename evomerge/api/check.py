"""Look at a search before it begins."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.api.open_inputs import LOADING, open_inputs
from evomerge.api.read_config import read_config
from evomerge.config.paths import pin
from evomerge.config.schema import SearchConfig
from evomerge.errors import EvomergeError
from evomerge.printable import say
from evomerge.report.progress import Stages, console
from evomerge.search.budget.limits import Limits, limits_of, with_budget
from evomerge.search.workers.worker_options import WorkerOptions, parse_worker_options

if TYPE_CHECKING:
    from evomerge.search.check.check import Check
    from evomerge.search.opened import Opened


def check(
    config: SearchConfig | Mapping[str, Any] | str | Path,
    items: int = 16,
    show: bool = True,
    *,
    trials: int | None = None,
    timeout: str | float | None = None,
    until: str | None = None,
    workers: int | str | None = None,
    ray: str | None = None,
) -> "Check":
    """Let base and sources answer a few items, and tell what may be wrong and how long the search will take.

    config: as in `search`.
    items: of each task's search split.
    show: whether to print it.
    trials, timeout, until, workers, ray: as in `search`, for the forecast.

    Raises EvomergeError for wrong input, or if a model cannot be scored.
    """
    loaded = with_budget(read_config(config)[0], trials, timeout)
    limits, planned = limits_of(loaded.budget, until), parse_worker_options(workers, ray).planned
    loaded = pin(loaded, {})
    with Stages(show) as stages:
        stages.stage(LOADING)
        from evomerge.report.check_text import check_text
        from evomerge.search.check.check import check_search

        opened = open_inputs(loaded, show, stages.stage, stages.download)
        stages.stage("preparing the items")
        found = check_search(opened, items, stages.log, planned, limits)
    if show:
        console.print(check_text(found))
    return found


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
