"""Write the configuration of a first search: `init_config`."""

from collections.abc import Sequence
from pathlib import Path

from evomerge.config.config_file import load_config
from evomerge.config.tasks import TaskConfig
from evomerge.errors import EvomergeError
from evomerge.evaluate.open_tasks import open_tasks
from evomerge.files.write import write_text
from evomerge.sources.open_models import open_named
from evomerge.sources.tensor_names import PARTS, tensor_role
from evomerge.start.yaml_text import named_source, plain, relative

TEMPLATE = """\
# A search of evomerge.  Relative paths count from this file's folder.
name: {name}
base: {base}
sources:                  # fine-tunes or LoRA adapters of the base
{sources}
method: task_arithmetic   # base + sum of weight * (source - base)
space:
  granularity: layer      # a weight for every layer: the gradient costs the same for any number
  components: [{components}]
  weight: [-0.5, 2.0]     # bounds

tasks:                    # what counts, each with the same weight
{tasks}
splits: {{search: 0.4, selection: 0.2, holdout: 0.4}}  # shares of each task's items, never shared

budget: {{timeout: {timeout}}}     # the result is there after this much time
dtype: bfloat16           # of the merged model
"""


def init_config(file: Path, base: str, sources: Sequence[str], tasks: Sequence[str], timeout: str) -> list[str]:
    """Write a configuration with comments, after a look at the models and tasks that it names.

    file: to write; it must be new.
    base: a folder or a hub id.
    sources: the same of each source, or NAME=PATH.
    tasks: task files, or names of lm-eval's tasks.
    timeout: as in `budget`.

    Returns what it found, for the terminal.

    EvomergeError if the file exists, or a model or a task cannot be opened, or they do not fit together.
    """
    if file.exists():
        raise EvomergeError(f"{file}: exists already; choose another name with --out")
    if not sources or not tasks:
        raise EvomergeError(f"{'--source' if not sources else '--task'}: at least one is needed")
    named = dict(map(named_source, sources))
    if len(named) < len(sources):
        raise EvomergeError("--source: two have the same name; write NAME=PATH")
    models = open_named(base, named)
    opened = open_tasks([TaskConfig(task=task) for task in tasks])
    parts = {tensor_role(name).part for name in models.base.tensors}
    found = [part for part in PARTS if part in parts]
    lost = [c for c in ("attention", "mlp") if not any(part.startswith(c) for part in found)]
    content = TEMPLATE.format(
        name=plain(file.stem),
        base=plain(relative(base, file)),
        sources="\n".join(f"- {{name: {plain(n)}, path: {plain(relative(p, file))}}}" for n, p in named.items()),
        components=", ".join([*found, *lost]),
        tasks="\n".join(f"- {{task: {plain(relative(task, file))}}}" for task in tasks),
        timeout=plain(timeout),
    )
    write_text(file, content)
    try:
        load_config(file)
    except EvomergeError:
        file.unlink()
        raise
    counted = ", ".join(f"{task.name} ({sum(1 for _ in task.docs)} items)" for task in opened)
    return [f"wrote {file}: {len(named)} sources; tasks: {counted}", f"next: evomerge check {file}"]
