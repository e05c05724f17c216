"""The items of a search's splits as workloads of one engine; those of a whole split are built once."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from evomerge.evaluate.engine import Engine
from evomerge.evaluate.prepared_items import prepared_workload
from evomerge.evaluate.tasks import Split, Task
from evomerge.evaluate.workload import Workload
from evomerge.search.evaluation.task_set import TaskSet


class SplitWorkloads:
    """Builds workloads and their batches.

    engine: that will score them.
    task_set: the tasks with the items of each split.
    cache: the folder that keeps prepared items; None keeps nothing.
    """

    def __init__(self, engine: Engine, task_set: TaskSet, cache: Path | None) -> None:
        self.engine = engine
        self.task_set = task_set
        self.folder = None if cache is None else cache / "items"
        self.built: dict[tuple[Split, bool], Workload] = {}
        self.guard_work: Workload | None = None

    def whole(self, split: Split, everything: bool = False) -> Workload:
        """All items of a split as one workload.  everything: for all metrics, not only those of trials."""
        if (split, everything) not in self.built:
            items = self.task_set.split(split)
            asked = [(t, items[t.name], self.is_complete(t, everything)) for t in self.task_set.tasks]
            if self.folder is None:
                works = [self.engine.workload(*each) for each in asked]
            else:
                works = [prepared_workload(self.engine, t, split, i, whole, self.folder) for t, i, whole in asked]
            self.built[split, everything] = self.engine.join(works)
        return self.built[split, everything]

    def chosen(self, split: Split, everything: bool, ids: Mapping[str, Sequence[str]] | None) -> Workload:
        """The items of a split that have these ids, by task; None for all of them."""
        items = self.task_set.split(split)
        if ids is None:
            return self.whole(split, everything)
        wanted = {task: set(names) for task, names in ids.items()}
        picked = {task: [i for i in found if i.id in wanted.get(task, ())] for task, found in items.items()}
        if picked == items:
            return self.whole(split, everything)
        works = [
            self.engine.workload(task, picked[task.name], self.is_complete(task, everything))
            for task in self.task_set.tasks
            if picked[task.name]
        ]
        return self.engine.join(works)

    def goals(self) -> list[Workload]:
        """One workload of the search split for each task whose items count in the value."""
        return [part for part in self.whole("search").by_task if part.task.weight > 0]

    def guards(self) -> Workload | None:
        """The search split's items of tasks that are only guards; None if there are none."""
        guards = [part for part in self.whole("search").by_task if part.task.weight == 0]
        if guards and self.guard_work is None:
            self.guard_work = self.engine.join(guards)
        return self.guard_work

    def is_complete(self, task: Task, everything: bool) -> bool:
        """Whether a task's workload has to be for all its metrics."""
        return everything or self.task_set.scores_metric(task)
