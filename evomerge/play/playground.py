"""The live model of a playground: any recipe of the models is merged into it, asked, scored and saved.

One model lies in memory, and several tabs of a browser may move it.  So everything that needs it takes the lock, makes
sure that its own recipe is merged, and says which recipe that was.
"""

import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evomerge.api.open_inputs import open_inputs
from evomerge.config.config_file import load_config
from evomerge.config.paths import pin
from evomerge.device import free_memory
from evomerge.errors import EvomergeError
from evomerge.evaluate.answers import gold_of
from evomerge.evaluate.clock import Clock
from evomerge.evaluate.item_values import MetricFailed
from evomerge.evaluate.loglikelihood import NotFiniteScore
from evomerge.evaluate.workload import Workload
from evomerge.files import disk_errors
from evomerge.merge.materialise import NotFinite
from evomerge.merge.recipe.recipe import Recipe, dump_recipe
from evomerge.play.answer import answer, in_chat, prompt_of
from evomerge.play.presets import Presets, presets_of
from evomerge.play.sliders import SHOWN, Moves, Slider, moved, shown_methods, shown_value, sliders, with_method
from evomerge.search.agreements import refuse_task_code
from evomerge.search.evaluation.evaluator import Evaluator
from evomerge.search.evaluation.scale import with_first_objectives
from evomerge.search.evaluation.score_checks import finite_scores
from evomerge.search.run import open_run
from evomerge.search.space.config_recipe import config_source
from evomerge.search.space.space import Space, build_space, changed_components
from evomerge.search.storage.study import recorded_type
from evomerge.sources.tensor_names import tensor_role

EXAMPLES = 8  # search items of each task that may be taken as prompts
REMEMBERED = 500  # answers and scores


@dataclass(frozen=True)
class Merged:
    """A recipe in the live model.

    recipe: its short name, see `recipe_name`.
    seconds: that the merge took; 0 if the live model held it already.
    """

    recipe: str
    seconds: float


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


@dataclass(frozen=True)
class Example:
    """A search item as a prompt.

    prompt: as the model sees it, with examples and chat template; with `chat` without the template.
    gold: the right answer.
    chat, stop, limit: see `prompt_of`.
    """

    task: str
    prompt: str
    gold: str
    chat: bool
    stop: str
    limit: int


class Closed(Exception):
    """The playground was closed while it worked."""


class Playground:
    """The models of a run or a configuration, and one live model.

    name: of the run or the configuration.
    space: the search space.
    evaluator: the worker's part of a search: bank, live model, engine, tasks.
    presets: the recipes to begin with.
    """

    def __init__(self, name: str, space: Space, evaluator: Evaluator, presets: Presets) -> None:
        self.name = name
        self.space = space
        self.evaluator = evaluator
        self.presets = presets
        self.engine = evaluator.engine
        self.everyone = [config_source(source) for source in space.config.sources]
        self.sources = [source.name for source in self.everyone]
        tensors = evaluator.bank.layout.tensors.items()
        self.places = [(tensor_role(n), math.prod(t.shape)) for n, t in tensors if t.dtype.is_floating_point]
        self.layers = evaluator.bank.layers
        changed = changed_components(evaluator.bank.models)
        self.reach = {n: {part.split(".")[0] for part in parts} - {*space.keep} for n, parts in changed.items()}
        self.lock = threading.RLock()
        self.held: str | None = None
        self.replies: dict[tuple[object, ...], Reply] = {}
        self.scored: dict[tuple[str, int], list[QuickScore]] = {}
        self.work: dict[int, list[Workload]] = {}
        self.closed = False
        evaluator.check = self.check

    # --- What can be moved ---

    @property
    def methods(self) -> list[str]:
        """The methods with sliders that these sources allow."""
        return shown_methods(len(self.sources), all(s.statistics for s in self.everyone))

    def movable(self, recipe: Recipe) -> bool:
        """Whether a recipe has sliders: one that takes whole layers of its sources has none."""
        return self.space.assembly is None and not recipe.slices

    def sliders(self, recipe: Recipe, split: bool) -> list[Slider]:
        """The sliders of a recipe.  split: one for each group of components."""
        return sliders(recipe.method, self.sources, self.reach, split) if self.movable(recipe) else []

    def shown(self, recipe: Recipe, slider: Slider) -> float:
        """Where a slider stands for a recipe, with two decimals."""
        return shown_value(recipe, slider, self.places, self.layers)

    def bounds(self, recipe: Recipe, slider: Slider) -> tuple[float, float]:
        """Both ends of a slider: what the search may propose, and where the slider stands, lie between them."""
        own = [self.shown(recipe, slider)]
        own += [
            x for g in self.space.groups if (g.knob, g.source) == (slider.knob, slider.source) for x in (g.low, g.high)
        ]
        return min(0.0, *own), max(SHOWN[slider.knob], *own)

    def moved(self, recipe: Recipe, moves: Moves) -> Recipe:
        """The recipe after these moves, see `sliders.moved`."""
        return moved(recipe, moves, self.everyone, self.places, self.layers)

    def with_method(self, recipe: Recipe, method: str) -> Recipe:
        """The recipe with another method, see `sliders.with_method`."""
        return with_method(recipe, method, self.everyone)

    def summary(self, recipe: Recipe) -> str:
        """A recipe in a few words: its method and the mean weight of each source."""
        if "weight" not in dict.fromkeys(s.knob for s in self.sliders(recipe, split=False)):
            return recipe.method
        weights = ((s, Slider("weight", s)) for s in self.sources)
        return f"{recipe.method}, " + ", ".join(f"{s} {self.shown(recipe, slider):g}" for s, slider in weights)

    # --- The live model ---

    def check(self) -> None:
        """Called between tensors, batches and tokens.  Closed if the playground has been closed."""
        if self.closed:
            raise Closed

    @contextmanager
    def live(self, recipe: Recipe) -> Iterator[Merged]:
        """Within the context, the live model holds this recipe and belongs to this caller alone.

        EvomergeError if the recipe gives no usable model.
        """
        name = recipe_name(recipe)
        with self.lock:
            try:
                started = time.perf_counter()
                if new := self.held != name:
                    self.held = None
                    self.evaluator.materialise(recipe, Clock(self.check, device=self.evaluator.bank.live_device))
                    self.held = name
                yield Merged(name, time.perf_counter() - started if new else 0.0)
            except (NotFinite, NotFiniteScore, MetricFailed) as error:
                raise EvomergeError(f"this recipe gives no usable model: {error}") from error
            except (torch.OutOfMemoryError, MemoryError) as error:
                free_memory(self.evaluator.bank.live_device)
                raise EvomergeError("out of memory; close other programs, or set `device: cpu`") from error

    def merge(self, recipe: Recipe) -> Merged:
        """Merge a recipe into the live model, unless it holds it already."""
        with self.live(recipe) as merged:
            return merged

    def ask(self, recipe: Recipe, text: str, chat: bool = False, stop: str = "", limit: int = 64) -> Reply:
        """The answer of a recipe to a prompt.  The arguments: see `prompt_of`.

        An answer that was given before is remembered.
        """
        key = (recipe_name(recipe), text, chat, stop, limit)
        if (known := self.replies.get(key)) is not None:
            return known
        prompt = prompt_of(self.engine, text, chat, stop, limit)
        with self.live(recipe) as merged:
            started = time.perf_counter()
            words, cut = answer(self.engine, prompt, self.check)
            reply = Reply(merged.recipe, words, cut, time.perf_counter() - started)
            remember(self.replies, key, reply)
        return reply

    def score(self, recipe: Recipe, items: int) -> list[QuickScore]:
        """Score a recipe on the first items of each task's search split, by objective and metric."""
        key = (recipe_name(recipe), items)
        if (known := self.scored.get(key)) is not None:
            return known
        found = []
        with self.live(recipe):
            clock = Clock(self.check, device=self.evaluator.bank.live_device)
            for work in self.workloads(items):
                task, values = work.task, self.engine.score(work, clock)
                means = (float(np.mean(finite_scores(task, m, values))) for m in (task.objective, task.metric))
                found.append(QuickScore(task.name, len(work.items), task.objective, task.metric, *means))
            remember(self.scored, key, found)
        return found

    def workloads(self, items: int) -> list[Workload]:
        """The first items of each task's search split, ready to be scored by every metric."""
        with self.lock:
            if items not in self.work:
                tasks = self.evaluator.task_set.tasks
                chosen = [(t, self.evaluator.task_set.items[t.name]["search"][:items]) for t in tasks]
                self.work[items] = [self.engine.prepare(t, found, everything=True) for t, found in chosen]
            return self.work[items]

    @cached_property
    def examples(self) -> list[Example]:
        """Some search items as prompts."""
        found = []
        end = self.engine.lm.tok_decode(self.engine.lm.eot_token_id, skip_special_tokens=False)
        for work in self.workloads(EXAMPLES):
            if work.task.is_python or work.task.kind == "loglikelihood_rolling":
                continue  # it has no prompts
            for asked in work.items:
                stop, limit = "\n", 32
                if asked.prompts:
                    limit = asked.prompts[0].limit
                    stop = next((s for s in asked.prompts[0].until if s != end), "")
                prompt, question = str(asked.instances[0].args[0]), str(work.task.lm.doc_to_text(asked.item.doc))
                chat = work.task.chat and in_chat(self.engine, question) == prompt
                gold = gold_of(work.task, asked.item)
                found.append(Example(work.task.name, question if chat else prompt, gold, chat, stop, limit))
        return found

    @property
    def has_chat_template(self) -> bool:
        return self.engine.tokenizer.chat_template is not None

    def close(self) -> None:
        """Let work that goes on end at its next tensor, batch or token."""
        self.closed = True


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
    return Playground(str(target), space, evaluator, presets)


def remember(known: dict[Any, Any], key: object, value: object) -> None:
    """Keep a value, and forget the oldest one where there are many."""
    if len(known) >= REMEMBERED:
        known.pop(next(iter(known)))
    known[key] = value


def recipe_name(recipe: Recipe) -> str:
    """A short name that differs between recipes: the first digits of a hash of the recipe's file."""
    return hashlib.sha256(dump_recipe(recipe).encode()).hexdigest()[:8]


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe to a new file.  EvomergeError if the file exists, or cannot be written."""
    try:
        with disk_errors(path), path.open("x", encoding="utf-8") as file:
            file.write(dump_recipe(recipe))
    except FileExistsError as error:
        raise EvomergeError(f"{path}: exists already; choose another name") from error
    except (FileNotFoundError, IsADirectoryError, ValueError) as error:
        raise EvomergeError(f"{path}: cannot be written; name a new file in a folder that exists") from error
