"""The keys of a configuration that say what models are scored on: tasks, guards, splits."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from evomerge.config.strict import Strict


class PythonTask(Strict):
    """A task that is a Python function of the user's, see `evaluate/python_task.py`.

    python: `FILE.py:FUNCTION`.
    items: a file of JSON lines, one object an item.
    name: of the task; None is the function's.
    metric: what the function's number is called.
    higher_is_better: its direction.
    block: the greatest number of items that the function gets at once.
    """

    model_config = ConfigDict(frozen=True)
    python: str = Field(pattern=r"\.py:[^\W\d]\w*$")
    items: str
    name: str | None = Field(default=None, pattern=r"^[\w.-]+$")
    metric: str = Field(default="score", pattern=r"^[\w.@-]+$")
    higher_is_better: bool = True
    block: int = Field(default=64, ge=1)

    @property
    def file(self) -> str:
        """The file of the function."""
        return self.python.rpartition(":")[0]

    def __str__(self) -> str:
        return self.python


def kind_of_task(value: object) -> str:
    """Which of the two forms of `task` a value has; the names are those of the tags below."""
    return "tagged-python" if isinstance(value, (dict, PythonTask)) else "tagged-name"


TaskName = Annotated[
    Annotated[str, Tag("tagged-name")] | Annotated[PythonTask, Tag("tagged-python")], Discriminator(kind_of_task)
]


class TaskOptions(Strict):
    """One task and how models are scored on it.

    task: a YAML file, the name of one of lm-eval's own tasks, or a Python function with its items.
    objective: what the search optimises: a metric that the task has per item, or one of `evaluate/metrics.py`; `auto`
        is a smooth one that fits the task, `entropy` one without labels.  It is checked when the task is opened, since
        only then its metrics are known.
    metric: the metric that the verdict compares (default: the task's first).
    gold: a Jinja template of the gold answer, if it is not `doc_to_target`.
    num_fewshot, apply_chat_template: as in lm-eval.
    fewshot_as_multiturn: with a chat template, examples are turns of their own.
    limit: use only the first documents, this many.
    allow_task_code: whether the task's file may run Python code.
    """

    task: TaskName
    objective: str = "auto"
    metric: str | None = None
    gold: str | None = None
    num_fewshot: int | None = Field(default=None, ge=0)
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    limit: int | None = Field(default=None, ge=1)
    allow_task_code: bool = False

    @property
    def is_file(self) -> bool:
        return isinstance(self.task, str) and self.task.endswith((".yaml", ".yml"))

    @model_validator(mode="after")
    def fit_the_task(self) -> "TaskOptions":
        if isinstance(self.task, PythonTask):
            given = {
                "gold": self.gold,
                "num_fewshot": self.num_fewshot,
                "apply_chat_template": self.apply_chat_template,
            }
            if wrong := [name for name, value in given.items() if value]:
                raise ValueError(f"{wrong[0]}: has no meaning for a Python task, whose function asks the model itself")
        return self


class TaskConfig(TaskOptions):
    """One task that the search improves.

    weight: its share in the score.
    """

    weight: float = Field(default=1.0, gt=0)


class GuardConfig(TaskOptions):
    """One task that must not get worse; it may be one of those that the search improves.

    max_drop: by how much the mean of its metric may be worse than the reference's, in units of the metric.
    of: the reference: `base`, or the name of a source.
    """

    max_drop: float = Field(ge=0)
    of: str = "base"

    @property
    def weight(self) -> float:
        """Its share in the score: none."""
        return 0.0


def check_share(value: object) -> object:
    """ValueError if a value is not a count, a share or the name of a split; 1.0 and `true` are not counts."""
    is_count = type(value) is int and value >= 1
    is_share = type(value) is float and 0 < value < 1
    if not is_count and not is_share and value not in ("train", "validation", "test"):
        raise ValueError("give a count of 1 or more, a share between 0 and 1, or one of train, validation, test")
    return value


Share = Annotated[int | float | Literal["train", "validation", "test"], BeforeValidator(check_share)]


class SplitsConfig(Strict):
    """How the items of each task are dealt: for each split a count, a share, or the name of one of the task's own."""

    search: Share = 0.4
    selection: Share = 0.2
    holdout: Share = 0.4

    @model_validator(mode="after")
    def fit(self) -> "SplitsConfig":
        dealt = (self.search, self.selection, self.holdout)
        shares = [s for s in dealt if isinstance(s, float)]
        if sum(shares) > 1 + 1e-9:
            raise ValueError(f"the shares add up to {sum(shares):g}, which is more than 1")
        named = [s for s in dealt if isinstance(s, str)]
        if len(set(named)) < len(named):
            raise ValueError(
                f"two splits use the task's split {max(named, key=named.count)!r}; they must not share items"
            )
        return self
