"""The race in which a search chooses its method: default recipes that fall behind are not scored on all items.

    first look    every recipe on the items before the first look of a race; the one with the best mean leads
    leader        on all items
    races         the others, each against the leader (`evaluate/racing.py`)

No recipe waits for another one of its step, and no race depends on another race, so the choice is the same with any
number of workers.  The scores of base and parents decide which items come early, and predict differences.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from evomerge.config.schema import SearchConfig
from evomerge.evaluate.looks import Looks
from evomerge.evaluate.racing import Estimate, Race, Vector
from evomerge.merge.recipe.recipe import Recipe
from evomerge.search.evaluation.jobs import EvaluationJob, Failure
from evomerge.search.evaluation.race_policy import chosen_looks
from evomerge.search.evaluation.race_setup import RaceSetup, build_race_setup
from evomerge.search.evaluation.stored_evaluations import Evaluations, StoredEvaluations, digest
from evomerge.search.space.baselines import Baseline
from evomerge.search.storage.item_scores import evaluation_record, unpack
from evomerge.search.storage.method_choice import DefaultRecipe
from evomerge.search.workers.pool import run_all

RACE = "evomerge:method_race"  # study attribute: what all these races have in common


@dataclass(frozen=True)
class MethodRace:
    """What all these races have in common.

    setup: the order of the items and where a race looks.
    leader: (N,) its values.
    others: (N,) each, the values of base and parents.
    penalty: of the leader.
    """

    setup: RaceSetup
    leader: Vector
    others: list[Vector]
    penalty: float

    def begin(self) -> Race:
        """Begin a race."""
        return self.setup.race(self.leader, self.others, self.penalty)

    def estimate(self, values: Vector) -> Estimate | None:
        """The estimate of a recipe's value at the look that stops it, None if none does.

        values: (N,) of its items; NaN for those that were not scored.

        ValueError if they were scored up to another look.
        """
        race = self.begin()
        for items in np.split(self.setup.order.items, self.setup.looks.ends[:-1]):
            if race.observe(values[items]):
                return race.estimate()
        return None


async def score_default_recipes(
    recipes: Sequence[Baseline], known: Sequence[Baseline], evaluations: Evaluations, config: SearchConfig
) -> list[DefaultRecipe]:
    """The results of default recipes on the search split, in their order.

    known: base and parents, which have been scored.

    RuntimeError if a recipe cannot be scored for another reason than that it is broken.
    """
    await settle_leader(recipes, known, evaluations, config)
    leader = kept_leader(evaluations)
    for baseline in (b for b in recipes if digest(b.recipe) == leader):
        await score_in_full(baseline, evaluations)
    race = kept_method_race(evaluations, config)
    if race is None:
        return await run_all(*(score_in_full(baseline, evaluations) for baseline in recipes))
    found = await run_all(*(score_in_race(baseline, evaluations, race) for baseline in recipes))
    share = float(np.mean([1.0 if result.partial is None else result.partial for result in found]))
    evaluations.pool.log(f"choosing the method took {share:.0%} of the items of all default recipes")
    return found


async def score_in_full(baseline: Baseline, evaluations: Evaluations) -> DefaultRecipe:
    """The result of a recipe that is scored on all items."""
    try:
        scores = await evaluations.score("search", baseline.recipe, baseline.name)
    except ArithmeticError:
        return DefaultRecipe(baseline.name, None)
    return DefaultRecipe(baseline.name, evaluations.scale.value(scores))


async def score_in_race(baseline: Baseline, evaluations: Evaluations, race: MethodRace) -> DefaultRecipe:
    """The result of a recipe that races.  What the study has of it is not scored again."""
    result = known_result(baseline, evaluations, race)
    if result is None:
        try:
            await evaluations.score_in_race(baseline.recipe, baseline.name, race.setup, race.begin())
        except ArithmeticError:
            return DefaultRecipe(baseline.name, None)
        result = known_result(baseline, evaluations, race)
    assert result is not None, "a race has just ended"
    return result


def known_result(baseline: Baseline, evaluations: StoredEvaluations, race: MethodRace) -> DefaultRecipe | None:
    """The result of a recipe by the scores that the study has, None if they are not enough."""
    if (scores := evaluations.stored("search", baseline.recipe)) is not None:
        return DefaultRecipe(baseline.name, evaluations.scale.value(scores))
    record = evaluation_record(evaluations.study.user_attrs, "search", digest(baseline.recipe))
    if record.partial is None or record.items != race.setup.items:
        return None
    tables = {task: {m: unpack(text) for m, text in metrics.items()} for task, metrics in record.scores.items()}
    try:
        estimate = race.estimate(race.setup.values(tables))
    except ValueError:
        return None
    return None if estimate is None else DefaultRecipe(baseline.name, estimate.value, estimate.fraction)


async def settle_leader(
    recipes: Sequence[Baseline], known: Sequence[Baseline], evaluations: Evaluations, config: SearchConfig
) -> None:
    """Choose where races look, and the leader, once for these items; both are kept with the study.

    Nothing is chosen if races are off or do not pay, or if all recipes are broken.
    """
    items = evaluations.items("search")
    kept = evaluations.study.user_attrs.get(RACE)
    if not config.racing.enabled or (kept is not None and kept["items"] == items):
        return
    names = [digest(b.recipe) for b in known if evaluations.stored("search", b.recipe) is not None]
    setup = setup_of(names, evaluations, config)
    looks = await chosen_looks(setup, evaluations.pool, "default recipes do not race")
    if looks is None or len(looks.ends) == 1:
        return
    setup = replace(setup, looks=looks)
    means = await run_all(*(first_look(baseline, evaluations, setup) for baseline in recipes))
    if np.isfinite(max(means)):
        leader = digest(recipes[int(np.argmax(means))].recipe)
        new = {"items": items, "known": names, "leader": leader, **asdict(looks)}
        evaluations.study.set_user_attr(RACE, new)


async def first_look(baseline: Baseline, evaluations: Evaluations, setup: RaceSetup) -> float:
    """The value of a recipe by the items before the first look; minus infinity if it is broken.

    The scores are not kept: of items that are scored in another batch the last bits may differ.
    """
    ids = [(task, i.id) for task in setup.sizes for i in evaluations.task_set.items[task]["search"]]
    drawn = np.sort(setup.order.items[: setup.looks.ends[0]])  # in the order in which scores come
    asked: dict[str, list[str]] = {}
    for task, name in (ids[k] for k in drawn):
        asked.setdefault(task, []).append(name)
    job = EvaluationJob(baseline.recipe, "search", asked)
    result = await evaluations.pool.run(job, f"search: {baseline.name}, first items")
    if isinstance(result, Failure):
        if result.broken:
            return -np.inf
        raise result.error()
    evaluations.monitor.add_used(result.used)
    by_task = evaluations.scale.item_values(result.scores)
    return mean_of_first(setup, drawn, np.concatenate([by_task[task] for task in asked]))


def mean_of_first(setup: RaceSetup, drawn: NDArray[np.intp], values: Vector) -> float:
    """An estimate of a recipe's value by the first items; those that are drawn with twice the probability count half.

    drawn: (n,) the places of the items.
    values: (n,) of these items.

    Source: Hajek (1971).
    """
    weights = setup.order.weights[drawn] / setup.order.draws[drawn]
    return float(weights @ values / weights.sum())


def kept_leader(evaluations: StoredEvaluations) -> str | None:
    """The digest of the leader that a study has kept for these items, None if there is none."""
    kept = evaluations.study.user_attrs.get(RACE)
    return None if kept is None or kept["items"] != evaluations.items("search") else kept["leader"]


def kept_method_race(evaluations: StoredEvaluations, config: SearchConfig) -> MethodRace | None:
    """What the races have in common, by what a study has kept; None if there are no races or no leader with scores."""
    leader = kept_leader(evaluations)
    best = None if leader is None else evaluations.stored("search", leader)
    if best is None:
        return None
    kept = evaluations.study.user_attrs[RACE]
    setup = setup_of(kept["known"], evaluations, config)
    setup = replace(setup, looks=Looks(tuple(kept["ends"]), tuple(kept["costs"])))
    tables = (evaluations.stored("search", name) for name in kept["known"])
    others = [setup.values(scores) for scores in tables if scores is not None]
    return MethodRace(setup, setup.values(best), others, evaluations.scale.penalty(best))


def setup_of(names: Sequence[str], evaluations: StoredEvaluations, config: SearchConfig) -> RaceSetup:
    """The race setup by the scores of some recipes.  names: their digests."""
    tables = [scores for name in names if (scores := evaluations.stored("search", name)) is not None]
    items = evaluations.items("search")
    return build_race_setup(evaluations.task_set, evaluations.scale, items, tables, config.seed, config.racing)


def was_raced(evaluations: StoredEvaluations, recipe: Recipe) -> bool:
    """Whether the scores that the study has of a recipe are those of a race."""
    return evaluation_record(evaluations.study.user_attrs, "search", digest(recipe)).seconds.race is not None
