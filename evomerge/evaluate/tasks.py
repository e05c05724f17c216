"""lm-eval tasks, opened once: their documents dealt to the splits, their metrics named and checked."""

import difflib
import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import yaml

from evomerge.config.schema import CHOICE_METRICS, GOLD_METRICS, Share, SplitsConfig, TaskConfig
from evomerge.errors import EvomergeError
from evomerge.files import read_yaml

Split = Literal["search", "selection", "holdout"]
SPLITS: tuple[Split, ...] = ("holdout", "selection", "search")  # dealt in this order: the holdout comes first
FEWSHOT_SEED = 1234  # lm-eval's default, so that few-shot prompts are the same
ALLOW = "read it, and say `allow_task_code: true` beside the task if it may"
LOWER_IS_BETTER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "brier")


@dataclass(frozen=True)
class Item:
    """One document of a task.  id: a hash of task and document."""

    id: str
    doc: dict[str, Any]


@dataclass
class Task:
    """An lm-eval task with what the search asks of it.

    objective, metric: the metric that trials climb, and the one the verdict is about.
    lm: lm-eval's own task object, which builds prompts, filters answers and scores them.  chat, multiturn: whether
    prompts go through the chat template, and few-shot examples as turns of their own.  limit: documents at most.
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

    @property
    def kind(self) -> str:
        return str(self.lm.OUTPUT_TYPE)

    @property
    def metrics(self) -> list[str]:
        """lm-eval's metrics of the task, the first one first."""
        return list(self.lm._metric_fn_list)

    @property
    def smooth(self) -> list[str]:
        """The metrics of our own that the task has."""
        if self.kind == "loglikelihood_rolling":
            return []
        return [*GOLD_METRICS, *(CHOICE_METRICS if self.kind == "multiple_choice" else ())]

    @property
    def docs(self) -> Iterable[dict[str, Any]]:
        """The documents that lm-eval evaluates."""
        return islice(self.lm.eval_docs, self.limit)

    @property
    def filters(self) -> list[str]:
        return [f.name for f in self.lm._filters]

    def higher_is_better(self, metric: str) -> bool:
        if metric in self.smooth:
            return metric not in LOWER_IS_BETTER
        return bool(self.lm.higher_is_better().get(metric.split(",")[0], metric not in LOWER_IS_BETTER))


def open_tasks(configs: Iterable[TaskConfig]) -> list[Task]:
    """Open tasks (groups become their tasks, sharing the weight).  EvomergeError if one is unknown or broken."""
    opened: list[Task] = []
    for config in configs:
        lm_tasks = load_file(Path(config.task), config.allow_task_code) if config.is_file else load_named(config.task)
        for lm_task in lm_tasks:
            if config.num_fewshot is not None:
                lm_task.set_config("num_fewshot", config.num_fewshot)
            lm_task.set_fewshot_seed(FEWSHOT_SEED)
            opened.append(check_task(lm_task, config, config.weight / len(lm_tasks)))
    names = [task.name for task in opened]
    if twice := {name for name in names if names.count(name) > 1}:
        raise EvomergeError(f"tasks: two of them are called {min(twice)!r}; each needs a name of its own")
    return opened


def task_files(name: str) -> list[str]:
    """A folder as the task files in it; anything else as it is."""
    folder = Path(name)
    if not folder.is_dir():
        return [name]
    if files := sorted(str(f) for f in folder.glob("*.yaml")):
        return files
    raise EvomergeError(f"{folder}: has no task files (*.yaml)")


def check_task(lm_task: Any, config: TaskConfig, weight: float) -> Task:
    """Fill in the default metric and refuse metrics that the task does not have."""
    chat, multiturn = config.apply_chat_template, config.fewshot_as_multiturn
    task = Task(str(lm_task.config.task), weight, "", "", config.gold, lm_task, chat, multiturn, config.limit)
    metric = config.metric or (task.metrics[0] if task.metrics else "")
    allowed = list(dict.fromkeys([*task.metrics, *task.smooth]))
    for key, name in (("metric", metric), ("objective", config.objective or metric)):
        plain, _, filter_name = name.partition(",")
        if plain not in allowed or (filter_name and filter_name not in task.filters):
            raise EvomergeError(f"task {task.name}: {key} {name!r} is not one of its metrics: {', '.join(allowed)}")
    if config.gold and task.kind == "multiple_choice":
        raise EvomergeError(f"task {task.name}: `gold` is for generation; a multiple-choice task knows its gold choice")
    task.metric, task.objective = metric, config.objective or metric
    return task


def prepare_libraries() -> None:
    """lm-eval and datasets report every step; here a person sees one progress bar.

    And lm-eval compiles a template for each document, whenever it is scored: a millisecond, more than its forward on
    a small model.  A compiled template is kept.
    """
    import datasets
    from lm_eval import utils

    if not hasattr(utils.env.from_string, "cache_info"):
        utils.env.from_string = lru_cache(maxsize=1024)(utils.env.from_string)

    datasets.disable_progress_bars()
    for name in ("lm_eval", "lm-eval", "datasets", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def load_file(path: Path, allow_code: bool = False) -> list[Any]:
    """The task in a YAML file.  Data files that it names count from the YAML's own folder.

    allow_code: whether it may name Python functions, which lie beside it, and scripts of metrics.

    EvomergeError if the file or its data are missing or broken, or if it wants to run Python code.
    """
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    prepare_libraries()
    if not path.is_file():
        raise EvomergeError(f"{path}: no such task file")
    if not allow_code:
        refuse_code(path, seen=set())
    try:
        content = load_yaml(path, resolve_func=allow_code)
    except (ValueError, OSError, yaml.YAMLError, ImportError, AttributeError) as error:
        raise EvomergeError(f"{path}: not a task file ({error})") from error
    if "task" not in content or not isinstance(content["task"], str):
        raise EvomergeError(f"{path}: has no `task:` name")
    if not allow_code:
        refuse_metric_scripts(content, path)
    kwargs = content.get("dataset_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise EvomergeError(f"{path}: dataset_kwargs must be a mapping, found {kwargs!r}")
    if kwargs.get("data_files") is not None:
        content["dataset_kwargs"] = {**kwargs, "data_files": local_data(kwargs["data_files"], path)}
    try:
        loaded = TaskManager(include_defaults=False).load(content)
        return list(loaded["tasks"].values())
    except Exception as error:  # lm-eval and datasets raise whatever went wrong inside them
        raise EvomergeError(f"{path}: lm-eval cannot open this task ({reason(error)})") from error


def refuse_code(path: Path, seen: set[Path]) -> None:
    """A task file may name Python functions (`!function`); they are not run."""
    if path in seen:
        raise EvomergeError(f"{path}: includes itself")
    seen.add(path)
    try:
        content = read_yaml(path)
    except EvomergeError as error:
        if "!function" in str(error.__cause__):
            raise EvomergeError(f"{path}: runs Python code (`!function`); {ALLOW}") from error
        raise
    if not isinstance(content, dict):
        raise EvomergeError(f"{path}: expected a mapping, found {type(content).__name__}")
    if "class" in content:
        raise EvomergeError(f"{path}: runs Python code (`class`); {ALLOW}")
    includes = content.get("include", [])
    for name in includes if isinstance(includes, list) else [includes]:
        refuse_code((path.parent / str(name)).resolve(), seen)


def refuse_metric_scripts(content: dict[str, Any], path: Path) -> None:
    """A metric that lm-eval does not have would be run as a script of Hugging Face's `evaluate`, local ones too."""
    import lm_eval.api.metrics  # noqa: F401 (fills the registry)
    from lm_eval.api.registry import metric_registry

    wanted = content.get("metric_list") or []
    for entry in wanted if isinstance(wanted, list) else [wanted]:
        name = entry.get("metric") if isinstance(entry, dict) else entry
        if not isinstance(name, str) or name not in metric_registry or entry.get("hf_evaluate"):
            raise EvomergeError(
                f"{path}: {name!r} is not one of lm-eval's own metrics; scripts of the `evaluate` library are not run"
            )


def local_data(data_files: Any, task_file: Path) -> Any:
    """Data file names as absolute paths.  EvomergeError if one is missing or is not one JSON object a line."""
    if isinstance(data_files, dict):
        return {split: local_data(files, task_file) for split, files in data_files.items()}
    if isinstance(data_files, list):
        return [local_data(file, task_file) for file in data_files]
    if "://" in str(data_files):
        return data_files
    path = task_file.parent / str(data_files)
    if not path.is_file():
        raise EvomergeError(f"{task_file}: its data file is missing: {path}")
    if path.suffix == ".jsonl":
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
            try:
                _ = not line or json.loads(line)
            except ValueError as error:
                raise EvomergeError(f"{path}: line {number} is not JSON ({error})") from error
    return str(path.resolve())


def load_named(name: str) -> list[Any]:
    """One of lm-eval's own tasks or groups.  EvomergeError with near names if there is none of that name."""
    from lm_eval.tasks import TaskManager

    prepare_libraries()
    manager = TaskManager()
    if name not in manager.task_index:
        near = difflib.get_close_matches(name, manager.task_index, n=3)
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise EvomergeError(
            f"task {name!r}: lm-eval has no task of that name{hint}. A task of your own is a path ending in .yaml"
        )
    try:
        return list(manager.load(name)["tasks"].values())
    except Exception as error:  # lm-eval and datasets raise whatever went wrong inside them
        raise EvomergeError(f"task {name!r}: lm-eval cannot open it ({reason(error)})") from error


def reason(error: BaseException) -> str:
    """What went wrong first; `datasets` wraps it in an error that says nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def items_of(task: Task, docs: Iterable[dict[str, Any]]) -> list[Item]:
    """Documents as items, in the data's order; a document that is there twice counts once."""
    found: dict[str, Item] = {}
    for doc in docs:
        content = json.dumps(doc, sort_keys=True, default=str, ensure_ascii=False)
        item = Item(hashlib.sha256(f"{task.name}\0{content}".encode()).hexdigest()[:16], doc)
        found.setdefault(item.id, item)
    return list(found.values())


def deal(task: Task, splits: SplitsConfig, seed: int) -> dict[Split, list[Item]]:
    """Deal a task's items to the three splits; no item is in two of them.

    Counts and shares are dealt from the split that lm-eval would evaluate, in the order of a seeded hash of the
    item, so the deal does not depend on the order of the data.  EvomergeError if there are too few items.
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
    pool.sort(key=lambda i: hashlib.sha256(f"{seed}\0{i.id}".encode()).hexdigest())
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
        del pool[:count]
    if empty := [name for name, items in dealt.items() if not items]:
        raise EvomergeError(f"task {task.name}: no item is left for the {empty[0]} split")
    return dealt


def own_split(task: Task, name: str) -> Iterable[dict[str, Any]]:
    """The documents of the task's own train, validation or test split."""
    docs = {"train": task.lm.training_docs, "validation": task.lm.validation_docs, "test": task.lm.test_docs}[name]()
    if docs is None:
        raise EvomergeError(f"task {task.name}: has no {name} split of its own; give a number of items instead")
    return islice(docs, task.limit)
