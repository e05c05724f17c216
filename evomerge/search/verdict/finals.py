"""The finals: what a search has found is chosen, judged and written down.

    search split     every trial and every baseline was scored here; the finalists are taken by it (finalists.py)
    selection split  the candidate of the verdict is chosen, and the baseline that is recommended if it does not win:
                     the one with the best metric here (selection.py)
    holdout split    the candidate against the base and the other baselines, once: the verdict (verdict.py).  A
                     candidate that does not keep every guard here (guards.py) is no winner

The three splits have no item in common, so no score that a choice was made by is used to judge the choice.
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from evomerge.errors import EvomergeError
from evomerge.files.write import write_text
from evomerge.merge.recipe.recipe import Recipe, dump_recipe
from evomerge.search.evaluation.stored_evaluations import Evaluations, digest
from evomerge.search.evaluation.task_set import Scores, TaskSet
from evomerge.search.run import Run
from evomerge.search.space.baselines import Baseline, base_alone, distinct, reference
from evomerge.search.space.greedy_soup import GreedySoup
from evomerge.search.storage.step_record import step_records
from evomerge.search.storage.study import SearchStudy
from evomerge.search.verdict.choices import write_finalists
from evomerge.search.verdict.finalists import Finalist, finalists_of
from evomerge.search.verdict.guards import judge_guard
from evomerge.search.verdict.next_step import next_step
from evomerge.search.verdict.selection import Selection, choose_candidate, reference_scores, score_or_none
from evomerge.search.verdict.verdict import Rival, Verdict, judge
from evomerge.search.verdict.verdict_file import verdict_content
from evomerge.search.workers.pool import run_all

JUDGED = "holdout_uses"  # attribute of the study: digests of the recipes that the holdout items have judged


@dataclass(frozen=True)
class Judged:
    """The candidate and the baselines on the holdout split.

    candidate: the candidate's scores.
    rivals: name -> a baseline and its scores; without those that are broken there.
    """

    selection: Selection
    candidate: Scores
    rivals: dict[str, tuple[Finalist, Scores]]
    verdict: Verdict


async def finish(
    run: Run, study: SearchStudy, evaluations: Evaluations, known: list[Baseline], soup: GreedySoup
) -> Verdict:
    """Choose on the selection split, judge on the holdout split, write the results' files (run.py).

    known: every baseline, the greedy soup among them.
    soup: how the greedy soup was made, for the report.

    Raises EvomergeError if no model can be scored on the selection split, or if the chosen one is broken on the
    holdout split.
    """
    space = study.space
    finalists = finalists_of(study, distinct([base_alone(space), *known], space.layers))
    references = {guard.of: reference(space, known, guard.of).recipe for guard in evaluations.task_set.guards}
    selection = await choose_candidate(space, evaluations, finalists, references)
    judged = await judge_on_holdout(study, evaluations, selection, references)
    write_results(run, study, evaluations.task_set, judged, soup)
    run.log(judged.verdict.sentence)
    return judged.verdict


async def judge_on_holdout(
    study: SearchStudy, evaluations: Evaluations, selection: Selection, references: Mapping[str, Recipe]
) -> Judged:
    """Score the candidate and its rivals on the holdout split, and compare them.

    references: the models that guards compare with, by name.

    EvomergeError if the candidate is broken there.
    """
    task_set, seed = evaluations.task_set, study.space.config.seed
    chosen, rivals = selection.chosen, selection.rivals
    evaluations.monitor.phase("judging: the chosen model and the baselines on the holdout items", 1 + len(rivals))
    scores, *rival_scores = await run_all(*(score_or_none(evaluations, "holdout", f) for f in (chosen, *rivals)))
    if scores is None:
        raise EvomergeError(f"{chosen.name} was chosen, but is broken on the holdout items; the run's log.txt says why")
    unguarded = await reference_scores(evaluations, "holdout", references)
    judged = {f.name: (f, s) for f, s in zip(rivals, rival_scores, strict=True) if s is not None}
    breaks = {s.finalist.name: s.breaks for s in selection.ranked}
    candidates = [t for t in study.finished if t.value is not None and "baseline" not in t.user_attrs]
    verdict = judge(
        task_set.scores_of(scores, "metric"),
        [Rival(f.name, f.kind, task_set.scores_of(s, "metric"), breaks[f.name]) for f, s in judged.values()],
        {task.name: task.metric for task in task_set.goals},
        task_set.weights,
        seed,
        stand_in=None if chosen.kind == "candidate" else chosen.name,
        searched=len(candidates) + len(step_records(study.stored.user_attrs)),
        guards=[
            judge_guard(g, unguarded[g.of], scores, seed, digest(references[g.of]) == digest(chosen.recipe))
            for g in task_set.guards
        ],
    )
    return Judged(selection, scores, judged, verdict)


def write_results(run: Run, study: SearchStudy, task_set: TaskSet, judged: Judged, soup: GreedySoup) -> None:
    """Write recipes, finalists and verdict into the run folder; the verdict last, it says that the others are there."""
    selection, verdict, config = judged.selection, judged.verdict, study.space.config
    chosen, rivals = selection.chosen, judged.rivals.items()
    content = verdict_content(
        verdict,
        {"name": chosen.name, "trial": chosen.trial, "recipe": digest(chosen.recipe)},
        [s.as_dict() for s in selection.ranked],
        {"winner": judged.candidate} | {name: scores for name, (_, scores) in rivals},
        count_use(run, study, digest(chosen.recipe)),
        soup.sentence,
        task_set,
        config.seed,
        next_step(verdict.outcome, config, len(study.finished)),
        selection.simplified,
    )
    recipes = {chosen.name: chosen.recipe} | {name: f.recipe for name, (f, _) in rivals} | {"winner": chosen.recipe}
    write_text(run.recommended_file, dump_recipe(recipes[verdict.recommended]))
    write_text(run.winner_file, dump_recipe(chosen.recipe))
    write_finalists(run.finalists_file, [s.entry(chosen) for s in selection.ranked])
    write_text(run.verdict_file, json.dumps(content, indent=2) + "\n")


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
