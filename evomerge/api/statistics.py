"""Gather what the methods `fisher` and `regmean` need to know of a source."""

from pathlib import Path
from typing import get_args

from evomerge.config.tasks import TaskConfig
from evomerge.errors import EvomergeError


def gather_statistics(
    kind: str,
    model: str,
    out: Path,
    tasks: list[TaskConfig],
    base: str | None,
    items: int,
    search: Path | None,
    device: str,
) -> None:
    """Write the statistics file that the methods `fisher` and `regmean` need of a source.

    kind: fisher or regmean.
    model, base: the source, and its base if it is an adapter: folders or hub ids.
    out: the safetensors file to write; it must be new.
    tasks: whose gold answers the statistics are gathered on.
    items: of each task, at most.
    search: a search configuration; only items of its search split are taken.

    Raises EvomergeError if an argument is wrong or a model or task cannot be opened.
    """
    from evomerge.config.config_file import load_config
    from evomerge.device import merging_device, resolve_device, use
    from evomerge.evaluate.open_tasks import open_tasks
    from evomerge.merge.live import locate_live_model, open_live_model
    from evomerge.merge.methods.method import Statistics
    from evomerge.report.progress import Bar
    from evomerge.statistics.gather import choose_items
    from evomerge.statistics.gather import gather_statistics as gather

    if (wanted := next((k for k in get_args(Statistics) if k == kind), None)) is None:
        raise EvomergeError(f"kind: {kind!r} is not one of {', '.join(get_args(Statistics))}")
    if out.exists():
        raise EvomergeError(f"{out}: exists already; choose another name")
    opened = open_tasks(tasks)
    chosen = choose_items(opened, items, load_config(search) if search else None)
    if asking := next((task for task in opened if task.is_python), None):
        raise EvomergeError(f"task {asking.name}: a Python task has no gold answers, which statistics are gathered on")
    where = resolve_device(device)
    use(where)
    folder, below = locate_live_model(model, base)
    live = open_live_model(folder, below, "float32", merging_device(where))
    bar = Bar("gathering", sum(map(len, chosen.values())), "items")
    try:
        gather(wanted, folder, below, live, opened, chosen, out, bar.update)
    finally:
        bar.close()
