"""Open tasks, check the metrics that a configuration names, and deal the documents to the three splits."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from evomerge.config.tasks import GuardConfig, PythonTask, Share, SplitsConfig, TaskConfig, TaskOptions
from evomerge.errors import EvomergeError, did_you_mean
from evomerge.evaluate.bounds import only_bounds, within_bounds
from evomerge.evaluate.metrics import (
    AUTO,
    AUTO_MEAN,
    CHOSEN,
    KINDS,
    METRICS,
    NORMALISED,
    Metric,
    added_metric,
    added_names,
)
from evomerge.evaluate.python_task import PYTHON, PythonSource
from evomerge.evaluate.taskfile import ALLOW, load_file, load_named
from evomerge.files.read import absolute_path, first_problem, read_text
from evomerge.parse import TaskLoader, parse_yaml

Split = Literal["search", "selection", "holdout"]
SPLITS: tuple[Split, ...] = ("holdout", "selection", "search")  # in the order in which they are dealt
FEWSHOT_SEED = 1234  # lm-eval's default, so that few-shot prompts are those of lm-eval
NAME_LENGTH = 120


@dataclass(frozen=True)
class Item:
    """One document of a task.

    id: a hash of the task's name and the document.
    doc: the document, as lm-eval's task gives it.
    """

    id: str
    doc: dict[str, Any]


@dataclass
class Task:
    """A task with its settings in a configuration.

    name: lm-eval's name of the task.
    weight: the task's share in the score.
    objective: the metric that the search maximises (or minimises).
    metric: the metric that the verdict compares.
    gold: a Jinja template of the gold answer of a generation task, if it is not `doc_to_target`.
    lm: lm-eval's own task object, which builds prompts, filters answers and scores them; or a `PythonSource`.
    chat: whether prompts go through the chat template.
    multiturn: whether the chat template gets few-shot examples as turns of their own.
    limit: the greatest number of documents, None for all.
    code: whether the task runs Python code of the user's (the configuration allows it).
    added: the metrics of other packages that the objective or the metric names.
    auto: whether the configuration leaves the choice of the objective to evomerge (`auto` or `auto_mean`).
    origin: the file or name that the configuration gives, of a group for each of its tasks.
    """

    name: str
    weight: float
    objective: str
    metric: str
    gold: str | None
    lm: Any
    chat: bool = False
    multiturn: bool = False
    limit: int | None = None
    code: bool = False
    added: dict[str, Metric] = field(default_factory=dict)
    auto: bool = False
    origin: str = ""

    @property
    def kind(self) -> str:
        """lm-eval's `output_type`: multiple_choice, generate_until, loglikelihood, loglikelihood_rolling; or PYTHON."""
        return str(self.lm.OUTPUT_TYPE)

    @property
    def is_python(self) -> bool:
        """Whether a Python function of the user's scores it, and not the answers to prompts."""
        return self.kind == PYTHON

    @property
    def metrics(self) -> list[str]:
        """The names of the task's metrics in lm-eval, in the order of the task file."""
        return list(self.lm._metric_fn_list)

    @cached_property
    def own(self) -> dict[str, Metric]:
        """The metrics that evomerge computes for this kind of task, by name: those with a formula."""
        return {m.name: m for m in METRICS.values() if self.kind in KINDS.get(m.needs, ())} | self.added

    @property
    def docs(self) -> Iterable[dict[str, Any]]:
        """The documents that lm-eval evaluates, `limit` at most."""
        return islice(self.lm.eval_docs, self.limit)

    @property
    def filters(self) -> list[str]:
        """The names of lm-eval's filters, in the order in which they are applied."""
        return [f.name for f in self.lm._filters]

    def higher_is_better(self, metric: str) -> bool:
        """The direction of a metric.

        Metrics with a formula have that of the table; others that of the task, or if it gives none, of the table.
        """
        if metric in self.own:
            return self.own[metric].higher_is_better
        plain = metric.split(",")[0]
        default = METRICS[plain].higher_is_better if plain in METRICS else True
        return bool(self.lm.higher_is_better().get(plain, default))


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


def without_first_filter(task: Task, name: str) -> str:
    """A metric as `item_values.py` calls it: `acc,none` and the like without the filter if it is the task's first."""
    plain, _, filter_name = name.partition(",")
    return plain if task.filters and filter_name == task.filters[0] else name


def require_metric(task: Task, key: str, name: str) -> None:
    """EvomergeError if the task does not have the metric that `key` names; one of another package is added to it."""
    plain, _, filter_name = name.partition(",")
    if plain not in task.metrics and plain not in task.own and (found := added_metric(plain)) is not None:
        add_metric(task, found)
    if plain not in {*task.metrics, *task.own} or (filter_name and filter_name not in task.filters):
        known = [*task.metrics, *task.own, *CHOSEN]
        hint = "" if plain in known else did_you_mean(plain, known)
        raise EvomergeError(f"task {task.name}: {key} {name!r} is not one of its metrics ({listed(task)}){hint}")


def objective_for(task: Task, name: str, metric: str) -> str:
    """The objective that a name in a configuration stands for; most names stand for themselves.

    metric: the task's metric, which `metric` stands for.  `auto` is the metric if that is smooth or if no smooth
        objective fits the task.
    """
    if name == "metric" and name not in task.metrics:
        return metric
    if name not in CHOSEN or name in task.metrics:
        return name
    chosen = CHOSEN[name].get(task.kind, name)
    if name not in (AUTO, AUTO_MEAN):
        return chosen
    plain = metric.partition(",")[0]
    known = task.own.get(plain) or METRICS.get(plain)
    chosen = NORMALISED.get(plain, chosen) if task.kind == "multiple_choice" else chosen
    return metric if (known and known.smooth) or chosen not in {*task.own, *task.metrics} else chosen


def add_metric(task: Task, metric: Metric) -> None:
    """Give a task the metric of another package.  EvomergeError if this kind of task does not have what it needs."""
    if task.kind not in KINDS[metric.needs]:
        raise EvomergeError(
            f"task {task.name}: {metric.name} needs a task of the kind {' or '.join(KINDS[metric.needs])}; "
            f"this one is {task.kind}"
        )
    task.added[metric.name] = metric
    task.__dict__.pop("own", None)  # `own` is computed again with it


def listed(task: Task) -> str:
    """The metrics that a task has: smooth ones, others, and those that other packages add."""
    names = dict.fromkeys([*task.metrics, *(n for n in task.own if n not in task.added)])
    smooth = [n for n in names if n in METRICS and METRICS[n].smooth]
    groups = {"smooth": smooth, "others": [n for n in names if n not in smooth], "of other packages": added_names()}
    return "; ".join(f"{title}: {', '.join(found)}" for title, found in groups.items() if found)


def items_of(task: Task, docs: Iterable[dict[str, Any]]) -> list[Item]:
    """Documents as items in the order of the data; of equal documents only the first."""
    found: dict[str, Item] = {}
    for doc in docs:
        content = json.dumps(doc, sort_keys=True, default=str, ensure_ascii=False)
        item = Item(hashlib.sha256(f"{task.name}\0{content}".encode()).hexdigest()[:16], doc)
        found.setdefault(item.id, item)
    return list(found.values())


def deal(task: Task, splits: SplitsConfig, seed: int) -> dict[Split, list[Item]]:
    """Deal a task's items to the three splits; no item is in two of them.

    splits: for each split a count, a share, or the name of one of the task's own splits.
    seed: of the deal.

    Counts and shares are dealt from the documents that lm-eval evaluates, in the order of a seeded hash of the item, so
    the deal does not depend on the order of the data.  Items with the same question come one after another; of those at
    the end of a split the rest is in no other split.  EvomergeError if there are too few items.
    """
    wanted: dict[Split, Share] = {name: getattr(splits, name) for name in SPLITS}
    dealt: dict[Split, list[Item]] = {}
    taken: set[str] = set()
    for name, share in wanted.items():
        if isinstance(share, str):
            dealt[name] = [i for i in items_of(task, own_split(task, share)) if i.id not in taken]
            taken |= {i.id for i in dealt[name]}
    pool = [i for i in items_of(task, task.docs) if i.id not in taken]
    total = len(pool)
    position = {item.id: n for n, item in enumerate(pool)}  # in the data's order
    questions, seen = questions_of(task, pool), dict[str, str]()
    # item id -> the id of the first item with the same question
    first = {i.id: seen.setdefault(text, i.id) if (text := questions.get(i.id)) else i.id for i in pool}

    def order(item_id: str) -> str:
        return hashlib.sha256(f"{seed}\0{item_id}".encode()).hexdigest()

    pool.sort(key=lambda i: (order(first[i.id]), order(i.id)))
    for name, share in wanted.items():
        if isinstance(share, str):
            continue
        count = share if isinstance(share, int) else int(share * total + 1e-9)  # 0.29 * 100 is a little less than 29
        if count > len(pool) or count < 1:
            raise EvomergeError(
                f"task {task.name}: has {total} items to deal, too few for the splits "
                f"(search {splits.search}, selection {splits.selection}, holdout {splits.holdout})"
            )
        dealt[name] = sorted(pool[:count], key=lambda i: position[i.id])
        asked = {first[i.id] for i in dealt[name]}
        pool = [i for i in pool[count:] if first[i.id] not in asked]
    if empty := [name for name, items in dealt.items() if not items]:
        raise EvomergeError(f"task {task.name}: no item is left for the {empty[0]} split")
    return dealt


def questions_of(task: Task, items: Iterable[Item]) -> dict[str, str]:
    """Item id -> the text of its question, without spaces around it; empty if most items have the same text."""
    texts: dict[str, str] = {}
    with within_bounds(f"task {task.name}: the texts of an item") as again:
        for item in items:
            again()
            texts[item.id] = item.id
            with only_bounds():  # a template that does not fit is reported where prompts are built
                texts[item.id] = str(task.lm.doc_to_text(item.doc)).strip()
    return texts if 2 * len(set(texts.values())) > len(texts) else {}


def own_split(task: Task, name: str) -> Iterable[dict[str, Any]]:
    """The documents of the task's own `train`, `validation` or `test` split.  EvomergeError if it has no such split."""
    docs = {"train": task.lm.training_docs, "validation": task.lm.validation_docs, "test": task.lm.test_docs}[name]()
    if docs is None:
        raise EvomergeError(f"task {task.name}: has no {name} split of its own; give a number of items instead")
    return islice(docs, task.limit)
