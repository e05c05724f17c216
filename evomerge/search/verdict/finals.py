"""The end of a search: finalists and baselines on the selection split, then the chosen ones on the holdout split."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from evomerge.errors import EvomergeError
from evomerge.evaluate.tasks import Split
from evomerge.files import write_text
from evomerge.merge.recipe.recipe import Recipe, dump_recipe
from evomerge.search.evaluation.stored_evaluations import Evaluations, digest
from evomerge.search.evaluation.task_set import Scores, TaskSet
from evomerge.search.run import Run
from evomerge.search.samplers.cmaes import CmaEsSampler
from evomerge.search.space.baselines import Baseline, base_alone, distinct, model_key
from evomerge.search.space.greedy_soup import GreedySoup
from evomerge.search.storage.study import SearchStudy, rank
from evomerge.search.verdict.intervals import intervals, mean_score, score_range
from evomerge.search.verdict.verdict import Rival, Verdict, judge
from evomerge.search.workers.pool import run_all

FINALISTS = 5


async def search_score(study: SearchStudy, evaluations: Evaluations, baseline: Baseline) -> float:
    """A baseline's objective on the search split: its trial's, or the stored evaluations's if it has no trial (yet).

    Minus infinity if the model is broken: a failed trial, a score that is not finite.
    """
    if baseline.point is not None and (trial := study.of_baseline(baseline.name)) is not None:
        return -float("inf") if trial.value is None else trial.value
    try:
        scores = await evaluations.score("search", baseline.recipe, f"baseline {baseline.name}")
    except ArithmeticError:
        return -float("inf")
    return evaluations.task_set.mean(scores, "objective")


@dataclass(frozen=True)
class Finalist:
    """A model that is scored on the selection split.

    kind: a baseline's, or `candidate` for one that the search found.  trial: its number, None if it has none.
    """

    name: str
    kind: str
    trial: int | None
    recipe: Recipe


@dataclass(frozen=True)
class Selected:
    """A finalist with its mean scores on the selection split."""

    finalist: Finalist
    metric: float
    objective: float


def finalists(study: SearchStudy, rivals: Sequence[Baseline]) -> list[Finalist]:
    """The best candidates of the search by objective, and the mean of its distribution; none that is a baseline."""
    space = study.space
    complete = sorted((t for t in study.complete if "baseline" not in t.user_attrs), key=rank, reverse=True)
    found = [Finalist(f"trial {t.number}", "candidate", t.number, space.recipe(t.params)) for t in complete[:FINALISTS]]
    sampler = study.sampler(len(study.trials))
    if isinstance(sampler, CmaEsSampler) and (mean := sampler.mean(study.mirror)) is not None:
        found.append(Finalist("mean of the search distribution", "candidate", None, space.recipe(mean)))
    seen = {model_key(rival.recipe, space.layers) for rival in rivals}
    unique: dict[object, Finalist] = {}
    for finalist in found:
        unique.setdefault(model_key(finalist.recipe, space.layers), finalist)
    return [finalist for key, finalist in unique.items() if key not in seen]


async def finish(
    run: Run, study: SearchStudy, evaluations: Evaluations, known: list[Baseline], soup: GreedySoup
) -> Verdict:
    """Choose on the selection split, judge on the holdout split, write verdict.json and recommended.yaml.

    known: every baseline, the greedy soup's included.  The candidate that is best on the selection split meets the
    base, every parent, the blends and the best of the recommended recipes on the holdout split; the baseline that is
    best on the selection split comes first among them.  EvomergeError if nothing can be scored.
    """
    task_set, seed = evaluations.task_set, study.space.config.seed
    baselines = distinct([base_alone(study.space), *known], study.space.layers)
    searched = finalists(study, baselines)
    standing = [Finalist(b.name, b.kind, study.baselines.get(b.name), b.recipe) for b in baselines]
    selected = await select(run, evaluations, [*searched, *standing])
    if not selected:
        raise EvomergeError("no model could be scored on the selection split; the run's log.txt says why")
    candidates = [s for s in selected if s.finalist.kind == "candidate"]
    chosen = (candidates or selected)[0].finalist
    others = [s.finalist for s in selected if s.finalist.kind != "candidate" and s.finalist is not chosen]
    meets = without_weaker_recipes(others)
    chosen_scores, *their_scores = await run_all(
        *(attempt(run, evaluations, "holdout", f.name, f.recipe) for f in (chosen, *meets))
    )
    if chosen_scores is None:
        raise EvomergeError(f"{chosen.name} was chosen, but is broken on the holdout items; the run's log.txt says why")
    judged = {f.name: (f, scores) for f, scores in zip(meets, their_scores, strict=True) if scores is not None}
    metrics = {task.name: task.metric for task in task_set.tasks}
    verdict = judge(
        task_set.scores_of(chosen_scores, "metric"),
        [Rival(f.name, f.kind, task_set.scores_of(scores, "metric")) for f, scores in judged.values()],
        metrics,
        task_set.weights,
        seed,
        stand_in=None if candidates else chosen.name,
    )
    recipes = {chosen.name: chosen.recipe} | {f.name: f.recipe for f, _ in judged.values()} | {"winner": chosen.recipe}
    shown = {"winner": chosen_scores} | {name: scores for name, (_, scores) in judged.items()}
    uses = int(study.stored.user_attrs.get("holdout_uses", 0)) + (0 if seen_before(run, chosen.recipe) else 1)
    study.stored.set_user_attr("holdout_uses", uses)
    content = verdict.as_dict() | {
        "chosen": {"name": chosen.name, "trial": chosen.trial, "recipe": digest(chosen.recipe)},
        "finalists": [
            {
                "name": s.finalist.name,
                "kind": s.finalist.kind,
                "trial": s.finalist.trial,
                "selection_metric": s.metric,
                "selection_objective": s.objective,
            }
            for s in selected
        ],
        "holdout": task_tables(task_set, shown, seed),
        "holdout_uses": uses,
        "greedy_soup": soup.sentence,
        "tasks": {
            t.name: {
                "metric": t.metric,
                "objective": t.objective,
                "weight": t.weight,
                "items": {split: len(items) for split, items in task_set.items[t.name].items()},
                "code": t.code,
            }
            for t in task_set.tasks
        },
    }
    write_text(run.recommended_file, dump_recipe(recipes[verdict.recommended]))
    write_text(run.folder / "winner.yaml", dump_recipe(chosen.recipe))
    write_text(run.verdict_file, json.dumps(content, indent=2) + "\n")
    run.log(verdict.sentence)
    return verdict


async def select(run: Run, evaluations: Evaluations, among: Sequence[Finalist]) -> list[Selected]:
    """Models with their scores on the selection split, the best first: by metric, equal ones by objective.

    Equal ones stay in the order given; what is broken is left out.
    """
    task_set = evaluations.task_set
    tables = await run_all(*(attempt(run, evaluations, "selection", f.name, f.recipe) for f in among))
    found = [
        Selected(finalist, task_set.mean(scores, "metric"), task_set.mean(scores, "objective"))
        for finalist, scores in zip(among, tables, strict=True)
        if scores is not None
    ]
    return sorted(found, key=lambda s: (-s.metric, -s.objective))


def without_weaker_recipes(ranked: Sequence[Finalist]) -> list[Finalist]:
    """Baselines, the best first, with only the best of the recommended recipes."""
    recommended = [f for f in ranked if f.kind == "recommended"]
    return [f for f in ranked if f not in recommended[1:]]


async def attempt(run: Run, evaluations: Evaluations, split: Split, name: str, recipe: Recipe) -> Scores | None:
    """A recipe's scores, None if its model is broken on these items; the others go on without it."""
    try:
        return await evaluations.score(split, recipe, f"{split}: {name}")
    except ArithmeticError as error:
        run.log(f"{name} is left out, it is broken on the {split} items: {error}")
        return None


def seen_before(run: Run, recipe: Recipe) -> bool:
    """Whether the holdout items have already judged this very recipe (a repeated `resume` looks at nothing new)."""
    try:
        previous = run.verdict()
    except EvomergeError:
        return False
    return previous is not None and previous["chosen"].get("recipe") == digest(recipe)


def task_tables(
    task_set: TaskSet, models: Mapping[str, Scores], seed: int
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Per model and task: the metric with its interval and the mean objective."""
    tables: dict[str, dict[str, dict[str, float | None]]] = {name: {} for name in models}
    for task in task_set.tasks:
        own = [{task.name: scores[task.name][task.metric]} for scores in models.values()]
        ranges = {task.name: score_range(task.metric, [table[task.name] for table in own])}
        found = intervals(own, ranges, {task.name: 1.0}, seed)
        for (name, scores), span in zip(models.items(), found, strict=True):
            objective = mean_score({task.name: scores[task.name][task.objective]}, {task.name: 1.0})
            tables[name][task.name] = {**asdict(span), "objective": objective}
    return tables
