"""The playground: a live model that is asked and scored with any recipe, and recipes that are moved and saved."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.api.open_inputs import open_inputs
from evomerge.config.config_file import load_config
from evomerge.config.paths import pin
from evomerge.errors import EvomergeError
from evomerge.evaluate.workload import Workload
from evomerge.files.write import disk_errors
from evomerge.merge.recipe.recipe import Recipe, dump_recipe
from evomerge.play.answer import answer, prompt_of
from evomerge.play.controls import Controls
from evomerge.play.examples import Example, examples_of
from evomerge.play.live_model import LiveModel, recipe_name
from evomerge.play.presets import Presets, presets_of
from evomerge.search.agreements import refuse_task_code
from evomerge.search.evaluation.evaluator import Evaluator
from evomerge.search.evaluation.scale import with_first_objectives
from evomerge.search.evaluation.score_checks import finite_scores
from evomerge.search.run import open_run
from evomerge.search.space.space import build_space
from evomerge.search.storage.study import recorded_type

EXAMPLES = 8  # search items of each task that may be taken as prompts
REMEMBERED = 500  # answers and scores


@dataclass(frozen=True)
class Reply:
    """An answer to a prompt.

    recipe: the short name of the recipe that gave it.
    text: the answer.
    cut: whether it ends at the limit of new tokens.
    seconds: that it took, without the merge.
    """

    recipe: str
    text: str
    cut: bool
    seconds: float


@dataclass(frozen=True)
class QuickScore:
    """The mean scores of one task on a few search items.

    objective, metric: their names.  by_objective, by_metric: the means.
    """

    task: str
    items: int
    objective: str
    metric: str
    by_objective: float
    by_metric: float


class Playground:
    """The models of a run or a configuration, and one live model.

    name: of the run or the configuration.
    controls: what can be moved.
    evaluator: the worker's part of a search: bank, live model, engine, tasks.
    presets: the recipes to begin with.
    """

    def __init__(self, name: str, controls: Controls, evaluator: Evaluator, presets: Presets) -> None:
        self.name = name
        self.controls = controls
        self.live = LiveModel(evaluator)
        self.engine = evaluator.engine
        self.task_set = evaluator.task_set
        self.presets = presets
        self.replies: dict[tuple[object, ...], Reply] = {}
        self.scored: dict[tuple[str, int], list[QuickScore]] = {}
        self.work: dict[int, list[Workload]] = {}

    def ask(self, recipe: Recipe, text: str, chat: bool = False, stop: str = "", limit: int = 64) -> Reply:
        """The answer of a recipe to a prompt.  The arguments: see `answer.prompt_of`.

        An answer that was given before is remembered.
        """
        key = (recipe_name(recipe), text, chat, stop, limit)
        if (known := self.replies.get(key)) is not None:
            return known
        prompt = prompt_of(self.engine, text, chat, stop, limit)
        with self.live.holding(recipe) as merged:
            started = time.perf_counter()
            words, cut = answer(self.engine, prompt, self.live.check)
            reply = Reply(merged.recipe, words, cut, time.perf_counter() - started)
            remember(self.replies, key, reply)
        return reply

    def score(self, recipe: Recipe, items: int) -> list[QuickScore]:
        """Score a recipe on the first items of each task's search split, by objective and metric."""
        key = (recipe_name(recipe), items)
        if (known := self.scored.get(key)) is not None:
            return known
        found = []
        with self.live.holding(recipe):
            clock = self.live.clock()
            for work in self.workloads(items):
                task, values = work.task, self.engine.score(work, clock)
                means = (float(np.mean(finite_scores(task, m, values))) for m in (task.objective, task.metric))
                found.append(QuickScore(task.name, len(work.items), task.objective, task.metric, *means))
            remember(self.scored, key, found)
        return found

    def workloads(self, items: int) -> list[Workload]:
        """The first items of each task's search split, ready to be scored by every metric."""
        with self.live.lock:
            if items not in self.work:
                tasks = self.task_set.tasks
                chosen = [(t, self.task_set.items[t.name]["search"][:items]) for t in tasks]
                self.work[items] = [self.engine.prepare(t, found, everything=True) for t, found in chosen]
            return self.work[items]

    @cached_property
    def examples(self) -> list[Example]:
        """Some search items as prompts."""
        return examples_of(self.engine, self.workloads(EXAMPLES))

    @property
    def has_chat_template(self) -> bool:
        return self.engine.tokenizer.chat_template is not None


def open_playground(target: Path, log: Callable[[str], None] = print) -> Playground:
    """Open the models, the tasks and the presets of a run or a configuration.

    target: a run folder, or a configuration file.
    log: gets lines about what happens.

    EvomergeError if it is neither, or a model or task cannot be opened.
    """
    run = None if target.is_file() else open_run(target)
    if run is None:
        config = pin(load_config(target), {})
    else:
        config = run.config()
        refuse_task_code(run, config)
        config = pin(config, config.hub)
        with suppress(EvomergeError):  # models and tasks can be opened although the study's database is not there
            study = run.study()
            config = with_first_objectives(study, config)
            if config.compute_dtype == "auto" and (computing := recorded_type(study.user_attrs)):
                config = config.model_copy(update={"compute_dtype": computing})
    opened = open_inputs(config, show=True)
    if all(task.is_python for task in opened.task_set.tasks):
        raise EvomergeError(f"{target}: has Python tasks alone; the playground asks a language model")
    space = build_space(config, opened.models)
    presets = presets_of(space, run)
    evaluator = Evaluator(config, opened.models, opened.task_set, log=log, cache=run.folder / "cache" if run else None)
    return Playground(str(target), Controls(space, evaluator.bank), evaluator, presets)


def remember(known: dict[Any, Any], key: object, value: object) -> None:
    """Keep a value, and forget the oldest one where there are many."""
    if len(known) >= REMEMBERED:
        known.pop(next(iter(known)))
    known[key] = value


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe to a new file.  EvomergeError if the file exists, or cannot be written."""
    try:
        with disk_errors(path), path.open("x", encoding="utf-8") as file:
            file.write(dump_recipe(recipe))
    except FileExistsError as error:
        raise EvomergeError(f"{path}: exists already; choose another name") from error
    except (FileNotFoundError, IsADirectoryError, ValueError) as error:
        raise EvomergeError(f"{path}: cannot be written; name a new file in a folder that exists") from error
