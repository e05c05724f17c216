"""Open the tasks of a configuration: lm-eval's, those of files, and Python functions."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evomerge.config.tasks import GuardConfig, PythonTask, TaskConfig, TaskOptions
from evomerge.errors import EvomergeError
from evomerge.evaluate.metrics import AUTO, AUTO_MEAN
from evomerge.evaluate.python_task import PythonSource
from evomerge.evaluate.task_metrics import objective_for, require_metric, without_first_filter
from evomerge.evaluate.taskfile import ALLOW, load_file, load_named
from evomerge.evaluate.tasks import FEWSHOT_SEED, Task
from evomerge.files.read import absolute_path, first_problem, read_text
from evomerge.parse import TaskLoader, parse_yaml

NAME_LENGTH = 120


def open_tasks(configs: Iterable[TaskConfig | GuardConfig]) -> list[Task]:
    """Open tasks; a group becomes its tasks, which share the weight.

    EvomergeError if a task is unknown or broken, or two have the same name.
    """
    opened: list[Task] = []
    for config in configs:
        lm_tasks, code = load(config)
        if not lm_tasks:
            raise EvomergeError(f"{config.task}: lm-eval finds no task in it")
        for lm_task in lm_tasks:
            if config.num_fewshot is not None and not isinstance(lm_task, PythonSource):
                lm_task.set_config("num_fewshot", config.num_fewshot)
            lm_task.set_fewshot_seed(FEWSHOT_SEED)
            opened.append(check_task(lm_task, config, config.weight / len(lm_tasks)))
            opened[-1].code, opened[-1].origin = code, str(config.task)
    names = [task.name for task in opened]
    if twice := {name for name in names if names.count(name) > 1}:
        raise EvomergeError(f"tasks: two of them are called {min(twice)!r}; each needs a name of its own")
    return opened


def load(config: TaskOptions) -> tuple[list[Any], bool]:
    """The task objects that a configuration's task stands for, and whether they run Python code of the user's."""
    if (given := python_task(config)) is not None:
        if config.num_fewshot:
            raise EvomergeError(f"{config.task}: num_fewshot has no meaning for a Python task")
        return [PythonSource(given)], True
    if config.is_file:
        return load_file(Path(str(config.task)), config.allow_task_code)
    return load_named(str(config.task)), False


def python_task(config: TaskOptions) -> PythonTask | None:
    """The Python task that a configuration gives, itself or in a task file of its own; None if it is another kind.

    EvomergeError if the file is wrong, or may not run code.
    """
    if isinstance(config.task, PythonTask) or not config.is_file:
        return config.task if isinstance(config.task, PythonTask) else None
    file = Path(config.task)
    if not file.is_file():
        return None  # which is told where lm-eval's files are read
    content = parse_yaml(read_text(file), str(file), TaskLoader)
    if not isinstance(content, dict) or "python" not in content:
        return None
    if not config.allow_task_code:
        raise EvomergeError(f"{file}: runs Python code (`python`); {ALLOW}")
    try:
        given = PythonTask.model_validate(content)
    except ValidationError as error:
        raise EvomergeError(f"{file}: {first_problem(error)}") from error
    paths = {key: absolute_path(str(getattr(given, key)), file.parent.resolve()) for key in ("python", "items")}
    return given.model_copy(update=paths)


def task_files(name: str) -> list[str]:
    """The task files in a folder; if `name` is not a folder, only `name`.  EvomergeError if the folder has none."""
    folder = Path(name)
    if not folder.is_dir():
        return [name]
    if files := sorted(str(f) for f in folder.glob("*.yaml")):
        return files
    raise EvomergeError(f"{folder}: has no task files (*.yaml)")


def check_task(lm_task: Any, config: TaskOptions, weight: float) -> Task:
    """The task with its objective and metric; the default metric is lm-eval's first.

    EvomergeError if the task does not have one of them; the message lists those that it has.
    """
    chat, multiturn = config.apply_chat_template, config.fewshot_as_multiturn
    task = Task(str(lm_task.config.task), weight, "", "", config.gold, lm_task, chat, multiturn, config.limit)
    if len(task.name) > NAME_LENGTH or not task.name.isprintable():
        raise EvomergeError(f"{config.task}: {task.name[:60]!r} cannot be a task's name")
    metric = without_first_filter(task, config.metric) if config.metric else task.metrics[0] if task.metrics else ""
    require_metric(task, "metric", metric)
    objective = objective_for(task, without_first_filter(task, config.objective), metric)
    require_metric(task, "objective", objective)
    if config.gold and task.kind == "multiple_choice":
        raise EvomergeError(f"task {task.name}: `gold` is for generation; a multiple-choice task knows its gold choice")
    task.metric, task.objective, task.auto = metric, objective, config.objective in (AUTO, AUTO_MEAN)
    return task
