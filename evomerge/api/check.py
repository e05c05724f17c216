"""Look at a search before it begins."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.api.read_config import read_config
from evomerge.api.search import LOADING, open_inputs
from evomerge.config.paths import pin
from evomerge.config.schema import SearchConfig
from evomerge.report.progress import Stages, console

if TYPE_CHECKING:
    from evomerge.search.check.check import Check


def check(config: SearchConfig | Mapping[str, Any] | str | Path, items: int = 16, show: bool = True) -> "Check":
    """Let base and sources answer a few items, and tell what may be wrong and how long the search will take.

    config: as in `search`.
    items: of each task's search split.
    show: whether to print it.

    Raises EvomergeError for wrong input, or if a model cannot be scored.
    """
    loaded = pin(read_config(config)[0], {})
    with Stages(show) as stages:
        stages.stage(LOADING)
        from evomerge.report.check_text import check_text
        from evomerge.search.check.check import check_search

        opened = open_inputs(loaded, show, stages.stage)
        stages.stage("preparing the items")
        found = check_search(opened, items, stages.log)
    if show:
        console.print(check_text(found))
    return found
