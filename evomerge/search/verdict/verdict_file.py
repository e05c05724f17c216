"""verdict.json: what a search writes about its result, and the check of a file that is read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ValidationError

from evomerge.files.read import first_problem
from evomerge.search.verdict.guards import GuardResult
from evomerge.search.verdict.intervals import Interval, intervals, mean_score, score_range
from evomerge.search.verdict.verdict import Comparison, Outcome, Verdict

if TYPE_CHECKING:  # importing these takes seconds, which a reader of a run need not wait for
    from evomerge.search.evaluation.task_set import Scores, TaskSet


EARLIER = {
    "guard not kept": "worse",
    "nothing better found": "worse",
    "nothing to compare": "no difference shown",
}
"""Outcomes that earlier versions wrote, as they are called now."""


def present_outcome(value: Any) -> Any:
    """The present name of an outcome."""
    return EARLIER.get(value, value) if isinstance(value, str) else value


def have_names(finalists: list[Any]) -> list[Any]:
    """ValueError if a finalist has no name; entries of other kinds, of older versions, are left alone."""
    if any(not isinstance(f.get("name"), str) for f in finalists if isinstance(f, dict)):
        raise ValueError("a finalist has no name")
    return finalists


class JudgedBy(BaseModel):
    """One task of the search.

    items: split -> how many items.
    code: whether the task's file runs Python code of its own.
    """

    metric: str
    objective: str
    items: dict[str, int]
    code: bool = False


class VerdictFile(BaseModel):
    """The keys of verdict.json that reports and commands read.

    outcome to guards: see `Verdict`.
    next: the command that follows, see `next_step.py`; empty in older files.
    chosen: the candidate of the verdict: name, trial (None for the mean of the distribution), digest of its recipe.
    finalists: the models on the selection split, the best first.
    holdout: model -> task -> mean metric with its interval.
    holdout_uses: how many different candidates these holdout items have judged.
    """

    outcome: Annotated[Outcome, BeforeValidator(present_outcome)]
    winner: bool
    recommended: str
    sentence: str
    score: Interval
    comparisons: list[Comparison]
    detectable: float | None
    guards: list[GuardResult] = []
    next: str = ""
    chosen: dict[str, Any]
    finalists: Annotated[list[Any], AfterValidator(have_names)]
    holdout: dict[str, dict[str, Interval]]
    holdout_uses: int
    greedy_soup: str = ""
    simplified: str = ""
    tasks: dict[str, JudgedBy]


def verdict_content(
    verdict: Verdict,
    chosen: dict[str, Any],
    finalists: Sequence[dict[str, Any]],
    holdout: Mapping[str, "Scores"],
    uses: int,
    greedy_soup: str,
    task_set: "TaskSet",
    seed: int,
    next_step: str,
    simplified: str = "",
) -> dict[str, Any]:
    """The content of verdict.json.

    holdout: model -> its scores on the holdout split.
    greedy_soup: the sentence about the greedy soup.
    seed: of the bootstrap.
    next_step: the command that follows.
    simplified: what the chosen candidate leaves out, in words; empty if it was not simplified.
    The other arguments are keys of `VerdictFile`.
    """
    return verdict.as_dict() | {
        "next": next_step,
        "chosen": chosen,
        "finalists": list(finalists),
        "holdout": task_tables(task_set, holdout, seed),
        "holdout_uses": uses,
        "greedy_soup": greedy_soup,
        "simplified": simplified,
        "tasks": {
            t.name: {
                "metric": t.metric,
                "objective": t.objective,
                "weight": t.weight,
                "items": {split: len(items) for split, items in task_set.items[t.name].items()},
                "code": t.code,
            }
            | ({"function": t.lm.described} if t.is_python else {})
            for t in task_set.tasks
        },
    }


def task_tables(
    task_set: "TaskSet", models: Mapping[str, "Scores"], seed: int
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Model -> task -> its mean metric with the interval, and its mean objective."""
    tables: dict[str, dict[str, dict[str, float | None]]] = {name: {} for name in models}
    for task in task_set.tasks:
        own = [{task.name: scores[task.name][task.metric]} for scores in models.values()]
        ranges = {task.name: score_range(task.metric, [table[task.name] for table in own])}
        found = intervals(own, ranges, {task.name: 1.0}, seed)
        for (name, scores), interval in zip(models.items(), found, strict=True):
            objective = mean_score({task.name: scores[task.name][task.objective]}, {task.name: 1.0})
            tables[name][task.name] = {**asdict(interval), "objective": objective}
    return tables


def what_is_wrong(content: Any) -> str | None:
    """Why the content of a verdict.json cannot be shown; None if it can."""
    try:
        found = VerdictFile.model_validate_json(json.dumps(content), strict=True)  # as JSON: text is no number there
    except ValidationError as error:
        return first_problem(error)
    for name in ("winner", *(c.name for c in found.comparisons)):
        if lacking := found.tasks.keys() - found.holdout.get(name, {}).keys():
            return f"holdout.{name}: lacks {min(lacking)}"
    if any(not {"search", "holdout"} <= task.items.keys() for task in found.tasks.values()):
        return "tasks: one of them has no number of items"
    return None if "name" in found.chosen else "chosen: has no name"
