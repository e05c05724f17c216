"""The finals: which models are scored on which split, and who is compared with whom.

    search split     every trial and every baseline was scored here; finalists are the five best trials by value, the
                     best by metric, learned points, the mean of the final search distribution, and with
                     `goals: pareto` trials along the front (front.py)
    selection split  the finalists, the base and every baseline: the finalist with the best metric becomes the chosen
                     candidate, unless a baseline is better; then nothing that was searched is a candidate, and that
                     baseline takes its place.  With `simplify` a simpler recipe takes the candidate's place if it is
                     no worse than the margin allows (simplify.py).  The baseline with the best metric is recommended
                     if the candidate does not win.  What breaks a guard here comes after all that break none
    holdout split    the chosen candidate against the base and every baseline, once: the verdict (verdict.py).  Of
                     the recipes that papers recommend (kind `recommended`) only the best of the selection split
                     takes part.  A candidate that does not keep every guard here (guards.py) is no winner

The three splits have no item in common, so no score that a choice was made by is used to judge the choice.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial

from evomerge.errors import EvomergeError
from evomerge.evaluate.tasks import Split
from evomerge.files.write import write_text
from evomerge.merge.recipe.recipe import Recipe, dump_recipe
from evomerge.search.evaluation.agreement import scored_models
from evomerge.search.evaluation.scale import SCALE, Scale
from evomerge.search.evaluation.stored_evaluations import Evaluations, digest
from evomerge.search.evaluation.task_set import Scores
from evomerge.search.run import Run
from evomerge.search.space.baselines import Baseline, base_alone, distinct, model_key, reference
from evomerge.search.space.greedy_soup import GreedySoup
from evomerge.search.storage.step_record import step_records
from evomerge.search.storage.study import SearchStudy, rank
from evomerge.search.storage.trial_record import LEARNED, WEIGHTS
from evomerge.search.verdict.choices import Entry, Means, write_finalists
from evomerge.search.verdict.front import front_of, spread_along
from evomerge.search.verdict.guards import judge_guard
from evomerge.search.verdict.next_step import next_step
from evomerge.search.verdict.simplify import simplify
from evomerge.search.verdict.verdict import Rival, Verdict, judge
from evomerge.search.verdict.verdict_file import verdict_content
from evomerge.search.workers.pool import run_all

JUDGED = "holdout_uses"  # attribute of the study: digests of the recipes that the holdout items have judged
FINALISTS = 5  # trials by value
ALONG_FRONT = 8  # trials of the front, at most


@dataclass(frozen=True)
class Finalist:
    """A model that is scored on the selection split.

    kind: a baseline's, or `candidate` for one that the search found.
    trial: its number; None if it has none.
    """

    name: str
    kind: str
    trial: int | None
    recipe: Recipe


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


async def finish(
    run: Run, study: SearchStudy, evaluations: Evaluations, known: list[Baseline], soup: GreedySoup
) -> Verdict:
    """Choose on the selection split, judge on the holdout split, write the results' files (run.py).

    known: every baseline, the greedy soup among them.
    soup: how the greedy soup was made, for the report.

    Raises EvomergeError if no model can be scored on the selection split, or if the chosen one is broken on the
    holdout split.
    """
    task_set, seed = evaluations.task_set, study.space.config.seed
    baselines = distinct([base_alone(study.space), *known], study.space.layers)
    found = searched_finalists(study, baselines)
    kinds = {"start": "candidate"}  # what an earlier search found is a candidate of this one
    found += [Finalist(b.name, kinds.get(b.kind, b.kind), study.baselines.get(b.name), b.recipe) for b in baselines]
    references = {guard.of: reference(study.space, known, guard.of).recipe for guard in task_set.guards}
    unguarded = await reference_scores(evaluations, "selection", references)
    evaluations.monitor.phase("judging: finalists and baselines on the selection items", len(found))
    selected = await select(run, evaluations, found, unguarded)
    if not selected:
        raise EvomergeError("no model could be scored on the selection split; the run's log.txt says why")

    candidates = [t for t in study.finished if t.value is not None and "baseline" not in t.user_attrs]
    searched = len(candidates) + len(step_records(study.stored.user_attrs))
    chosen, simplified = selected[0].finalist, ""
    if (margin := study.space.config.simplify) is not None and chosen.kind == "candidate":
        evaluations.monitor.phase("judging: looking for a simpler recipe")
        for simple in await simplify(study.space, evaluations, chosen.recipe, margin, run.log):
            finalist = Finalist("simplified", "candidate", None, simple.recipe)
            tried = await select(run, evaluations, [finalist], unguarded)
            keeps = tried and set(tried[0].breaks) <= set(selected[0].breaks)
            if keeps and tried[0].metric >= least_metric(selected, margin):
                chosen, simplified = tried[0].finalist, simple.sentence
                selected = sorted([*selected, *tried], key=lambda s: (bool(s.breaks), -s.metric))
                break
        run.log(simplified or f"{chosen.name} is not simplified")
    others = [s.finalist for s in selected if s.finalist.kind != "candidate" and s.finalist is not chosen]
    rivals = without_weaker_recipes(others)
    evaluations.monitor.phase("judging: the chosen model and the baselines on the holdout items", 1 + len(rivals))
    scores, *rival_scores = await run_all(
        *(score_or_none(run, evaluations, "holdout", f.name, f.recipe) for f in (chosen, *rivals))
    )
    if scores is None:
        raise EvomergeError(f"{chosen.name} was chosen, but is broken on the holdout items; the run's log.txt says why")

    unguarded = await reference_scores(evaluations, "holdout", references)
    guards = [
        judge_guard(g, unguarded[g.of], scores, seed, digest(references[g.of]) == digest(chosen.recipe))
        for g in task_set.guards
    ]
    breaks = {s.finalist.name: s.breaks for s in selected}
    judged = {f.name: (f, s) for f, s in zip(rivals, rival_scores, strict=True) if s is not None}
    verdict = judge(
        task_set.scores_of(scores, "metric"),
        [Rival(f.name, f.kind, task_set.scores_of(s, "metric"), breaks[f.name]) for f, s in judged.values()],
        {task.name: task.metric for task in task_set.goals},
        task_set.weights,
        seed,
        stand_in=None if chosen.kind == "candidate" else chosen.name,
        searched=searched,
        guards=guards,
    )

    uses = count_use(run, study, digest(chosen.recipe))
    content = verdict_content(
        verdict,
        {"name": chosen.name, "trial": chosen.trial, "recipe": digest(chosen.recipe)},
        [s.as_dict() for s in selected],
        {"winner": scores} | {name: s for name, (_, s) in judged.items()},
        uses,
        soup.sentence,
        task_set,
        seed,
        next_step(verdict.outcome, study.space.config, len(study.finished)),
        simplified,
    )
    recipes = {f.name: f.recipe for f in (chosen, *(f for f, _ in judged.values()))} | {"winner": chosen.recipe}
    write_text(run.recommended_file, dump_recipe(recipes[verdict.recommended]))
    write_text(run.winner_file, dump_recipe(chosen.recipe))
    write_finalists(run.finalists_file, [s.entry(chosen) for s in selected])
    write_text(run.verdict_file, json.dumps(content, indent=2) + "\n")
    run.log(verdict.sentence)
    return verdict


def searched_finalists(study: SearchStudy, baselines: Sequence[Baseline]) -> list[Finalist]:
    """The best candidates of the search by value and by metric, its learned points and the mean of its distribution.

    None of them makes the same model as a baseline.
    """
    space = study.space
    complete = sorted((t for t in study.complete if "baseline" not in t.user_attrs), key=rank, reverse=True)
    trials = [
        *complete[:FINALISTS],
        *best_by_metric(study, complete),
        *learned_points(complete),
        *along_front(study, complete),
    ]
    found = [Finalist(f"trial {t.number}", "candidate", t.number, space.recipe(t.params)) for t in trials]
    if (mean := study.distribution_mean()) is not None:
        found.append(Finalist("mean of the search distribution", "candidate", None, space.recipe(mean)))
    known = {model_key(baseline.recipe, space.layers) for baseline in baselines}
    unique: dict[object, Finalist] = {}
    for finalist in found:
        unique.setdefault(model_key(finalist.recipe, space.layers), finalist)
    return [finalist for key, finalist in unique.items() if key not in known]


def learned_points(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials of points that gradient steps by the search's own task weights led to."""
    return [t for t in trials if LEARNED in t.user_attrs and WEIGHTS not in t.user_attrs]


def best_by_metric(study: SearchStudy, ranked: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trial that is best by the metric on the search split, of those that were scored by it; empty if none was.

    ranked: the trials to choose among, the best by value first; it is chosen if several are equal.
    """
    models = scored_models(study.trials, attributes := study.stored.user_attrs)
    if not models:
        return []
    scale = Scale.from_json(attributes[SCALE])
    means = {m.trial: found[1] for m in models if (found := m.means(scale, list(scale.tasks))) is not None}
    known = [t for t in ranked if t.number in means]
    return [max(known, key=lambda t: means[t.number])] if known else []


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


def along_front(study: SearchStudy, ranked: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """With `goals: pareto` trials along the front, at most ALONG_FRONT; empty without.  ranked: the trials to take."""
    front = front_of(study.trials, study.stored.user_attrs) if study.space.config.goals == "pareto" else None
    if front is None:
        return []
    known = {t.number: t for t in ranked}
    members = [m for m in front.members if m.number in known]
    points = np.array([m.values for m in members])
    return [known[members[i].number] for i in spread_along(points, ALONG_FRONT)]


async def select(
    run: Run, evaluations: Evaluations, finalists: Sequence[Finalist], references: Mapping[str, Scores]
) -> list[Selected]:
    """The finalists with their scores on the selection split, the best first: by metric, those that break a guard last.

    references: the scores of the guards' references, by name.

    Of equal ones what was searched comes first, then what has the higher value; broken models are left out.
    """
    task_set = evaluations.task_set
    tables = await run_all(*(score_or_none(run, evaluations, "selection", f.name, f.recipe) for f in finalists))
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


def without_weaker_recipes(ranked: Sequence[Finalist]) -> list[Finalist]:
    """Baselines, the best first, with only the best of those of kind `recommended`."""
    recommended = [f for f in ranked if f.kind == "recommended"]
    return [f for f in ranked if f not in recommended[1:]]


async def score_or_none(run: Run, evaluations: Evaluations, split: Split, name: str, recipe: Recipe) -> Scores | None:
    """A recipe's scores on a split; None, and a line in the log, if its model is broken on these items."""
    try:
        return await evaluations.score(split, recipe, name)
    except ArithmeticError as error:
        run.log(f"{name} is left out, it is broken on the {split} items: {error}")
        return None


def count_use(run: Run, study: SearchStudy, judged: str) -> int:
    """Note in the study that the holdout items judge this recipe; how many different ones they have judged by now.

    The same number again however often a verdict that was broken off is begun anew.  judged: digest of the recipe.
    """
    known = study.stored.user_attrs.get(JUDGED, [])
    if isinstance(known, int):  # earlier versions kept the number alone; verdict.json tells the last one's recipe
        known = [*(f"earlier {k}" for k in range(known - 1)), last_judged(run) or judged]
    if judged not in known:
        study.stored.set_user_attr(JUDGED, [*known, judged])
    return len({*known, judged})


def last_judged(run: Run) -> str | None:
    """The digest of the recipe that verdict.json is about; None if it cannot be read."""
    with contextlib.suppress(EvomergeError):
        return None if (verdict := run.verdict()) is None else verdict["chosen"].get("recipe")
    return None
