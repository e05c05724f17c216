"""The baselines of a running search: which have been tried, what they score, and the greedy soup made of them."""

from collections.abc import Sequence

from evomerge.search.evaluation.stored_evaluations import Evaluations
from evomerge.search.space.baselines import Baseline, baselines
from evomerge.search.space.greedy_soup import GreedySoup, greedy_soup
from evomerge.search.space.start_points import start_baselines
from evomerge.search.storage.study import SearchStudy
from evomerge.search.workers.pool import run_all


class ScoredBaselines:
    """The recipes that a search did not find, with their values on the search split.

    study: has the trials of those that are points of its space.
    evaluations: scores the others.
    tried: the best recipe of each method that the search could choose.
    """

    def __init__(self, study: SearchStudy, evaluations: Evaluations, tried: Sequence[Baseline]) -> None:
        self.study = study
        self.evaluations = evaluations
        first = start_baselines(study.stored, study.space, evaluations.pool.log)
        self.found = baselines(study.space, first, tried)  # `make_soup` adds to this list
        self.soup: GreedySoup | None = None

    @property
    def parents(self) -> list[Baseline]:
        """Each source alone."""
        return [b for b in self.found if b.kind == "parent"]

    def untried(self) -> list[Baseline]:
        """Those in the space that have no finished trial."""
        return [b for b in self.found if b.point is not None and self.study.of_baseline(b.name) is None]

    async def score_outside(self) -> None:
        """Score every one that is no point of the space."""
        outside = [b for b in self.found if b.point is None]
        self.evaluations.monitor.phase("scoring the baselines outside the space", len(outside))
        await run_all(*(self.value(b) for b in outside))

    async def value(self, baseline: Baseline) -> float:
        """The value of a baseline: its trial's, else that of a full evaluation on the search split.

        Minus infinity if the model is broken: a failed trial, a score that is not finite.
        """
        if baseline.point is not None and (trial := self.study.of_baseline(baseline.name)) is not None:
            return -float("inf") if trial.value is None else trial.value
        try:
            scores = await self.evaluations.score("search", baseline.recipe, baseline.name)
        except ArithmeticError:
            return -float("inf")
        return self.evaluations.scale.value(scores)

    async def make_soup(self) -> GreedySoup:
        """The greedy soup, made once; it becomes one of the baselines unless it is one of them already."""
        if self.soup is None:
            soup = await greedy_soup(self.study.space, self.found, self.value)
            if soup.baseline not in self.found:
                self.found.append(soup.baseline)
            self.evaluations.pool.log(soup.sentence)
            self.soup = soup
        return self.soup
