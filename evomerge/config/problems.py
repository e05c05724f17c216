"""Problems of a configuration that no single value shows: keys that do not fit together, files that are not there."""

from evomerge.config.method_problems import method_problems
from evomerge.config.paths import path_problems
from evomerge.config.schema import SearchConfig
from evomerge.config.tasks import TaskOptions
from evomerge.sources.tokenizer import VOCABULARY_CHOICES


def problems_of(config: SearchConfig, files: bool) -> list[str]:
    """All these problems, each with its YAML path.  files: whether the models and files that it names must be there."""
    problems = method_problems(config) + type_problems(config) + vocabulary_problems(config) + guard_problems(config)
    return problems + (path_problems(config) if files else [])


def type_problems(config: SearchConfig) -> list[str]:
    """The problem with a `compute_dtype` that would round the candidate's values once more."""
    if config.compute_dtype in ("auto", "float32", config.dtype):
        return []
    allowed = " or ".join(dict.fromkeys(("auto", "float32", config.dtype)))
    return [f"compute_dtype: {config.compute_dtype} cannot hold the values of dtype {config.dtype}; give {allowed}"]


def vocabulary_problems(config: SearchConfig) -> list[str]:
    """The problem with a `vocabulary` that is none of the models'."""
    names = [s.name for s in config.sources]
    if config.vocabulary is None or [*VOCABULARY_CHOICES, *names].count(config.vocabulary) == 1:
        return []
    allowed = ", ".join([*VOCABULARY_CHOICES, *names])
    return [f"vocabulary: {config.vocabulary!r} is not one (alone) of {allowed}"]


def guard_problems(config: SearchConfig) -> list[str]:
    """The problems with guards: references that do not exist, and options that differ from those of the same task."""
    models = ["base", *(s.name for s in config.sources)]
    goals = {task.task: task for task in config.tasks}
    problems = []
    for i, guard in enumerate(config.guards):
        if guard.of not in models:
            problems.append(f"guards.{i}.of: there is no model {guard.of!r}; give {' or '.join(models)}")
        goal = goals.get(guard.task)
        for name, field in TaskOptions.model_fields.items():
            value = getattr(guard, name)
            if goal is not None and value not in (getattr(goal, name), field.default):
                problems.append(f"guards.{i}.{name}: give it in `tasks`, which lists the same task")
    return problems
