"""The scale of a study's values: settled once, from the scores of base and parents, and kept for every resume."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from evomerge.errors import EvomergeError
from evomerge.search.evaluation.guards import Guard, GuardScale, guard_scale
from evomerge.search.evaluation.scale import SCALE, Scale, make_scale, plain_scale
from evomerge.search.evaluation.stored_evaluations import Evaluations, digest
from evomerge.search.evaluation.task_set import Scores, TaskSet
from evomerge.search.space.baselines import Baseline, base_alone, reference
from evomerge.search.space.space import Space
from evomerge.search.storage.study import SearchStudy
from evomerge.search.workers.pool import run_all

UNWRITTEN = -1.0  # nats a token: in a right answer of a greedy model every token is the likeliest one
FEW = 5  # right answers that say enough


async def settle_scale(study: SearchStudy, evaluations: Evaluations, baselines: Sequence[Baseline]) -> None:
    """Score base and parents on the search split by every metric, and keep the scale that they give.

    A study whose trials began before there were scales goes on without one, so that its values stay comparable.
    What has a scale keeps it; a task or a guard that was added since gets one.

    EvomergeError if the reference of a guard cannot be scored.
    """
    space, guards, monitor = study.space, evaluations.task_set.guards, evaluations.monitor
    plain, kept = plain_scale(evaluations.task_set), study.stored.user_attrs.get(SCALE)
    earlier = None if kept is None else Scale.from_json(kept)
    if (study.trials and earlier is None) or (earlier is not None and covers(earlier, plain, guards)):
        return
    base = base_alone(space)
    parents = [b for b in baselines if b.kind == "parent"]
    known = [base, *(b for b in parents if digest(b.recipe) != digest(base.recipe))]
    monitor.phase("scoring base and parents", len(known))
    tables = await run_all(*(every_metric_of(b, evaluations) for b in known))
    guarded = guard_scales(guards, space, parents, {digest(b.recipe): t for b, t in zip(known, tables, strict=True)})
    found = {b.name: scores for b, scores in zip(known, tables, strict=True) if scores is not None}
    scale = plain
    if space.config.scale == "parents" and base.name in found:
        scale = make_scale(evaluations.task_set, found.pop(base.name), found)
    elif space.config.scale == "parents":
        monitor.say("the base could not be scored, so every task keeps its own scale; log.txt says why")
    described = Scale({} if scale is plain else scale.tasks, guarded)
    unwritten = unwritten_gold(evaluations.task_set, [table for table in tables if table is not None])
    for task, logprob in unwritten.items():
        monitor.say(
            f"task {task}: where models answer right they do not write its gold answer (log-probability {logprob:.1f} "
            "a token), so only the metric counts. With `gold`, the answer as they write it, the search sees more"
        )
    tasks = {name: replace(task, share=1.0) if name in unwritten else task for name, task in scale.tasks.items()}
    scale = Scale(tasks, guarded)
    evaluations.keep_scale(scale if earlier is None else scale.with_tasks(earlier))
    for sentence in described.sentences():
        monitor.say(sentence)


def unwritten_gold(task_set: TaskSet, tables: Sequence[Scores]) -> dict[str, float]:
    """The tasks whose gold answer is not what models write where they answer right, with its mean log-probability.

    Such as a bare number, where the task cuts the number out of a worked solution: to climb its probability would
    unlearn the solution.

    tables: the scores of models on the search split by every metric.
    """
    found = {}
    for task in task_set.goals:
        if task.kind != "generate_until" or not task_set.values_metric(task):
            continue
        both = (task.metric, "answer_logprob")
        known = [t[task.name] for t in tables if "answer_logprob" in t[task.name]]
        scores = [pair for metrics in known for pair in zip(*(metrics[m] for m in both), strict=True)]
        right = [logprob for score, logprob in scores if score >= 1.0]
        if len(right) >= FEW and (mean := sum(right) / len(right)) < UNWRITTEN:
            found[task.name] = mean
    return found


def covers(scale: Scale, plain: Scale, guards: Sequence[Guard]) -> bool:
    """Whether a scale has all tasks and guards of a search.  plain: the scale of its tasks that changes nothing."""
    tasks = all(name in scale.tasks and task.fits(scale.tasks[name]) for name, task in plain.tasks.items())
    return tasks and all(g.name in scale.guards and g == scale.guards[g.name].guard for g in guards)


async def every_metric_of(baseline: Baseline, evaluations: Evaluations) -> Scores | None:
    """A baseline's scores on the search split by every metric; None, and a line in the log, if there are none."""
    try:
        return await evaluations.score("search", baseline.recipe, baseline.name, everything=True, canary=True)
    except (ArithmeticError, RuntimeError) as error:
        evaluations.pool.log(f"{baseline.name} cannot be scored: {error}")
        return None


def guard_scales(
    guards: Sequence[Guard], space: Space, parents: Sequence[Baseline], tables: Mapping[str, Scores | None]
) -> dict[str, GuardScale]:
    """The guards with their levels and units, by name.

    tables: digest of the recipe -> its scores on the search split.

    EvomergeError if a guard's reference could not be scored.
    """
    found = {}
    for guard in guards:
        scores = tables.get(digest(reference(space, parents, guard.of).recipe))
        if scores is None:
            raise EvomergeError(f"guard {guard.name}: its reference {guard.of} cannot be scored; log.txt says why")
        found[guard.name] = guard_scale(guard, scores)
    return found
