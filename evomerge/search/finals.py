"""The end of a search: finalists on the selection split, the chosen one on the holdout, the verdict on paper."""

import json
from dataclasses import dataclass

from optuna.trial import FrozenTrial

from evomerge.errors import EvomergeError
from evomerge.evaluate.tasks import Split
from evomerge.files import write_text
from evomerge.merge.recipe import Recipe, dump_recipe
from evomerge.search.baselines import Baseline
from evomerge.search.cma import CmaEsSampler
from evomerge.search.exam import Exam, Scores
from evomerge.search.ledger import Ledger, digest
from evomerge.search.run import Run
from evomerge.search.soup import GreedySoup
from evomerge.search.study import SearchStudy, rank
from evomerge.search.verdict import Verdict, interval, judge, mean_score, resampled_means
from evomerge.search.workers.pool import together

FINALISTS = 5


async def search_score(study: SearchStudy, ledger: Ledger, baseline: Baseline) -> float:
    """A baseline's objective on the search split: its trial's, or the ledger's if it has no trial (yet).

    Minus infinity if the model is broken: a failed trial, a score that is not finite.
    """
    if baseline.point is not None and (trial := study.of_baseline(baseline.name)) is not None:
        return -float("inf") if trial.value is None else trial.value
    try:
        scores = await ledger.score("search", baseline.recipe, f"baseline {baseline.name}")
    except ArithmeticError:
        return -float("inf")
    return ledger.exam.mean(scores, "objective")


@dataclass(frozen=True)
class Finalist:
    """A candidate for the win.  trial: its number, None for the mean of the search distribution."""

    name: str
    trial: int | None
    recipe: Recipe


def finalists(study: SearchStudy) -> list[Finalist]:
    """The best finished trials by objective, and the mean of the final search distribution."""
    complete = sorted(study.complete, key=rank, reverse=True)
    found = [Finalist(label(t), t.number, study.space.recipe(t.params)) for t in complete[:FINALISTS]]
    sampler = study.sampler(len(study.trials))
    if isinstance(sampler, CmaEsSampler) and (mean := sampler.mean(study.mirror)) is not None:
        found.append(Finalist("mean of the search distribution", None, study.space.recipe(mean)))
    unique: dict[str, Finalist] = {}
    for finalist in found:
        unique.setdefault(digest(finalist.recipe), finalist)
    return list(unique.values())


def label(trial: FrozenTrial) -> str:
    baseline = trial.user_attrs.get("baseline")
    return f"trial {trial.number}" + (f" ({baseline})" if baseline else "")


async def finish(run: Run, study: SearchStudy, ledger: Ledger, known: list[Baseline], soup: GreedySoup) -> Verdict:
    """Choose on the selection split, judge on the holdout split, write verdict.json and recommended.yaml.

    known: every baseline, the greedy soup's included.  EvomergeError if no finalist can be scored.
    """
    exam, seed = ledger.exam, study.space.config.seed
    found = finalists(study)
    tables = await together(*(attempt(run, ledger, "selection", f.name, f.recipe) for f in found))
    scored = [
        (exam.mean(scores, "metric"), exam.mean(scores, "objective"), finalist)
        for finalist, scores in zip(found, tables, strict=True)
        if scores is not None
    ]
    if not scored:
        raise EvomergeError("no finalist could be scored on the selection split; the run's log.txt says why")
    scored.sort(key=lambda s: (-s[0], -s[1]))
    chosen = scored[0][2]
    rivals = await holdout_baselines(study, ledger, known)
    chosen_scores, *others = await together(
        attempt(run, ledger, "holdout", chosen.name, chosen.recipe),
        *(attempt(run, ledger, "holdout", rival.name, rival.recipe) for rival in rivals),
    )
    if chosen_scores is None:
        raise EvomergeError(f"{chosen.name} was chosen, but is broken on the holdout items; the run's log.txt says why")
    judged = {r.name: (r.kind, scores) for r, scores in zip(rivals, others, strict=True) if scores is not None}
    verdict = judge(
        exam.of(chosen_scores, "metric"),
        {name: (kind, exam.of(scores, "metric")) for name, (kind, scores) in judged.items()},
        exam.weights,
        seed,
    )
    recipes = {rival.name: rival.recipe for rival in rivals} | {"winner": chosen.recipe}
    shown = {"winner": chosen_scores} | {name: scores for name, (_, scores) in judged.items()}
    uses = int(study.stored.user_attrs.get("holdout_uses", 0)) + (0 if seen_before(run, chosen.recipe) else 1)
    study.stored.set_user_attr("holdout_uses", uses)
    content = verdict.as_dict() | {
        "chosen": {"name": chosen.name, "trial": chosen.trial, "recipe": digest(chosen.recipe)},
        "finalists": [
            {"name": f.name, "trial": f.trial, "selection_metric": m, "selection_objective": o} for m, o, f in scored
        ],
        "holdout": {name: task_table(exam, scores, seed) for name, scores in shown.items()},
        "holdout_uses": uses,
        "greedy_soup": soup.sentence,
        "tasks": {
            t.name: {
                "metric": t.metric,
                "objective": t.objective,
                "weight": t.weight,
                "items": {split: len(items) for split, items in exam.items[t.name].items()},
                "code": t.code,
            }
            for t in exam.tasks
        },
    }
    write_text(run.recommended_file, dump_recipe(recipes[verdict.recommended]))
    write_text(run.folder / "winner.yaml", dump_recipe(chosen.recipe))
    write_text(run.verdict_file, json.dumps(content, indent=2) + "\n")
    run.log(verdict.sentence)
    return verdict


async def attempt(run: Run, ledger: Ledger, split: Split, name: str, recipe: Recipe) -> Scores | None:
    """A recipe's scores, None if its model is broken on these items; the others go on without it."""
    try:
        return await ledger.score(split, recipe, f"{split}: {name}")
    except ArithmeticError as error:
        run.log(f"{name} is left out, it is broken on the {split} items: {error}")
        return None


async def holdout_baselines(study: SearchStudy, ledger: Ledger, known: list[Baseline]) -> list[Baseline]:
    """Every parent, the uniform blend, the greedy soup, and the recommended recipe that did best in the search."""
    chosen = [b for b in known if b.kind != "recommended"]
    recommended = [b for b in known if b.kind == "recommended"]
    scores = await together(*(search_score(study, ledger, b) for b in recommended))
    return chosen + [b for _, b in sorted(zip(scores, recommended, strict=True), key=lambda s: -s[0])][:1]


def seen_before(run: Run, recipe: Recipe) -> bool:
    """Whether the holdout items have already judged this very recipe (a repeated `resume` looks at nothing new)."""
    try:
        previous = run.verdict()
    except EvomergeError:
        return False
    return previous is not None and previous["chosen"].get("recipe") == digest(recipe)


def task_table(exam: Exam, scores: Scores, seed: int) -> dict[str, dict[str, float]]:
    """Per task: the metric with its interval and the mean objective."""
    table = {}
    for task in exam.tasks:
        own = {task.name: scores[task.name][task.metric]}
        weights = {task.name: 1.0}
        span = interval(mean_score(own, weights), resampled_means(own, weights, seed))
        objective = mean_score({task.name: scores[task.name][task.objective]}, weights)
        table[task.name] = {"value": span.value, "low": span.low, "high": span.high, "objective": objective}
    return table
