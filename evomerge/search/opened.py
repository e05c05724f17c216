"""What a check before a search has opened already, so that the search need not open it again."""

from dataclasses import dataclass
from typing import Any

from evomerge.config.schema import SearchConfig
from evomerge.search.evaluation.task_set import TaskSet
from evomerge.sources.open_models import Models


@dataclass
class Opened:
    """Models and tasks, opened and checked.

    config: what they were opened for, with the versions of its models pinned.
    live: a live model of it, whose weights the next candidate overwrites; None if none was loaded.
    """

    config: SearchConfig
    models: Models
    task_set: TaskSet
    live: Any = None

    def take_live(self) -> Any:
        """The live model, which is then no longer kept here."""
        live, self.live = self.live, None
        return live
