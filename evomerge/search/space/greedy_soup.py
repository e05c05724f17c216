"""The greedy soup (Wortsman et al. 2022, Recipe 1): a mean of sources that grows while its score does not fall."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from evomerge.search.space.baselines import Baseline, in_space
from evomerge.search.space.space import Space
from evomerge.search.workers.pool import run_all

GREEDY = "greedy soup"


@dataclass(frozen=True)
class GreedySoup:
    """The greedy soup of a search.

    ingredients: the sources in the order in which they were added.
    baseline: the soup as a baseline; if it is one source or all of them, the parent's or the uniform blend's.
    """

    ingredients: list[str]
    baseline: Baseline

    @property
    def sentence(self) -> str:
        """The soup in words, for log and report."""
        same = "" if self.baseline.kind == "greedy" else f": the same model as the baseline {self.baseline.name}"
        return f"The greedy soup took in {', '.join(self.ingredients)}{same}."


async def greedy(names: Sequence[str], score: Callable[[list[str]], Awaitable[float]]) -> list[str]:
    """The ingredients of the greedy soup, in the order in which they were added.

    names: the sources.
    score: the score of the mean of some sources, the higher the better.

    The sources are tried from the best alone to the worst (equal ones in the order given), and one stays if the score
    does not fall.  So the soup scores no less than the best source.
    """
    alone = dict(zip(names, await run_all(*(score([name]) for name in names)), strict=True))
    ranked = sorted(names, key=alone.__getitem__, reverse=True)
    soup, best = ranked[:1], alone[ranked[0]]
    for name in ranked[1:]:
        value = await score([*soup, name])
        if value >= best:
            soup, best = [*soup, name], value
    return soup


async def greedy_soup(space: Space, known: list[Baseline], score: Callable[[Baseline], Awaitable[float]]) -> GreedySoup:
    """The greedy soup of a search's sources.

    known: the other baselines; the soups of one source and of all are among them.
    score: the score of a baseline on the search split.
    """
    names = [s.name for s in space.config.sources]
    soups = {frozenset([b.name]): b for b in known if b.kind == "parent"}
    soups |= {frozenset(names): b for b in known if b.kind == "uniform"}

    def soup(chosen: list[str]) -> Baseline:
        weights = {n: 1.0 / len(chosen) if n in chosen else 0.0 for n in names}
        found = soups.get(frozenset(chosen))
        return found or in_space(space, f"soup of {', '.join(chosen)}", "greedy", weights, "linear")

    ingredients = await greedy(names, lambda chosen: score(soup(chosen)))
    best = soup(ingredients)
    return GreedySoup(ingredients, replace(best, name=GREEDY) if best.kind == "greedy" else best)
