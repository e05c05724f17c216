"""The race in which a search chooses its method: default recipes that fall behind are not scored on all items.

    round 1    the first default recipe of every method, on all items
    round 2    the others, each against the best of round 1 (`evaluate/racing.py`)

Nobody waits within a round, and no race depends on another one of its round, so the choice is the same with any number
of workers.  The scores of base, parents and round 1 decide which items come early and predict differences.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from evomerge.config.schema import SearchConfig
from evomerge.evaluate.looks import Looks
from evomerge.evaluate.racing import Estimate, Race, Vector
from evomerge.merge.recipe.recipe import Recipe
from evomerge.search.evaluation.jobs import Failure, RaceLooksJob
from evomerge.search.evaluation.race_setup import RaceSetup, build_race_setup
from evomerge.search.evaluation.stored_evaluations import Evaluations, StoredEvaluations, digest
from evomerge.search.space.baselines import Baseline
from evomerge.search.storage.item_scores import evaluation_record, unpack
from evomerge.search.storage.method_choice import DefaultRecipe
from evomerge.search.workers.pool import run_all

RACE = "evomerge:method_race"  # study attribute: what every race of round 2 has in common


@dataclass(frozen=True)
class MethodRace:
    """What every race of round 2 has in common.

    setup: the order of the items and where a race looks.
    incumbent: (N,) the values of the best recipe of round 1.
    others: (N,) each, of base, parents and the other recipes of round 1.
    penalty: of the best recipe of round 1.
    """

    setup: RaceSetup
    incumbent: Vector
    others: list[Vector]
    penalty: float

    def begin(self) -> Race:
        """Begin a race."""
        return self.setup.race(self.incumbent, self.others, self.penalty)

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
    first: Sequence[Baseline],
    others: Sequence[Baseline],
    known: Sequence[Baseline],
    evaluations: Evaluations,
    config: SearchConfig,
) -> list[DefaultRecipe]:
    """Run both rounds; the results of `first`, then those of `others`.

    known: base and parents, which have been scored.

    RuntimeError if a recipe cannot be scored for another reason than that it is broken.
    """
    found = await run_all(*(score_in_full(baseline, evaluations) for baseline in first))
    race = await settle_method_race(found, first, known, evaluations, config) if others else None
    if race is None:
        return found + await run_all(*(score_in_full(baseline, evaluations) for baseline in others))
    found += await run_all(*(score_in_race(baseline, evaluations, race) for baseline in others))
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
    """The result of a recipe of round 2.  What the study has of it is not scored again."""
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


async def settle_method_race(
    results: Sequence[DefaultRecipe],
    first: Sequence[Baseline],
    known: Sequence[Baseline],
    evaluations: Evaluations,
    config: SearchConfig,
) -> MethodRace | None:
    """The race of round 2, chosen once and kept with the study; None if races are off or do not pay.

    results: of round 1, whose recipes are `first`.
    known: base and parents.
    """
    values = [-np.inf if result.value is None else result.value for result in results]
    if not config.racing.enabled or not np.isfinite(max(values)):
        return None
    items = evaluations.items("search")
    kept = evaluations.study.user_attrs.get(RACE)
    if kept is None or kept["items"] != items:
        best = digest(first[int(np.argmax(values))].recipe)
        names = dict.fromkeys(digest(baseline.recipe) for baseline in [*known, *first])
        scored = [name for name in names if evaluations.stored("search", name) is not None]
        new = {"items": items, "known": scored, "incumbent": best}
        setup = setup_of(scored, evaluations, config)
        result = await evaluations.pool.run(RaceLooksJob(setup), "choosing where races look")
        if isinstance(result, Failure):
            evaluations.pool.log(f"default recipes do not race: {result.reason}")
            return None
        assert result.looks is not None, "a RaceLooksJob gives looks"
        evaluations.study.set_user_attr(RACE, new | asdict(result.looks))
    return kept_method_race(evaluations, config)


def kept_method_race(evaluations: StoredEvaluations, config: SearchConfig) -> MethodRace | None:
    """The race of round 2 that a study has kept; None if there is none on these items."""
    kept = evaluations.study.user_attrs.get(RACE)
    if kept is None or kept["items"] != evaluations.items("search") or len(kept["ends"]) == 1:
        return None
    setup = setup_of(kept["known"], evaluations, config)
    setup = replace(setup, looks=Looks(tuple(kept["ends"]), tuple(kept["costs"])))
    tables = {name: evaluations.stored("search", name) for name in kept["known"]}
    vectors = {name: setup.values(scores) for name, scores in tables.items() if scores is not None}
    best = tables[kept["incumbent"]]
    assert best is not None, "the best recipe of round 1 was scored on all items"
    others = [values for name, values in vectors.items() if name != kept["incumbent"]]
    return MethodRace(setup, vectors[kept["incumbent"]], others, evaluations.scale.penalty(best))


def setup_of(names: Sequence[str], evaluations: StoredEvaluations, config: SearchConfig) -> RaceSetup:
    """The race setup by the scores of some recipes.  names: their digests."""
    tables = [scores for name in names if (scores := evaluations.stored("search", name)) is not None]
    items = evaluations.items("search")
    return build_race_setup(evaluations.task_set, evaluations.scale, items, tables, config.seed, config.racing)


def was_raced(evaluations: StoredEvaluations, recipe: Recipe) -> bool:
    """Whether the scores that the study has of a recipe are those of a race."""
    return evaluation_record(evaluations.study.user_attrs, "search", digest(recipe)).seconds.race is not None
