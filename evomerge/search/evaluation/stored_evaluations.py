"""Item scores of models that are not trials (baselines, soups, finalists), kept in the study; none is scored twice."""

import hashlib
from dataclasses import replace

import numpy as np
import optuna

from evomerge.evaluate.racing import Race
from evomerge.evaluate.signs import Signs
from evomerge.evaluate.tasks import Item, Split
from evomerge.merge.recipe.recipe import Recipe
from evomerge.search.budget.usage import Usage
from evomerge.search.evaluation.jobs import EvaluationJob, Failure, Outcome, TrialJob
from evomerge.search.evaluation.race_setup import RaceSetup
from evomerge.search.evaluation.scale import SCALE, Scale, scale_of
from evomerge.search.evaluation.task_set import Scores, TaskSet
from evomerge.search.monitor.monitor import Monitor
from evomerge.search.storage.answers import keep_answers
from evomerge.search.storage.item_scores import evaluation_key, evaluation_record, pack, rows_of_record, store_items
from evomerge.search.storage.trial_record import EvaluationRecord, Seconds
from evomerge.search.workers.pool import Pool

Known = dict[str, dict[str, dict[str, float]]]
"""Task -> metric -> item id -> its score."""


def digest(recipe: Recipe) -> str:
    """A hash that names a recipe: sixteen hexadecimal digits."""
    return hashlib.sha256(recipe.model_dump_json(exclude={"outputs"}).encode()).hexdigest()[:16]


class StoredEvaluations:
    """Reads the item scores of models that a study has stored."""

    def __init__(self, study: optuna.Study, task_set: TaskSet) -> None:
        self.study = study
        self.task_set = task_set
        self.scale = scale_of(study.user_attrs, task_set)
        self.names: dict[Split, str] = {}

    def known(self, split: Split, recipe: Recipe | str) -> Known:
        """The item scores of a recipe on a split that are in the study already.  recipe: or its digest."""
        attributes, name = self.study.user_attrs, recipe if isinstance(recipe, str) else digest(recipe)
        found: Known = {}
        for row in rows_of_record(attributes, evaluation_record(attributes, split, name), {}):
            found.setdefault(row["task"], {}).setdefault(row["metric"], {})[row["item"]] = row["score"]
        return found

    def items(self, split: Split) -> str:
        """The name under which the study keeps the ids of a split's items."""
        if split not in self.names:
            self.names[split] = store_items(self.study, self.task_set.split(split))
        return self.names[split]

    def signs(self, split: Split, recipe: Recipe) -> Signs | None:
        """What the canary saw of a recipe that is in the study; None if it was not asked."""
        return evaluation_record(self.study.user_attrs, split, digest(recipe)).signs

    def missing(self, split: Split, known: Known, everything: bool = False) -> dict[str, list[Item]]:
        """The items that lack a score which is needed on the split, by task.  everything: see `TaskSet.wanted`."""
        found = {}
        for task in self.task_set.tasks:
            tables = [
                known.get(task.name, {}).get(metric, {}) for metric in self.task_set.wanted(task, split, everything)
            ]
            found[task.name] = [i for i in self.task_set.items[task.name][split] if not all(i.id in t for t in tables)]
        return {task: items for task, items in found.items() if items}

    def stored(self, split: Split, recipe: Recipe | str) -> Scores | None:
        """The scores of a recipe that are needed on a split, None if the study does not have all of them.

        recipe: or its digest.
        """
        known = self.known(split, recipe)
        return None if self.missing(split, known) else self.arranged(split, known)

    def arranged(self, split: Split, known: Known) -> Scores:
        """Arrange scores in the order of the split's items; only metrics that every item has."""
        found: Scores = {}
        for task in self.task_set.tasks:
            ids = [i.id for i in self.task_set.items[task.name][split]]
            tables = known[task.name].items()
            found[task.name] = {m: [t[i] for i in ids] for m, t in tables if all(i in t for i in ids)}
        return found


class Evaluations(StoredEvaluations):
    """Item scores of models: those in the study are read, missing ones are computed by the pool's workers."""

    def __init__(self, study: optuna.Study, task_set: TaskSet, pool: Pool, monitor: Monitor) -> None:
        super().__init__(study, task_set)
        self.pool = pool
        self.monitor = monitor

    def keep_scale(self, scale: Scale) -> None:
        """Keep the scale of the study, once for all its trials."""
        self.study.set_user_attr(SCALE, scale.to_json())
        self.scale = scale

    async def score(
        self, split: Split, recipe: Recipe, name: str, everything: bool = False, canary: bool = False
    ) -> Scores:
        """The scores of a recipe that are needed on a split.

        name: of the model, kept with its scores.
        everything: by every metric, also on the search split.
        canary: also keep what the canary sees of the model, if it is scored now.

        ArithmeticError if the model is broken, RuntimeError if it cannot be scored for another reason.
        """
        known = self.known(split, recipe)
        if missing := self.missing(split, known, everything):
            ids = {task: [i.id for i in items] for task, items in missing.items()}
            count = sum(map(len, ids.values()))
            self.pool.log(f"scoring {recipe.method} {digest(recipe)} on {count} items of {split}")
            job = EvaluationJob(recipe, split, ids, everything, canary)
            result = await self.pool.run(job, f"{split}: {name}", self.monitor.step)
            if isinstance(result, Failure):
                raise result.error()
            keep_answers(self.monitor.run.answers_folder, digest(recipe), name, ids, result.answers)
            for task, metrics in result.scores.items():
                for metric, scores in metrics.items():
                    new = {i.id: score for i, score in zip(missing[task], scores, strict=True)}
                    known.setdefault(task, {}).setdefault(metric, {}).update(new)
            self.store(split, recipe, name, self.arranged(split, known), count, result)
        self.monitor.part()
        return self.arranged(split, known)

    async def score_in_race(self, recipe: Recipe, name: str, setup: RaceSetup, race: Race) -> None:
        """Score a recipe on the search split until a race stops it, and keep its scores.

        name: of the model, kept with its scores.

        ArithmeticError if the model is broken, RuntimeError if it cannot be scored for another reason.
        """
        self.pool.log(f"scoring {recipe.method} {digest(recipe)} on up to {len(setup.ceiling)} items of search")
        result = await self.pool.run(TrialJob(recipe, None, setup, race), f"search: {name}")
        if isinstance(result, Failure):
            raise result.error()
        count = sum(int(np.isfinite(next(iter(metrics.values()))).sum()) for metrics in result.scores.values())
        self.store("search", recipe, name, result.scores, count, result)

    def store(self, split: Split, recipe: Recipe, name: str, scores: Scores, count: int, result: Outcome) -> None:
        """Store scores in the study, in one write.

        name: of the model.
        scores: of all items that were ever scored; NaN for those that a race left out.
        count: how many were scored now.  result: of scoring those.
        """
        before = evaluation_record(self.study.user_attrs, split, digest(recipe))
        record = EvaluationRecord(
            name=before.name or name,
            items=self.items(split),
            scores={task: {metric: pack(s) for metric, s in metrics.items()} for task, metrics in scores.items()},
            signs=replace(result.signs, repeats=False) if result.signs else before.signs,
            scored=count,
            partial=None if result.estimate is None else result.estimate.fraction,
            seconds=Seconds(**result.seconds),
            used=(before.used or Usage()) + result.used,
            elapsed=self.monitor.stopwatch.elapsed,
        )
        self.study.set_user_attr(evaluation_key(split, digest(recipe)), record.to_json())
        self.monitor.add_used(result.used)
