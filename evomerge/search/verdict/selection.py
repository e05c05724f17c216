"""The selection split: the finalist with the best metric there becomes the candidate of the verdict.

If a baseline is better, nothing that was searched is a candidate, and that baseline takes its place.  With `simplify` a
simpler recipe takes the candidate's place if it is no worse than the margin allows (simplify.py).  What breaks a guard
here comes after all that break none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evomerge.errors import EvomergeError
from evomerge.evaluate.tasks import Split
from evomerge.merge.recipe.recipe import Recipe
from evomerge.search.evaluation.stored_evaluations import Evaluations
from evomerge.search.evaluation.task_set import Scores
from evomerge.search.space.space import Space
from evomerge.search.verdict.choices import Entry, Means
from evomerge.search.verdict.finalists import Finalist
from evomerge.search.verdict.simplify import simplify
from evomerge.search.workers.pool import run_all


@dataclass(frozen=True)
class Selected:
    """A finalist on the selection split.

    metric: the mean metric.
    value: that of the goals, see `scale.py`.
    tasks: the means of metric and value by task.
    drops: guard -> the reference's mean minus this model's.
    breaks: the guards whose drop is larger than they allow.
    """

    finalist: Finalist
    metric: float
    value: float
    tasks: dict[str, Means]
    drops: dict[str, float]
    breaks: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Its entry in verdict.json."""
        return {
            "name": self.finalist.name,
            "kind": self.finalist.kind,
            "trial": self.finalist.trial,
            "selection_metric": self.metric,
            "selection_value": self.value,
        } | ({"selection_drops": self.drops} if self.drops else {})

    def entry(self, chosen: Finalist) -> Entry:
        """Its entry in finalists.json.  chosen: the candidate of the verdict."""
        own = self.finalist
        return Entry(
            name=own.name,
            kind=own.kind,
            trial=own.trial,
            chosen=own is chosen,
            breaks=self.breaks,
            tasks=self.tasks,
            recipe=own.recipe.model_dump(mode="json"),
        )


@dataclass(frozen=True)
class Selection:
    """What the selection split decided.

    ranked: the finalists, the best first.
    chosen: the candidate of the verdict.
    simplified: what the candidate leaves out, in words; empty if it was not simplified.
    """

    ranked: list[Selected]
    chosen: Finalist
    simplified: str = ""

    @property
    def rivals(self) -> list[Finalist]:
        """The baselines that the candidate is compared with, the best first.

        Of the recipes that papers recommend (kind `recommended`) only the best takes part.
        """
        ranked = [s.finalist for s in self.ranked if s.finalist.kind != "candidate" and s.finalist is not self.chosen]
        recommended = [f for f in ranked if f.kind == "recommended"]
        return [f for f in ranked if f not in recommended[1:]]


async def choose_candidate(
    space: Space, evaluations: Evaluations, finalists: Sequence[Finalist], references: Mapping[str, Recipe]
) -> Selection:
    """Score the finalists on the selection split, and choose.

    references: the models that guards compare with, by name.

    EvomergeError if no model can be scored.
    """
    scores = await reference_scores(evaluations, "selection", references)
    evaluations.monitor.phase("judging: finalists and baselines on the selection items", len(finalists))
    ranked = await select(evaluations, finalists, scores)
    if not ranked:
        raise EvomergeError("no model could be scored on the selection split; the run's log.txt says why")
    if space.config.simplify is None or ranked[0].finalist.kind != "candidate":
        return Selection(ranked, ranked[0].finalist)
    evaluations.monitor.phase("judging: looking for a simpler recipe")
    selection = await simplest(space, evaluations, ranked, space.config.simplify, scores)
    evaluations.pool.log(selection.simplified or f"{selection.chosen.name} is not simplified")
    return selection


async def simplest(
    space: Space, evaluations: Evaluations, ranked: list[Selected], margin: float, references: Mapping[str, Scores]
) -> Selection:
    """The selection with the simplest recipe that is no worse than the margin allows in the candidate's place.

    ranked: the best first; the first is the candidate.
    references: the scores of the guards' references, by name.
    """
    best = ranked[0]
    for simple in await simplify(space, evaluations, best.finalist.recipe, margin, evaluations.pool.log):
        finalist = Finalist("simplified", "candidate", None, simple.recipe)
        tried = await select(evaluations, [finalist], references)
        keeps = tried and set(tried[0].breaks) <= set(best.breaks)
        if keeps and tried[0].metric >= least_metric(ranked, margin):
            both = sorted([*ranked, *tried], key=lambda s: (bool(s.breaks), -s.metric))
            return Selection(both, finalist, simple.sentence)
    return Selection(ranked, best.finalist)


async def select(
    evaluations: Evaluations, finalists: Sequence[Finalist], references: Mapping[str, Scores]
) -> list[Selected]:
    """The finalists with their scores on the selection split, the best first: by metric, those that break a guard last.

    references: the scores of the guards' references, by name.

    Of equal ones what was searched comes first, then what has the higher value; broken models are left out.
    """
    task_set = evaluations.task_set
    tables = await run_all(*(score_or_none(evaluations, "selection", f) for f in finalists))
    found = []
    for finalist, scores in zip(finalists, tables, strict=True):
        if scores is None:
            continue
        drops = {g.name: g.mean(references[g.of]) - g.mean(scores) for g in task_set.guards}
        breaks = [g.name for g in task_set.guards if drops[g.name] > g.max_drop]
        metric, value = task_set.mean(scores, "metric"), evaluations.scale.goals(scores)
        found.append(Selected(finalist, metric, value, task_means(evaluations, scores), drops, breaks))
    return sorted(found, key=lambda s: (bool(s.breaks), -s.metric, s.finalist.kind != "candidate", -s.value))


def task_means(evaluations: Evaluations, scores: Scores) -> dict[str, Means]:
    """The means of metric and value by task.  scores: of one model."""
    metrics, values = evaluations.task_set.scores_of(scores, "metric"), evaluations.scale.item_values(scores)
    tasks = evaluations.task_set.weights
    return {t: Means(metric=float(np.mean(metrics[t])), value=float(values[t].mean())) for t in tasks}


def least_metric(selected: Sequence[Selected], margin: float) -> float:
    """The metric that a simplified candidate needs: no loss beyond the margin, and no baseline is better.

    selected: the best first; the first is the candidate.  Baselines that break a guard do not count if it breaks none.
    """
    counting = [s for s in selected if selected[0].breaks or not s.breaks]
    return max([selected[0].metric - margin, *(s.metric for s in counting if s.finalist.kind != "candidate")])


async def reference_scores(
    evaluations: Evaluations, split: Split, references: Mapping[str, Recipe]
) -> dict[str, Scores]:
    """The scores of the guards' references on a split, by name.  EvomergeError if one cannot be scored there."""
    found = {}
    for name, recipe in references.items():
        try:
            found[name] = await evaluations.score(split, recipe, name)
        except ArithmeticError as error:
            raise EvomergeError(f"guards: {name} is broken on the {split} items: {error}") from error
    return found


async def score_or_none(evaluations: Evaluations, split: Split, finalist: Finalist) -> Scores | None:
    """The scores of a finalist on a split; None, and a line in the log, if it is broken on these items."""
    try:
        return await evaluations.score(split, finalist.recipe, finalist.name)
    except ArithmeticError as error:
        evaluations.pool.log(f"{finalist.name} is left out, it is broken on the {split} items: {error}")
        return None
